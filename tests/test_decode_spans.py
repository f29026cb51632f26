"""Decode attention with masks behind drafts, against a loop over rows and the keys that each may see, in float64.

The truth knows texts, positions and groups of masks; slots, prefixes and spans are what the op is told of them.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mtpkern.kernels import decode_attention as module
from mtpkern.kernels.decode_attention import decode_attention, decode_attention_triton
from mtpkern.kernels.packed_rows import PackedRows
from support.attended import Attended, Form, WithoutWriters, compare
from support.slow import slow_but

FORMS = [decode_attention, pytest.param(decode_attention_triton, marks=pytest.mark.kernel)]


@dataclass(frozen=True)
class Row:
    """A row of a pass, and the keys that it sees without a window: slots and positions, its own last."""

    seq: int
    slot: int
    prefix: int
    span: int
    keys: tuple[tuple[int, int], ...]


def rows_of(seq: int, first: int, behind: list[int], scratch: int, slot: int = 0) -> list[Row]:
    """A pass of one sequence: a pending token from position `first` on for each number of masks that stand behind it.

    The masks behind others than the last take scratch slots from `slot` on.
    """

    def text(end: int) -> tuple[tuple[int, int], ...]:
        return tuple((scratch + p, p) for p in range(end))

    rows = [Row(seq, *[scratch + first + i + x for x in (0, 1, 1)], text(first + i + 1)) for i in range(len(behind))]
    for i in [len(behind) - 1, *range(len(behind) - 1)]:
        begin = slot if i < len(behind) - 1 else scratch + first + i + 1
        for j in range(behind[i]):
            own = tuple((begin + n, first + i + 1 + n) for n in range(j + 1))
            rows.append(Row(seq, begin + j, scratch + first + i + 1, begin, text(first + i + 1) + own))
        slot += behind[i] if i < len(behind) - 1 else 0
    assert slot <= scratch
    return rows


@dataclass
class Case(Attended):
    rows: list[Row]
    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    start: Tensor
    scratch: int
    window: int | None = None
    max_rows: int | None = None

    @classmethod
    def of(
        cls,
        *sequences: tuple[int, list[int]],
        scratch: int = 9,
        capacity: int = 24,
        heads: int = 4,
        dim: int = 16,
        unused: int = 2,
        slot: int = 0,
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        seed: int = 0,
    ) -> "Case":
        """Sequences as `rows_of` takes them; every slot that none of their rows sees holds NaN, queries in use none."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        each = [
            rows_of(b, first, behind, scratch, slot) if behind else [] for b, (first, behind) in enumerate(sequences)
        ]
        caches = [draw(len(each), heads // 2, scratch + capacity + 1, dim) for _ in range(2)]
        rows = [row for of_one in each for row in of_one]
        query = draw(len(rows) + unused, heads, dim)
        query[len(rows) :] = torch.nan
        start = torch.tensor([0, *map(len, each)]).cumsum(0)
        case = cls(rows, query, *caches, start, scratch, window)
        seen = {(row.seq, slot) for r, row in enumerate(rows) for slot in case.sees(r, window)}
        for b in range(len(each)):
            for cache in caches:
                cache[b, :, [slot for slot in range(cache.shape[2]) if (b, slot) not in seen]] = torch.nan
        return case

    def packed(self) -> PackedRows:
        max_rows = int(self.start.diff().max()) if self.max_rows is None else self.max_rows
        prefix, span = self.of_rows("prefix", 0), self.of_rows("span", self.k_cache.shape[2])
        return PackedRows(self.seq, self.slot, self.start, max_rows, prefix, span, self.scratch)

    def of_rows(self, name: str, unused: int) -> Tensor:
        """A number of each row, and what it is of those that are unused."""
        found = [getattr(row, name) for row in self.rows]
        return torch.tensor(found + [unused] * (len(self.query) - len(found)), dtype=torch.int64)

    @property
    def seq(self) -> Tensor:
        return self.of_rows("seq", len(self.start) - 2)

    @property
    def slot(self) -> Tensor:
        return self.of_rows("slot", self.k_cache.shape[2] - 1)

    def sees(self, r: int, window: int | None) -> list[int]:
        """Of the keys within the window, which counts positions."""
        keys = self.rows[r].keys if r < len(self.rows) else ()
        return [slot for slot, position in keys if window is None or position > keys[-1][1] - window]


# Where the pending tokens begin, and how many masks stand behind each of them: the last, then any.
RAGGED = [(7, [2, 0, 3, 1]), (0, [3]), (11, [3, 3, 3, 2, 3]), (5, []), (2, [0, 1, 0]), (1, [5, 0])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float32), (2, torch.float16), (5, torch.float32)])
def test_ragged_batches(form: Form, batch: int, dtype: torch.dtype, nan_in_new_tensors: None) -> None:
    compare(form, Case.of(*RAGGED[:batch], scratch=11, dtype=dtype, seed=batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", slow_but([1, 2, 3, 6, 500], 2, 6, interpreted=True))
def test_a_window_counts_positions(form: Form, window: int) -> None:
    """Below the length of a group it hides a mask's own prefix, and of its group all but the nearest."""
    compare(form, Case.of(*RAGGED, scratch=11, window=window), window=window)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 4])
