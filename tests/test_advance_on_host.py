"""Advance on the host decides as advance in torch does; test_advance.py, which runs it, holds it to the rules."""

import random
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpkern.kernels.advance import advance, advance_at_once
from mtpkern.kernels.advance_on_host import FEW, advance_on_host, takes_host
from mtpkern.kernels.state import RUNNING, Rows, Sequences, Terms
from mtpkern.kernels.worth import UNIT

CPU = torch.device("cpu")


def drawn(batch: int, k: int, rng: random.Random, exact: bool) -> tuple[Sequences, Rows, Terms]:
    """Prompts behind their prefill, on random terms; exact: such as a promise can equal."""
    sequences = Sequences.allocate(batch, 64, 64, CPU)
    sequences.tokens.copy_(torch.tensor([[rng.randrange(6) for _ in range(65)] for _ in range(batch)]))
    sequences.length.copy_(torch.tensor([rng.randint(1, 8) for _ in range(batch)]))
    sequences.limit.copy_(sequences.length + torch.tensor([rng.randint(1, 40) for _ in range(batch)]))
    sequences.pending.fill_(1)
    for count in (sequences.hits, sequences.chains):
        count.copy_(torch.tensor([rng.randrange(40 * UNIT) for _ in range(batch)]))
    if exact:
        # A first pass then leaves two chains, so that the odds are 1/2.
        sequences.hits.zero_()
        sequences.chains.fill_(67650)
    rows = Rows.allocate(batch * (2 * k - 1), batch, CPU, k)
    rows.expect_prefill(k)
    terms = Terms.allocate(4, batch, CPU)
    terms.threshold.fill_(rng.choice([-1.0, 0.2, 0.6]))
    terms.price.fill_(rng.choice([0.25, 0.125] if exact else [0.0, 0.06, 0.25, 0.7, float("inf")]))
    terms.stop_ids[:, 0] = torch.tensor([rng.choice([-1, 4, 5]) for _ in range(batch)])
    return sequences, rows, terms


def known(sequences: Sequences, rows: Rows) -> list[torch.Tensor]:
    """All that either form leaves, but for what is written to be forgotten."""
    kept = [x[:, :-1] if x.dim() == 2 else x for x in vars(sequences).values()]
    return [*kept, *vars(rows).values()]


@given(
    batch=st.integers(1, 5),
    k=st.sampled_from([1, 2, 4, 8]),
    verify=st.booleans(),
    double=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(),
)
@settings(max_examples=120, derandomize=True, deadline=None)
def test_equals_torch_bit_for_bit(batch: int, k: int, verify: bool, double: bool, exact: bool, seed: int) -> None:
    """With confidences and prices of any bits, in state that each has written itself."""
    rng = random.Random(seed)
    ours = drawn(batch, k, rng, exact)
    theirs = deepcopy(ours)
    size = batch * k
    for _ in range(12):
        token = torch.tensor([rng.randrange(6) for _ in range(size)])
        # Where drafts stand, they are mostly right.
        sequences, rows, _ = ours
        for b in range(batch):
            at, n = int(rows.start[b]), int(sequences.pending[b]) - 1
            if verify and n > 0 and rng.random() < 0.7:
                end = int(sequences.length[b])
                token[at : at + n] = sequences.tokens[b, end - n : end]
        sure = [rng.choice([1.0, 0.5]) if exact else rng.random() ** 0.3 for _ in range(size)]
        confidence = torch.tensor(sure, dtype=torch.float64)
        if rng.random() < 0.05:
            confidence[rng.randrange(size)] = torch.nan
        confidence = confidence if double else confidence.float()
        how = {"k": k, "verify": verify, "mask_token_id": 9}
        assert takes_host(*ours, k, 0)
        advance_on_host(*ours, token, confidence, **how)
        advance_at_once(*theirs, token, confidence, **how)
        assert all(torch.equal(x, y) for x, y in zip(known(*ours[:2]), known(*theirs[:2])))
        size = len(rows.seq)


@pytest.mark.parametrize(
    ("batch", "masks", "more", "budget", "taken"),
    [
        (FEW, 0, 0, None, True),
        (FEW + 1, 0, 0, None, False),
        (2, 3, 0, None, False),  # masks behind other drafts than the last
        (2, 0, -1, None, False),  # rows that have to be dealt out
        (2, 0, 5, None, True),
        (2, 0, 0, 14, False),
    ],
)
def test_few_sequences_with_rows_for_all(
    batch: int, masks: int, more: int, budget: int | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, asked = 4, []
    rows = Rows.allocate(batch * (2 * k - 1 + masks) + more, batch, CPU, k)
    sequences, terms = Sequences.allocate(batch, 32, 32, CPU), Terms.allocate(4, batch, CPU, budget)
    sequences.length.fill_(3)
    sequences.limit.fill_(20)
    sequences.pending.fill_(1)
    rows.expect_prefill(k)
    monkeypatch.setattr(
        "mtpkern.kernels.advance.advance_on_host", lambda *args, **how: asked.append(0) or advance_on_host(*args, **how)
    )
    token, confidence = torch.ones(batch * k, dtype=torch.int64), torch.ones(batch * k)
    advance(sequences, rows, terms, token, confidence, k=k, verify=True, mask_token_id=9, masks=masks)
    assert bool(asked) == taken
    assert (sequences.status == RUNNING).all()
    assert sequences.passes.tolist() == [1] * batch
    assert not takes_host(Sequences(*(x.to("meta") for x in vars(sequences).values())), rows, terms, k, masks)
