"""Readout and advance: what a pass spends between the model's logits and the next pass's rows.

`python -m mtpkern.bench.readout` times the Triton forms against the same in separate torch operations, each in a
captured graph, and writes bench/results/readout.{md,json}.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mtpkern.bench.harness import Spread
from mtpkern.bench.report import Goal, Table, run
from mtpkern.bench.timing import copies, drawn, free, launches, peak, race, timed, with_constants
from mtpkern.kernels import form
from mtpkern.kernels.advance import advance
from mtpkern.kernels.readout import readout
from mtpkern.kernels.state import Rows, Sequences, Terms
from mtpkern.output import exit_status

READOUT_REFERENCE, ADVANCE_REFERENCE = readout.reference, advance.reference

V = 151_936  # Qwen3
K = 8
OURS, TORCH = "ours", "torch operations"
PRODUCT, NO_PDL = "product", "ours, no PDL"
# More than all calls of a timing make: every call is a pass, and each accepts a token at least.
_PASSES = 8192


class Taken:
    """A batch whose readout and `advance` can be called over and over: each call is one more pass of it.

    R = batch * (2k - 1) rows of random logits, whose confidences are far below the threshold: each pass keeps one token
    a sequence, and deals out all masks.
    """

    def __init__(
        self,
        batch: int,
        vocabulary: int,
        device: torch.device,
        *,
        ours: bool,
        k: int = K,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        R = batch * (2 * k - 1)
        passes = _PASSES if device.type == "cuda" else 64
        self.k = k
        self.readout: Callable[..., tuple[Tensor, Tensor]] = readout if ours else READOUT_REFERENCE
        self.advance: Callable[..., None] = advance if ours else ADVANCE_REFERENCE
        self.sequences = Sequences.allocate(batch, passes + 2 * k, passes, device)
        self.rows = Rows.allocate(R, batch, device)
        self.logits = _random_logits(R, vocabulary, device, dtype)
        self.terms = Terms.allocate(1, device)
        self.terms.threshold.fill_(0.5)
        self.sequences.length.fill_(1)
        self.sequences.pending.fill_(1)
        self.sequences.limit.fill_(passes + k)
        # As after a prefill: each sequence has read its last token's row and those of k - 1 masks.
        self.rows.start.copy_(torch.arange(batch + 1, device=device) * k)
        self.token, self.confidence = self.readout(self.logits[0][: batch * k], vocabulary - 1)
        self.vocabulary = vocabulary
        self.advance_(0)
        self.token, self.confidence = self.readout(self.logits[0], vocabulary - 1)

    def readout_(self, i: int) -> tuple[Tensor, Tensor]:
        """Token and confidence [R] of the i-th copy of the logits."""
        return self.readout(self.logits[i % len(self.logits)], self.vocabulary - 1)

    def advance_(self, i: int) -> tuple[Tensor, ...]:
        """Take one pass in; returns the plan of the next."""
        self.take_in(self.token, self.confidence)
        return self.plan()

    def both(self, i: int) -> tuple[Tensor, ...]:
        """Readout and `advance`, as in a pass."""
        self.take_in(*self.readout_(i))
        return self.plan()

    def take_in(self, token: Tensor, confidence: Tensor) -> None:
        """`advance` with a readout."""
        self.advance(
            *(self.sequences, self.rows, self.terms, token, confidence),
            k=self.k,
            verify=True,
            mask_token_id=self.vocabulary - 1,
        )

    def plan(self) -> tuple[Tensor, ...]:
        """The rows of the next pass."""
        rows = self.rows
        return rows.seq, rows.position, rows.slot, rows.token, rows.start


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Readout over row counts; with advance, as a pass calls them; advance over batches. A row at a time."""
    cpu = device.type == "cpu"
    vocabulary = 1000 if cpu else V
    yield from _readout_tables(device, vocabulary, (1, 3) if cpu else (16, 128) if quick else ROWS)
    yield from _both_tables(device, vocabulary, (1, 2) if cpu else (1,) if quick else (1, 2, 4, 16, 32))
    yield from _behind_product_tables(device, vocabulary, (1, 2) if cpu else (1,) if quick else (1, 16))
    yield from _advance_tables(device, (1, 3) if cpu else (16,) if quick else BATCHES)


ROWS = (1, 2, 4, 8, 15, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 4, 16, 64, 256, 1024)


def _readout_tables(device: torch.device, vocabulary: int, grid: tuple[int, ...]) -> Iterator[Table]:
    rows, records, goals = [], [], []
    for R in grid:
        times = _readout_times(R, vocabulary, device)
        free(device)
        floor = peak(device).floor(bytes=2 * R * vocabulary)
        share = floor / times[OURS].median
        rows.append((str(R), *_times(times), f"{floor:.1f}", f"{share:.0%}", _ratio(times)))
        records.append({"rows": R, "us": times, "floor_us": floor})
        if R == 16:
            goals.append(Goal("readout of 16 rows, V 152k", 6, times[OURS].median, "µs", at_most=True))
        if R == 128:
            goals.append(Goal("readout of 128 rows: share of bandwidth", 80, share * 100, "%"))
        note = (
            f"V = {vocabulary}, bf16, µs in a graph, logits read from memory, median (least–greatest). Floor: reading "
            f"the logits once; {peak(device).source}."
        )
        header = ("rows", OURS, TORCH, "floor", "share of bandwidth", "ratio")
        yield Table("Readout", note, header, [*rows], [*records], [*goals])


