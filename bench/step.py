"""The whole step at the shapes of real models: a pass against its rows, its floor, and token-by-token decoding.

`python -m mtpkern.bench.step` builds Qwen3-0.6B, Qwen3-4B and Llama-3.1-8B from their configurations with random
weights (nothing is downloaded), captures steps in CUDA graphs and writes bench/results/step.{md,json}. Random weights
are sure of nothing, so where tokens per second are wanted a pattern of acceptance is imposed: see `Stand`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.harness import Spread
from mtpkern.bench.report import Goal, Table, run
from mtpkern.bench.timing import Action, free, launches, peak, timed
from mtpkern.decoder import Decoder
from mtpkern.kernels.readout import readout
from mtpkern.output import exit_status
from mtpkern.strategies import ConfAdapt, Static, Strategy

_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936, "tie_word_embeddings": True}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-4B": (
        "qwen3",
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32} | _QWEN3,
    ),
    "Llama-3.1-8B": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128_256,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16} | _QWEN3,
    ),
}
# What a CPU rehearses with, under the same names.
_TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}
MASK = 1
K = 8
ACCEPTED = 3
_PROMPT = 8
# Passes that the device state has room for between two resets: warming up, and the calls of one graph.
PASSES = 24


def build(name: str, device: torch.device) -> PreTrainedModel:
    """A model of this name with random weights in bf16, on the device; on a CPU a tiny one of its kind."""
    kind, settings = CONFIGS[name]
    settings = settings | (_TINY if device.type == "cpu" else {})
    config = AutoConfig.for_model(
        kind, **settings, max_position_embeddings=1 << 18, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    config.mtpkern = {"mask_token_id": MASK, "k_max": 16, "version": 1}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


class Body:
    """An attention that costs nothing: what is left of a pass is the model."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, _: object) -> Tensor:
        """Query [B, Hq, T, D] -> itself as [B, T, Hq, D]."""
        return query.transpose(1, 2)


@dataclass(frozen=True)
class Point:
    """B sequences with a context of L tokens, k predictions a pass, R rows."""

    B: int
    L: int
    k: int
    R: int


