"""The visibility rule against its own words, written as loops."""

import pytest
import torch

from mtpkern.kernels.span_mask import draw_mask, span_mask
from mtpkern.train.layout import build_layout


def brute_force(position, prefix_end, span_start, span_end, window, document_start):
    """Row by row, key by key, with the document's start given instead of derived."""
    T = len(position)
    mask = torch.zeros(T, T, dtype=torch.bool)
    for r in range(T):
        for j in range(T):
            if span_start[r] <= j < span_end[r]:
                distance = r - j
            elif document_start[r] <= j < prefix_end[r]:
                distance = position[r] - (j - document_start[r])
            else:
                continue
            mask[r, j] = window is None or distance < window
    return mask


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rule_of_layouts(window, bidirectional):
    prefix, lengths = torch.tensor([[2, 5, 0], [1, 3, 6]]), torch.tensor([7, 8])
    layout = build_layout(prefix, lengths, 4, num_tokens=9, mask_rows=13, bidirectional=bidirectional)
    got = span_mask(*layout.rule, window=window)
    for b in range(2):
        rule = [x[b].tolist() for x in layout.rule[:3]]
        # All rows of a span, the copy of its prefix' last among them, see as far as the last of them.
        end = [r + 1 for r in range(22)]
        for row, exists in zip(layout.row[b].tolist(), (prefix[b] > 0).tolist()):
            for r in row if bidirectional and exists else ():
                end[r] = row[-1] + 1
        assert torch.equal(got[b], brute_force(*rule, end, window, [0] * 22))


@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_packed_documents_do_not_see_each_other(window):
    # Documents of 3 and 4 tokens; a span of two masks behind 2 tokens of each.
    position = torch.tensor([0, 1, 2, 0, 1, 2, 3, 2, 3, 2, 3])
    prefix_end = torch.tensor([1, 2, 3, 4, 5, 6, 7, 2, 2, 5, 5])
    span_start = torch.tensor([1, 2, 3, 4, 5, 6, 7, 7, 7, 9, 9])
    start = [0, 0, 0, 3, 3, 3, 3, 0, 0, 3, 3]
    got = span_mask(position, prefix_end, span_start, window=window)
    rule = position.tolist(), prefix_end.tolist(), span_start.tolist(), range(1, 12)
    assert torch.equal(got, brute_force(*rule, window, start))
    assert not got[9, :3].any()


def test_padding_sees_nothing_and_every_other_row_sees_itself():
    layout = build_layout(torch.tensor([[2, 0]]), torch.tensor([4]), 3, num_tokens=6, mask_rows=5)
    mask = span_mask(layout.position, layout.prefix_end, layout.span_start)[0]
    real = [0, 1, 2, 3, 6, 7]
    assert mask.any(-1).nonzero().flatten().tolist() == real
    assert mask.diagonal().nonzero().flatten().tolist() == real


def test_errors():
    x = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="one shape"):
        span_mask(x, x, x[:2])
    with pytest.raises(ValueError, match="window"):
        span_mask(x, x, x, window=0)


def test_drawing_shows_the_mask():
    position, prefix_end, span_start = torch.tensor([0, 1, 1]), torch.tensor([1, 2, 1]), torch.tensor([1, 2, 2])
    lines = draw_mask(position, prefix_end, span_start).splitlines()
    assert [line.split()[2:] for line in lines[1:]] == [["■", "·", "·"], ["■", "■", "·"], ["■", "·", "▪"]]
