"""What an engine holds on to, and what its own faults leave to those who wait."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import mtpkern
from mtpkern import Engine, Verified
from mtpkern.decoder import Decoder
from mtpkern.line import Line, _let_go
from support.engines import LONG, Held, free, held, result


@dataclass
class Comparing(LogitsProcessor):
    """One that torch refuses to compare with another."""

    bias: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.bias


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list["weakref.ref[Decoder]"]]:
    """All that are made, without a garbage collector that might come by chance."""
    made: list[weakref.ref[Decoder]] = []
    init = Decoder.__init__

    def noted(self: Decoder, *args: Any, **options: Any) -> None:
        made.append(weakref.ref(self))
        init(self, *args, **options)

    monkeypatch.setattr(Decoder, "__init__", noted)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def kept_of(made: list["weakref.ref[Decoder]"]) -> int:
    """Bytes of keys and values that are still there."""
    return sum(decoder.cache.nbytes for ref in made if (decoder := ref()) is not None)


def idle(engine: Engine) -> None:
    """Wait until its thread has left all runs."""
    end = time.monotonic() + 60
    line = engine._line
    while time.monotonic() < end and not line.changed._waiters:  # type: ignore[attr-defined]
        time.sleep(0.01)


def test_processors_that_cannot_be_compared_keep_nobody_waiting(engine: Engine, model: Any) -> None:
    streamer, first = held(engine)
    prompts, own = [[1, 2], [3, 4], [3, 4]], {"max_new_tokens": 5, "eos_token_id": None}
    futures = [engine.submit(p, logits_processor=[Comparing(torch.arange(16.0))], **own) for p in prompts]
    streamer.go.set()
    result(first)
    found = [result(future).tokens for future in [*futures, engine.submit([1, 2], **own)]]
    assert found[0] == free(model, [1, 2], 5, logits_processor=[Comparing(torch.arange(16.0))]) != found[3]
    assert found[1] == found[2]


def test_equal_processors_share_passes(engine: Engine, passes: list[int]) -> None:
    @dataclass
    class Raised(LogitsProcessor):
        token: int

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(1, torch.tensor([self.token]), 3.0)

    streamer, first = held(engine)
    futures = [engine.submit([n, 2], max_new_tokens=9, logits_processor=[Raised(5)]) for n in (1, 2, 3)]
    passes.clear()
    streamer.go.set()
    for future in (first, *futures):
        result(future)
    assert max(passes) == 3


def test_a_fault_of_the_engine_is_told_to_all_who_wait(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = Engine(model, batch_size=1, max_length=64, strategy=Verified(3, threshold=0.2))
    streamer, first = held(engine)
    other = engine.submit([1, 2], max_new_tokens=4, logits_processor=[Comparing(torch.arange(16.0))])  # of another run

    def failing(self: Line) -> Any:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr(Line, "_first", failing)
    streamer.go.set()
    assert len(result(first).tokens) == LONG
    with pytest.raises(CancelledError):
        result(other)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1, 2], max_new_tokens=2)


def test_an_idle_engine_holds_nothing_of_who_was_there(engine: Engine) -> None:
    streamer = Held()
    streamer.go.set()
    future = engine.submit([1, 2], max_new_tokens=4, streamer=streamer)
    result(future)
    refs = [weakref.ref(streamer), weakref.ref(future)]
    del streamer, future
    idle(engine)
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


class Mine(Exception):
    """Of a caller."""


def _fails(ids: Tensor, scores: Any) -> bool:
    raise Mine


@pytest.mark.parametrize("whose", ["a criterion's", "a pass's"])
def test_who_keeps_an_error_keeps_no_keys(
    whose: str, engine: Engine, decoders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Any:
        raise Mine

    options: dict[str, Any] = {"stopping_criteria": [_fails]}
    if whose == "a pass's":
        monkeypatch.setattr(Decoder, "step", failing)
        options = {}
    future = engine.submit([1, 2, 3], max_new_tokens=8, **options)
    with pytest.raises(Mine) as caught:
        result(future)
    idle(engine)
    assert kept_of(decoders) == 0
    assert future.exception() is caught.value


@pytest.mark.parametrize("prefill", [False, True])
def test_nor_who_keeps_one_of_generate(
    prefill: bool, model: Any, inputs: Any, decoders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook does, whose next try finds no memory otherwise."""

    def failing(*args: Any, **options: Any) -> Any:
        raise Mine

    monkeypatch.setattr(Decoder, "_take_in" if prefill else "step", failing)
    with pytest.raises(Mine) as caught:
        mtpkern.generate(model, **inputs, max_new_tokens=8)
    assert caught.value.__traceback__ is not None
    assert len(decoders) == 1
    assert kept_of(decoders) == 0


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("where", ["_take_in", "replay"])
def test_nor_one_of_a_run_with_a_graph(
    where: str,
    again: bool,
    model: Any,
    inputs: Any,
    decoders: list[Any],
    recorded: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a decoder that is new, or that an earlier call has left; which of them no call takes any more."""

    def failing(*args: Any, **options: Any) -> Any:
        raise Mine

    options: dict[str, Any] = {"strategy": Verified(3, threshold=0.2), "max_new_tokens": 8, "check_model": False}
    for _ in range(again):
        mtpkern.generate(model, **inputs, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, where, failing)
        with pytest.raises(Mine) as caught:
            mtpkern.generate(model, **inputs, **options)
    assert caught.value.__traceback__ is not None
    assert len(decoders) == 1
    assert kept_of(decoders) == 0
    expected = mtpkern.generate(model, **inputs, **options, use_graph=False)
    assert mtpkern.generate(model, **inputs, **options).equal(expected)  # type: ignore[arg-type]


@pytest.mark.timeout(20)
def test_errors_in_a_circle_are_let_go() -> None:
    """As a caller may chain his own; each is looked at, also what was given as a cause."""
    one, other, cause = ValueError("one"), ValueError("other"), ValueError("cause")
    one.__context__, other.__context__, other.__cause__ = other, one, cause
    looked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpkern.line.walk_tb", lambda traceback: looked.append(traceback) or ())
        _let_go(one)
    assert len(looked) == 3


def test_the_next_try_finds_what_the_first_has_held(
    model: Any, decoders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What layers have computed as well."""
    before: list[tuple[int, Any]] = []
    init = Decoder.__init__

    def noted(self: Decoder, *args: Any, **options: Any) -> None:
        before.append((kept_of(decoders), [ref() for ref in seen]))
        init(self, *args, **options)

    def short(module: Any, x: Tensor) -> Tensor:
        if seen:
            return forward(module, x)
        seen.append(weakref.ref(x))
        del x
        raise torch.OutOfMemoryError("no room")

    seen: list[Callable[[], Any]] = []
    monkeypatch.setattr(Decoder, "__init__", noted)
    kind: Any = type(model.model.layers[1].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", short)
    with (
        Engine(model, batch_size=2, max_length=64, check_model=False) as engine,
        pytest.warns(RuntimeWarning, match="goes on with 1"),
    ):
        assert len(result(engine.submit([1, 2], max_new_tokens=4, eos_token_id=None)).tokens) == 4
    assert before == [(0, []), (0, [None])]


def test_an_error_of_a_stream_goes_with_who_has_caught_it(model: Any, inputs: Any, decoders: list[Any]) -> None:
    try:
        for _ in mtpkern.stream(model, **inputs, max_new_tokens=8, stopping_criteria=[_fails]):
            pass
    except Mine as error:
        kept = weakref.ref(error)
    assert kept() is None


@pytest.mark.filterwarnings("ignore:memory does not suffice")
def test_who_has_been_shown_tokens_is_not_tried_again(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be shown them twice; who has not been goes on."""
    failed, step = list[int](), Decoder.step

    def failing(self: Decoder, *args: Any) -> Any:
        if not failed and int((self.sequences.status == 0).sum()) == 2:
            failed.append(1)
            raise torch.OutOfMemoryError("no room")
        return step(self, *args)

    wanted = free(model, [1, 2], 6)
    monkeypatch.setattr(Decoder, "step", failing)
    streamer, first = held(engine)
    other = engine.submit([1, 2], max_new_tokens=6, eos_token_id=None)
    streamer.go.set()
    assert isinstance(first.exception(60), torch.OutOfMemoryError)
    assert result(other).tokens == wanted
    assert streamer.tokens == free(model, [5, 6, 7], LONG)[: len(streamer.tokens)]


def test_whom_nobody_wants_any_more_is_not_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor told that all went well."""

    def failing(*args: Any) -> Any:
        (request,) = engine._line.inside.values()
        request.end()  # as generate does where it is interrupted
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", failing)
        with pytest.warns(RuntimeWarning, match="goes on with 1"), pytest.raises(torch.OutOfMemoryError):
            result(engine.submit([5, 6, 7], max_new_tokens=LONG, eos_token_id=None))
    assert len(result(engine.submit([5, 6, 7], max_new_tokens=LONG, eos_token_id=None)).tokens) == LONG
