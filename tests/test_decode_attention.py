"""Decode attention against a loop over rows, heads and keys in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern.kernels import decode_attention as module
from mtpkern.kernels.decode_attention import decode_attention, decode_attention_triton
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring

KERNEL = pytest.param(decode_attention_triton, marks=pytest.mark.kernel)
FORMS = [decode_attention, KERNEL]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

SCORING = ("scale", "window", "softcap", "sinks")

# What a slot may hold that no row sees.
STALE = 1e4

Form = Callable[..., Tensor]


def forms_with(dtypes: list[torch.dtype]) -> list[Any]:
    """Pairs of form and dtype. The kernel has no float64."""
    torch_forms = [pytest.param(decode_attention, dtype) for dtype in dtypes]
    kernels = [
        pytest.param(decode_attention_triton, dtype, marks=pytest.mark.kernel)
        for dtype in dtypes
        if dtype != torch.float64
    ]
    return [*torch_forms, *kernels]


@dataclass
class Case:
    """Packed rows over caches in which what no row may look at would show: see make_case.

    The caches hold the keys and values of these rows too: what a run is given as new, and what it leaves there.
    """

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    seq: Tensor
    slot: Tensor
    start: Tensor
    max_rows: int

    def new(self) -> tuple[Tensor, Tensor]:
        """Key and value of each row, of unused ones what the trash holds."""
        return self.k_cache[self.seq, :, self.slot], self.v_cache[self.seq, :, self.slot]

    def run(self, form: Form, **options: object) -> Tensor:
        """Attend over caches in which the slots of these rows hold NaN at first; check what is left there.

        `key` and `value` replace those that the caches tell of.
        """
        options.setdefault("scale", self.query.shape[-1] ** -0.5)
        scoring = Scoring(**{name: options.pop(name) for name in SCORING if name in options})  # type: ignore[arg-type]
        new = [options.pop(name, x) for name, x in zip(("key", "value"), self.new())]
        caches = [self.k_cache, self.v_cache]
        if form is decode_attention:  # torch, to which 0 times NaN is NaN
            caches = [cache.clone() for cache in caches]
            for cache in caches:
                cache[:, :, :-1] = cache[:, :, :-1].nan_to_num(STALE)
        expected = [cache[:, :, :-1].clone() for cache in caches]
        for cache in caches:
            cache[self.seq, :, self.slot] = torch.nan
        rows = PackedRows(self.seq, self.slot, self.start, self.max_rows)
        out = form(self.query, *new, *caches, rows, scoring, **options)
        for cache, right in zip(caches, expected):
            torch.testing.assert_close(cache[:, :, :-1], right, rtol=0, atol=0, equal_nan=True)
        return out


def make_case(
    row_slots: list[list[int]],
    *,
    unused: int = 2,
    capacity: int = 21,
    heads: int = 4,
    groups: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    seed: int = 0,
) -> Case:
    """One list of slots per sequence, in order; every slot that no row of its sequence sees holds NaN.

    The torch forms get large numbers instead (see Case.run), as finite as what decoding leaves there, but in the trash.
    """
    generator = torch.Generator().manual_seed(seed)
    seq = [b for b, slots in enumerate(row_slots) for _ in slots]
    slot = [c for slots in row_slots for c in slots]
    start = [sum(len(slots) for slots in row_slots[:b]) for b in range(len(row_slots) + 1)]
    shape = (len(row_slots), heads // groups, capacity + 1, dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    for b, slots in enumerate(row_slots):
        seen = {j for c in slots for j in range(max(0, c - (window or capacity) + 1), c + 1)}
        unseen = [j for j in range(capacity + 1) if j not in seen]
        k_cache[b, :, unseen] = torch.nan
        v_cache[b, :, unseen] = torch.nan
    query = torch.randn(len(seq) + unused, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    query[len(seq) :] = torch.nan  # an unused row may hold anything
    return Case(
        query,
        k_cache,
        v_cache,
        torch.tensor(seq + [len(row_slots) - 1] * unused, dtype=torch.int64),
        torch.tensor(slot + [capacity] * unused, dtype=torch.int64),
        torch.tensor(start, dtype=torch.int64),
        max((len(slots) for slots in row_slots), default=0),
    )


def attend(
    case: Case,
    dtype: torch.dtype,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Every row by itself over exactly the keys that it sees, in `dtype`: the truth in float64, "eager" elsewhere."""
    R, Hq, D = case.query.shape
    groups = Hq // case.k_cache.shape[1]
    capacity = case.k_cache.shape[2] - 1
    out = torch.zeros(R, Hq, D, dtype=dtype)
    for r in range(R):
        b, c = int(case.seq[r]), int(case.slot[r])
        if c == capacity:
            continue
        lower = 0 if window is None else max(0, c - window + 1)
        for h in range(Hq):
            keys = case.k_cache[b, h // groups, lower : c + 1].to(dtype)
            values = case.v_cache[b, h // groups, lower : c + 1].to(dtype)
            score = (keys @ case.query[r, h].to(dtype)) * (D**-0.5 if scale is None else scale)
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sinks is not None:
                score = torch.cat([score, sinks[h : h + 1].to(dtype)])
            out[r, h] = score.softmax(0)[: len(keys)] @ values
    return out


def compare(form: Form, case: Case, **options: object) -> None:
    poisoned = [x.clone() for x in (case.query, case.k_cache, case.v_cache)]
    out = case.run(form, **options)
    assert out.dtype == case.query.dtype
    assert out.shape == case.query.shape
    rule = {name: option for name, option in options.items() if name not in ("key", "value")}
    truth = attend(case, torch.float64, **rule)
    eager = attend(case, case.query.dtype, **rule)
    error, eager_error = ((x.double() - truth).abs().max().item() if x.numel() else 0.0 for x in (out, eager))
    # Three products of TF32 and approximate exponentials, on a GPU; a single product would be off by 1e-3.
    tiny = {torch.float64: 1e-13, torch.float32: 5e-6}.get(case.query.dtype, 1e-4)
    assert error <= 2 * eager_error + tiny
    assert not out[case.slot == case.k_cache.shape[2] - 1].any()
    for x, before in zip((case.query, case.k_cache, case.v_cache), poisoned):
        assert torch.equal(x.nan_to_num(), before.nan_to_num())


RAGGED = [[7, 8, 9, 10], [0], [14, 15, 16, 17, 18, 19, 20], [], [3, 4]]


@pytest.mark.parametrize(("form", "dtype"), forms_with(DTYPES))
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_ragged_batches(form: Form, dtype: torch.dtype, batch: int) -> None:
    compare(form, make_case(RAGGED[:batch], dtype=dtype, seed=batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("groups", "dtype"),
    [*((n, torch.float32) for n in (1, 2, 4, 8)), (4, torch.float16), (8, torch.bfloat16)],
)
def test_grouped_heads(form: Form, dtype: torch.dtype, groups: int) -> None:
    compare(form, make_case(RAGGED[:3], heads=8, groups=groups, dim=16, dtype=dtype))


@pytest.mark.parametrize(("form", "dtype"), forms_with([torch.float16, torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 128, 256])
def test_head_dimensions(form: Form, dtype: torch.dtype, dim: int) -> None:
    compare(form, make_case(RAGGED[:3], heads=2, groups=2, dim=dim, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, 2, 3, 6, 21, 500])
def test_window_also_below_the_number_of_rows(form: Form, window: int) -> None:
    # The third sequence has seven rows: with a window below that, its later rows do not see its first.
    compare(form, make_case(RAGGED, window=window), window=window)


ONE_BY_ONE = [
    (0.5, None, None, None),
    (None, None, 0.7, None),
    (None, None, None, 0.0),
    (None, None, None, 30.0),
    (None, None, None, -30.0),
]


@pytest.mark.parametrize(
    ("form", "dtype", "scale", "window", "softcap", "sink"),
    [
        pytest.param(*pair.values, *options, marks=pair.marks)
        for pair in forms_with(DTYPES)
        for options in [(0.5, 4, 2.0, 1.0), *(ONE_BY_ONE if torch.float32 in pair.values else [])]
    ],
)
def test_scale_softcap_and_sinks(
    form: Form,
    dtype: torch.dtype,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sink: float | None,
) -> None:
    case = make_case(RAGGED, heads=4, groups=2, dtype=dtype, window=window)
    sinks = None if sink is None else sink + torch.arange(4).to(dtype)
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    if scale is not None:
        options["scale"] = scale
    compare(form, case, **options)


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form: Form) -> None:
    # Scores 0 and ln 3 at the second row: weights 1/4 and 3/4. The first row sees its own slot only.
    case = make_case([[0, 1]], heads=1, groups=1, dim=1, capacity=2, unused=1)
    case.query[:2] = 1.0
    case.k_cache[0, 0, :2, 0] = torch.tensor([0.0, math.log(3)])
    case.v_cache[0, 0, :2, 0] = torch.tensor([8.0, 4.0])
    assert case.run(form).flatten().tolist() == pytest.approx([8.0, 5.0, 0.0], rel=1e-5)
    # A sink of ln 4 halves the second row's weights and leaves a fifth of the first row's.
    sinks = torch.tensor([math.log(4)])
    assert case.run(form, sinks=sinks).flatten().tolist() == pytest.approx([8 / 5, 2.5, 0.0], rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_sequence_do_not_depend_on_the_others(form: Form) -> None:
    # Rows of a sequence stand anywhere in the pack; the same row alone gives the same output.
    case = make_case(RAGGED)
    out = case.run(form)
    for b, slots in enumerate(RAGGED):
        rows = slice(int(case.start[b]), int(case.start[b + 1]))
        alone = Case(
            case.query[rows],
            case.k_cache[b : b + 1],
            case.v_cache[b : b + 1],
            torch.zeros(len(slots), dtype=torch.int64),
            case.slot[rows],
            torch.tensor([0, len(slots)]),
            max(1, len(slots)),
        )
        torch.testing.assert_close(alone.run(form), out[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_more_room_than_rows_changes_nothing(form: Form) -> None:
    case = make_case(RAGGED)
    out = case.run(form)
    case.max_rows = 31
    torch.testing.assert_close(case.run(form), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_do_not_overflow(form: Form) -> None:
    case = make_case(RAGGED[:3])
    case.query *= 1e4
    compare(form, case)


@pytest.mark.parametrize("form", FORMS)
def test_strided_query_and_cache(form: Form) -> None:
    case = make_case(RAGGED)
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    case.k_cache = case.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    assert not case.query.is_contiguous()
    assert not case.k_cache.is_contiguous()
    compare(form, case)


@pytest.mark.parametrize("form", FORMS)
def test_strided_keys_and_values(form: Form) -> None:
    """As in a model, heads first; halves of one projection; and in no order that any model has."""
    case = make_case(RAGGED)
    heads_first, values = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.new())
    compare(form, case, key=heads_first, value=values)
    key, value = torch.cat(case.new(), dim=-1).chunk(2, dim=-1)
    assert not key.is_contiguous()
    compare(form, case, key=key, value=value)
    compare(form, case, key=key.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_only_unused_rows(form: Form) -> None:
    case = make_case([[], []], unused=3)
    case.max_rows = 5
    assert not case.run(form).any()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_sees_its_own_slot_and_none_behind_it(form: Form) -> None:
    case = make_case([[5, 6, 7]], unused=0)
    out = case.run(form)
    for changed in (case.k_cache, case.v_cache):
        before = changed[0, :, 6].clone()
        changed[0, :, 6] += 1
        differs = (case.run(form) != out).flatten(1).any(1).tolist()
        changed[0, :, 6] = before
        assert differs == [False, True, True]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1, 20])
def test_values_have_a_width_of_their_own(form: Form, width: int) -> None:
    case = make_case(RAGGED)
    out = case.run(form)
    case.v_cache = case.v_cache[..., :width]
    torch.testing.assert_close(case.run(form), out[..., :width], rtol=1e-5, atol=1e-6)


class WithoutWriters:
    """The kernel of attention, launched without the programs that write the caches: those behind the last sequence."""

    def __init__(self, kernel: Any, batch: int) -> None:
        self.kernel = kernel
        self.batch = batch

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., object]:
        assert grid[2] > self.batch
        return self.kernel[(*grid[:2], self.batch)]


# Long enough that the kernel's tiles of 64 keys and chunks of 256 end inside, at the end of and behind a sequence.
LONG = [[286, 287, 288, 289, 290], [63, 64, 65], [], [0], [255, 256, 257]]


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize(
    ("splits", "window", "heads"),
    [
        *((1, 100, 2), (2, None, 2), (2, 100, 4), (3, 5, 2), (7, None, 2), (7, 100, 2)),
        *(("batch-invariant", None, 2), ("batch-invariant", 5, 4)),
    ],
)
def test_splits(form: Form, splits: int | str, window: int | None, heads: int, nan_in_new_tensors: None) -> None:
    case = make_case(LONG, capacity=299, heads=heads, dim=16, window=window)
    how = {"batch_invariant": True} if splits == "batch-invariant" else {"splits": splits}
    sinks = torch.tensor([0.0, 5.0, -5.0, 1.0][:heads])
    compare(lambda *args, **options: form(*args, **how, **options), case, window=window, sinks=sinks)


@pytest.mark.parametrize("k", [1, 4, 8, 12, 16])
@pytest.mark.parametrize("dim", [64, 128])
def test_two_programs_fit_a_processor(k: int, dim: int) -> None:
    """Of an H100 or H200, in bf16 at 4 query heads a KV head: the split rule counts on two."""
    pytest.importorskip("triton")
    BLOCK_M, BLOCK_N, _, num_stages = module._tile((2 * k - 1) * 4, dim, 2, 227 << 10)
    taken = 2 * dim * (BLOCK_M + 2 * num_stages * BLOCK_N)
    assert BLOCK_M <= 64
    assert 2 * (taken + 1024) <= 228 << 10


@pytest.mark.parametrize("k", [1, 8, 12])
@pytest.mark.parametrize(
    ("B", "C"), [(1, 100), (1, 1024), (1, 2048), (1, 1 << 17), (16, 2048), (64, 512), (512, 1 << 15)]
)
def test_splits_fill_the_processors_and_are_not_too_short(k: int, B: int, C: int) -> None:
    pytest.importorskip("triton")
    BLOCK_M, BLOCK_N, _, _ = module._tile((2 * k - 1) * 4, 128, 2, 227 << 10)
    least = module._least(BLOCK_M, BLOCK_N)
    programs = B * 8 * -(-(2 * k - 1) * 4 // BLOCK_M)
    splits = module._splits(programs, C, least, 132)
    assert least >= 2 * BLOCK_M
    assert least % BLOCK_N == 0
    assert 1 <= splits <= 64
    assert splits == 1 or C / splits >= least
    # Either two programs a processor, or no more splits are long enough, or there is one beyond need.
    assert splits * programs >= 2 * 132 or C / (splits + 1) < least or splits == 64
    assert splits == 1 or (splits - 1) * programs < 2 * 132


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize("length", [40, 140, 290])
def test_a_short_text_takes_few_splits(form: Form, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a captured graph provides: those without keys write nothing but that."""
    case = make_case([list(range(length - 2, length))], heads=16, groups=16, capacity=299, unused=1, dim=16)
    taken = []

    class Merge:
        def __getitem__(self, grid: object) -> Callable[..., object]:
            def launch(part: Tensor, lse: Tensor, *args: object, **options: object) -> object:
                taken.append(int(lse[:, 0, 0].isfinite().sum()))
                return merge[grid](part, lse, *args, **options)

            return launch

    merge = module._merge_kernel
    monkeypatch.setattr(module, "_merge_kernel", Merge())
    compare(lambda *args, **options: form(*args, splits=9, **options), case)
    # 2 rows of 16 heads in a tile of 32: 64 keys a split.
    assert taken == [-(-length // 64)]


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize(("splits", "window"), [(1, None), (3, 5), ("batch-invariant", None)])
def test_nothing_is_read_that_the_launch_writes(
    form: Form, splits: int | str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs run in any order, the interpreter's in one: without those that write, all others find what they need."""
    case = make_case([[254, 255, 256, 257], [31, 32]], capacity=259, heads=2, dim=16, unused=0, window=window)
    how = {"batch_invariant": True} if splits == "batch-invariant" else {"splits": splits}
    out = case.run(form, window=window, **how)
    new = case.new()
    for cache in (case.k_cache, case.v_cache):
        cache[case.seq, :, case.slot] = torch.nan
    monkeypatch.setattr(module, "_attend_kernel", WithoutWriters(module._attend_kernel, len(case.start) - 1))
    assert torch.equal(case.run(form, window=window, key=new[0], value=new[1], **how), out)
    assert case.k_cache[case.seq, :, case.slot].isnan().all()


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Those of attention's kernel, as it is launched."""
    kernel, noted = module._attend_kernel, []

    class Noted:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., object]:
            noted.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_attend_kernel", Noted())
    return noted


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize("splits", [1, 3])
def test_where_amd_compiles_the_caches_are_written_before(
    form: Form, splits: int, grids: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    compare(lambda *args, **options: form(*args, splits=splits, **options), make_case(RAGGED))
    # Behind the last sequence nothing is left to do but to clear what no sequence owns, where there is no merge.
    assert grids == [(splits, 2, len(RAGGED) + (splits == 1))]


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize(("splits", "writers"), [(1, 5), (3, 2)])
def test_no_program_writes_many_rows(
    form: Form, splits: int, writers: int, grids: list[tuple[int, int, int]], nan_in_new_tensors: None
) -> None:
    """Each writes 16, here of 75: all those of a large batch would take one program as long as its attention."""
    case = make_case([list(range(5, 38)), [3, 4]], capacity=40, heads=1, groups=1, dim=16, unused=40)
    compare(lambda *args, **options: form(*args, splits=splits, **options), case)
    assert grids == [(splits, 1, 2 + writers)]


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize("splits", [1, 3])
def test_more_rows_than_a_tile_holds(form: Form, splits: int, nan_in_new_tensors: None) -> None:
    # 15 rows of 9 heads each: three tiles of 64, the last partly full; the short sequence leaves two of them empty.
    case = make_case([list(range(40, 55)), [3, 4]], capacity=80, heads=9, groups=9, dim=16, unused=6)
    compare(lambda *args, **options: form(*args, splits=splits, **options), case)


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
def test_more_heads_of_a_row_than_a_tile_holds(form: Form, nan_in_new_tensors: None) -> None:
    # 20 heads over one, in tiles of 16: unused rows are cleared in all of them.
    case = make_case([[3, 4]], heads=20, groups=20, dim=128, capacity=9)
    compare(lambda *args, **options: form(*args, splits=1, **options), case)


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
def test_batch_invariant_to_the_bit(form: Form) -> None:
    # Neither other sequences nor the capacity, nor which rows of its own sequence come along, change a row's bits.
    together = make_case(LONG, capacity=299, dim=16)
    out = together.run(form, batch_invariant=True)
    for b, slots in enumerate(LONG):
        if not slots:
            continue
        last = slice(int(together.start[b + 1]) - 1, int(together.start[b + 1]))
        pad = torch.nn.functional.pad
        alone = Case(
            together.query[last],
            pad(together.k_cache[b : b + 1], (0, 0, 0, 300)),
            pad(together.v_cache[b : b + 1], (0, 0, 0, 300)),
            torch.zeros(1, dtype=torch.int64),
            together.slot[last],
            torch.tensor([0, 1]),
            together.max_rows,
        )
        assert torch.equal(alone.run(form, batch_invariant=True), out[last])


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
def test_offsets_pass_32_bits(form: Form) -> None:
    # Sequences 2^30 elements apart, slots 2^25, rows 2^29: only what is touched takes memory.
    B, C, D, near, far = 4, 20, 16, 1 << 25, 1 << 30
    small = make_case([[17, 18], [5], [9], [19]], heads=2, groups=2, dim=D, capacity=C, dtype=torch.float16)
    expected, (key, _) = small.run(form), small.new()
    storage = torch.empty((B - 1) * far + C * near + D, dtype=torch.float16)
    wide = storage.as_strided(small.k_cache.shape, (far, 1, near, 1))
    wide.copy_(small.k_cache)
    small.k_cache = wide
    rows = torch.empty((len(key) - 1) * (far // 2) + D, dtype=torch.float16)
    wide_key = rows.as_strided(key.shape, (far // 2, D, 1))
    wide_key.copy_(key)
    assert torch.equal(small.run(form, key=wide_key), expected)
