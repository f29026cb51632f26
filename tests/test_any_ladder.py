"""Verified on any ladder: whatever its rungs are, and the price of a row, its tokens are the model's own."""

import math
from functools import cache
from itertools import chain, cycle, repeat
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mtpkern
from mtpkern import Verified
from mtpkern.load import Ladder
from support.models import ARCHITECTURES, MASK, random_model, random_prompts
from support.recording import RecordedStep, captured_by, kept

NEW, STOP = 20, 3
# A rung, as a share of what lies between the lowest and the highest; a price; and for how many passes both stay.
TURNS = st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.2, 0.5, 2.0, math.inf]), st.integers(1, 5))
STRATEGIES = st.builds(Verified, threshold=st.sampled_from([0.0, 0.1, 0.4]), masks=st.integers(0, 4))


@cache
def model_of(name: str) -> Any:
    return random_model(name, **ARCHITECTURES[name])


@cache
def greedy(name: str, lengths: tuple[int, ...]) -> Tensor:
    """Prompts of these lengths and what transformers writes behind them [B, T + new]."""
    ids, mask = random_prompts(*lengths)
    how: dict[str, Any] = {"do_sample": False, "suppress_tokens": [MASK], "max_new_tokens": NEW, "eos_token_id": STOP}
    found: Tensor = model_of(name).generate(ids, attention_mask=mask, **how)
    return found


def drawn(between: set[float], turns: list[tuple[float, float, int]]) -> type[Ladder]:
    """A ladder with these rungs between its lowest and its highest, that takes these turns again and again."""

    class Drawn(Ladder):
        def __init__(self, batch: int, rows: int, k: int, masks: int = 0) -> None:
            super().__init__(batch, rows, k, masks)
            self.rungs = sorted({batch, rows, *(batch + round(share * (rows - batch)) for share in between)})
            self.turns = cycle(chain.from_iterable(repeat((share, price), n) for share, price, n in turns))

        def choose(self, hits: np.ndarray, chains: np.ndarray) -> tuple[int, float]:
            share, price = next(self.turns)
            rows = self.rungs[round(share * (len(self.rungs) - 1))]
            # Of the lowest each has one row, and no masks.
            return rows, math.inf if rows == self.rungs[0] else price

    return Drawn


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "qwen3_moe"])
@given(
    between=st.sets(st.floats(0, 1), max_size=3),
    turns=st.lists(TURNS, min_size=1, max_size=6),
    strategy=STRATEGIES,
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
)
@settings(max_examples=10, derandomize=True, deadline=None)
def test_the_output_depends_on_no_ladder(
    name: str,
    between: set[float],
    turns: list[tuple[float, float, int]],
    strategy: Verified,
    lengths: tuple[int, ...],
) -> None:
    """Captured once for each rung, which is told a pass ahead; windows, caps on logits, experts."""
    model, (ids, mask) = model_of(name), random_prompts(*lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpkern.decoder.Ladder", drawn(between, turns))
        patch.setattr("mtpkern.graph.WARM_UP", 1)
        with captured_by(RecordedStep, patch):
            found = mtpkern.generate(
                model, ids, attention_mask=mask, strategy=strategy, max_new_tokens=NEW, eos_token_id=STOP
            )
            (decoder,) = kept(model)
    assert torch.equal(found, greedy(name, lengths))
    assert decoder.graph is not None
    assert set(decoder.graph.warm) <= set(decoder.ladder.rungs)
