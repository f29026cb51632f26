"""The command `mtpkern train [CONFIG] [--name value ...]`: configuration, model, data, trainer, checkpoint."""

from __future__ import annotations

import mtpkern.train.extra  # noqa: F401

# isort: split

import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)

from mtpkern.grading import expected_answer, is_right
from mtpkern.loading import quiet
from mtpkern.model import add_mask_token, record_settings, recorded_settings, require_decodable
from mtpkern.rows import shown
from mtpkern.strategies import name_of, strategy_of
from mtpkern.train import smollm2
from mtpkern.train.arguments import refuse
from mtpkern.train.card import card, write_card
from mtpkern.train.checks import load, require_consistent, require_sources, require_targets_of, require_trainable
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import ModelArguments, MTPConfig
from mtpkern.train.data import BadData, DataArguments, EncodedTexts, Report, load_data, load_held_out
from mtpkern.train.disk import DiskFull
from mtpkern.train.encoder import Encoder
from mtpkern.train.evaluate import HeldOut
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.lock import alone_in
from mtpkern.train.lora import require_adapter
from mtpkern.train.objective import stop_tokens_of
from mtpkern.train.options import first_steps, help_text, parse
from mtpkern.train.progress import TableCallback
from mtpkern.train.record import OtherRun, Record, options_of, origin_of
from mtpkern.train.resume import damaged, newest_checkpoint, require_whole
from mtpkern.train.run import NotFiniteError
from mtpkern.train.summary import summarise
from mtpkern.train.trainer import MTPTrainer


