"""Products of few rows on a CPU: over the model's own weights, and over copies that are laid out for them.

`python -m mtpkern.bench.packed` takes all linear layers of SmolLM2-135M one behind another, siblings as one in the
copies, as a pass does; both ways in turns. What is compared is what a number of rows costs over one. Copies of 16-bit
weights are float32, and so is the product; its rows are cast before and behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mtpkern import packed_weights
from mtpkern.bench.models import products
from mtpkern.bench.report import Table, program
from mtpkern.bench.timing import Spread, interleaved
from mtpkern.cli import positive

LAYERS = 30
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)
DTYPES = ("float32", "bfloat16", "float16")
HEADER = ("rows", "torch", "packed", "packed over torch")


@torch.inference_mode()
def both_ways(
    shapes: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int], rounds: int, dtype: torch.dtype = torch.float32
) -> Iterator[Table]:
    """By rows: milliseconds of all products both ways, as multiples of torch's with one row; the table so far.

    shapes: what each group of layers reads, and their widths; weights are random
    """
    name = str(dtype).removeprefix("torch.")
    groups = [[nn.Linear(width, n, bias=False, dtype=dtype) for n in widths] for width, widths in shapes]
    packs = [packed_weights.Packed.of(layers) for layers in groups]
    bytes = sum(layer.weight.nbytes for layers in groups for layer in layers)
    note = (
        f"{len(packs)} products over {bytes / 1e6:.0f} MB of {name} weights, threads: {torch.get_num_threads()}. "
        f"Medians of {rounds} rounds in turns, as multiples of torch's one row."
    )
    table = Table(f"Products of few rows, {name}", note, HEADER)
    one: Spread | None = None
    for R in rows:
        x = {width: torch.randn(1, R, width, dtype=dtype) for width, _ in shapes}

        def torchs(x: dict[int, Tensor] = x) -> None:
            for layers in groups:
                for layer in layers:
                    layer(x[layer.in_features])

        def ours(x: dict[int, Tensor] = x) -> None:
            for (width, _), pack in zip(shapes, packs):
                packed_weights.product(x[width].to(pack.dtype), pack.weight, pack.bias).to(dtype)

        found = interleaved({"torch": torchs, "packed": ours}, rounds, torch.device("cpu"))
        one = one or found["torch"]
        ratio = found["packed"].median / found["torch"].median
        row = (str(R), *(f"{found[name].median / one.median:.2f}" for name in found), f"{ratio:.2f}")
        table = table.plus(row, {"rows": R, "milliseconds": found})
        yield table


def take_products(
    device: torch.device, quick: bool, threads: int | None, rounds: int, dtypes: Sequence[str]
) -> Iterator[Table]:
    """All products of the model."""
    if threads:
        torch.set_num_threads(threads)
    of_layer, head = products("SmolLM2-135M")
    shapes, rows = [*of_layer.values()] * LAYERS + [*head.values()], ROWS[::4] if quick else ROWS
    for dtype in dtypes:
        yield from both_ways(shapes, rows, rounds, getattr(torch, dtype))


OPTIONS = {
    "--threads": {"type": positive, "help": "(default: torch's own)"},
    "--rounds": {"type": positive, "default": 9},
    "--dtypes": {"nargs": "+", "choices": DTYPES, "default": DTYPES[:2], "help": "(default: %(default)s)"},
}


if __name__ == "__main__":
    how = {"options": OPTIONS, "on_cpu": lambda args: True, "device": "cpu"}
    program("packed", "Products of few rows on a CPU", take_products, **how)
