"""Passes of a CPU that are recorded as soon as they can be, and runs beside them whose passes all run as they are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import packed, packed_weights, recordings
from mtpkern.recorder import Piece, Recording


@pytest.fixture
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second pass of a kind is recorded, the third compared, the fourth replayed."""
    monkeypatch.setattr(recordings, "WARM_UP", 1)
    monkeypatch.setattr(recordings, "LEAST_TOKENS", 1)
    yield
    mtpkern.release_graphs()


@pytest.fixture(params=[False, True], ids=["torch's products", "copies"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Passes read torch's weights, or, small as they are, copies that are laid out for few rows."""
    if request.param and not packed_weights.has_packed_products(torch.float32):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(packed, "LEAST_WEIGHT", 1 if request.param else 1 << 60)
    monkeypatch.setattr(packed, "LEAST_TOKENS", 1)
    return bool(request.param)


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

    def noting(self: Any, like: Tensor) -> tuple[Piece, Tensor]:
        piece, stand_in = take(self, like)
        kept_memory.append(piece.memory)
        return piece, stand_in

    monkeypatch.setattr(Recording, "__call__", call)
    monkeypatch.setattr(recordings.Memory, "take", noting)
    return seen


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run whose passes all run as they are."""

    def run(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("mtpkern.loop.recordings_of", lambda *args: None)
            return call(*args, **options)

    return run
