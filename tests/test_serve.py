"""`transformers serve` with a checkpoint that brings our generate along: an OpenAI client streams from it."""

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.custom_generate import write_custom_generate
from mtpkern.serve import main
from support.servers import CHAT, PROMPT, free_port, running

THEIRS = pytest.mark.parametrize("server", ["transformers"], indirect=True)
OURS = pytest.mark.parametrize("server", ["mtpkern"], indirect=True)


def test_the_shipped_checkpoint_brings_it_along(tmp_path: Path) -> None:
    write_custom_generate(tmp_path)
    file = "custom_generate/generate.py"
    with pytest.raises(FileNotFoundError, match="none_there"):
        write_custom_generate(tmp_path / "none_there")
    assert (mtpkern.ASSETS / file).read_text() == (tmp_path / file).read_text()


def test_a_port_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would be taken modulo 65,536, and said otherwise."""
    with pytest.raises(SystemExit):
        main(["model", "--port", "99999"])
    assert "--port: expected a number up to 65535, got 99999" in capsys.readouterr().err


@pytest.fixture(scope="module", params=["transformers", "mtpkern"])
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """transformers' server, or ours, in a thread as its own tests run it, with a client and the passes of its model."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")
    from transformers.cli.serve import Serve

    folder = tmp_path_factory.mktemp("served") / "shipped"
    shutil.copytree(mtpkern.ASSETS, folder, ignore=shutil.ignore_patterns("smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        if request.param == "mtpkern":
            model = AutoModelForCausalLM.from_pretrained(mtpkern.ASSETS)
            engine = stack.enter_context(mtpkern.Engine(model, tokenizer=tokenizer, batch_size=4))
            url = stack.enter_context(running(engine, tokenizer, str(folder)))
        else:
            port = free_port()
            where: dict[str, Any] = {"host": "127.0.0.1", "port": port, "device": "cpu", "log_level": "error"}
            theirs = Serve(force_model=str(folder), trust_remote_code=True, non_blocking=True, **where)
            stack.callback(theirs.kill_server)
            ((loaded),) = theirs._model_manager.loaded_models.values()
            model, url = loaded.model, f"http://127.0.0.1:{port}/v1"
            end = time.monotonic() + 60
            while not theirs.server.started and time.monotonic() < end:
                time.sleep(0.02)
        passes: list[int] = []
        model.register_forward_hook(lambda *_: passes.append(1))
        client = stack.enter_context(openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0))
        # The first call looks at the model before it decodes.
        client.completions.create(model=str(folder), prompt=PROMPT, max_tokens=2, temperature=0)
        facts = {"tokenizer": tokenizer, "model": model, "shares": request.param == "mtpkern"}
        yield SimpleNamespace(client=client, name=str(folder), passes=passes, **facts)


@pytest.fixture(scope="module")
def expected(server: SimpleNamespace) -> torch.Tensor:
    """What `model.generate` itself writes, with nobody's code."""
    model = AutoModelForCausalLM.from_pretrained(mtpkern.ASSETS)
    inputs = server.tokenizer(PROMPT, return_tensors="pt")
    output: torch.Tensor = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :]


def text_of(server: SimpleNamespace, tokens: torch.Tensor) -> str:
    return str(server.tokenizer.decode(tokens, skip_special_tokens=True))


