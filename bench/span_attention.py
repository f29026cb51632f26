"""Span attention, forward and backward, against FlexAttention and SDPA with a dense mask, and against its floor.

The layout is the paper's: N tokens, N // 2k spans, N/M tokens apart from a random offset, T = N + spans (k - 1) rows.
FlexAttention runs it in two orders: ours, and the interleaved order of the paper's figure, where the masks of a span
stand behind their prefix and a row sees what is behind it, if that is a token or belongs to its own span. Its BlockMask
is made once, and its making timed apart. SDPA gets an additive mask, made once: its memory-efficient kernel takes no
groups.

Before anything is timed, every alternative's output and gradients are compared with float32 arithmetic. The calls of
each are captured in a graph; backward is forward + backward less forward.

Floor    the longer of FLOPs, 4 Hq D a visible pair forward and 2.5 times that backward, and bytes in bf16, of all
         inputs and outputs once: 4 T D (Hq + Hkv) forward, twice that backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mtpkern.bench.report import Goal, Table, program
from mtpkern.bench.timing import Action, LeftOut, attempted, copies, difference, free, peak, race, timed
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention, span_attention_reference
from mtpkern.kernels.span_mask import Rule, span_mask
from mtpkern.train.layout import Layout, build_layout, draw_prefixes

OURS = "mtpkern"
FLEX, INTERLEAVED, SDPA = "FlexAttention, our order", "FlexAttention, interleaved", "SDPA, dense mask"
HEADER = ("way", "forward", "of floor", "backward", "of floor", "forward + backward", "ours is faster by")
TARGETS = {FLEX: 1.2, INTERLEAVED: 1.8, SDPA: 4.0}
SHARES = {"forward": 50, "backward": 38}

# (b, h, row, key) -> whether the row sees the key.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """B texts of N tokens with N // 2k spans each; heads, key heads, head dimension."""

    batch: int
    tokens: int
    k: int = 16
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def layout(self) -> Layout:
        """The layout of texts without a prompt, on the CPU; every span exists."""
        lengths, k = torch.full((self.batch,), self.tokens), self.k
        start, spans = torch.zeros_like(lengths), self.tokens // (2 * k)
        prefix = draw_prefixes(lengths, start, k, spans, apart=self.tokens // spans, seed=0, step=0)
        return build_layout(prefix, lengths, k, num_tokens=self.tokens)

    def text(self) -> str:
        """As a caption names it."""
        spans = f"N = {self.tokens:,}, k = {self.k}, {self.tokens // (2 * self.k)} spans"
        return f"{spans}, B = {self.batch}, {self.heads}/{self.kv_heads} heads, D = {self.dim}"


# The first is the one that the targets on ratios are about, the second the one of those on the floor.
SHAPES = (Shape(4, 1024), Shape(1, 4096), Shape(32, 160))
TINY = (Shape(2, 24, 4, 4, 2, 16), Shape(1, 40, 3, 2, 1, 8))


def visible_pairs(layout: Layout) -> int:
    """Pairs of a row and a key that it sees, over the whole batch, as span_mask counts them: `mask.sum()`."""
    position, end, own = (x.long() for x in (layout.position, layout.prefix_end, layout.span_start))
    row = torch.arange(position.shape[1], device=position.device)
    lower = (end - position + row - own).clamp(min=0)
    return int(((end - lower).clamp(min=0) + (row + 1 - own).clamp(min=0)).sum())


def work(shape: Shape, layout: Layout) -> dict[str, dict[str, float]]:
    """FLOPs and bytes that forward and backward cannot do without, as `Peak.floor` takes them."""
    flops = 4.0 * shape.heads * shape.dim * visible_pairs(layout)
    moved = 2.0 * layout.position.numel() * shape.dim * 2 * (shape.heads + shape.kv_heads)
    return {"forward": {"flops": flops, "bytes": moved}, "backward": {"flops": 2.5 * flops, "bytes": 2 * moved}}


def interleaved_order(layout: Layout) -> Tensor:
    """Our rows in the order of the paper's figure, [B, T] int64: each span's masks behind their prefix' last token.

    x.gather(1, interleaved_order(layout)) is x [B, T] in that order.
    """
    row = torch.arange(layout.position.shape[1], device=layout.position.device)
    behind = row - layout.span_start + 1  # 0 for a token, 1.. for the masks
    return ((layout.prefix_end.long() - 1) * len(row) + behind).argsort(1)


def our_rule(layout: Layout) -> MaskMod:
    """Visibility in our order, without padding, windows and packed documents."""
    end, own = layout.prefix_end, layout.span_start

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < end[b, row]) | ((key >= own[b, row]) & (key <= row))

    return sees


def interleaved_rule(layout: Layout) -> MaskMod:
    """The same in the interleaved order: causal, and a token or a mask of the row's own span."""
    row = torch.arange(layout.position.shape[1], device=layout.position.device)
    span = torch.where(layout.span_start <= row, layout.span_start, -1).gather(1, interleaved_order(layout))

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & ((span[b, key] < 0) | (span[b, key] == span[b, row]))

    return sees


