"""The command `mtpkern train [CONFIG] [--name value ...]`: configuration, model, data, trainer, checkpoint.

A configuration is a .yaml or .json file of names and values, or the name of one that is shipped; flags win over it.
Values of a file become flags too, so that both are converted and checked by the same parser: `1e-5`, a string in YAML,
is a number here. null means the default.

Source   arXiv 2602.06019, training details (the shipped configurations)
"""

from __future__ import annotations

# First, because transformers would not name what is missing.
import mtpkern.train.extra  # noqa: F401

# isort: split

import json
import sys
import textwrap
import traceback
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from mtpkern.model import add_mask_token, recorded_settings
from mtpkern.train.data import BadData, DataArguments, Report, load_data, load_held_out, require_found
from mtpkern.train.evaluate import HeldOut, same_number, summarise
from mtpkern.train.formats import Encoder
from mtpkern.train.resume import newest_checkpoint, require_whole
from mtpkern.train.trainer import MTPCollator, MTPConfig, MTPTrainer, NotFiniteError

CONFIGS = Path(__file__).parent / "configs"
# What --help shows of TrainingArguments; --help-all names the rest.
# fmt: off
_USUAL = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "activation_checkpointing", "fsdp",
    "logging_steps", "eval_strategy", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "report_to", "seed", "use_cpu",
)
# fmt: on
# Where this command does more than TrainingArguments say.
_HELP = {
    "output_dir": "For checkpoints and the final model, trainer_output unless given; a run goes on from what is there.",
    "report_to": "Where curves go besides: one or more of tensorboard, wandb, trackio ..., as far as installed.",
    "resume_from_checkpoint": "The checkpoint to go on from; the newest whole one of output_dir unless given.",
    "max_length": "Longer texts are treated as long_rows says; the model's positions bound them in any case.",
}


@dataclass
class ModelArguments:
    """Which model is trained."""

    model: str = field(metadata={"help": "The checkpoint to train: a path or hub id."})
    teacher: str | None = field(
        default=None, metadata={"help": "The frozen teacher; the checkpoint to train unless given."}
    )


Arguments = tuple[ModelArguments, DataArguments, MTPConfig]
_GROUPS = {"Model": ModelArguments, "Data": DataArguments, "Multi-token prediction and training": MTPConfig}
_FIELDS = {f.name: f for group in _GROUPS.values() for f in fields(group) if f.init}
_NAMES = list(_FIELDS)


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Of a type that is one name or several, HfArgumentParser would take only one."""
        return super().add_argument(*names, **options | ({"nargs": "+"} if "--report_to" in names else {}))

    def error(self, message: str) -> NoReturn:
        """A mistake is a ValueError like any other; argparse would print every option there is."""
        raise ValueError(message.replace("the following arguments are required", "missing"))


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"line {node.start_mark.line + 1}: {', '.join(twice)} given twice; keep one")
        return super().construct_mapping(node, deep)


def shipped_configs() -> list[str]:
    """The names of the configurations that come with the package: `"metamath-llama" in shipped_configs()`."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(name: str) -> dict[str, Any]:
    """The values of a .yaml or .json file, or of a shipped configuration.

    Raises FileNotFoundError where there is neither, ValueError for what is no mapping of known names.

        read_config("metamath-llama")["max_length"]  # 160
    """
    path = Path(name)
    if not path.is_file():
        if name not in shipped_configs():
            raise FileNotFoundError(
                f"{name}: there is no such file, nor a shipped configuration of that name "
                f"(those are {', '.join(shipped_configs())})"
            )
        path = CONFIGS / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected names and values; got {type(values).__name__}")
    unknown = [str(key) for key in values if key not in _NAMES]
    if unknown:
        raise ValueError(f"{path}: {_unknown(unknown)}")
    return values


def _unknown(names: Iterable[str]) -> str:
    parts = []
    for name in names:
        near = get_close_matches(name, _NAMES, n=1)
        parts.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return f"unknown option {', '.join(parts)}; mtpkern train --help-all names them all"


