"""Top-p on a CPU is transformers' own, bit by bit, in less of its time."""

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from mtpkern import processors
from mtpkern.processors import from_transformers, keep_top_p


def draw(rows: int, vocabulary: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)).mul(scale).to(dtype)


SCORES = {
    "few": draw(64, 17, 2.0),
    "flat": draw(32, 3001, 0.1),
    "peaked": draw(32, 3001, 6.0),
    "ties": draw(64, 501, 2.0).round(),
    "bfloat16": draw(64, 501, 2.0, torch.bfloat16).float(),
    "double": draw(8, 301, 2.0, torch.float64),
    "equal": torch.zeros(3, 40),
    "one": draw(3, 1, 1.0),
    "banned": draw(32, 301, 2.0).masked_fill(torch.arange(301) % 3 > 0, -torch.inf),
    "top-k": TopKLogitsWarper(50)(None, draw(32, 3001, 2.0)),
    "faulty": torch.stack([torch.full((9,), torch.nan), torch.full((9,), -torch.inf), torch.full((9,), torch.inf)]),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("options", [{}, {"min_tokens_to_keep": 3}, {"filter_value": -1e4}], ids=str)
def test_it_keeps_what_transformers_keeps(name: str, options: dict[str, float]) -> None:
    scores = SCORES[name]
    for p in (0.0, 0.05, 0.5, 0.9, 0.999, 1.0):
        warper = TopPLogitsWarper(p, **options)
        torch.testing.assert_close(keep_top_p(warper, scores), warper(None, scores), rtol=0, atol=0, equal_nan=True)


def test_only_rows_with_ties_at_the_cut_are_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    theirs = TopPLogitsWarper.__call__

    def noted(self: TopPLogitsWarper, ids: Tensor, scores: Tensor) -> Tensor:
        rows.append(len(scores))
        return theirs(self, ids, scores)

    monkeypatch.setattr(TopPLogitsWarper, "__call__", noted)
    keep_top_p(TopPLogitsWarper(0.9), SCORES["peaked"])
    assert rows == []
    tied = SCORES["peaked"].clone()
    tied[3], tied[5] = 0.0, tied[5].round()
    keep_top_p(TopPLogitsWarper(0.9), tied)
    assert rows == [2]


def test_a_call_on_a_cpu_goes_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "keep_top_p", lambda warper, scores: scores + warper.top_p)
    apply = from_transformers(TopPLogitsWarper(0.5), 4).on(torch.device("cpu"), 9)
    assert apply(torch.zeros(2, 9), None).eq(0.5).all()  # type: ignore[arg-type]
    assert processors.keep_top_p is not keep_top_p
