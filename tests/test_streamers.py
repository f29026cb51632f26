"""Streamers and readers: what they get, and what is left where they fail or leave."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

import mtpkern
from mtpkern import Static, Verified, generation
from mtpkern.decoder import Decoder
from support.watching import NEW, STOPS, Recorder, theirs


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny.model("llama")


# Equal to transformers, token by token


@pytest.mark.parametrize("batch", ["one", "inputs"])
@pytest.mark.parametrize("limits", [{}, {"eos_token_id": STOPS}], ids=str)
def test_a_streamer_gets_what_generate_gives_it(
    batch: str, limits: Any, model: Any, tiny: Any, request: pytest.FixtureRequest
) -> None:
    given = {**request.getfixturevalue(batch), "max_new_tokens": NEW, **limits}
    expected = Recorder()
    text = theirs(model, tiny, **given, streamer=expected)
    assert expected.got[-1] == "end"
    for k in (1, 2, 3, 5, 8):
        streamer = Recorder()
        assert mtpkern.generate(model, **given, strategy=Verified(k, 0.0), streamer=streamer).equal(text)
        assert streamer.got == expected.got


def test_what_is_called_closed_need_not_end_runs(model: Any, one: Any) -> None:
    """As of a file, to which somebody writes blocks."""
    got: list[int] = []
    options = {"put": lambda value: None, "put_block": lambda new: got.extend(new[0]), "end": lambda: None}
    output = mtpkern.generate(model, **one, max_new_tokens=NEW, streamer=SimpleNamespace(closed=False, **options))
    assert got == output[0, 7:].tolist()


# transformers' own streamers


def test_text_streamers(model: Any, one: Any, tokenizer: Any, tiny: Any, capsys: Any) -> None:
    given = {**one, "max_new_tokens": NEW}
    theirs(model, tiny, **given, streamer=TextStreamer(tokenizer))
    expected = capsys.readouterr().out
    mtpkern.generate(model, **given, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == expected != ""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=mtpkern.generate, args=(model,), kwargs={**given, "streamer": streamer})
    thread.start()
    chunks = list(streamer)
    thread.join()
    text = tokenizer.decode(theirs(model, tiny, **given)[0, 7:])
    assert "".join(chunks) == text

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True)
        thread = threading.Thread(target=mtpkern.generate, args=(model,), kwargs={**given, "streamer": streamer})
        thread.start()
        return "".join([chunk async for chunk in streamer])

    assert asyncio.run(read()) == text


def test_a_text_streamer_refuses_a_batch_as_in_transformers(model: Any, inputs: Any, tokenizer: Any, tiny: Any) -> None:
    errors = []
    for call in (lambda **kw: theirs(model, tiny, **kw), lambda **kw: mtpkern.generate(model, **kw)):
        with pytest.raises(ValueError, match="batch size 1") as error:
            call(**inputs, max_new_tokens=4, streamer=TextStreamer(tokenizer))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def second_early(ids: Tensor, scores: Any) -> Tensor:
    return (torch.arange(3) == 1) & (ids.shape[1] >= 12 + 5)


def test_a_run_that_begins_anew_shows_nothing_twice(model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a kernel cannot be compiled: with plain operations the same tokens come again."""
    given = {**inputs, "max_new_tokens": NEW, "strategy": Static(3), "check_model": False}
    expected = Recorder()
    text = mtpkern.generate(model, **given, streamer=expected, stopping_criteria=[second_early])
    monkeypatch.setattr(generation, "without_kernels", lambda error, device: isinstance(error, KeyError))
    passes = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyError

    hook = model.register_forward_hook(fail)
    streamer = Recorder()
    again = mtpkern.generate(model, **given, streamer=streamer, stopping_criteria=[second_early])
    hook.remove()
    assert streamer.got == expected.got
    assert again.equal(text)


# Whoever leaves


class Leaves(Exception):
    pass


