"""`mtpkern serve`: what a request asks for is honoured, changes nothing, or is refused and told why."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import mtpkern
from mtpkern import Static, asked
from mtpkern.decoder import Decoder
from support.pages import fenced
from support.servers import PROMPT, ROOM, Served, server_of

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("completions", "chat/completions", "responses")
GREEDY = {"temperature": 0}


def endless(shipped_server: Served) -> dict[str, Any]:
    """Asks for an answer that only the limit ends."""
    return {**GREEDY, "logit_bias": {str(shipped_server.model.generation_config.eos_token_id): -100}}


def alone(shipped_server: Served, **options: Any) -> str:
    """The text that generate writes."""
    inputs = shipped_server.tokenizer(PROMPT, return_tensors="pt")
    output = mtpkern.generate(shipped_server.model, **inputs, **options)
    assert isinstance(output, torch.Tensor)
    return str(shipped_server.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_who_names_no_limit_gets_what_fits(kind: str, stream: bool, shipped_server: Served) -> None:
    ask = {**endless(shipped_server), "stream": stream}
    text, reason = shipped_server.choice(kind, **ask)
    assert reason == "length"
    said = shipped_server.refusal(kind, **ask, max_tokens=ROOM)
    most = int(said.partition("room for ")[2].split()[0])
    assert f"max_tokens={ROOM}" in said
    assert shipped_server.choice(kind, **ask, max_tokens=most) == (text, "length")
    assert "room for" in shipped_server.refusal(kind, **ask, max_tokens=most + 1)
    # Its own generation config, which says nothing of a limit.
    assert shipped_server.choice(kind, **ask, generation_config='{"do_sample": false}') == (text, "length")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_leaves_no_room_is_refused(kind: str, shipped_server: Served) -> None:
    asks: dict[str, Any] = {"completions": {"prompt": 3 * PROMPT}, "responses": {"input": 3 * PROMPT}}
    asks["chat/completions"] = {"messages": [{"role": "user", "content": 3 * PROMPT}]}
    for stream in (False, True):
        assert "leaves no room for an answer" in shipped_server.refusal(kind, **asks[kind], stream=stream)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("completions", {"max_tokens": 5}),
        ("chat/completions", {"max_tokens": 5}),
        ("chat/completions", {"max_completion_tokens": 5}),
        ("chat/completions", {"max_completion_tokens": 5, "max_tokens": 9}),
        ("responses", {"max_output_tokens": 5}),
    ],
    ids=str,
)
def test_a_limit_is_one_by_each_of_its_names(kind: str, limits: dict[str, int], shipped_server: Served) -> None:
    """transformers 5.17 knows max_completion_tokens, and does without it."""
    status, said = shipped_server.post(kind, **GREEDY, **limits)
    assert status == 200, said
    usage = json.loads(said)["usage"]
    assert usage.get("completion_tokens", usage.get("output_tokens")) == 5


def test_learned_positions_are_room_as_well() -> None:
    config = GPT2Config(vocab_size=286, n_positions=64, n_embd=16, n_layer=1, n_head=1)
    config.bos_token_id = config.eos_token_id = None
    with server_of(GPT2LMHeadModel(config).eval(), strategy=Static(1), max_length=ROOM) as served:
        status, said = served.post(**GREEDY)
        assert status == 200
        # The last token is never fed.
        assert json.loads(said)["usage"]["total_tokens"] == 65
        assert "room for 9 new ones" in served.refusal(**GREEDY, max_tokens=10)


@pytest.mark.parametrize("more", [-60, 0, 8])
def test_a_limit_of_the_whole_text_is_said_when_it_is_met(more: int, shipped_server: Served) -> None:
    length = len(shipped_server.tokenizer(PROMPT).input_ids) + more
    ask = {"generation_config": {"max_length": length}}
    if more > 0:
        text, reason = shipped_server.choice(**ask)
        assert (text, reason) == (alone(shipped_server, max_new_tokens=more), "length")
    else:
        assert "max_length" in shipped_server.refusal(**ask)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        *((kind, {"n": 2}) for kind in KINDS[:2]),
        *((kind, {name: 0.5}) for kind in KINDS[:2] for name in ("presence_penalty", "frequency_penalty")),
        *(("completions", says) for says in ({"best_of": 3}, {"logprobs": 0}, {"echo": True}, {"suffix": " apples"})),
        *(
            ("chat/completions", says)
            for says in ({"logprobs": True}, {"top_logprobs": 2}, {"reasoning_effort": "low"})
        ),
        *((kind, {"tool_choice": "required"}) for kind in KINDS[1:]),
        ("chat/completions", {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("chat/completions", {"response_format": {"type": "json_object"}}),
        *(("responses", {name: "resp_1"}) for name in ("previous_response_id", "conversation")),
        ("responses", {"text": {"format": {"type": "json_object"}}}),
        *((kind, {"tools": [tool]}) for kind in KINDS[1:] for tool in ({"type": "web_search"}, "f")),
        ("completions", {"generation_config": {"max_new_tokens": "3"}}),
        ("responses", {"prompt": {"id": "p"}}),
        *(
            (kind, {name: 2.5})
            for kind, name in zip(KINDS, ("max_tokens", "max_completion_tokens", "max_output_tokens"))
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
        ("responses", {"input": [{"type": "input_image", "image_url": "x"}]}),
        ("responses", {"input": [{"type": "input_text", "text": "x"}, {"type": "function_call", "call_id": "1"}]}),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
        *(("chat/completions", {"messages": x}) for x in (None, "hello", [{"content": "no role"}])),
        *(("chat/completions", {"messages": [{"role": "user", "content": x}]}) for x in (5, {})),
        ("chat/completions", {"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}),
        ("responses", {"input": [{"role": "user", "content": "x"}, {"type": "function_call"}]}),
        *(
            ("chat/completions", {"chat_template_kwargs": x})
            for x in ([], {"chat_template": "x"}, {"padding": True}, {"truncation": True, "max_length": 2})
        ),
        *(("completions", says) for says in ({"max_tokens": 0}, {"max_tokens": 10**6}, {"stop": [""]})),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_refused_by_name(kind: str, says: dict[str, Any], shipped_server: Served) -> None:
    for stream in (False, True):
        assert next(iter(says)) in shipped_server.refusal(kind, **says, stream=stream)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        *((kind, dict.fromkeys(("n", "logprobs", "presence_penalty", "temperature"), None)) for kind in KINDS[:2]),
        ("completions", {"n": 1, "best_of": 1, "echo": False, "logprobs": False, "presence_penalty": 0, "suffix": ""}),
        ("completions", {"frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "stream_options": None, "seed": 3}),
        ("chat/completions", {"n": 1, "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}}),
        ("chat/completions", {"tool_choice": "none", "parallel_tool_calls": False, "modalities": ["text"]}),
        ("chat/completions", {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "top_p": 1, "stop": None}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]}),
    ],
    ids=str,
)
def test_values_that_change_nothing_are_taken(kind: str, says: dict[str, Any], shipped_server: Served) -> None:
    assert shipped_server.choice(kind, **says, max_tokens=16)[0] == alone(shipped_server, max_new_tokens=16)


def test_a_response_takes_texts_and_calls_of_tools(shipped_server: Served) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    for said in (
        [{"type": "input_text", "text": PROMPT}],
        [{"role": "user", "content": [{"type": "input_text", "text": PROMPT}]}],
        [{"role": "user", "content": PROMPT}, call, {"type": "function_call_output", "call_id": "1", "output": ""}],
    ):
        status, answer = shipped_server.post("responses", input=said, max_output_tokens=16)
        assert status == 200
        assert json.loads(answer)["output"][0]["content"][0]["text"] == alone(shipped_server, max_new_tokens=16)


def test_a_response_is_whole_unless_it_is_to_be_streamed(shipped_server: Served) -> None:
    for says in (
        {},
        {"text": {"format": {"type": "text"}}, "reasoning": {"effort": None}, "truncation": "auto"},
        {"text": {"verbosity": "medium"}},
    ):
        status, said = shipped_server.post("responses", **says, max_output_tokens=16)
        assert status == 200
        assert json.loads(said)["output"][0]["content"][0]["text"] == alone(shipped_server, max_new_tokens=16)


def test_what_a_request_says_of_scores_is_done(shipped_server: Served) -> None:
    first = shipped_server.tokenizer(alone(shipped_server, max_new_tokens=1), add_special_tokens=False).input_ids[0]
    ask = {**GREEDY, "max_tokens": 16}
    assert shipped_server.choice(**ask, logit_bias={str(first): -100})[0] == alone(
        shipped_server, max_new_tokens=16, sequence_bias={(first,): -100.0}
    )
    penalized = alone(shipped_server, max_new_tokens=16, repetition_penalty=4.0)
    assert penalized != alone(shipped_server, max_new_tokens=16)
    # A penalty that is none takes the place of no other.
    assert shipped_server.choice(**ask, repetition_penalty=4.0, frequency_penalty=0)[0] == penalized
    assert shipped_server.choice(**ask, generation_config={"repetition_penalty": 4.0})[0] == penalized


@pytest.mark.parametrize(
    "says",
    [{"temperature": 3.0}, {"temperature": 3.0, "top_k": 9}, {"min_p": 1e-9, "top_k": 0}],
    ids=str,
)
def test_who_names_what_only_sampling_has_samples(says: dict[str, Any], shipped_server: Served) -> None:
    options = {"temperature": 1.0, **says}
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn = alone(shipped_server, max_new_tokens=40, do_sample=True, **options)
        assert shipped_server.choice(**says, seed=seed, max_tokens=40)[0] == drawn
    greedy = alone(shipped_server, max_new_tokens=40)
    assert shipped_server.choice(**{**says, "temperature": 0}, max_tokens=40)[0] == greedy
    assert shipped_server.choice(**says, max_tokens=40, generation_config='{"do_sample": false}')[0] == greedy


def test_a_bias_of_another_tokenizers_token_is_the_clients_fault(shipped_server: Served) -> None:
    assert "got [99999]" in shipped_server.refusal(logit_bias={"99999": 1})


@pytest.mark.parametrize(
    "says",
    [
        *({"stream": x} for x in ("false", "true", 0, 1, [])),
        *({name: x} for name in ("temperature", "top_p", "min_p") for x in (True, "0.5", [], {}, 10**400)),
        *({"logit_bias": x} for x in ([], [5], {"a": 1}, {"1_0": 1}, {"-1": 1}, {"5": "x"}, {"5": True}, {"5": None})),
        *({"generation_config": x} for x in (5, [], "{", "[]", "null")),
        *({name: 5} for name in ("stop", "chat_template_kwargs", "tools")),
    ],
    ids=lambda says: str(says)[:40],
)
def test_types_are_jsons_own(says: dict[str, Any], shipped_server: Served) -> None:
    name = next(iter(says))
    kind = "chat/completions" if name in ("chat_template_kwargs", "tools") else "completions"
    assert name in shipped_server.refusal(kind, **{"temperature": 1, **says})


@pytest.mark.parametrize("says", [{"stop": [1, "it's"]}, {"generation_config": '{"num_beams": 2}'}], ids=str)
def test_a_stream_is_refused_before_it_begins(says: dict[str, Any], shipped_server: Served) -> None:
    said = shipped_server.refusal(**says, stream=True)
    assert said == shipped_server.refusal(**says)
    assert 'got [1, "it\'s"]' in said or "num_beams=2" in said


def test_the_page_knows_every_field() -> None:
    page = (ROOT / "docs/serving.md").read_text().partition("### What a request may say")[2].partition("## In a")[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in page.splitlines() if line[:1] == "|")))
    known = {*asked._READ, *asked._WITHOUT_CONSEQUENCE, *asked._NEUTRAL, *asked._WHY} - {"model"}
    assert named - {"prompt", "messages", "input"} == known


def test_the_pages_client_is_answered(shipped_server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (x for x in fenced((ROOT / "docs/serving.md").read_text(), "python") if "openai" in x)
    code = code.replace("http://localhost:8000/v1", shipped_server.url).replace("path/to/checkpoint", "shipped")
    exec(code, {})
    assert capsys.readouterr().out.strip().endswith("#### 75")


def test_a_fault_of_ours_is_told_from_the_clients(shipped_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = {**GREEDY, "max_tokens": 8}

    def failing(*args: Any, **options: Any) -> Any:
        raise ValueError("of a pass")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", failing)
        for kind in KINDS[:2]:
            status, said = shipped_server.post(kind, **ask)
            assert status == 500
            assert json.loads(said)["error"] == {
                "message": "ValueError: of a pass",
                "type": "server_error",
                **dict.fromkeys(("param", "code")),
            }
            said = shipped_server.post(kind, **ask, stream=True)[1]
            assert "of a pass" in said
            # Half an answer does not look whole.
            assert "finish_reason" not in said
    with monkeypatch.context() as patch:
        patch.setattr("transformers.cli.serving.chat_completion.parse_assistant_message", failing)
        assert shipped_server.post("chat/completions", **ask)[0] == 500
    assert shipped_server.choice(**ask)[0] == alone(shipped_server, max_new_tokens=8)
