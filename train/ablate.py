"""`make ablate`: the recipe's switches against one another on the word problems, at matched steps, over several seeds.

Every variant starts from the same model, which is its frozen teacher too, sees the same problems in the same order and
takes the same number of steps; `variants` names how it differs from "hard". Afterwards it decodes held-out problems. A
run that is there is not repeated; one that was stopped goes on from its newest complete checkpoint.

`python -m mtpkern.train.ablate --start runs/checkpoint/teacher [--steps 400] [--seeds 0 1] [--only hard soft]` writes a
table to `--out`/table.md and prints it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mtpkern.output import exit_status
from mtpkern.strategies import ConfAdapt, Static, Strategy, Verified
from mtpkern.train.arithmetic import problems, prompt
from mtpkern.train.checkpoint import K_MAX, NUM_SPANS, examples, schedule
from mtpkern.train.checks import load
from mtpkern.train.collator import MTPCollator
from mtpkern.train.command import load_student
from mtpkern.train.config import MTPConfig
from mtpkern.train.evaluate import HeldOut, figures
from mtpkern.train.resume import newest_checkpoint
from mtpkern.train.summary import markdown
from mtpkern.train.trainer import MTPTrainer


def variants(steps: int) -> dict[str, dict[str, Any]]:
    """What each variant changes in the settings of "hard", the paper's default."""
    warmup = {"gt_warmup_steps": steps * 3 // 4}
    return {
        "hard": {},
        "soft": {"teacher_target": "soft"},
        "ground truth": {"teacher_target": "gt"},
        "ground truth, then hard": warmup,
        "anchor": {"anchor_kl_weight": 0.5},
        "prefix loss": {"prefix_weight": 0.5},
        "static k": {"k_min": K_MAX},
        "until the first failure": {"loss_support": "until_fail"},
        "half the spans": {"num_spans": NUM_SPANS // 2},
        "twice the spans": {"num_spans": NUM_SPANS * 2},
        "the paper's stride": {"num_spans": None, "spacing": "stride"},
        "stride": {"num_spans": 5, "spacing": "stride"},
        "as many as the stride, at random": {"num_spans": 5},
        "warm-up, anchor, first failure": {**warmup, "anchor_kl_weight": 0.5, "loss_support": "until_fail"},
    }


STRATEGIES: dict[str, Strategy] = {
    "k = 1": Static(1),
    "ConfAdapt": ConfAdapt(K_MAX, 0.9),
    "Verified": Verified(K_MAX, 0.6),
}


def run_variant(name: str, seed: int, work: Path, args: argparse.Namespace) -> dict[str, float]:
    """Train one variant, or take up where it stopped, and measure it; what was measured stands in result.json."""
    done = work / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    change = variants(args.steps)[name]
    model, tokenizer = load_student(str(args.start), torch.float32)
    settings = {
        **schedule(args.steps, 2e-3, float32=args.float32),
        "per_device_train_batch_size": args.batch,
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
        "save_steps": 100,
        "k_max": K_MAX,
        "num_spans": NUM_SPANS,
        "spacing": "random",
    }
    trainer = MTPTrainer(
        model=model,
        teacher=load(AutoModelForCausalLM, str(args.start), dtype=torch.float32),
        args=MTPConfig(str(work), **settings | change),
        train_dataset=examples(tokenizer, args.steps * args.batch, seed),
        eval_dataset=examples(tokenizer, args.problems, seed, "validation"),
        data_collator=MTPCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(work))
    evaluated = trainer.evaluate()
    result = {"agreeing prefix": evaluated["eval_agreeing_prefix"]}
    held_out = list(problems("validation", args.problems, seed=0))
    texts, answers = [prompt(p) for p in held_out], [f"#### {p.result}" for p in held_out]
    for decoder, strategy in STRATEGIES.items():
        counts = HeldOut(texts, answers, tokenizer, strategies={decoder: strategy}, max_new_tokens=100).count(model)
        names = {"accuracy": "right", "tokens_per_pass": "tokens per pass", "effective_k": "effective k"}
        result |= {f"{decoder}: {names[name]}": x for name, x in figures(counts[0]).items() if name in names}
    work.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(result))
    return result


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean over the seeds, with the smallest and the largest where there are several, a row for each variant."""
    # One token a pass is one token a pass.
    left_out = {"k = 1: tokens per pass", "k = 1: effective k"}
    columns = [name for name in next(iter(results.values()))[0] if name not in left_out]

    def cell(values: list[float]) -> str:
        spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.3f}{spread}"

    rows = [[name, *(cell([run[column] for run in runs]) for column in columns)] for name, runs in results.items()]
    return "\n".join(markdown(["variant", *columns], rows)) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run every variant with every seed, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="the model to start from: student and teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="runs, to stop and resume, and table.md")
    parser.add_argument("--steps", type=int, default=400, help="steps of every variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one run a seed")
    parser.add_argument("--only", nargs="+", help="these variants, by name")
    parser.add_argument("--batch", type=int, default=32, help="problems a step")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems")
    parser.add_argument("--float32", action="store_true", help="not bf16, which some CPUs compute a hundredfold slower")
    args = parser.parse_args(argv)
    chosen = variants(args.steps)
    unknown = sorted(set(args.only or []) - set(chosen))
    if unknown:
        parser.error(f"unknown variants {', '.join(unknown)}; there are {', '.join(chosen)}")
    if not (args.start / "config.json").exists():
        parser.error(f"{args.start} holds no model: train one with `make checkpoint`, whose first phase is a start")
    results: dict[str, list[dict[str, float]]] = {}
    for seed, name in product(args.seeds, chosen):
        if args.only and name not in args.only:
            continue
        folder = "-".join(re.findall(r"\w+", name))
        work = args.out / f"{folder}-{args.steps}-seed{seed}"
        results.setdefault(name, []).append(run_variant(name, seed, work, args))
        (args.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(exit_status(main))
