"""The fused head and loss, and the teacher's readout: peak memory above the inputs, and time, against what there is.

The alternatives make all logits [R, V] at once, in bf16 or, as transformers does, in float32 behind the product;
Liger's fused linear cross-entropy, where it is installed, makes them in chunks. Peak memory is that of forward and
backward with the gradients still alive, above hidden states and head.

A head that is trained has float32 weights, and its products are autocast's, as in training: the cast is part of the
time. Under "until_fail" most rows of a span have no weight; a GPU is not asked which they are, so that we multiply them
as well. Plain torch may ask and leave them out, which is a way of its own in those tables.

Floor    FLOPs 2 R V H for the product, as much again for the gradient of the hidden states and of a trained head; R are
         the rows that have weight
Bound    V H bytes of a trained head's gradient + 4 R H + the room of logits on the device, from 384 MiB on, + 128 MiB;
         from row to row, in chunks of one size, 8 H + 64 bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import isnan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.bench.report import Goal, Table, program
from mtpkern.bench.timing import Action, LeftOut, Spread, attempted, free, peak, peak_of, race
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.kernels.head import Head, room
from mtpkern.train.objective import until_fail

OURS = "mtpkern"
FLOAT32, BF16, LIGER = "all logits, float32", "all logits, bf16", "Liger"
COUNTED = "logits of the rows that count, float32"
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """R rows of H against V tokens; the teacher's softmax instead of hard targets; a head that is trained or frozen.

    until_fail: only rows up to a span's first miss have weight
    """

    rows: int
    vocabulary: int
    width: int
    soft: bool
    trained: bool
    until_fail: bool = False

    def text(self) -> str:
        """As a table's first column names it."""
        support = ", until the first miss" if self.until_fail else ""
        return f"{'soft' if self.soft else 'hard'}, {'trained' if self.trained else 'frozen'} head{support}"

    @property
    def flops(self) -> float:
        """Of the products that the gradients need; a soft teacher's product is one more."""
        products = 2 + self.trained + self.soft
        return 2.0 * products * self.rows * self.vocabulary * self.width

    def bound(self, size: int, device: torch.device) -> float:
        """Bytes above the inputs that the project allows itself, `size` bytes an element."""
        d_weight = self.trained * self.vocabulary * self.width * size
        return d_weight + 4 * self.rows * self.width + room(device) + 128 * MIB


# The paper's batch of 32 texts with 5 spans of 16, and Qwen3's vocabulary, at the widths of 0.6B and 8B.
SPAN, ACCEPTED = 16, 0.62
ROWS, VOCABULARY, WIDTHS = 2560, 151_936, (1024, 4096)
TINY_ROWS, TINY_VOCABULARY, TINY_WIDTHS = 32, 50, (16,)


