"""Poll: what the host knows of a run on the device, a step late, and without ever holding the device up."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from mtpkern.kernels.state import RUNNING, Sequences

# How many steps the host runs ahead of what it knows: one keeps a GPU fed, and each is a pass for nothing at the end.
LAG = 1


class Poll:
    """Watches the sequences through copies that the device makes when it gets there; the host reads them late.

    On a CPU the copy is there at once. Of each state of the device one copy is read, in order.
    """

    # Whether `take` asks streamers or criteria, which may call the model.
    calls_others = False

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        # Whether the last `take` had the device do more than a copy.
        self.has_queued = False
        device = sequences.status.device
        self.on_cpu = device.type == "cpu"
        self.polls = 0
        if not self.on_cpu:
            # A ring: a copy has been read before its place is used again.
            state = self.state()
            self.events = self.marks(device)
            self.copies = torch.empty(len(self.events), *state.shape, dtype=state.dtype, pin_memory=True)

    def marks(self, device: torch.device) -> list[torch.Event]:
        """One for each copy that is kept at a time."""
        return [torch.Event(device) for _ in range(LAG + 1)]

    def state(self) -> Tensor:
        """What is copied, on the device."""
        return self.sequences.status

    def take(self, state: Tensor) -> int:
        """How many sequences go on, from a copy of `state()` on the host."""
        return int((state == RUNNING).sum())

    def running(self) -> int:
        """How many sequences were running `LAG` steps ago (on a CPU: are running now)."""
        if self.on_cpu:
            self.polls += 1
            return self.take(self.state())
        self._copy()
        return len(self.sequences.status) if self.polls <= LAG else self._read(self.polls - LAG - 1)

    def finish(self) -> None:
        """Read what the last steps have left, once nothing more is queued."""
        if self.on_cpu:
            self.take(self.state())
            return
        self._copy()
        for number in range(max(0, self.polls - LAG - 1), self.polls):
            self._read(number)

    def _copy(self) -> None:
        place = self.polls % len(self.events)
        self.copies[place].copy_(self.state(), non_blocking=True)
        self.events[place].record()
        self.polls += 1

    def _read(self, number: int) -> int:
        place = number % len(self.events)
        self.events[place].synchronize()
        return self.take(self.copies[place])


class OddsPoll(Poll):
    """Sees hits and chains of the sequences that run."""

    def __init__(self, sequences: Sequences) -> None:
        super().__init__(sequences)
        # To begin with all run, and nothing is known.
        self.seen: tuple[np.ndarray, np.ndarray] = (np.zeros(len(sequences.status)),) * 2

    def state(self) -> Tensor:
        """What is copied, on the device."""
        return torch.stack([self.sequences.status, self.sequences.hits, self.sequences.chains])

    def take(self, state: Tensor) -> int:
        """How many sequences go on; keeps their odds."""
        status, hits, chains = state.numpy()
        running = status == RUNNING
        self.seen = hits[running], chains[running]
        return int(running.sum())


class TimedPoll(OddsPoll):
    """Sees, besides, what the last pass that it knows of has taken, from copy to copy.

    passes     rows of the last passes, each between two copies; 0 for what was no replay, or more than a pass
    replayed   those of the last one that is known of, 0 where none is
    """

    def __init__(self, sequences: Sequences) -> None:
        super().__init__(sequences)
        # Of so many as may be asked for: a run that serves has no end.
        self.passes: deque[int] = deque(maxlen=LAG + 1)
        self.replayed, self.seconds = 0, 0.0

    def marks(self, device: torch.device) -> list[torch.Event]:
        """One more, as a pass lies between two."""
        return [torch.Event(device, enable_timing=True) for _ in range(LAG + 2)]

    def _read(self, number: int) -> int:
        running = super()._read(number)
        # The pass before the latest copy is the last.
        self.replayed = self.passes[number - self.polls] if number else 0
        if self.replayed:
            before, behind = (self.events[n % len(self.events)] for n in (number - 1, number))
            self.seconds = 1e-3 * before.elapsed_time(behind)
        return running
