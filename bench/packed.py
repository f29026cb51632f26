"""Products of few rows on a CPU: over the model's own weights, and over copies that are laid out for them.

`python -m mtpkern.bench.packed` takes all linear layers of SmolLM2-135M one behind another, siblings as one in the
copies, as a pass does; both ways in turns. What is compared is what a number of rows costs over one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from mtpkern import packed
from mtpkern.bench.harness import Spread, environment, interleaved
from mtpkern.bench.report import Table, positive, write
from mtpkern.output import exit_status

# What reads the same: the width that it reads, and those that it makes.
LAYER = [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))]
LAYERS, HEAD = 30, (576, (49152,))
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
HEADER = ("rows", "torch", "packed", "packed over torch")


def groups_of(shapes: Sequence[tuple[int, Sequence[int]]]) -> list[list[nn.Linear]]:
    """Layers with random weights, those that read the same together."""
    return [[nn.Linear(width, n, bias=False) for n in widths] for width, widths in shapes]


@torch.inference_mode()
def both_ways(groups: Sequence[Sequence[nn.Linear]], rows: Sequence[int], rounds: int) -> Table:
    """By rows: milliseconds of all products both ways, as multiples of torch's with one row."""
    copies = [packed.Packed.of(layers) for layers in groups]
    cpu = torch.device("cpu")

    def torchs(x: dict[int, Tensor]) -> None:
        for layers in groups:
            for layer in layers:
                layer(x[layer.in_features])

    def ours(x: dict[int, Tensor]) -> None:
        for layers, copy in zip(groups, copies):
            packed._product(x[layers[0].in_features], copy.weight, copy.bias)

    one: Spread | None = None
    lines, records = [], []
    for R in rows:
        x = {layers[0].in_features: torch.randn(1, R, layers[0].in_features) for layers in groups}
        found = interleaved({"torch": lambda x=x: torchs(x), "packed": lambda x=x: ours(x)}, rounds, cpu)  # type: ignore[misc]
        one = one or found["torch"]
        ratio = found["packed"].median / found["torch"].median
        lines.append((str(R), *(f"{found[name].median / one.median:.2f}" for name in found), f"{ratio:.2f}"))
        records.append({"rows": R, "milliseconds": {name: asdict(spread) for name, spread in found.items()}})
    bytes = sum(layer.weight.nbytes for layers in groups for layer in layers)
    note = (
        f"{len(copies)} products over {bytes / 1e6:.0f} MB of float32 weights, threads: {torch.get_num_threads()}. "
        f"Medians of {rounds} rounds in turns, as multiples of torch's one row, which passes of one row take."
    )
    return Table("Products of few rows", note, HEADER, lines, records)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.packed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=positive, help="(default: torch's own)")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--results", type=Path, help="folder for packed.md and packed.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = environment(torch.device("cpu"))
    table = both_ways(groups_of([*LAYER * LAYERS, HEAD]), ROWS, args.rounds)
    print(table.markdown())
    if args.results is not None:
        print(write("packed", "Products of few rows on a CPU", facts, [table], {"rows": table.records}, args.results))


if __name__ == "__main__":
    sys.exit(exit_status(main))
