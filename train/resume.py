"""Resuming: checkpoints that a kill at any moment leaves findable, and streams that begin again without end.

A checkpoint is complete once it holds `complete.json`, the digests of its files, which is written last and removed
first. Whatever a killed run leaves behind, `newest_checkpoint` finds the last one that is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from mtpkern.output import write_whole

MARK = "complete.json"
# Bytes of a file that one thread digests at a time.
_PART = 1 << 24


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digest of each file: of its parts' digests, which several threads take; of large files that is the time."""

    def starts(name: str) -> range:
        return range(0, max(1, (folder / name).stat().st_size), _PART)

    with ThreadPoolExecutor() as pool:
        parts = {name: [pool.submit(_digest, folder / name, start) for start in starts(name)] for name in names}
        return {name: sha256(b"".join(f.result() for f in found)).hexdigest() for name, found in parts.items()}


def _digest(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return sha256(file.read(_PART)).digest()


def mark_complete(folder: Path) -> None:
    """Declare a checkpoint whole; every rank must have finished writing."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK)
    found = digests(folder, [str(path.relative_to(folder)) for path in files])
    write_whole(folder / MARK, json.dumps({name: [digest] for name, digest in found.items()}))


def renew(folder: Path, name: str, text: str) -> None:
    """Replace a file of a whole checkpoint, which stays whole at every moment: its mark knows both in between."""
    part = folder / f"{name}.part"
    part.write_text(text)
    known = json.loads((folder / MARK).read_text())
    after = list(digests(folder, [part.name]).values())
    write_whole(folder / MARK, json.dumps({**known, name: [*known[name], *after]}))
    os.replace(part, folder / name)
    write_whole(folder / MARK, json.dumps({**known, name: after}))


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint has its mark, and every file is what it was then."""
    try:
        mark = (folder / MARK).read_text()
        stats = {name: (folder / name).stat() for name in json.loads(mark)}
    except (OSError, ValueError):
        return False
    return _matches(folder, mark, tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()))


@lru_cache(maxsize=64)
def _matches(folder: Path, mark: str, files: tuple[tuple[str, int, int, int], ...]) -> bool:
    """Whether digests are those of the mark: once for files that nobody has touched since, as of a hundred GiB."""
    try:
        found = digests(folder, [name for name, *_ in files])
    except OSError:
        return False
    # Marks of before knew sizes.
    known = json.loads(mark)
    return all(found[n] in known[n] if isinstance(known[n], list) else size == known[n] for n, size, *_ in files)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All folders checkpoint-<step> of a run, complete or not, the oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint with the most steps, None where there is none: `newest_checkpoint("out")`."""
    return next((str(path) for path in reversed(checkpoints(output_dir)) if is_complete(path)), None)


def damaged(output_dir: str | Path) -> list[Path]:
    """Checkpoints that were whole and are not any more; what a killed run leaves half-written is none of them."""
    return [folder for folder in checkpoints(output_dir) if (folder / MARK).exists() and not is_complete(folder)]


def require_whole(folder: str | Path) -> None:
    """Raise ValueError for a folder that is no checkpoint, or one that was left half-written."""
    folder = Path(folder)
    if (folder / MARK).exists() and not is_complete(folder):
        raise ValueError(
            f"{folder} is not a whole checkpoint, it was left half-written or changed since; "
            "resume_from_checkpoint=True takes the newest whole one"
        )
    if not (folder / TRAINER_STATE_NAME).exists():
        raise ValueError(f"{folder} is no checkpoint, {TRAINER_STATE_NAME} is missing; name a folder checkpoint-<step>")


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Give a model the weights that `save_pretrained` has written to a folder; ValueError where one is missing.

    Files may name and cut tensors otherwise than the model does (GPT-NeoX, mixtures of experts), so it is
    transformers that reads them.

        load_weights(model, "runs/mine/checkpoint-100")
    """
    saved, found = type(model).from_pretrained(
        folder, dtype=model.dtype, output_loading_info=True, trust_remote_code=False
    )
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{folder} lacks weights of this {type(model).__name__}, or has them in other shapes: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; resume from another checkpoint"
        )
    model.load_state_dict(saved.state_dict())


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its mark first: half of it is never taken for a whole."""
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Keep the `limit` newest checkpoints (all where None, 0 or less) and the best one; never delete the newest."""
    if limit is None or limit <= 0:
        return
    for folder in checkpoints(output_dir)[:-limit]:
        if best is None or folder.resolve() != Path(best).resolve():
            remove_checkpoint(folder)


class Endless(IterableDataset):
    """A stream that begins again where it ends, in the next epoch's order; a resumed run counts batches, no epochs."""

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
