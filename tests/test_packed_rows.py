"""Packed rows spread to a padded batch, worked out by hand."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from mtpkern.kernels import packed_rows
from mtpkern.kernels.packed_rows import PackedRows

C = 6
# Heads of queries and of keys.
ONE, TWO = (1, 1), (4, 2)


def seen(rows: PackedRows, window: int | None = None) -> list[list[list[int]]]:
    """The slots that each row of each sequence sees."""
    bias = rows.spread(window, C, torch.float32, ONE).bias
    return [[row.isfinite().nonzero().flatten().tolist() for row in one[0]] for one in bias]


def test_rows_of_each_sequence_stand_together_and_unused_ones_behind_all() -> None:
    rows = PackedRows(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3, 1, C]), torch.tensor([0, 2, 3]), max_rows=2)
    spread = rows.spread(None, C, torch.float32, TWO)
    assert spread.bring is not None
    assert spread.back is not None
    # Sequence, head, place: the rows 0 and 1, and 2 beside any; the four heads of a row lie side by side.
    bring = (spread.bring.view(2, 4, 2) - torch.arange(4)[:, None]) // 4
    assert torch.equal(bring[0], torch.tensor([0, 1]).expand(4, 2))
    assert (bring[1, :, 0] == 2).all()
    assert spread.bring.max() < 4 * 4
    back = spread.back.view(4, 4)
    assert back[:3].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14]]
    assert back[3].max() < 16
    assert spread.unused.tolist() == [3]
    assert seen(rows) == [[[0, 1, 2], [0, 1, 2, 3]], [[0, 1], []]]
    assert seen(rows, window=2) == [[[1, 2], [2, 3]], [[0, 1], []]]


def test_masks_behind_a_draft_see_its_prefix_and_their_own_span() -> None:
    """Two scratch slots; tokens in slots 2, 3 and 4, the mask in slot 1 behind the first of them."""
    slot, prefix, span = torch.tensor([3, 4, 1]), torch.tensor([4, 5, 3]), torch.tensor([4, 5, 1])
    rows = PackedRows(torch.zeros(3, dtype=torch.int64), slot, torch.tensor([0, 3]), 3, prefix, span, scratch=2)
    spread = rows.spread(None, C, torch.float32, ONE)
    assert spread.bring is None
    assert spread.back is None
    assert seen(rows) == [[[2, 3], [2, 3, 4], [1, 2]]]
    assert seen(rows, window=1) == [[[3], [4], [1]]]


def test_a_pass_of_no_rows() -> None:
    """All of its sequences have ended."""
    rows = PackedRows(torch.tensor([1, 1]), torch.tensor([C, C]), torch.tensor([0, 0, 0]), max_rows=0)
    spread = rows.spread(None, C, torch.float32, TWO)
    assert seen(rows) == [[[]], [[]]]
    assert spread.back is not None
    assert spread.back.max() < 2 * 4
    assert spread.unused.tolist() == [0, 1]


def test_heads_that_share_keys_stand_below_one_another() -> None:
    """Each head's rows in their order, and each sees what it saw."""
    rows = PackedRows(torch.tensor([0, 0, 1]), torch.tensor([2, 3, 1]), torch.tensor([0, 2, 3]), max_rows=2)
    one = rows.spread(2, C, torch.float32, ONE).bias
    three = rows.spread(2, C, torch.float32, (6, 2)).bias
    assert torch.equal(three.view(2, 3, 2, C), one.expand(2, 3, 2, C))


def test_what_layers_share_is_made_once_of_each_form() -> None:
    """By window and heads, and by dtype and capacity, which some layers may have to themselves."""
    rows = PackedRows(torch.tensor([0]), torch.tensor([2]), torch.tensor([0, 1]), max_rows=1)
    assert rows.spread(None, C, torch.float32, ONE) is rows.spread(None, C, torch.float32, ONE)
    assert len(rows.memo) == 1
    others = (2, C, torch.float32, ONE), (2, C, torch.float32, TWO), (2, C, torch.float64, TWO), (2, 4, torch.half, ONE)
    for n, how in enumerate(others, 2):
        bias = rows.spread(*how).bias
        assert (bias.shape[-1], bias.dtype, len(rows.memo)) == (*how[1:3], n)


