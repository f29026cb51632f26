"""The model through torch.compile: what fusing its own small operations is worth, for our step and for Hugging Face's.

`python -m mtpkern.bench.compiled` captures steps in CUDA graphs with `compile` off and on, times `generate` as people
call it, and writes bench/results/compiled.{md,json}. Compiling takes most of the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.harness import interleaved
from mtpkern.bench.report import Goal, Table, run
from mtpkern.bench.step import Body, Point, Stand, build, floor
from mtpkern.bench.timing import Action, free, peak, reason, timed
from mtpkern.generation import generate
from mtpkern.strategies import Static


def pass_table(name: str, model: PreTrainedModel, points: list[Point]) -> Table:
    """Passes of a model as it is and compiled, in turns; the first point is token by token."""
    device = model.device
    stands: dict[tuple[Point, bool], Stand] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for at in points:
            for on in (False, True):
                stands[at, on] = Stand(model, at, Static(at.k), compile=on)
        actions: dict[str, Action] = {str(key): stand.step for key, stand in stands.items()}

        def reset() -> None:
            for stand in stands.values():
                stand.reset()

        with attention_context(model, Body()):
            found = timed(actions, device, reset=reset)
    # A forward that cannot be compiled runs as it is, and a warning says so.
    skipped = sorted({f"compiled: {w.message}" for w in caught if issubclass(w.category, RuntimeWarning)})
    rows, records, goals = [], [], []
    for at in points:
        plain, fused = found[str((at, False))], found[str((at, True))]
        least = floor(model, at)
        shares = [least / spread.median for spread in (plain, fused)]
        cells = (plain.text(0), fused.text(0), f"{plain.median / fused.median:.2f}", f"{least:.0f}")
        rows.append((str(at.B), str(at.L), str(at.R), *cells, *(f"{share:.0%}" for share in shares)))
        records.append({**vars(at), "us": plain, "compiled_us": fused, "floor_us": least})
        if at.B == 1 and at.R > 1 and not skipped:
            what = f"{name}, batch 1, 2k context, compiled"
            one = found[str((points[0], True))].median
            goals.append(Goal(f"{what}: {at.R} rows over 1", 1.15, fused.median / one, "×", at_most=True))
            goals.append(Goal(f"{what}, {at.R} rows: share of the floor", 80, shares[1] * 100, "%"))
    note = (
        "bf16, random weights, µs in a graph, median (least–greatest); every row in use. compiled: the model's forward "
        f"through torch.compile before the capture. Floor: weights, keys and values read once; {peak(device).source}."
    )
    header = ("batch", "context", "rows", "pass", "compiled", "ratio", "floor", "share", "share, compiled")
    return Table(f"A pass of {name}, compiled", note, header, rows, records, goals, skipped)


def generate_table(name: str, model: PreTrainedModel) -> Table:
    """Wall-clock tokens per second of one prompt: Hugging Face's generate as people call it, and ours."""
    device = model.device
    n = 4 if device.type == "cpu" else 128
    ids = torch.randint(2, model.config.vocab_size, (1, 4 * n), device=device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "do_sample": False}
    ways: dict[str, Callable[[], object]] = {
        "mtpkern.generate, Static(1)": partial(generate, model, ids, strategy=Static(1), **options),
        "HF generate": partial(model.generate, ids, **options),
        "HF generate, static cache, compiled": partial(model.generate, ids, cache_implementation="static", **options),
    }
    running, skipped = {}, []
    for way, call in ways.items():
        try:
            for _ in range(2):  # compiles
                call()
            running[way] = call
        except Exception as error:  # a foreign compiler's
            if way.startswith("mtpkern"):
                raise
            skipped.append(f"{way}: {reason(error)}")
    found = interleaved(running, 2 if device.type == "cpu" else 5, device, warm_up=0)
    rows, records = [], []
    for way, spread in found.items():
        rate = n / spread.median * 1e3
        rows.append((way, spread.text(1), f"{rate:.1f}"))
        records.append({"way": way, "ms": spread, "tokens_per_second": rate})
    note = f"Batch 1, {4 * n} prompt tokens, {n} new ones; ms of the whole call on the host's clock, prefill included."
    return Table(f"Token by token with {name}", note, ("way", "ms", "tokens/s"), rows, records, skipped=skipped)


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Qwen3-4B compiled; unless quick, Hugging Face's generate, larger batches and Llama-3.1-8B."""
    cpu = device.type == "cpu"
    L = 24 if cpu else 2048
    points = [Point(1, L, 1, 1), Point(1, L, 8, 15)]
    # To rehearse, tracing is enough; a CPU's code would need a C++ compiler.
    with patch("mtpkern.graph.BACKEND", "eager") if cpu else nullcontext():
        model = build("Qwen3-4B", device)
        yield pass_table("Qwen3-4B", model, points)
        if quick and not cpu:
            return
        yield generate_table("Qwen3-4B", model)
        del model
        free(device)
        if cpu:
            return
        yield pass_table("Llama-3.1-8B", build("Llama-3.1-8B", device), points)


def main() -> None:
    """Measure, print, write."""
    run("compiled", "Compiled models", measure)


if __name__ == "__main__":
    main()
