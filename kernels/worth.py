"""Worth: what a row of the next pass promises, so that no sequence brings rows that are not worth what they cost.

A sequence's drafts come in chains: masks propose, the next pass confirms the first few. With the drafts confirmed of
late and the chains that have ended, forgotten by 1/32 from chain to chain and by 1/512 from pass to pass without one,

    odds    (hits + 4) / (hits + chains + 6)    that a chain goes on by one more draft
    draft i promises c_1 ... c_i tokens, the product of the confidences
    mask j behind a token promises chance * odds ** j, with the chance that the chain of drafts ends behind that token

and a row is brought where its promise is at least the price. chains counts every pass that brought more than one row,
but for those that confirmed all k - 1 drafts that there can be: such a chain was cut, and tells of no end. Without
evidence the odds go back to 2 in 3, and so a sequence that has given up tries again now and then; the dearer the rows,
the later.

Integers and products in float64 from the left: both forms decide the same, bit for bit (torch on a CPU; on a GPU its
cumulative products have an order of their own).

Shapes   hits, chains, odds [B]; chance [B, ...]
Source   this project's
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

# hits and chains are counted in units of 1 / UNIT.
UNIT = 1 << 16
PRIOR_HITS, PRIOR_CHAINS = 4 * UNIT, 2 * UNIT
FORGOTTEN, FORGOTTEN_IDLE = 5, 9  # bits

if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def odds_of(hits, chains, PRIOR_HITS: tl.constexpr, PRIOR_CHAINS: tl.constexpr):
        """The odds [B] of int64 hits and chains, float64."""
        hits += PRIOR_HITS
        return ((hits << 16) // (hits + chains + PRIOR_CHAINS)).to(tl.float64) * (1.0 / 65536)

    @triton.jit
    def worth(chance, odds, price, K: tl.constexpr):
        """How many masks behind a token are worth the price, int32, of at most K - 1."""
        masks = tl.zeros(chance.shape, tl.int32)
        power = odds
        for _ in range(K - 1):
            masks += (chance * power >= price).to(tl.int32)
            power *= odds
        return masks


def odds_of_reference(hits: Tensor, chains: Tensor) -> Tensor:
    """The odds [B] that a chain goes on, float64.

    odds_of_reference(torch.tensor([0]), torch.tensor([2 * UNIT]))  # [0.5]
    """
    hits = hits + PRIOR_HITS
    return ((hits << 16) // (hits + chains + PRIOR_CHAINS)).double() * (1.0 / 65536)


def worth_reference(chance: Tensor, odds: Tensor, price: Tensor, k: int) -> Tensor:
    """How many masks, of at most k - 1, are worth the price behind each token; chance [B, n], odds [B].

    worth_reference(torch.ones(1, 1), torch.tensor([0.5]), torch.tensor(0.2), 8)  # [[2]]: 0.5, 0.25, 0.125 ...
    """
    power = odds[:, None].expand(-1, k - 1).cumprod(1)
    return (chance[:, :, None] * power[:, None, :] >= price).sum(2)


def remembered(count: Tensor, more: Tensor, tried: Tensor) -> Tensor:
    """hits or chains [B] behind a pass that has added `more` to them where it `tried`."""
    return torch.where(tried, count - (count >> FORGOTTEN) + more * UNIT, count - (count >> FORGOTTEN_IDLE))