def block_mask(rule: MaskMod, layout: Layout) -> BlockMask:
    """FlexAttention's picture of a rule."""
    batch, rows = layout.position.shape
    return create_block_mask(rule, batch, None, rows, rows, device=layout.position.device)


def with_flex(rule: MaskMod, layout: Layout) -> Attend:
    """FlexAttention compiled for one shape. Raises NotImplementedError where it has no backward."""
    if layout.position.device.type != "cuda":
        raise NotImplementedError("it has no backward on a CPU")
    mask = block_mask(rule, layout)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def additive_mask(layout: Layout, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T]: 0 where a row sees a key, else -inf."""
    mask = span_mask(*layout.rule).unsqueeze(1)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """Attention as transformers does it with a mask: keys and values repeated for their group."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)


def with_sdpa(layout: Layout, dtype: torch.dtype) -> Attend:
    """scaled_dot_product_attention by its memory-efficient kernel, which is a CUDA device's alone."""
    bias = additive_mask(layout, dtype)
    backend = SDPBackend.EFFICIENT_ATTENTION if bias.is_cuda else SDPBackend.MATH

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, bias)

    return attend


def with_ours(layout: Layout) -> Attend:
    """mtpkern's span attention, heads first as the others have them."""
    return lambda q, k, v: span_attention(q, k, v, layout.rule, Scoring(q.shape[-1] ** -0.5)).transpose(1, 2)