def test_softcap_and_sinks(form: Form, window: int | None) -> None:
    case = Case.of(*RAGGED[:3], scratch=11, window=window)
    compare(form, case, window=window, softcap=2.0, sinks=torch.tensor([0.0, 5.0, -5.0, 1.0]))


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize(
    ("splits", "window", "scratch"),
    slow_but(
        [
            *((3, None, 12), ("batch-invariant", None, 70), (3, 100, 12), ("batch-invariant", 100, 12)),
            *((1, 5, 70), (7, 5, 70), (7, 40, 300), ("batch-invariant", 40, 300)),
        ],
        *((3, None, 12), (1, 5, 70), ("batch-invariant", 40, 300)),
        interpreted=True,
    ),
)
def test_splits(form: Form, splits: int | str, window: int | None, scratch: int, nan_in_new_tensors: None) -> None:
    """Scratch slots of less than a tile, of several, and of more than a chunk; texts that a window hides most of."""
    how = {"batch_invariant": True} if splits == "batch-invariant" else {"splits": splits}
    longs = [(286, [3, 0, 5, 1]), (63, [2, 2]), (0, [])]
    case = Case.of(*longs, scratch=scratch, slot=scratch - 8, capacity=300, heads=2, window=window)
    compare(lambda *args, **options: form(*args, **how, **options), case, window=window)


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize("window", slow_but([None, 5], 5, interpreted=True))
def test_nothing_is_read_that_the_launch_writes(
    form: Form, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a token's slot nor a scratch slot: without the programs that write, all others find what they need."""
    case = Case.of(*RAGGED[:2], scratch=70, slot=60, heads=2, unused=0, window=window)
    expected, (key, value) = case.run(form, splits=3), case.new()
    for cache in (case.k_cache, case.v_cache):
        cache[case.seq, :, case.slot] = torch.nan
    monkeypatch.setattr(module, "_attend_kernel", WithoutWriters(module._attend_kernel, len(case.start) - 1))
    assert torch.equal(case.run(form, splits=3, key=key, value=value), expected)
    assert case.k_cache[case.seq, :, case.slot].isnan().all()


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize("window", [None, 5])
def test_where_amd_compiles_the_caches_are_written_before(
    form: Form, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    compare(form, Case.of(*RAGGED[:2], scratch=7, heads=2, window=window), window=window)


@pytest.mark.parametrize("form", FORMS)
def test_only_unused_rows(form: Form) -> None:
    case = Case.of((3, [1, 2]), (4, [0]), unused=3)
    case = replace(case, rows=[], start=torch.tensor([0, 0, 0]), max_rows=5)
    assert not case.run(form).any()


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_where_shows_in_the_rows_that_see_it(form: Form) -> None:
    """A draft's key is seen by itself and what stands behind it, a mask's by those behind it in its group."""
    # Rows: pending 0 1 2, the last's mask 3, behind the first 4 5, behind the second 6 7.
    case = Case.of((5, [2, 2, 1]), scratch=4, unused=0)
    out = case.run(form)
    slot = {row: case.rows[row].slot for row in range(8)}
    sees = {0: {0, 1, 2, 3, 4, 5, 6, 7}, 1: {1, 2, 3, 6, 7}, 2: {2, 3}, 3: {3}, 4: {4, 5}, 5: {5}, 6: {6, 7}, 7: {7}}
    for row, seen_by in sees.items():
        before = case.v_cache[0, :, slot[row]].clone()
        case.v_cache[0, :, slot[row]] += 1
        assert set((case.run(form) != out).flatten(1).any(1).nonzero()[:, 0].tolist()) == seen_by
        case.v_cache[0, :, slot[row]] = before


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
def test_batch_invariant_to_the_bit(form: Form) -> None:
    """Neither other sequences nor the capacity change a bit; nor what masks come along one of the pending tokens'."""
    sequences = [(266, [3, 0, 2]), (63, [2, 2])]
    together = Case.of(*sequences, scratch=9, capacity=280, heads=2)
    out = together.run(form, batch_invariant=True)
    for b, (_, behind) in enumerate(sequences):
        of_b = slice(int(together.start[b]), int(together.start[b + 1]))
        pad = torch.nn.functional.pad
        rows = [replace(row, seq=0) for row in together.rows[of_b]]
        caches = [pad(x[b : b + 1], (0, 0, 0, 200)) for x in (together.k_cache, together.v_cache)]
        alone = Case(rows, together.query[of_b], *caches, torch.tensor([0, len(rows)]), 9, max_rows=len(rows))
        assert torch.equal(alone.run(form, batch_invariant=True), out[of_b])
        n = len(behind)
        bare = replace(alone, rows=rows[:n], query=alone.query[:n], start=torch.tensor([0, n]))
        assert torch.equal(bare.run(form, batch_invariant=True), out[of_b][:n])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 6])
def test_prompts_among_rows_of_nobody(form: Form, window: int | None, nan_in_new_tensors: None) -> None:
    """Tens of tokens of one sequence, the masks behind its last, and none of another's: as passes read prompts."""
    prompts = (3, []), (9, [0] * 36 + [5]), (2, []), (0, [0] * 20)
    case = replace(Case.of(*prompts, scratch=11, capacity=64, heads=2, window=window), max_rows=64)
    compare(form, case, window=window)
