"""Decoding with the shipped checkpoint: accuracy, tokens per pass and wall-clock time.

Thresholds are chosen on the validation split (seed 0, the first --validation problems); every figure of the tables
comes from the 1,000 held-out problems of mtpkern/assets/problems.jsonl (test split, seed 0). Accuracy and tokens per
pass are counted in batches with all masks for every sequence, which is what a batch of one gets. Times are taken in
turns, each way of decoding in each round; a ratio compares tokens per second within one round.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mtpkern.bench.problems import problems
from mtpkern.bench.report import RESULTS, Table, environment, write
from mtpkern.bench.timing import Spread
from mtpkern.cli import positive
from mtpkern.compare import (
    HF_GENERATE,
    Completion,
    Problem,
    Tally,
    batches,
    compare,
    count_right,
    decode,
    encode,
    read_problems,
)
from mtpkern.demo import ASSETS, MAX_NEW_TOKENS, load
from mtpkern.loading import device_of
from mtpkern.output import exit_status
from mtpkern.show import progress
from mtpkern.strategies import ConfAdapt, Static, Strategy, Verified

PARTS = ("accuracy", "speed")
CONFADAPT = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
VERIFIED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# What ConfAdapt may lose against one token a pass, for its threshold to be chosen.
ACCURACY_KEPT = 0.97
BATCH = 32
STATIC, BY_LOAD = "Static(1)", "Verified(), by load"
# What one way got out of some problems, as JSON has it.
Figures = dict[str, Any]
HEADER = ("way", "right", "tokens a pass", "effective k", "identical", "blocks")


def label(strategy: Strategy) -> str:
    """What the tables call it: `ConfAdapt(8, 0.9)`."""
    return f"{type(strategy).__name__}({strategy.k}, {strategy.threshold})"


class Bench:
    """A checkpoint and its problems, and the figures taken of them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model, self.tokenizer = load(folder)
        self.model: PreTrainedModel = model.to(device)
        self.k_max: int = model.config.mtpkern["k_max"]

    def strategy(self, kind: type[ConfAdapt] | type[Verified], threshold: float | None = None) -> Strategy:
        """ConfAdapt with k = 8 or what was trained where that is less, Verified with its own; the default threshold."""
        k = min(8, self.k_max) if kind is ConfAdapt else kind().for_model(self.k_max).k
        return kind(k) if threshold is None else kind(k, threshold)

    def sweep(self) -> dict[str, Strategy]:
        """All strategies of the accuracy table by their names."""
        ways = [self.strategy(ConfAdapt, t) for t in CONFADAPT] + [self.strategy(Verified, t) for t in VERIFIED]
        return {STATIC: Static(1), **{label(s): s for s in ways}}

    def completions(self, held: Sequence[Problem], strategy: Strategy | None) -> list[Completion]:
        """Decode in large batches; tokens per pass are those of a batch of one, since no mask is saved."""
        out: list[Completion] = []
        for batch in batches(held, BATCH):
            inputs = encode(self.tokenizer, [p.prompt for p in batch], self.model.device)
            rows = {} if strategy is None else {"rows": len(batch) * (2 * strategy.k - 1)}
            out += decode(self.model, inputs, strategy, max_new_tokens=MAX_NEW_TOKENS, **rows)
        return out

    def figures(self, held: Sequence[Problem], completions: list[Completion], greedy: list[Completion]) -> Figures:
        """What one way got out of some problems."""
        tally = Tally()
        tally.add(completions, count_right(self.tokenizer, held, completions), 0.0)
        names = ("problems", "accuracy", "standard_error", "tokens_per_pass", "tokens", "passes")
        mean, deviation = tally.effective_k
        blocks = Counter(size for c in completions for size in c.blocks)
        return {name: getattr(tally, name) for name in names} | {
            "effective_k": mean,
            "effective_k_deviation": deviation,
            "identical_to_hf_greedy": sum(c.tokens == g.tokens for c, g in zip(completions, greedy, strict=True)),
            "blocks_by_size": {str(size): n for size, n in sorted(blocks.items())},
        }

    def count(self, label: str, held: Sequence[Problem], ways: Mapping[str, Strategy | None]) -> dict[str, Figures]:
        """Accuracy, tokens per pass and identity with Hugging Face's greedy tokens of every way."""
        figures: dict[str, Figures] = {}
        with progress(label, len(ways) + 1) as done:
            greedy = self.completions(held, None)
            figures[HF_GENERATE] = self.figures(held, greedy, greedy)
            for i, (name, strategy) in enumerate(ways.items()):
                done(i + 1)
                figures[name] = self.figures(held, self.completions(held, strategy), greedy)
            done(len(ways) + 1)
        return figures

    def choose(self, validation: Sequence[Problem]) -> tuple[Strategy, Strategy]:
        """The thresholds with most tokens per pass on validation problems; ConfAdapt's must keep the accuracy."""
        ways = self.sweep()
        figures = self.count(f"thresholds, {len(validation)} validation problems", validation, ways)
        floor = ACCURACY_KEPT * figures[STATIC]["accuracy"]

        def best(kind: type[ConfAdapt] | type[Verified]) -> Strategy:
            good = [name for name, way in ways.items() if isinstance(way, kind) and figures[name]["accuracy"] >= floor]
            # Where no threshold keeps the accuracy, the most careful one stands.
            careful = self.strategy(kind, max(CONFADAPT))
            return ways[max(good, key=lambda name: figures[name]["tokens_per_pass"])] if good else careful

        return best(ConfAdapt), best(Verified)

    def speed(
        self, held: Sequence[Problem], ways: Mapping[str, Strategy | None], batch: int, rounds: int, per_round: int
    ) -> dict[str, dict[str, Spread]]:
        """Tokens per second and its ratio to Hugging Face's generate, over rounds of fresh problems."""
        rates: dict[str, list[float]] = {name: [] for name in ways}
        options: dict[str, Any] = {"batch_size": batch, "max_new_tokens": MAX_NEW_TOKENS}
        with progress(f"speed at batch {batch}, {len(ways)} ways", rounds) as done:
            for i in range(rounds):
                start = i * per_round % len(held)
                fresh = held[start : start + per_round]
                for name, tally in compare(self.model, self.tokenizer, fresh, ways, **options).items():
                    rates[name].append(tally.tokens_per_second)
                done(i + 1)
        return {
            name: {
                "tokens_per_second": Spread.of(rate),
                "ratio": Spread.of([ours / theirs for ours, theirs in zip(rate, rates[HF_GENERATE])]),
            }
            for name, rate in rates.items()
        }


