"""Groups: how many masks of the next pass stand behind which pending tokens, where proposals must not run dry.

Pending token i of a sequence is followed by a draft of confidence c_i. Should that be the first to be refuted, the
masks behind the last pending token have seen a false text, and only a group of masks behind token i has proposals to
offer. With `first` the position of the first pending token:

    chance_i = c_0 ... c_{i-1} (1 - c_i)            that the chain of drafts ends behind token i
    wanted_i = min(k - 1, limit - first - i - 2)    for i < pending - 1: no mask for a token beyond the limit,
               and none that is not worth its price (kernels/worth.py)
    dealt_i  = what a budget leaves of wanted_i when the likeliest groups are served first, the lower i of equal ones

Chances are products in float64 from the left, so that both forms come to the same order.

Shapes   first, pending, limit, budget, odds [B]; wanted, dealt, sure, chance [B, k - 1]
Source   this project's; the layout of a pass is in kernels/advance.py
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.worth import worth

    @triton.jit
    def masks_wanted(first, pending, limit, i, K: tl.constexpr):
        """The masks that groups i want, int32."""
        return tl.where(i < pending - 1, tl.minimum(tl.maximum(limit - first - i - 2, 0), K - 1), 0)

    @triton.jit
    def chance_of(p_sure, pending, o_i, K: tl.constexpr):
        """The chance [BLOCK_B, len(o_i)] that the chain ends behind token i; p_sure points to each sequence's c_0."""
        chance = tl.zeros([pending.shape[0], o_i.shape[0]], tl.float64)
        reached = tl.full(pending.shape, 1.0, tl.float64)
        for j in range(K - 1):
            sure = tl.load(p_sure + j, mask=j < pending - 1, other=0.0).to(tl.float64)
            chance = tl.where(o_i[None, :] == j, (reached * (1.0 - sure))[:, None], chance)
            reached *= sure
        return chance

    @triton.jit
    def deal_masks(p_sure, first, pending, limit, odds, price, budget, o_i, K: tl.constexpr):
        """The masks that groups o_i get, int32 [BLOCK_B, len(o_i)]."""
        chance = chance_of(p_sure, pending, o_i, K)
        wanted = masks_wanted(first[:, None], pending[:, None], limit[:, None], o_i[None, :], K)
        wanted = tl.minimum(wanted, worth(chance, odds[:, None], price, K))
        before = tl.zeros_like(wanted)
        reached = tl.full(first.shape, 1.0, tl.float64)
        for j in range(K - 1):
            sure = tl.load(p_sure + j, mask=j < pending - 1, other=0.0).to(tl.float64)
            other = reached * (1.0 - sure)
            theirs = tl.minimum(masks_wanted(first, pending, limit, j, K), worth(other, odds, price, K))
            ahead = (other[:, None] > chance) | ((other[:, None] == chance) & (j < o_i[None, :]))
            before += tl.where(ahead, theirs[:, None], 0)
            reached *= sure
        return tl.minimum(tl.maximum(budget[:, None] - before, 0), wanted)


def masks_wanted_reference(first: Tensor, pending: Tensor, limit: Tensor, k: int) -> Tensor:
    """The masks [B, k - 1] that each group has a use for."""
    i = torch.arange(k - 1, device=first.device)
    return (limit[:, None] - first[:, None] - i - 2).clamp(min=0, max=k - 1) * (i < pending[:, None] - 1)


def chance_of_reference(sure: Tensor) -> Tensor:
    """The chance [B, k - 1] that the chain of drafts ends behind each token, float64.

    chance_of_reference(torch.tensor([[0.75, 0.5]]))  # [[0.25, 0.375]]
    """
    sure = sure.double()
    stands = sure.cumprod(1)
    return torch.cat([torch.ones_like(stands[:, :1]), stands[:, :-1]], dim=1) * (1 - sure)


def deal_masks_reference(wanted: Tensor, chance: Tensor, budget: Tensor) -> Tensor:
    """The masks [B, k - 1] that each group gets, budget [B] in all.

    deal_masks_reference(torch.tensor([[3, 3]]), torch.tensor([[0.1, 0.5]]), torch.tensor([4]))  # [[1, 3]]
    """
    mine, other = chance[:, :, None], chance[:, None, :]
    ahead = (other > mine) | ((other == mine) & torch.ones_like(other == mine).tril(-1))
    return torch.minimum((budget[:, None] - (ahead * wanted[:, None, :]).sum(2)).clamp(min=0), wanted)
