"""Which form of an op a tensor takes: its Triton kernel on a GPU, plain torch elsewhere.

A device that turns out not to have a kernel (Triton cannot compile it there, or it does not fit) takes the torch form
of every op of decoding from then on; whoever finds that out says so.

From Hopper on, NVIDIA's GPUs may start a kernel before the one ahead of it has ended (programmatic dependent launch),
which hides its launch. The kernels of a decoding step are launched so, and this keeps their order:

1. Every program of such a kernel begins with `gdc_wait`, before it reads or writes anything, also one that returns at
   once. The wait is for the end of the kernel ahead, its writes included; so a kernel ends after all before it.
2. Only behind the wait it lets the next one start. So that one starts when all programs of this one run, and all
   kernels before this one have ended: at most two overlap, and what waits takes no place from a program that must run.
3. What is launched otherwise (cuBLAS, torch's operations, the next graph) waits for the whole kernel ahead by itself.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from platform import machine
from typing import Any

import torch
from torch import Tensor

if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def gdc_wait(PDL: tl.constexpr):
        """First in a kernel that is launched with `pdl_options`: wait for the kernel ahead, then let the next start."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()


# False launches every kernel of a step behind the end of the one ahead: for a comparison.
PDL = True

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


def strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """The strides of each, as kernels take them: `strides(torch.zeros(2, 3))` is [(3, 1)]."""
    return [x.stride() for x in tensors]


def pdl_options(device: torch.device) -> dict[str, Any]:
    """What a launch adds so that the kernel, which begins with `gdc_wait(PDL)`, may start early where the GPU can.

    _kernel[grid](query, ..., **pdl_options(query.device))
    """
    return {"PDL": True, "launch_pdl": True} if PDL and _has_pdl(device) else {"PDL": False}


@cache
def _has_pdl(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip or triton.knobs.runtime.interpret:
        return False
    # Of those of capability 12 a capture was seen to fail (sglang's pull request 18596).
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


@cache
def has_products(dtype: torch.dtype) -> bool | None:
    """Whether this processor has products of that 16-bit type, which torch uses; None where that is not known.

    Known of x86 alone, where it was measured: what oneDNN answers for others does not say what torch does there, and a
    build of torch without oneDNN does not even have the question. With AVX-512 and nothing later oneDNN says yes, and
    makes float32 of bfloat16 anew in each product.

        has_products(torch.bfloat16)  # False with AVX2 and nothing later
    """
    if dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return None
    if machine().lower() not in ("x86_64", "amd64"):
        return None
    known = torch.ops.mkldnn
    if dtype == torch.float16:
        return bool(known._is_mkldnn_fp16_supported())
    in_name_only = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return bool(known._is_mkldnn_bf16_supported()) and not in_name_only


def attention_dtype(x: Tensor) -> torch.dtype:
    """What to give torch's attention in place of x: in 16 bits it is several times slower on a CPU that lacks these.

    attention_dtype(torch.zeros(1, dtype=torch.bfloat16))  # float32 with AVX2 and nothing later
    """
    return torch.float32 if x.device.type == "cpu" and has_products(x.dtype) is False else x.dtype


def autocast_of(device: torch.device) -> torch.dtype | None:
    """What autocast has products computed in on a device at the moment; None where it is off.

    autocast_of(torch.device("cpu"))  # None
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
