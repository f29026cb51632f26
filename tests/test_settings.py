"""Settings change scores as transformers' processors do, bit by bit, and only those of rows that ask for it."""

import random
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mtpkern import settings
from mtpkern.choosing import Choosing
from mtpkern.kernels.keep_top import keep_top_p
from mtpkern.processors import Bias, from_transformers
from mtpkern.settings import (
    MinP,
    MinTokens,
    NoRepeatNGram,
    RepetitionPenalty,
    Setting,
    Temperature,
    TokenBias,
    TopK,
    TopP,
    numbers_in,
    top_p_of_values,
    united,
)
from mtpkern.texts import Processor, Texts


def draw(rows: int, vocabulary: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)).mul(scale).to(dtype)


# Tokens of prompts.
START = 4
SCORES = {
    "few": draw(64, 17, 2.0),
    "flat": draw(32, 3001, 0.1),
    "peaked": draw(32, 3001, 6.0),
    "ties": draw(64, 501, 2.0).round(),
    "bfloat16": draw(64, 501, 2.0, torch.bfloat16).float(),
    "equal": torch.zeros(3, 40),
    "one": draw(3, 1, 1.0),
    "banned": draw(32, 301, 2.0).masked_fill(torch.arange(301) % 3 > 0, -torch.inf),
    "top-k": TopKLogitsWarper(50)(None, draw(32, 3001, 2.0)),
    "faulty": torch.stack([torch.full((9,), torch.nan), torch.full((9,), -torch.inf), torch.full((9,), torch.inf)]),
}
THEIRS: dict[str, list[Any]] = {
    "temperature": [TemperatureLogitsWarper(x) for x in (0.1, 0.7, 1.0, 1.3)],
    "top-k": [TopKLogitsWarper(x) for x in (1, 2, 50, 64, 300, 10**6, 2**63)],
    "top-p": [TopPLogitsWarper(x) for x in (0.0, 0.05, 0.5, 0.9, 0.999, 1.0)],
    "min-p": [MinPLogitsWarper(x) for x in (0.0, 0.05, 0.3, 1.0)],
    "penalty": [RepetitionPenaltyLogitsProcessor(x) for x in (0.8, 1.3, 1.0)],
    "bias": [SequenceBiasLogitsProcessor({(t,): b for t, b in x}) for x in ([(0, 4.0)], [(0, -9.5), (8, 100.0)])],
    "bad words": [NoBadWordsLogitsProcessor(x) for x in ([[0]], [[3], [7], [8]])],
    "suppress": [SuppressTokensLogitsProcessor(x) for x in ([0], [8, 2, 1])],
    "n-grams": [NoRepeatNGramLogitsProcessor(x) for x in (1, 2, 3, 4, 8)],
    "min length": [MinLengthLogitsProcessor(n, x) for n, x in ((3, [0]), (1000, [5, 2, 8]), (9, [1]))],
    "min new": [MinNewTokensLengthLogitsProcessor(START, n, x) for n, x in ((3, [0]), (2, [5, 2]), (99, [1]))],
    "begin": [SuppressTokensAtBeginLogitsProcessor(x, START) for x in ([0], [3, 8])],
}
# transformers refuses tokens that are not in the vocabulary, and makes NaN of a banned infinity, or not.
NAMES_TOKENS = ("bias", "bad words", "suppress", "min length", "min new", "begin")
PAIRS = [
    (name, setting)
    for name, setting in product(SCORES, THEIRS)
    if setting not in NAMES_TOKENS or (name != "one" and (name != "faulty" or setting == "bias"))
]


def texts_of(scores: Tensor) -> tuple[Texts, list[Tensor]]:
    """Of two sequences in turns, to ends that differ; and the same texts one by one."""
    R, V = scores.shape
    tokens = torch.tensor([[*range(6), *range(2, 9)], [3, 3, 3, 1, 3, 3, 2, 3, 3, 3, 1, 0, 0]]) % V
    seq, end = torch.arange(R) % 2, START + torch.arange(R) % 9
    texts = Texts(tokens, seq, end, end, end - START, end > 0, None)
    return texts, [tokens[b, :n][None] for b, n in zip(seq.tolist(), end.tolist())]