def load_student(
    name: str, dtype: torch.dtype, *, gated: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer, with a mask token and the tokenizer's EOS among the stop tokens.

    A checkpoint that records a mask token keeps it; the base of a gated adapter stays as it is. Raises OSError for a
    name that leads nowhere, ValueError for a model whose embedding has fewer rows than the tokenizer has tokens, or for
    a tokenizer without EOS.
    """
    tokenizer = load(AutoTokenizer, name)
    model = load(AutoModelForCausalLM, name, dtype=dtype)
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    refuse(highest >= rows, f"{name}: the tokenizer has ids up to {highest}, the model only {rows} rows; give a pair")
    if not gated and "mask_token_id" not in recorded_settings(model):
        add_mask_token(model, tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no EOS token, so no answer would ever end; set its eos_token")
    stops = stop_tokens_of(model)
    if tokenizer.eos_token_id not in stops:
        model.generation_config.eos_token_id = [*stops, tokenizer.eos_token_id]
    return model, tokenizer


def load_teacher(name: str, student: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """The frozen teacher. Raises ValueError where it is another model than the student's and speaks other tokens."""
    if name != student:
        theirs, ours = load(AutoTokenizer, name).get_vocab(), tokenizer.get_vocab()
        other = [token for token, i in theirs.items() if ours.get(token) != i]
        if other:
            raise ValueError(
                f"teacher {name} and student {student} must share a vocabulary; {len(other):,} tokens differ, such as "
                f"{other[0]!r} ({theirs[other[0]]} and {ours.get(other[0])})"
            )
    return load(AutoModelForCausalLM, name, dtype=dtype)


def train(
    model_arguments: ModelArguments,
    data: DataArguments,
    config: MTPConfig,
    *,
    command: str = "mtpkern.train.command.train",
) -> list[Report]:
    """Train and save a plain Hugging Face checkpoint with its tokenizer to config.output_dir; returns data reports.

    A run that finds checkpoints in output_dir goes on from the newest, if they are of the same run; one that has ended
    there does nothing. What can be checked is, before any weights are loaded. command: what the model's card names.

        train(ModelArguments("my-model"), DataArguments(["problems.jsonl"]), MTPConfig("out", max_steps=100))
    """
    require_consistent(model_arguments, data, config)
    if config.init_adapter:
        require_adapter(config.init_adapter, rank=config.lora_rank)
    data_format = require_sources(model_arguments, data)
    require_targets_of(model_arguments.model, config.lora_targets)
    with alone_in(config.output_dir) if config.process_index == 0 else nullcontext():
        origin = origin_of(model_arguments, data, config)
        if _has_ended(config, {**options_of(config, stream=data.streaming), **origin}):
            return []
        return _train(model_arguments, data, config, origin, data_format, command)


def _has_ended(config: MTPConfig, recipe: dict[str, Any]) -> bool:
    """Whether nothing is left to do in output_dir. Raises ValueError where what is there is of another run."""
    end, checkpoint = Record.read(config.output_dir), newest_checkpoint(config.output_dir)
    asked = str(config.resume_from_checkpoint or "true").lower()
    if end is None or not end.saved or asked not in ("true", "false"):
        return False
    if end.covers(config):
        end.require_same(recipe, config.allow_changes, config.output_dir)
        _say(
            config,
            f"{config.output_dir} holds the model of this run, which has ended at step {end.step}: nothing is left to "
            "train; raise max_steps to go on, or take another output_dir",
        )
        return True
    if checkpoint is None:
        raise ValueError(
            f"{config.output_dir} holds the model of a run that has ended at step {end.step}, and no checkpoint to go "
            f"on from; take another output_dir (and --model {config.output_dir}, if that model is to be trained on)"
        )
    return False


def _say(config: MTPConfig, text: str) -> None:
    if config.process_index == 0:
        print(text, file=sys.stderr, flush=True)


def _train(
    model_arguments: ModelArguments,
    data: DataArguments,
    config: MTPConfig,
    origin: dict[str, Any],
    data_format: str,
    command: str,
) -> list[Report]:
    checkpoint = _checkpoint(config)
    if checkpoint and (before := Record.read(checkpoint)) is not None:
        # Again in the trainer, which knows more; here no weights have been loaded yet.
        recipe = {**options_of(config, stream=data.streaming), **origin}
        before.require_same(recipe, config.allow_changes, str(checkpoint))
    name = model_arguments.model
    model, tokenizer = load_student(name, getattr(torch, str(config.student_dtype)), gated=config.gated)
    if not config.bidirectional:
        require_decodable(model)
    require_trainable(model, config)
    teacher = None
    if config.needs_teacher and not config.lora_rank:
        computed = "bfloat16" if config.bf16 or config.pure_bf16 else "float16" if config.fp16 else "float32"
        dtype = getattr(torch, config.teacher_dtype or computed)
        teacher = load_teacher(model_arguments.teacher or name, name, tokenizer, dtype)
    rows = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    encode = Encoder(
        tokenizer,
        chat=data.chat,
        separator=data.separator,
        eos_token_ids=stop_tokens_of(model),
        # A gated adapter's is the first id behind the vocabulary.
        mask_token_id=rows if config.gated else recorded_settings(model)["mask_token_id"],
        window=min(filter(None, (config.max_length, positions)), default=None),
        long_rows=data.long_rows,
        response_only=config.response_only,
    )
    train_dataset, eval_dataset, reports = load_data(data, encode, seed=config.seed)
    purposes = ("held out",) if data.streaming else ("training", "held out")
    read = [f"{purpose}: {report}" for purpose, report in zip(purposes, reports)]
    for line in read:
        _say(config, line)
    if isinstance(train_dataset, EncodedTexts) and config.k_max > train_dataset.longest_answer:
        _say(
            config,
            f"warning: k_max is {config.k_max}, and the longest of {len(train_dataset):,} answers has "
            f"{train_dataset.longest_answer} tokens: no prediction behind those learns anything but their end",
        )
    pad = tokenizer.pad_token_id
    trainer = (GatedTrainer if config.gated else MTPTrainer)(
        model=model,
        teacher=teacher,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=MTPCollator(tokenizer.eos_token_id if pad is None else pad),
        processing_class=tokenizer,
        held_out=_to_decode(data, encode, positions),
        origin=origin,
    )
    if data_format != "text":  # whose rows have no prompt
        prompting = {"chat": True} if data.chat else {"chat": False, "separator": data.separator}
        record_settings(model, **prompting)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    table = TableCallback()
    trainer.add_callback(table)
    if checkpoint is not None:
        _say(config, f"going on from {checkpoint}")
    try:
        newest = checkpoint is not None and checkpoint == newest_checkpoint(config.output_dir)
        trainer.train(resume_from_checkpoint=newest or checkpoint)
        # Before anything that can fail.
        trainer.save_model(config.output_dir)
        if eval_dataset is not None and config.eval_strategy == "no":
            trainer.evaluate()
            if config.process_index == 0:
                summarise(trainer.state.log_history, config.output_dir)
        if config.process_index == 0:
            trainer.record(saved=True).write(config.output_dir)
            use = f"{_next_step(model_arguments, config)}\n{_SERVE}"
            run: dict[str, Any] = {"config": config, "record": trainer.record(), "history": trainer.state.log_history}
            write_card(str(config.output_dir), card(base=name, data=read, command=command, use=use, **run))
            print(_next_step(model_arguments, config), flush=True)
    except (DiskFull, OtherRun, BrokenPipeError, BadData, NotFiniteError) as error:
        # Trainer leaves it open where training fails, and it would be drawn once more behind the message.
        if table.training_bar is not None:
            table.training_bar.close()
        if not isinstance(error, (BadData, NotFiniteError)):
            raise
        # A loader's worker puts its traceback in front.
        raise ValueError(str(error).strip().splitlines()[-1].split("BadData: ")[-1]) from error
    except (ValueError, TypeError, OSError):
        traceback.print_exc()  # any other mistake of the user's would have shown before
        raise
    return reports


# `transformers serve` and whatever else calls the model's own generate take it so.
_SERVE = (
    "to serve it, let the model's own generate be ours:\n  model.generate = functools.partial(mtpkern.generate, model)"
)


def _next_step(model_arguments: ModelArguments, config: MTPConfig) -> str:
    """Where the model lies, and how it is decoded."""
    folder = str(config.output_dir)
    decode = f"mtpkern generate {shlex.quote(folder)} --prompt '...'"
    if config.bidirectional:
        return f"the model is in {folder}; bidirectional, it cannot be decoded"
    if config.gated:
        return (
            f"the adapter is in {folder}, for {model_arguments.model}; to decode with it, here or in Python:\n"
            f'  {decode}\n  model = mtpkern.load_adapter(model, "{folder}")'
        )
    return f"the model is in {folder}; to decode with it:\n  {decode}"


def _checkpoint(config: MTPConfig) -> str | None:
    """Where a run goes on from: what resume_from_checkpoint names, else the newest complete checkpoint, if any."""
    asked = config.resume_from_checkpoint
    newest = newest_checkpoint(config.output_dir)
    broken = [folder.name for folder in damaged(config.output_dir)]
    if broken and newest is None and asked is None:
        raise ValueError(
            f"{config.output_dir}: {', '.join(broken)} changed since it was written, and no whole checkpoint is left; "
            "bring it back, or remove it to start anew"
        )
    if broken:
        _say(config, f"{', '.join(broken)} changed since it was written and is passed over")
    # Every option is a string here, but some are meant as a switch.
    switch = str(asked).lower()
    if switch == "true" and newest is None:
        raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {config.output_dir}; leave it out")
    if switch == "false" and newest is not None:
        raise ValueError(f"resume_from_checkpoint is false, but {newest} is there; take another output_dir")
    if asked is None or switch in ("true", "false"):
        return newest
    require_whole(asked)
    return asked


def _to_decode(data: DataArguments, encode: Encoder, positions: int | None) -> HeldOut | None:
    """The first held-out rows as prompts. Raises ValueError for an answer_rule that finds nothing in their answers."""
    # Answers are wanted whole here, however short the texts are that training sees.
    whole = copy(encode)
    whole.window, whole.long_rows = positions, "skip"
    found = load_held_out(replace(data, long_rows="skip"), whole, data.decode_rows) if data.decode_rows else None
    if found is None:
        return None
    tokenizer = encode.tokenizer
    texts = (found[0][i] for i in range(len(found[0])))
    cut = [(text["input_ids"], text["prompt_length"]) for text in texts]
    answers = [str(tokenizer.decode(ids[n:], skip_special_tokens=True)).strip() for ids, n in cut]
    empty = [x for x in answers if data.answer_rule != "auto" and expected_answer(x, data.answer_rule) is None]
    if empty:
        raise ValueError(
            f"answer_rule {data.answer_rule} finds nothing to compare with in {len(empty)} of {len(answers)} held-out "
            f"answers, such as {shown(empty[0])}; take another rule, or auto"
        )
    return HeldOut(
        [ids[:n] for ids, n in cut],
        answers,
        tokenizer,
        is_right=partial(is_right, rule=data.answer_rule),
        strategies={name_of(text): strategy_of(text) for text in data.decode_strategies},
        max_new_tokens=data.decode_tokens,
    )


def main(argv: Sequence[str]) -> None:
    """Run the command line; raises what `parse` and `train` raise."""
    if not argv or {"-h", "--help", "--help-all"} & set(argv):
        print(help_text("--help-all" in argv))
        return
    quiet()
    command = shlex.join(["mtpkern", "train", *argv])
    # The one configuration whose model and data the command itself makes.
    ours = argv[0] == "smollm2"
    try:
        arguments = parse([argv[0], *(smollm2.plan().options if ours else ()), *argv[1:]])
        if ours:
            smollm2.prepare()
        train(*arguments, command=command)
    except FileNotFoundError as error:
        before = first_steps(argv[0])
        if not before:
            raise
        raise FileNotFoundError("\n  ".join([f"{error}. {argv[0]} needs what these make:", *before])) from error
