"""Masks behind other drafts than the last, by load: as far as rows are nearly free, and by what was bought of late."""

import numpy as np
import pytest

from mtpkern.load import PRICES, Bought, Load, _promised
from support.loads import counts, running, times


@pytest.fixture
def rows_for_free() -> None:
    """Not here."""


def rows_bought(load: Load, hits: float, chains: float, passes: int = 200) -> list[int]:
    """What passes of one sequence with these counts would have, as the price of each is told."""
    sequences = running(hits, chains)
    bought = []
    for _ in range(passes):
        price = load.price(sequences)
        if price in PRICES:
            _, needed = _promised(counts(hits), counts(chains), load.k, load.shown, load.bought)
            bought.append(round(needed[PRICES.tolist().index(price)]))
    return bought


def test_masks_stand_behind_drafts_where_rows_are_nearly_free() -> None:
    """At odds of 0.6 seven predictions make 1.4 drafts; masks behind all of them are 13 rows more than behind one."""
    for slope, least, most in ((0.0, 14, 49), (0.005, 10, 49), (0.05, 3, 9), (0.5, 1, 2)):
        load = Load(times(lambda r, slope=slope: 1 + slope * r, 1, 2, 4, 8, 16, 32, 48), k=7, rows=49, masks=36)
        rows = rows_bought(load, 60, 40)
        assert least <= np.median(rows) <= most, (slope, rows)
    without = Load(times(lambda r: 1.0, 1, 2, 4, 8, 16, 32, 48), k=7, rows=13)
    assert max(rows_bought(without, 60, 40)) <= 13


def test_what_was_bought_of_late_is_what_drafts_tell_of() -> None:
    """Confirmed drafts of passes with masks behind the last draft alone promise more than themselves."""
    few, all_of_them = Bought(36), Bought(36)
    few.part = 0.5
    one, more = (_promised(counts(40), counts(40), 7, (0, 0), bought)[0] for bought in (all_of_them, few))
    assert (more[:-1] - 1 >= np.minimum(1.9 * (one[:-1] - 1), 6) - 1e-9).all()
    assert more[-1] == one[-1] == 1
    # It is forgotten as chains are; a pass that buys nothing tells nothing.
    _promised(counts(40), counts(40), 7, (0, 0), few)
    few.note(0)
    assert few.part == 0.5 + 0.5 / 32
    few.note(len(PRICES) - 1)
    assert few.part == 0.5 + 0.5 / 32
