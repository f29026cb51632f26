"""KV write: the scatter alone, and beside it what fusing rotary embedding and QK-norm into it could save at most.

`python -m mtpkern.bench.kv_write` times one layer's launches in captured graphs and writes bench/results/kv_write.*.
The model's own rotary embedding and norms are those of transformers' Qwen3, on the same rows, eager and compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from mtpkern.bench.harness import Spread
from mtpkern.bench.report import Goal, Table, run
from mtpkern.bench.timing import Action, drawn, free, race, timed
from mtpkern.kernels.kv_write import kv_write
from mtpkern.output import exit_status

OURS, TORCH = "ours", "torch indexing"
ROTARY, NORM, ALL, COMPILED = "rotary", "QK-norm", "norm, rotary, write", "the same, compiled"
LAYERS = 36


class Case:
    """The rows of a pass of Qwen3-4B's heads, and the caches that their keys and values go to."""

    def __init__(self, rows: int, batch: int, capacity: int, device: torch.device) -> None:
        self.Hq, self.Hkv, self.D = 32, 8, 128
        self.k_cache, self.v_cache = drawn(2, batch, self.Hkv, capacity + 1, self.D, device=device)
        # As the projections leave them, before the heads are brought forward.
        self.q, self.k, self.v = (
            drawn(1, 1, rows, heads, self.D, device=device)[0] for heads in (self.Hq, self.Hkv, self.Hkv)
        )
        self.cos, self.sin = drawn(2, 1, rows, self.D, device=device)
        each = rows // batch
        o_r = torch.arange(rows, device=device)
        self.seq, self.slot = o_r // each, capacity - each + o_r % each
        self.q_norm, self.k_norm = (Qwen3RMSNorm(self.D).to(device, torch.bfloat16) for _ in range(2))

    def write(self, form: Callable[..., None], k: Tensor) -> tuple[Tensor, Tensor]:
        """Scatter keys [1, Hkv, R, D] and the values; returns the caches."""
        v = self.v.transpose(1, 2)
        form(self.k_cache, self.v_cache, k[0].transpose(0, 1), v[0].transpose(0, 1), self.seq, self.slot)
        return self.k_cache, self.v_cache

    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Qwen3's norm over each head."""
        return self.q_norm(q), self.k_norm(k)

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary embedding of queries and keys [1, H, R, D]."""
        return apply_rotary_pos_emb(q, k, self.cos, self.sin)

    def both(self) -> tuple[Tensor, Tensor]:
        """Norm and rotary embedding: queries and keys [1, H, R, D]."""
        q, k = self.norm(self.q, self.k)
        return self.rotary(q.transpose(1, 2), k.transpose(1, 2))

    def all(self, mixed: Callable[[], tuple[Tensor, Tensor]]) -> Action:
        """What a layer does between projections and attention."""

        def call(i: int) -> tuple[Tensor, ...]:
            q, k = mixed()
            return q, *self.write(kv_write, k)

        return call


@torch.inference_mode()
def times(rows: int, batch: int, capacity: int, device: torch.device) -> tuple[dict[str, Spread], list[str]]:
    """Microseconds of each part, and what was left out."""
    case = Case(rows, batch, capacity, device)
    q, k = case.q.transpose(1, 2), case.k.transpose(1, 2)
    # The compiled form is the fusion that costs nobody a kernel.
    compiled = torch.compile(case.both, fullgraph=True, dynamic=False) if device.type == "cuda" else case.both
    scatter, _ = race(
        {OURS: lambda i: case.write(kv_write, k), TORCH: lambda i: case.write(kv_write.reference, k)}, {}, device
    )
    parts = timed({ROTARY: lambda i: case.rotary(q, k), NORM: lambda i: case.norm(case.q, case.k)}, device)
    whole, skipped = race({ALL: case.all(case.both)}, {COMPILED: case.all(compiled)}, device)
    return {**scatter, **parts, **whole}, skipped


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Row counts from one token to a large batch: the table so far, after each."""
    grid = [(1, 1), (15, 1), (60, 4), (240, 16), (960, 64)]
    if device.type == "cpu":
        grid = [(1, 1), (6, 2)]
    elif quick:
        grid = [(15, 1), (240, 16)]
    capacity = 4096 if device.type == "cuda" else 32
    ways = (OURS, TORCH, ROTARY, NORM, ALL, COMPILED)
    rows, records, goals, skipped = [], [], [], []
    for R, batch in grid:
        spent, left_out = times(R, batch, capacity, device)
        free(device)
        skipped += left_out
        saved = (spent[ALL].median - spent[OURS].median) * LAYERS
        rows.append((f"{R} of {batch}", *(spent[w].text(1) if w in spent else "–" for w in ways), f"{saved:.0f}"))
        records.append({"rows": R, "batch": batch, "us": spent, "at_most_saved_us_a_pass": saved})
        if R == 15:
            goals.append(Goal("KV write of 15 rows", 3, spent[OURS].median, "µs", at_most=True))
        note = (
            "Heads of Qwen3-4B: 32 query, 8 KV, width 128; bf16; µs a layer in a graph, median (least–greatest). Last "
            "column: what a kernel that did norm and rotary in the write's own time would save, µs a pass of "
            f"{LAYERS} layers."
        )
        header = ("rows of sequences", *ways, "saved at most")
        yield Table("KV write", note, header, [*rows], [*records], [*goals], sorted(set(skipped)))


def main() -> None:
    """Measure, print, write."""
    run("kv_write", "KV write", measure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
