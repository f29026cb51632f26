"""Tokens per second of a whole run with rows by load, over one token a pass, by batch and by how often masks are right.

`python -m mtpkern.bench.throughput` decodes Qwen3-4B with random weights from the middle of a text, in CUDA graphs and
with compiled layers, by `Static(1)` and by `Verified`, whose batches take the rung of the ladder (mtpkern.load) that
pays, and writes bench/results/throughput.{md,json}. Random weights are right in nothing, so it is imposed: the text is
made up, the model says it wherever it stands, and a mask proposes it with the chance of its place in the span,
independently of all others, and is as sure as that. The readout runs as it is, and some small launches come on top in
both ways.

    python -m mtpkern.bench.throughput --batches 1 4 16 64 --contexts 1024 32768 --right never problems

The chances are those that a real model's predictions were measured to have, or a number for every place. What does not
fit the memory is left out, by name, before anything of it is made.

What is timed is what a call of `generate` does behind its prefill: passes, polls and the choice of rungs, with all
sequences running to the last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.report import Table, positive, run
from mtpkern.bench.step import MASK, build
from mtpkern.bench.timing import free
from mtpkern.compare import synchronize
from mtpkern.decoder import Decoder
from mtpkern.kernels.readout import readout
from mtpkern.load import Ladder, default_rows
from mtpkern.memory import FIXED_SHARE, available_memory, kv_bytes
from mtpkern.output import exit_status
from mtpkern.strategies import Static, Strategy, Verified

MODEL = "Qwen3-4B"
K = 8
# Masks behind drafts, a sequence, up to the batch of which there are rows for them.
MASKS = {1: 9}
# How often the j-th prediction behind the certain one is right where the truth stands in front; those behind are taken
# as the last. Of SmolLM2-135M-Instruct with its gated adapter, on held-out prompts (mtpkern/assets/smollm2/README.md).
MEASURED = {
    "problems": (0.65, 0.48, 0.35, 0.27, 0.19, 0.14),
    "instructions": (0.52, 0.36, 0.24, 0.18, 0.13, 0.09),
}
RIGHT = {"never": (0.0,), **MEASURED}
BATCHES, CONTEXTS, PASSES = (1, 16, 64, 128), (1024,), 100
_PROMPT = 8


class Course:
    """A decoder that goes through a made-up text again and again.

    chance   [k - 1] float: how often a mask is right, by its place in the span; it may change from run to run, in a
             graph too
    """

    def __init__(self, model: PreTrainedModel, batch: int, context: int, passes: int, strategy: Strategy) -> None:
        self.model, self.strategy, self.context, self.passes = model, strategy, context, passes
        # No sequence comes to its end.
        self.room = (passes + 2) * strategy.k + 1
        device = model.device
        cuda = device.type == "cuda"
        self.chance = torch.zeros(max(1, strategy.k - 1), device=device)
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
    def run(self, chances: Sequence[float]) -> tuple[float, float]:
        """Seconds behind the prefill, and tokens that a pass brings to a sequence.

        chances: of a mask by its place in the span; places behind these have the last
        """
        decoder, sequences = self.decoder, self.decoder.sequences
        for j in range(len(self.chance)):
            self.chance[j] = chances[min(j, len(chances) - 1)]
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
        rows, sequences = self.decoder.rows, self.decoder.sequences
        right = 2 + (rows.seq * 7919 + (rows.position + 1) * 104_729) % (logits.shape[-1] - 2)
        mixed = (rows.seq * 1_000_003 + rows.position) * 2_654_435_761 + sequences.passes[rows.seq] * 40_503
        mixed = (mixed ^ (mixed >> 15)) * 739_982_445
        draw = ((mixed >> 12) & 0xFFFF).float() / 65_536
        is_mask = rows.token == MASK
        # Its place in the span, from 1: only where masks stand behind drafts do rows bring it.
        if self.strategy.masks:
            place = rows.slot + 1 - rows.span_start
        else:
            place = rows.position + 1 - sequences.length[rows.seq]
        chance = self.chance[(place - 1).clamp(0, len(self.chance) - 1)]
        wrong = is_mask & (draw >= chance)
        return torch.where(wrong, 2 + right % 2, right), torch.where(is_mask, chance, 1.0).to(confidence.dtype)


def climb(course: Course) -> dict[int, float]:
    """Have every rung of the ladder made and timed; returns milliseconds of their passes (none without a graph)."""
    ladder = course.decoder._ladder
    if course.decoder.graph is None:
        return {}
    for rows in ladder.rungs:
        price = float("inf") if rows == ladder.rungs[0] else 0.0
        with patch.object(Ladder, "choose", lambda *_, told=(rows, price): told):
            course.run(RIGHT["never"])
    return {rows: ladder.times.seconds.get(rows, float("nan")) * 1e3 for rows in ladder.rungs}


def require_room(model: PreTrainedModel, batch: int, context: int, passes: int) -> None:
    """Raises ValueError, with the bytes, where keys and values of both ways leave no room for graphs."""
    plain = kv_bytes(model, batch, context + passes + 3)
    ours = kv_bytes(model, batch, context + (passes + 2) * K + 1, MASKS.get(batch, 0))
    there = available_memory(model.device)
    if plain is None or ours is None or there is None or ours <= FIXED_SHARE * (there - plain):
        return
    raise ValueError(
        f"keys and values take {plain / 2**30:.1f} GiB one token a pass and {ours / 2**30:.1f} in ours, and "
        f"{there / 2**30:.1f} are free, of which fixed buffers get {FIXED_SHARE:.0%}"
    )


def measure(
    device: torch.device,
    quick: bool,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    right: Sequence[str] = tuple(RIGHT),
) -> Iterator[Table]:
    """A row for each context, batch and chance, the table so far after each row.

    batches, contexts: of sequences, and of tokens; small ones on a CPU unless given. right: names of `RIGHT`, or
    numbers from 0 to 1
    """
    cpu = device.type == "cpu"
    batches = batches or ((1, 2) if cpu else BATCHES)
    contexts, passes = contexts or ((24,) if cpu else CONTEXTS), 12 if cpu else PASSES
    chances = {(name if name in RIGHT else f"{float(name):.0%}"): RIGHT.get(name) or (float(name),) for name in right}
    model = build(MODEL, device)
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, object]] = []
    skipped: list[str] = []
    measured = "; ".join(f"{name}: {', '.join(f'{x:.0%}' for x in chance)}" for name, chance in chances.items())
    note = (
        f"{passes} passes, k = {K}, masks behind drafts at batch {', '.join(map(str, MASKS))}; bf16, random weights, "
        "layers compiled, in graphs; the least of some runs, in turns. ratio: tokens a second over those of one token "
        f"a pass. How often a mask is right by its place in the span: {measured}."
    )
    header = ("batch", "context", "masks right", "tokens a pass", "tokens/s", "ratio", "ms a pass by rows")
    for context in contexts:
        for batch in batches:
            try:
                require_room(model, batch, context, passes)
            except ValueError as error:
                skipped.append(f"batch {batch}, context {context}: {error}")
                yield Table(f"Whole runs of {MODEL}", note, header, [*rows], [*records], skipped=[*skipped])
                continue
            plain = Course(model, batch, context, passes, Static(1))
            course = Course(model, batch, context, passes, Verified(K, masks=MASKS.get(batch, 0)))
            for _ in range(2):
                plain.run(RIGHT["never"])
            rungs = climb(course)
            steps = ", ".join(f"{r}: {ms:.2f}" for r, ms in rungs.items())
            for name, chance in chances.items():
                slow, fast, tokens = [], [], 0.0
                for _ in range(2 if quick else 5):
                    seconds, tokens = course.run(chance)
                    fast.append(seconds)
                    slow.append(plain.run(chance)[0])
                ratio = tokens * min(slow) / min(fast)
                rate = batch * passes * tokens / min(fast)
                rows.append((str(batch), str(context), name, f"{tokens:.2f}", f"{rate:.0f}", f"{ratio:.2f}", steps))
                records.append(
                    {"B": batch, "context": context, "right": name, "chance": list(chance), "tokens_a_pass": tokens}
                    | {"ratio": ratio, "tokens_a_second": rate, "plain_s": slow, "s": fast, "ms_by_rows": rungs}
                )
                yield Table(f"Whole runs of {MODEL}", note, header, [*rows], [*records], skipped=[*skipped])
            del plain, course
            free(device)


def _right(text: str) -> str:
    if text not in RIGHT:
        try:
            given = float(text)
        except ValueError:
            given = -1.0
        if not 0 <= given <= 1:
            raise argparse.ArgumentTypeError(f"expected {', '.join(RIGHT)} or a number from 0 to 1, got {text!r}")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = {
        "--batches": {"type": positive, "nargs": "+", "metavar": "B", "help": "sequences side by side"},
        "--contexts": {"type": positive, "nargs": "+", "metavar": "L", "help": "tokens that stand before"},
        "--right": {
            "type": _right,
            "nargs": "+",
            "metavar": "HOW",
            "default": list(RIGHT),
            "help": f"how often masks are: {', '.join(RIGHT)}, as measured, or a number from 0 to 1",
        },
    }
    run("throughput", "Runs with rows by load", measure, argv, options)


if __name__ == "__main__":
    sys.exit(exit_status(main))
