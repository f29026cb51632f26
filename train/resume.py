"""Resuming: checkpoints that a kill at any moment leaves findable, and streams that begin again without end.

A checkpoint is complete once it holds `complete.json`, the sizes of its files, which is written last and removed
first. Whatever a killed run leaves behind, `newest_checkpoint` finds the last one that is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers.trainer import TRAINER_STATE_NAME

MARK = "complete.json"


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def mark_complete(folder: Path) -> None:
    """Declare a checkpoint whole; every rank must have finished writing."""
    part = folder / f"{MARK}.part"
    part.write_text(json.dumps(_sizes(folder)))
    os.replace(part, folder / MARK)


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint has its mark, and every file the size that it had then."""
    try:
        marked = json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        return False
    return marked.items() <= _sizes(folder).items()


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All folders checkpoint-<step> of a run, complete or not, the oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint with the most steps, None where there is none.

    trainer.train(resume_from_checkpoint=newest_checkpoint("out"))  # from there, or from the start
    """
    return next((str(path) for path in reversed(checkpoints(output_dir)) if is_complete(path)), None)


def require_whole(folder: str | Path) -> None:
    """Raise ValueError for a folder that is no checkpoint, or one that was left half-written."""
    folder = Path(folder)
    if (folder / MARK).exists() and not is_complete(folder):
        raise ValueError(
            f"{folder} is not a whole checkpoint, it was left half-written; resume_from_checkpoint=True takes the "
            "newest whole one"
        )
    if not (folder / TRAINER_STATE_NAME).exists():
        raise ValueError(f"{folder} is no checkpoint, {TRAINER_STATE_NAME} is missing; name a folder checkpoint-<step>")


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its mark first: half of it is never taken for a whole."""
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Keep the `limit` newest checkpoints (all where None or 0) and the best one; never delete the newest."""
    if not limit:
        return
    for folder in checkpoints(output_dir)[:-limit]:
        if best is None or folder.resolve() != Path(best).resolve():
            remove_checkpoint(folder)


class Endless(IterableDataset):
    """A stream that begins again where it ends, with the next epoch's order: one epoch that never ends.

    A stream of unknown length has no epochs that a resumed run could count, only batches to skip.
    """

    def __init__(self, source: IterableDataset) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.source, "set_epoch"):
                self.source.set_epoch(epoch)
            empty = True
            for example in self.source:
                empty = False
                yield example
            if empty:
                return
