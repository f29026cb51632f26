"""Which form of an op a tensor takes: its Triton kernel on a GPU, plain torch elsewhere.

A device that turns out not to have a kernel (Triton cannot compile it there, or it does not fit) takes the torch form
of every op of decoding from then on; whoever finds that out says so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_without_kernels: set[torch.device] = set()


def takes_kernel(x: Tensor) -> bool:
    """Whether an op on this tensor runs as a Triton kernel."""
    return x.is_cuda and x.device not in _without_kernels


def has_kernels(device: torch.device) -> bool:
    """Whether no kernel has failed on this device yet."""
    return device not in _without_kernels


def go_without_kernels(device: torch.device) -> None:
    """Let this device (with its index, as `tensor.device` has it) take the torch forms, for the rest of the process.

    go_without_kernels(torch.device("cuda", 0))
    """
    _without_kernels.add(device)


def on_device(x: Tensor) -> AbstractContextManager:
    """Where x lies on a GPU, a block in which that is the current one: Triton launches on no other.

    with on_device(query):
        _kernel[grid](query, ...)
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
