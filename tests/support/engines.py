"""Engines with requests that wait, and what each request gets from `generate`."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import Engine, Verified
from mtpkern.batching import BatchOutput
from mtpkern.decoder import Decoder

LONG = 40


class Held:
    """A streamer that keeps its run waiting from its first token on, until it is let go."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        if value.ndim == 2:
            return
        self.began.set()
        assert self.go.wait(60)
        self.tokens += value.tolist()

    def end(self) -> None:
        self.ended = True


def held(engine: Engine, **options: Any) -> tuple[Held, Future[BatchOutput]]:
    """A request that is running, and waits."""
    streamer = Held()
    future = engine.submit([5, 6, 7], streamer=streamer, **{"max_new_tokens": LONG, "eos_token_id": None, **options})
    assert streamer.began.wait(60)
    return streamer, future


def result(future: Future[BatchOutput]) -> BatchOutput:
    return future.result(timeout=60)


def free(model: Any, prompt: list[int], new: int, **options: Any) -> list[int]:
    """The same tokens by `generate`."""
    options = {"strategy": Verified(3, threshold=0.2), "eos_token_id": None, "max_new_tokens": new, **options}
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    output = mtpkern.generate(model, torch.tensor([prompt]), attention_mask=mask, **options)
    assert isinstance(output, Tensor)
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    """One of three slots."""
    with Engine(model, batch_size=3, max_length=64, strategy=Verified(3, threshold=0.2)) as engine:
        yield engine


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences run in each pass."""
    seen: list[int] = []
    step = Decoder.step

    def counted(self: Any, route: Any) -> Any:
        seen.append(int((self.sequences.status == 0).sum()))
        return step(self, route)

    monkeypatch.setattr(Decoder, "step", counted)
    return seen
