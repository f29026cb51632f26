"""Which drafts get masks behind them, against lists and loops; `advance` is tested with them in test_advance.py."""

import random
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from mtpkern.kernels.groups import chance_of_reference, deal_masks_reference, masks_wanted_reference
from mtpkern.reference import likeliest_ends


def dealt(sure: Tensor, first: Tensor, pending: Tensor, limit: Tensor, budget: Tensor, k: int) -> Tensor:
    return deal_masks_reference(masks_wanted_reference(first, pending, limit, k), chance_of_reference(sure), budget)


if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.groups import deal_masks

    @triton.jit
    def _deal_kernel(
        sure_ptr, first_ptr, pending_ptr, limit_ptr, budget_ptr, out_ptr, B: tl.constexpr, K: tl.constexpr
    ):
        o_b, o_i = tl.arange(0, B), tl.arange(0, 16)
        p_sure = sure_ptr + o_b * (K - 1)
        first, pending = tl.load(first_ptr + o_b).to(tl.int32), tl.load(pending_ptr + o_b).to(tl.int32)
        limit, budget = tl.load(limit_ptr + o_b).to(tl.int32), tl.load(budget_ptr + o_b).to(tl.int32)
        odds = tl.full([B], 0.5, tl.float64)
        masks = deal_masks(p_sure, first, pending, limit, odds, 0.0, budget, o_i, K)
        tl.store(out_ptr + o_b[:, None] * (K - 1) + o_i[None, :], masks, mask=(o_i < K - 1)[None, :])


def dealt_by_kernel(sure: Tensor, first: Tensor, pending: Tensor, limit: Tensor, budget: Tensor, k: int) -> Tensor:
    out = torch.full_like(sure, -1, dtype=torch.int64)
    state = [x.contiguous() for x in (sure, first, pending, limit, budget)]
    _deal_kernel[(1,)](*state, out, B=len(sure), K=k)
    return out


FORMS = [dealt, pytest.param(dealt_by_kernel, marks=pytest.mark.kernel)]


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form) -> None:
    sure = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.9, 0.1], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    state = torch.tensor([[5, 4, 99], [5, 4, 99], [5, 3, 9], [5, 1, 99]]).T
    # Equal confidences end the chain early if at all; the third has room for two and one, the last no draft.
    found = form(sure, *state, torch.tensor([4, 5, 9, 9]), 4)
    assert found.tolist() == [[3, 1, 0], [2, 0, 3], [2, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [2, 5, 16])
def test_equals_lists_and_loops(form, k: int) -> None:
    rng = random.Random(k)
    draw = [(rng.randint(1, 9), rng.randint(1, k), rng.randint(0, 2 * k), rng.randint(0, k * k)) for _ in range(16)]
    first, pending, beyond, budget = torch.tensor(draw).T
    sure = torch.tensor([[rng.choice([0.3, 0.7, 0.9, rng.random()]) for _ in range(k - 1)] for _ in draw])
    expected = []
    for b, (_, p, more, left) in enumerate(draw):
        masks = [0] * (k - 1)
        for i in likeliest_ends(sure[b, : p - 1].tolist()):
            masks[i] = min(k - 1, max(0, p + more - i - 2), left)
            left -= masks[i]
        expected.append(masks)
    assert form(sure, first, pending, first + pending + beyond, budget, k).tolist() == expected
