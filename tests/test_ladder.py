"""The ladder of row counts that a GPU has graphs for, and what masks behind drafts are worth there."""

import math

import pytest
import torch

from mtpkern import ConfAdapt, Verified
from mtpkern.bench.throughput import RIGHT, SHIPPED, Course, model_of
from mtpkern.kernels.worth import FORGOTTEN, FORGOTTEN_IDLE, UNIT
from mtpkern.load import PRICES, Bought, Ladder, Load, default_masks, default_rows, price_of
from support.loads import counts, gpu


@pytest.fixture
def rows_for_free() -> None:
    """Not here."""


def climbed(batch: int, rows: int, masks: int = 0) -> Ladder:
    """A ladder all of whose rungs have their graph."""
    ladder = Ladder(batch, rows, 12, masks)
    for rung in ladder.rungs:
        ladder.made_one(rung, 1.0)
        ladder.times.saw(rung, gpu(rung))
    return ladder


def test_rows_of_a_pass_on_a_gpu() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    verified = Verified(12)
    assert [default_rows(verified, B, gpu) for B in (1, 8, 16, 64, 128)] == [23, 184, 192, 256, 512]
    assert default_rows(verified, 64, cpu) == 64 * 23
    # Static and ConfAdapt emit what they emit in any company.
    assert default_rows(ConfAdapt(12), 64, gpu) == 64 * 23


def test_rungs() -> None:
    """From a row a sequence to the budget, by halves that save something."""
    assert Ladder(1, 23, 12).rungs == [1, 23]
    assert Ladder(16, 192, 12).rungs == [16, 96, 192]
    assert Ladder(64, 256, 12).rungs == [64, 128, 256]
    assert Ladder(32, 128, 12).rungs == [32, 64, 128]
    assert Ladder(32, 127, 12).rungs == [32, 63, 127]
    assert Ladder(128, 512, 12).rungs == [128, 256, 512]
    assert Ladder(5, 5, 1).rungs == [5]


def test_the_rung_follows_what_drafts_are_worth() -> None:
    never, always = (counts(*[0] * 64), counts(*[40] * 64)), (counts(*[300] * 64), counts(*[40] * 64))
    assert climbed(64, 256).choose(*never) == (64, math.inf)
    assert climbed(64, 256).choose(*always)[0] == 256
    assert climbed(64, 256).choose(*(x[:2] for x in never)) == (64, math.inf)
    # A few get all that they can use where that fits.
    assert climbed(64, 256).choose(*(x[:6] for x in always)) == (128, 0.0)
    # So few that the lowest would hold them: there no sequence brings more than its row.
    assert climbed(64, 256).choose(*(x[:3] for x in always)) == (128, 0.0)


def test_masks_behind_drafts_have_a_rung_like_others() -> None:
    strategy = Verified(12, masks=default_masks(12, 4, torch.device("cuda")))
    ladder = climbed(4, default_rows(strategy, 4, torch.device("cuda")), strategy.masks)
    assert ladder.rungs == [4, 90, 180]
    # Odds of 0.6 want them, with odds of 0.1 plain decoding is quicker.
    rows, price = ladder.choose(counts(*[60] * 4), counts(*[40] * 4))
    assert rows > 4 * 11
    assert price <= 0.06
    assert ladder.choose(counts(*[0] * 4), counts(*[40] * 4)) == (4, math.inf)


def test_a_rung_is_made_once_it_would_have_paid() -> None:
    never = counts(*[0] * 64), counts(*[40] * 64)
    ladder = Ladder(64, 256, 12)
    assert ladder.choose(*never)[0] == 256  # nothing is known
    ladder.made_one(256, 50.0)
    ladder.times.saw(256, gpu(256))
    passes = next(n for n in range(1000) if ladder.choose(*never)[0] == 64)
    # By the guess a pass of 64 rows takes 464 / 656 of one of 256, and this gives up to 1.2 times the tokens.
    assert 50 / (gpu(256) * (1 - 464 / 656)) <= passes + 1 <= 2.5 * 50 / (gpu(256) * (1 - 464 / 656))
    ladder.made_one(64, 20.0)
    ladder.times.saw(64, gpu(256))  # and it takes as long as the other
    assert ladder.choose(*(counts(*[20] * 64), counts(*[40] * 64)))[0] == 256


def test_a_rung_that_could_not_be_captured_is_left_alone() -> None:
    """Each pass there would be one without a graph, and none that tells its time."""
    never = counts(*[0] * 64), counts(*[40] * 64)
    ladder = Ladder(64, 256, 12)
    ladder.made_one(256, 50.0)
    ladder.times.saw(256, gpu(256))
    assert any(ladder.choose(*never)[0] == 64 for _ in range(1000))
    ladder.closed = True
    assert {ladder.choose(*never)[0] for _ in range(1000)} == {256}


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 64, 128])
@pytest.mark.parametrize("new", [100, 2000])
def test_the_ladder_costs_five_per_cent_where_no_draft_is_right(batch: int, new: int, masks: bool) -> None:
    """Against passes of one row a sequence, as by default with masks behind drafts; two passes late, as the host is."""
    cuda = torch.device("cuda")
    strategy = Verified(12, masks=default_masks(12, batch, cuda) if masks else 0)
    ladder = climbed(batch, default_rows(strategy, batch, cuda), strategy.masks)
    chains = counts(*[0] * batch)
    seen, rows, spent = [chains, chains], [ladder.rungs[-1]] * 2, 0.0
    for _ in range(new):
        spent += gpu(rows[-2])
        rows.append(ladder.choose(counts(*[0] * batch), seen[-2])[0])
        tried = rows[-3] > batch
        chains = chains - (chains >> (FORGOTTEN if tried else FORGOTTEN_IDLE)) + tried * UNIT
        seen.append(chains)
    assert new * gpu(batch) / spent >= 0.95
    # Nor does it go on paying them: in the end passes have no masks.
    assert new == 100 or rows[-1] == batch


@pytest.mark.filterwarnings("error")
def test_nobody_runs_any_more() -> None:
    """As a host sees it that is a pass behind."""
    ladder = climbed(4, 180, masks=22)
    assert ladder.choose(counts(), counts())[0] in ladder.rungs
    assert price_of(counts(), counts(), k=7, rows=49, times=None, bought=Bought(36)) in PRICES


def test_masks_behind_drafts_pay_where_a_gpu_s_rows_are_nearly_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the acceptance of a real model on its problems, and times as of Qwen3-4B on an H200."""
    model, spent = model_of(SHIPPED, torch.device("cpu")), [0.0]

    def saw(load: Load, rows: int, seconds: float) -> None:
        spent[0] += gpu(rows)
        load.times.saw(rows, gpu(rows))

    monkeypatch.setattr(Load, "saw", saw)
    rate = []
    for masks in (0, default_masks(8, 1, torch.device("cuda"))):
        monkeypatch.setattr("mtpkern.load._times", {})
        spent[0] = 0.0
        _, tokens = Course(model, 1, 16, 120, Verified(8, 0.2, masks=masks)).run(RIGHT["problems"])
        rate.append(120 * tokens / spent[0])
    assert rate[1] >= 1.12 * rate[0]