@pytest.mark.parametrize("error", [Leaves, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["prompts", "tokens", "end", "criterion"])
def test_an_exception_in_a_callback_leaves_model_and_decoder_whole(
    where: str, error: type[BaseException], model: Any, inputs: Any, kept: Callable[[], int]
) -> None:
    given = {**inputs, "max_new_tokens": NEW, "strategy": Static(3)}
    expected = mtpkern.generate(model, **given, return_dict_in_generate=True)
    calls = 0

    def fail(here: str) -> None:
        nonlocal calls
        calls += here == where
        if here == where and calls > 3 * (where in ("tokens", "criterion")):
            raise error

    class Failing:
        def put(self, value: Tensor) -> None:
            fail("prompts" if value.ndim == 2 else "tokens")

        def end(self) -> None:
            fail("end")

    def criterion(ids: Tensor, scores: Any) -> bool:
        fail("criterion")
        return False

    with pytest.raises(error):
        mtpkern.generate(model, **given, streamer=Failing(), stopping_criteria=[criterion])
    assert model.config._attn_implementation == "sdpa"
    # A run that was broken off is not kept; one that had not begun, or was over, is.
    assert kept() == (where in ("prompts", "end"))
    again = mtpkern.generate(model, **given, return_dict_in_generate=True)
    assert again.sequences.equal(expected.sequences)
    assert again.blocks == expected.blocks
    assert kept() == 1


@pytest.mark.parametrize("how", ["close", "with", "break", "forgotten", "interrupt"])
def test_a_reader_that_leaves_early(
    how: str, model: Any, inputs: Any, kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**inputs, "max_new_tokens": 60, "strategy": Static(3), "return_dict_in_generate": True}
    given["check_model"] = False  # a model with hooks is looked at anew, which takes passes
    passes = -100
    read = threading.Event()

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            assert read.wait(10)

    hook = model.register_forward_hook(count)
    expected = mtpkern.generate(model, **given)
    passes = 0
    stream = mtpkern.stream(model, **given)
    assert next(stream) == [row[12:15].tolist() for row in expected.sequences]
    if how == "interrupt":
        items = stream._sink.items
        stream._sink.items = SimpleNamespace(get=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        stream._sink.items = items
    closed, output, thread = stream._sink.closed, None, stream._thread
    if how in ("close", "with"):
        threading.Timer(0.05, read.set).start()
        if how == "close":
            stream.close()
        else:
            with stream:
                pass
        output = stream.output
    elif how == "break":
        threading.Timer(0.05, read.set).start()
        for _ in stream:
            break
    del stream
    assert closed.is_set()
    read.set()
    thread.join()
    if output is not None:
        assert output.finish_reasons == ["closed"] * 3
        assert output.blocks == [blocks[: output.passes[0]] for blocks in expected.blocks]
        assert output.sequences.equal(expected.sequences[:, : output.sequences.shape[1]])
    assert passes < 8
    assert kept() == 1
    passes = -100
    assert mtpkern.generate(model, **given).sequences.equal(expected.sequences)
    hook.remove()


def test_what_a_stream_was_given_may_be_written_to(model: Any, one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has gone as far as to show the prompt, and waits, when its caller fills the buffers anew."""
    expected = mtpkern.generate(model, **one, max_new_tokens=NEW)
    given, written, prefill = {name: x.clone() for name, x in one.items()}, threading.Event(), Decoder.prefill

    def later(*args: Any, **options: Any) -> Tensor:
        assert written.wait(60)
        return prefill(*args, **options)

    monkeypatch.setattr(Decoder, "prefill", later)
    stream = mtpkern.stream(model, **given, max_new_tokens=NEW)
    for x in given.values():
        x.fill_(1)
    written.set()
    assert [token for (new,) in stream for token in new] == expected[0, 7:].tolist()
    assert isinstance(stream.output, Tensor)
    assert stream.output.equal(expected)


def test_a_stream_raises_what_generate_raises(model: Any, inputs: Any) -> None:
    for wrong, message in (
        ({"num_beams": 2}, "num_beams=2"),
        ({"input_ids": torch.full((3, 12), 99)}, "from 0 to 15"),
        ({"streamer": Recorder()}, "takes no streamer"),
    ):
        with pytest.raises(ValueError, match=message):
            mtpkern.stream(model, **{**inputs, "max_new_tokens": 4, **wrong})

    def fail(ids: Tensor, scores: Any) -> None:
        if ids.shape[1] > 13:
            raise Leaves

    stream = mtpkern.stream(model, **inputs, max_new_tokens=NEW, strategy=Static(1), stopping_criteria=[fail])
    with pytest.raises(ValueError, match=r"a tensor \[3\], or True or False for all; fail gave None"):
        list(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.output is None


def test_a_fault_behind_the_end_is_none(model: Any, one: Any, lagging: None) -> None:
    """A pass that ran before the host could say stop is cut off, whatever it has come to."""
    passes = 0

    def spoil(module: Any, args: Any, logits: Tensor) -> Tensor | None:
        nonlocal passes
        passes += 1
        return logits * torch.nan if passes == 3 else None

    given = {**one, "max_new_tokens": NEW, "strategy": Static(3), "check_model": False}
    expected = mtpkern.generate(model, **given)
    hook = model.lm_head.register_forward_hook(spoil)
    output = mtpkern.generate(model, **given, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 7 + 6])
    assert output.equal(expected[:, : 7 + 6])
    assert passes == 3
    passes = 0
    with pytest.raises(RuntimeError, match="NaN"):
        mtpkern.generate(model, **given, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 7 + 7])
    hook.remove()
