"""An accelerator that is not there, and a watcher that raises at whatever would make the host wait for it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# The one device type beside "cpu" and "meta" that every build of torch can slice a FakeTensor on: the C++ side of
# indexing sets the current device first, and knows how to for those alone that it was built with.
FAKE = "lazy:0"


@pytest.fixture(scope="module")
def autocast_off_on_the_made_up_device() -> Iterator[None]:
    """transformers 5.17 asks in every rotary embedding, and torch has no autocast for that device."""
    ask = torch.is_autocast_enabled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *device: device[:1] != ("lazy",) and ask(*device))
        yield


@pytest.fixture(scope="module")
def nothing_on_the_host() -> Iterator[None]:
    """On a CPU, too, `advance` and attention are what they are on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpkern.kernels.advance.takes_host", lambda *_: False)
        patch.setattr("mtpkern.kernels.packed_rows.is_host", lambda _: False)
        yield


# Operations whose result, or its shape, the host has to know before it can go on.
SYNCING = {
    *(aten._local_scalar_dense, aten.equal, aten.allclose, aten.nonzero, aten.masked_select, aten.bincount),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class SyncError(Exception):
    """An operation that would make the host wait for the device."""


class Watcher(TorchDispatchMode):
    """Raises SyncError at an operation that syncs, and counts the others.

    With `accelerator`, tensors on the CPU are the host's: none may take part in a step but single numbers, which
    travel with a kernel's arguments.
    """

    def __init__(self, *, accelerator: bool = False) -> None:
        super().__init__()
        self.accelerator = accelerator
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a question that a tensor without memory answers through here
            return func(*args, **kwargs)
        # In inference mode composite operations arrive whole; what they consist of is what counts.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        self.operations += 1
        packet = func.overloadpacket
        if packet in SYNCING:
            raise SyncError(f"{func} makes the host wait")
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            raise SyncError(f"{func} without output_size makes the host wait for the size")
        if packet in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            raise SyncError(f"{func} by a mask makes the host wait for the number of its true elements")
        if func.namespace not in ("aten", "prims"):
            raise SyncError(f"{func} is opaque: nobody sees what it does inside")
        out = func(*args, **kwargs)
        if self.accelerator:
            devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            if packet in (aten._to_copy, aten.copy_) and len(devices) > 1:
                raise SyncError(f"{func} moves data between host and device")
            host = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor) and x.device.type == "cpu" and x.dim()]
            if host:
                raise SyncError(f"{func} brings a host tensor {tuple(host[0].shape)} into the step")
        return out


def to_fake(model: Any) -> Any:
    """Take a model's weights to the accelerator that is not there; inside a FakeTensorMode."""
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None:
                fake = torch.empty(x.shape, dtype=torch.bfloat16, device=FAKE)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device=FAKE)
    return model
