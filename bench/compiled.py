"""A pass by its rows, as it is and its layers through torch.compile, against its floor.

Steps are captured in CUDA graphs, with `compile` off and on. Compiling takes most of the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from transformers import PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.models import build, compiling
from mtpkern.bench.report import Goal, Table, cells, program
from mtpkern.bench.step import Body, Point, Stand, floor, reset
from mtpkern.bench.timing import Spread, free, peak, timed
from mtpkern.strategies import Static

PLAIN, COMPILED = "as it is", "compiled"


def times(model: PreTrainedModel, points: Sequence[Point]) -> Iterator[tuple[Point, dict[str, Spread], list[str]]]:
    """Of passes of one batch and context: each point, its times as it is and compiled, in turns, and what failed.

    All share one set of caches, which is gone with the last point.
    """
    first: Stand | None = None
    for at in points:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            plain = Stand(model, at, Static(at.k), share=first)
            first = first or plain
            fused = Stand(model, at, Static(at.k), share=first, compile=True)
            with attention_context(model, Body()):
                found = timed(
                    {PLAIN: plain.step, COMPILED: fused.step}, model.device, reset=partial(reset, [plain, fused])
                )
        # Layers that cannot be compiled run as they are, and a warning says so.
        yield at, found, [f"{COMPILED}: {w.message}" for w in caught if issubclass(w.category, RuntimeWarning)]


def pass_tables(name: str, model: PreTrainedModel, points: Sequence[Point]) -> Iterator[Table]:
    """The table so far, after each point; points of one batch and context stand together."""
    device = model.device
    note = (
        "bf16, random weights, µs in a graph, median (least–greatest); every row in use. compiled: each decoder layer "
        "through torch.compile before the capture, attention kept out. Floor: weights, keys and values read once; "
        f"{peak(device).source}."
    )
    header = ("batch", "context", "rows", "pass", "compiled", "ratio", "floor", "share", "share, compiled")
    table = Table(f"A pass of {name}, compiled", note, header)
    fused: dict[Point, float] = {}
    for _, group in groupby(points, key=lambda at: (at.B, at.L)):
        for at, found, failed in times(model, list(group)):
            plain, fast = found[PLAIN], found[COMPILED]
            if not failed:
                fused[at] = fast.median
            least = floor(model, at)
            shares = (f"{least / spread.median:.0%}" for spread in (plain, fast))
            ratio = f"{plain.median / fast.median:.2f}"
            row = (str(at.B), str(at.L), str(at.R), *cells(found, (PLAIN, COMPILED), 0), ratio, f"{least:.0f}", *shares)
            record = {**vars(at), "us": plain, "compiled_us": fast, "floor_us": least}
            table = replace(table.plus(row, record, skipped=failed), goals=_goals(name, model, fused))
            yield table
        free(device)


def _goals(name: str, model: PreTrainedModel, fused: Mapping[Point, float]) -> list[Goal]:
    """What 15 rows of one text may cost, where those and the pass token by token have been compiled."""
    one, many = (next((at for at in fused if (at.B, at.R) == (1, R)), None) for R in (1, 15))
    if many is None:
        return []
    what = f"{name}, batch 1, 2k context, compiled"
    share = floor(model, many) / fused[many] * 100
    goals = [Goal(f"{what}, 15 rows: share of the floor", 80, share, "%")]
    if one is not None:
        goals.append(Goal(f"{what}: 15 rows over 1", 1.15, fused[many] / fused[one], "×", at_most=True))
    return goals


def grid(device: torch.device) -> list[Point]:
    """The most telling first, because compiling one takes long: k = 8 at batch 1, and token by token."""
    cpu = device.type == "cpu"
    L = 24 if cpu else 2048
    one = [Point(1, L, 8, 15), Point(1, L, 1, 1), Point(1, L, 12, 23)]
    wide = [(16, 12, 192), (16, 1, 16), (64, 4, 256), (64, 1, 64)]
    return [*one[:2], Point(2, L, 3, 6)] if cpu else [*one, *(Point(B, L, k, R) for B, k, R in wide)]


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Qwen3-4B compiled at batch 1, 16 and 64; unless quick, Llama-3.1-8B."""
    with compiling(device):
        model = build("Qwen3-4B", device)
        yield from pass_tables("Qwen3-4B", model, grid(device))
        if quick or device.type == "cpu":
            return
        del model
        free(device)
        yield from pass_tables("Llama-3.1-8B", build("Llama-3.1-8B", device), grid(device)[:2])


if __name__ == "__main__":
    program("compiled", "Compiled models", measure)
