"""What a decoding step knows, on the device: its sequences, the rows of a pass, and the terms that the host sets.

Every tensor keeps its address from pass to pass and from run to run (see mtpkern.decoder).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

RUNNING, STOPPED, LIMIT, FAULT = 0, 1, 2, 3


@dataclass(frozen=True)
class Sequences:
    """What decoding knows of B sequences, all on the device and never moved. C is the capacity.

    tokens [B, C + 1] int64 (column C is trash); length, pending, limit, passes [B] int64; status [B] int64 (RUNNING,
    STOPPED at a stop token, LIMIT reached, FAULT in the logits); blocks [B, P + 1] int64, the tokens that each pass
    emitted, one column a pass (column P is trash). `length` counts prompt and standing tokens; `limit` bounds it.
    hits, chains [B] int64: drafts confirmed of late and chains that have ended, in 1 / UNIT (kernels/worth.py).
    """

    tokens: Tensor
    length: Tensor
    pending: Tensor
    limit: Tensor
    status: Tensor
    passes: Tensor
    hits: Tensor
    chains: Tensor
    blocks: Tensor

    @classmethod
    def allocate(cls, batch: int, capacity: int, max_passes: int, device: torch.device) -> Sequences:
        """B empty running sequences that hold up to `capacity` tokens and `max_passes` passes."""
        shapes = {"tokens": (batch, capacity + 1), "blocks": (batch, max_passes + 1)}
        names = (field.name for field in fields(cls))
        return cls(*(torch.zeros(shapes.get(x, (batch,)), dtype=torch.int64, device=device) for x in names))


@dataclass(frozen=True)
class Rows:
    """The rows of one pass: seq, position, slot, token, prefix_end, span_start [R], start [B + 1], behind [B, K] int64.

    Sequence b owns the rows start[b] .. start[b + 1] - 1: its pending tokens, the masks behind the last, then those
    behind others. Rows from start[B] are unused: slot C + masks, which is trash, position 0, token 0, nothing seen.
    Where masks may stand behind others than the last, behind[b, i] of them stand behind the i-th pending token.
    """

    seq: Tensor
    position: Tensor
    slot: Tensor
    token: Tensor
    prefix_end: Tensor
    span_start: Tensor
    start: Tensor
    behind: Tensor

    @classmethod
    def allocate(cls, rows: int, batch: int, device: torch.device, k: int = 1) -> Rows:
        """R rows, planned by the first `advance`; `start` says where the rows of the pass before stood."""
        # Each begins at a multiple of 16 bytes: for others Triton makes a variant of its own. Newcomers may have an odd
        # number of rows where passes have an even one (mtpkern.slots), and would wait for theirs while others run.
        table = torch.zeros(6, rows + rows % 2, dtype=torch.int64, device=device)[:, :rows]
        seq, position, slot, token, prefix_end, span_start = table
        start, behind = (torch.zeros(n, dtype=torch.int64, device=device) for n in ((batch + 1,), (batch, k)))
        return cls(seq, position, slot, token, prefix_end, span_start, start, behind)

    def expect_prefill(self, k: int) -> None:
        """Describe the prefill to the first `advance`: k rows a sequence, its last token's and k - 1 masks'."""
        self.start.copy_(torch.arange(len(self.start), device=self.start.device) * k)
        self.behind[:, 0] = k - 1

    def first(self, rows: int) -> Rows:
        """The first `rows` of these, in the same memory; all of them where there are no more."""
        if rows >= len(self.seq):
            return self
        return Rows(*(x if x is self.start or x is self.behind else x[:rows] for x in vars(self).values()))


@dataclass(frozen=True)
class Terms:
    """On what terms a pass accepts and plans; the host sets them, the device reads them.

    threshold [] float: a prediction above it is sure. stop_ids [B, S] int64, each sequence's own; -1 matches nothing.
    price [] float64, with verification only: the tokens that a row of the next pass must promise (kernels/worth.py); 0
    buys all that fit. budget [] int64, likewise: the rows that the next pass has, from B up to R; R where it is None.
    """

    threshold: Tensor
    stop_ids: Tensor
    price: Tensor
    budget: Tensor | None = None

    @classmethod
    def allocate(cls, stops: int, batch: int, device: torch.device, budget: int | None = None) -> Terms:
        """Threshold 0, room for `stops` stop tokens of each sequence, price 0, and a budget if one is to be set."""
        return cls(
            torch.zeros((), dtype=torch.float32, device=device),
            torch.full((batch, stops), -1, dtype=torch.int64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
            None if budget is None else torch.full((), budget, dtype=torch.int64, device=device),
        )
