"""Readout against a softmax in float64, one row at a time, without any of its code."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mtpkern.kernels.readout import readout, readout_triton

FORMS = [readout, readout.reference, pytest.param(readout_triton, marks=pytest.mark.kernel)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

Form = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def truth(logits: Tensor, mask_token_id: int) -> tuple[list[int], list[float]]:
    """Token and confidence of each row, in float64; -1 and NaN where the row holds no distribution."""
    tokens, confidences = [], []
    for row in logits.double().numpy():
        others = np.delete(row, mask_token_id)
        if np.isnan(others).any() or np.isposinf(others).any() or not np.isfinite(others).any():
            tokens.append(-1)
            confidences.append(math.nan)
            continue
        index = int(np.flatnonzero(others == others.max())[0])
        tokens.append(index + (index >= mask_token_id))
        confidences.append(float(1 / np.exp(others - others.max()).sum()))
    return tokens, confidences


def draw(rows: int, vocabulary: int, dtype: torch.dtype, *, scale: float = 4.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype)


def compare(form: Form, logits: Tensor, mask_token_id: int, tolerance: float = 2e-6) -> None:
    token, confidence = form(logits, mask_token_id)
    expected_token, expected_confidence = truth(logits, mask_token_id)
    assert token.dtype == torch.int64
    assert confidence.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert token.tolist() == expected_token
    expected = torch.tensor(expected_confidence, dtype=torch.float64)
    torch.testing.assert_close(confidence.double(), expected, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (7, 31), (33, 1009)])
@pytest.mark.parametrize("where", ["first", "inside", "last"])
def test_equals_float64_softmax(form: Form, dtype: torch.dtype, rows: int, vocabulary: int, where: str) -> None:
    mask_token_id = {"first": 0, "inside": vocabulary // 2, "last": vocabulary - 1}[where]
    logits = draw(rows, vocabulary, dtype, seed=rows)
    compare(form, logits, mask_token_id, tolerance=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vocabulary_of_qwen3(form: Form, dtype: torch.dtype) -> None:
    compare(form, draw(3, 151_936, dtype), 151_669, tolerance=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_worse_than_twice_the_same_dtype_softmax(form: Form, dtype: torch.dtype) -> None:
    logits = draw(64, 2053, dtype)
    _, expected = truth(logits, 5)
    eager = logits.index_fill(1, torch.tensor([5]), -torch.inf).softmax(-1).amax(-1).double()
    confidence = form(logits, 5)[1].double()
    error, eager_error = ((x - torch.tensor(expected).double()).abs().max().item() for x in (confidence, eager))
    # On a GPU exponential and quotient are approximate, to two units of the last place each.
    assert error <= 2 * eager_error + 5e-7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowest_index_wins_a_tie(form: Form, dtype: torch.dtype) -> None:
    logits = torch.full((5, 3001), -3.0, dtype=dtype)
    for row, columns in enumerate([(2, 3), (0, 3000), (1023, 1024, 1025), (2999, 3000), tuple(range(3001))]):
        logits[row, list(columns)] = 2.0
    token, _ = form(logits, 1)
    assert token.tolist() == [2, 0, 1023, 2999, 0]
    # The mask token does not win a tie that it would win by its index.
    assert form(logits, 0)[0].tolist() == [2, 3000, 1023, 2999, 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_token_id", [0, 40, 96])
@pytest.mark.parametrize("value", [50.0, torch.inf, torch.nan, -torch.inf])
def test_mask_token_neither_wins_nor_counts(form: Form, mask_token_id: int, value: float) -> None:
    logits = draw(4, 97, torch.float32)
    expected = form(logits, mask_token_id)
    logits[:, mask_token_id] = value
    token, confidence = form(logits, mask_token_id)
    assert torch.equal(token, expected[0])
    assert torch.equal(confidence, expected[1])
    compare(form, logits, mask_token_id)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 17, 66])
def test_faulty_rows_are_flagged_and_leave_the_others_alone(form: Form, dtype: torch.dtype, column: int) -> None:
    logits = draw(7, 67, dtype)
    token, confidence = form(logits, 30)
    broken = logits.clone()
    broken[1, column] = torch.nan
    broken[3, column] = torch.inf
    broken[4] = -torch.inf
    broken[5] = -torch.inf
    broken[5, 30] = 1.0  # the mask token alone is finite
    broken_token, broken_confidence = form(broken, 30)
    faulty = torch.tensor([False, True, False, True, True, True, False])
    assert broken_token[faulty].tolist() == [-1] * 4
    assert broken_confidence[faulty].isnan().all()
    assert torch.equal(broken_token[~faulty], token[~faulty])
    assert torch.equal(broken_confidence[~faulty], confidence[~faulty])


@pytest.mark.parametrize("form", FORMS)
def test_some_infinities_are_no_fault(form: Form) -> None:
    logits = torch.full((2, 11), -torch.inf)
    logits[0, 7] = -1e30
    logits[1, [3, 9]] = 5.0
    token, confidence = form(logits, 1)
    assert token.tolist() == [7, 3]
    assert confidence.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("form", FORMS)
def test_only_the_mask_token(form: Form) -> None:
    token, confidence = form(torch.zeros(2, 1), 0)
    assert token.tolist() == [-1, -1]
    assert confidence.isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(form: Form, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 19, dtype=dtype)
    logits[0, 4], logits[1, 5] = 6e4, -6e4
    compare(form, logits, 18)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form: Form) -> None:
    token, confidence = form(torch.empty(0, 13), 2)
    assert token.shape == confidence.shape == (0,)
    assert token.dtype == torch.int64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_is_left_as_it_was(form: Form, dtype: torch.dtype) -> None:
    logits = draw(5, 23, dtype)
    before = logits.clone()
    form(logits, 3)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("form", FORMS)
def test_strided_logits(form: Form) -> None:
    logits = draw(6, 40, torch.float32)
    for view in (logits[::2], logits[:, ::2], logits[:, 3:20], logits.t().contiguous().t()):
        compare(form, view, 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_several_chunks(form: Form, dtype: torch.dtype) -> None:
    """The kernel merges chunks of 4,096: ties between them, chunks without a finite logit, faults in one."""
    logits = draw(8, 3 * 4096 + 7, dtype)
    logits[0, [4095, 4096, 9000]] = 60.0
    logits[1, [8192, 12294]] = 60.0
    logits[2, 4096:] = -torch.inf
    logits[3, :8192] = -torch.inf
    logits[4, :12288] = -torch.inf
    logits[4, 12289:] = -torch.inf
    logits[5, 12290] = torch.nan
    logits[6, 5000] = torch.inf
    logits[7] = -torch.inf
    logits[7, 4100] = 3.0  # the mask token
    compare(form, logits, 4100, tolerance=1e-12 if dtype == torch.float64 else 1e-5)
    assert form(logits, 4100)[0].tolist()[4:] == [12288, -1, -1, -1]
