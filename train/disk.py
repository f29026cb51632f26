"""Room on the disk: looked at before the first step, named where it runs out; no half of a file passes for a whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from mtpkern.train.config import MTPConfig
from mtpkern.train.extra import PeftModel

_FULL = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")
# What torch.save says where the disk takes no more.
_CUT_OFF = ("PytorchStreamWriter", "inline_container")


class DiskFull(OSError):
    """The disk of a folder has no room for what is to be written."""


def _free(folder: str | Path) -> int:
    path = Path(folder).resolve()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _said(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.2f} MiB"


def checkpoint_bytes(model: nn.Module, args: MTPConfig) -> int:
    """Bytes of a checkpoint that training can go on from, about: what is saved of the weights, and Adam's two moments.

    Of a model with adapters only these are saved. Other optimizers than torch's AdamW count nothing.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = trained if isinstance(model, PeftModel) else sum(p.numel() for p in model.parameters())
    adam = str(getattr(args.optim, "value", args.optim)).startswith("adamw_torch") and not args.save_only_model
    return 4 * (saved + 2 * adam * trained)


def require_space(folder: str | Path, model: nn.Module, args: MTPConfig) -> None:
    """Raise DiskFull where the final model and, if any are saved, two checkpoints do not fit, the old and the new.

    require_space("runs/mine", model, args)
    """
    checkpoint = 0 if args.save_strategy == "no" else checkpoint_bytes(model, args)
    final = sum(p.numel() for p in model.parameters()) * (4 if args.save_dtype == "float32" else 2)
    free = _free(folder)
    if free < 2 * checkpoint + final:
        parts = f"two checkpoints of {_said(checkpoint)} and " if checkpoint else ""
        raise DiskFull(
            f"{folder}: {_said(free)} are free, {parts}a final model of {_said(final)} must fit; free some, or take "
            "another output_dir"
        )


@contextmanager
def full_disk_named(folder: str | Path, needed: int) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into DiskFull: the folder, the bytes needed and free, the remedy.

    with full_disk_named(folder, needed=checkpoint_bytes(model, args)):
        torch.save(state, folder / "optimizer.pt")
    """
    try:
        yield
    except Exception as error:
        free = _free(folder)
        said = (*_FULL, *(_CUT_OFF if free < needed else ()))
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not any(x in str(error) for x in said):
            raise
        raise DiskFull(
            f"{folder}: the disk is full; about {_said(needed)} are needed, {_said(free)} are free; free some and "
            "start again: a run goes on from its newest whole checkpoint"
        ) from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder whose files move into `folder` at its end, where weights of before go; none do where writing fails.

    with written_whole(Path("out")) as part:
        model.save_pretrained(part)
    """
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for stale in folder.glob("model*.safetensors*"):
            # Shards of another number would stand beside the new ones.
            if not (part / stale.name).exists():
                stale.unlink()
        for path in part.iterdir():
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
