"""Readout, top-k, top-p and advance: what a pass spends between the model's logits and the next pass's rows.

The Triton forms against the same in separate torch operations, each in a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mtpkern.bench.report import Goal, Table, cells, program
from mtpkern.bench.timing import Spread, copies, drawn, free, launches, peak, race
from mtpkern.kernels.advance import advance
from mtpkern.kernels.keep_top import keep_top_k, keep_top_p
from mtpkern.kernels.readout import readout
from mtpkern.kernels.state import Rows, Sequences, Terms

READOUT_REFERENCE, ADVANCE_REFERENCE = readout.reference, advance.reference

V = 151_936  # Qwen3
K = 8
WAYS = OURS, TORCH = "ours", "torch operations"
# More than all calls of a timing make: every call is a pass, and each accepts a token at least.
_PASSES = 8192


class Taken:
    """A batch whose readout and `advance` can be called over and over: each call is one more pass of it.

    R = batch * (2k - 1) rows of random logits, whose confidences are far below the threshold: each pass keeps one token
    a sequence, and deals out all masks.
    """

    def __init__(
        self, batch: int, vocabulary: int, device: torch.device, *, ours: bool, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        R = batch * (2 * K - 1)
        passes = _PASSES if device.type == "cuda" else 64
        self.readout: Callable[..., tuple[Tensor, Tensor]] = readout if ours else READOUT_REFERENCE
        self.advance: Callable[..., None] = advance if ours else ADVANCE_REFERENCE
        self.sequences = Sequences.allocate(batch, passes + 2 * K, passes, device)
        self.rows = Rows.allocate(R, batch, device)
        self.logits = _random_logits(R, vocabulary, device, dtype)
        self.terms = Terms.allocate(1, batch, device)
        self.terms.threshold.fill_(0.5)
        self.sequences.length.fill_(1)
        self.sequences.pending.fill_(1)
        self.sequences.limit.fill_(passes + K)
        # As after a prefill: each sequence has read its last token's row and those of k - 1 masks.
        self.rows.start.copy_(torch.arange(batch + 1, device=device) * K)
        self.token, self.confidence = self.readout(self.logits[0][: batch * K], vocabulary - 1)
        self.vocabulary = vocabulary
        self.advance_(0)
        self.token, self.confidence = self.readout(self.logits[0], vocabulary - 1)

    def readout_(self, i: int) -> tuple[Tensor, Tensor]:
        """Token and confidence [R] of the i-th copy of the logits."""
        return self.readout(self.logits[i % len(self.logits)], self.vocabulary - 1)

    def advance_(self, i: int) -> tuple[Tensor, ...]:
        """Take one pass in; returns the plan of the next."""
        return self._take_in(self.token, self.confidence)

    def both(self, i: int) -> tuple[Tensor, ...]:
        """Readout and `advance`, as in a pass."""
        return self._take_in(*self.readout_(i))

    def _take_in(self, token: Tensor, confidence: Tensor) -> tuple[Tensor, ...]:
        rows, options = self.rows, {"k": K, "verify": True, "mask_token_id": self.vocabulary - 1}
        self.advance(self.sequences, rows, self.terms, token, confidence, **options)
        return rows.seq, rows.position, rows.slot, rows.token, rows.start


ROWS = (1, 2, 4, 8, 15, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 4, 16, 64, 256, 1024)


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Readout and top-k with top-p over row counts; readout and advance as a pass calls them. A row at a time."""
    cpu = device.type == "cpu"
    vocabulary = 1000 if cpu else V
    yield from _readout_tables(device, vocabulary, (1, 3) if cpu else (16, 128) if quick else ROWS)
    yield from _keep_top_tables(device, vocabulary, (1, 3) if cpu else (16, 128) if quick else (1, 15, 64, 128, 256))
    note = f"V = {vocabulary}, k = {K}, bf16; µs in a graph, logits read from memory."
    both = (1, 2) if cpu else (1,) if quick else (1, 2, 4, 16, 32)
    goals: list[Goal] = []
    for table, times in _taken_tables("Readout and advance", note, "both", device, vocabulary, both):
        # The first batch is one sequence.
        if not goals:
            ours, theirs = times[OURS].median, times[TORCH].median
            goals.append(Goal("readout + advance, 15 rows, V 152k", 10, ours, "µs", at_most=True))
            goals.append(Goal("readout + advance over separate torch operations", 8, theirs / ours, "×"))
        yield replace(table, goals=goals)
    note = f"k = {K}, {2 * K - 1} rows a sequence, Verified; µs in a graph."
    some = (1, 3) if cpu else (16,) if quick else BATCHES
    for table, _ in _taken_tables("Advance", note, "advance_", device, 64, some):
        yield table


