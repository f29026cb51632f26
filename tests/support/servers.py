"""`mtpkern serve`, with the shipped checkpoint or another, in a thread of this process, asked over HTTP."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.batching import BatchOutput
from mtpkern.line import Request
from mtpkern.serve import server

PROMPT = json.loads((mtpkern.ASSETS / "problems.jsonl").read_text().splitlines()[0])["prompt"]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
# Of a request and its answer: more than the first problem's, and less than its prompt and the server's default.
ROOM = 128


class Served:
    """A server: `post` asks it, `text` is what it answers."""

    def __init__(self, url: str, model: Any, tokenizer: Any) -> None:
        self.url, self.model, self.tokenizer = url, model, tokenizer

    def post(self, where: str = "completions", **body: Any) -> tuple[int, str]:
        """Status and body of the answer, to the first problem unless the body says another."""
        asks = {"completions": {"prompt": PROMPT}, "responses": {"input": PROMPT}}
        asks["chat/completions"] = {"messages": [{"role": "user", "content": PROMPT}]}
        content = json.dumps({"model": "shipped", **asks[where], **body}).encode()
        request = urllib.request.Request(f"{self.url}/{where}", content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def choice(self, where: str = "completions", **body: Any) -> tuple[str, str]:
        """Text and finish reason of a whole answer, or of one that comes in pieces."""
        status, said = self.post(where, **body)
        assert status == 200, said
        pieces = [said]
        if body.get("stream"):
            *pieces, last = [line.removeprefix("data: ") for line in said.splitlines() if line]
            assert last == "[DONE]", said
        pieces = [json.loads(piece) for piece in pieces]
        choices = [piece["choices"][0] for piece in pieces]
        texts = [c.get("text") or c.get("delta", c.get("message", {})).get("content") or "" for c in choices]
        return "".join(texts), choices[-1]["finish_reason"]

    def refusal(self, where: str = "completions", **body: Any) -> str:
        """Why a request is refused."""
        status, said = self.post(where, **body)
        assert status == 400, said
        return str(json.loads(said)["error"]["message"])


@pytest.fixture(scope="module")
def shipped_server() -> Iterator[Served]:
    """Of the shipped checkpoint, four requests at a time."""
    with server_of(AutoModelForCausalLM.from_pretrained(mtpkern.ASSETS), batch_size=4, max_length=ROOM) as served:
        yield served


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why requests have ended, in their order."""
    ended: list[str] = []
    finish = Request.finish

    def finished(request: Request, output: BatchOutput) -> None:
        ended.append(output.finish_reason)
        finish(request, output)

    monkeypatch.setattr(Request, "finish", finished)
    return ended


@contextmanager
def server_of(model: Any, **options: Any) -> Iterator[Served]:
    """A server of a model with the shipped checkpoint's tokens; options: the engine's."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    tokenizer = AutoTokenizer.from_pretrained(mtpkern.ASSETS)
    tokenizer.chat_template = CHAT
    with (
        mtpkern.Engine(model, tokenizer=tokenizer, **options) as engine,
        running(engine, tokenizer, "shipped") as url,
    ):
        yield Served(url, model, tokenizer)


@contextmanager
def running(engine: Any, tokenizer: Any, name: str) -> Iterator[str]:
    """The server of an engine in a thread of its own; where it is reached."""
    port = free_port()
    ours = server(engine, tokenizer, name, host="127.0.0.1", port=port)
    thread = Thread(target=ours.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not ours.started and time.monotonic() < end:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        ours.should_exit = True
        thread.join(60)


def free_port() -> int:
    """One that nobody has yet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