def _readout_times(R: int, vocabulary: int, device: torch.device) -> dict[str, Spread]:
    logits = _random_logits(R, vocabulary, device)
    n, mask = len(logits), vocabulary - 1
    actions = {
        OURS: lambda i: readout(logits[i % n], mask),
        TORCH: lambda i: READOUT_REFERENCE(logits[i % n], mask),
    }
    return race(actions, {}, device, calls=n)[0]


def _random_logits(R: int, vocabulary: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return drawn(copies(dtype.itemsize * R * vocabulary, device), R, vocabulary, device=device, dtype=dtype)


def _advance_tables(device: torch.device, grid: tuple[int, ...]) -> Iterator[Table]:
    rows, records = [], []
    for batch in grid:
        forms = {name: Taken(batch, 64, device, ours=name == OURS) for name in (OURS, TORCH)}
        times, _ = race({name: form.advance_ for name, form in forms.items()}, {}, device)
        counts = {name: launches(form.advance_, device) for name, form in forms.items()}
        rows.append((str(batch), *_times(times), _ratio(times), *_counts(counts)))
        records.append({"batch": batch, "k": K, "us": times, "launches": counts})
        free(device)
        header = ("batch", OURS, TORCH, "ratio", "launches, ours", "launches, torch")
        note = f"k = {K}, {2 * K - 1} rows a sequence, Verified; µs in a graph."
        yield Table("Advance", note, header, [*rows], [*records])


def _both_tables(device: torch.device, vocabulary: int, grid: tuple[int, ...]) -> Iterator[Table]:
    rows, records, goals = [], [], []
    for batch in grid:
        forms = {name: Taken(batch, vocabulary, device, ours=name == OURS) for name in (OURS, TORCH)}
        times, _ = race({name: form.both for name, form in forms.items()}, {}, device, calls=len(forms[OURS].logits))
        counts = {name: launches(form.both, device) for name, form in forms.items()}
        R = batch * (2 * K - 1)
        rows.append((f"{batch}, {R} rows", *_times(times), _ratio(times), *_counts(counts)))
        records.append({"batch": batch, "rows": R, "us": times, "launches": counts})
        if batch == 1:
            ratio = times[TORCH].median / times[OURS].median
            goals.append(Goal("readout + advance, 15 rows, V 152k", 10, times[OURS].median, "µs", at_most=True))
            goals.append(Goal("readout + advance over separate torch operations", 8, ratio, "×"))
        del forms
        free(device)
        header = ("batch", OURS, TORCH, "ratio", "launches, ours", "launches, torch")
        note = f"V = {vocabulary}, k = {K}, bf16; µs in a graph, logits read from memory."
        yield Table("Readout and advance", note, header, [*rows], [*records], [*goals])


def _behind_product_tables(device: torch.device, vocabulary: int, grid: tuple[int, ...]) -> Iterator[Table]:
    """As in a pass: what the three launches add behind a product, where each may start early and where it may not."""
    hidden = 32 if device.type == "cpu" else 2560
    rows, records = [], []
    for batch in grid:
        times = _behind_product_times(batch, vocabulary, hidden, device)
        free(device)
        added = [times[way].median - times[PRODUCT].median for way in (OURS, NO_PDL)]
        R = batch * (2 * K - 1)
        rows.append((f"{batch}, {R} rows", times[PRODUCT].text(1), *(f"{us:.1f}" for us in added)))
        records.append({"batch": batch, "rows": R, "us": times})
        note = (
            f"V = {vocabulary}, k = {K}, bf16; µs in a graph; product: of the rows with a weight [{hidden}, {hidden}] "
            "read from memory; ours: what readout and advance add behind it."
        )
        yield Table("Readout and advance behind a product", note, ("batch", PRODUCT, OURS, NO_PDL), [*rows], [*records])


def _behind_product_times(batch: int, vocabulary: int, hidden: int, device: torch.device) -> dict[str, Spread]:
    taken = Taken(batch, vocabulary, device, ours=True)
    weights = drawn(copies(2 * hidden * hidden, device), hidden, hidden, device=device)
    (x,) = drawn(1, batch * (2 * K - 1), hidden, device=device)

    def product(i: int) -> Tensor:
        return x @ weights[i % len(weights)]

    def both(i: int) -> object:
        return product(i), taken.both(i)

    actions = {PRODUCT: product, OURS: both, NO_PDL: with_constants(both, form, PDL=False)}
    return timed(actions, device, calls=max(len(taken.logits), len(weights)))


def _times(times: Mapping[str, Spread]) -> tuple[str, str]:
    return times[OURS].text(1), times[TORCH].text(1)


def _ratio(times: Mapping[str, Spread]) -> str:
    return f"{times[TORCH].median / times[OURS].median:.1f}"


def _counts(counts: Mapping[str, Any]) -> tuple[str, str]:
    mine, theirs = ("–" if counts[name] is None else str(counts[name]) for name in (OURS, TORCH))
    return mine, theirs


def main() -> None:
    """Measure, print, write."""
    run("readout", "Readout and advance", measure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
