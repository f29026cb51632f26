"""Who reads a streamer in another thread hears of an error, where transformers' has them wait for ever."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer

import mtpkern
from mtpkern import Engine
from support.engines import held, result

PROMPT = torch.tensor([[5, 6, 7]])


def _failing(ids: Tensor, scores: Any) -> bool:
    if ids.shape[1] > 5:
        raise KeyError("of a criterion")
    return False


CALLS: dict[str, Callable[..., Any]] = {
    "generate": lambda engine, **options: mtpkern.generate(engine.model, PROMPT, **options),
    "engine.generate": lambda engine, **options: engine.generate(PROMPT, **options),
    "engine.submit": lambda engine, **options: result(engine.submit(PROMPT, **options)),
}
FAULTS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"stopping_criteria": [_failing]}, KeyError),
    ({"max_newtokens": 5}, ValueError),
]


class Plain:
    """A streamer that says how it was ended; of a failing one there is more."""

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None:
        self.said.append("end")


class Told(Plain):
    def fail(self, error: BaseException) -> None:
        self.said.append(error)


def caller(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[threading.Thread, list[Exception]]:
    """Call in a thread of its own; what it raises."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call(*args, **options)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("bad", "kind"), FAULTS, ids=["run", "call"])
def test_a_reader_raises_what_the_caller_does(
    call: Any, bad: dict[str, Any], kind: type[Exception], engine: Engine, tokenizer: Any
) -> None:
    options = {"eos_token_id": None, "max_new_tokens": 8, **bad}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    thread, raised = caller(call, engine, streamer=streamer, **options)
    with pytest.raises(kind) as heard:
        list(streamer)
    thread.join()
    assert raised == [heard.value]

    async def read() -> None:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
        thread, raised = caller(call, engine, streamer=streamer, **options)
        with pytest.raises(kind):
            async for _ in streamer:
                pass
        thread.join()
        assert len(raised) == 1

    asyncio.run(read())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_error_is_told_of_where_all_goes_well(call: Any, engine: Engine, tokenizer: Any) -> None:
    said: list[Any] = []
    call(engine, streamer=Told(said), max_new_tokens=8, eos_token_id=None)
    assert said == ["end"]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("bad", "kind"), FAULTS, ids=["run", "call"])
def test_a_streamer_may_be_told_itself(call: Any, bad: dict[str, Any], kind: type[Exception], engine: Engine) -> None:
    said: list[Any] = []
    with pytest.raises(kind) as caught:
        call(engine, streamer=Told(said), **{"max_new_tokens": 8, "eos_token_id": None, **bad})
    assert said == [caught.value]


def test_half_an_answer_does_not_look_whole(engine: Engine) -> None:
    """Whose streamer has only an end hears by the future, which has the error before that."""
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "stopping_criteria": [_failing]}
    for call in (CALLS["generate"], CALLS["engine.generate"]):
        said: list[Any] = []
        with pytest.raises(KeyError):
            call(engine, streamer=Plain(said), **options)
        assert said == []

    ended = threading.Event()
    futures: list[Future[Any]] = []
    seen: list[BaseException | None] = []

    class Looks(Plain):
        def end(self) -> None:
            seen.append(futures[0].exception(timeout=0))
            ended.set()

    streamer, first = held(engine)
    futures.append(engine.submit(PROMPT, streamer=Looks([]), **options))
    streamer.go.set()
    assert ended.wait(20)
    result(first)
    assert isinstance(seen[0], KeyError)


def test_whoever_cannot_be_told_costs_nobody_else(engine: Engine) -> None:
    class Leaving(Plain):
        def end(self) -> None:
            raise SystemExit("of an end")

    streamer, good = held(engine)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    failing = engine.submit([5, 6, 7], streamer=Leaving([]), stopping_criteria=[_failing], **options)
    streamer.go.set()
    with pytest.raises(KeyError):
        result(failing)
    result(good)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_who_is_cancelled_in_line_leaves_no_reader_behind(how: str, model: Any, tokenizer: Any) -> None:
    engine = Engine(model, batch_size=1, max_length=64)
    streamer, first = held(engine)
    readers = [TextIteratorStreamer(tokenizer, timeout=20) for _ in range(2)]
    waiting = [engine.submit(PROMPT, streamer=reader, max_new_tokens=8, eos_token_id=None) for reader in readers]
    if how == "cancel":
        assert all(future.cancel() for future in waiting)
    else:
        threading.Timer(0.2, streamer.go.set).start()
        engine.close(cancel=True)
    for reader in readers:
        with pytest.raises(CancelledError):
            list(reader)
    streamer.go.set()
    engine.close()
    assert first.done()
