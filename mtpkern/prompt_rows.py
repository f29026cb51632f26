"""Prompt rows: those in which a captured pass reads prompts, behind the rows that it decodes (chunked prefill).

A prompt that is read apart costs the host a launch for each small operation of the model, which takes as long as
several captured passes, and meanwhile nobody else's tokens come. So there is one more captured pass, with rows for
prompts besides. The host plans these, since it knows the prompts, and sends them in one copy. To the model they are
rows as all others; attention takes them apart (`KVCache.beside`), and `advance` learns of a newcomer when its last
token, and the masks behind it, have been read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtpkern.graph import StepGraph
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.load import Ladder

# Rows of prompts in a pass: with those of a batch about as many as a GPU computes in the time of reading its weights.
PROMPT_ROWS = 128
# Prompts of more passes are read apart: a GPU is busy with them longer than the host; and where nobody waits meanwhile,
# the host's time is that of so many.
MOST_PASSES, MOST_PASSES_ALONE = 8, 4


@dataclass(frozen=True)
class Piece:
    """Tokens [n] of one prompt at positions from `first` on, for sequence `slot`; ends: its last token and masks."""

    slot: int
    first: int
    tokens: np.ndarray
    ends: bool


def pieces_of(prompts: Sequence[tuple[int, np.ndarray, int]], masks: Sequence[int], rows: int) -> Iterator[list[Piece]]:
    """What each pass has of prompts (slot, ids [T], how many of them are read already), with masks behind them.

    Several are to fit in one pass; of one alone the last token is never parted from its masks.

        list(pieces_of([(0, ids, 0)], [mask] * 7, rows=128))
    """
    prompts = sorted(prompts, key=lambda prompt: prompt[0])
    whole = [np.concatenate([ids[known:], np.array(masks, dtype=np.int64)]) for _, ids, known in prompts]
    if len(prompts) == 1:
        (slot, ids, at), (tokens,) = prompts[0], whole
        while len(tokens) > rows:
            n = min(rows, len(ids) - 1 - at)
            yield [Piece(slot, at, tokens[:n], ends=False)]
            tokens, at = tokens[n:], at + n
        yield [Piece(slot, at, tokens, ends=True)]
        return
    assert sum(map(len, whole)) <= rows
    yield [Piece(slot, known, tokens, ends=True) for (slot, _, known), tokens in zip(prompts, whole)]


class PromptRows:
    """Room for `rows` rows of prompts in a pass of B sequences with k predictions each, at addresses that stay.

    seq, position, slot, token, prefix_end, span_start [n], start [B + 1]: as in `Rows`. place [W]: which of the rows
    are last tokens and masks, with the sequence and position of each, tail_seq, tail_position [W], and where those of
    each sequence begin, tail_start [B + 1]. What these have read: read_token [W] int64, read_confidence [W].

        rows = PromptRows(128, batch=4, k=8, dtype=torch.float32, device=device)
        for pieces in pieces_of(prompts, masks, len(rows)):
            rows.bring(pieces, trash=cache.capacity, scratch=cache.scratch, last_position=None)
            ...    # a pass
    """

    def __init__(self, rows: int, *, batch: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch, self.k, self.device = batch, k, device
        tails = min(batch, rows // k) * k
        self._sizes = [*[rows] * 6, batch + 1, *[tails] * 3, batch + 1]
        self._numbers = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        rows_of, tails_of = self._numbers.split(self._sizes)[:7], self._numbers.split(self._sizes)[7:]
        self.seq, self.position, self.slot, self.token, self.prefix_end, self.span_start, self.start = rows_of
        self.place, self.tail_seq, self.tail_position, self.tail_start = tails_of
        self.read_token = torch.zeros(tails, dtype=torch.int64, device=device)
        self.read_confidence = torch.zeros(tails, dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self.token)

    def bring(self, pieces: Sequence[Piece], *, trash: int, scratch: int, last_position: int | None) -> None:
        """Have the next pass read these, in the order of their slots; nobody waits for the copy.

        trash, scratch: as of the `KVCache`. last_position: the last that the model has learned, if any.
        """
        numbers = np.zeros(sum(self._sizes), dtype=np.int64)
        parts = np.split(numbers, np.cumsum(self._sizes)[:-1])
        seq, position, slot, token, prefix_end, span_start, start, place, tail_seq, tail_position, tail_start = parts
        seq[:], slot[:], span_start[:] = self.batch - 1, trash, trash + 1
        tail_seq[:] = self.batch - 1
        row = tail = 0
        for piece in pieces:
            here = slice(row, row := row + len(piece.tokens))
            at = piece.first + np.arange(len(piece.tokens))
            seq[here], position[here], token[here] = piece.slot, at, piece.tokens
            # Masks behind the end of the room stand nowhere and see nothing.
            stands = scratch + at < trash
            slot[here] = np.where(stands, scratch + at, trash)
            prefix_end[here] = np.where(stands, scratch + at + 1, 0)
            span_start[here] = np.where(stands, scratch + at + 1, trash + 1)
            start[piece.slot + 1 :] = row
            if piece.ends:
                there = slice(tail, tail := tail + self.k)
                place[there] = np.arange(row - self.k, row)
                tail_seq[there], tail_position[there] = piece.slot, at[-self.k :]
                tail_start[piece.slot + 1 :] = tail
        if last_position is not None:
            np.minimum(position, last_position, out=position)
        here_on = torch.from_numpy(numbers)
        if self.device.type == "cuda":
            here_on = here_on.pin_memory()
        self._numbers.copy_(here_on, non_blocking=True)

    def packed(self, scratch: int) -> PackedRows:
        """As attention takes them, apart from all others; scratch: as of the `KVCache`."""
        spans = (self.prefix_end, self.span_start, scratch) if scratch else ()
        return PackedRows(self.seq, self.slot, self.start, len(self), *spans)

    def tails(self, logits: Tensor) -> Tensor:
        """Those of last tokens and masks [W, V], of the logits [n, V] of all."""
        return logits.index_select(0, self.place)

    def keep(self, token: Tensor, confidence: Tensor) -> None:
        """Keep what last tokens and masks [W] have read."""
        self.read_token.copy_(token)
        self.read_confidence.copy_(confidence)


class Reads(NamedTuple):
    """The form of a captured pass of so many rows that reads prompts besides."""

    rows: int


class ReadingCost:
    """What reading prompts has cost a decoder: a graph is made as soon as it would have saved what the first one took.

    apart     the host's seconds in reading prompts apart, of whatever length
    saved     by rung, seconds of passes that read, for rows that were not planned

        cost = ReadingCost()
        cost.is_met(graph, most=192, passes=2, alone=False)    # whether passes read, 192 being the highest rung
        cost.rung(graph, ladder, rows=64)                      # the rung of one for which 64 rows are planned
    """

    def __init__(self) -> None:
        self.apart = 0.0
        self.saved: defaultdict[int, float] = defaultdict(float)

    def is_met(self, graph: StepGraph, most: int, passes: int, *, alone: bool) -> bool:
        """Whether prompts of so many passes are read by these."""
        if passes > (MOST_PASSES_ALONE if alone else MOST_PASSES):
            return False
        if Reads(most) in graph.captured:
            return True
        return most in graph.captured and graph.may_have(Reads(most)) and self.apart >= graph.seconds[most]

    def rung(self, graph: StepGraph, ladder: Ladder, rows: int) -> int:
        """Rows of a pass that reads where so many are planned: as many, or the fewest that a graph is there for."""
        most, times = ladder.rungs[-1], ladder.times
        there = [rung for rung in ladder.rungs if rung >= rows and Reads(rung) in graph.captured]
        wider = min(there, default=most)
        if wider > rows and there and times.seconds and graph.may_have(Reads(rows)):
            seconds = times.of(np.array([rows, wider]))
            self.saved[rows] += float(seconds[1] - seconds[0])
            if self.saved[rows] >= graph.seconds[most]:
                return rows
        return wider
