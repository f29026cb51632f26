"""Times of passes by their rows, and counts of drafts, for tests of rows by load."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mtpkern.kernels.worth import UNIT
from mtpkern.load import PassTimes


def steep(rows: float) -> float:
    """As float32 takes on two cores of a CPU with AVX2: any second row costs most of a pass, further ones little."""
    return 1.0 if rows <= 1 else 1.6 + 0.04 * rows


def times(curve: Callable[[float], float], *rows: int) -> PassTimes:
    seen = PassTimes()
    for r in rows:
        seen.saw(r, curve(r))
    return seen


def running(hits: float, chains: float, batch: int = 1) -> Any:
    """What `Load` asks of the state: sequences that run, all with these counts."""
    status = torch.zeros(batch, dtype=torch.int32)
    return SimpleNamespace(status=status, hits=status + int(hits * UNIT), chains=status + int(chains * UNIT))


def counts(*xs: float) -> np.ndarray:
    return np.array([int(x * UNIT) for x in xs])


def gpu(rows: int) -> float:
    """Milliseconds as of Qwen3-4B on an H200 with compiled layers; of one row a sequence there are no masks."""
    return 4.3 + rows / 112
