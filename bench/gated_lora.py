"""Gated LoRA: what the adapter adds to a layer's products.

The base's products of Qwen3-4B without and with an adapter of rank 32, in captured graphs: with x A^T in the base's
product and one launch behind it, as passes have it (mtpkern/products.py), and with two launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from mtpkern.bench.models import products
from mtpkern.bench.report import Goal, Table, cells, program
from mtpkern.bench.timing import Spread, copies, drawn, free, peak, race
from mtpkern.kernels.gated_lora import gated_expand, gated_lora, gated_update
from mtpkern.kernels.linear import few_rows_linear, new_counters
from mtpkern.products import few_rows

BASE, OURS, TWO, TORCH = "base", "ours, riding", "ours, two launches", "torch operations"
WAYS = (BASE, OURS, TWO, TORCH)
LAYERS, RANK, SCALE = 36, 32, 2.0
# Of all weights in bf16, which a pass reads: its floor.
WEIGHTS = 8.04e9


class Case:
    """A group of siblings as one product, its adapter, and rows of which 7 in 15 are masks, as Verified(8) has them."""

    def __init__(self, rows: int, hidden: int, widths: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.widths, self.ranks = widths, (rank,) * len(widths)
        self.N, M = sum(widths), sum(self.ranks)
        self.adapter_bytes = 2 * (M * hidden + rank * self.N)
        n = copies(2 * self.N * hidden + self.adapter_bytes, device)
        (self.x,) = drawn(1, rows, hidden, device=device)
        self.gate = torch.arange(rows, device=device) % 15 >= 8
        # Of a size that leaves outputs near 1; A lies behind the weights.
        self.weights = [w.mul_(hidden**-0.5) for w in drawn(n, self.N + M, hidden, device=device)]
        self.as_ = [w[self.N :].split(self.ranks) for w in self.weights]
        self.bs = list(zip(*([b.mul_(rank**-0.5) for b in drawn(n, m, rank, device=device)] for m in widths)))
        # As captured passes have them.
        self.counters = new_counters(device) if rows <= few_rows(True, device) else None

    def product(self, weight: Tensor) -> Tensor:
        """x times rows of a weight."""
        if self.counters is None:
            return linear(self.x, weight)
        return few_rows_linear(self.x, weight, None, self.counters)

    def base(self, i: int) -> Tensor:
        """The product alone: [R, N]."""
        return self.product(self.weights[i % len(self.weights)][: self.N])

    def ours(self, i: int) -> Tensor:
        """The product with A, and the launch behind it."""
        at = i % len(self.weights)
        y, *lows = self.product(self.weights[at]).split((self.N, *self.ranks), dim=1)
        gated_expand(y.split(self.widths, dim=1), lows, self.gate, self.bs[at], SCALE)
        return y

    def adapted(self, i: int, update: Callable[..., None]) -> Tensor:
        """The update behind the product."""
        y, at = self.base(i), i % len(self.weights)
        outs, scales = y.split(self.widths, dim=1), [SCALE] * len(self.widths)
        update(outs, self.x, self.gate, self.as_[at], self.bs[at], scales)
        return y

    def two(self, i: int) -> Tensor:
        """Both launches behind the product."""
        return self.adapted(i, gated_lora)


@torch.inference_mode()
def times(case: Case, device: torch.device) -> tuple[dict[str, Spread], list[str]]:
    """Microseconds of a call in each way, and what was left out."""
    n = len(case.weights)
    base, _ = race({BASE: case.base}, {}, device, calls=n)
    theirs = {TORCH: partial(case.adapted, update=gated_update.reference)}
    adapted, skipped = race({OURS: case.ours, TWO: case.two}, theirs, device, calls=n)
    return base | adapted, skipped


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """The groups of a layer at row counts from one sequence to a large batch."""
    cpu = device.type == "cpu"
    machine = peak(device)
    note = (
        f"Rank {RANK}, bf16, siblings as one product, riding: with A; 7 of 15 rows gated; µs in a graph, weights read "
        f"from memory, median (least–greatest). Last column: reading A and B once. Lines of a pass: what {LAYERS} "
        f"layers' adapters add, over the {WEIGHTS / 1e9:.2f} GB of all weights; {machine.source}."
    )
    table = Table("Gated LoRA", note, ("rows: group", *WAYS, "A and B"))
    whole = machine.floor(bytes=WEIGHTS)
    for R in (1, 15) if cpu else (15, 240) if quick else (15, 60, 240, 480):
        spent = dict.fromkeys(WAYS, 0.0)
        for name, (hidden, widths) in products("Qwen3-4B", tiny=cpu)[0].items():
            case = Case(R, hidden, widths, RANK, device)
            found, skipped = times(case, device)
            floor = machine.floor(bytes=case.adapter_bytes)
            del case
            free(device)
            for way in WAYS:
                spent[way] += found[way].median if way in found else float("nan")
            record: dict[str, object] = {"rows": R, "group": name, "us": found, "adapter_floor_us": floor}
            table = table.plus((f"{R}: {name}", *cells(found, WAYS), f"{floor:.2f}"), record, skipped=skipped)
        shares = {way: LAYERS * (spent[way] - spent[BASE]) / whole for way in WAYS}
        what = f"adapter of rank {RANK}, 15 rows: share of a Qwen3-4B pass at its floor"
        goals = [Goal(what, 8, 100 * shares[OURS], "%", at_most=True)] if R == 15 and not cpu else []
        record = {"rows": R, "group": "all", "share_of_the_floor_of_a_pass": shares}
        row = (f"{R}: of a pass at its floor", *(f"{100 * shares[way]:.1f} %" for way in WAYS), "")
        table = table.plus(row, record, *goals)
        yield table


if __name__ == "__main__":
    program("gated_lora", "Gated LoRA", measure)
