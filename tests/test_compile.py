"""torch.compile sees the ops of a step as they are: no break in the graph, mutations declared, shapes foretold."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import Verified, graph
from mtpkern.kernels.advance import Rows, Sequences

# Importing the ops registers them.
from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.gated_lora import gated_lora
from mtpkern.kernels.kv_write import kv_write
from mtpkern.kernels.readout import readout

B, R, HKV, D, C = 2, 5, 2, 4, 6
CPU = torch.device("cpu")
SEQ, SLOT = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3, 1, C, C])
START = torch.tensor([0, 2, 3])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def arguments(name: str) -> tuple[Any, ...]:
    if name == "readout":
        return draw(R, 9), 3
    if name == "gated_lora":
        gate = torch.tensor([False, True, True, False, False])
        return [draw(R, 7), draw(R, 3)], draw(R, 6), gate, draw(4, 6), [draw(7, 2), draw(3, 2)], [0.5, 2.0]
    caches = draw(B, HKV, C + 1, D), draw(B, HKV, C + 1, D + 2)
    if name == "kv_write":
        return *caches, draw(R, HKV, D), draw(R, HKV, D + 2), SEQ, torch.tensor([2, 3, 1, 4, C])
    if name == "decode_attention":
        return (
            draw(R, 2 * HKV, D),
            *caches,
            SEQ,
            SLOT,
            START,
            3,
            0.5,
            2,
            None,
            draw(2 * HKV),
            False,
            SLOT + 1,
            SLOT + 1,
            1,
        )
    sequences, rows = Sequences.allocate(B, C, C, CPU), Rows.allocate(R, B, CPU, 2)
    sequences.length.fill_(2)
    sequences.pending.fill_(1)
    sequences.limit.fill_(C)
    rows.start.copy_(torch.tensor([0, 2, 4]))
    read = torch.tensor([4, 5, 6, 7]), torch.tensor([0.9, 0.8, 0.7, 0.9])
    return *vars(sequences).values(), *vars(rows).values(), *read, torch.tensor(0.5), torch.tensor([-1]), 2, True, 8, 1


@pytest.mark.parametrize("name", ["readout", "kv_write", "gated_lora", "decode_attention", "advance"])
def test_what_is_declared_is_what_happens(name: str) -> None:
    op = getattr(torch.ops.mtpkern, name).default
    torch.library.opcheck(op, arguments(name), test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without its code generation: everything that can break the graph, little that takes time."""
    monkeypatch.setattr(graph, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_forward_gives_the_same_tokens(aot_eager: None, tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    ids, mask = tiny.prompts(9, 4)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "strategy": Verified(3, threshold=0.2)}
    expected = mtpkern.generate(model, ids, **options)
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # fullgraph: a break would end in a fallback, announced
        assert torch.equal(mtpkern.generate(model, ids, **options, compile=True), expected)
        assert torch.equal(mtpkern.generate(model, ids, **options, compile=True), expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1  # every pass and the next call use it again
    assert not counters["graph_break"]


def test_a_forward_that_cannot_be_compiled_goes_on(aot_eager: None, tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    ids, _ = tiny.prompts(4)
    expected = mtpkern.generate(model, ids, max_new_tokens=8)

    def look(module: Any, args: Any, out: Tensor) -> None:
        torch._dynamo.graph_break()

    model.model.embed_tokens.register_forward_hook(look)
    with pytest.warns(RuntimeWarning, match="could not compile the model's forward, which runs uncompiled"):
        assert torch.equal(mtpkern.generate(model, ids, max_new_tokens=8, compile=True), expected)


def test_eager_calls_do_not_go_through_the_dispatcher() -> None:
    """It would cost more than the ops do on a CPU."""

    class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.namespace != "mtpkern"
            return func(*args, **(kwargs or {}))

    with Watcher():
        readout(*arguments("readout"))
        kv_write(*arguments("kv_write"))
        gated_lora(*arguments("gated_lora"))
        *tensors, max_rows, scale, window, softcap, sinks, _, _, _, _ = arguments("decode_attention")
        decode_attention(*tensors, max_rows=max_rows, scale=scale, window=window, softcap=softcap, sinks=sinks)