@dataclass(frozen=True)
class Inputs:
    """Leaves hidden [R, H] and weight [V, H], hard targets [R], and the teacher's pair, which wants no gradient.

    row_weight [R]: 0 or 1; None where all rows count
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    teacher: tuple[Tensor, Tensor] | None
    row_weight: Tensor | None = None

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Logits of standard deviation 1, about; the teacher in autocast's dtype where that is on."""
        narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype

        def normal(rows: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(rows, case.width, device=device, dtype=dtype).mul_(scale)

        weight = normal(case.vocabulary, case.width**-0.5).requires_grad_(case.trained)
        teacher, row_weight = None, None
        if case.soft:
            teacher = normal(case.rows, 1.0, narrow), normal(case.vocabulary, case.width**-0.5, narrow)
        if case.until_fail:
            agree = torch.rand(case.rows // SPAN, SPAN, device=device) < ACCEPTED
            row_weight = until_fail(agree).flatten().float()
        target = torch.randint(case.vocabulary, (case.rows,), device=device)
        return cls(normal(case.rows, 1.0).requires_grad_(), weight, target, teacher, row_weight)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are wanted for."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


# The summed loss of all rows.
Loss = Callable[[Inputs], Tensor]


def ours(x: Inputs, chunk: int | None = None) -> Tensor:
    """distill_loss, the head narrowed as a step of training does it."""
    head = Head(x.weight).narrowed(x.hidden)
    if x.teacher is None:
        return distill_loss(x.hidden, head, target=x.target, row_weight=x.row_weight, chunk=chunk)
    teacher = x.teacher[0], Head(x.teacher[1])
    return distill_loss(x.hidden, head, teacher=teacher, row_weight=x.row_weight, chunk=chunk)


def all_logits(x: Inputs, dtype: torch.dtype) -> Tensor:
    """One product, then cross-entropy or divergence on its result in a dtype."""
    z = (x.hidden @ x.weight.t()).to(dtype)
    reduction = "sum" if x.row_weight is None else "none"
    if x.teacher is None:
        loss = F.cross_entropy(z, x.target, reduction=reduction)
    else:
        with torch.no_grad():
            log_q = (x.teacher[0] @ x.teacher[1].t()).to(dtype).log_softmax(-1)
        loss = F.kl_div(z.log_softmax(-1), log_q, reduction=reduction, log_target=True)
    if x.row_weight is None:
        return loss
    return ((loss if x.teacher is None else loss.sum(-1)) * x.row_weight).sum()


def counted_logits(x: Inputs) -> Tensor:
    """The same in float32 for the rows that have weight, which the device is asked for."""
    assert x.row_weight is not None
    some = x.row_weight.nonzero().squeeze(1)
    teacher = None if x.teacher is None else (x.teacher[0][some], x.teacher[1])
    return all_logits(Inputs(x.hidden[some], x.weight, x.target[some], teacher), torch.float32)


def comparators(case: Case, device: torch.device) -> tuple[dict[str, Loss], list[str]]:
    """The others, and a line "name: why" for each that is not here."""

    def bf16() -> Loss:
        if device.type != "cuda":
            raise LeftOut("a rehearsal on a CPU is in float32")
        return partial(all_logits, dtype=torch.bfloat16)

    def liger() -> Loss:
        # It may be installed, but not for this version of torch or triton.
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        if case.soft:
            raise LeftOut("its cross-entropy takes hard targets only")

        def of_rows(x: Inputs) -> Tensor:
            # Targets of -100 count nowhere.
            target = x.target if x.row_weight is None else x.target.where(x.row_weight != 0, -100)
            return loss(x.weight, x.hidden, target)

        return of_rows

    makers: dict[str, Callable[[], Loss]] = {FLOAT32: lambda: partial(all_logits, dtype=torch.float32), BF16: bf16}
    if case.until_fail:
        makers[COUNTED] = lambda: counted_logits
    return attempted(makers | {LIGER: liger}, ())


def step(loss: Loss, inputs: Inputs, i: int = 0) -> tuple[Tensor, ...]:
    """The loss and its gradients; the same at every call."""
    value = loss(inputs)
    return value.detach(), *torch.autograd.grad(value, inputs.leaves)


def peak_memory(action: Action, device: torch.device) -> float:
    """Bytes that a call takes at its height, its result included, above what is allocated already; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    # What failed before may still hold memory.
    free(device)
    # Compilation and the workspaces of the vendor's library come with the first call and stay.
    action(0)
    free(device)
    return peak_of(action, device) - torch.cuda.memory_allocated(device)


HEADER = ("way", "time", "of floor", "ours is faster by", "memory")


def raced(
    table: Table, ways: Mapping[str, Action], device: torch.device, rounds: int, floor: float, **options: Any
) -> Iterator[tuple[Table, dict[str, Spread], dict[str, float]]]:
    """The table with a row each way that fits, and their times and memory: of ours alone at once, then of all.

    options are those of `race`
    """
    for names, n in (([OURS], 1), (list(ways), rounds)):
        memory, large = attempted({name: partial(peak_memory, ways[name], device) for name in names}, [OURS])
        theirs = {name: ways[name] for name in memory if name != OURS}
        times, lost = race({OURS: ways[OURS]}, theirs, device, rounds=n, graph=False, **options)
        found = replace(table, skipped=[*table.skipped, *large, *lost])
        for name, spread in times.items():
            shares = f"{100 * floor / spread.median:.0f} %", f"{spread.median / times[OURS].median:.2f}"
            row = name, spread.text(0), *shares, f"{memory[name] / MIB:,.0f}"
            found = found.plus(row, {"way": name, "time": spread, "memory": memory[name]})
        yield found, times, memory


def measure_case(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[Table]:
    """Memory and time of one case, a row each way: ours alone, all, and all with their goals."""
    torch.manual_seed(0)
    inputs = Inputs.draw(case, dtype, device)
    others, skipped = comparators(case, device)
    counted = case.rows if inputs.row_weight is None else int(inputs.row_weight.sum())
    floor = peak(device).floor(flops=case.flops * counted / case.rows)
    bound = case.bound(dtype.itemsize, device)
    title = f"{case.text()}, H = {case.width:,}"
    note = (
        f"R = {case.rows:,}, of which {counted:,} have weight, V = {case.vocabulary:,}, weights in {dtype}, products "
        "in bf16 on a GPU; forward and backward, microseconds, median (range); "
        f"floor {floor:.0f} of {peak(device).source}; memory above the inputs in MiB, bound {bound / MIB:,.0f}."
    )
    table = Table(f"Head and loss: {title}", note, HEADER, skipped=skipped)
    ways: dict[str, Action] = {name: partial(step, loss, inputs) for name, loss in {OURS: ours, **others}.items()}
    of_all = {"case": case.text(), "width": case.width, "bound": bound}
    for so_far in raced(table, ways, device, rounds, floor):
        found, times, memory = so_far
        table = replace(found, records=[{**record, **of_all} for record in found.records])
        yield table
    best = times[OURS].median
    goals = []
    if not isnan(memory[OURS]):
        goals.append(Goal(f"peak memory, {title}", bound / MIB, memory[OURS] / MIB, "MiB", at_most=True))
        more, chunk = Inputs.draw(replace(case, rows=4 * case.rows), dtype, device), case.rows // 4
        few, many = (peak_memory(partial(step, partial(ours, chunk=chunk), x), device) for x in (inputs, more))
        slope = (many - few) / (3 * case.rows)
        goals.append(Goal(f"memory a row, {title}", 8 * case.width + 64, slope, "bytes", at_most=True))
        plain = min((times[name].median for name in (FLOAT32, BF16) if name in times), default=float("nan"))
        goals.append(Goal(f"time against the faster of all logits, {title}", 1.1, best / plain, "x", at_most=True))
    if LIGER in times:
        goals.append(Goal(f"against Liger, {title}", 2.0, times[LIGER].median / best, "x"))
    yield replace(table, goals=goals)


def measure_readout(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[Table]:
    """The teacher's hard targets: token and confidence, against the product and argmax alone."""
    torch.manual_seed(0)
    inputs = Inputs.draw(case, dtype, device)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    head = Head(weight)

    def argmax(i: int) -> Tensor:
        return (hidden @ weight.t()).argmax(-1)

    def softmax(i: int) -> tuple[Tensor, ...]:
        top = (hidden @ weight.t()).float().softmax(-1).max(-1)
        return top.indices, top.values

    # Tokens of equal logits may be told differently by the others, so that what is compared is the logit itself.
    some = head.logits(hidden[:256])
    picked = some.gather(-1, head_readout(hidden[:256], head)[0].unsqueeze(-1)).squeeze(-1)
    if not torch.allclose(picked, some.amax(-1), rtol=1e-2, atol=1e-2):
        raise RuntimeError("head_readout did not pick the greatest logits")
    del some, picked
    ways: dict[str, Action] = {OURS: lambda i: head_readout(hidden, head), "all logits, argmax": argmax}
    ways["all logits, float32 softmax and argmax"] = softmax
    floor = peak(device).floor(flops=2.0 * case.rows * case.vocabulary * case.width)
    note = (
        f"R = {case.rows:,}, V = {case.vocabulary:,}, {dtype}; microseconds, median (range); floor {floor:.0f}; memory "
        "above the inputs in MiB. Only the second alternative gives the confidence too, as ours does."
    )
    table = Table(f"Readout of the teacher, H = {case.width:,}", note, HEADER)
    for found, *_ in raced(table, ways, device, rounds, floor, tolerance=None):
        yield found


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Tables of head and loss, a case each, and of the readout, for both widths; ours first, then with all others."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    rows, vocabulary = (ROWS, VOCABULARY) if cuda else (TINY_ROWS, TINY_VOCABULARY)
    rounds = 10 if quick else 30
    for width in WIDTHS if cuda else TINY_WIDTHS:
        cases = [(False, True, False)]
        if not quick:
            cases = [*product((False, True), (True, False), (False,)), (False, True, True), (True, True, True)]
        for soft, trained, some in cases:
            # A head that is trained has float32 weights, its products are autocast's.
            master = torch.float32 if trained else dtype
            with torch.autocast(device.type, dtype, enabled=master != dtype):
                yield from measure_case(Case(rows, vocabulary, width, soft, trained, some), device, master, rounds)
            free(device)
        yield from measure_readout(Case(rows, vocabulary, width, soft=False, trained=False), device, dtype, rounds)
        free(device)


if __name__ == "__main__":
    program("distill", "Head and loss", measure)
