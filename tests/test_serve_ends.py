"""`mtpkern serve`: a server that ends does not wait for the answers that it is writing, and says so."""

import asyncio
import gc
import json
import time
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.serve import main
from support.servers import CHAT, PROMPT, Served, running

KINDS = ("completions", "chat/completions", "responses")


@pytest.fixture(scope="module")
def slow() -> Any:
    """The shipped model, whose passes take so long that answers are never whole in time."""
    model = AutoModelForCausalLM.from_pretrained(mtpkern.ASSETS)
    model.register_forward_hook(lambda *_: time.sleep(0.1))
    return model


@pytest.fixture
def ending(
    slow: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Served, ExitStack]]:
    """A server for two requests at a time, which waits so long at its end, and what ends it when it is closed."""
    pytest.importorskip("uvicorn")
    monkeypatch.setattr("mtpkern.serve._LAST_WORDS", request.param)
    tokenizer = AutoTokenizer.from_pretrained(mtpkern.ASSETS)
    tokenizer.chat_template = CHAT
    options: dict[str, Any] = {"batch_size": 2, "max_length": 1024, "strategy": mtpkern.Static(1)}
    with mtpkern.Engine(slow, tokenizer=tokenizer, **options) as engine, ExitStack() as stack:
        url = stack.enter_context(running(engine, tokenizer, "shipped"))
        yield Served(url, slow, tokenizer), stack
        # It is not the server's.
        assert len(engine.submit([5, 6], max_new_tokens=2, eos_token_id=None).result(60).tokens) == 2


def endless(served: Served) -> dict[str, Any]:
    return {"generation_config": {"eos_token_id": None, "do_sample": False}}


@pytest.mark.parametrize("ending", [60], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_end_with_an_error(
    stream: bool, ending: tuple[Served, ExitStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are being written, the one in line, and the one that is being read."""
    served, end = ending
    begun, read = Event(), Event()
    tokenize = type(served.tokenizer).__call__

    def slowly(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        if text == "slow":
            begun.set()
            assert read.wait(60)
        return tokenize(self, text, *args, **kwargs)

    monkeypatch.setattr(type(served.tokenizer), "__call__", slowly)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(served.post, kind, stream=stream, **endless(served)) for kind in KINDS]
        time.sleep(1)
        answers += [pool.submit(served.post, prompt="slow", stream=stream, **endless(served)) for _ in range(2)]
        assert begun.wait(60)
        closing = pool.submit(end.close)
        time.sleep(0.3)
        read.set()
        closing.result(60)
        found = [answer.result(60) for answer in answers]
    for status, said in found:
        assert "the server ends" in said
        assert "[DONE]" not in said
        assert "completed" not in said
        # Who has not begun yet is refused.
        assert status in ((200, 503) if stream else (503,)), said
    assert not stream or sum(status == 200 for status, _ in found) >= len(KINDS)


@pytest.mark.parametrize("ending", [1], indirect=True)
def test_who_does_not_read_is_not_waited_for_either(
    ending: tuple[Served, ExitStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Event()

    async def never(*args: Any) -> None:
        called.set()
        await asyncio.Event().wait()

    served, end = ending
    monkeypatch.setattr("starlette.responses.StreamingResponse.__call__", never)
    content = json.dumps({"prompt": PROMPT, "stream": True, **endless(served)}).encode()
    request = urllib.request.Request(f"{served.url}/completions", content, {"Content-Type": "application/json"})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(urllib.request.urlopen, request, timeout=40)
        assert called.wait(60)
        end.close()  # waits for a minute, and so may the client
        assert not isinstance(answer.exception(60), TimeoutError | None)


def test_a_server_that_has_ended_holds_no_model(slow: Any) -> None:
    """In a process that opens others."""
    pytest.importorskip("uvicorn")
    tokenizer = AutoTokenizer.from_pretrained(mtpkern.ASSETS)
    engine = mtpkern.Engine(slow, tokenizer=tokenizer, max_length=256)
    with engine, running(engine, tokenizer, "shipped") as url:
        served = Served(url, slow, tokenizer)
        assert served.post(max_tokens=2)[0] == 200
        for path in ("models", "models/shipped"):
            with urllib.request.urlopen(f"{url}/{path}", timeout=60) as answer:
                assert "shipped" in answer.read().decode()
    ref = weakref.ref(engine)
    del engine
    gc.collect()
    assert ref() is None


def test_a_name_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would be taken for none, and the path be the name."""
    with pytest.raises(SystemExit):
        main(["model", "--name", ""])
    assert "--name: expected what clients call the model" in capsys.readouterr().err
