"""`mtpkern serve`: what a client sees of an answer is what OpenAI's API has, at its end above all."""

import asyncio
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig

import mtpkern
from mtpkern.batching import BatchOutput
from mtpkern.pieces import Answer, Pieces, Until
from support.servers import PROMPT, Served, running, server_of

GREEDY = {"temperature": 0}
KINDS = ("completions", "chat/completions")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Of the shipped checkpoint, which ends its answer to the first problem by itself."""
    with server_of(AutoModelForCausalLM.from_pretrained(mtpkern.ASSETS), batch_size=4, max_length=256) as served:
        yield served


def tokens_of(served: Served, **options: Any) -> list[int]:
    """What generate writes."""
    ids = served.tokenizer(PROMPT, return_tensors="pt").input_ids
    output = mtpkern.generate(served.model, ids, max_new_tokens=100, **options)
    assert not isinstance(output, mtpkern.MTPGenerateOutput)
    return list(output[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    ("strings", "pieces", "text"),
    [
        (["cd"], ["abc", "de"], "ab"),
        (["cd"], ["abc", "e"], "abce"),
        (["b", "abc"], ["ab", "c"], "a"),
        (["abc", "b"], ["a", "bc"], "a"),
        (["aab"], ["aaa", "b"], "a"),
        (["xy"], ["ax"], "ax"),
        (["xy"], ["xy", "xy"], ""),
        ([], ["a", "b"], "ab"),
        (["é…"], ["café", "…", "!"], "caf"),
    ],
)
def test_a_text_ends_before_the_first_string_that_is_whole(strings: list[str], pieces: list[str], text: str) -> None:
    until = Until(strings)
    assert "".join([*(until.add(piece) for piece in pieces), until.rest()]) == text
    assert Until(strings).whole("".join(pieces)) == text
    # Whatever has been shown stays.
    until, shown = Until(strings), ""
    for piece in pieces:
        shown += until.add(piece)
        assert text.startswith(shown)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_is_no_part_of_the_text(kind: str, stream: bool, served: Served) -> None:
    whole = served.tokenizer.decode(tokens_of(served), skip_special_tokens=True)
    # Within a token, over the border of several, at the beginning, two that overlap, one that never comes whole.
    for stop in (whole[1:3], whole[2:25], whole[:1], [whole[11:30], whole[10:12]], [whole[5:9] + "~", whole[40:44]]):
        found = [whole.find(s) for s in ([stop] if isinstance(stop, str) else stop)]
        expected = whole[: min(x for x in found if x >= 0)]
        assert served.choice(kind, **GREEDY, stop=stop, stream=stream) == (expected, "stop")
    assert served.choice(kind, **GREEDY, stop=whole[5:9] + "~", stream=stream) == (whole, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text_that_a_template_reads(
    stream: bool, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {"start_anchor": PROMPT[-7:], "fields": {"content": {"content": "text"}}}
    monkeypatch.setattr(served.tokenizer, "response_template", template, raising=False)
    text = served.tokenizer.decode(tokens_of(served))
    ask = {**GREEDY, "stream": stream}
    assert served.choice("chat/completions", **ask, max_tokens=20)[0]
    assert served.choice("chat/completions", **ask, stop=text[10:30]) == (text[:10], "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_who_ends_at_the_last_token_has_stopped(kind: str, stream: bool, served: Served) -> None:
    tokens = tokens_of(served)
    text = served.tokenizer.decode(tokens, skip_special_tokens=True)
    assert tokens[-1] == served.model.generation_config.eos_token_id
    ask = {**GREEDY, "stream": stream}
    assert served.choice(kind, **ask, max_tokens=len(tokens)) == (text, "stop")
    assert served.choice(kind, **ask, max_tokens=len(tokens) - 1) == (text, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_says_that_it_is_cut(stream: bool, served: Served) -> None:
    tokens = tokens_of(served)
    for more, status, reason in ((-1, "incomplete", {"reason": "max_output_tokens"}), (0, "completed", None)):
        ask = {**GREEDY, "max_output_tokens": len(tokens) + more, "stream": stream}
        code, said = served.post("responses", **ask)
        assert code == 200, said
        last = json.loads(said.split("data: ")[-1])
        if stream:
            assert last["type"] == f"response.{status}"
        response = last["response"] if stream else last
        assert (response["status"], response.get("incomplete_details")) == (status, reason)
        assert response["usage"]["output_tokens"] == len(tokens) + more


def test_the_model_has_the_name_that_was_asked_for(served: Served) -> None:
    for kind in (*KINDS, "responses"):
        assert json.loads(served.post(kind)[1])["model"] == "shipped"
    engine = mtpkern.Engine(served.model, tokenizer=served.tokenizer, max_length=256)
    with engine, running(engine, served.tokenizer, "mine:one.gguf") as url:
        another = Served(url, served.model, served.tokenizer)
        assert json.loads(another.post(model="mine:one.gguf", max_tokens=1)[1])["model"] == "mine:one.gguf"


def test_two_servers_of_one_process_answer_each_with_its_model(served: Served) -> None:
    ask = {**GREEDY, "max_tokens": 16}
    text = served.choice(**ask)
    other = AutoModelForCausalLM.from_pretrained(mtpkern.ASSETS)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    with server_of(other, batch_size=4, max_length=128) as second:
        expected = second.tokenizer.decode(tokens_of(second)[:16], skip_special_tokens=True)
        assert second.choice(**ask)[0] == expected != text[0]
        assert served.choice(**ask) == text
        # Each has its own room.
        assert "together they may have 128" in second.refusal(**GREEDY, max_tokens=250)
        assert "together they may have 256" in served.refusal(**GREEDY, max_tokens=250)
    assert served.choice(**ask) == text


def refused(served: Served, path: str, content: bytes) -> tuple[int, str]:
    """Status and message of what is not a request."""
    request = urllib.request.Request(
        served.url.removesuffix("/v1") + path, content, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    error = json.loads(caught.value.read())["error"]
    assert error["type"] == "invalid_request_error"
    return caught.value.code, error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"null", b'{"prompt": "\xff"}', 5000 * b"["])
def test_a_body_that_is_no_object_is_an_error_of_openais_form(content: bytes, served: Served) -> None:
    status, message = refused(served, "/v1/completions", content)
    assert status == 400
    assert "body" in message


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/audio/transcriptions", "/load_model", "/reset"])
def test_what_is_no_matter_of_the_one_model_is_not_there(path: str, served: Served) -> None:
    assert refused(served, path, b'{"model": "another"}')[0] == 404


def test_unknown_fields_are_errors_of_openais_form(served: Served) -> None:
    assert "'foo'" in served.refusal(foo=1)
    assert "prompt must be one text, got ['a', 'b']" in served.refusal(prompt=["a", "b"])
    assert "input" in served.refusal("responses", input=5)


def test_the_one_model_is_listed_and_another_is_not_found(served: Served) -> None:
    import openai

    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        (model,) = client.models.list()
        assert (model.id, model.object) == ("shipped", "model")
        assert client.models.retrieve("shipped") == model
        for ask in (
            lambda: client.models.retrieve("path/to/another"),
            lambda: client.completions.create(model="path/to/another", prompt=PROMPT),
            lambda: client.responses.create(model="path/to/another", input=PROMPT, stream=True),
        ):
            with pytest.raises(openai.NotFoundError, match="'path/to/another'") as caught:
                ask()
            assert caught.value.code == "model_not_found"


@contextmanager
def slowly_read(served: Served, patch: pytest.MonkeyPatch) -> Iterator[tuple[Event, Event]]:
    """A prompt is being read as soon as the first event is set, and until the second is, or the block ends."""
    begun, end = Event(), Event()
    read = type(served.tokenizer).__call__

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert end.wait(60)
        return read(*args, **kwargs)

    patch.setattr(type(served.tokenizer), "__call__", slow)
    try:
        yield begun, end
    finally:
        end.set()


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_else_waits_until_a_long_prompt_is_read(
    stream: bool, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = {**GREEDY, "max_tokens": 8, "stream": stream}
    expected = served.choice(**ask)
    with ThreadPoolExecutor(1) as pool, slowly_read(served, monkeypatch) as (begun, end):
        answer = pool.submit(served.choice, **ask)
        assert begun.wait(60)
        with urllib.request.urlopen(f"{served.url}/models", timeout=10) as models:
            assert models.status == 200
        end.set()
        assert answer.result(60) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_its_prompt_is_read_has_nothing_decoded(
    stream: bool, served: Served, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, slowly_read(served, patch) as (begun, _):
        content = json.dumps({"model": "shipped", "prompt": PROMPT, "stream": stream}).encode()
        request = urllib.request.Request(f"{served.url}/completions", content, {"Content-Type": "application/json"})
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(request, timeout=1)
        assert begun.is_set()
        time.sleep(0.5)
    assert served.choice(**GREEDY, max_tokens=1)[1] == "length"
    assert ended == ["closed", "length"]


def test_a_template_that_fails_is_the_clients(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for template, says in (
        ("{{ 1 / 0 }}", "chat template"),
        ("{{ raise_exception('must alternate') }}", "must altern"),
    ):
        monkeypatch.setattr(served.tokenizer, "chat_template", template)
        assert says in served.refusal("chat/completions")


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_of_the_server_is_no_error_of_the_clients(
    stream: bool, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is, but for where what a client has sent is read."""

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("of ours")

    theirs = "transformers.cli.serving.completion.CompletionHandler."
    for where in ("mtpkern.handlers.Served.get_manager", theirs + ("_streaming" if stream else "_non_streaming")):
        with monkeypatch.context() as patch:
            patch.setattr(where, failing)
            status, said = served.post(**GREEDY, stream=stream)
            assert (status, json.loads(said)["error"]["type"]) == (500, "server_error")


