"""The options of `mtpkern train`: a configuration, flags that win over it, and the help.

A configuration is a .yaml or .json file of names and values, or the name of one that is shipped. Values of a file
become flags too, so that both are converted and checked by the same parser; the types in a file are checked besides.
null means the default.

Source   arXiv 2602.06019, training details (the shipped configurations)
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from mtpkern.train.arguments import refuse
from mtpkern.train.checks import require_consistent
from mtpkern.train.config import ModelArguments, MTPConfig
from mtpkern.train.data import DataArguments

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
_GROUPS = {"Model": ModelArguments, "Data": DataArguments, "Multi-token prediction and training": MTPConfig}
_FIELDS = {f.name: f for group in _GROUPS.values() for f in fields(group) if f.init}
# Words for true and false where a switch is meant; YAML 1.1 took them so everywhere.
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_HINTS = {name: hint for group in _GROUPS.values() for name, hint in get_type_hints(group).items()}
# transformers types it as a text, but means a switch.
_HINTS["fsdp"] = bool | str | None
# What YAML 1.1 reads otherwise: the pattern, and with what it may begin.
_REPLACED = {
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$",
        "-+0123456789.",
    ),
}


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Of a type that is one name or several, HfArgumentParser would take only one."""
        return super().add_argument(*names, **options | ({"nargs": "+"} if "--report_to" in names else {}))

    def error(self, message: str) -> NoReturn:
        """A mistake is a ValueError like any other; argparse would print every option there is."""
        raise ValueError(message.replace("the following arguments are required", "missing"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2, where `1e-5` is a number and `no` a word; a name that stands twice is refused, YAML takes the last."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in found if tag not in _REPLACED]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            refuse(name in lines, f"line {line}: {name} given twice, before in line {lines.get(name)}; keep one")
            lines[name] = line
        return super().construct_mapping(node, deep)


for _tag, (_pattern, _first) in _REPLACED.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def shipped_configs() -> list[str]:
    """The names of the configurations that come with the package: `"metamath-llama" in shipped_configs()`."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def first_steps(name: str) -> list[str]:
    """The commands that a shipped configuration names before its own, which make what it reads; none for any other.

    first_steps("arithmetic")[-1]  # "python -m mtpkern.train.arithmetic --write runs/problems"
    """
    if name not in shipped_configs():
        return []
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]
    return [command for command in commands if f" train {name}" not in command and f".train {name}" not in command]


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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}); convert it") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    refuse(not isinstance(values, dict), f"{path}: expected names and values; got {type(values).__name__}")
    unknown = [str(key) for key in values if key not in _FIELDS]
    refuse(unknown, f"{path}: {_unknown(unknown)}")
    for key, value in values.items():
        hint = _HINTS[key]
        if value is not None and not _fits(value, hint):
            got = f"{value!r} ({type(value).__name__})"
            raise ValueError(f"{path}: {key} must be {_said(hint)}; got {got}: {_remedy(value, hint)}")
        if bool in (hint, *get_args(hint)) and isinstance(value, str):
            values[key] = _SWITCHES.get(value.lower(), value)
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a file is of an option's type; one text may stand for a list, a whole number for a real."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return all(_fits(item, get_args(hint)[0]) for item in items)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint is bool and isinstance(value, str):
        return value.lower() in _SWITCHES
    kind = get_origin(hint) or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _said(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "names and values"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_said(part) for part in get_args(hint) if part is not NoneType))
    if get_origin(hint) is list:
        return f"a list, each {_said(get_args(hint)[0])}"
    return words.get(get_origin(hint) or hint, "a text")


def _remedy(value: Any, hint: Any) -> str:
    if isinstance(value, list):
        return "give one value without brackets" if "a list" not in _said(hint) else "mend its items"
    if isinstance(value, str):
        return "leave the quotes out"
    if isinstance(value, float) and value.is_integer() and "a whole number" in _said(hint):
        return f"write {int(value)}"
    return "put a text in quotes" if "a text" in _said(hint) else "mend it"


def _unknown(names: Iterable[str]) -> str:
    near = {name: get_close_matches(name, _FIELDS, n=1) for name in names}
    parts = [f"{name!r} (did you mean {found[0]!r}?)" if found else f"{name!r}" for name, found in near.items()]
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


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, MTPConfig]:
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
    unknown = [name for name in options if not {name, name.removeprefix("no_")} & _FIELDS.keys()]
    refuse(unknown, _unknown(unknown))
    # The last of several wins, as everywhere; but of a list one would expect all.
    lists = [f"--{name.replace('_', '-')}" for name in {*options} & _FIELDS.keys() if "a list" in _said(_HINTS[name])]
    twice = [flag for flag in lists if options.count(flag[2:].replace("-", "_")) > 1]
    refuse(twice, f"{', '.join(twice)} given more than once; give it once, with all its values behind it")
    model, data, config, remaining = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    refuse(remaining, f"unexpected {' '.join(remaining)!r}; expected one CONFIG and then --name value ...")
    require_consistent(model, data, config)
    return model, data, config


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
    hidden = [name for name in _FIELDS if name in inherited and name not in _USUAL]
    for title, group in _GROUPS.items():
        lines += ["", title]
        shown = [f for f in fields(group) if f.init and f.name not in hidden]
        for f in sorted(shown, key=lambda f: f.name in inherited):
            text = _HELP.get(f.name) or " ".join(str(f.metadata.get("help", "")).replace("%%", "%").split())
            if f.name in inherited and f.name not in _HELP:
                text = text.split(". ")[0].rstrip(".") + "."
            value = f.default if f.default_factory is MISSING else f.default_factory()
            default = "required" if value is MISSING else f"default {getattr(value, 'value', value)!r}"
            option = f"  --{f.name.replace('_', '-')}"
            wrapped = textwrap.wrap(f"{text} ({default})", 84)
            lines.append(f"{option:<34} {wrapped[0]}" if len(option) < 34 else f"{option}\n{'':<34} {wrapped[0]}")
            lines += [f"{'':<34} {line}" for line in wrapped[1:]]
    if everything:
        names = textwrap.wrap(" ".join(f"--{name.replace('_', '-')}" for name in hidden), 116, break_on_hyphens=False)
        lines += ["", "Also of transformers.TrainingArguments, see its documentation", *(f"  {line}" for line in names)]
    return "\n".join(lines)
