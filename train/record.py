"""What makes a run what it is, written into its checkpoints: what goes on is the same run, or says where it is not.

    recorded        every option that changes what is trained; the data, its order and digest; model, teacher and
                    adapters; the number of processes and the kind of device
    not recorded    how long: a run of more steps goes on; when it logs, saves and evaluates, and where to; what is
                    evaluated, unless that chooses the best checkpoint; loader workers, but for a stream, whose order
                    they change; what trades memory for time and computes the same (activation_checkpointing,
                    prefix_memory, cuda_graph)
    information     versions

The same file in output_dir records that a run has ended, and where.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import get_scheduler

import mtpkern
from mtpkern.output import write_whole
from mtpkern.train.config import ModelArguments, MTPConfig
from mtpkern.train.data import DataArguments
from mtpkern.train.resume import digests

logger = logging.getLogger(__name__)

RECORD = "run.json"

# fmt: off
_FREE_OPTIONS = {
    "output_dir", "max_steps", "num_train_epochs", "disable_tqdm", "report_to", "run_name", "project", "push_to_hub",
    "per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "debug",
    "bf16_full_eval", "fp16_full_eval", "include_num_input_tokens_seen", "enable_jit_checkpoint", "use_cache",
    "load_best_model_at_end", "restore_callback_states_from_checkpoint", "use_cpu", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "ddp_timeout", "ddp_backend",
    "skip_memory_metrics", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank",
    "allow_changes", "label_names", "greater_is_better", "metric_for_best_model", "prefix_memory",
    "cuda_graph",
}
# fmt: on
_FREE_BEGINNINGS = ("logging_", "log_", "eval_", "save_", "hub_", "trackio_")
_EVALUATION_DATA = (
    *("eval_data", "eval_split", "max_eval_rows"),
    *("decode_rows", "decode_tokens", "decode_strategies", "answer_rule"),
)
_OF_MODELS = (".safetensors", ".bin", ".json", ".model", ".jinja")
# Bytes at each end of a file of weights that tell it from others, next to its size: all of it would take minutes.
_ENDS = 1 << 20


def options_of(args: MTPConfig, *, stream: bool = False) -> dict[str, Any]:
    """The options that change what is trained: `options_of(MTPConfig("out", k_max=8))["k_max"] == 8`."""
    values = args.to_dict()
    free = {name for name in values if name in _FREE_OPTIONS or name.startswith(_FREE_BEGINNINGS)}
    if args.load_best_model_at_end:
        free -= {"metric_for_best_model", "greater_is_better"}
    if stream:
        free -= {"dataloader_num_workers"}
    # That one follows dataloader_pin_memory.
    values["accelerator_config"].pop("non_blocking")
    kept = {name: value for name, value in values.items() if name not in free}
    return _plain({**kept, "processes": args.world_size, "device": args.device.type})


def origin_of(model: ModelArguments, data: DataArguments, args: MTPConfig) -> dict[str, Any]:
    """What a run is made of, before any of it is loaded: model, teacher and data by their files or hub ids."""
    free = () if args.load_best_model_at_end else _EVALUATION_DATA
    origin: dict[str, Any] = {name: value for name, value in vars(data).items() if name not in free}
    for name in ("train_data", "eval_data"):
        if origin.get(name):
            origin[name] = [_data_named(source) for source in origin[name]]
    teacher = model.teacher and _model_named(model.teacher)
    return _plain({"model": _model_named(model.model), "teacher": teacher, **origin})


def _data_named(source: str) -> str:
    """A hub id, or the name of a file or folder and the digest of what is in it."""
    path = Path(source)
    if not path.exists():
        return source
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = digests(folder, [str(file.relative_to(folder)) for file in files])
    return f"{path.resolve().name} ({sha256(json.dumps(found).encode()).hexdigest()[:16]})"


def _model_named(source: str) -> str:
    """A hub id, or the name of a folder and a digest of its files: of weights, which are large, of size and ends."""
    path = Path(source)
    if not path.is_dir():
        return source
    digest = sha256()
    for file in sorted(file for file in path.iterdir() if file.suffix in _OF_MODELS and file.name != RECORD):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            digest.update(content.read(_ENDS))
            content.seek(max(0, size - _ENDS))
            digest.update(content.read(_ENDS))
    return f"{path.resolve().name} ({digest.hexdigest()[:16]})"


def fingerprint(dataset: Any) -> str | int | None:
    """A digest of a data set's rows where that is to be had (ours, lists, those of `datasets`), else their number."""
    if isinstance(dataset, (list, tuple)):
        digest = sha256()
        for row in dataset:
            # Arrays print their ends alone.
            plain = ((name, value.tolist() if hasattr(value, "tolist") else value) for name, value in row.items())
            digest.update(repr(sorted((name, str(value)) for name, value in plain)).encode())
        return digest.hexdigest()[:16]
    known = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if isinstance(known, str) or isinstance(dataset, IterableDataset):
        return known
    return len(dataset) if hasattr(dataset, "__len__") else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file; sets in order."""
    return json.loads(json.dumps(values, default=lambda x: sorted(map(str, x)) if isinstance(x, set) else str(x)))


def _versions() -> dict[str, str]:
    found = {"mtpkern": mtpkern, "torch": torch, "transformers": transformers}
    return {**{name: str(module.__version__) for name, module in found.items()}, "python": platform.python_version()}


class OtherRun(ValueError):
    """A checkpoint is of a run with other settings."""


@dataclass
class Record:
    """A run at one of its steps.

    recipe    what makes it what it is, by name
    step      steps that are done; max_steps, num_train_epochs: how many, or how many epochs, were asked for
    changes   what was changed on the way: {"step": 400, "k_max": [8, 12]}
    saved     of a run that has ended: whether its final model is there
    """

    recipe: dict[str, Any]
    step: int
    max_steps: int
    num_train_epochs: float | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    saved: bool = False
    versions: dict[str, str] = field(default_factory=_versions)

    def write(self, folder: str | Path) -> None:
        """Write it to a folder, at once or not at all."""
        write_whole(Path(folder) / RECORD, json.dumps(vars(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Record | None:
        """The record of a checkpoint, or in output_dir that of a run that has ended; None where there is none."""
        try:
            return cls(**json.loads((Path(folder) / RECORD).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{Path(folder) / RECORD} is no record of a run ({error}); take another folder") from None

    def covers(self, args: MTPConfig) -> bool:
        """Whether so many steps or epochs as are asked for are among those that were asked for before."""
        if args.max_steps > 0:
            return args.max_steps <= max(self.step, self.max_steps)
        return self.num_train_epochs is not None and args.num_train_epochs <= self.num_train_epochs

    def require_same(self, now: Mapping[str, Any], allowed: Iterable[str], where: str) -> dict[str, list[Any]]:
        """The differences that are allowed, by name: [before, now]. Raises OtherRun for any other, naming each.

        Only what both sides know is compared; an option that was not there yet had its default.
        """
        defaults = _plain({f.name: f.default for f in fields(MTPConfig) if f.name in now and f.name not in self.recipe})
        before = {**defaults, **self.recipe}
        allow = {name.replace("-", "_") for name in allowed}
        unknown = sorted(allow - before.keys() - now.keys())
        if unknown:
            raise ValueError(f"allow_changes names {', '.join(unknown)}, of which no checkpoint records anything")
        different = {
            name: [before[name], value] for name, value in now.items() if name in before and before[name] != value
        }
        refused = {name: pair for name, pair in different.items() if name not in allow}
        if refused:
            each = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in refused.items())
            raise OtherRun(
                f"{where} is of a run with other settings: {each}. Take those, or another output_dir, or go on with "
                f"the new ones by --allow-changes {' '.join(refused)}"
            )
        return different

    def report_versions(self) -> None:
        """Warn of libraries that are of another version now: rounding may differ."""
        now = _versions()
        other = [f"{name} {old} then, {now[name]} now" for name, old in self.versions.items() if now.get(name) != old]
        if other:
            logger.warning("going on with other versions: %s", "; ".join(other))


def report_rates(args: MTPConfig, before: int, now: int, done: int) -> None:
    """Warn where a schedule over `now` steps would have had other rates in the steps that are done than over `before`.

    What is done is done; from here on the rates are those of the new length. A constant schedule has no such step.
    """
    (then, rates) = (_rates(args, steps, done + 1) for steps in (before, now))
    if then != rates:
        logger.warning(
            "lr_scheduler_type %s follows the number of steps: those up to %d had the rates of a run of %d, from "
            "here on they are those of %d (next %.3g instead of %.3g); a run of %d from its start would be another",
            *(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type), done, before, now),
            *(args.learning_rate * rates[-1], args.learning_rate * then[-1], now),
        )


def _rates(args: MTPConfig, total: int, steps: int) -> list[float]:
    """The factors of the learning rate in the first steps of a run of `total`; none where the loss decides them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, dtype=torch.float32))], lr=args.learning_rate)
    options = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else None
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(total), total, options)
    return [schedule.lr_lambdas[0](i) for i in range(steps)] if isinstance(schedule, LambdaLR) else []