def _flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        # transformers types fsdp as a string, but means a switch that is there or not.
        switch = _FIELDS[name].metadata.get("const") is True
        if value is None or (switch and value is False):
            continue
        if switch and value is True:
            flags.append(f"--{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        else:
            flags.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from an optional configuration and flags; flags win.

    Raises ValueError for what is unknown (naming the nearest known option), missing or of the wrong kind.

        model, data, config = parse(["gsm8k", "--model", "my-model", "--output-dir", "out", "--max-steps", "100"])
    """
    rest = list(argv)
    values = read_config(rest.pop(0)) if rest and not rest[0].startswith("-") else {}
    parser = _Parser(tuple(_GROUPS.values()), allow_abbrev=False, add_help=False)
    flags = [*_flags(values), *rest]
    # Names first: a misspelt one shall not hide behind a complaint about another that is missing.
    options = [word.split("=")[0][2:].replace("-", "_") for word in rest if word.startswith("--")]
    unknown = [name for name in options if name not in _NAMES and name.removeprefix("no_") not in _NAMES]
    if unknown:
        raise ValueError(_unknown(unknown))
    model, data, config, remaining = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    if remaining:
        raise ValueError(f"unexpected {' '.join(remaining)!r}; expected one CONFIG and then --name value ...")
    _require_consistent(model, data, config)
    return model, data, config


def _require_consistent(model: ModelArguments, data: DataArguments, config: MTPConfig) -> None:
    """Raise ValueError, before anything is loaded, for options of two groups that contradict one another."""
    held_out = bool(data.eval_data or data.eval_fraction)
    absent = sorted({*config.report_to} - {*get_available_reporting_integrations()})
    strategy = config.train_sampling_strategy
    for wrong, says in (
        (config.per_device_train_batch_size < 1, "per_device_train_batch_size must be at least 1"),
        (
            config.max_steps == 0 or (config.max_steps < 0 and config.num_train_epochs <= 0),
            "nothing would be trained: give a positive max_steps, or num_train_epochs with max_steps -1",
        ),
        (data.streaming and config.max_steps <= 0, "streaming data have no known length; set max_steps"),
        (
            data.streaming and strategy != "random",
            f"streaming data have an order of their own; leave out train_sampling_strategy, which is {strategy!s}",
        ),
        (
            not held_out and bool(data.decode_rows),
            "decode_rows needs held-out rows; give eval_data or eval_fraction",
        ),
        (
            not held_out and config.eval_strategy != "no",
            "eval_strategy needs held-out rows; give eval_data or eval_fraction, or set eval_strategy: no",
        ),
        (
            config.bidirectional and bool(data.decode_rows),
            "mtpkern.generate cannot decode a bidirectional model; set decode_rows to 0",
        ),
        (
            model.teacher is not None and config.lora_rank > 0,
            "with LoRA the teacher is the student without its adapters; leave teacher out",
        ),
        (
            model.teacher is not None and not config.needs_teacher,
            "teacher_target 'gt' without anchor_kl_weight asks no teacher; leave teacher out",
        ),
        (
            bool(absent),
            f"report_to names {', '.join(absent)}, which is not installed or unknown; pip install it, or leave it out",
        ),
        (
            isinstance(config.lr_scheduler_kwargs, str),
            f"lr_scheduler_kwargs must be names and values, as JSON in a flag; got {config.lr_scheduler_kwargs!r}",
        ),
        (
            Path(str(config.output_dir)).is_file(),
            f"output_dir must be a folder; {config.output_dir} is a file",
        ),
    ):
        if wrong:
            raise ValueError(says)


def help_text(everything: bool = False) -> str:
    """What --help prints: our own options and the usual ones of TrainingArguments; --help-all names the others too."""
    lines = [
        "usage: mtpkern train [CONFIG] [--name value ...] | --help | --help-all",
        "",
        "CONFIG is a .yaml or .json file of the names below, or a shipped one:",
        f"  {', '.join(shipped_configs())}",
        "Flags win over it; --no-name or --name false switches off.",
        "Under torchrun or accelerate launch: -m mtpkern.train [CONFIG] [--name value ...].",
        "--help-all also names the options of transformers.TrainingArguments that are not shown here.",
    ]
    inherited = {f.name for f in fields(TrainingArguments)}
    hidden = []
    for title, group in _GROUPS.items():
        lines += ["", title]
        shown = [f for f in fields(group) if f.init]
        if group is MTPConfig:
            hidden = [f.name for f in shown if f.name in inherited and f.name not in _USUAL]
            shown = sorted((f for f in shown if f.name not in hidden), key=lambda f: f.name in inherited)
        for f in shown:
            text = _HELP.get(f.name) or " ".join(str(f.metadata.get("help", "")).replace("%%", "%").split())
            if f.name in inherited and f.name not in _HELP:
                text = text.split(". ")[0].rstrip(".") + "."
            default = "required" if f.default is MISSING else f"default {getattr(f.default, 'value', f.default)!r}"
            option = f"  --{f.name.replace('_', '-')}"
            wrapped = textwrap.wrap(f"{text} ({default})", 84)
            lines.append(f"{option:<34} {wrapped[0]}" if len(option) < 34 else f"{option}\n{'':<34} {wrapped[0]}")
            lines += [f"{'':<34} {line}" for line in wrapped[1:]]
    if everything:
        names = textwrap.wrap(" ".join(f"--{name.replace('_', '-')}" for name in hidden), 116, break_on_hyphens=False)
        lines += ["", "Also of transformers.TrainingArguments, see its documentation", *(f"  {line}" for line in names)]
    return "\n".join(lines)


def load_student(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer, with a mask token and the tokenizer's EOS among the stop tokens.

    A checkpoint that records a mask token keeps it. Raises OSError for a name that leads nowhere, ValueError for a
    model whose embedding has fewer rows than the tokenizer has tokens, or for a tokenizer without EOS.
    """
    tokenizer = _load(AutoTokenizer, name)
    model = _load(AutoModelForCausalLM, name, dtype=dtype)
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(f"{name}: the tokenizer has ids up to {highest}, the model only {rows} rows; give a pair")
    if "mask_token_id" not in recorded_settings(model):
        add_mask_token(model, tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no EOS token, so no answer would ever end; set its eos_token")
    stops = _stop_tokens(model)
    if tokenizer.eos_token_id not in stops:
        model.generation_config.eos_token_id = [*stops, tokenizer.eos_token_id]
    return model, tokenizer


def _load(kind: Any, name: str, **options: Any) -> Any:
    """What `from_pretrained` loads; its errors name the checkpoint."""
    require_found(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name}: there is no model in this folder, config.json is missing")
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise OSError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error


def _stop_tokens(model: PreTrainedModel) -> list[int]:
    stops = model.generation_config.eos_token_id
    stops = model.config.eos_token_id if stops is None else stops
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def load_teacher(name: str, student: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """The frozen teacher. Raises ValueError where it is another model than the student's and speaks other tokens."""
    if name != student:
        theirs, ours = _load(AutoTokenizer, name).get_vocab(), tokenizer.get_vocab()
        other = [token for token, i in theirs.items() if ours.get(token) != i]
        if other:
            raise ValueError(
                f"teacher {name} and student {student} must share a vocabulary; {len(other):,} tokens differ, such as "
                f"{other[0]!r} ({theirs[other[0]]} and {ours.get(other[0])})"
            )
    return _load(AutoModelForCausalLM, name, dtype=dtype)


def train(model_arguments: ModelArguments, data: DataArguments, config: MTPConfig) -> list[Report]:
    """Train and save a plain Hugging Face checkpoint with its tokenizer to config.output_dir; returns data reports.

    A run that finds checkpoints in output_dir goes on from the newest.

        train(ModelArguments("my-model"), DataArguments(["problems.jsonl"]), MTPConfig("out", max_steps=100))
    """
    _require_consistent(model_arguments, data, config)
    checkpoint = _checkpoint(config)
    name = model_arguments.model
    model, tokenizer = load_student(name, getattr(torch, config.student_dtype))
    teacher = None
    if config.needs_teacher and not config.lora_rank:
        computed = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
        dtype = getattr(torch, config.teacher_dtype or computed)
        teacher = load_teacher(model_arguments.teacher or name, name, tokenizer, dtype)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    encode = Encoder(
        tokenizer,
        chat=data.chat,
        separator=data.separator,
        eos_token_ids=_stop_tokens(model),
        mask_token_id=recorded_settings(model)["mask_token_id"],
        window=min(filter(None, (config.max_length, positions)), default=None),
        long_rows=data.long_rows,
        response_only=config.response_only,
    )
    train_dataset, eval_dataset, reports = load_data(data, encode, seed=config.seed)
    if config.process_index == 0:
        purposes = [purpose for purpose in ("training", "held out") if purpose != "training" or not data.streaming]
        for purpose, report in zip(purposes, reports):
            print(f"{purpose}: {report}", file=sys.stderr, flush=True)
    pad = tokenizer.pad_token_id
    trainer = MTPTrainer(
        model=model,
        teacher=teacher,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=MTPCollator(tokenizer.eos_token_id if pad is None else pad),
        processing_class=tokenizer,
        held_out=_to_decode(data, encode, positions),
    )
    if checkpoint is not None and config.process_index == 0:
        print(f"going on from {checkpoint}", file=sys.stderr, flush=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if eval_dataset is not None and config.eval_strategy == "no":
            trainer.evaluate()
            if config.process_index == 0:
                summarise(trainer.state.log_history, config.output_dir)
        trainer.save_model(config.output_dir)
    except (BadData, NotFiniteError) as error:
        _close_progress_bar(trainer)
        # A loader's worker puts its traceback in front.
        raise ValueError(str(error).strip().splitlines()[-1].split("BadData: ")[-1]) from error
    except (ValueError, TypeError, OSError):
        traceback.print_exc()  # any other mistake of the user's would have shown before
        raise
    return reports


def _close_progress_bar(trainer: MTPTrainer) -> None:
    """Trainer leaves it open where training fails, and it would be drawn once more behind the message."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.close()


def _checkpoint(config: MTPConfig) -> str | None:
    """Where a run goes on from: what resume_from_checkpoint names, else the newest complete checkpoint, if any."""
    asked = config.resume_from_checkpoint
    newest = newest_checkpoint(config.output_dir)
    # Every option is a string here, but some are meant as a switch.
    if asked is None or str(asked).lower() not in ("true", "false"):
        if asked is not None:
            require_whole(asked)
        return asked or newest
    if str(asked).lower() == "true" and newest is None:
        raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {config.output_dir}; leave it out")
    if str(asked).lower() == "false" and newest is not None:
        raise ValueError(f"resume_from_checkpoint is false, but {newest} is there; take another output_dir")
    return newest


def _to_decode(data: DataArguments, encode: Encoder, positions: int | None) -> HeldOut | None:
    """The first held-out rows as prompts; right is the same `#### n`, or the same text where answers have none."""
    # Answers are wanted whole here, however short the texts are that training sees.
    whole = copy(encode)
    whole.window, whole.long_rows = positions, "skip"
    found = load_held_out(replace(data, long_rows="skip"), whole, data.decode_rows) if data.decode_rows else None
    if found is None:
        return None
    tokenizer = encode.tokenizer
    prompts, answers = [], []
    for i in range(len(found[0])):
        ids, length = found[0][i]["input_ids"], found[0][i]["prompt_length"]
        prompts.append(ids[:length])
        answers.append(str(tokenizer.decode(ids[length:], skip_special_tokens=True)).strip())
    is_right = same_number if all("####" in answer for answer in answers) else _same_text
    return HeldOut(prompts, answers, tokenizer, is_right=is_right, max_new_tokens=data.decode_tokens)


def _same_text(answer: str, expected: str) -> bool:
    return answer.strip() == expected


def main(argv: Sequence[str]) -> None:
    """Run the command line; raises what `parse` and `train` raise."""
    if not argv or {"-h", "--help", "--help-all"} & set(argv):
        print(help_text("--help-all" in argv))
        return
    train(*parse(argv))
