"""Gated LoRA: what the adapter adds to a layer's products.

The base's products of Qwen3-4B without and with an adapter of rank 32, in captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mtpkern.bench.models import products
from mtpkern.bench.report import Goal, Table, cells, program
from mtpkern.bench.timing import Spread, copies, drawn, free, peak, race
from mtpkern.kernels.gated_lora import gated_lora, gated_update

BASE, OURS, TORCH = "base", "ours", "torch operations"
WAYS = (BASE, OURS, TORCH)
LAYERS, RANK, SCALE = 36, 32, 2.0
# Of all weights in bf16, which a pass reads: its floor.
WEIGHTS = 8.04e9


class Case:
    """A group of siblings as one product, its adapter, and rows of which 7 in 15 are masks, as Verified(8) has them."""

    def __init__(self, rows: int, hidden: int, widths: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.widths = widths
        N, M = sum(widths), rank * len(widths)
        self.adapter_bytes = 2 * (M * hidden + rank * N)
        n = copies(2 * N * hidden + self.adapter_bytes, device)
        (self.x,) = drawn(1, rows, hidden, device=device)
        self.gate = torch.arange(rows, device=device) % 15 >= 8
        # Of a size that leaves outputs near 1.
        self.weights, as_ = ([w.mul_(hidden**-0.5) for w in drawn(n, m, hidden, device=device)] for m in (N, M))
        self.as_ = [a.chunk(len(widths)) for a in as_]
        self.bs = list(zip(*([b.mul_(rank**-0.5) for b in drawn(n, m, rank, device=device)] for m in widths)))

    def base(self, i: int) -> Tensor:
        """The product alone: [R, N]."""
        return self.x @ self.weights[i % len(self.weights)].T

    def adapted(self, i: int, update: Callable[..., None]) -> Tensor:
        """The update behind the product."""
        y, at = self.base(i), i % len(self.weights)
        outs, scales = y.split(self.widths, dim=1), [SCALE] * len(self.widths)
        update(outs, self.x, self.gate, self.as_[at], self.bs[at], scales)
        return y

    def ours(self, i: int) -> Tensor:
        """Both launches behind the product."""
        return self.adapted(i, gated_lora)


@torch.inference_mode()
def times(case: Case, device: torch.device) -> tuple[dict[str, Spread], list[str]]:
    """Microseconds of a call in each way, and what was left out."""
    n = len(case.weights)
    base, _ = race({BASE: case.base}, {}, device, calls=n)
    theirs = {TORCH: partial(case.adapted, update=gated_update.reference)}
    adapted, skipped = race({OURS: case.ours}, theirs, device, calls=n)
    return base | adapted, skipped


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """The groups of a layer at row counts from one sequence to a large batch."""
    cpu = device.type == "cpu"
    machine = peak(device)
    note = (
        f"Rank {RANK}, bf16, siblings as one product, 7 of 15 rows gated; µs in a graph, weights read from memory, "
        f"median (least–greatest). Last column: reading A and B once. Lines of a pass: what {LAYERS} layers' adapters "
        f"add, over the {WEIGHTS / 1e9:.2f} GB of all weights; {machine.source}."
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
