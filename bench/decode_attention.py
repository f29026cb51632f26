"""Decode attention: packed rows of a batch against their KV caches, against its floor and what else there is.

One layer's attention in captured graphs, keys and values read from memory; alone, and behind a matrix product as in a
pass, where its launch may start early (kernels/form.py).
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mtpkern.bench.report import Goal, Table, cells, program
from mtpkern.bench.timing import Action, Spread, copies, drawn, free, peak, race, timed
from mtpkern.kernels.decode_attention import decode_attention, decode_attention_triton
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring

OURS, BEHIND, UNSPLIT, INVARIANT = "ours", "behind a product", "one split", "batch-invariant"
SDPA, FLASH, FLEX = "SDPA, mask", "flash-attn", "FlexAttention"


@dataclass(frozen=True)
class Shape:
    """B sequences of L cached tokens, each with its last W as rows, and the heads of a layer."""

    B: int
    L: int
    W: int
    Hq: int = 32
    Hkv: int = 8
    D: int = 128

    @property
    def bytes(self) -> int:
        """Keys and values that are seen, in bf16."""
        return 4 * self.B * self.L * self.Hkv * self.D

    @property
    def flops(self) -> int:
        """Both products, every row taken to see all keys."""
        return 4 * self.B * self.W * self.L * self.Hq * self.D


class Case:
    """Random rows and caches of a shape, and the ways to attend. Slots 0 to L - 1 of the caches are filled."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        B, L, W, Hq, Hkv, D = shape.B, shape.L, shape.W, shape.Hq, shape.Hkv, shape.D
        self.n = copies(shape.bytes, device)
        self.k, self.v = (drawn(self.n, B, Hkv, L + 1, D, device=device) for _ in range(2))
        # As a model hands them over: [1, Hq, R, D], transposed.
        self.q = [x.transpose(0, 1) for x in drawn(self.n, Hq, B * W, D, device=device)]
        o_r = torch.arange(B * W, device=device)
        self.seq, self.slot = o_r // W, L - W + o_r % W
        self.start = torch.arange(B + 1, device=device) * W
        # This pass's keys and values, likewise, are those that stand there already.
        self.key, self.value = (
            [x[:, :, L - W : L].transpose(0, 1).flatten(1, 2).clone().transpose(0, 1) for x in caches]
            for caches in (self.k, self.v)
        )

    def attend(self, form: Callable[..., Tensor], **options: Any) -> Action:
        """The op in one of its forms: [R, Hq, D]. What it writes stands there already."""
        plan = PackedRows(self.seq, self.slot, self.start, self.shape.W), Scoring(self.shape.D**-0.5)
        each = list(zip(self.q, self.key, self.value, self.k, self.v))
        return lambda i: form(*each[i % self.n], *plan, **options)

    def padded(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """The i-th copy as a padded batch: query [B, Hq, W, D], key and value [B, Hkv, L, D]."""
        B, L, W, Hq, D = self.shape.B, self.shape.L, self.shape.W, self.shape.Hq, self.shape.D
        q = self.q[i % self.n].view(B, W, Hq, D).transpose(1, 2)
        return q, self.k[i % self.n][:, :, :L], self.v[i % self.n][:, :, :L]

    def packed(self, out: Tensor) -> Tensor:
        """From [B, Hq, W, D] to [R, Hq, D]."""
        return out.transpose(1, 2).reshape(-1, self.shape.Hq, self.shape.D)

    @cached_property
    def visible(self) -> Tensor:
        """[B, 1, W, L], True where a row sees a key."""
        slot = self.slot.view(self.shape.B, 1, self.shape.W, 1)
        return torch.arange(self.shape.L, device=slot.device) <= slot

    def sdpa(self, i: int) -> Tensor:
        """scaled_dot_product_attention with the mask as a tensor, by whichever backend it takes."""
        q, k, v = self.padded(i)
        return self.packed(F.scaled_dot_product_attention(q, k, v, self.visible, enable_gqa=True))

    # The two below are made where they are first called, so that what their making raises is met there.

    @cached_property
    def flash(self) -> Action:
        """flash_attn_with_kvcache."""
        attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
        lengths = torch.full((self.shape.B,), self.shape.L, dtype=torch.int32, device=self.seq.device)

        def call(i: int) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in self.padded(i))
            return attend(q, k, v, cache_seqlens=lengths, causal=True).flatten(0, 1)

        return call

    @cached_property
    def flex(self) -> Action:
        """FlexAttention, compiled on a GPU; its block mask is made beforehand."""
        device, slot = self.seq.device, self.slot.view(self.shape.B, self.shape.W)

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return kv <= slot[b, q]

        mask = create_block_mask(visible, self.shape.B, None, self.shape.W, self.shape.L, device=str(device))
        attend: Callable[..., Any] = flex_attention
        if device.type == "cuda":
            attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return lambda i: self.packed(attend(*self.padded(i), block_mask=mask, enable_gqa=True))


