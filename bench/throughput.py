"""Tokens per second of a whole run with rows by load, over one token a pass, by batch and by how often masks are right.

`python -m mtpkern.bench.throughput` decodes Qwen3-4B with random weights from the middle of a text, in CUDA graphs and
with compiled layers, by `Static(1)` and by `Verified`, whose batches take the rung of the ladder (mtpkern.load) that
pays, and writes bench/results/throughput.{md,json}. Random weights are right in nothing, so it is imposed: the text is
made up, the model says it wherever it stands, and a mask proposes it with a given chance, independently of all others,
and is as sure as that. The readout runs as it is, and some small launches come on top in both ways.

What is timed is what a call of `generate` does behind its prefill: passes, polls and the choice of rungs, with all
sequences running to the last.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.report import Table, run
from mtpkern.bench.step import MASK, build
from mtpkern.bench.timing import free
from mtpkern.compare import synchronize
from mtpkern.decoder import Decoder, default_rows
from mtpkern.kernels.readout import readout
from mtpkern.load import Ladder
from mtpkern.output import exit_status
from mtpkern.strategies import Static, Strategy, Verified

MODEL = "Qwen3-4B"
K = 8
# Masks behind drafts, a sequence, up to the batch of which there are rows for them.
MASKS = {1: 9}
CHANCES = (0.0, 0.7, 0.84)
CONTEXT, PASSES = 1024, 100
_PROMPT = 8


class Course:
    """A decoder that goes through a made-up text again and again.

    chance   [] float: how often a mask is right; it may change from run to run, in a graph too
    """

    def __init__(self, model: PreTrainedModel, batch: int, context: int, passes: int, strategy: Strategy) -> None:
        self.model, self.strategy, self.context, self.passes = model, strategy, context, passes
        # No sequence comes to its end.
        self.room = (passes + 2) * strategy.k + 1
        device = model.device
        cuda = device.type == "cuda"
        self.chance = torch.zeros((), device=device)
        self.stop_ids = torch.tensor([-1])
        self.prompt = torch.randint(2, model.config.vocab_size, (batch, _PROMPT), device=device)
        self.decoder = Decoder(
            model,
            strategy,
            mask_token_id=MASK,
            stop_ids=self.stop_ids,
            batch=batch,
            capacity=context + self.room,
            max_new_tokens=self.room,
            rows=default_rows(strategy, batch, device),
            compile=cuda,
            by_load=strategy.verify,
        )
        self.filled = False

    @torch.inference_mode()
    def run(self, chance: float) -> tuple[float, float]:
        """Seconds behind the prefill, and tokens that a pass brings to a sequence."""
        decoder, sequences = self.decoder, self.decoder.sequences
        self.chance.fill_(chance)
        decoder.restart(self.strategy, self.stop_ids, self.room)
        decoder.prefill(self.prompt)
        if not self.filled and self.context > _PROMPT:
            # Noise costs the same to read as text.
            for buffers in decoder.cache.layers.values():
                for buffer in buffers:
                    buffer.normal_()
            self.filled = True
        up = self.context - _PROMPT
        in_use = decoder.all_rows.slot < decoder.cache.capacity
        for place in (sequences.length, sequences.limit):
            place.add_(up)
        for place in (decoder.all_rows.position, decoder.all_rows.slot):
            place.add_(up * in_use)
        if self.strategy.masks:
            for place in (decoder.all_rows.prefix_end, decoder.all_rows.span_start):
                place.add_(up * in_use)
        decoder.max_passes = self.passes
        with attention_context(self.model, decoder.cache) as route, patch("mtpkern.decoder.readout", self.readout):
            synchronize(self.model.device)
            start = perf_counter()
            decoder.run(route)
            synchronize(self.model.device)
        seconds = perf_counter() - start
        assert (sequences.passes == self.passes + 1).all()
        # Behind the prefill one token is certain, the first.
        certain = sequences.length - sequences.pending - self.context
        return seconds, float(certain.double().mean()) / self.passes

    def readout(self, logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """The readout, what it says replaced by what is imposed."""
        confidence = readout(logits, mask_token_id)[1]
        rows = self.decoder.rows
        right = 2 + (rows.seq * 7919 + (rows.position + 1) * 104_729) % (logits.shape[-1] - 2)
        mixed = (rows.seq * 1_000_003 + rows.position) * 2_654_435_761 + self.decoder.sequences.passes[
            rows.seq
        ] * 40_503
        mixed = (mixed ^ (mixed >> 15)) * 739_982_445
        draw = ((mixed >> 12) & 0xFFFF).float() / 65_536
        is_mask = rows.token == MASK
        wrong = is_mask & (draw >= self.chance)
        return torch.where(wrong, 2 + right % 2, right), torch.where(is_mask, self.chance, 1.0).to(confidence.dtype)


def climb(course: Course) -> dict[int, float]:
    """Have every rung of the ladder made and timed; returns milliseconds of their passes (none without a graph)."""
    ladder = course.decoder._ladder
    if course.decoder.graph is None:
        return {}
    for rows in ladder.rungs:
        price = float("inf") if rows == ladder.rungs[0] else 0.0
        with patch.object(Ladder, "choose", lambda *_, told=(rows, price): told):
            course.run(0.0)
    return {rows: ladder.times.seconds.get(rows, float("nan")) * 1e3 for rows in ladder.rungs}


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """A row for each batch and chance, the table so far after each batch."""
    cpu = device.type == "cpu"
    context, passes = (24, 12) if cpu else (CONTEXT, PASSES)
    model = build(MODEL, device)
    rows: list[tuple[str, ...]] = []
    records = []
    for batch in (1, 2) if cpu else (1, 16, 64, 128):
        plain = Course(model, batch, context, passes, Static(1))
        course = Course(model, batch, context, passes, Verified(K, masks=MASKS.get(batch, 0)))
        for _ in range(2):
            plain.run(0.0)
        rungs = climb(course)
        steps = ", ".join(f"{r}: {ms:.2f}" for r, ms in rungs.items())
        for chance in CHANCES:
            slow, fast, tokens = [], [], 0.0
            for _ in range(2 if quick else 5):
                seconds, tokens = course.run(chance)
                fast.append(seconds)
                slow.append(plain.run(0.0)[0])
            ratio = tokens * min(slow) / min(fast)
            rate = batch * passes * tokens / min(fast)
            rows.append((str(batch), f"{chance:g}", f"{tokens:.2f}", f"{rate:.0f}", f"{ratio:.2f}", steps))
            records.append(
                {"B": batch, "chance": chance, "tokens_a_pass": tokens, "ratio": ratio, "tokens_a_second": rate}
                | {"plain_s": slow, "s": fast, "ms_by_rows": rungs}
            )
        del plain, course
        free(device)
        note = (
            f"{context} tokens of context, {passes} passes, k = {K}, masks behind drafts at batch "
            f"{', '.join(map(str, MASKS))}; bf16, random weights, layers compiled, in graphs; the least of some runs, "
            "in turns. ratio: tokens a second over those of one token a pass."
        )
        header = ("batch", "chance of a mask", "tokens a pass", "tokens/s", "ratio", "ms a pass by rows")
        yield Table(f"Whole runs of {MODEL}", note, header, [*rows], [*records])


def main() -> None:
    """Measure, print, write."""
    run("throughput", "Runs with rows by load", measure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
