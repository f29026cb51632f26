"""Tokens per second of a whole run with rows by load, over one token a pass, by batch and by how often masks are right.

`python -m mtpkern.bench.throughput` decodes Qwen3-4B with random weights from the middle of a text, in CUDA graphs and
with compiled layers, by `Static(1)` and by `Verified`, whose batches take the rung of the ladder (mtpkern.load) that
pays, and writes bench/results/throughput.{md,json}. Random weights are right in nothing, so it is imposed: the text is
made up, the model says it wherever it stands, and a mask proposes it with the chance of its place in the span,
independently of all others, and is as sure as that. The readout runs as it is, and some small launches come on top in
both ways.

    python -m mtpkern.bench.throughput --batches 1 4 16 64 --contexts 1024 32768 --right never 0.62 problems
    python -m mtpkern.bench.throughput --model shipped --device cpu --most-tokens 524288 --results bench/results/cpu

The goals are set where no mask is ever right, which may cost next to nothing, and where each draft is right with 0.62,
which makes 2.57 tokens of a pass whose chain of 8 is never short of drafts. All other chances are those that a real
model's predictions were measured to have, and the threshold is the one that this model decodes best with. Short grids
of a GPU take those that have goals. What does not fit the memory is left out, by name, before anything of it is made.
On a CPU Qwen3-4B's tiny kin rehearses; the shipped model, with positions for any context, is measured there, in
float32.

What is timed is what a call of `generate` does behind its prefill: passes, polls and the choice of rungs, with all
sequences running to the last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mtpkern import ASSETS
from mtpkern.attention import attention_context
from mtpkern.bench.models import MASK, SHAPES, build
from mtpkern.bench.report import Goal, Table, percent, run
from mtpkern.bench.step import NO_STOP, PROMPT, bytes_read, endless, fill, move_up
from mtpkern.bench.timing import free, peak, share_of_peak
from mtpkern.cli import positive
from mtpkern.compare import synchronize
from mtpkern.kernels.readout import readout
from mtpkern.load import Ladder, _times, default_masks, default_rows
from mtpkern.memory import FIXED_SHARE, available_memory, kv_bytes
from mtpkern.output import exit_status
from mtpkern.strategies import Static, Strategy, Verified

MODEL, SHIPPED = "Qwen3-4B", "shipped"
# The threshold is that of the model whose chances are imposed: a mask is as sure as it is likely to be right.
K, THRESHOLD = 8, 0.2
# How often the j-th prediction behind the certain one is right where the truth stands in front; those behind are taken
# as the last. Of SmolLM2-135M-Instruct with its gated adapter, on held-out prompts (mtpkern/assets/smollm2/README.md).
MEASURED = {"problems": (0.65, 0.48, 0.35, 0.27, 0.19, 0.14), "instructions": (0.52, 0.36, 0.24, 0.18, 0.13, 0.09)}
NEVER, CHAIN = "never", "0.62"
RIGHT = {NEVER: (0.0,), CHAIN: (0.62,), **MEASURED}
# What the ratio is to reach: at any batch, or by batch at 1k of context on a GPU.
NOT_LOST, GAINED = 0.95, {1: 2.4, 16: 2.3, 64: 1.8}
BATCHES, CONTEXTS, PASSES = (1, 16, 64, 128), (1024,), 100
# On a CPU: of the shipped model, and of the rehearsal.
LOADS, TEXTS, FEWER = (1, 2, 4, 8, 16, 32, 64), (1024, 8192, 32_768), 24
HEADER = (
    *("batch", "context", "masks right", "tokens a pass", "tokens/s", "ratio", "goal"),
    *("ms a pass, one token: ours", "bandwidth, one token: ours"),
)


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
        self.prompt = torch.randint(2, model.config.vocab_size, (batch, PROMPT), device=device)
        how = {"rows": default_rows(strategy, batch, device), "compile": cuda, "by_load": strategy.verify}
        self.decoder = endless(model, strategy, batch, context, self.room, **how)
        self.filled = False

    @torch.inference_mode()
    def run(self, chances: Sequence[float]) -> tuple[float, float]:
        """Seconds behind the prefill, and tokens that a pass brings to a sequence.

        chances: of a mask by its place in the span; places behind these have the last
        """
        decoder, sequences = self.decoder, self.decoder.sequences
        for j in range(len(self.chance)):
            self.chance[j] = chances[min(j, len(chances) - 1)]
        decoder.restart(self.strategy, NO_STOP, self.room)
        decoder.prefill(self.prompt)
        if not self.filled and self.context > PROMPT:
            fill(decoder)
            self.filled = True
        move_up(decoder, self.context - PROMPT)
        decoder.max_passes = self.passes
        now = clock(self.model.device)
        with (
            attention_context(self.model, decoder.cache) as route,
            patch("mtpkern.decoder.readout", self.readout),
            # What rows cost is learned by the clock that judges.
            patch("mtpkern.loop.perf_counter", now),
        ):
            synchronize(self.model.device)
            start = now()
            decoder.run(route)
            synchronize(self.model.device)
        seconds = now() - start
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
        other = 2 + (right - 1) % (logits.shape[-1] - 2)
        return torch.where(wrong, other, right), torch.where(is_mask, chance, 1.0).to(confidence.dtype)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of the process where it is one thread on a CPU, which then need not be free of other work."""
    return process_time if device.type == "cpu" and torch.get_num_threads() == 1 else perf_counter


