"""Sample against a float64 distribution and a uniform written with Python's whole numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtpkern.kernels.readout import readout
from mtpkern.kernels.sample import sample, sample_triton, uniform

FORMS = [sample, sample.reference, pytest.param(sample_triton, marks=pytest.mark.kernel)]
Form = Callable[..., tuple[Tensor, Tensor]]
NEVER, ALWAYS = torch.inf, -1.0


def draw(rows: int, vocabulary: int, dtype: torch.dtype, *, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype)


def places(rows: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(1 << 62, (1,), generator=generator)
    return key, torch.randint(5, (rows,), generator=generator), torch.randint(1 << 20, (rows,), generator=generator)


def mixed(x: int) -> int:
    """The finaliser of SplitMix64, in whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def uniform_in_whole_numbers(key: int, stream: int, position: int) -> float:
    spread = 0x9E3779B97F4A7C15
    x = mixed((mixed((key + (stream + 1) * spread) % 2**64) + (position + 1) * spread) % 2**64)
    return (x // 2**12 + 0.5) / 2**52


def compare(form: Form, logits: Tensor, mask_token_id: int, slack: float = 3e-6) -> None:
    """Every token's own piece of (0, 1) must hold the row's uniform, but for rounding."""
    R = len(logits)
    key, stream, position = places(R)
    token, confidence = form(logits, key, stream, position, torch.full((R,), NEVER), mask_token_id)
    z = logits.double().index_fill(1, torch.tensor([mask_token_id]), -torch.inf)
    p = z.softmax(-1)
    torch.testing.assert_close(confidence.double(), p.amax(-1), rtol=1e-5, atol=0)
    ends = p.cumsum(-1)
    for r in range(R):
        u = uniform_in_whole_numbers(int(key), int(stream[r]), int(position[r]))
        v = int(token[r])
        assert p[r, v] > 0
        assert ends[r, v] - p[r, v] - slack <= u <= ends[r, v] + slack


def test_the_uniform_is_that_of_the_whole_numbers() -> None:
    key, stream, position = places(200)
    for sign in (1, -1):
        u = uniform(sign * key, stream, position).tolist()
        want = [uniform_in_whole_numbers(int(sign * key), s, p) for s, p in zip(stream.tolist(), position.tolist())]
        assert u == want
    u = uniform(key, torch.zeros(4096, dtype=torch.int64), torch.arange(4096))
    counts = torch.histc(u.float(), 64, 0, 1)
    assert ((counts - 64) ** 2 / 64).sum() < 104  # chi-square of 63 degrees, alpha 0.001


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "rows", "vocabulary"),
    [
        *((dtype, 40, 31) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        *((dtype, *size) for dtype in (torch.bfloat16, torch.float32) for size in ((40, 2), (33, 1009), (6, 12295))),
    ],
    ids=str,
)
def test_a_token_is_where_its_uniform_falls(form: Form, dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    compare(form, draw(rows, vocabulary, dtype, seed=rows), vocabulary // 2)


@pytest.mark.parametrize("form", FORMS)
def test_banned_chunks_and_tokens_are_never_drawn(form: Form) -> None:
    logits = draw(12, 3 * 4096 + 7, torch.float32, scale=1.0)
    logits[:4, : 2 * 4096] = -torch.inf
    logits[4:8, 4096:] = -torch.inf
    logits[8:, 5:] = -torch.inf
    compare(form, logits, 3)


@pytest.mark.parametrize("form", FORMS[:2])
def test_share_of_each_token(form: Form) -> None:
    """Chi-square over 4,000 positions, alpha 0.001, which a share that is a fifth too large does not pass."""
    z = torch.tensor([0.0, 1.0, -1.0, 0.5, 9.0, 2.0])
    R = 4000
    args = torch.tensor([7]), torch.zeros(R, dtype=torch.int64), torch.arange(R), torch.full((R,), NEVER)
    token, _ = form(z.expand(R, 6), *args, 4)
    counts = token.bincount(minlength=6).double()[[0, 1, 2, 3, 5]]
    p = z[[0, 1, 2, 3, 5]].double().softmax(0)
    assert ((counts - R * p) ** 2 / (R * p)).sum() < 18.47
    planted = p * torch.tensor([1, 1, 1, 1.2, 1]).double()
    planted /= planted.sum()
    assert ((counts - R * planted) ** 2 / (R * planted)).sum() > 18.47


@pytest.mark.parametrize("form", FORMS)
def test_greedy_where_it_is_sure(form: Form) -> None:
    logits = draw(64, 53, torch.float32)
    key, stream, position = places(64)
    token, confidence = readout.reference(logits, 9)
    for above in (ALWAYS, 0.5, NEVER):
        drawn, sure = form(logits, key, stream, position, torch.tensor([above]).expand(64), 9)
        torch.testing.assert_close(sure, confidence, rtol=1e-5, atol=0)
        greedy = confidence > above
        assert drawn[greedy].equal(token[greedy])
        assert above == ALWAYS or not drawn.equal(token)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", [0, 17, 66])
def test_faulty_rows_are_flagged_and_leave_the_others_alone(form: Form, column: int) -> None:
    logits = draw(7, 67, torch.float32)
    places_ = (*places(7), torch.full((7,), NEVER))
    token, _ = form(logits, *places_, 30)
    broken = logits.clone()
    broken[1, column], broken[3, column], broken[4], broken[5] = torch.nan, torch.inf, -torch.inf, -torch.inf
    broken[5, 30] = 1.0  # the mask token alone is finite
    found, confidence = form(broken, *places_, 30)
    faulty = torch.tensor([False, True, False, True, True, True, False])
    assert found[faulty].tolist() == [-1] * 4
    assert confidence[faulty].isnan().all()
    assert found[~faulty].equal(token[~faulty])


@pytest.mark.parametrize("form", FORMS)
def test_a_row_draws_the_same_in_any_company(form: Form) -> None:
    logits = draw(9, 301, torch.float32)
    key, stream, position = places(9)
    above = torch.full((9,), NEVER)
    token, _ = form(logits, key, stream, position, above, 300)
    for rows in ([4], [8, 0, 3], [2, 2]):
        part = form(logits[rows], key, stream[rows], position[rows], above[rows], 300)[0]
        assert part.equal(token[rows])
    strided = torch.stack([logits, logits], 2).flatten(1)[:, ::2]
    assert form(strided, key, stream, position, above, 300)[0].equal(token)
    assert math.isclose(uniform(key, stream, position).mean().item(), 0.5, abs_tol=0.35)
