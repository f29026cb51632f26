"""A recorded pass: the same bits as the operations themselves, whatever the memory held before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.recorder import Memory, NotRecordableError, apart, record

WEIGHT = torch.linspace(-1, 1, 48).view(8, 6)
BIAS = torch.linspace(0, 1, 8)


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def views(x: Tensor) -> Tensor:
    a, b, c = x.view(-1, 3, 2).transpose(0, 1).unbind(0)
    return torch.cat([a, b.flip(-1), c.expand_as(a)], -1)[:, ::2].contiguous()


def written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, :2]
    y.select(1, 0).add_(x.sum(1))
    y.index_add_(0, torch.tensor([1, 0]), x[:2].double().float())
    return y.masked_fill_(y < 0, 7).clamp_(max=9)


def several(x: Tensor) -> Tensor:
    top, at = x.topk(3, dim=-1)
    mean, low = torch.var_mean(x, -1)[1], x.min(dim=0).values
    return torch.cat([top, at.float(), mean[:, None], low.expand(len(x), -1)], 1)


def halves(x: Tensor) -> Tensor:
    return (x.bfloat16() @ WEIGHT.T.bfloat16()).float() + x.to(torch.float64).sum(1, keepdim=True).float()


def compared(x: Tensor) -> Tensor:
    """What torch binds to Python, in the forms that it takes there."""
    near = (x > 0.1) & (x <= 1.0) | (x < x.roll(1, 0)) | ~(x >= -2) | (x == 0) | (x != x.T[0, 0])
    y = torch.where(near, x, torch.minimum(x, x.flip(0))).clamp(min=-1.5).clamp(max=2)
    y = torch.sub(y, x.mean(-1, keepdim=True), alpha=2) + y.sum(0, dtype=torch.float64).float() + y.sum((0, 1))
    y = (
        torch.add(y.cumprod(1), torch.maximum(y, x), alpha=3)
        + y.gather(1, torch.tensor([[0, 1]]).expand(4, 2)).sum(1)[0]
    )
    return F.gelu(y) + F.gelu(y, approximate="tanh") + y.pow(2) + y.bfloat16().float().sin() - y.cos() + x.mean((0, 1))


def made_and_written(x: Tensor) -> Tensor:
    """Of nothing, of which a part is written to, by itself or by a view."""
    y, z, n = torch.zeros(6), torch.ones(4, 6), torch.arange(6)
    z[1].mul_(x[0])
    n.view(2, 3)[0].add_(1)
    return y.add_(x[0]).add_(torch.arange(6)) + z + n


PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": norm,
    "product": lambda x: F.silu(F.linear(x, WEIGHT, BIAS)),
    "product without a bias": lambda x: F.silu(F.linear(x[None], WEIGHT)),
    "product with a vector": lambda x: F.linear(x, WEIGHT[0])[:, None] + x,
    "product of what lies apart": lambda x: F.linear(x.T.contiguous().T, WEIGHT),
    "views": views,
    "written in place": written,
    "several results": several,
    "halves": halves,
    "made of nothing": lambda x: x + torch.arange(6) * torch.ones(()) + torch.full((1,), 2.0),
    "made of nothing and written": made_and_written,
    "compared": compared,
    "chosen": lambda x: torch.where(x > 0, x, x[torch.tensor([0]), :].exp()),
    "nothing left": lambda x: torch.cat([x[:0], x, x.new_zeros(0, 6)]),
    "a view of the input": lambda x: x.T[1:].neg_().T,
}


@pytest.fixture(autouse=True)
def as_in_a_pass() -> Any:
    with torch.inference_mode():
        yield


def free(memory: Memory) -> list[Tensor]:
    return [piece.memory for pieces in memory.free.values() for piece in pieces]


def poisoned(memory: Memory) -> None:
    for piece in free(memory):
        piece.fill_(255)  # NaN in any type of number


@pytest.mark.parametrize("name", PASSES)
def test_the_same_bits(name: str) -> None:
    forward, memory = PASSES[name], Memory()
    first, *others = (torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    recording, logits = record(forward, (), (first.clone(),), memory)
    assert torch.equal(logits, forward(first.clone()))
    for x in (*others, first):
        poisoned(memory)
        found = recording((), x)
        assert torch.equal(found, forward(x.clone())), name
        assert found.stride() == forward(x.clone()).stride()


def test_recordings_share_their_memory() -> None:
    """What nobody reads any more is written over, within a recording and from one to the next."""

    def forward(x: Tensor) -> Tensor:
        for _ in range(20):
            x = norm(x) + 1
        return x

    memory, one, two = Memory(), torch.randn(64, 6), torch.randn(60, 6)
    first, _ = record(forward, (), (one.clone(),), memory)
    taken = sum(piece.nbytes for piece in free(memory))
    assert taken <= 8 * one.nbytes
    second, _ = record(forward, (), (two.clone(),), memory)
    assert sum(piece.nbytes for piece in free(memory)) == taken
    for _ in range(2):
        assert torch.equal(first((), one), forward(one))
        assert torch.equal(second((), two), forward(two))


def test_recordings_that_grow_share_their_memory_too() -> None:
    """All that smaller ones have is no more than what the largest takes."""
    memory = Memory()
    for rows in range(1, 65):
        record(lambda x: norm(x) + 1, (), (torch.ones(rows, 256),), memory)
    all_of_them = sum(piece.nbytes for piece in free(memory))
    alone = Memory()
    record(lambda x: norm(x) + 1, (), (torch.ones(64, 256),), alone)
    assert all_of_them <= 2 * sum(piece.nbytes for piece in free(alone))


def test_a_weight_is_read_where_it_is() -> None:
    weight = WEIGHT.clone()
    x = torch.randn(3, 6)
    recording, before = record(lambda x: F.linear(x, weight), (), (x.clone(),), Memory())
    weight.mul_(2)
    assert torch.equal(recording((), x), F.linear(x, weight))
    assert not torch.equal(recording((), x), before)


@dataclass(frozen=True)
class Part:
    """What an owner is given besides."""

    scale: float
    row: Tensor


class Owner:
    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls = 0

    def scaled(self, x: Tensor, part: Part) -> Tensor:
        self.calls += 1
        return apart(self.twice, x * self.factor * part.scale + part.row)  # type: ignore[no-any-return]

    def twice(self, x: Tensor) -> Tensor:
        return x + x

    def add(self, y: Tensor) -> None:
        y.add_(self.factor)


def test_what_is_called_apart_is_called_anew() -> None:
    """With the tensors of the replay, in lists and dataclasses too, and of owners the replay's."""
    log: list[int] = []

    def note(xs: list[Tensor]) -> None:
        log.append(int(xs[0].sum()))

    def forward(owner: Owner, x: Tensor) -> Tensor:
        y = x * 2
        apart(note, [y])
        y = apart(owner.scaled, y, Part(3.0, y[:1]))
        apart(owner.add, y)
        return y + 1

    one, two = Owner(1.0), Owner(5.0)
    x, z = torch.ones(2, 6), torch.full((2, 6), 4.0)
    recording, logits = record(lambda x: forward(one, x), (None, one), (x.clone(),), Memory())
    assert torch.equal(logits, forward(Owner(1.0), x))
    one.calls = 0
    log.clear()
    assert torch.equal(recording((None, two), z), forward(Owner(5.0), z))
    assert (one.calls, two.calls) == (0, 1)
    assert log[0] == 96
    # Whoever is no owner is called as he was.
    alone, _ = record(lambda x: forward(one, x), (None, two), (x.clone(),), Memory())
    assert torch.equal(alone((None, two), z), forward(Owner(1.0), z))


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "told the host": lambda x: x * x.sum().item(),
    "asked for a branch": lambda x: x if (x > 0).all() else -x,
    "as many as there are": lambda x: x[x > 0],
    "where they are": lambda x: x.flatten()[x.flatten().nonzero()[:, 0]],
    "random": lambda x: x + torch.randn(6),
    "dropout": lambda x: F.dropout(x, 0.5),
    "a view of itself": lambda x: (x + 1).unsqueeze_(0)[0] + x,
    "a write to a weight": lambda x: WEIGHT.clone().copy_(WEIGHT) @ WEIGHT.mul_(1.0).T,
    "what it was given, apart": lambda x: apart(lambda y: y[1:], x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_list_can_stand_for_is_refused(name: str) -> None:
    with pytest.raises(NotRecordableError):
        record(REFUSED[name], (), (torch.ones(8, 6),), Memory())
    # And leaves nothing behind.
    assert apart(lambda: 3) == 3
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))


def test_a_block_that_fails_leaves_no_recorder() -> None:
    def forward(x: Tensor) -> Tensor:
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        record(forward, (), (torch.ones(1),), Memory())
    assert apart(lambda: 3) == 3


def test_steps_are_views_or_calls() -> None:
    """Views are made once: of nine operations a replay calls two."""
    recording, _ = record(
        lambda x: F.linear(x.view(2, 2, 6)[0].T.T, WEIGHT).view(2, 2, 4).exp().flatten(),
        (),
        (torch.ones(4, 6),),
        Memory(),
    )
    assert len(recording.calls) == 2
