"""A training step of a gated adapter on a CPU: kept prefixes, a prefix pass in each step, one joint pass of all rows.

SmolLM2-135M's shape with random weights, float32, one thread, rank 16 on all linear layers, ground truth until the
first miss: the recipe's step of 256 mask rows from 4 texts. The joint pass is the definition (tests/test_gated.py).
Losses are compared before anything is timed; time is that of the process, in turns, and counts the optimizer's step.
The peak of memory is that of a process of its own which makes two steps in one way, weights and Python included.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from mtpkern.adapter import gate_of
from mtpkern.attention import attention_context
from mtpkern.bench.models import random_model
from mtpkern.bench.report import Goal, Table, program
from mtpkern.bench.timing import Spread
from mtpkern.cli import positive
from mtpkern.compare import rotated
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.train.gated import BehindPrefixContext, gated_loss
from mtpkern.train.layout import build_layout
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.objective import Objective, SpanContext, backbone, data_targets, gather_rows, head_of, until_fail
from mtpkern.train.prefix import Prefixes, texts_of

KEPT, EACH, JOINT = "prefix kept", "prefix pass in each step", "one joint pass of all rows"
WAYS = (KEPT, EACH, JOINT)
HEADER = ("way", "rows/s", "s a step", "of joint", "peak MiB", "of joint", "MiB over weights")
MIB = 2**20
EOS = 2

# Tokens of the texts of a step: 703, as the probe's had (docs/log.md).
LENGTHS, TINY_LENGTHS = (231, 187, 160, 125), (14, 11)
K, SPANS = 5, 16


class Trainee:
    """A model with a gated adapter, one batch, and a step of training in each way."""

    def __init__(self, tiny: bool) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        lengths, spans = (TINY_LENGTHS, 2) if tiny else (LENGTHS, SPANS)
        ids = {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
        base = random_model("SmolLM2-135M", tiny, torch.float32, torch.device("cpu"), **ids)
        peft_model = add_gated_lora(base, rank=16, k_max=K)
        self.model = peft_model.get_base_model()
        gate = gate_of(self.model)
        assert gate is not None
        self.gate = gate
        self.trained = [p for p in peft_model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)
        self.tokens = torch.randint(3, base.config.vocab_size, (len(lengths), max(lengths)))
        for row, n in zip(self.tokens, lengths):
            row[n - 1], row[n:] = EOS, 0
        # Spans at random places behind the first fifth of each text.
        drawn = [(n // 5 + torch.randperm(n - n // 5 - K)[:spans]).sort().values for n in lengths]
        self.layout = build_layout(torch.stack(drawn), torch.tensor(lengths), K, num_tokens=max(lengths))
        self.rows = int(self.layout.valid[..., 1:].sum())
        names = [bytes([i]) for i in range(len(lengths))]
        self.texts = texts_of(self.layout, self.tokens.shape[1], names)
        self.kept = Prefixes(2**40)
        self.eos = torch.tensor([EOS])

    def step(self, way: str) -> float:
        """Forward, backward and optimizer; the loss, the same at every call and in every way."""
        self.optimizer.zero_grad()
        loss = self._joint() if way == JOINT else self._behind_prefix(self.kept if way == KEPT else None)
        self.optimizer.step()
        return loss

    def _behind_prefix(self, kept: Prefixes | None) -> float:
        context = BehindPrefixContext(self.layout, self.texts)
        with attention_context(self.model, context), self.gate.open_for_training():
            sums = gated_loss(self.model, self.tokens, context, Objective(self.eos, "gt", "until_fail"), prefixes=kept)
            (sums.span / self.rows).backward()
        return float(sums.span.detach()) / self.rows

    def _joint(self) -> float:
        layout, context = self.layout, SpanContext(self.layout)
        ids = layout.fill(self.tokens, self.gate.mask_token_id)
        with attention_context(self.model, context), self.gate.open(ids == self.gate.mask_token_id):
            states = backbone(self.model, ids, context)
            hidden, head = gather_rows(states, layout.row[..., 1:]), head_of(self.model, None)
            label, keep = (x[..., 1:] for x in data_targets(self.tokens, layout, self.eos))
            agree = (head_readout(hidden, head).token.view_as(label) == label) & keep
            some = (keep & until_fail(agree)).flatten().nonzero().squeeze(1)
            loss = distill_loss(hidden[some], head, target=label.flatten()[some]) / self.rows
            loss.backward()
        return float(loss.detach())


def seconds(work: Trainee, rounds: int) -> Iterator[dict[str, Spread]]:
    """The process' time of a step in each way, in turns: of all rounds so far, behind each of them.

    Raises ValueError where the ways differ in their losses.
    """
    losses = {way: work.step(way) for way in WAYS}  # what keeps prefixes has them now
    if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
        raise ValueError(f"the ways must have one loss; got {losses}")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(rounds):
        for way in rotated(list(WAYS), i):
            start = time.process_time()
            work.step(way)
            times[way].append(time.process_time() - start)
        yield {way: Spread.of(values) for way, values in times.items()}


def peaks(way: str, tiny: bool) -> tuple[int, int]:
    """The process' greatest resident bytes after two steps in one way, and before them: run it in a new process."""
    work = Trainee(tiny)
    before = _resident()
    for _ in range(2):
        work.step(way)
    return _resident(), before