@dataclass(frozen=True)
class Inputs:
    """Leaves query, key, value and the gradient of the output: [B, heads, T, D] views of [B, T, heads, D]."""

    leaves: tuple[Tensor, Tensor, Tensor]
    d_out: Tensor

    @classmethod
    def draw(cls, shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Normal numbers, laid out as a model's projections hand them over."""
        drawn = [
            torch.randn(shape.batch, rows, heads, shape.dim, device=device).to(dtype).transpose(1, 2)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        ]
        q, k, v = (x.requires_grad_() for x in drawn[:3])
        return cls((q, k, v), drawn[3])

    def ordered(self, order: Tensor) -> Inputs:
        """The same rows in another order [B, T]."""

        def moved(x: Tensor) -> Tensor:
            heads_last = x.detach().transpose(1, 2)
            return heads_last.gather(1, order[:, :, None, None].expand_as(heads_last)).transpose(1, 2)

        q, k, v = (moved(x).requires_grad_() for x in self.leaves)
        return Inputs((q, k, v), moved(self.d_out))


@dataclass(frozen=True)
class Way:
    """One way to attend, with copies of its inputs; `order` where its rows stand otherwise than ours."""

    attend: Attend
    inputs: list[Inputs]
    order: Tensor | None = None

    def forward(self, i: int) -> Tensor:
        """The output [B, Hq, T, D] of the i-th copy, with its graph, as in training."""
        return self.attend(*self.inputs[i % len(self.inputs)].leaves)

    def both(self, i: int) -> tuple[Tensor, ...]:
        """Output and the gradients of query, key and value."""
        inputs = self.inputs[i % len(self.inputs)]
        out = self.attend(*inputs.leaves)
        return out, *torch.autograd.grad(out, inputs.leaves, inputs.d_out)

    def sample(self) -> list[Tensor]:
        """`both` of the first sequence and the first group of heads, rows in our order."""
        out, dq, dk, dv = (x.detach() for x in self.both(0))
        groups = dq.shape[1] // dk.shape[1]
        parts = [out[0, :groups], dq[0, :groups], dk[0, :1], dv[0, :1]]
        return parts if self.order is None else [x[:, self.order[0].argsort()] for x in parts]


def truth(layout: Layout, inputs: Inputs) -> list[Tensor]:
    """What `Way.sample` should be, in float32."""
    q, k, v = inputs.leaves
    groups = q.shape[1] // k.shape[1]
    q, k, v = leaves = [x[:1, :n].detach().float().requires_grad_() for x, n in ((q, groups), (k, 1), (v, 1))]
    rule = Rule(*(x[:1] for x in (layout.position, layout.prefix_end, layout.span_start)))
    out = span_attention_reference(q, k, v, rule, Scoring(q.shape[-1] ** -0.5)).transpose(1, 2)
    grads = torch.autograd.grad(out, leaves, inputs.d_out[:1, :groups].float())
    return [x.detach()[0] for x in (out, *grads)]


def disagreement(found: list[Tensor], right: list[Tensor]) -> str:
    """What is wrong with output and gradients, or nothing."""
    return difference(found, right, 3e-2, ("out", "dq", "dk", "dv"))


def ways(
    layout: Layout, inputs: list[Inputs], *, compiled: bool = True, alone: bool = False
) -> tuple[dict[str, Way], list[str]]:
    """All ways that run here and are right, and a line "name: why" for each other one. Ours must be right.

    Without `compiled` those that torch.compile takes long for are left out, and a line says so; `alone`: ours only.
    """
    order = interleaved_order(layout)
    makers: dict[str, Callable[[], Way]] = {
        OURS: lambda: Way(with_ours(layout), inputs),
        FLEX: lambda: Way(with_flex(our_rule(layout), layout), inputs),
        INTERLEAVED: lambda: Way(
            with_flex(interleaved_rule(layout), layout), [x.ordered(order) for x in inputs], order
        ),
        SDPA: lambda: Way(with_sdpa(layout, inputs[0].leaves[0].dtype), inputs),
    }
    right = truth(layout, inputs[0])

    def sound(name: str) -> Way:
        if not compiled and name in (FLEX, INTERLEAVED):
            raise LeftOut("cut before it was compiled")
        way = makers[name]()
        wrong = disagreement(way.sample(), right)
        if wrong:
            raise LeftOut(f"{wrong}, against float32 arithmetic")
        return way

    return attempted({name: partial(sound, name) for name in ([OURS] if alone else makers)}, [OURS])


def measure_shape(
    shape: Shape, device: torch.device, rounds: int, *, compiled: bool = True, at_once: bool = True
) -> Iterator[Table]:
    """One shape's table, with the ways that have to be compiled or without; `at_once`: with ours alone before that."""
    torch.manual_seed(0)
    # A graph of its own for each shape: otherwise the compiled comparators run into the limit on recompilation.
    torch.compiler.reset()
    layout = shape.layout().to(device)
    rows = layout.position.shape[1]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = torch.finfo(dtype).bits // 8 * shape.batch * rows * shape.dim * 2 * (shape.heads + shape.kv_heads)
    inputs = [Inputs.draw(shape, rows, dtype, device) for _ in range(copies(size, device))]
    if at_once:
        yield table_of(shape, layout, inputs, *ways(layout, inputs, alone=True), rounds=1)
    yield table_of(shape, layout, inputs, *ways(layout, inputs, compiled=compiled), rounds=rounds)


def table_of(
    shape: Shape, layout: Layout, inputs: list[Inputs], found: Mapping[str, Way], skipped: list[str], rounds: int
) -> Table:
    """Times of the ways that were found to be right, a row each."""
    device, dtype = inputs[0].d_out.device, inputs[0].d_out.dtype
    passes = {}
    for name, call in (("forward", Way.forward), ("forward + backward", Way.both)):
        actions: dict[str, Action] = {x: partial(call, way) for x, way in found.items()}
        ours = {OURS: actions.pop(OURS)}
        passes[name], lost = race(ours, actions, device, rounds=rounds, calls=len(inputs), tolerance=None)
        skipped = [*skipped, *(f"{line} ({name})" for line in lost)]
    floor = {name: peak(device).floor(**x) for name, x in work(shape, layout).items()}

    note = (
        f"{visible_pairs(layout):,} visible pairs in {layout.position.numel():,} rows, {dtype}. Microseconds, median "
        f"(range); floor {floor['forward']:.1f} forward, {floor['backward']:.1f} backward, of {peak(device).source}."
    )
    if FLEX in found:
        making: dict[str, Action] = {
            FLEX: lambda i: block_mask(our_rule(layout), layout),
            INTERLEAVED: lambda i: block_mask(interleaved_rule(layout), layout),
        }
        spent = timed(making, device, rounds=3, graph=False)
        said = ", ".join(f"{spread.median:.0f} ({name})" for name, spread in spent.items())
        note += f" Making a BlockMask, not counted: {said}."
    table = Table(f"Span attention, {shape.text()}", note, HEADER, skipped=skipped)
    for name in found:
        if any(name not in times for times in passes.values()):
            continue
        forward, both = passes["forward"][name], passes["forward + backward"][name]
        took = {"forward": forward.median, "backward": both.median - forward.median}
        ratio = both.median / passes["forward + backward"][OURS].median
        share = {x: 100 * floor[x] / us for x, us in took.items()}
        of_floor = [f"{x:.0f} %" for x in share.values()]
        row = name, forward.text(1), of_floor[0], f"{took['backward']:.1f}", of_floor[1], both.text(1), f"{ratio:.2f}"
        record = {"way": name, "forward": forward, "backward": took["backward"], "both": both, "floor": floor}
        goals = []
        if shape == SHAPES[0] and name in TARGETS:
            goals = [Goal(f"forward + backward against {name}", TARGETS[name], ratio, "x")]
        elif shape == SHAPES[1] and name == OURS:
            what = f"at N = {shape.tokens:,}, share of the floor"
            goals = [Goal(f"{x} {what}", SHARES[x], share[x], "%") for x in share]
        table = table.plus(row, record, *goals)
    return table


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """A table a shape, the most telling first; all of them without FlexAttention before any with it, quick: none.

    Compiling it takes tens of seconds a shape, and our own figures must not be cut with it.
    """
    cuda = device.type == "cuda"
    shapes = SHAPES if cuda else TINY
    turns = (True,) if not cuda else (False,) if quick else (False, True)
    for compiled in turns:
        for shape in shapes[:2] if quick else shapes:
            # Ours alone says less than the table that is there the second time.
            at_once = compiled == turns[0]
            yield from measure_shape(shape, device, 10 if quick else 30, compiled=compiled, at_once=at_once)
            free(device)


if __name__ == "__main__":
    program("span_attention", "Span attention", measure)
