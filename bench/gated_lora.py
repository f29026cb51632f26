"""Gated LoRA: what the adapter adds to a layer's products, and what other arrangements of its two launches would.

`python -m mtpkern.bench.gated_lora` times the base's products of Qwen3-4B without and with an adapter of rank 32 in
captured graphs, and writes bench/results/gated_lora.*. Beside the two launches in line, the same in separate torch
operations: the first launch on a branch of the graph while the base's product runs (it needs x alone), and A below the
base's weight in one buffer, where the base's product brings x A^T and the second launch is all that is added.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from mtpkern.bench.harness import Spread
from mtpkern.bench.report import Goal, Table, run
from mtpkern.bench.timing import Action, copies, drawn, free, peak, race, with_constants
from mtpkern.kernels import form
from mtpkern.kernels.gated_lora import expand_triton, gated_lora, gated_update, shrink_triton
from mtpkern.output import exit_status

BASE, OURS, TORCH = "base", "ours", "torch operations"
BRANCH, JOINED = "first launch on a branch", "A in the base's product"
NO_PDL = "ours, no PDL"  # each launch behind the end of the one ahead (kernels/form.py)
WAYS = (BASE, OURS, NO_PDL, TORCH, BRANCH, JOINED)
LAYERS, RANK, SCALE = 36, 32, 2.0
# What Qwen3-4B's groups of siblings read, and the widths of their outputs.
GROUPS = {
    "q, k, v": (2560, (4096, 1024, 1024)),
    "o": (4096, (2560,)),
    "gate, up": (2560, (9728, 9728)),
    "down": (9728, (2560,)),
}
# Of all weights in bf16, which a pass reads: its floor.
WEIGHTS = 8.04e9


class Case:
    """A group of siblings as one product, its adapter, and rows of which 7 in 15 are masks, as Verified(8) has them."""

    def __init__(self, rows: int, hidden: int, widths: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.widths, self.N = widths, sum(widths)
        M = rank * len(widths)
        self.adapter_bytes = 2 * (M * hidden + rank * self.N)
        n = copies(2 * self.N * hidden + self.adapter_bytes, device)
        (self.x,) = drawn(1, rows, hidden, device=device)
        self.gate = torch.arange(rows, device=device) % 15 >= 8
        # The base's weight and A below it. Of a size that leaves outputs near 1.
        self.weights = [w.mul_(hidden**-0.5) for w in drawn(n, self.N + M, hidden, device=device)]
        self.bs = [[b.mul_(rank**-0.5) for b in drawn(n, N, rank, device=device)] for N in widths]
        self.scales = [SCALE] * len(widths)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _copy(self, i: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        weight = self.weights[i % len(self.weights)]
        as_ = list(weight[self.N :].chunk(len(self.widths)))
        return weight, weight[: self.N], as_, [b[i % len(b)] for b in self.bs]

    def base(self, i: int) -> Tensor:
        """The product alone: [R, N]."""
        _, weight, _, _ = self._copy(i)
        return self.x @ weight.T

    def ours(self, i: int) -> Tensor:
        """Both launches behind the product."""
        _, weight, as_, bs = self._copy(i)
        y = self.x @ weight.T
        gated_lora(y.split(self.widths, dim=1), self.x, self.gate, as_, bs, self.scales)
        return y

    def torch_operations(self, i: int) -> Tensor:
        """The torch form behind the product."""
        _, weight, as_, bs = self._copy(i)
        y = self.x @ weight.T
        gated_update.reference(y.split(self.widths, dim=1), self.x, self.gate, as_, bs, self.scales)
        return y

    def branch(self, i: int) -> Tensor:
        """The first launch beside the product, on a stream of its own; in a graph, a branch."""
        _, weight, as_, bs = self._copy(i)
        gate = self.gate.view(torch.uint8)
        if self.side is None:
            h = shrink_triton(self.x, gate, as_)
            y = self.x @ weight.T
        else:
            here = torch.cuda.current_stream(self.x.device)
            self.side.wait_stream(here)
            with torch.cuda.stream(self.side):
                h = shrink_triton(self.x, gate, as_)
            y = self.x @ weight.T
            here.wait_stream(self.side)
        expand_triton(y.split(self.widths, dim=1), h, gate, bs, self.scales)
        return y

    def joined(self, i: int) -> Tensor:
        """One product for outputs and x A^T, and the second launch."""
        both, _, _, bs = self._copy(i)
        y = self.x @ both.T
        *outs, h = y.split([*self.widths, y.shape[1] - self.N], dim=1)
        expand_triton(outs, h[None], self.gate.view(torch.uint8), bs, self.scales)
        return y[:, : self.N]


@torch.inference_mode()
def times(case: Case, device: torch.device) -> tuple[dict[str, Spread], list[str]]:
    """Microseconds of a call in each way, and what was left out."""
    n = len(case.weights)
    alone: dict[str, Action] = {BASE: case.base}
    base, _ = race(alone, {}, device, calls=n)
    theirs: dict[str, Action] = {TORCH: case.torch_operations, BRANCH: case.branch, JOINED: case.joined}
    ours: dict[str, Action] = {OURS: case.ours, NO_PDL: with_constants(case.ours, form, PDL=False)}
    adapted, skipped = race(ours, theirs, device, calls=n)
    return {**base, **adapted}, skipped


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """The groups of a layer at row counts from one sequence to a large batch."""
    cpu = device.type == "cpu"
    groups = {"q, k, v": (40, (24, 8, 8)), "o": (24, (40,))} if cpu else GROUPS
    grid = (1, 15) if cpu else (15, 240) if quick else (15, 60, 240, 480)
    machine = peak(device)
    rows, records, goals, skipped = [], [], [], []
    for R in grid:
        spent: dict[str, float] = dict.fromkeys(WAYS, 0.0)
        for name, (hidden, widths) in groups.items():
            case = Case(R, hidden, widths, RANK, device)
            found, left_out = times(case, device)
            floor = machine.floor(bytes=case.adapter_bytes)
            del case
            free(device)
            skipped += left_out
            for way in WAYS:
                spent[way] += found[way].median if way in found else float("nan")
            rows.append((f"{R}: {name}", *(found[w].text(1) if w in found else "–" for w in WAYS), f"{floor:.2f}"))
            records.append({"rows": R, "group": name, "us": found, "adapter_floor_us": floor})
        whole = machine.floor(bytes=WEIGHTS)
        shares = {way: LAYERS * (spent[way] - spent[BASE]) / whole for way in WAYS}
        rows.append((f"{R}: of a pass at its floor", *(f"{100 * shares[way]:.1f} %" for way in WAYS), ""))
        records.append({"rows": R, "group": "all", "share_of_the_floor_of_a_pass": shares})
        if R == 15 and not cpu:
            what = f"adapter of rank {RANK}, 15 rows: share of a Qwen3-4B pass at its floor"
            goals.append(Goal(what, 8, 100 * shares[OURS], "%", at_most=True))
    note = (
        f"Rank {RANK}, bf16, siblings as one product, 7 of 15 rows gated; µs in a graph, weights read from memory, "
        f"median (least–greatest). Last column: reading A and B once. Lines of a pass: what {LAYERS} layers' adapters "
        f"add, over the {WEIGHTS / 1e9:.2f} GB of all weights; {machine.source}."
    )
    yield Table("Gated LoRA", note, ("rows: group", *WAYS, "A and B"), rows, records, goals, sorted(set(skipped)))


def main() -> None:
    """Measure, print, write."""
    run("gated_lora", "Gated LoRA", measure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
