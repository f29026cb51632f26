"""The ops of training on a GPU: what they are given, and their gradients."""

from contextlib import contextmanager

import torch

from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_mask import Rule

DEVICE = "cuda"


@contextmanager
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(form, leaves, d_out, rule, dtype=None, **options):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    sinks = leaves[3] if len(leaves) == 4 else None
    out = form(*leaves[:3], Rule(*rule), Scoring(sinks=sinks, **options))
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]
