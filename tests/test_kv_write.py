"""KV write against a loop over rows: every slot that a row names is written, no other is touched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtpkern.kernels.kv_write import kv_write, kv_write_triton

FORMS = [kv_write, pytest.param(kv_write_triton, marks=pytest.mark.kernel)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
B, HKV, C, D = 3, 2, 9, 8

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


def poison(dtype: torch.dtype = torch.float32) -> Tensor:
    """A cache in which every element is another, so that a write to a wrong place or a lost one shows."""
    return -1 - torch.arange(B * HKV * (C + 1) * D).view(B, HKV, C + 1, D).to(dtype)


def draw(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, HKV, D, generator=torch.Generator().manual_seed(rows)).to(dtype)


def compare(form: Form, key: Tensor, value: Tensor, seq: list[int], slot: list[int]) -> None:
    k_cache, v_cache = poison(key.dtype), poison(key.dtype) - 1
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for r, (b, c) in enumerate(zip(seq, slot)):
        for h in range(HKV):
            expected_k[b, h, c] = key[r, h]
            expected_v[b, h, c] = value[r, h]
    key_before, value_before = key.clone(), value.clone()
    row_seq = torch.tensor(seq, dtype=torch.int64)
    row_slot = torch.tensor(slot, dtype=torch.int64)
    form(k_cache, v_cache, key, value, row_seq, row_slot)
    # Several rows may meet in the trash slot, in any order: what it holds is nobody's business.
    assert torch.equal(k_cache[:, :, :C], expected_k[:, :, :C])
    assert torch.equal(v_cache[:, :, :C], expected_v[:, :, :C])
    trash_written = [b in {s for s, c in zip(seq, slot) if c == C} for b in range(B)]
    for b in range(B):
        if not trash_written[b]:
            assert torch.equal(k_cache[b, :, C], expected_k[b, :, C])
            assert torch.equal(v_cache[b, :, C], expected_v[b, :, C])
    assert torch.equal(key, key_before)
    assert torch.equal(value, value_before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_rows(form: Form, dtype: torch.dtype) -> None:
    seq, slot = [0, 0, 0, 1, 2, 2, 2, 2], [4, 5, 6, 0, 5, 6, 7, 8]
    compare(form, draw(8, dtype), draw(8, dtype) + 1, seq, slot)


@pytest.mark.parametrize("form", FORMS)
def test_unused_rows_meet_in_the_trash_slot(form: Form) -> None:
    compare(form, draw(7), draw(7) + 1, [0, 0, 1, 2, 2, 2, 2], [2, 3, 8, C, C, C, C])


@pytest.mark.parametrize("form", FORMS)
def test_nan_goes_nowhere_else(form: Form) -> None:
    k_cache, v_cache = poison(), poison()
    key = torch.full((2, HKV, D), torch.nan)
    form(k_cache, v_cache, key, key, torch.tensor([1, 1]), torch.tensor([3, C]))
    for cache in (k_cache, v_cache):
        assert cache[1, :, 3].isnan().all()
        assert cache[1, :, C].isnan().all()
        assert cache.isnan().sum() == 2 * HKV * D


@pytest.mark.parametrize("form", FORMS)
def test_strided_rows(form: Form) -> None:
    # As in a model: [1, Hkv, R, D] transposed, and keys and values that are halves of one projection.
    heads_first = draw(5).transpose(0, 1).contiguous().transpose(0, 1)
    halves = torch.cat([draw(5), draw(5) + 1], dim=-1)
    seq, slot = [0, 1, 1, 2, 2], [8, 0, 1, 3, 4]
    assert not heads_first.is_contiguous()
    compare(form, heads_first, heads_first + 1, seq, slot)
    compare(form, halves[..., :D], halves[..., D:], seq, slot)


@pytest.mark.parametrize("form", FORMS)
def test_key_and_value_of_different_width(form: Form) -> None:
    k_cache, v_cache = torch.zeros(1, HKV, C + 1, 6), torch.zeros(1, HKV, C + 1, 4)
    form(k_cache, v_cache, torch.ones(1, HKV, 6), torch.ones(1, HKV, 4), torch.tensor([0]), torch.tensor([2]))
    assert k_cache.sum() == HKV * 6
    assert v_cache.sum() == HKV * 4


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form: Form) -> None:
    compare(form, draw(0), draw(0), [], [])


@pytest.mark.parametrize("form", FORMS)
def test_offsets_pass_32_bits(form: Form) -> None:
    # Sequences 2^30 elements apart, slots 2^25, rows 2^30: only what is touched takes memory.
    cache = torch.empty(3 * 2**30 + C * 2**25 + D, dtype=torch.int8).as_strided((4, 1, C + 1, D), (2**30, 1, 2**25, 1))
    new = torch.empty(3 * 2**30 + D, dtype=torch.int8).as_strided((4, 1, D), (2**30, 1, 1))
    seq, slot = torch.tensor([0, 1, 3, 3]), torch.tensor([0, 5, 2, C - 1])
    cache[seq, :, slot] = 0
    new.copy_(torch.arange(1, 5)[:, None, None].expand(4, 1, D))
    form(cache, cache, new, new, seq, slot)
    assert torch.equal(cache[seq, :, slot], new)


@pytest.mark.parametrize("form", FORMS)
def test_expanded_and_strided_indices(form: Form) -> None:
    """As a prefill of one sequence makes them: [1, T] expanded and flattened is a view with a stride of 0."""
    key = draw(4)
    seq = torch.ones(1, dtype=torch.int64)[:, None].expand(1, 4).flatten()
    slot = torch.arange(8)[::2]
    k_cache, v_cache = poison(), poison()
    expected_k, expected_v = poison(), poison()
    expected_k[1, :, slot], expected_v[1, :, slot] = key.transpose(0, 1), key.transpose(0, 1)
    form(k_cache, v_cache, key, key, seq, slot)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)
