"""Where a number comes from: hardware, versions, and the commit where the package lies in a clone."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers

import mtpkern


def commit() -> str:
    """The clone's commit, marked where the tree differs from it: `commit()` is "e7d29012fd3e", or "unknown" elsewhere.

    A copy of the tree without its history is told by whoever made it, in MTPKERN_COMMIT.
    """
    root = Path(__file__).resolve().parents[1]
    # Where an installed package lies, git would find the repository of somebody else.
    if not (root / ".git").exists():
        return os.environ.get("MTPKERN_COMMIT", "unknown")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return (_git(root, "rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def _git(root: Path, *words: str) -> str:
    """What git says; nothing where it fails or is not there."""
    try:
        said = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""


def origin(device: torch.device, command: str) -> dict[str, str]:
    """Device, versions, commit, command and date: `origin(model.device, "mtpkern eval ...")["torch"]`."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} cpu",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mtpkern": str(mtpkern.__version__),
        "commit": commit(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }
