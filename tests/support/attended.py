"""Packed rows over caches, and the truth of decode attention: a loop over rows, heads and keys in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring

SCORING = ("scale", "window", "softcap", "sinks")


# What a slot may hold that no row sees.
STALE = 1e4


Form = Callable[..., Tensor]


class Attended:
    """Packed rows over caches in which what no row may look at would show.

    The caches hold the keys and values of these rows too: what a run is given as new, and what it leaves there.
    """

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    window: int | None = None
    seq: Any  # tensors, of a field or made
    slot: Any

    def packed(self) -> PackedRows:
        """What the op is told of the rows."""
        raise NotImplementedError

    def sees(self, r: int, window: int | None) -> Sequence[int]:
        """The slots that row r sees, none where it is unused."""
        raise NotImplementedError

    def new(self) -> tuple[Tensor, Tensor]:
        """Key and value of each row, of unused ones what the trash holds."""
        return self.k_cache[self.seq, :, self.slot], self.v_cache[self.seq, :, self.slot]

    def run(self, form: Form, **options: object) -> Tensor:
        """Attend over caches in which the slots of these rows hold NaN at first; check what is left there.

        `key` and `value` replace those that the caches tell of.
        """
        options = {"scale": self.query.shape[-1] ** -0.5, "window": self.window, **options}
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
        out = form(self.query, *new, *caches, self.packed(), scoring, **options)
        for cache, right in zip(caches, expected):
            torch.testing.assert_close(cache[:, :, :-1], right, rtol=0, atol=0, equal_nan=True)
        return out


@dataclass
class Case(Attended):
    """Rows that see all slots up to their own, within a window: see make_case."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    seq: Tensor
    slot: Tensor
    start: Tensor
    max_rows: int

    def packed(self) -> PackedRows:
        return PackedRows(self.seq, self.slot, self.start, self.max_rows)

    def sees(self, r: int, window: int | None) -> Sequence[int]:
        slot, capacity = int(self.slot[r]), self.k_cache.shape[2] - 1
        return range(max(0, slot - (window or capacity) + 1), slot + 1) if slot < capacity else ()


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


class WithoutWriters:
    """The kernel of attention, launched without the programs that write the caches: those behind the last sequence."""

    def __init__(self, kernel: Any, batch: int) -> None:
        self.kernel = kernel
        self.batch = batch

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., object]:
        assert grid[2] > self.batch
        return self.kernel[(*grid[:2], self.batch)]


def attend(
    case: Attended,
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
    out = torch.zeros(R, Hq, D, dtype=dtype)
    for r in range(R):
        b, slots = int(case.seq[r]), list(case.sees(r, window))
        for h in range(Hq if slots else 0):
            keys, values = (x[b, h // groups, slots].to(dtype) for x in (case.k_cache, case.v_cache))
            score = (keys @ case.query[r, h].to(dtype)) * (D**-0.5 if scale is None else scale)
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sinks is not None:
                score = torch.cat([score, sinks[h : h + 1].to(dtype)])
            out[r, h] = score.softmax(0)[: len(slots)] @ values
    return out


def compare(form: Form, case: Attended, **options: object) -> None:
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
