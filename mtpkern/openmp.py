"""OpenMP's threads on a CPU, of which every thread that has computed keeps a set.

Where there are more of them than processors, GNU's OpenMP no longer has them wait for work at full speed, but puts them
to sleep at once, and to wake them takes longer than a small operation: a run in a thread of its own, beside a main
thread that has computed and only waits now, takes nearly three times as long (docs/log.md, "Requests at any time"). A
thread that is about to wait lets its set go.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

# omp_pause_soft: what the threads hold stays, they themselves are made anew when they are needed.
_SOFT = 1


def lend_processors(device: torch.device) -> None:
    """Let the calling thread's set go, where another thread is to compute on a CPU while this one waits.

    lend_processors(model.device)
    """
    if device.type == "cpu" and torch.get_num_threads() > 1:
        _pause()(_SOFT)


@cache
def _pause() -> Callable[[int], int]:
    """OpenMP's own call, of version 5 on; where torch has been built without it, nothing."""
    try:
        found = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return lambda kind: 0
    found.argtypes, found.restype = [ctypes.c_int], ctypes.c_int
    return found  # type: ignore[no-any-return]
