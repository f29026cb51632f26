"""The launches of decode attention: splits, tiles and who writes the caches; the same values in all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern.kernels import decode_attention as module
from mtpkern.kernels.decode_attention import decode_attention_triton
from support.attended import RAGGED, Case, Form, WithoutWriters, compare, make_case
from support.slow import slow_but

# Long enough that the kernel's tiles of 64 keys and chunks of 256 end inside, at the end of and behind a sequence.
LONG = [[286, 287, 288, 289, 290], [63, 64, 65], [], [0], [255, 256, 257]]


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize(
    ("splits", "window", "heads"),
    slow_but(
        [
            *((1, 100, 2), (2, None, 2), (2, 100, 4), (3, 5, 2), (7, None, 2), (7, 100, 2)),
            *(("batch-invariant", None, 2), ("batch-invariant", 5, 4)),
        ],
        *((1, 100, 2), (7, None, 2), ("batch-invariant", 5, 4)),
        interpreted=True,
    ),
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
@pytest.mark.parametrize("length", slow_but([40, 140, 290], 140, interpreted=True))
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
@pytest.mark.parametrize("splits", [1, 4, "batch-invariant"])
def test_no_split_is_left_out_for_a_key_that_is_no_number(form: Form, splits: int | str) -> None:
    """Its rows tell, whereupon `advance` ends their sequence; those of other heads and sequences go on."""
    how = {"batch_invariant": True} if splits == "batch-invariant" else {"splits": splits}
    case = make_case([[288, 289], [63]], capacity=299, dim=16, unused=0)
    case.k_cache[0, 0, 100, 3] = torch.nan
    out = case.run(form, **how)
    assert out[:2, :2].isnan().all()
    assert out[:2, 2:].isfinite().all()
    assert out[2].isfinite().all()


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
def test_what_lies_beside_values_costs_the_cache_no_whole_vectors(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an odd distance, as behind one product with the A of rank 8 of three siblings: 24 columns more."""
    case = make_case([[7, 8, 9], [3, 4]], dim=16)
    value = case.new()[1]
    beside = torch.full((len(value), value[0].numel() + 24), torch.nan)
    beside[:, :-24] = value.flatten(1)
    kernel, distances = module._attend_kernel, []

    class Noted:
        def __getitem__(self, grid: object) -> Callable[..., object]:
            def launch(*args: Any, **options: object) -> object:
                distances.extend(of[0] for of in (args[14], args[15]))
                return kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(module, "_attend_kernel", Noted())
    compare(form, case, value=beside[:, :-24].unflatten(1, value.shape[1:]))
    # Triton knows of a number whether it is a multiple of 16, and nothing else.
    assert [distance % 16 for distance in distances] == [0, 0]


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize(
    ("splits", "window"),
    slow_but([(1, None), (3, 5), ("batch-invariant", None)], (1, None), (3, 5), interpreted=True),
)
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
@pytest.mark.parametrize("splits", [1, 3, "batch-invariant"])
def test_a_tile_of_rows_that_stand_nowhere_is_cleared(form: Form, splits: int, nan_in_new_tensors: None) -> None:
    """Of a prompt that fills its room the masks behind the end: here all of the second tile, four of the first."""
    how = {"batch_invariant": True} if splits == "batch-invariant" else {"splits": splits}
    case = make_case([[3, 4], list(range(28, 40))], heads=4, groups=4, dim=16, capacity=40, unused=8)
    case.start[-1] += 8
    case.max_rows = 20
    compare(lambda *args, **options: form(*args, **how, **options), case)


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