def own_of(processors: list[Any], rows: int) -> tuple[list[Any], Tensor, Setting]:
    """What each row asks for, and as a setting: numbers [rows, width], and what is to be called."""
    known = [from_transformers(processor, START) for processor in processors]
    assert all(x == known[0] for x in known)
    assert isinstance(known[0], Setting)
    each = [processors[r % len(processors)] for r in range(rows)]
    numbers = [known[r % len(known)].own for r in range(rows)]  # type: ignore[attr-defined]
    return each, torch.tensor(numbers, dtype=torch.float32), known[0]


@pytest.mark.parametrize(("name", "setting"), PAIRS)
def test_each_row_gets_what_transformers_makes_of_it(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = SCORES[name]
    texts, alone = texts_of(scores)
    each, numbers, ours = own_of(deepcopy(THEIRS[setting]), len(scores))  # some keep tensors of the first vocabulary
    expected = torch.cat([own(text, scores[r : r + 1]) for r, (own, text) in enumerate(zip(each, alone))])
    before = scores.clone()
    for look in (True, False):  # as a CPU may, and as a GPU has it
        monkeypatch.setattr(settings, "may_look", lambda x, look=look: look)
        found = ours(scores, texts, numbers)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert scores.equal(before) or name == "faulty"


@pytest.mark.parametrize("setting", THEIRS)
def test_rows_that_ask_for_nothing_stay_as_they_are(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = SCORES["peaked"]
    texts, _ = texts_of(scores)
    _, numbers, ours = own_of(THEIRS[setting][1:2], len(scores))
    asks = torch.arange(len(scores)) % 3 == 0
    for_all = ours(scores, texts, numbers)
    assert not for_all.equal(scores)
    numbers[~asks] = ours.neutral
    expected = torch.where(asks[:, None], for_all, scores)
    nothing = torch.full_like(numbers, ours.neutral)
    assert ours(scores, texts, numbers).equal(expected)
    assert ours(scores, texts, nothing) is scores
    monkeypatch.setattr(settings, "may_look", lambda x: False)
    assert ours(scores, texts, numbers).equal(expected)
    assert ours(scores, texts, nothing).equal(scores)


@pytest.mark.parametrize("name", SCORES)
def test_top_p_without_places_is_that_with_them(name: str) -> None:
    scores = SCORES[name]
    rest = torch.tensor([0.0, 0.1, 0.5, 0.95, 1.0, -1.0])[torch.arange(len(scores)) % 6]
    torch.testing.assert_close(
        *(top_p_of_values(scores, rest), keep_top_p(scores, rest)), rtol=0, atol=0, equal_nan=True
    )


def test_only_rows_with_ties_at_the_cut_are_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def noted(scores: Tensor, rest: Tensor) -> Tensor:
        rows.append(len(scores))
        return keep_top_p(scores, rest)

    monkeypatch.setattr(settings, "keep_top_p", noted)
    rest = torch.full((32,), 0.1)
    top_p_of_values(SCORES["peaked"], rest)
    assert rows == []
    tied = SCORES["peaked"].clone()
    tied[3], tied[5] = 0.0, tied[5].round()
    top_p_of_values(tied, rest)
    assert rows == [2]


@pytest.mark.parametrize(
    "processor",
    [TopPLogitsWarper(0.5, min_tokens_to_keep=3), MinPLogitsWarper(0.5, min_tokens_to_keep=2)]
    + [kind(x, filter_value=-1e4) for kind, x in ((TopPLogitsWarper, 0.5), (MinPLogitsWarper, 0.5))]
    + [TopKLogitsWarper(4, filter_value=-1e4)],
    ids=lambda x: type(x).__name__,
)
def test_what_has_more_than_a_number_is_called_as_it_is(processor: Any) -> None:
    ours = from_transformers(processor, 4)
    assert not isinstance(ours, Setting)
    scores = SCORES["few"]
    found = ours.on(scores.device, 17)(scores, texts_of(scores)[0], torch.zeros(64, 0))
    assert found.equal(processor(None, scores))


PROCESSORS: list[Processor] = [
    *(RepetitionPenalty(1.2), Temperature(0.5), TopK(5), TopP(0.1), MinP(0.2)),
    *(TokenBias(((3, 0.5),)), NoRepeatNGram(3), MinTokens(9, (1, 2)), MinTokens(5, (2,), in_all=True)),
    *(Bias("bad_words_ids", (((1, 2), -1.0),)), Bias("bad_words_ids", (((2, 2), -1.0),))),
]


@given(st.lists(st.sampled_from(PROCESSORS), max_size=6), st.lists(st.sampled_from(PROCESSORS), max_size=6))
def test_a_united_list_holds_both_in_their_order(a: list[Processor], b: list[Processor]) -> None:
    fixed = [[x for x in one if not isinstance(x, Setting)] for one in (a, b)]
    run = united(a, b)
    assert run == (None if run is None else united(run, a)) == (None if run is None else united(run, b))
    if run is None:
        assert fixed[0] != fixed[1]
        return
    assert [x for x in run if not isinstance(x, Setting)] == fixed[0] == fixed[1]
    for own in (a, b):
        numbers = numbers_in(run, own)
        asked = []
        for x in run:
            mine, numbers = numbers[: x.width], numbers[x.width :]
            asked += [mine] if isinstance(x, Setting) and mine != [x.neutral] * x.width else []
        assert not numbers
        assert asked == [x.own for x in own if isinstance(x, Setting)]


def test_an_order_of_the_callers_own_stays() -> None:
    warm, cut = Temperature(0.5), TopP(0.1)
    assert united([cut, warm], []) == (cut, warm)
    assert numbers_in((cut, warm), [Temperature(2.0)]) == [-1.0, 2.0]
    both = united([cut, warm], [warm, cut])
    assert both is not None
    assert [type(x) for x in both] in ([TopP, Temperature, TopP], [Temperature, TopP, Temperature])


def test_a_bias_is_of_a_token_that_the_head_has() -> None:
    """It may have fewer than the embedding."""
    bias = Bias("bad_words_ids", (((1, 2), -1.0), ((13,), -1.0)))
    bias.require_known(16)
    with pytest.raises(ValueError, match=r"bad_words_ids must hold ids from 0 to 11, .*; got \[13\]"):
        bias.on(torch.device("cpu"), 12)


def test_who_needs_more_room_than_most_shares_it() -> None:
    """So requests that each have another number of biases do not make a list that grows with them."""
    biases = [TokenBias(tuple((token, 1.0) for token in range(n))) for n in (1, 257, 300, 301, 350, 512, 513)]
    assert [x.room for x in biases] == [300, 300, 300, 512, 512, 512, 1024]
    assert [len(x.own) for x in biases] == [2 * x.room for x in biases]
    assert [MinTokens(1, tuple(range(n))).room for n in (0, 16, 17, 31)] == [16, 16, 32, 32]
    assert united([biases[3]], [biases[4]]) == (biases[3],)


@pytest.mark.parametrize("look", [True, False])
def test_a_run_longer_than_any_text_costs_nothing(look: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "may_look", lambda x: look)
    texts, _ = texts_of(SCORES["few"])
    for size in (12, 13, 14, 15, 10**12):
        ours = from_transformers(NoRepeatNGramLogitsProcessor(size), START)
        assert isinstance(ours, NoRepeatNGram)
        found = ours(SCORES["few"], texts, torch.tensor([ours.own] * 64))
        assert found.equal(SCORES["few"])


def test_equal_but_for_numbers_is_equal() -> None:
    one, other = Choosing((Temperature(0.5), TopP(0.1)), True), Choosing((Temperature(1.5), TopP(0.3)), True)
    assert one == other
    assert hash(one) == hash(other)
    assert one != Choosing((Temperature(0.5),), True)
    assert one.numbers(other) == [0.0, 1.5, 0.3]
    assert one.numbers(None) == [1.0, 1.0, -1.0]
    assert one.united(Choosing()) == one
    assert one.united(Choosing(keeps=frozenset({"logprobs"}))) is None


def test_random_numbers_never_touch_another_row() -> None:
    rng = random.Random(3)
    scores = draw(24, 101, 3.0)
    texts, _ = texts_of(scores)
    for ours in PROCESSORS[:9]:
        assert isinstance(ours, Setting)
        numbers = torch.tensor([rng.choice([[ours.neutral] * ours.width, ours.own]) for _ in range(24)])
        alone = [ours(scores[r : r + 1], texts.of(torch.arange(24) == r), numbers[r : r + 1]) for r in range(24)]
        assert ours(scores, texts, numbers).equal(torch.cat(alone))
