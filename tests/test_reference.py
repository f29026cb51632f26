"""The slow decoding that everything is compared with, itself compared with passes worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern import ConfAdapt, Static, Verified, reference
from mtpkern.strategies import Strategy

M = 11  # the mask token; words are 0 to 10


class Counting:
    """A model whose text counts up by one, 0 behind 10; `calls` holds the tokens of every pass.

    j masks behind the word x it guesses x + 1 + j, or what `wrong` says for (x, j), with probability sure[j]. The mask
    token always has the highest logit of all.
    """

    device = torch.device("cpu")

    def __init__(self, sure: tuple[float, ...], wrong: dict[tuple[int, int], int]) -> None:
        self.sure = sure
        self.wrong = wrong
        self.calls: list[list[int]] = []

    def __call__(self, input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None) -> Any:
        assert not use_cache
        (tokens,) = input_ids.tolist()
        # Which roberta and its kin, for one, would count in a way that no decoding does.
        assert position_ids is not None
        assert position_ids.tolist() == [list(range(len(tokens)))]
        self.calls.append(tokens)
        self.logits = torch.empty(1, len(tokens), M + 1)
        x, j = -1, 0
        for row, token in zip(self.logits[0], tokens):
            x, j = (x, j + 1) if token == M else (token, 0)
            p = torch.tensor(self.sure[j])
            row.fill_(((1 - p) / (M - 1)).log())
            row[self.wrong.get((x, j), (x + 1 + j) % M)] = p.log()
            row[M] = 50.0
        return self

    forward = __call__


def run(
    strategy: Strategy,
    new: int,
    *,
    sure: tuple[float, ...] = (0.9, 0.8, 0.6, 0.4),
    wrong: dict[tuple[int, int], int] | None = None,
    **kwargs: Any,
) -> tuple[list[int], list[int], list[list[int]]]:
    """Decode the prompt [1]: tokens, blocks, and what was fed in each pass behind the prompt."""
    model: Any = Counting(sure, wrong or {})
    prompt = torch.tensor([1])
    tokens, blocks = reference.decode(model, prompt, strategy, mask_token_id=M, max_new_tokens=new, **kwargs)
    assert all(call[0] == 1 for call in model.calls)
    return tokens, blocks, [call[1:] for call in model.calls]


def test_static_keeps_everything() -> None:
    tokens, blocks, fed = run(Static(3), 7)
    assert fed == [[M, M], [2, 3, 4, M, M], [2, 3, 4, 5, 6, 7]]
    assert tokens == [2, 3, 4, 5, 6, 7, 8]
    assert blocks == [3, 3, 1]


def test_static_keeps_wrong_guesses_too() -> None:
    tokens, blocks, fed = run(Static(3), 6, wrong={(1, 2): 9})
    assert fed == [[M, M], [2, 3, 9, M, M]]
    assert tokens == [2, 3, 9, 10, 0, 1]
    assert blocks == [3, 3]


def test_static_with_k_1_is_greedy_decoding() -> None:
    tokens, blocks, fed = run(Static(1), 3)
    assert fed == [[], [2], [2, 3]]
    assert (tokens, blocks) == ([2, 3, 4], [1, 1, 1])


def test_confadapt_keeps_the_sure_ones() -> None:
    tokens, blocks, fed = run(ConfAdapt(k=4, threshold=0.5), 7)
    # 0.9, 0.8 and 0.6 are above the threshold, 0.4 is not.
    assert fed == [[M, M, M], [2, 3, 4, M, M, M], [2, 3, 4, 5, 6, 7]]
    assert tokens == [2, 3, 4, 5, 6, 7, 8]
    assert blocks == [3, 3, 1]


@pytest.mark.parametrize(
    ("threshold", "sure"),
    [
        (0.95, (0.9, 0.8, 0.6)),  # none is sure
        (0.5, (0.3, 0.9, 0.9)),  # the first is not sure: what follows it does not count
        (0.5, (0.9, 0.3, 0.9)),  # a gap ends the block
        (1.0, (1.0, 1.0, 1.0)),  # sure is above the threshold, not at it
    ],
)
def test_confadapt_keeps_one_at_least(threshold: float, sure: tuple[float, ...]) -> None:
    tokens, blocks, fed = run(ConfAdapt(k=3, threshold=threshold), 3, sure=sure)
    assert fed == [[M, M], [2, M], [2, 3]]
    assert (tokens, blocks) == ([2, 3, 4], [1, 1, 1])


# Whether the first prediction is sure does not matter: it is the model's own and certain.
@pytest.mark.parametrize("first", [0.9, 0.2])
def test_verified_confirms_its_drafts(first: float) -> None:
    tokens, blocks, fed = run(Verified(k=3, threshold=0.5), 8, sure=(first, 0.8, 0.6))
    assert fed == [
        [M, M],  # 2 is certain; 3 4 are drafts
        [2, 3, 4, M, M],  # 3 4 confirmed, 5 certain; 6 7 are drafts
        [2, 3, 4, 5, 6, 7, M],  # 6 7 confirmed, 8 certain; 9 is a draft, and the limit leaves no room for more
        [2, 3, 4, 5, 6, 7, 8, 9],  # 9 confirmed
    ]
    assert tokens == [2, 3, 4, 5, 6, 7, 8, 9]
    assert blocks == [1, 3, 3, 1]


def test_verified_puts_its_own_token_in_place_of_a_wrong_draft() -> None:
    tokens, blocks, fed = run(Verified(k=3, threshold=0.5), 8, wrong={(1, 2): 9})
    assert fed == [
        [M, M],  # 2; drafts 3 9
        [2, 3, 9, M, M],  # 3 confirmed, 9 not: 4 in its place; what the masks say is dropped
        [2, 3, 4, M, M],  # 5; drafts 6 7
        [2, 3, 4, 5, 6, 7, M],  # 6 7 confirmed, 8; draft 9
        [2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert tokens == [2, 3, 4, 5, 6, 7, 8, 9]
    assert blocks == [1, 2, 1, 3, 1]


def test_verified_drafts_the_sure_ones_only() -> None:
    tokens, blocks, fed = run(Verified(k=3, threshold=0.7), 6)
    assert fed == [[M, M], [2, 3, M, M], [2, 3, 4, 5, M], [2, 3, 4, 5, 6, 7]]
    assert tokens == [2, 3, 4, 5, 6, 7]
    assert blocks == [1, 2, 2, 1]


def test_a_draft_is_surer_than_the_threshold_not_as_sure() -> None:
    tokens, blocks, fed = run(Verified(k=3, threshold=1.0), 4, sure=(1.0, 1.0, 1.0))
    assert fed == [[M, M], [2, M, M], [2, 3, M], [2, 3, 4]]
    assert (tokens, blocks) == ([2, 3, 4, 5], [1, 1, 1, 1])


@pytest.mark.parametrize(
    ("strategy", "stops", "tokens", "blocks"),
    [
        (Static(3), 2, [2], [1]),
        (Static(3), 3, [2, 3], [2]),
        (Static(3), 4, [2, 3, 4], [3]),
        (Static(3), {6, 8}, [2, 3, 4, 5, 6], [3, 2]),
        (Static(3), [8, 6], [2, 3, 4, 5, 6], [3, 2]),
        (ConfAdapt(k=4, threshold=0.5), 6, [2, 3, 4, 5, 6], [3, 2]),
        (Verified(k=3, threshold=0.5), 2, [2], [1]),
        (Verified(k=3, threshold=0.5), 4, [2, 3, 4], [1, 2]),
        (Verified(k=3, threshold=0.5), 5, [2, 3, 4, 5], [1, 3]),
        (Verified(k=3, threshold=0.5), 6, [2, 3, 4, 5, 6], [1, 3, 1]),
        (Static(3), 1, [2, 3, 4, 5, 6, 7, 8, 9], [3, 3, 2]),  # in the prompt, it does not stop
    ],
)
def test_stop_tokens(strategy: Strategy, stops: Any, tokens: list[int], blocks: list[int]) -> None:
    assert run(strategy, 8, eos_token_id=stops)[:2] == (tokens, blocks)


def test_a_wrong_draft_does_not_stop() -> None:
    tokens, blocks, _ = run(Verified(k=3, threshold=0.5), 5, wrong={(1, 2): 9}, eos_token_id=9)
    assert (tokens, blocks) == ([2, 3, 4, 5, 6], [1, 2, 1, 1])


@pytest.mark.parametrize("strategy", [Static(3), ConfAdapt(k=3, threshold=0.0)], ids=str)
@pytest.mark.parametrize(("new", "blocks"), [(1, [1]), (2, [2]), (3, [3]), (4, [3, 1]), (5, [3, 2]), (7, [3, 3, 1])])
def test_limit(strategy: Strategy, new: int, blocks: list[int]) -> None:
    assert run(strategy, new, sure=(0.9, 0.8, 0.7))[:2] == (list(range(2, 2 + new)), blocks)


@pytest.mark.parametrize(
    ("strategy", "rows", "fed", "blocks"),
    [
        # Three tokens are fed again, which fills the rows; then one, which leaves two for masks.
        (Static(3), 3, [[M, M], [2, 3, 4], [2, 3, 4, 5, M, M]], [3, 1, 3]),
        (Static(3), 4, [[M, M], [2, 3, 4, M], [2, 3, 4, 5, 6, M]], [3, 2, 2]),
        (Static(3), 5, [[M, M], [2, 3, 4, M, M], [2, 3, 4, 5, 6, 7]], [3, 3, 1]),
        # A draft is fed again as well.
        (
            Verified(k=3, threshold=0.5),
            3,
            [[M, M], [2, 3, 4], [2, 3, 4, 5, M, M], [2, 3, 4, 5, 6, 7, 8]],
            [1, 3, 1, 2],
        ),
    ],
)
def test_row_budget(strategy: Strategy, rows: int, fed: list[list[int]], blocks: list[int]) -> None:
    assert run(strategy, 7, rows=rows) == ([2, 3, 4, 5, 6, 7, 8], blocks, fed)
