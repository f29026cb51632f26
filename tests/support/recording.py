"""Captured steps without a GPU: a stand-in records the operations of a step and replays them on the same tensors.

That is what a CUDA graph does: addresses and plain numbers are fixed at the capture, and no Python runs at a replay.
"""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, graph, pool
from mtpkern.decoder import Decoder
from mtpkern.poll import LAG, Poll
from mtpkern.pool import release_graphs


class Recorder(TorchDispatchMode):
    """Notes every operation with the tensors that went in and came out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out


class RecordedStep:
    """Stands in for `CapturedStep`: capturing changes nothing, replaying runs the operations and no Python of ours."""

    captures = 0

    def __init__(self, step: Any, device: torch.device, beside: Any) -> None:
        type(self).captures += 1
        decoder = getattr(step, "func", step).__self__
        buffers = [x for pair in decoder.cache.layers.values() for x in pair]
        state = [*vars(decoder.sequences).values(), *vars(decoder.rows).values(), *buffers]
        before = [x.clone() for x in state]
        with Recorder() as recorder:
            step()
        self.operations = recorder.operations
        self.rows = decoder.rows.seq
        with torch.inference_mode():
            for x, y in zip(state, before):
                x.copy_(y)

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():  # neither a view nor in place
                    x.copy_(y)


class Event:
    """Of a device that is late: asked twice whether it is there, it is not."""

    asked = 0

    def __init__(self, device: torch.device) -> None: ...
    def record(self) -> None: ...
    def wait(self) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 2


@contextmanager
def captured_by(step: type, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps on the CPU are captured, by this stand-in, and kept."""
    monkeypatch.setattr(graph, "CapturedStep", step)
    monkeypatch.setattr(graph, "on_side_stream", lambda device: nullcontext())
    monkeypatch.setattr(pool, "memory_of", lambda device: 1 << 40)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr("mtpkern.kernels.packed_rows.is_host", lambda _: False)
    for module in ("mtpkern.decoder", "mtpkern.options"):
        monkeypatch.setattr(f"{module}.wants_graph", lambda use_graph, device: use_graph is not False)
    release_graphs()
    yield
    release_graphs()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordedStep]]:
    """Steps on the CPU are captured, by the stand-in that records them, and kept."""
    RecordedStep.captures = 0
    with captured_by(RecordedStep, monkeypatch):
        yield RecordedStep


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """States and copies of the device are read late, as on a GPU."""
    init = Poll.__init__

    def late(self: Any, sequences: Any) -> None:
        init(self, sequences)
        self.on_cpu = False
        self.copies = torch.empty(LAG + 1, *self.state().shape, dtype=torch.int64)
        self.events = [Event(torch.device("cpu"))] * (LAG + 1)

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(Poll, "__init__", late)


def generate(tiny: SimpleNamespace, model: Any, *lengths: int, seed: int = 1, **options: Any) -> Any:
    ids, mask = tiny.prompts(*lengths, seed=seed)
    return mtpkern.generate(
        model,
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        return_dict_in_generate=True,
        # A model with hooks is looked at anew, which takes passes. Where no threshold is given, one by load is told to
        # passes on a CPU alone.
        **{"max_new_tokens": 12, "check_model": False, "strategy": mtpkern.Verified(threshold=0.6), **options},
    )


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert got.blocks == expected.blocks
    assert got.finish_reasons == expected.finish_reasons


def kept(model: Any) -> list[Decoder]:
    return list(pool._kept.get(model, {}).values())


def poison(decoder: Decoder) -> None:
    """What no run may read of the one before it: faults, stops, wrong plans, NaN in every slot."""
    with torch.inference_mode():
        for x in (*vars(decoder.sequences).values(), *vars(decoder.rows).values()):
            x.fill_(3)
        for pair in decoder.cache.layers.values():
            for x in pair:
                x.fill_(torch.nan)
        decoder.terms.threshold.fill_(torch.nan)
        decoder.terms.stop_ids.fill_(7)
        decoder.terms.price.fill_(7)
        decoder.terms.budget.fill_(1)


# Each with another threshold: it is no part of the graph.
STRATEGIES = {
    "Verified": [Verified(3, threshold=0.2, masks=2), Verified(3, threshold=0.6, masks=2)],
    "ConfAdapt": [ConfAdapt(3, threshold=0.3), Static(3)],
    "Static": [Static(1), ConfAdapt(1, threshold=0.5)],
}


def hook(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, out: -out)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[graph.CapturedStep]]:
    """Every step that is captured; nothing kept before or after. A capture that fails fails the test."""
    made: list[graph.CapturedStep] = []

    class Counted(graph.CapturedStep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(graph, "CapturedStep", Counted)
    release_graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield made
    made.clear()
    release_graphs()
    gc.collect()
    torch.cuda.empty_cache()
