"""Tiles of span attention and blocks of the fused head that are not shipped, timed beside those that are.

To be run by hand on a new device; no table changes by itself. What wins here by more than the spread goes into TILES of
mtpkern.kernels.span_attention and BLOCK, WARPS and LOGITS of mtpkern.kernels.distill, with a line in docs/log.md.
Candidates whose results differ from the shipped ones, or that do not fit the device, are left out with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch

from mtpkern.bench.distill import ROWS, TINY_ROWS, TINY_VOCABULARY, VOCABULARY, Case, ours, step
from mtpkern.bench.distill import Inputs as HeadInputs
from mtpkern.bench.harness import Spread
from mtpkern.bench.report import Table, run
from mtpkern.bench.span_attention import SHAPES, TINY, Inputs, Shape, Way, with_ours
from mtpkern.bench.timing import Action, copies, free, race
from mtpkern.kernels import distill, span_attention
from mtpkern.kernels.span_attention import Tiles
from mtpkern.output import exit_status

SHIPPED = "shipped"

# Rows, keys, warps and stages, the most promising first; the launcher lowers stages that do not fit. Few, because each
# takes seconds to compile: what the compiler's report leaves open, see docs/log.md.
CANDIDATES = {
    kernel: [Tiles(*x) for x in grid]
    for kernel, grid in {
        "dkdv": ((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2)),
        "dq": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2)),
        "forward": ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 3)),
    }.items()
}


def span_actions(kernel: str, shape: Shape, way: Way) -> tuple[Tiles, dict[str, Action]]:
    """The shipped tiles of one kernel at a head dimension, and the calls that take others instead, by name."""
    table = span_attention.AMD_TILES if torch.version.hip else span_attention.TILES
    size = way.inputs[0].leaves[0].element_size()
    limits = table[kernel, size]
    limit = next(x for x in limits if shape.dim <= x)
    call = way.forward if kernel == "forward" else way.both

    def with_tiles(tiles: Tiles, i: int) -> object:
        with patch.dict(table, {(kernel, size): limits | {limit: tiles}}):
            return call(i)

    others = [tiles for tiles in CANDIDATES[kernel] if tiles != limits[limit]]
    return limits[limit], {"×".join(map(str, tiles)): partial(with_tiles, tiles) for tiles in others}


def measure_span(kernel: str, shape: Shape, device: torch.device, rounds: int) -> Table:
    """All candidates of one kernel; backward's kernels in a whole forward and backward."""
    torch.manual_seed(0)
    layout = shape.layout().to(device)
    rows = layout.position.shape[1]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = dtype.itemsize * shape.batch * rows * shape.dim * 2 * (shape.heads + shape.kv_heads)
    way = Way(with_ours(layout), [Inputs.draw(shape, rows, dtype, device) for _ in range(copies(size, device))])
    shipped, others = span_actions(kernel, shape, way)
    times, skipped = race(
        {SHIPPED: way.forward if kernel == "forward" else way.both},
        others,
        device,
        rounds=rounds,
        calls=len(way.inputs),
    )
    what = "forward" if kernel == "forward" else "forward and backward"
    note = f"{shape.text()}, {dtype}; {what}; rows × keys × warps × stages, shipped: {'×'.join(map(str, shipped))}."
    return ranking(f"Tiles of {kernel}, D = {shape.dim}", note, times, skipped)


def measure_head(case: Case, device: torch.device, rounds: int) -> Table:
    """Blocks, warps and bytes of logits of the fused head and loss."""
    torch.manual_seed(0)
    inputs = HeadInputs.draw(case, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    names = "BLOCK", "WARPS", "LOGITS"
    shipped = tuple(getattr(distill, name) for name in names)

    def with_blocks(values: tuple[int, ...], i: int) -> object:
        with ExitStack() as stack:
            for name, value in zip(names, values, strict=True):
                stack.enter_context(patch.object(distill, name, value))
            return step(ours, inputs)

    block, warps, logits = shipped
    grid = {(b, w, logits) for b, w in ((2048, 4), (4096, 4), (8192, 8), (8192, 16), (16384, 32))}
    grid |= {(block, warps, x) for x in (logits // 2, 2 * logits)}
    others = {"×".join(map(str, x)): partial(with_blocks, x) for x in sorted(grid - {shipped})}
    times, skipped = race({SHIPPED: partial(step, ours, inputs)}, others, device, rounds=rounds, graph=False)
    note = f"R = {case.rows:,}, V = {case.vocabulary:,}, H = {case.width:,}; block × warps × bytes of logits, shipped: "
    return ranking(f"Head and loss, {case.text()}", note + "×".join(map(str, shipped)) + ".", times, skipped)


def ranking(caption: str, note: str, times: Mapping[str, Spread], skipped: list[str]) -> Table:
    """The fastest first, in microseconds."""
    order = sorted(times, key=lambda name: times[name].median)
    rows = [(name, times[name].text(1), f"{times[name].median / times[SHIPPED].median:.3f}") for name in order]
    records = [{"candidate": name, "time": times[name]} for name in order]
    return Table(caption, note, ("candidate", "time", "of shipped"), rows, records, (), skipped)


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """A table a kernel: of head dimension 128, without `quick` of 64 and 256 too; then of the head."""
    cuda, rounds = device.type == "cuda", 10
    main = SHAPES[0]
    shapes = (
        [main] if quick else [main, Shape(main.batch, main.tokens, dim=64), Shape(main.batch, main.tokens, dim=256)]
    )
    for shape in shapes if cuda else TINY[:1]:
        for kernel in CANDIDATES:
            yield measure_span(kernel, shape, device, rounds)
            free(device)
    for soft in (False, True):
        size = (ROWS, VOCABULARY, 1024) if cuda else (TINY_ROWS, TINY_VOCABULARY, 16)
        yield measure_head(Case(*size, soft=soft, trained=True), device, rounds)
        free(device)


def main() -> None:
    """The command line."""
    run("tiles", "Tiles and blocks of the training kernels", measure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
