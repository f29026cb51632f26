import warnings
from dataclasses import FrozenInstanceError
from itertools import product
from typing import Any

import pytest

from mtpkern import ConfAdapt, Static, Verified
from mtpkern.strategies import Strategy, name_of, strategy_of


def test_defaults_and_how_they_are_written() -> None:
    assert Static(4) == Static(k=4)
    assert ConfAdapt(8, 0.9) == ConfAdapt(k=8)
    assert Verified(k=12, threshold=0.6) == Verified(12) == Verified(12, None) == Verified().for_model(16)
    assert ConfAdapt(8, 0.9) != Verified(8, 0.9)
    assert [s.verify for s in (Static(), ConfAdapt(), Verified())] == [False, False, True]
    assert all(isinstance(s, Strategy) for s in (Static(), ConfAdapt(), Verified()))


@pytest.mark.parametrize(
    ("strategy", "unrecorded", "k2", "k16"),
    [(Static(), 4, 2, 4), (ConfAdapt(threshold=0.8), 8, 2, 16), (Verified(threshold=0.8), 12, 2, 12)],
    ids=str,
)
def test_a_k_that_is_left_out_is_the_models(strategy: Strategy, unrecorded: int, k2: int, k16: int) -> None:
    """ConfAdapt decodes with all that a checkpoint was trained for; one that is given stays, trained for or not."""
    assert [strategy.for_model(k_max).k for k_max in (None, 2, 16)] == [unrecorded, k2, k16]
    assert {strategy.for_model(k_max).threshold for k_max in (None, 2, 16)} == {strategy.threshold}
    given = type(strategy)(k=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [given.for_model(k_max) for k_max in (None, 6, 16)] == [given] * 3
    with pytest.warns(UserWarning, match=r"^k=6 is more than the k_max=2 predictions .* at most 2, or none") as said:
        assert given.for_model(2) == given
    assert len(said) == 1


def test_strategies_are_values() -> None:
    assert len({Static(2), Static(2), Static(3)}) == 2
    with pytest.raises(FrozenInstanceError):
        Static(2).k = 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", [Static, ConfAdapt, Verified])
@pytest.mark.parametrize("k", [1, 2, 16, 256])
def test_any_whole_k(kind: Any, k: int) -> None:
    assert kind(k=k).k == k


@pytest.mark.parametrize("kind", [Static, ConfAdapt, Verified])
@pytest.mark.parametrize("k", [0, -1, 2.0, "4", True])
def test_k_must_be_a_whole_number_from_1(kind: Any, k: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: k must be a whole number .* got {k!r}"):
        kind(k=k)


@pytest.mark.parametrize("kind", [Static, ConfAdapt, Verified])
def test_k_must_be_at_most_256(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: k must be at most 256, got 257: "):
        kind(k=257)


@pytest.mark.parametrize(
    ("kind", "threshold"),
    [*product((ConfAdapt, Verified), (-1.0, -0.1, 1.1, 90, float("nan"), "0.5", True)), (ConfAdapt, None)],
)
def test_threshold_must_be_a_probability(kind: Any, threshold: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: threshold must be a probability"):
        kind(threshold=threshold)
    assert (kind(threshold=0).threshold, kind(threshold=1.0).threshold) == (0, 1.0)


@pytest.mark.parametrize("masks", [-1, 1.0, "3", True])
def test_masks_must_be_a_whole_number(masks: Any) -> None:
    with pytest.raises(ValueError, match=rf"Verified: masks must be a whole number of rows from 0 up, got {masks!r}"):
        Verified(4, masks=masks)


def test_masks_are_no_more_than_there_are_places_for() -> None:
    assert Verified(4, masks=9).masks == 9
    with pytest.raises(ValueError, match=r"masks=10 is more than k - 1 = 3 masks behind each .* give at most 9"):
        Verified(4, masks=10)
    # A k of the model's own brings its own bound.
    assert Verified(masks=9).for_model(3) == Verified(3, masks=4)
    assert Verified(masks=9).for_model(None) == Verified(12, masks=9)
    assert [s.masks for s in (Static(4), ConfAdapt(4), Verified(4))] == [0, 0, 0]


def test_static_has_no_threshold() -> None:
    # Every confidence is above it.
    assert Static(3).threshold < 0
    with pytest.raises(ValueError, match="Static has no threshold"):
        Static(3, threshold=0.9)


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("verified", Verified()),
        ("verified:8", Verified(8)),
        ("verified:8:0.5", Verified(8, 0.5)),
        ("confadapt:.95", ConfAdapt(threshold=0.95)),
        ("confadapt:1.0", ConfAdapt(threshold=1.0)),
        ("confadapt:1", ConfAdapt(1)),
        ("confadapt:16:0.9", ConfAdapt(16, 0.9)),
        ("static:1", Static(1)),
        ("verified:4:0.2:9", Verified(4, 0.2, masks=9)),
    ],
)
def test_as_a_command_line_writes_them(text: str, strategy: Strategy) -> None:
    assert strategy_of(text) == strategy
    assert name_of(text) == text.replace(":", "_")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("greedy", "such as static:1, confadapt:0.9 or verified:8:0.6; got 'greedy'"),
        ("confadapt:0.9:16", "its k and its threshold"),
        ("confadapt:", "got 'confadapt:'"),
        ("confadapt:-1", "got 'confadapt:-1'"),
        ("verified:0", "k must be a whole number"),
        ("verified:1.5", "threshold must be a probability"),
        ("static:0.5", "Static has no threshold"),
        ("verified:4:9", "got 'verified:4:9'"),
        ("confadapt:4:0.2:9", "confadapt makes no drafts.* leave out :9"),
        ("verified:4:0.2:10", "masks=10 is more than"),
    ],
)
def test_what_is_written_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        strategy_of(text)
