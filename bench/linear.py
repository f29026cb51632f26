"""Linear layers with few rows: the products of a decoder layer, our kernel's beside torch's, and layouts of ours.

`python -m mtpkern.bench.linear` times chains of products in captured graphs, each over weights of its own that together
exceed the L2 cache several times, so that weights come from memory and a launch may start early behind the one ahead,
as in a pass; and writes bench/results/linear.*. First the layouts (kernels/linear.py: Tiles) that the shapes allow,
the best of each shape named; then the shapes and a whole layer at several numbers of rows, with the layout of the rule
(`tiles_of`) and with the best. Of a whole layer also with a small operation of torch before each product, which our
launches then cannot overlap with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from itertools import product
from multiprocessing import get_context

import torch
from torch import Tensor
from torch.nn.functional import linear

from mtpkern.bench.harness import Spread
from mtpkern.bench.report import Goal, Table, run
from mtpkern.bench.timing import Action, drawn, free, peak, race, with_constants
from mtpkern.kernels import form
from mtpkern.kernels.form import takes_kernel
from mtpkern.kernels.linear import Tiles, few_rows_linear, few_rows_linear_triton, new_counters, tiles_of
from mtpkern.output import exit_status

# Of a model the products of a layer: what each reads, and the widths of the siblings that it joins; and its head.
Products = Mapping[str, tuple[int, tuple[int, ...]]]
MODELS: Mapping[str, tuple[Products, tuple[int, int]]] = {
    "Qwen3-4B": (
        {
            "q, k, v": (2560, (4096, 1024, 1024)),
            "o": (4096, (2560,)),
            "gate, up": (2560, (9728, 9728)),
            "down": (9728, (2560,)),
        },
        (2560, 151_936),
    ),
    "Llama-3.1-8B": (
        {
            "q, k, v": (4096, (4096, 1024, 1024)),
            "o": (4096, (4096,)),
            "gate, up": (4096, (14_336, 14_336)),
            "down": (14_336, (4096,)),
        },
        (4096, 128_256),
    ),
    "SmolLM2-135M": (
        {
            "q, k, v": (576, (576, 192, 192)),
            "o": (576, (576,)),
            "gate, up": (576, (1536, 1536)),
            "down": (1536, (576,)),
        },
        (576, 49_152),
    ),
}
TINY: tuple[Products, tuple[int, int]] = (
    {"q, k, v": (32, (32, 16, 16)), "o": (32, (32,)), "gate, up": (32, (48, 48)), "down": (48, (32,))},
    (32, 80),
)
GRID = (1, 8, 16, 24, 32)
# Of all weights of a chain, of which each product's must exceed the cache; and the most layers.
CHAIN_BYTES, MOST_LAYERS = 3 << 29, 128
# Rows at which layouts are compared: those of the kernel's forms.
TUNED_AT = (16, 32)
FORMS = (
    Tiles(),
    Tiles(stages=4),
    Tiles(stages=3),
    Tiles(BLOCK_K=64, stages=6),
    Tiles(BLOCK_K=256, stages=3),
    Tiles(BLOCK_N=128, BLOCK_K=64),
    Tiles(BLOCK_N=128, warps=8, stages=3),
    Tiles(BLOCK_N=32, stages=5),
    Tiles(BLOCK_N=32, BLOCK_K=256),
    Tiles(BLOCK_N=16, BLOCK_K=256, warps=2, stages=5),
)
SPLITS = (1, 2, 4, 8)
# Programs with which a split is worth a try.
PROGRAMS = range(80, 700)
PROCESSES = 12
SEPARATE, JOINED, RULE, BEST, NO_PDL = "torch, each", "torch, joined", "ours", "ours, best layout", "ours, no PDL"
TORCH_BETWEEN, OURS_BETWEEN = "torch, joined, behind a small operation", "ours, best layout, behind a small operation"
WAYS = (SEPARATE, JOINED, RULE, BEST, NO_PDL, TORCH_BETWEEN, OURS_BETWEEN)
Multiply = Callable[[Tensor, Tensor], Tensor]


def text_of(tiles: Tiles) -> str:
    """A layout in a cell: `text_of(Tiles())` is "64x128 /1, 4 warps, 5 stages"."""
    N, K, splits, warps, stages = astuple(tiles)
    return f"{N}x{K} /{splits}, {warps} warps, {stages} stages"


def layouts(N: int, K: int) -> list[Tiles]:
    """The layouts worth a try for a weight [N, K]; the rule's first."""
    found = [tiles_of(N, K)]
    for tiles, splits in product(FORMS, SPLITS):
        n = -(-N // tiles.BLOCK_N)
        if (n * splits in PROGRAMS or (splits == 1 and n >= PROGRAMS.stop)) and splits * tiles.BLOCK_K <= K:
            found.append(replace(tiles, SPLITS=splits))
    return list(dict.fromkeys(found))


@dataclass
class Layers:
    """The weights of some layers of a model, siblings' as one, of a size that leaves outputs near 1; and counters."""

    products: Products
    weights: dict[str, list[Tensor]]
    counters: Tensor
    device: torch.device

    @classmethod
    def drawn(cls, products: Products, device: torch.device) -> Layers:
        """As many as make CHAIN_BYTES; two on a CPU."""
        each = sum(2 * K * sum(widths) for K, widths in products.values())
        n = min(MOST_LAYERS, -(-CHAIN_BYTES // each)) if device.type == "cuda" else 2
        weights = {
            name: [w.mul_(K**-0.5) for w in drawn(n, sum(widths), K, device=device)]
            for name, (K, widths) in products.items()
        }
        return cls(products, weights, new_counters(device), device)

    def x(self, name: str, R: int) -> Tensor:
        """What a product reads, of R rows."""
        return drawn(1, R, self.products[name][0], device=self.device)[0]

    def ours(self, tiles: Tiles | None = None) -> Multiply:
        """Our product with a layout, the rule's unless given. On a CPU the torch form."""

        def multiply(x: Tensor, weight: Tensor) -> Tensor:
            if tiles is None or not takes_kernel(x):
                return few_rows_linear(x, weight, None, self.counters)
            return few_rows_linear_triton(x, weight, None, self.counters, tiles)

        return multiply

    def of(self, name: str, R: int, multiply: Multiply) -> Action:
        """Call i multiplies R rows by the weight of layer i."""
        x, weights, widths = self.x(name, R), self.weights[name], self.products[name][1]
        return lambda i: multiply(x, weights[i % len(weights)]).split(widths, 1)

    def separate(self, name: str, R: int) -> Action:
        """The same by torch, a product for each sibling."""
        x, widths = self.x(name, R), self.products[name][1]
        weights = [w.split(widths) for w in self.weights[name]]
        return lambda i: tuple(linear(x, w) for w in weights[i % len(weights)])

    def layer(self, R: int, multiply: Mapping[str, Multiply], *, between: bool = False) -> Action:
        """Call i runs the products of layer i one behind another, each on a part of what the one ahead made.

        between: a small operation of torch before each, as norms and activations are.
        """
        names = list(self.products)
        x = self.x(names[0], R)

        def call(i: int) -> Tensor:
            y = x
            for name in names:
                weights = self.weights[name]
                y = y[:, : self.products[name][0]]
                y = multiply[name](y.neg() if between else y, weights[i % len(weights)])
            return y

        return call

    def separate_layer(self, R: int) -> Action:
        """The same by torch, a product for each sibling; reads the first of them."""
        names = list(self.products)
        x = self.x(names[0], R)
        parts = {name: [w.split(self.products[name][1]) for w in self.weights[name]] for name in names}

        def call(i: int) -> Tensor:
            y = x
            for name in names:
                weights = parts[name][i % len(parts[name])]
                outs = [linear(y[:, : self.products[name][0]], w) for w in weights]
                y = outs[0]
            return y

        return call


def _compile(job: tuple[Tiles, int, int, int]) -> None:
    """In a process of its own: compile what a product of a layout launches; what fails here fails where it is timed."""
    tiles, R, N, K = job
    device = torch.device("cuda", 0)
    x, weight = torch.zeros(R, K, device=device).bfloat16(), torch.zeros(N, K, device=device).bfloat16()
    for pdl in (True, False) if tiles == tiles_of(N, K) else (True,):
        form.PDL = pdl
        try:
            few_rows_linear_triton(x, weight, None, new_counters(device), tiles)
        except Exception:
            continue


def compile_all(jobs: Sequence[tuple[Tiles, int, int, int]], device: torch.device) -> None:
    """Fill Triton's cache, in several processes: compiling takes a second a kernel, and there are a hundred."""
    if device.type != "cuda":
        return
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))


def _share(bytes: float, spent: Spread, bandwidth: float) -> str:
    return f"{100 * bytes / bandwidth / spent.median * 1e6:.0f} %"


def tuned(layers: Layers, name: str, R: int) -> tuple[dict[Tiles, Spread], list[str]]:
    """Microseconds of a product in each layout, and which were left out."""
    K, widths = layers.products[name]

    some = layouts(sum(widths), K)
    actions = {text_of(tiles): layers.of(name, R, layers.ours(tiles)) for tiles in some}
    right = {JOINED: layers.of(name, R, linear)}
    found, skipped = race(right, actions, layers.device, rounds=7, calls=len(layers.weights[name]))
    timed = {tiles: found[text_of(tiles)] for tiles in some if text_of(tiles) in found}
    return timed, [f"{name}, {R} rows: {line}" for line in skipped]


@torch.inference_mode()
def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Layouts and rows of one model, or of all."""
    cpu = device.type == "cpu"
    models = {"tiny": TINY} if cpu else dict(list(MODELS.items())[: 1 if quick else None])
    for model, (products, (hidden, vocabulary)) in models.items():
        everything: Products = {**products, "head": (hidden, (vocabulary,))}
        layers = Layers.drawn(products, device)
        # Of a head, which is there once, two, which the cache does not hold either.
        head = [w.mul_(hidden**-0.5) for w in drawn(2, vocabulary, hidden, device=device)]
        whole = Layers(everything, {**layers.weights, "head": head}, layers.counters, device)
        best: dict[int, dict[str, Tiles]] = {}
        yield from _layouts(model, whole, best, cpu)
        yield from _rows(model, whole, products, best, cpu)
        del layers, head, whole
        free(device)


def _layouts(model: str, layers: Layers, best: dict[int, dict[str, Tiles]], cpu: bool) -> Iterator[Table]:
    """A row a product; leaves the best layout of each in `best`, by rows."""
    machine = peak(layers.device)
    shapes = {name: (sum(widths), K) for name, (K, widths) in layers.products.items()}
    grid = (2,) if cpu else TUNED_AT
    jobs = {
        (tiles, R, N, K): None
        for R, (N, K) in product((16, 32), shapes.values())
        for tiles in (layouts(N, K) if R in grid else [tiles_of(N, K)])
    }
    # One for each form of the kernel, which is the same for any multiples of 16.
    forms = {(replace(t), R, K % t.BLOCK_K): (t, R, N, K) for t, R, N, K in jobs}
    compile_all(list(forms.values()), layers.device)
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, object]] = []
    skipped: list[str] = []
    for R, (name, (N, K)) in product(grid, shapes.items()):
        found, left_out = tuned(layers, name, R)
        skipped += left_out
        ranked = sorted(found, key=lambda tiles: found[tiles].median)
        best.setdefault(R, {})[name] = ranked[0]
        rule = found.get(tiles_of(N, K))
        for place, tiles in enumerate(ranked[:4]):
            what = f"{R} rows: {name} [{N}, {K}]" if place == 0 else ""
            rows.append((what, text_of(tiles), found[tiles].text(), _share(2 * N * K, found[tiles], machine.bandwidth)))
        if rule is not None:
            rows.append(
                ("the rule's", text_of(tiles_of(N, K)), rule.text(), _share(2 * N * K, rule, machine.bandwidth))
            )
        records += [{"rows": R, "product": name, "us": None} for _ in range(len(rows) - len(records))]
        records[-1] = {
            "rows": R,
            "product": name,
            "us": [{**asdict(tiles), **asdict(found[tiles])} for tiles in ranked],
        }
        note = (
            "bf16, µs of a product in a graph, median (least–greatest); a layout is BLOCK_N x BLOCK_K / parts of K. "
            "The best four of those tried, and the rule's. Share of the bandwidth by the weight's bytes; "
            f"{machine.source}."
        )
        header = ("product", "layout", "µs", "bandwidth")
        yield Table(f"Layouts, {model}", note, header, list(rows), list(records), skipped=sorted(set(skipped)))


def _rows(
    model: str, layers: Layers, products: Products, best: Mapping[int, Mapping[str, Tiles]], cpu: bool
) -> Iterator[Table]:
    """A row for each number of rows and product, and the layer in all."""
    device, machine = layers.device, peak(layers.device)
    chain = Layers(products, {name: layers.weights[name] for name in products}, layers.counters, device)
    n = len(next(iter(chain.weights.values())))
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, object]] = []
    goals: list[Goal] = []
    skipped: list[str] = []
    for R in (1, 3) if cpu else GRID:
        chosen = best[next((at for at in sorted(best) if at >= R), max(best))]
        for name, (K, widths) in layers.products.items():
            actions: dict[str, Action] = {RULE: layers.of(name, R, layers.ours())}
            actions[BEST] = layers.of(name, R, layers.ours(chosen[name]))
            actions[NO_PDL] = with_constants(actions[RULE], form, PDL=False)
            if len(widths) > 1:
                actions[SEPARATE] = layers.separate(name, R)
            right = {JOINED: layers.of(name, R, linear)}
            found, left_out = race(right, actions, device, rounds=7, calls=len(layers.weights[name]))
            skipped += [f"{name}, {R} rows: {line}" for line in left_out]
            bytes = 2 * K * sum(widths)
            _add(rows, records, f"{R}: {name}", R, found, bytes, machine.bandwidth)
        by_rule, by_best = (
            {name: chain.ours(tiles) for name, tiles in some.items()}
            for some in (dict.fromkeys(products), {name: chosen[name] for name in products})
        )
        by_torch = dict.fromkeys(products, linear)
        theirs: dict[str, Action] = {RULE: chain.layer(R, by_rule), BEST: chain.layer(R, by_best)}
        theirs[NO_PDL] = with_constants(theirs[RULE], form, PDL=False)
        theirs[SEPARATE] = chain.separate_layer(R)
        # Four products and their roundings on the way.
        found, left_out = race({JOINED: chain.layer(R, by_torch)}, theirs, device, rounds=7, calls=n, tolerance=5e-2)
        between: dict[str, Action] = {OURS_BETWEEN: chain.layer(R, by_best, between=True)}
        right = {TORCH_BETWEEN: chain.layer(R, by_torch, between=True)}
        more, left_out_too = race(right, between, device, rounds=7, calls=n, tolerance=5e-2)
        skipped += [f"layer, {R} rows: {line}" for line in (*left_out, *left_out_too)]
        found |= more
        bytes = sum(2 * K * sum(widths) for K, widths in products.values())
        _add(rows, records, f"{R}: a layer", R, found, bytes, machine.bandwidth)
        if R == 16 and BEST in found:
            share = 100 * machine.floor(bytes=bytes) / found[BEST].median
            goals.append(Goal(f"{model}: a layer's products, 16 rows: share of the bandwidth", 80, share, "%"))
        note = (
            "bf16, µs in a graph over weights of several layers, median (least–greatest). Best layout: at "
            f"{' and '.join(map(str, best))} rows, above. Share of the bandwidth by the weights' bytes; "
            f"{machine.source}."
        )
        header = ("rows: product", *WAYS, "share, torch, joined", "share, ours, best")
        yield Table(f"Products, {model}", note, header, list(rows), list(records), list(goals), sorted(set(skipped)))


def _add(
    rows: list[tuple[str, ...]],
    records: list[dict[str, object]],
    what: str,
    R: int,
    found: Mapping[str, Spread],
    bytes: int,
    bandwidth: float,
) -> None:
    cells = (found[way].text() if way in found else "–" for way in WAYS)
    shares = (_share(bytes, found[way], bandwidth) if way in found else "–" for way in (JOINED, BEST))
    rows.append((what, *cells, *shares))
    records.append({"rows": R, "product": what.split(": ")[1], "bytes": bytes, "us": dict(found)})


def main() -> None:
    """Measure, print, write."""
    run("linear", "Linear layers with few rows", measure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
