"""What a row promises, against plain Python; `advance` is tested with it in test_advance.py."""

import random
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from mtpkern.kernels.worth import PRIOR_CHAINS, PRIOR_HITS, UNIT, odds_of_reference, remembered, worth_reference

if find_spec("triton"):
    import triton
    import triton.language as tl

    from mtpkern.kernels.worth import odds_of, worth

    @triton.jit
    def _worth_kernel(
        chance_ptr,
        hits_ptr,
        chains_ptr,
        price_ptr,
        odds_ptr,
        out_ptr,
        B: tl.constexpr,
        K: tl.constexpr,
        PRIOR_HITS: tl.constexpr,
        PRIOR_CHAINS: tl.constexpr,
    ):
        o_b = tl.arange(0, B)
        odds = odds_of(tl.load(hits_ptr + o_b), tl.load(chains_ptr + o_b), PRIOR_HITS, PRIOR_CHAINS)
        tl.store(odds_ptr + o_b, odds)
        tl.store(out_ptr + o_b, worth(tl.load(chance_ptr + o_b), odds, tl.load(price_ptr), K))


def in_torch(chance: Tensor, hits: Tensor, chains: Tensor, price: Tensor, k: int) -> tuple[Tensor, Tensor]:
    odds = odds_of_reference(hits, chains)
    return odds, worth_reference(chance[:, None], odds, price, k)[:, 0]


def in_kernel(chance: Tensor, hits: Tensor, chains: Tensor, price: Tensor, k: int) -> tuple[Tensor, Tensor]:
    odds, out = torch.empty_like(chance), torch.empty_like(hits)
    prior = {"PRIOR_HITS": PRIOR_HITS, "PRIOR_CHAINS": PRIOR_CHAINS}
    _worth_kernel[(1,)](chance, hits, chains, price, odds, out, B=len(chance), K=k, **prior)
    return odds, out


FORMS = [in_torch, pytest.param(in_kernel, marks=pytest.mark.kernel)]


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form) -> None:
    # Nothing known: 2 in 3. Then two drafts a chain; and none in six chains.
    hits, chains = torch.tensor([0, 20 * UNIT, 0, 0]), torch.tensor([0, 8 * UNIT, 6 * UNIT, 10 * UNIT])
    odds, masks = form(torch.ones(4).double(), hits, chains, torch.tensor(0.25).double(), 16)
    assert odds.tolist() == pytest.approx([2 / 3, 24 / 34, 1 / 3, 1 / 4], abs=2e-5)
    assert masks.tolist() == [3, 3, 1, 1]
    assert form(torch.zeros(4).double(), hits, chains, torch.tensor(0.0).double(), 5)[1].tolist() == [4] * 4
    assert form(torch.ones(4).double(), hits, chains, torch.tensor(2.0).double(), 5)[1].tolist() == [0] * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_equals_plain_python(form, k: int) -> None:
    rng = random.Random(k)
    for price in (0.0, 0.01, 0.2, 0.5):
        hits, chains = ([rng.randrange(40 * UNIT) for _ in range(16)] for _ in range(2))
        chance = [rng.choice([1.0, rng.random()]) for _ in range(16)]
        state = torch.tensor(chance).double(), torch.tensor(hits), torch.tensor(chains)
        odds, masks = form(*state, torch.tensor(price).double(), k)
        for b in range(16):
            expected = (hits[b] + PRIOR_HITS) * 2**16 // (hits[b] + chains[b] + PRIOR_HITS + PRIOR_CHAINS) / 2**16
            assert odds[b] == expected
            power, n = expected, 0
            for _ in range(k - 1):
                n += chance[b] * power >= price
                power *= expected
            assert masks[b] == n


def test_what_is_remembered() -> None:
    tried = torch.tensor([True, True, False])
    count = torch.tensor([0, 64, 64]) * UNIT
    assert remembered(count, torch.tensor([3, 0, 0]), tried).tolist() == [3 * UNIT, 62 * UNIT, 64 * UNIT - UNIT // 8]