def times(shape: Shape, device: torch.device, *, flex: bool) -> tuple[dict[str, Spread], list[str]]:
    """Microseconds of each way at a shape, and what was left out."""
    case = Case(shape, device)
    ours = {OURS: case.attend(decode_attention), INVARIANT: case.attend(decode_attention, batch_invariant=True)}
    theirs: dict[str, Action] = {SDPA: case.sdpa, FLASH: lambda i: case.flash(i)}
    if device.type == "cuda":
        ours[UNSPLIT] = case.attend(decode_attention_triton, splits=1)
    if flex:
        theirs[FLEX] = lambda i: case.flex(i)
    found, skipped = race(ours, theirs, device, calls=case.n)
    return found | {BEHIND: _behind_product(case, device)}, skipped


def _behind_product(case: Case, device: torch.device) -> Spread:
    """What ours adds behind a product of the rows with a weight that is read from memory, as in a pass."""
    shape, attend = case.shape, case.attend(decode_attention)
    hidden, width = 64 if device.type == "cpu" else 2560, shape.Hq * shape.D
    weights = drawn(copies(2 * hidden * width, device), hidden, width, device=device)
    (x,) = drawn(1, shape.B * shape.W, hidden, device=device)

    def product(i: int) -> Tensor:
        return x @ weights[i % len(weights)]

    actions: dict[str, Action] = {"product": product, "both": lambda i: (product(i), attend(i))}
    found = timed(actions, device, calls=max(case.n, len(weights)))
    alone, both = found["product"].median, found["both"]
    return Spread(both.median - alone, both.low - alone, both.high - alone)


def grid(device: torch.device, quick: bool) -> list[Shape]:
    """Batch, context and rows that are measured at 32 query heads, 8 KV heads, head width 128."""
    if device.type == "cpu":
        return [Shape(B, L, W, Hq=4, Hkv=2, D=16) for B, L, W in ((1, 40, 1), (1, 40, 15), (2, 24, 3))]
    if quick:
        points = [(1, 2048), (1, 4096), (4, 16384), (32, 4096)]
        return [Shape(B, L, W) for B, L in points for W in (1, 15)]
    points = [(1, 1024), (1, 4096), (1, 16384), (1, 65536), (1, 131072), (4, 4096), (4, 16384), (4, 65536)]
    points += [(16, 2048), (16, 4096), (16, 16384), (64, 2048), (64, 16384), (256, 2048)]
    return [Shape(B, L, W) for B, L in points for W in (1, 8, 15, 31)]


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """The grid, a row at a time; then, unless quick, other widths of heads."""
    yield from _tables("Decode attention", grid(device, quick), device, quick)
    if device.type == "cuda" and not quick:
        others = [(16, 8, 128), (32, 8, 64), (64, 8, 128), (32, 32, 128), (16, 8, 256), (32, 8, 80), (32, 8, 96)]
        shapes = [Shape(16, 4096, 15, *heads) for heads in others]
        yield from _tables("Decode attention, other heads", shapes, device, quick)


