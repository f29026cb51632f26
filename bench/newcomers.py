"""Requests a second where prompts are read apart, by the model alone, and where passes read them besides.

Random weights, so that no draft is right and passes have few rows: more of the time is the prompts' than in use. On a
CPU, where passes read none, both ways are one, and the run is a rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from mtpkern.batching import generate_batch
from mtpkern.bench.models import build
from mtpkern.bench.report import Table, program
from mtpkern.bench.timing import Spread, interleaved
from mtpkern.decoder import Decoder

MODEL = "Qwen3-4B"
HEADER = ("slots", "tokens of a prompt", "new ones", "requests/s, apart", "requests/s, besides", "besides over apart")


def _apart(decoder: Decoder, rows: int, *, alone: bool) -> bool:
    return False


def _besides(decoder: Decoder, rows: int, *, alone: bool) -> bool:
    """As soon as there is a graph of passes."""
    return decoder.graph is not None and len(decoder.all_rows.seq) in decoder.graph.captured


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Prompts of one length, answers of many, so that slots come free one by one; row by row."""
    torch.manual_seed(0)
    cpu = device.type == "cpu"
    model = build(MODEL, device)
    rounds = 2 if cpu else 5
    note = f"Four requests for each slot, in turns, medians of {rounds} rounds; least and greatest in brackets."
    table = Table(f"Newcomers among requests to {MODEL}", note, HEADER)
    points = [(2, 6, 4)] if cpu else [(16, 100, 64), (16, 400, 64), (4, 100, 64), (16, 1000, 64)]
    for batch, T, new in points[:2] if quick else points:
        requests = 4 * batch
        prompts = torch.randint(2, model.config.vocab_size, (requests, T)).tolist()
        # From half to one and a half times as many.
        limits = [new // 2 + i * 7 % (new + 1) for i in range(requests)]
        options: dict[str, Any] = {"max_new_tokens": limits, "batch_size": batch, "order": "given", "reuse": False}
        run = partial(generate_batch, model, prompts, check_model=False, **options)

        def way(reads: Callable[..., bool], run: Callable[[], object] = run) -> None:
            with patch.object(Decoder, "reads_beside", reads):
                run()

        ways = {"apart": partial(way, _apart), "besides": partial(way, _besides)}
        times = interleaved(ways, rounds, device, warm_up=2)
        rates = {name: Spread.of([requests / x * 1e3 for x in (t.median, t.low, t.high)]) for name, t in times.items()}
        ratio = times["apart"].median / times["besides"].median
        row = str(batch), str(T), str(new), *(rates[name].text(1) for name in times), f"{ratio:.2f}"
        table = table.plus(row, {"batch": batch, "prompt": T, "new": new, "requests_per_second": rates, "ratio": ratio})
        yield table


if __name__ == "__main__":
    program("newcomers", "Newcomers", measure)