def test_a_stream_that_ends_within_a_character_loses_nothing() -> None:
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    half = len(alphabet)
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "nÃ": half}, merges=[("n", "Ã")]))
    tokenizer.decoder = decoders.ByteLevel()
    for tokens, strings, text in (([alphabet["a"], half], None, "an\ufffd"), ([alphabet["a"], half], ["n"], "a")):
        loop, queue, done = asyncio.new_event_loop(), asyncio.Queue[Any](), Future[BatchOutput]()
        streamer = Pieces(Answer(GenerationConfig(stop_strings=strings)), tokenizer, loop, queue, left=Event())
        streamer.put(torch.tensor([[alphabet["b"]]]))
        for token in tokens:
            streamer.put(torch.tensor([token]))
        done.set_result(BatchOutput(0, tokens, [len(tokens)], "length"))
        streamer.finish(done)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        pieces = [queue.get_nowait() for _ in range(queue.qsize())]
        assert pieces.pop() is None
        assert "".join(pieces) == text
        streamer.finish(done)  # a loop that is closed, as a second Ctrl-C does, sends nothing more
        assert queue.empty()


def test_who_leaves_before_a_stream_begins_has_nothing_decoded(
    served: Served, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*args: Any) -> None:
        await asyncio.Event().wait()

    endless = {str(served.model.generation_config.eos_token_id): -100}
    content = json.dumps({"model": "shipped", "prompt": PROMPT, "stream": True, "logit_bias": endless}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    address = urllib.parse.urlsplit(served.url)
    with monkeypatch.context() as patch:
        patch.setattr("starlette.responses.StreamingResponse.__call__", never)
        for _ in range(4):
            with socket.create_connection((address.hostname, address.port)) as client:
                client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
                time.sleep(0.03)
        time.sleep(0.1)
    # Behind all of them.
    assert served.post(**GREEDY, logit_bias=endless, max_tokens=1)[0] == 200
    assert ended.pop() == "length"
    assert set(ended) == {"closed"}


def test_an_error_in_a_stream_says_what_it_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('of "a pass"')

    monkeypatch.setattr("mtpkern.decoder.Decoder.step", failing)
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)
    with client, pytest.raises(openai.APIError, match='RuntimeError: of "a pass"'):
        list(client.completions.create(model="shipped", prompt=PROMPT, stream=True))
    assert "[DONE]" not in served.post(stream=True)[1]
