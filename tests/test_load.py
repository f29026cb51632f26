"""Rows by load: the price follows what passes take and what drafts have been worth; the output follows neither."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mtpkern
import mtpkern.decoder
from mtpkern import ConfAdapt, Static, Verified
from mtpkern.kernels.worth import UNIT
from mtpkern.load import (
    LATEST,
    MOST_PATIENCE,
    PATIENCE,
    PRICES,
    Load,
    PassTimes,
    _rounded,
    default_masks,
    default_rows,
    price_of,
    times_of,
)
from support.loads import counts, running, steep, times
from support.slow import slow_but


@pytest.fixture
def rows_for_free() -> None:
    """Not here."""


def test_times_are_interpolated_and_believed_when_they_fall() -> None:
    seen = times(lambda r: r, 2, 8)
    assert seen.of(np.array([2, 4, 8])).tolist() == [2, 4, 8]
    assert seen.of(np.array([1, 16])).tolist() == pytest.approx([2 * 9 / 10, 8 * 24 / 16])
    assert seen.of(np.array([6, 6.5])).tolist() == [6, 6]  # as one
    seen.saw(2, 1.0)
    assert seen.of(np.array([2])).item() == 1.0
    seen.saw(2, 9.0)
    assert seen.of(np.array([2])).item() == 2.0  # one that is shorter than all others is not believed
    for _ in range(LATEST):
        seen.saw(2, 9.0)
    assert seen.of(np.array([2])).item() == 9.0
    assert PassTimes().of(np.array([1, 5])).tolist() == [9, 13]
    for rows in range(1, 200):
        each = times(lambda r: r, rows)
        assert list(each.seconds) == _rounded(np.array([rows])).tolist()


def test_a_disturbed_look_is_put_right_by_the_next_pass() -> None:
    """Or a slow first pass without masks would have masks look cheap for as long as no such pass comes by itself."""
    seen = times(steep, 2, 8)
    seen.saw(1, 10 * steep(1))
    assert price_of(counts(0), counts(6), k=8, rows=15, times=seen) < 1 / 3
    seen.saw(1, steep(1))
    assert price_of(counts(0), counts(6), k=8, rows=15, times=seen) > 1 / 3


def test_more_rows_than_ever_are_no_dearer_than_those_before() -> None:
    """A guess that is too low is seen to be wrong in one pass, one that is too high never."""
    flat, rows = times(lambda r: 1.2 + 0.015 * r, 1, 8, 20), np.array([20, 160])
    assert flat.of(rows).tolist() == pytest.approx([1.5, 3.6])
    assert times(lambda r: 2.0 - 0.01 * r, 1, 8).of(rows).tolist() == pytest.approx([1.92, 1.92])  # disturbed
    assert times(lambda r: 1.0 if r == 4 else 2.0, 4, 5).of(rows).tolist() == pytest.approx([2 * 28 / 13, 2 * 168 / 13])
    # What one sequence has shown does not keep eight from what is worth it.
    good = counts(*[60] * 8), counts(*[4] * 8)
    known = times(lambda r: 1.2 + 0.015 * r, 1, 8, 20, 40, 80, 160)
    assert price_of(*good, k=12, rows=184, times=flat) == price_of(*good, k=12, rows=184, times=known) < 0.1


def test_looks_are_ever_rarer() -> None:
    seen = PassTimes()
    assert [n for n in range(1, 200) if seen.wants_a_look()] == [3, 12, 48, 192]


def test_price_by_hand() -> None:
    nothing = PRICES[-1]
    fresh = counts(0), counts(0)
    # Odds of 2/3. Rows for free: everything; rows in proportion: nothing, since no row promises a whole token.
    assert price_of(*fresh, k=8, rows=15, times=times(lambda r: 1.0, 1, 15)) == 0
    assert price_of(*fresh, k=8, rows=15, times=times(lambda r: r, 1, 15)) > 2 / 3
    # 2/3 + 4/9 + ... is nearly two tokens beyond the first for 1.9 times the time; of a model
    # that is never right, nothing.
    assert price_of(*fresh, k=8, rows=15, times=times(steep, 1, 2, 8, 15)) < 0.5
    assert price_of(counts(0), counts(4), k=8, rows=15, times=times(steep, 1, 2, 8, 15)) > 4 / 10
    # A budget that all share: eight sequences of k = 4 could use 8 * 4 rows and as many as they promise.
    eight = counts(*[0] * 8), counts(*[0] * 8)
    assert price_of(*eight, k=4, rows=56, times=None) == 0
    assert 0 < price_of(*eight, k=4, rows=24, times=None) < nothing
    # Scarce rows go where they promise most, and are used even where no price lets all fit.
    assert price_of(counts(*[300] * 64), counts(*[40] * 64), k=12, rows=256, times=None) == 0.7


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("batch", slow_but([1, 8], 1))
def test_where_no_draft_is_right_it_costs_five_per_cent(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, batch: int, sure: bool
) -> None:
    """Passes take what `steep` says. Sure drafts, all of them wrong, cost a row each and show it a pass later."""
    model, (ids, mask) = tiny.model("llama"), tiny.prompts(*range(4, 4 + batch))
    new, spent = 256, [0.0]

    def saw(load: Load, rows: int, seconds: float) -> None:
        spent[0] += steep(rows) if batch == 1 else 1.6 + 0.04 * rows
        load.times.saw(rows, steep(rows))

    readout = mtpkern.decoder.readout

    def wrong(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        token, confidence = readout(logits, mask_token_id)
        return token, torch.ones_like(confidence) if sure else confidence

    def refuted(sequences: Any, rows: Any, terms: Any, token: Tensor, *rest: Any, **options: Any) -> None:
        # Whatever a mask proposes is not what the model says behind it.
        advance(sequences, rows, terms, token, *rest, **options)
        drafts = rows.start[1:] - rows.start[:-1]
        for b, n in enumerate(sequences.pending.tolist()):
            at = int(sequences.length[b])
            if n > 1 and drafts[b]:
                sequences.tokens[b, at - n + 1 : at] = 0
                rows.token[int(rows.start[b]) + 1 : int(rows.start[b]) + n] = 0

    advance = mtpkern.decoder.advance
    monkeypatch.setattr(Load, "saw", saw)
    monkeypatch.setattr(mtpkern.decoder, "readout", wrong)
    monkeypatch.setattr(mtpkern.decoder, "advance", refuted)
    monkeypatch.setattr("mtpkern.load._times", {})
    plain = (new - 1) * (1.0 if batch == 1 else 1.6 + 0.04 * batch)
    output = mtpkern.generate(
        model, ids, attention_mask=mask, max_new_tokens=new, eos_token_id=-1, return_dict_in_generate=True
    )
    assert max(output.passes) > 0.97 * new
    assert plain / spent[0] >= 0.95


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@given(seed=st.integers(0, 2**32), masks=st.integers(0, 6), batch=st.integers(1, 4), scarce=st.booleans())
@settings(max_examples=15, derandomize=True, deadline=None)
def test_the_output_depends_on_no_price(
    tiny: Any, greedy_of: Any, name: str, seed: int, masks: int, batch: int, scarce: bool
) -> None:
    rng = random.Random(seed)
    model, ids, mask, expected = greedy_of(name, batch)
    rows = rng.randint(batch, 4 * batch) if scarce else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Load, "price", lambda *_: rng.choice([0.0, 0.1, 0.3, 0.6, 2.0, math.inf]))
        patch.setattr(mtpkern.decoder, "default_rows", lambda *args: rows or default_rows(*args))
        output = mtpkern.generate(
            model,
            ids,
            attention_mask=mask,
            strategy=Verified(threshold=0.05, masks=masks),
            max_new_tokens=24,
            eos_token_id=3,
        )
    assert torch.equal(output, expected)


@pytest.fixture(scope="module")
def greedy_of(tiny: Any) -> Callable[[str, int], tuple[Any, Tensor, Tensor, Tensor]]:
    models = {name: tiny.model(name) for name in ("llama", "qwen3")}

    def of(name: str, batch: int) -> tuple[Any, Tensor, Tensor, Tensor]:
        ids, mask = tiny.prompts(*(5 + 3 * b for b in range(batch)))
        options: dict[str, Any] = {"do_sample": False, "suppress_tokens": [tiny.mask], "max_new_tokens": 24}
        expected = models[name].generate(ids, attention_mask=mask, eos_token_id=3, **options)
        return models[name], ids, mask, expected

    return of


def test_only_where_nothing_is_asked_for(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A k or a budget that is given stays, whatever it costs; no other strategy's output may depend on the load."""
    model, (ids, mask) = tiny.model("llama"), tiny.prompts(5)
    asked: list[bool] = []
    price = Load.price
    monkeypatch.setattr(Load, "price", lambda *args: asked.append(True) or price(*args))

    def by_load(**options: Any) -> bool:
        asked.clear()
        mtpkern.generate(model, ids, attention_mask=mask, max_new_tokens=4, **options)
        return bool(asked)

    assert by_load()
    assert by_load(strategy=Verified(threshold=0.3))
    assert not by_load(strategy=Verified(4))
    assert not by_load(rows=30)
    assert not by_load(batch_invariant=True)  # what a sequence brings follows the others
    assert not by_load(strategy=ConfAdapt())
    assert not by_load(strategy=Static())