def rows_of(counts: list[int]) -> PackedRows:
    """So many rows of each sequence, in slots 1, 2, ... of it, and an unused one."""
    seq = [b for b, n in enumerate(counts) for _ in range(n)]
    slot = [1 + i for n in counts for i in range(n)]
    start = torch.tensor([0, *counts]).cumsum(0)
    last = len(counts) - 1
    return PackedRows(torch.tensor([*seq, last]), torch.tensor([*slot, C]), start, max_rows=max(counts))


def test_sequences_without_rows_are_left_out() -> None:
    """Those between others stay, unless the others are few: then their keys would be copied."""
    several = rows_of([0, 2, 0, 1, 0]).spread(None, C, torch.float32, ONE)
    assert several.sequences == slice(1, 4)
    assert several.bias.shape[0] == 3
    assert several.bring is not None
    assert several.bring.view(3, 2)[[0, 2], 0].tolist() == [0, 2]
    assert several.back is not None
    assert several.back[:3].tolist() == [0, 1, 4]
    few = rows_of([1, 0, 0, 0, 0, 2]).spread(None, C, torch.float32, ONE)
    assert isinstance(few.sequences, torch.Tensor)
    assert few.sequences.tolist() == [0, 5]
    assert few.back is not None
    assert few.back[:3].tolist() == [0, 2, 3]


def test_one_sequence_among_others_is_alone() -> None:
    spread = rows_of([0, 0, 3]).spread(None, C, torch.float32, TWO)
    assert spread.sequences == slice(2, 3)
    assert spread.bias.shape == (1, 1, 2 * 3, C)
    assert spread.back is not None
    assert spread.back.view(4, 4)[:3].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert seen(rows_of([0, 0, 3])) == [[[0, 1], [0, 1, 2], [0, 1, 2, 3]]]


def drawn(draw: Callable[[int, int], int], B: int, capacity: int, scratch: int | None) -> PackedRows:
    """Rows of sequences of which some may have none, in slots of which some are trash; with masks in scratch slots."""
    counts = [draw(0, 5) for _ in range(B)]
    begin = [draw(scratch or 0, capacity - 2) for _ in counts]
    seq = [b for b, n in enumerate(counts) for _ in range(n)]
    slot = [min(begin[b] + i, capacity) for b, n in enumerate(counts) for i in range(n)]
    unused = draw(0, 3) or not seq
    seq, slot = [*seq, *[B - 1] * unused], [*slot, *[capacity] * unused]
    spans = []
    if scratch is not None:
        prefix = [draw(scratch, c + 1) if c >= scratch else scratch for c in slot]
        spans = [torch.tensor(prefix), torch.tensor([draw(0, c + 1) for c in slot]), scratch]
    start = torch.tensor([0, *counts]).cumsum(0)
    return PackedRows(torch.tensor(seq), torch.tensor(slot), start, max(1, *counts, 1), *spans)


@pytest.mark.parametrize("seed", range(40))
def test_the_host_spreads_them_as_a_device_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for sequences without rows, which it leaves out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    B, scratch, window = draw(1, 5), (None, 0, 2)[seed % 3], (None, 1, 3, 50)[seed % 4]
    capacity = draw(6, 20)
    rows = drawn(draw, B, capacity, scratch)
    if B == 1:  # whose rows are all there are
        n = int(rows.start[-1])
        rows = PackedRows(rows.seq, rows.slot, rows.start, max(1, n), rows.prefix_end, rows.span_start, rows.scratch)
    Hq, Hkv = 4, 2
    found = {}
    for on_host in (True, False):
        monkeypatch.setattr(packed_rows, "is_host", partial(lambda is_it, device: is_it, on_host))
        rows.memo.clear()
        found[on_host] = rows.spread(window, capacity, torch.float32, (Hq, Hkv))
    host, device = found[True], found[False]
    some = device.bias[host.sequences]
    used = torch.ones(len(some), dtype=torch.bool) if B == 1 else rows.start.diff()[host.sequences] > 0
    assert torch.equal(host.bias[used], some[used])
    assert not device.bias[torch.ones(B).index_fill(0, torch.arange(B)[host.sequences], 0).bool()].isfinite().any()
    assert host.unused.tolist() == device.unused.nonzero().flatten().tolist()
    if B == 1:
        assert host.bring is host.back is device.bring is device.back is None
        return
    # Whatever the rows hold goes there and back.
    x = torch.arange(len(rows.slot) * Hq)
    for spread in (host, device):
        assert spread.bring is not None
        assert spread.back is not None
        back = x[spread.bring][spread.back].view(-1, Hq)
        assert torch.equal(back[rows.slot < capacity], x.view(-1, Hq)[rows.slot < capacity])