def accuracy_table(figures: Mapping[str, Figures]) -> Table:
    """One row a way: accuracy, tokens per pass, identity, block sizes."""
    rows = []
    for name, f in figures.items():
        share = ", ".join(f"{size}: {n / f['passes']:.0%}" for size, n in f["blocks_by_size"].items())
        right = f"{f['accuracy']:.2%} ± {f['standard_error']:.2%}"
        k = f"{f['effective_k']:.2f} ± {f['effective_k_deviation']:.2f}"
        same = f"{f['identical_to_hf_greedy']} of {f['problems']}"
        rows.append((name, right, f"{f['tokens_per_pass']:.3f}", k, same, share))
    n = figures[HF_GENERATE]["problems"]
    note = (
        f"{n} held-out problems. Tokens per pass = tokens emitted / passes, the prefill counted; effective k (Eff. k "
        "in the paper) = mean over problems of each one's mean k, its last pass left out, ± standard deviation over "
        "problems; identical = the same tokens as Hugging Face's greedy generate; the last column is how often a pass "
        "emitted how many tokens."
    )
    return Table("Accuracy and tokens per pass", note, HEADER, rows)


def speed_table(batch: int, speed: Mapping[str, Mapping[str, Spread]], rounds: int, per_round: int) -> Table:
    """One row a way: tokens per second and the ratio."""
    rows = [(name, s["tokens_per_second"].text(0), s["ratio"].text()) for name, s in speed.items()]
    note = (
        f"{rounds} rounds of {per_round} problems, in turns; tokens per second of the whole batch, prefill included. "
        "Median over rounds, least and greatest in brackets."
    )
    return Table(f"Wall-clock time, batch {batch}", note, ("way", "tokens/s", "× HF generate"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="this part only; may be given again")
    parser.add_argument("--checkpoint", type=Path, default=ASSETS, help="folder with model, tokenizer, problems.jsonl")
    parser.add_argument("--problems", type=positive, default=1000, help="held-out problems for accuracy")
    parser.add_argument("--validation", type=positive, default=300, help="validation problems for choosing thresholds")
    parser.add_argument("--rounds", type=positive, default=7, help="rounds of timing")
    parser.add_argument(
        "--per-round", type=positive, default=16, help="problems of a round at batch 1; twice that at 8"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="decode", help="name of the result files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv)

    parts = args.only or PARTS
    device = device_of(args.device)
    facts = environment(device)
    bench = Bench(args.checkpoint, device)
    held = read_problems(args.checkpoint / "problems.jsonl", args.problems)
    tables: list[Table] = []
    data: dict[str, object] = {}
    confadapt, verified = bench.choose(problems("validation", args.validation))
    data["chosen"] = {"confadapt": asdict(confadapt), "verified": asdict(verified), "validation": args.validation}
    facts["thresholds"] = (
        f"chosen on {args.validation} validation problems (seed 0): ConfAdapt {confadapt.threshold} for at least "
        f"{ACCURACY_KEPT} of the accuracy of one token a pass, Verified {verified.threshold}"
    )
    if "accuracy" in parts:
        figures = bench.count(f"accuracy, {len(held)} held-out problems", held, bench.sweep())
        tables.append(accuracy_table(figures))
        data["accuracy"] = figures
    if "speed" in parts:
        ways: dict[str, Strategy | None] = {HF_GENERATE: None, STATIC: Static(1)}
        # Of several sequences the last masks of a long span take more time than they bring.
        shorter = Verified(min(8, verified.k), verified.threshold)
        ways |= {label(s): s for s in (bench.strategy(ConfAdapt), confadapt, shorter, verified)}
        ways[BY_LOAD] = Verified()
        for batch in (1, 8):
            per_round = args.per_round * (1 if batch == 1 else 2)
            speed = bench.speed(held, ways, batch, args.rounds, per_round)
            tables.append(speed_table(batch, speed, args.rounds, per_round))
            data[f"speed_batch_{batch}"] = speed

    page = write(args.name, "Decoding with the shipped checkpoint", facts, tables, data, args.results)
    print(page.read_text(encoding="utf-8"))
    print(f"written: {page} and {page.with_suffix('.json').name}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
