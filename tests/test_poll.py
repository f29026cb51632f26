"""What the host knows of passes that have run on a device that is late."""

from collections import deque
from typing import Any

import pytest
import torch

from mtpkern.kernels.state import Sequences
from mtpkern.poll import LAG, TimedPoll


class Mark:
    """An event that tells when it was recorded last, on a clock that goes on by one with each."""

    clock = 0

    def record(self) -> None:
        Mark.clock += 1
        self.at = Mark.clock

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Any) -> float:
        return 1e3 * float(later.at - self.at)


@pytest.fixture
def poll() -> TimedPoll:
    made = TimedPoll(Sequences.allocate(3, 8, 8, torch.device("cpu")))
    made.on_cpu = False
    made.events = [Mark() for _ in range(LAG + 2)]  # type: ignore[misc]
    made.copies = torch.zeros(LAG + 2, *made.state().shape, dtype=torch.int64)
    return made


def test_a_pass_is_told_by_its_rows_however_many_came_before(poll: TimedPoll) -> None:
    """A run that serves makes passes without an end, and no more of them are kept than are asked for."""
    rows: deque[int] = deque()
    for i in range(1000):
        poll.running()
        assert (poll.replayed, poll.seconds) == ((rows[-1 - LAG], 1.0) if i > LAG else (0, 0.0))
        rows.append(7 + i)
        poll.passes.append(rows[-1])
    assert len(poll.passes) <= LAG + 2
    poll.finish()
    assert poll.replayed == rows[-1]
