"""Whole calls token by token: Hugging Face's generate, also with its static cache compiled, and ours.

Compiling theirs takes most of the time: it is the whole model, where ours are a few forms of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mtpkern.bench.models import build, compiling
from mtpkern.bench.report import Table, percent, program
from mtpkern.bench.step import bytes_read
from mtpkern.bench.timing import attempted, interleaved, share_of_peak
from mtpkern.generation import generate
from mtpkern.strategies import Static

MODEL = "Qwen3-4B"
OURS, COMPILED = "mtpkern.generate, Static(1)", "mtpkern.generate, Static(1), compiled"
THEIRS, STATIC = "HF generate", "HF generate, static cache, compiled"
HEADER = ("way", "ms", "tokens/s", "ours is faster by", "bandwidth")


def warmed(call: Callable[[], object]) -> Callable[[], object]:
    """The call, once it has been compiled and captured."""
    for _ in range(2):
        call()
    return call


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Of one prompt, ours alone at once and then every way; quick: the compiled ones."""
    torch.manual_seed(0)
    cpu = device.type == "cpu"
    model = build(MODEL, device)
    n = 4 if cpu else 128
    ids = torch.randint(2, model.config.vocab_size, (1, 4 * n), device=device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "do_sample": False}
    decode = partial(generate, model, ids, strategy=Static(1), **options)
    ways: dict[str, Callable[[], object]] = {
        COMPILED: partial(decode, compile=True),
        STATIC: partial(model.generate, ids, cache_implementation="static", **options),
        OURS: partial(decode, compile=False),
        THEIRS: partial(model.generate, ids, **options),
    }
    note = (
        f"Batch 1, {4 * n} prompt tokens, {n} new ones; ms of the whole call on the host's clock, prefill included. "
        "bandwidth: weights, keys and values once a token, over the call."
    )
    with compiling(device):
        for names in ([COMPILED], [COMPILED, STATIC] if quick else list(ways)):
            found, skipped = attempted({name: partial(warmed, ways[name]) for name in names}, [COMPILED, OURS])
            table = Table(f"Token by token with {MODEL}", note, HEADER, skipped=skipped)
            times = interleaved(found, 2 if cpu else 5, device, warm_up=0)
            for name, spread in times.items():
                rate, faster = n / spread.median * 1e3, spread.median / times[COMPILED].median
                share = share_of_peak(device, 1e3 * spread.median, bytes=n * bytes_read(model, 1, 4 * n + n // 2))
                row = name, spread.text(1), f"{rate:.1f}", f"{faster:.2f}", percent(share)
                record = {"way": name, "ms": spread, "tokens_per_second": rate, "ratio": faster, "bandwidth": share}
                table = table.plus(row, record)
            yield table


if __name__ == "__main__":
    program("token_by_token", "Token by token", measure)