def _readout_tables(device: torch.device, vocabulary: int, grid: tuple[int, ...]) -> Iterator[Table]:
    note = (
        f"V = {vocabulary}, bf16, µs in a graph, logits read from memory, median (least–greatest). Floor: reading the "
        f"logits once; {peak(device).source}."
    )
    table = Table("Readout", note, ("rows", *WAYS, "floor", "share of bandwidth", "ratio"))
    for R in grid:
        times = _readout_times(R, vocabulary, device)
        free(device)
        floor = peak(device).floor(bytes=2 * R * vocabulary)
        share = floor / times[OURS].median
        goals = {
            16: Goal("readout of 16 rows, V 152k", 6, times[OURS].median, "µs", at_most=True),
            128: Goal("readout of 128 rows: share of bandwidth", 80, share * 100, "%"),
        }
        row = (str(R), *cells(times, WAYS), f"{floor:.1f}", f"{share:.0%}", _ratio(times))
        table = table.plus(row, {"rows": R, "us": times, "floor_us": floor}, *([goals[R]] if R in goals else []))
        yield table


def _keep_top_tables(device: torch.device, vocabulary: int, grid: tuple[int, ...]) -> Iterator[Table]:
    note = (
        f"V = {vocabulary}, float32 scores, k = 50, then p = 0.9; µs in a graph, scores read from memory, median "
        f"(least–greatest). Torch operations sort. Floor: reading and writing them for "
        f"top-k, top-p and what bounds them below for a comparison; {peak(device).source}."
    )
    table = Table("Top-k and top-p", note, ("rows", *WAYS, "floor", "ratio"))
    for R in grid:
        times = _keep_top_times(R, vocabulary, device)
        free(device)
        floor = peak(device).floor(bytes=6 * 4 * R * vocabulary)
        row = (str(R), *cells(times, WAYS), f"{floor:.1f}", _ratio(times))
        table = table.plus(row, {"rows": R, "us": times, "floor_us": floor})
        yield table


def _keep_top_times(R: int, vocabulary: int, device: torch.device) -> dict[str, Spread]:
    scores = _random_logits(R, vocabulary, device, torch.float32)
    n, k, rest = len(scores), torch.full((R,), 50.0, device=device), torch.full((R,), 0.1, device=device)
    by_k, by_p = keep_top_k.reference, keep_top_p.reference
    # What is compared is to be finite.
    actions: dict[str, Callable[[int], Tensor]] = {
        OURS: lambda i: keep_top_p(keep_top_k(scores[i % n], k), rest).clamp_(min=-99.0),
        TORCH: lambda i: by_p(by_k(scores[i % n], k), rest).clamp_(min=-99.0),
    }
    return race(actions, {}, device, calls=n)[0]


def _readout_times(R: int, vocabulary: int, device: torch.device) -> dict[str, Spread]:
    logits = _random_logits(R, vocabulary, device)
    n, mask = len(logits), vocabulary - 1
    actions = {OURS: lambda i: readout(logits[i % n], mask), TORCH: lambda i: READOUT_REFERENCE(logits[i % n], mask)}
    return race(actions, {}, device, calls=n)[0]


def _random_logits(R: int, vocabulary: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return drawn(copies(dtype.itemsize * R * vocabulary, device), R, vocabulary, device=device, dtype=dtype)


def _taken_tables(
    caption: str, note: str, what: str, device: torch.device, vocabulary: int, grid: tuple[int, ...]
) -> Iterator[tuple[Table, dict[str, Spread]]]:
    """Of a method of `Taken`, by batch: the table so far and the times of its last row."""
    table = Table(caption, note, ("batch", *WAYS, "ratio", "launches, ours", "launches, torch"))
    for batch in grid:
        forms = {name: Taken(batch, vocabulary, device, ours=name == OURS) for name in WAYS}
        actions = {name: getattr(form, what) for name, form in forms.items()}
        times, _ = race(actions, {}, device, calls=len(forms[OURS].logits))
        counts = {name: launches(action, device) for name, action in actions.items()}
        said = ("–" if n is None else str(n) for n in counts.values())
        R = batch * (2 * K - 1)
        record = {"batch": batch, "k": K, "rows": R, "us": times, "launches": counts}
        table = table.plus((f"{batch}, {R} rows", *cells(times, WAYS), _ratio(times), *said), record)
        yield table, times
        del forms, actions
        free(device)


def _ratio(times: Mapping[str, Spread]) -> str:
    return f"{times[TORCH].median / times[OURS].median:.1f}"


if __name__ == "__main__":
    program("readout", "Readout and advance", measure)
