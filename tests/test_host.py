"""How often a whole call of `generate` waits for the device, counted without a device.

On a made-up accelerator that computes: its tensors say that they lie elsewhere, and hold one on the CPU. What comes
from there to the host is counted, and what the host sends there and waits for.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mtpkern
from mtpkern.host import on_host

CPU, ELSEWHERE = torch.device("cpu"), torch.device("lazy:0")  # of all names, this one: see support/made_up_device.py
# What the host has to know a value for. A number that lies on a GPU is read before masked_fill fills in with it.
READING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "masked_fill", "masked_fill_"}


class There(Tensor):
    """A tensor on the made-up device; `here` is what it holds."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        form = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        with torch.inference_mode(False):  # one that a view may be of, wherever it is made
            return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=ELSEWHERE, **form)  # type: ignore

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def tolist(self) -> Any:
        """torch has none for a class of its own."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the mode")


class Accelerator(TorchDispatchMode):
    """Computes, and notes which module has made the host wait: for what it `read`, for what it `sent`."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.sent: list[str] = []

    def __enter__(self) -> "Accelerator":
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=...) makes them on the host, and sends them
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return ELSEWHERE if isinstance(args[0], There) else CPU
        # In inference mode composite operations arrive whole; see support/made_up_device.py.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = {id(x.here): x for x in tensors if isinstance(x, There)}
        if name == "copy_":
            waits, goes_there = not (args[2:] or kwargs.get("non_blocking")), isinstance(args[0], There)
        else:
            device = kwargs.get("device")
            waits, goes_there = not kwargs.get("non_blocking"), device == ELSEWHERE if device else bool(there)
        number = [x for x in args[1:] if isinstance(x, There) and not x.dim()]
        if waits and there and (not goes_there or (name in READING and (number or "fill" not in name))):
            self.read.append(asker())
        elif waits and goes_there and name in ("_to_copy", "copy_") and len(there) < len(tensors):
            self.sent.append(asker())
        args, kwargs = tree_map_only(There, lambda x: x.here, (args, kwargs))
        out = func(*args, **{key: CPU if isinstance(x, torch.device) else x for key, x in kwargs.items()})
        if not goes_there:
            return out.clone() if isinstance(out, Tensor) and id(out) in there else out
        # What was changed in place stays the tensor that it was.
        same = there if func._schema.is_mutable else {}
        return tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else There(x), out)


def asker() -> str:
    """The innermost module of ours or of transformers' that is at work."""
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__"))
        if name.startswith(("mtpkern.", "transformers.")):
            return name
    return "test"


class Event:
    """An event of a device that has always got there."""

    def __init__(self, device: torch.device) -> None:
        pass

    def record(self) -> None:
        """Nothing is queued."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """The device, and what torch would do for it if it were there."""
    ask, empty = torch.is_autocast_enabled, torch.empty
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device[:1] != ("lazy",) and ask(*device))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: nullcontext())
    return Accelerator()


def moved(model: Any) -> Any:
    """The model with its weights on the made-up device."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: There(x.data) for name, x in held.items() if x is not None})
    return model


@pytest.mark.parametrize("how", ["plain", "record", "watched"])
def test_a_call_reads_the_device_once_before_and_once_behind_its_passes(
    tiny: SimpleNamespace, accelerator: Accelerator, how: str
) -> None:
    input_ids, attention_mask = tiny.prompts(6, 4)
    options: dict[str, Any] = {"max_new_tokens": 3, "strategy": mtpkern.Verified(2), "mask_token_id": tiny.mask}
    options |= {"pad_token_id": tiny.pad, "check_model": False, "return_dict_in_generate": how != "plain"}
    right = mtpkern.generate(tiny.model("llama"), input_ids, attention_mask=attention_mask, **options)
    shown: list[Tensor] = []
    if how == "watched":
        options["streamer"] = SimpleNamespace(put=shown.append, end=lambda: None)
    model = moved(tiny.model("llama"))
    with accelerator:
        found = mtpkern.generate(model, There(input_ids), attention_mask=There(attention_mask), **options)
        by_us = [name for name in accelerator.read if name.startswith("mtpkern.")]
        # Of the rest, transformers looks at prompts, and for padding; nobody does between passes.
        others = set(accelerator.read) - set(by_us)
        assert by_us == ["mtpkern.host", "mtpkern.host"]
        assert others <= {"transformers.generation.utils", "transformers.masking_utils"}
        assert not [name for name in accelerator.sent if name.startswith("mtpkern.")]
        if how == "plain":
            assert found.tolist() == right.tolist()
        else:
            assert found.sequences.tolist() == right.sequences.tolist()
            assert found.blocks == right.blocks
            assert found.passes == right.passes
            assert found.finish_reasons == right.finish_reasons == ["length", "length"]
    assert len(shown) == (4 if how == "watched" else 0)


def test_what_is_read_keeps_its_numbers(accelerator: Accelerator) -> None:
    """Of any type and form, some of it on the host already."""
    given = [
        torch.tensor([True, False, True]),
        torch.tensor([[1 << 40, -2], [3, 4]]).T,
        torch.tensor(0.25),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor([[7], [9]], dtype=torch.int32),
    ]
    with accelerator:
        found = on_host(*map(There, given[:-1]), given[-1])
        assert accelerator.read == ["mtpkern.host"]
    for a, b in zip(found, given):
        assert type(a) is Tensor
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