def _resident() -> int:
    """The greatest number of bytes that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peaks_of(way: str, tiny: bool) -> tuple[int, int]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peaks, way, tiny).result()


def take_steps(device: torch.device, quick: bool, tiny: bool = False, rounds: int = 3) -> Iterator[Table]:
    """Rows a second and memory of each way, the table behind each round; `quick` takes one round."""
    rounds = 1 if quick else rounds
    memory = {way: _peaks_of(way, tiny) for way in WAYS}
    work = Trainee(tiny)
    for i, times in enumerate(seconds(work, rounds)):
        yield table_of(work, times, memory, i + 1)


def table_of(work: Trainee, times: Mapping[str, Spread], memory: Mapping[str, tuple[int, int]], rounds: int) -> Table:
    """Of so many rounds, and of each way's peaks."""
    tokens = sum(len(text) for text in work.texts)
    rate = {way: work.rows / spread.median for way, spread in times.items()}
    note = (
        f"{work.rows} mask rows behind {len(work.texts)} texts of {tokens} tokens, padded to "
        f"{work.tokens.shape[1]} each, K = {K}; median (range) of {rounds} "
        f"steps, seconds of the process. Kept prefixes take {work.kept.bytes / tokens / 1024:.0f} KiB a token; those "
        "of this batch are in its peak, those of all texts come on top."
    )
    goals = [
        Goal("rows a second, prefix kept against one joint pass", 2.4, rate[KEPT] / rate[JOINT], "x"),
        Goal("memory, likewise", 0.6, memory[KEPT][0] / memory[JOINT][0], "x", at_most=True),
    ]
    table = Table("Gated training step", note, HEADER, goals=goals)
    for way, spread in times.items():
        most, before = memory[way]
        speed = f"{rate[way]:.0f}", spread.text(), f"{rate[way] / rate[JOINT]:.2f}"
        held = f"{most / MIB:.0f}", f"{most / memory[JOINT][0]:.2f}", f"{(most - before) / MIB:.0f}"
        record = {"way": way, "seconds": spread, "rows": work.rows, "memory": memory[way]}
        table = table.plus((way, *speed, *held), record)
    return table


OPTIONS = {
    "--rounds": {"type": positive, "default": 3},
    "--tiny": {"action": "store_true", "help": "a tiny shape, to rehearse on: its figures say nothing"},
}


if __name__ == "__main__":
    how = {"options": OPTIONS, "on_cpu": lambda args: not args.tiny, "device": "cpu"}
    program("gated_step", "Gated training step", take_steps, **how)
