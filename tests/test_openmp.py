"""Threads that OpenMP keeps go where another thread is to compute, and come back."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mtpkern
from mtpkern import openmp
from mtpkern.openmp import lend_processors

HOST = torch.device("cpu")
TASKS = Path("/proc/self/task")


@pytest.fixture
def computed() -> Iterator[Callable[[], int]]:
    """Work that two threads share; returns how many threads the process has then."""
    if not TASKS.is_dir() or "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("counts threads of GNU's OpenMP on Linux")
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def compute() -> int:
        torch.randn(512, 512).mm(torch.randn(512, 512)).sum()
        return len(list(TASKS.iterdir()))

    yield compute
    torch.set_num_threads(before)


def test_a_thread_lends_its_set_and_has_one_again(computed: Callable[[], int]) -> None:
    with_set = computed()
    lend_processors(HOST)
    assert len(list(TASKS.iterdir())) == with_set - 1
    assert computed() == with_set
    lend_processors(torch.device("meta"))
    assert len(list(TASKS.iterdir())) == with_set


@pytest.mark.parametrize("way", ["stream", "iterate_batch", "submit", "generate", "Engine.stream"])
def test_who_waits_for_a_run_in_another_thread_lends_it(
    way: str, computed: Callable[[], int], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[int] = []
    monkeypatch.setattr(openmp, "_pause", lambda: lambda kind: lent.append(threading.get_ident()) or 0)
    model, ids = tiny.model("llama"), torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 4}
    computed()
    if way == "stream":
        list(mtpkern.stream(model, ids, **options))
    elif way == "iterate_batch":
        list(mtpkern.iterate_batch(model, [[5, 6, 7]], **options))
    else:
        with mtpkern.Engine(model, max_length=32) as engine:
            lent.clear()
            if way == "Engine.stream":
                list(engine.stream(ids, **options))
            elif way == "submit":
                engine.submit([5, 6, 7], **options).result(60)
            else:
                engine.generate(ids, **options)
        # So does the engine's own thread, where it is idle for long enough.
        lent = [thread for thread in lent if thread == threading.get_ident()]
    assert lent == [threading.get_ident()]


def test_a_torch_without_it_goes_on_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    openmp._pause.cache_clear()
    try:
        monkeypatch.setattr(openmp.ctypes, "CDLL", lambda name: object())
        assert openmp._pause()(1) == 0
    finally:
        openmp._pause.cache_clear()
    assert sys.modules["mtpkern.openmp"] is openmp
