"""What a training run logs: statistics of its spans, and how much it has trained on a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mtpkern.train.objective import MTPLoss


class Seen:
    """What a rank has trained on since the last log, and since when."""

    def __init__(self) -> None:
        self.texts = self.span_rows = self.tokens = 0
        self.since = time.perf_counter()

    def add(self, texts: int, span_rows: int, tokens: int) -> None:
        """Count a micro-batch."""
        self.texts += texts
        self.span_rows += span_rows
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """What this rank has trained on a second, in tokens without the masks; on a GPU, the peak of memory in GiB."""
        seconds = time.perf_counter() - self.since
        rates = {f"{name}_per_second": getattr(self, name) / seconds for name in ("texts", "span_rows", "tokens")}
        if torch.cuda.is_available():
            rates["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return rates


def span_statistics(
    collected: Iterable[MTPLoss], *, k_max: int, device: torch.device, reduce: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Means over the collected batches and, by `reduce`, all ranks; rows of different k are padded to k_max.

    span_statistics(sums, k_max=4, device=device, reduce=lambda table: table)  # {"agreement": 0.7, ...}
    """
    table = torch.zeros(5, max(2, k_max), dtype=torch.float32, device=device)
    for sums in collected:
        table[:4, : len(sums.rows)] += torch.stack([sums.agree, sums.rows, sums.confidence, sums.entropy])
        table[4, :2] += torch.stack([sums.agreeing_prefix, sums.spans])
    agree, rows, confidence, entropy, other = reduce(table).tolist()
    logs = {"agreement": sum(agree) / max(1.0, sum(rows)), "agreeing_prefix": other[0] / max(1.0, other[1])}
    for j, n in enumerate(rows):
        if n:
            logs[f"agreement_{j + 1}"] = agree[j] / n
            logs[f"confidence_{j + 1}"] = confidence[j] / n
            logs[f"entropy_{j + 1}"] = entropy[j] / n
    return logs
