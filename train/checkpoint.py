"""`make checkpoint`: the shipped demonstration checkpoint from nothing, on two CPU cores.

Seven phases, each of which resumes where it was stopped and is skipped once it is finished:

    teacher             a small Llama learns the word problems of mtpkern.train.arithmetic, one token at a time, by
                        plain Trainer
    warmup              from the teacher, `mtpkern train` with the data's own tokens as targets
    distill             from the warm-up, self-distillation against its own frozen start (arXiv 2602.06019, hard
                        teacher)
    warmup2, distill2   the same two from there, the rate high once more: a warm-up of twice the steps, without a fall
    warmup3, distill3   of the rate between, brought less (docs/log.md)

`python -m mtpkern.train.checkpoint [--work runs/checkpoint] [--out FOLDER]` writes model and tokenizer to `--out`,
`--work`/shipped unless given, and the curves of all phases to `--work`/curves.json. `--out mtpkern/assets` puts them in
the place of those that are shipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mtpkern.output import exit_status
from mtpkern.train.arithmetic import Split, build_tokenizer, encode, problems, write_rows
from mtpkern.train.collator import MTPCollator
from mtpkern.train.command import load_student, train
from mtpkern.train.config import ModelArguments, MTPConfig
from mtpkern.train.data import DataArguments
from mtpkern.train.saving import save_plain
from mtpkern.training_plots import read_history, state_of

SEED = 0
BATCH = 32
STEPS = {"teacher": 2400, "warmup": 2400, "distill": 300}
STEPS |= {"warmup2": 2400, "distill2": 600, "warmup3": 2400, "distill3": 600}
# Spans are causal, so a model trained for 12 predictions serves every smaller k.
K_MAX = 12
NUM_SPANS = 12
# The next-token loss on the answer keeps k = 1 as good as the teacher's.
PREFIX_WEIGHT = 0.5


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A fresh Llama of 0.8 M parameters: few and narrow layers, so that a pass of 15 rows costs little more than 1."""
    set_seed(SEED)
    config = LlamaConfig(
        # The mask token gets its row from add_mask_token, not from a spare one.
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Not the default, whose backward pass takes nearly half of a step on a CPU.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def examples(tokenizer: PreTrainedTokenizerBase, n: int, seed: int, split: Split = "train") -> list[dict[str, Any]]:
    """`n` problems as {"input_ids": list, "prompt_length": int}; different seeds give different problems."""
    pairs = (encode(problem, tokenizer) for problem in problems(split, n, seed=seed))
    return [{"input_ids": ids, "prompt_length": length} for ids, length in pairs]


def data_seed(phase: str) -> int:
    """Each phase has problems of its own."""
    return SEED + list(STEPS).index(phase)


class TeacherCollator(MTPCollator):
    """Right-pads to the longest of the batch; labels are the whole text."""

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Input ids and labels [B, N] int64; padding has label -100."""
        padded = super().__call__(batch)
        ids, lengths = padded["input_ids"], torch.tensor(padded["lengths"])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], -100)
        # No attention mask: padding stands behind the text, where a causal model does not look.
        return {"input_ids": ids, "labels": labels}


def schedule(steps: int, learning_rate: float, *, float32: bool = False) -> dict[str, Any]:
    """AdamW, a short warm-up, a constant rate, a decay over the last 40 %; a newest checkpoint to go on from."""
    return {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": min(100, steps // 10),
        "lr_scheduler_kwargs": {"num_decay_steps": int(0.4 * steps), "decay_type": "linear"},
        "adam_beta2": 0.98,
        "bf16": not float32,
        "logging_steps": 25,
        "save_total_limit": 1,
    }


def common_arguments(work: Path, phase: str, learning_rate: float, float32: bool = False) -> dict[str, Any]:
    """Arguments that all phases share."""
    return {
        **schedule(STEPS[phase], learning_rate, float32=float32),
        "output_dir": str(work / phase),
        "per_device_train_batch_size": BATCH,
        "weight_decay": 0.01,
        "use_cpu": True,
        "seed": SEED,
        "train_sampling_strategy": "group_by_length",
        "save_steps": 200,
        "report_to": "none",
        "remove_unused_columns": False,
    }


def train_teacher(work: Path, learning_rate: float, float32: bool = False) -> None:
    """Phase 1: an ordinary causal language model."""
    out = work / "teacher"
    if (out / "model.safetensors").exists():
        return
    tokenizer = build_tokenizer()
    trainer = Trainer(
        model=build_model(tokenizer),
        args=TrainingArguments(**common_arguments(work, "teacher", learning_rate, float32)),
        train_dataset=examples(tokenizer, STEPS["teacher"] * BATCH, data_seed("teacher")),
        data_collator=TeacherCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)))
    trainer.save_model(str(out))


def publish(work: Path, out: Path) -> None:
    """Copy the last phase's model and tokenizer to `out`, its card where none is, and all curves to curves.json."""
    last = work / list(STEPS)[-1]
    model, tokenizer = load_student(str(last), torch.float32)
    save_plain(model, out, torch.float32, processing_class=tokenizer)
    card = last / "README.md"
    if card.is_file() and not (out / "README.md").exists():
        shutil.copyfile(card, out / "README.md")
    states = {phase: state_of(work / phase) for phase in STEPS}
    curves = {phase: read_history(state) for phase, state in states.items() if state is not None}
    (work / "curves.json").write_text(json.dumps(curves))


def train_mtp(work: Path, phase: str, start: str, target: str, learning_rate: float, float32: bool = False) -> None:
    """Every other phase: `mtpkern train` from the model of phase `start`, which is also the frozen teacher."""
    if (work / phase / "model.safetensors").exists():
        return
    seed = data_seed(phase)
    data, held_out = work / f"train-seed{seed}.jsonl", work / f"validation-seed{SEED}.jsonl"
    write_rows(data, problems("train", STEPS[phase] * BATCH, seed=seed))
    write_rows(held_out, problems("validation", 256, seed=SEED))
    config = MTPConfig(
        **common_arguments(work, phase, learning_rate, float32),
        k_min=2,
        k_max=K_MAX,
        num_spans=NUM_SPANS,
        spacing="random",
        teacher_target=target,
        # As small as the model is, its teacher need not be rounded.
        teacher_dtype=None if target == "gt" else "float32",
        prefix_weight=PREFIX_WEIGHT,
        eval_strategy="steps",
        eval_steps=200,
        per_device_eval_batch_size=64,
    )
    rows = DataArguments([str(data)], eval_data=[str(held_out)], chat=False, separator="")
    train(ModelArguments(str(work / start)), rows, config, command="python -m mtpkern.train.checkpoint")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the phases that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where model and tokenizer go (default: shipped, in --work)")
    parser.add_argument("--work", type=Path, default=Path("runs/checkpoint"), help="checkpoints, to stop and resume")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--float32", action="store_true", help="not bf16, which some CPUs compute many times slower")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train_teacher(args.work, 4e-3, args.float32)
    start, *others = STEPS
    for phase in others:
        target, rate = ("gt", 2e-3) if phase.startswith("warmup") else ("hard", 1e-3)
        train_mtp(args.work, phase, start, target, rate, args.float32)
        start = phase
    out = args.out or args.work / "shipped"
    publish(args.work, out)
    print(f"the model is in {out}; the same command with --out mtpkern/assets puts it in the place of the shipped one")


if __name__ == "__main__":
    sys.exit(exit_status(main))
