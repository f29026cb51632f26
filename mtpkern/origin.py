"""Where a number comes from: hardware, versions, and the commit where the package lies in a clone."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers

import mtpkern


def commit() -> str:
    """The clone's commit, "unknown" where it is none: `commit()` is "e7d29012fd3e"."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "unknown"
    words = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.stdout.strip() or "unknown"


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