class Stand:
    """A decoder in the middle of a long text: every row of its pass is in use, and it can be put back there.

    The prompt is short; length and positions are then moved up and the caches filled with noise, which costs the
    same to read as text. Static(k) accepts everything, so that each pass brings k pending tokens and as many masks as
    the rows hold. A stand of the same B and L may share the caches of another, from its prefill on: at 16 texts of 16k
    tokens a second set would fit no GPU.

    `accepted` imposes on ConfAdapt how many tokens a pass keeps of every sequence: the readout runs as it is, then so
    many predictions are made sure and the others not, which adds a few small launches to the pass. `room` is how many
    tokens may come before a reset. Other options are the decoder's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        at: Point,
        strategy: Strategy,
        *,
        accepted: int | None = None,
        share: Stand | None = None,
        room: int = PASSES * 16,
        **options: Any,
    ) -> None:
        self.at = at
        self.model = model
        self.accepted = accepted
        assert share is None or (share.at.B, share.at.L) == (at.B, at.L)
        self.decoder = Decoder(
            model,
            strategy,
            mask_token_id=MASK,
            stop_ids=torch.tensor([-1]),
            batch=at.B,
            capacity=at.L + room,
            max_new_tokens=room,
            rows=at.R,
            **options,
        )
        if share is not None:
            self.decoder.cache.layers = share.decoder.cache.layers
        prompt = torch.randint(2, model.config.vocab_size, (at.B, _PROMPT), device=model.device)
        self.decoder.prefill(prompt)
        cache, sequences, rows = self.decoder.cache, self.decoder.sequences, self.decoder.rows
        with torch.inference_mode():
            if share is None:
                for buffers in cache.layers.values():
                    for buffer in buffers:
                        buffer.normal_()
            up = at.L - _PROMPT
            for place in (sequences.length, sequences.limit):
                place.add_(up)
            in_use = rows.slot < cache.capacity
            for place in (rows.position, rows.slot):
                place.add_(up * in_use)
        self.state = [*vars(sequences).values(), *vars(rows).values()]
        self.before = [x.clone() for x in self.state]

        if accepted is not None:
            # From the one pending token behind the prompt to the pattern's own course.
            self.advance_by(2)
            self.before = [x.clone() for x in self.state]
        grown = self.advance_by(2)
        if accepted is not None and grown != [accepted] * 2:
            raise RuntimeError(f"expected {accepted} tokens of every sequence in a pass, got {grown} at {at}")
        # A sequence that has ended, in a fault say, would cost nothing and look fast.
        used = int((rows.slot < cache.capacity).sum())
        if accepted is None and used != at.R:
            raise RuntimeError(f"expected all rows in use, got {used} of {at.R} at {at}")
        self.reset()

    def reset(self) -> None:
        """Back to where the stand began."""
        for x, was in zip(self.state, self.before, strict=True):
            x.copy_(was)

    def step(self, i: int) -> Tensor:
        """One pass, inside the attention context of any stand of the model."""
        with patch("mtpkern.decoder.readout", self.readout):
            return self.decoder.step({"mtpkern": self.decoder.cache})

    def readout(self, logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """The readout, its confidences replaced where acceptance is imposed."""
        token, confidence = readout(logits, mask_token_id)
        if self.accepted is None:
            return token, confidence
        sequences, rows = self.decoder.sequences, self.decoder.rows
        prediction = torch.arange(len(token), device=token.device) - rows.start[rows.seq] - sequences.pending[rows.seq]
        return token, (prediction + 1 < self.accepted).float()

    @torch.inference_mode()
    def body(self, i: int) -> Tensor:
        """The model on the rows of the pass, attention left out, and nothing taken in: logits."""
        rows = self.decoder.rows
        return self.model(
            input_ids=rows.token[None],
            position_ids=rows.position[None],
            past_key_values=None,
            use_cache=False,
            mtpkern=Body(),
        ).logits

    def advance_by(self, passes: int) -> list[int]:
        """Make passes one by one; returns how many tokens each brought to every sequence, -1 where they differ."""
        grown = []
        with attention_context(self.model, self.decoder.cache):
            for _ in range(passes):
                before = self.decoder.sequences.length.clone()
                self.step(0)
                least, most = (self.decoder.sequences.length - before).aminmax()
                grown.append(int(least) if least == most else -1)
        return grown


def weights(model: PreTrainedModel) -> int:
    """Parameters that a pass reads whole: all but an embedding of its own, of which it takes a few rows."""
    count = sum(p.numel() for p in model.parameters())
    return count if model.config.tie_word_embeddings else count - model.get_input_embeddings().weight.numel()


def floor(model: PreTrainedModel, at: Point) -> float:
    """Microseconds of a pass: weights and the cached keys and values at bandwidth, or the products at peak."""
    c = model.config
    kv = 4 * at.B * at.L * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    pairs = 4 * at.R * at.L * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    return peak(model.device).floor(bytes=2 * weights(model) + kv, flops=2 * weights(model) * at.R + pairs)


def points(name: str, device: torch.device, quick: bool) -> list[list[Point]]:
    """What is measured of a model, in groups that take turns: equal batch and context, the first one token by token."""
    if device.type == "cpu":
        return [[Point(1, 32, 1, 1), Point(1, 32, 8, 15)], [Point(2, 24, 1, 2), Point(2, 24, 4, 8)]]
    one = [Point(1, 2048, 1, 1), Point(1, 2048, K, 8), Point(1, 2048, K, 15), Point(1, 2048, 12, 23)]
    groups = [[*one, Point(1, 2048, 16, 31)]]
    wide = [(16, 2048)] if quick else [(1, 16_384), (4, 2048), (16, 2048), (64, 2048), (4, 16_384), (16, 16_384)]
    for B, L in wide:
        groups.append([Point(B, L, 1, B), Point(B, L, K, B * K), Point(B, L, K, B * (2 * K - 1))])
    return groups


def pass_tables(name: str, model: PreTrainedModel, quick: bool) -> Iterator[Table]:
    """Passes of a model: time, floor, and what ours takes of it; the table so far, after each batch and context."""
    device = model.device
    rows, records = [], []
    spent: dict[Point, Spread] = {}
    bodies: dict[Point, Spread] = {}
    counted = ""
    syncs = float("nan")
    for group in points(name, device, quick):
        found, syncs, nodes = _pass_times(model, group)
        if nodes is not None:
            layers, beside = model.config.num_hidden_layers, nodes[0] - nodes[1]
            counted = (
                f" Of {nodes[0]} launches at batch {group[-1].B}, {beside} are beside the body, in {layers} layers."
            )
        free(device)
        for at in group:
            spent[at], bodies[at] = found[f"{at} whole"], found[f"{at} body"]
            least = floor(model, at)
            ours = 1 - bodies[at].median / spent[at].median
            over = spent[at].median / spent[group[0]].median
            cells = (spent[at].text(0), f"{over:.2f}", f"{least:.0f}", f"{least / spent[at].median:.0%}")
            rows.append((str(at.B), str(at.L), str(at.R), *cells, bodies[at].text(0), f"{ours:.1%}"))
            records.append({**vars(at), "us": spent[at], "body_us": bodies[at], "floor_us": least, "ours": ours})
        note = (
            f"bf16, random weights, µs in a graph, median (least–greatest); every row in use. Floor: weights, keys and "
            f"values read once, or the products; {peak(device).source}. body: the same rows through the model with an "
            "attention that returns its queries and no readout; ours: what the pass takes beyond that, which is "
            f"attention, KV write, readout and advance.{counted}"
        )
        goals = _pass_goals(name, model, spent, bodies)
        if not isnan(syncs):
            goals.append(Goal(f"{name}: host syncs in a step", 0, syncs, "", at_most=True))
        header = ("batch", "context", "rows", "pass", "× token by token", "floor", "share", "body", "ours")
        yield Table(f"A pass of {name}", note, header, [*rows], [*records], goals)


def _pass_times(
    model: PreTrainedModel, group: Sequence[Point]
) -> tuple[dict[str, Spread], float, tuple[int, int] | None]:
    """Times of a group's passes; of the last one the host syncs, and the launches of the whole and of the body.

    The group's caches are gone on return.
    """
    stands: list[Stand] = []
    for at in group:
        stands.append(Stand(model, at, Static(at.k), share=stands[0] if stands else None))
    actions: dict[str, Action] = {}
    for stand in stands:
        actions |= {f"{stand.at} whole": stand.step, f"{stand.at} body": stand.body}
    with attention_context(model, Body()):
        found = timed(actions, model.device, reset=partial(reset, stands))
        whole, body = (launches(action, model.device) for action in (stands[-1].step, stands[-1].body))
        return found, host_syncs(stands[-1]), None if whole is None or body is None else (whole, body)


def host_syncs(stand: Stand) -> float:
    """How often the host waits for the device in a step that runs without a graph; NaN on a CPU, which never does."""
    if stand.model.device.type != "cuda":
        return float("nan")
    stand.reset()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            stand.step(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return float(sum("called a synchronizing" in str(w.message) for w in caught))


def reset(stands: Sequence[Stand]) -> None:
    """Put all of them back to where they began."""
    for stand in stands:
        stand.reset()


def _pass_goals(
    name: str, model: PreTrainedModel, spent: Mapping[Point, Spread], bodies: Mapping[Point, Spread]
) -> list[Goal]:
    at, one = Point(1, 2048, K, 15), Point(1, 2048, 1, 1)
    if at not in spent or name not in ("Qwen3-4B", "Llama-3.1-8B"):
        return []
    share = floor(model, at) / spent[at].median * 100
    goals = [Goal(f"{name}, batch 1, 2k context, 15 rows: share of the floor", 80, share, "%")]
    if name == "Qwen3-4B":
        ratio = spent[at].median / spent[one].median
        ours = (1 - bodies[at].median / spent[at].median) * 100
        goals.insert(0, Goal(f"{name}, batch 1, 2k context: 15 rows over 1", 1.15, ratio, "×", at_most=True))
        goals.append(Goal(f"{name}, batch 1: our launches' share of a pass", 8, ours, "%", at_most=True))
    return goals


def tokens_tables(name: str, model: PreTrainedModel, quick: bool) -> Iterator[Table]:
    """Tokens per second at an imposed acceptance, over token by token, for row budgets from B * k to B * (2k - 1).

    The table so far, after each batch.
    """
    device = model.device
    cpu = device.type == "cpu"
    batches, L = ((2,), 24) if cpu else ((16,), 2048) if quick else ((16, 1, 4, 64), 2048)
    rows, records, goals = [], [], []
    for B in batches:
        budgets = sorted({B * K, B * 10, B * 12, B * (2 * K - 1)})
        found = _tokens_times(model, B, L, budgets)
        free(device)
        slow = B / found["plain"].median * 1e6
        rows.append((str(B), "token by token", str(B), found["plain"].text(0), f"{slow:.0f}", "1"))
        records.append({"B": B, "R": B, "accepted": 1, "us": found["plain"]})
        ratios = []
        for R in budgets:
            rate = B * ACCEPTED / found[str(R)].median * 1e6
            ratios.append(rate / slow)
            cells = (found[str(R)].text(0), f"{rate:.0f}", f"{rate / slow:.2f}")
            rows.append((str(B), f"{ACCEPTED} a pass", str(R), *cells))
            records.append({"B": B, "R": R, "accepted": ACCEPTED, "us": found[str(R)]})
        if B == 16 and name == "Llama-3.1-8B":
            what = f"{name}, batch 16, k = {K}, {ACCEPTED} tokens a pass: tokens/s over token by token, best budget"
            goals.append(Goal(what, 2.0, max(ratios), "×"))
        note = (
            f"{L} tokens of context, k = {K}, bf16, random weights; µs a pass in a graph, median (least–greatest). The "
            f"acceptance of {ACCEPTED} tokens a pass is imposed. Token by token is Static(1) by the same code."
        )
        header = ("batch", "decoding", "rows", "pass", "tokens/s", "ratio")
        yield Table(f"Tokens per second of {name}", note, header, [*rows], [*records], [*goals])


def _tokens_times(model: PreTrainedModel, B: int, L: int, budgets: Sequence[int]) -> dict[str, Spread]:
    """Times of a pass token by token ("plain") and with each row budget."""
    plain = Stand(model, Point(B, L, 1, B), Static(1))
    stands = [Stand(model, Point(B, L, K, R), ConfAdapt(K, 0.5), accepted=ACCEPTED, share=plain) for R in budgets]
    actions: dict[str, Action] = {"plain": plain.step, **{str(stand.at.R): stand.step for stand in stands}}
    with attention_context(model, Body()):
        return timed(actions, model.device, reset=partial(reset, [plain, *stands]))


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """Passes of each model; tokens per second of the largest."""
    for name in CONFIGS:
        model = build(name, device)
        yield from pass_tables(name, model, quick)
        if name == "Llama-3.1-8B":
            yield from tokens_tables(name, model, quick)
        del model
        free(device)


def main() -> None:
    """Measure, print, write."""
    run("step", "The whole step", measure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
