"""A whole training step of Qwen3-0.6B's shape with our kernels, against the same step in plain torch.

Random weights; float32 masters under bf16 autocast, a frozen bf16 teacher, hard targets, AdamW with a rate of 0: all
the work, and every step starts from the same weights. Plain torch attends with scaled_dot_product_attention and an
additive mask that all layers share, and makes full logits: of the span rows only, or of all rows, as calling the model
does. The last table has our step with torch_compile beside itself. A step's loss is compared before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from math import isnan

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.models import random_model
from mtpkern.bench.report import Goal, Table, percent, program
from mtpkern.bench.span_attention import Shape, additive_mask, sdpa, visible_pairs
from mtpkern.bench.timing import Action, Spread, free, peak_of, race, share_of_peak
from mtpkern.kernels.scoring import Scoring
from mtpkern.train.compilation import CompiledLayers
from mtpkern.train.layout import Layout
from mtpkern.train.objective import Objective, SpanContext, backbone, gather_rows, head_of, mtp_loss

OURS, SPAN_ROWS, ALL_ROWS = "mtpkern", "SDPA mask, logits of span rows", "SDPA mask, logits of all rows"
COMPILED = "mtpkern, layers compiled"
HEADER = ("way", "tokens/s", "ms a step", "ours is faster by", "of peak", "peak GiB", "ours takes")
GIB = 2**30

MODEL, EOS = "Qwen3-0.6B", 0


@dataclass(frozen=True)
class Batch:
    """B texts of N tokens with N // 2k spans of k; with activation checkpointing or without.

    `compiled` compares our step with itself under torch.compile, and not with plain torch.
    """

    size: int
    tokens: int
    k: int = 16
    checkpointing: bool = False
    compiled: bool = False

    def text(self) -> str:
        """As a caption names it."""
        how = ", activation checkpointing" if self.checkpointing else ""
        how += ", with torch.compile" if self.compiled else ""
        return f"B = {self.size}, N = {self.tokens:,}, k = {self.k}{how}"

    def layout(self) -> Layout:
        """The layout, on the CPU; every span exists."""
        return Shape(self.size, self.tokens, self.k).layout()


BATCHES = (Batch(8, 1024), Batch(32, 160), Batch(32, 1024, checkpointing=True), Batch(8, 1024, compiled=True))
TINY_BATCHES = (Batch(2, 16, 3), Batch(2, 16, 3, checkpointing=True), Batch(2, 16, 3, compiled=True))


@dataclass
class DenseContext(SpanContext):
    """Attention as transformers does it with a mask."""

    dtype: torch.dtype = torch.bfloat16

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """[B, T, Hq, D]. Windows, caps and sinks are not for this model."""
        if scoring != Scoring(scoring.scale):
            raise ValueError(f"expected full attention without cap and sinks; got {scoring}")
        return sdpa(query, key, value, self.bias, scale=scoring.scale).transpose(1, 2)

    @cached_property
    def bias(self) -> Tensor:
        """The additive mask [B, 1, T, T], made at the first layer of a step."""
        return additive_mask(self.layout, self.dtype)


def span_logits(model: PreTrainedModel, ids: Tensor, context: SpanContext, mask: int, all_rows: bool) -> Tensor:
    """Logits [span rows, V] in float32, the mask token's at -inf, by way of those of all rows or not."""
    x, weight = backbone(model, ids, context), head_of(model, mask).weight
    row = context.layout.row
    z = gather_rows(F.linear(x, weight), row) if all_rows else F.linear(gather_rows(x, row), weight)
    z = z.float()
    z[:, mask] = float("-inf")
    return z