def model_of(name: str, device: torch.device) -> PreTrainedModel:
    """The shipped model in float32 with positions for any context, or one of bench/models.py's."""
    if name != SHIPPED:
        return build(name, device)
    config = AutoConfig.from_pretrained(ASSETS, trust_remote_code=False, max_position_embeddings=1 << 18)
    model = AutoModelForCausalLM.from_pretrained(
        ASSETS, config=config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    return model.to(device).eval()


def climb(course: Course) -> dict[int, float]:
    """Have every rung of the ladder made and timed; returns milliseconds of their passes (none without a graph)."""
    ladder = course.decoder.ladder
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
    ours = kv_bytes(model, batch, context + (passes + 2) * K + 1, default_masks(K, batch, model.device))
    there = available_memory(model.device)
    if plain is None or ours is None or there is None or ours <= FIXED_SHARE * (there - plain):
        return
    raise ValueError(
        f"keys and values take {plain / 2**30:.1f} GiB one token a pass and {ours / 2**30:.1f} in ours, and "
        f"{there / 2**30:.1f} are free, of which fixed buffers get {FIXED_SHARE:.0%}"
    )


def goal_of(right: str, batch: int, context: int, ratio: float, cuda: bool) -> Goal | None:
    """What the project wants of this ratio, if anything."""
    target = NOT_LOST if right == NEVER else None
    if right == CHAIN and cuda and context == CONTEXTS[0]:
        target = GAINED.get(batch)
    what = f"tokens/s over one a pass, masks right: {right}, batch {batch}, context {context:,}"
    return None if target is None else Goal(what, target, ratio, "×")


def measure(
    device: torch.device,
    quick: bool,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    right: Sequence[str] | None = None,
    model: str = MODEL,
    most_tokens: int | None = None,
) -> Iterator[Table]:
    """A row for each context, batch and chance, the table so far after each row.

    batches, contexts: of sequences, and of tokens; small ones where a CPU rehearses unless given. right: names of
    `RIGHT`; all of them unless given, on a GPU's short grid those that have goals. most_tokens: of all sequences
    together; what has more is left out
    """
    cpu = device.type == "cpu"
    right = right or ((NEVER, CHAIN) if quick and not cpu else tuple(RIGHT))
    there = (LOADS, TEXTS) if model == SHIPPED else ((1, 2), (24,)) if cpu else (BATCHES, CONTEXTS)
    batches, contexts, passes = batches or there[0], contexts or there[1], FEWER if cpu else PASSES
    judged = model_of(model, device)
    chances = "; ".join(f"{name}: {', '.join(f'{x:.0%}' for x in RIGHT[name])}" for name in right)
    how = ["float32" if judged.dtype == torch.float32 else "bf16"]
    how += ["one thread's CPU time"] * (clock(device) is process_time)
    how += ["positions for any context" if model == SHIPPED else "random weights"]
    how += [] if cpu else ["layers compiled", "in graphs"]
    masks = "no masks behind drafts" if cpu else "masks behind drafts as by default"
    note = (
        f"{passes} passes, k = {K}, threshold {THRESHOLD}, {masks}; {', '.join(how)}; the least of some runs, in "
        "turns. ratio: tokens a second over those of one token a pass. How often a mask is right by its place in the "
        f"span: {chances}; problems and instructions are SmolLM2-135M-Instruct's with its adapter."
    )
    if not cpu:
        note += f" bandwidth: weights, keys and values once a pass, over its time; {peak(device).source}."
    table = Table(f"Whole runs of {model if model != SHIPPED else 'the shipped model'}", note, HEADER)
    for context, batch in product(contexts, batches):
        try:
            if most_tokens is not None and batch * context > most_tokens:
                raise ValueError(f"{batch * context:,} tokens, and --most-tokens is {most_tokens:,}")
            if context < PROMPT:
                raise ValueError(f"a text begins with {PROMPT} tokens")
            require_room(judged, batch, context, passes)
        except ValueError as error:
            table = replace(table, skipped=[*table.skipped, f"batch {batch}, context {context}: {error}"])
            yield table
            continue
        # A process that decodes like this and nothing else.
        _times.pop(judged, None)
        plain = Course(judged, batch, context, passes, Static(1))
        course = Course(judged, batch, context, passes, Verified(K, THRESHOLD, masks=default_masks(K, batch, device)))
        for _ in range(2):
            plain.run(RIGHT["never"])
        rungs = climb(course)
        for name in right:
            slow, fast, tokens = [], [], 0.0
            for _ in range(2 if quick else 5):
                seconds, tokens = course.run(RIGHT[name])
                fast.append(seconds)
                slow.append(plain.run(RIGHT[name])[0])
            ratio = tokens * min(slow) / min(fast)
            rate = batch * passes * tokens / min(fast)
            steps = f"{min(slow) / passes * 1e3:.2f}: {min(fast) / passes * 1e3:.2f}"
            shares = {
                way: share_of_peak(device, min(s) / passes * 1e6, bytes=bytes_read(judged, batch, context + new // 2))
                for way, s, new in (("plain", slow, passes), ("ours", fast, round(passes * tokens)))
            }
            goal = goal_of(name, batch, context, ratio, not cpu)
            wanted = "–" if goal is None else f"≥ {goal.target:g}: {'met' if goal.met else 'NOT met'}"
            speed = f"{tokens:.2f}", f"{rate:.0f}", f"{ratio:.2f}", wanted
            row = str(batch), str(context), name, *speed, steps, ": ".join(map(percent, shares.values()))
            record: dict[str, object] = {"B": batch, "context": context, "right": name, "chance": list(RIGHT[name])}
            record |= {"tokens_a_pass": tokens, "ratio": ratio, "tokens_a_second": rate, "plain_s": slow, "s": fast}
            record |= {"bandwidth": shares}
            record |= {"goal": None, "met": None} if goal is None else {"goal": goal.target, "met": goal.met}
            table = table.plus(row, record | {"ms_by_rows": rungs}, *([] if goal is None else [goal]))
            yield table
        del plain, course
        free(device)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    imposed = f"how often masks are right (default: all; with --quick on a GPU {NEVER} and {CHAIN}, which have goals)"
    options: dict[str, dict[str, Any]] = {
        "--model": {"choices": [*SHAPES, SHIPPED], "default": MODEL, "help": f"(default {MODEL})"},
        "--batches": {"type": positive, "nargs": "+", "metavar": "B", "help": "sequences side by side"},
        "--contexts": {"type": positive, "nargs": "+", "metavar": "L", "help": "tokens that stand before"},
        "--most-tokens": {"type": positive, "metavar": "N", "help": "leave out what has more in all its sequences"},
        "--right": {"choices": [*RIGHT], "nargs": "+", "help": imposed},
    }
    run("throughput", "Runs with rows by load", measure, argv, options, on_cpu=lambda args: args.model == SHIPPED)


if __name__ == "__main__":
    sys.exit(exit_status(main))