def test_a_completion_is_streamed_in_several_tokens_a_pass(server: SimpleNamespace, expected: torch.Tensor) -> None:
    server.passes.clear()
    options = {"model": server.name, "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stream": True}
    chunks = list(server.client.completions.create(**options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(server, expected)
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) > 10
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(expected)
    assert len(server.passes) < 0.8 * len(expected)  # how many is up to the load of this machine


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat(server: SimpleNamespace, expected: torch.Tensor, stream: bool) -> None:
    server.passes.clear()
    messages = [{"role": "user", "content": PROMPT}]
    answer = server.client.chat.completions.create(
        model=server.name, messages=messages, max_tokens=16, temperature=0, stream=stream
    )
    if stream:
        answer = list(answer)
        text, reason = "".join(c.choices[0].delta.content or "" for c in answer), answer[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == text_of(server, expected[:16])
    assert reason == "length"
    assert 0 < len(server.passes) < 16


@THEIRS
def test_what_a_request_says_of_scores_counts(server: SimpleNamespace, expected: torch.Tensor) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    ask = {"model": server.name, "messages": messages, "max_tokens": 16, "temperature": 0}
    answer = server.client.chat.completions.create(**ask, logit_bias={str(int(expected[0])): -100.0}).choices[0]
    assert not answer.message.content.startswith(text_of(server, expected[:1]))
    sampled = {"generation_config": '{"do_sample": true, "temperature": 5.0}'}
    ask = {"model": server.name, "prompt": PROMPT, "max_tokens": 16}
    texts = [server.client.completions.create(**ask, seed=s, extra_body=sampled).choices[0].text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@THEIRS
def test_what_is_not_honoured_is_an_error_of_the_request(server: SimpleNamespace) -> None:
    import openai

    ask = {"model": server.name, "prompt": PROMPT, "stream": True}
    with pytest.raises(openai.APIError) as caught:
        list(server.client.completions.create(**ask, extra_body={"generation_config": '{"num_beams": 2}'}))
    assert "does not support num_beams=2" in str(caught.value.body)


@OURS
def test_who_leaves_before_a_whole_answer_ends_its_run(server: SimpleNamespace, ended: list[str]) -> None:
    import openai

    seconds = [0.0]
    slow = server.model.register_forward_hook(lambda *_: time.sleep(seconds[0]))
    try:
        # A model with a hook is looked at anew before it decodes.
        server.client.completions.create(model=server.name, prompt=PROMPT, max_tokens=2)
        ended.clear()
        seconds[0] = 0.2
        with pytest.raises(openai.APITimeoutError):
            server.client.completions.create(model=server.name, prompt=PROMPT, max_tokens=100, timeout=0.5)
        end = time.monotonic() + 60
        while not ended and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        slow.remove()
    assert ended == ["closed"]


def test_a_client_that_leaves_ends_its_run_and_nobody_elses(server: SimpleNamespace, expected: torch.Tensor) -> None:
    ask: dict[str, Any] = {"model": server.name, "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    stream = server.client.completions.create(**ask, stream=True)
    next(stream)
    stream.close()
    assert server.client.completions.create(**ask).choices[0].text == text_of(server, expected)


def test_clients_at_once_get_what_each_gets_alone(server: SimpleNamespace, expected: torch.Tensor) -> None:
    import openai

    async def ask(n: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=str(server.client.base_url), api_key="none", timeout=60) as client:
            options = {"model": server.name, "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
            answers = await asyncio.gather(*(client.completions.create(**options) for _ in range(n)))
            return [answer.choices[0].text for answer in answers]

    passes = []
    for n in (1, 4):
        server.passes.clear()
        assert asyncio.run(ask(n)) == [text_of(server, expected)] * n
        passes.append(len(server.passes))
    # Of ours four take hardly more passes than one; transformers' has them in line.
    assert (passes[1] < 3 * passes[0]) == server.shares, passes


@OURS
def test_clients_at_once_draw_what_each_draws_alone(server: SimpleNamespace) -> None:
    """Each at a temperature of its own, and in passes that they share."""
    import openai

    asked = [(seed, temperature) for seed in (1, 2, 3) for temperature in (0.9, 2.0, 3.5)]

    async def ask(several: list[tuple[int, float]]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=str(server.client.base_url), api_key="none", timeout=60) as client:
            options = {"model": server.name, "prompt": PROMPT, "max_tokens": 40}
            sampled = {"generation_config": '{"do_sample": true}'}
            calls = (
                client.completions.create(**options, seed=seed, temperature=temperature, extra_body=sampled)
                for seed, temperature in several
            )
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    alone = [asyncio.run(ask([one]))[0] for one in asked]
    assert len(set(alone)) > 3
    server.passes.clear()
    for _ in range(3):
        assert asyncio.run(ask(asked)) == alone
    assert len(server.passes) < 3 * 40 * len(asked) / 2


@THEIRS
@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_ends_at_a_stop_string(server: SimpleNamespace, expected: torch.Tensor, stream: bool) -> None:
    """The shipped tokenizer is one that transformers' own criterion cannot read."""
    whole = text_of(server, expected)
    string = whole[12:20]
    ask = {"model": server.name, "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stop": [string]}
    answer = server.client.completions.create(**ask, stream=stream)
    text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
    # Of transformers' server it is part of the text, to the end of the token that completes it.
    prefixes = (text_of(server, expected[:n]) for n in range(len(expected)))
    assert text == next(prefix for prefix in prefixes if string in prefix)


@OURS
def test_the_command_serves_until_ctrl_c(server: SimpleNamespace) -> None:
    """A process of its own, of which one client asks."""
    import openai

    port = free_port()
    command = [sys.executable, "-m", "mtpkern.serve", server.name, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--name", "mine"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=12)
            answer = client.completions.create(model="mine", prompt=PROMPT, max_tokens=16, temperature=0)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 16
            endless = {str(server.model.generation_config.eos_token_id): -100}
            ask: dict[str, Any] = {"model": "mine", "prompt": PROMPT, "max_tokens": 4000, "temperature": 0}
            stream = client.completions.create(**ask, logit_bias=endless, stream=True)
            next(stream)
            process.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError, match="the server ends"):
                list(stream)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in (0, 130), said
    assert "Traceback" not in said