class Trainee:
    """Student, teacher and optimizer, and steps of training in one way or another; `dtype` is that of products."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.device = device
        self.dtype = dtype
        self.eos = torch.tensor([EOS], device=device)
        tiny = device.type == "cpu"
        self.student = random_model(MODEL, tiny, torch.float32, device, eos_token_id=EOS).train()
        self.mask: int = self.student.config.vocab_size - 1
        self.teacher: PreTrainedModel = deepcopy(self.student).to(dtype).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.0, fused=device.type == "cuda")

    @contextmanager
    def on(self, batch: Batch) -> Iterator[dict[str, Callable[[int], Tensor]]]:
        """The ways to make a step on a batch, by name."""
        layout = batch.layout().to(self.device)
        tokens = torch.randint(1, self.mask, (batch.size, batch.tokens), device=self.device)
        ours, plain = partial(self.ours, tokens, layout), partial(self.plain, tokens, layout)
        loss: dict[str, Callable[[], Tensor]] = {OURS: ours}
        if batch.compiled:
            # To rehearse, tracing is enough; a CPU's code would need a C++ compiler.
            backend = "inductor" if self.device.type == "cuda" else "eager"
            within = CompiledLayers(self.student, self.teacher, backend=backend)()  # a context, and so a decorator
            loss[COMPILED] = within(ours)
        else:
            loss |= {SPAN_ROWS: partial(plain, all_rows=False), ALL_ROWS: partial(plain, all_rows=True)}
        if batch.checkpointing:
            self.student.gradient_checkpointing_enable()
        try:
            yield {name: partial(self.step, make) for name, make in loss.items()}
        finally:
            if batch.checkpointing:
                self.student.gradient_checkpointing_disable()
            self.optimizer.zero_grad()

    def flops(self, layout: Layout) -> float:
        """Of the products and the attention that a step cannot do without, nothing of it done again.

        Forward and twice that backward in the student (2.5 times in attention), forward in the teacher; the head on
        span rows.
        """
        c = self.student.config
        head = c.vocab_size * c.hidden_size
        layers = sum(p.numel() for p in self.student.parameters()) - head
        attention = 4.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * visible_pairs(layout)
        return (3 + 1) * 2.0 * (layers * layout.position.numel() + head * layout.row.numel()) + (3.5 + 1) * attention

    def step(self, loss: Callable[[], Tensor], i: int = 0) -> Tensor:
        """Forward, backward and optimizer; the loss, the same at every call."""
        self.optimizer.zero_grad()
        value = loss()
        self.optimizer.step()
        return value

    def autocast(self) -> torch.autocast:
        """Products in `dtype`, where that is not the weights' own."""
        narrow = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if narrow else torch.bfloat16, enabled=narrow)

    def ours(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Loss and gradients by mtpkern's ops."""
        context = SpanContext(layout)
        with attention_context(self.student, context):
            with self.autocast():
                objective = Objective(self.eos)
                sums = mtp_loss(self.student, self.teacher, tokens, context, objective, mask_token_id=self.mask)
            loss = sums.span / sums.rows.sum()
            loss.backward()
        return loss.detach()

    def plain(self, tokens: Tensor, layout: Layout, all_rows: bool) -> Tensor:
        """Loss and gradients by plain torch."""
        context = DenseContext(layout, dtype=self.dtype)
        with attention_context(self.student, context):
            with self.autocast():
                loss = self.plain_loss(tokens, context, all_rows)
            loss.backward()
        return loss.detach()

    def plain_loss(self, tokens: Tensor, context: SpanContext, all_rows: bool) -> Tensor:
        """What `mtp_loss` computes with hard targets, with full logits: the mean over the span rows that count."""
        layout, mask = context.layout, self.mask
        z = span_logits(self.student, layout.fill(tokens, mask), context, mask, all_rows)
        token = z.detach().argmax(-1).view(layout.row.shape)
        ended = torch.isin(token, self.eos).int()
        keep = (layout.valid & (ended.cumsum(-1) == ended)).flatten()
        with torch.no_grad(), attention_context(self.teacher, context):
            label = span_logits(self.teacher, layout.fill(tokens, token[..., :-1]), context, mask, all_rows).argmax(-1)
        return torch.where(keep, F.cross_entropy(z, label, reduction="none"), 0).sum() / keep.sum()


def measure_batch(trainee: Trainee, batch: Batch, rounds: int) -> Iterator[Table]:
    """Tokens a second and peak memory of a step on one batch: ours alone at once, then every way."""
    device, flops = trainee.device, trainee.flops(batch.layout())
    with trainee.on(batch) as steps:
        theirs: dict[str, Action] = {name: step for name, step in steps.items() if name != OURS}
        ours: dict[str, Action] = {OURS: steps[OURS]}
        for beside, n in (({}, 1), (theirs, rounds)):
            times, skipped = race(ours, beside, device, rounds=n, graph=False)
            memory = {name: peak_of(steps[name], device) for name in times}
            share = {name: share_of_peak(device, x.median, flops=flops) for name, x in times.items()}
            yield table_of(batch, times, share, memory, skipped)


def table_of(
    batch: Batch,
    times: Mapping[str, Spread],
    share: Mapping[str, float | None],
    memory: Mapping[str, float],
    skipped: Sequence[str],
) -> Table:
    """A row a way."""
    number = batch.size * batch.tokens
    note = (
        "Tokens of the text, without masks; median (range). Of peak: what a step cannot do without at the device's "
        "rate of bf16 products, over its time. Peak memory is all that is allocated: float32 weights, gradients and "
        "moments, the bf16 teacher, activations, logits."
    )
    table = Table(f"Training step, {batch.text()}", note, HEADER, skipped=skipped)
    for name, spread in times.items():
        faster, less = spread.median / times[OURS].median, memory[OURS] / memory[name]
        ms = Spread(spread.median / 1e3, spread.low / 1e3, spread.high / 1e3)
        row = name, f"{1e6 * number / spread.median:,.0f}", ms.text(1), f"{faster:.2f}", percent(share[name])
        goals = []
        if name in (SPAN_ROWS, ALL_ROWS) and not isnan(memory[name]):
            goals = [Goal(f"tokens/s against {name}, {batch.text()}", 1.5, faster, "x")]
            goals += [Goal(f"memory against {name}, {batch.text()}", 0.6, less, "x", at_most=True)]
        record = {"way": name, "tokens": number, "time": spread, "share": share[name], "memory": memory[name]}
        table = table.plus((*row, f"{memory[name] / GIB:.2f}", f"{less:.2f}"), record, *goals)
    return table


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """A table a batch, ours first and then with all others."""
    cuda = device.type == "cuda"
    # In so small a model as a CPU's one argmax that rounding turns would change the loss by more than races allow.
    trainee = Trainee(device, torch.bfloat16 if cuda else torch.float32)
    batches = BATCHES if cuda else TINY_BATCHES
    # The first in plain torch, and compiled.
    for batch in (batches[0], batches[-1]) if quick else batches:
        yield from measure_batch(trainee, batch, rounds=5 if quick else 15)
        free(device)


if __name__ == "__main__":
    program("train_step", "Training step", measure)