def test_times_are_each_models_own(tiny: Any) -> None:
    one, other = tiny.model("llama"), tiny.model("llama")
    assert times_of(one) is times_of(one) is not times_of(other)
    assert times_of(one, packed=True) is times_of(one, packed=True) is not times_of(one)


def test_a_price_that_is_near_the_last_stays_for_some_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is found in each pass as long as it changes, and behind a try; tries come a few passes later at most."""
    sought: list[int] = []
    prices: list[float] = []
    monkeypatch.setattr(mtpkern.load, "price_of", lambda hits, *_: sought.append(0) or prices[0])
    monkeypatch.setattr(PassTimes, "wants_a_look", lambda *_: False)
    load = Load(times(lambda r: r, 1, 2, 4, 7), k=4, rows=14)
    sequences = running(100, 0, batch=2)

    def passes(n: int) -> str:
        """Of each whether a price was found, and whether it was that."""
        told = ""
        for _ in range(n):
            sought.clear()
            price = load.price(sequences)
            told += "?" if price != prices[0] else ".x"[bool(sought)]
        return told

    prices[:] = [0.0]
    assert passes(11) == "xx...x...x."
    prices[:] = [0.06]
    assert passes(7) == "??xx..."  # as long as it is held the old one, then found as often as it changes by much
    prices[:] = [0.09]
    assert passes(8) == "x...x..."  # and by a little
    prices[:] = [2.0]
    assert passes(6) == "xx...x"
    # Nobody has masks at this price; when the patience is at its end a try has, and what it proposes is fed.
    assert passes(12) == "...??xx...x."
    assert load.times.patience == 4 * PATIENCE


def test_a_disturbed_pass_with_masks_is_not_the_last() -> None:
    """Drafts are good, rows are cheap, but the first pass of several took ten times as long as it should have."""
    seen = times(lambda r: 1 + 0.05 * r, 1)
    seen.saw(4, 10.0)
    load = Load(seen, k=4, rows=7)
    sequences = running(90, 110)
    had_masks = []
    for _ in range(400):
        had_masks.append(load.price(sequences) < 0.5)
        rows = 4 if had_masks[-1] else 1
        load.saw(rows, 1 + 0.05 * rows)
    first = had_masks.index(True)
    assert PATIENCE - 1 <= first <= PATIENCE + 2
    # From then on all have, but for those that look how long one without takes.
    assert sum(had_masks[first:]) >= 400 - first - 4
    # Where rows are dear, and stay it, such passes become rare.
    seen, had_masks = times(lambda r: r, 1, 2, 4, 7), []
    load = Load(seen, k=4, rows=7)
    for _ in range(400):
        had_masks.append(load.price(sequences) < 0.5)
        load.saw(7 if had_masks[-1] else 1, 7.0 if had_masks[-1] else 1.0)
    assert 2 <= sum(had_masks) <= 8


def test_what_earlier_runs_have_shown_stands_in_for_what_is_not_known() -> None:
    """A model without a right draft is not asked again by every run; one that has become right is found out."""
    seen = times(lambda r: 1 + 0.1 * r, 1, 2, 4, 7)

    def run(right: int) -> tuple[list[bool], Load]:
        load = Load(seen, k=4, rows=7)
        hits = chains = 0
        had_masks = []
        for _ in range(64):
            price = load.price(running(hits, chains))
            had_masks.append(price < (hits + 4) / (hits + chains + 6))
            hits, chains = hits + right * had_masks[-1], chains + had_masks[-1]
        return had_masks, load

    asked = [sum(run(right=0)[0]) for _ in range(8)]
    assert asked[0] <= 20
    # A try is two passes, and runs share their patience: once in 128 passes, which are two runs, in the end.
    assert max(asked[1:]) <= 9
    assert sum(asked[4:]) <= 6
    better = [had for _ in range(4) for had in run(right=3)[0]]
    assert better.index(True) <= MOST_PATIENCE
    assert sum(better) >= 256 - MOST_PATIENCE - PATIENCE
    assert sum(run(right=3)[0]) >= 62


def test_drafts_that_have_become_right_are_found_out() -> None:
    """Behind many that were wrong, in earlier runs: what a try proposes is fed, or it could confirm nothing."""
    seen = times(lambda r: 1 + 0.1 * r, *range(1, 8))
    seen.shown = counts(0, 64)
    load = Load(seen, k=4, rows=7)
    hits = chains = drafts = masks = 0
    had_masks = []
    for _ in range(64):
        price = load.price(running(hits, chains))
        load.saw(1 + drafts + masks, 1 + 0.1 * (1 + drafts + masks))
        # As `advance` does behind this pass, all of whose proposals are sure, and right.
        had_masks.append(masks > 0)
        hits, chains = hits + drafts, chains + (drafts + masks > 0 and drafts < 3)
        drafts = masks if price <= 1 else 0
        masks = sum(((hits + 4) / (hits + chains + 6)) ** j >= price for j in (1, 2, 3))
    assert sum(had_masks[:PATIENCE]) <= 1  # a look at a pass without masks is none
    assert sum(had_masks[PATIENCE + 8 :]) >= 64 - PATIENCE - 8 - 4


@pytest.mark.parametrize("odds", [(0, 20), (3, 5), (90, 40)])
def test_a_try_has_the_masks_of_a_fresh_sequence(odds: tuple[float, float]) -> None:
    """Whatever its own odds, and not the most there could be: eight sequences with seven each would take long."""
    for curve, masks in ((lambda r: r, 1), (lambda r: 1 + 0.1 * r, 4), (lambda r: 1.0, 7)):
        for batch in (1, 8):
            load = Load(times(lambda r, f=curve, n=batch: f(r / n), *range(1, 16 * batch)), k=8, rows=15 * batch)
            own = (odds[0] + 4) / (sum(odds) + 6)
            price = load._try(np.full(batch, own))
            assert sum(own**j >= price for j in range(1, 8)) == masks, (curve, batch)


@pytest.mark.parametrize("refill", [False, True])
def test_the_threshold_follows_the_odds_where_none_is_given(
    tiny: Any, greedy_of: Any, monkeypatch: pytest.MonkeyPatch, refill: bool
) -> None:
    model, ids, mask, expected = greedy_of("llama", 1)
    told: list[tuple[float, float]] = []
    step = mtpkern.decoder.Decoder.step

    def noted(decoder: Any, route: Any) -> Tensor:
        hits, chains = (int(x) / UNIT for x in (decoder.sequences.hits[0], decoder.sequences.chains[0]))
        told.append((float(decoder.terms.threshold), (hits + 4) / (hits + chains + 6)))
        return step(decoder, route)

    monkeypatch.setattr(mtpkern.decoder.Decoder, "step", noted)
    monkeypatch.setattr(PassTimes, "wants_a_look", lambda *_: False)
    monkeypatch.setattr("mtpkern.load.HELD", 1)
    monkeypatch.setattr("mtpkern.load.PATIENCE", 64)  # behind a try neither price nor threshold is asked for
    for bounds, strategy in (
        ((0.0, 1.0), None),
        ((0.0, 0.3), Verified()),
        ((0.5, 0.6), Verified(masks=1)),
        ((0.3, 0.3), Verified(threshold=0.3)),
        ((0.6, 0.6), Verified(4)),
    ):
        told.clear()
        monkeypatch.setattr("mtpkern.load.THRESHOLDS", bounds)
        monkeypatch.setattr("mtpkern.load._times", {})
        options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": 3, "strategy": strategy}
        if refill:
            (found,) = mtpkern.generate_batch(model, ids.tolist(), batch_size=1, **options)
            assert found.error is None
        else:
            assert torch.equal(mtpkern.generate(model, ids, attention_mask=mask, **options), expected)
        assert [x for x, _ in told] == pytest.approx([min(max(x**2, bounds[0]), bounds[1]) for _, x in told], rel=1e-4)
        assert len(told) > 4


@pytest.mark.parametrize("refill", [False, True])
def test_a_prompt_has_the_masks_that_are_worth_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, greedy_of: Any, refill: bool
) -> None:
    """All of a k_max of 5 where rows are for free, one where earlier runs have shown that none is right."""
    model, ids, mask, expected = greedy_of("llama", 2)
    read = []
    prefill_chunk = mtpkern.decoder.Decoder.prefill_chunk
    monkeypatch.setattr(
        mtpkern.decoder.Decoder,
        "prefill_chunk",
        lambda *args, keep=1, **how: read.append(keep) or prefill_chunk(*args, keep=keep, **how),
    )
    monkeypatch.setattr(PassTimes, "wants_a_look", lambda *_: False)
    monkeypatch.setattr(Load, "saw", lambda *_: None)  # passes take what `curve` says
    for shown, curve, k in ((0, lambda r: 1.0, 5), (64, lambda r: 1 + 0.3 * r, 2)):
        seen = times(curve, *range(1, 30))
        seen.shown = counts(0, shown)
        monkeypatch.setattr("mtpkern.decoder.times_of", lambda *_, seen=seen: seen)
        options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": 3}
        if refill:
            prompts = [row[real.bool()].tolist() for row, real in zip(ids, mask)]
            found = mtpkern.generate_batch(model, prompts, batch_size=1, **options)
            assert [x.tokens for x in found] == [
                [t for t in row if t != 3] for row in expected[:, ids.shape[1] :].tolist()
            ]
        else:
            assert torch.equal(mtpkern.generate(model, ids, attention_mask=mask, **options), expected)
        assert set(read) == {k}
        read.clear()


def test_masks_of_a_pass_by_default() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [default_masks(7, batch, gpu) for batch in (1, 4, 8, 16, 128)] == [12, 12, 11, 0, 0]
    assert [default_masks(k, 1, gpu) for k in (1, 2, 3, 12)] == [0, 1, 4, 22]
    assert default_masks(7, 1, cpu) == 0
    # What is asked for is had, with a k none unless asked for.
    assert Verified(4).masks == 0
    assert Verified(4, masks=3).for_model(8).masks == 3
    assert Verified(masks=0).for_model(8).masks == 0
    assert Verified(masks=1000).for_model(4).masks == 9


@pytest.mark.parametrize("given", [None, Verified(threshold=0.05), Verified(masks=0), Verified(masks=2), Verified(3)])
def test_a_call_has_masks_where_they_are_left_to_the_load(
    tiny: Any, greedy_of: Any, monkeypatch: pytest.MonkeyPatch, given: Verified | None
) -> None:
    model, ids, mask, expected = greedy_of("llama", 2)
    had = []
    make = mtpkern.decoder.Decoder.__init__

    def noted(decoder: Any, model: Any, strategy: Verified, **options: Any) -> None:
        had.append(strategy.masks)
        make(decoder, model, strategy, **options)

    monkeypatch.setattr(mtpkern.decoder.Decoder, "__init__", noted)
    # As on a GPU.
    monkeypatch.setattr("mtpkern.options.default_masks", lambda k, batch, device: 1 + batch)
    wanted = {Verified(masks=0): 0, Verified(masks=2): 2, Verified(3): 0}
    options: dict[str, Any] = {"max_new_tokens": 24, "strategy": given, "eos_token_id": 3}
    found = mtpkern.generate(model, ids, attention_mask=mask, **options)
    assert torch.equal(found, expected)
    batch = mtpkern.generate_batch(model, [[3, 4, 5], [6, 7]], batch_size=2, **options)
    assert len(list(batch)) == 2
    assert had == [wanted.get(given, 3)] * 2
