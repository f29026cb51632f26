"""Linear layers with few rows: the products of a decoder layer, our kernel's beside torch's.

Chains of products in captured graphs, each over weights of its own that together exceed the L2 cache several times, so
that weights come from memory and a launch may start early behind the one ahead, as in a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from mtpkern.bench.models import Products, products
from mtpkern.bench.report import Goal, Table, cells, program
from mtpkern.bench.timing import Action, Spread, drawn, free, peak, race
from mtpkern.kernels.linear import few_rows_linear, new_counters

MODELS = ("Qwen3-4B", "Llama-3.1-8B", "SmolLM2-135M")
GRID = (1, 8, 16, 24, 32)
# Of all weights of a chain, of which each product's must exceed the cache; and the most layers.
CHAIN_BYTES, MOST_LAYERS = 3 << 29, 128
WAYS = SEPARATE, JOINED, OURS = "torch, each", "torch, joined", "ours"
Multiply = Callable[[Tensor, Tensor], Tensor]


class Layers:
    """Some layers of products, siblings as one, with weights of a size that leaves outputs near 1."""

    def __init__(self, of: Products, n: int, device: torch.device) -> None:
        self.products, self.device, self.counters = of, device, new_counters(device)
        self.weights = {
            name: [w.mul_(K**-0.5) for w in drawn(n, sum(widths), K, device=device)] for name, (K, widths) in of.items()
        }

    def chain(self, R: int, multiply: Multiply, *, names: Sequence[str], apart: bool = False) -> Action:
        """Call i runs products of layer i one behind another, each on a part of what the one ahead made: its outputs.

        apart: a product for each sibling, the first of which the next product reads.
        """
        (x,) = drawn(1, R, self.products[names[0]][0], device=self.device)
        widths = {name: self.products[name][1] for name in names}
        parts = {n: [w.split(widths[n]) if apart else [w] for w in self.weights[n]] for n in names}

        def call(i: int) -> tuple[Tensor, ...]:
            y, outs = x, [x]
            for name in names:
                weights = parts[name][i % len(parts[name])]
                outs = [multiply(y[:, : self.products[name][0]], w) for w in weights]
                y = outs[0]
            # A layer's first sibling stands for all where they are apart.
            return (y,) if len(names) > 1 else tuple(outs) if apart else y.split(widths[names[0]], 1)

        return call


@torch.inference_mode()
def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """A table for each model: a row for each number of rows and product, and for the layer in all."""
    cpu = device.type == "cpu"
    machine = peak(device)
    note = (
        "bf16, µs in a graph over weights of several layers, median (least–greatest). Share of the bandwidth by the "
        f"weights' bytes; {machine.source}."
    )
    header = ("rows: product", *WAYS, "share, torch, joined", "share, ours")
    for model in MODELS[: 1 if quick or cpu else None]:
        of_layer, of_head = products(model, tiny=cpu)
        bytes_ = {name: 2 * K * sum(widths) for name, (K, widths) in (of_layer | of_head).items()}
        bytes_["a layer"] = sum(bytes_[name] for name in of_layer)
        layers = Layers(of_layer, 2 if cpu else min(MOST_LAYERS, -(-CHAIN_BYTES // bytes_["a layer"])), device)
        # Of a head, which is there once, two, which the cache does not hold either.
        groups = {**{name: (layers, [name]) for name in of_layer}, "head": (Layers(of_head, 2, device), ["head"])}
        groups["a layer"] = layers, list(of_layer)
        table = Table(f"Products, {model}", note, header)
        for R in (1, 3) if cpu else GRID:
            for name, (some, names) in groups.items():
                found, skipped = times(some, R, names)
                shares = {way: 100 * machine.floor(bytes=bytes_[name]) / x.median for way, x in found.items()}
                said = (f"{shares[way]:.0f} %" if way in shares else "–" for way in (JOINED, OURS))
                record = {"rows": R, "product": name, "bytes": bytes_[name], "us": found}
                goal = f"{model}: a layer's products, 16 rows: share of the bandwidth"
                goals = [Goal(goal, 80, shares[OURS], "%")] if (R, name) == (16, "a layer") and OURS in shares else []
                row = f"{R}: {name}", *cells(found, WAYS, 2), *said
                table = table.plus(row, record, *goals, skipped=[f"{name}, {R} rows: {line}" for line in skipped])
                yield table
        del layers, groups
        free(device)


def times(layers: Layers, R: int, names: Sequence[str]) -> tuple[dict[str, Spread], list[str]]:
    """Microseconds of products one behind another in each way, and what was left out."""
    ours = partial(few_rows_linear, bias=None, counters=layers.counters)
    theirs: dict[str, Action] = {OURS: layers.chain(R, ours, names=names)}
    if len(names) > 1 or len(layers.products[names[0]][1]) > 1:
        theirs[SEPARATE] = layers.chain(R, linear, names=names, apart=True)
    right = {JOINED: layers.chain(R, linear, names=names)}
    # Four products and their roundings on the way.
    tolerance = 5e-2 if len(names) > 1 else 2e-2
    calls = len(layers.weights[names[0]])
    return race(right, theirs, layers.device, rounds=7, calls=calls, tolerance=tolerance)


if __name__ == "__main__":
    program("linear", "Linear layers with few rows", measure)
