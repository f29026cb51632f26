"""Passes of a CPU that are recorded as soon as they can be, and runs beside them whose passes all run as they are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

import mtpkern
from mtpkern import recordings
from mtpkern.recorder import Recording


@pytest.fixture
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second pass of a kind is recorded, the third compared, the fourth replayed."""
    monkeypatch.setattr(recordings, "WARM_UP", 1)
    monkeypatch.setattr(recordings, "LEAST_TOKENS", 1)
    yield
    mtpkern.release_graphs()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each replay."""
    seen: list[int] = []
    own = Recording.__call__

    def call(self: Recording, owners: Any, *inputs: Tensor) -> Tensor:
        seen.append(inputs[0].shape[1])
        for piece in kept_memory:
            piece.fill_(255)  # NaN
        return own(self, owners, *inputs)

    kept_memory: list[Tensor] = []
    take = recordings.Memory.take

    def noting(self: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        piece, stand_in = take(self, like)
        kept_memory.append(piece)
        return piece, stand_in

    monkeypatch.setattr(Recording, "__call__", call)
    monkeypatch.setattr(recordings.Memory, "take", noting)
    return seen


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run whose passes all run as they are."""

    def run(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("mtpkern.decoder.recordings_of", lambda *args: None)
            return call(*args, **options)

    return run