def _with_flex(s: Shape, device: torch.device, quick: bool) -> bool:
    # It compiles anew for every shape, for seconds.
    if device.type == "cpu":
        return (s.B, s.L, s.W) == (2, 24, 3)
    at = {(1, 4096, 15), (4, 16384, 15), (16, 4096, 15)}
    return not quick and (s.Hq, s.Hkv, s.D) == (32, 8, 128) and (s.B, s.L, s.W) in at


def _tables(caption: str, shapes: Sequence[Shape], device: torch.device, quick: bool) -> Iterator[Table]:
    """The table so far, after each shape."""
    ways = [OURS, BEHIND, UNSPLIT, INVARIANT, SDPA, FLASH, FLEX]
    note = (
        "One layer, bf16, µs in a graph, median (least–greatest). Floor: keys and values read once, or both products, "
        f"whichever takes longer; {peak(device).source}. heads: query heads, KV heads, head width. {BEHIND}: what ours "
        "adds there, which may start early."
    )
    table = Table(caption, note, ("batch", "context", "rows each", "heads", *ways, "floor", "share of bandwidth"))
    skipped: list[str] = []
    spent: dict[Shape, dict[str, Spread]] = {}
    for s in shapes:
        spent[s], left_out = times(s, device, flex=_with_flex(s, device, quick))
        free(device)
        skipped += left_out
        floor = peak(device).floor(bytes=s.bytes, flops=s.flops)
        share = s.bytes / peak(device).bandwidth * 1e6 / spent[s][OURS].median
        heads = f"{s.Hq}/{s.Hkv}/{s.D}"
        row = (str(s.B), str(s.L), str(s.W), heads, *cells(spent[s], ways), f"{floor:.1f}", f"{share:.0%}")
        table = table.plus(row, {**vars(s), "us": spent[s], "floor_us": floor, "share_of_bandwidth": share})
        lines = [f"{line} ({n} of {len(table.rows)} shapes)" for line, n in Counter(skipped).items()]
        yield replace(table, goals=_goals(spent, device), skipped=lines)


def _goals(spent: Mapping[Shape, Mapping[str, Spread]], device: torch.device) -> list[Goal]:
    """What the issue asks of the shapes of Qwen3-4B and Llama-3.1-8B; the worst shape speaks."""
    at = {s: t for s, t in spent.items() if (s.Hq, s.Hkv, s.D) == (32, 8, 128)}
    bandwidth = peak(device).bandwidth

    def share(s: Shape) -> float:
        return s.bytes / bandwidth * 1e6 / at[s][OURS].median * 100

    wide = [share(s) for s in at if s.B * s.L >= 1 << 16 and s.W <= 15]
    short = [at[s][OURS].median for s in at if s.B == 1 and s.L <= 4096 and s.W <= 15]
    split = [t[UNSPLIT].median / t[OURS].median for s, t in at.items() if s.L >= 16384 and s.B <= 4 and UNSPLIT in t]
    one = {(s.B, s.L): t[OURS].median for s, t in at.items() if s.W == 1}
    cost = [t[OURS].median / one[s.B, s.L] for s, t in at.items() if s.W == 15 and (s.B, s.L) in one]
    worst = (
        (", B·L ≥ 64k, k ≤ 8: least share of bandwidth", 85, min, wide, "%"),
        (", B = 1, L ≤ 4k: slowest", 8, max, short, "µs"),
        (" over one split, L ≥ 16k, B ≤ 4: least", 5, min, split, "×"),
        (", 15 rows over 1 row: greatest", 1.15, max, cost, "×"),
    )
    return [
        Goal(f"decode attention{what}", target, of(found), unit, at_most=of is max)
        for what, target, of, found, unit in worst
        if found
    ]


if __name__ == "__main__":
    program("decode_attention", "Decode attention", measure)
