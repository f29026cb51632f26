"""What a request to `mtpkern serve` may ask for, field by field, without a server."""

import json
from typing import Any

import pytest
from transformers import GenerationConfig

from mtpkern.asked import DEFAULT_LIMIT, fit, require_honoured, settle

PROMPT = {"prompt": "Two and two is"}
CHAT = {"messages": [{"role": "user", "content": "Two and two is"}]}
INPUT = {"input": "Two and two is"}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}


def honoured(asks: dict[str, Any], **says: Any) -> dict[str, Any]:
    """What is left of a request."""
    body = {"model": "shipped", **asks, **says}
    require_honoured(body, next(iter(asks)))
    assert body.pop("model") == "shipped"
    return body


@pytest.mark.parametrize(
    ("asks", "says", "why"),
    [
        *((asks, {"n": 2}, "a seed of its own") for asks in (PROMPT, CHAT)),
        (PROMPT, {"n": True}, "n=True"),
        (PROMPT, {"echo": 1}, "echo=1"),
        (PROMPT, {"suffix": "."}, "what is to follow"),
        (PROMPT, {"presence_penalty": 0.5}, "repetition_penalty is honoured"),
        (CHAT, {"response_format": {"type": "json_object"}}, "holds an answer to a form"),
        (CHAT, {"reasoning_effort": "low"}, "chat_template_kwargs"),
        (CHAT, {**TOOLS, "tool_choice": "none"}, "its own choice"),
        (CHAT, {"best_off": 1}, "leave it out"),
        (PROMPT, {"messages": []}, "nothing here does"),
        (INPUT, {"previous_response_id": "1"}, "the whole conversation"),
        *(({**CHAT, "tools": [tool]}, {}, "each of tools must be") for tool in ("f", {"type": "web_search"})),
        *((PROMPT, {name: value}, name) for name in ("max_tokens", "max_output_tokens") for value in (0, 2.5, "3")),
        *(({"prompt": x}, {}, "prompt must be one text") for x in (5, ["a", "b"])),
        *(({"messages": x}, {}, "list of messages") for x in ("hello", [5])),
        ({"messages": [{"content": "x"}]}, {}, "must have a role"),
        *(({"messages": [{"role": "user", "content": x}]}, {}, "content of messages") for x in (5, ["x"], [{}])),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, {}, "content of messages"),
        ({"input": [{"type": "input_image", "image_url": "x"}]}, {}, "content of input"),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_refused_by_name(asks: dict[str, Any], says: dict[str, Any], why: str) -> None:
    with pytest.raises((TypeError, ValueError), match=why):
        honoured(asks, **says)


@pytest.mark.parametrize(
    "says",
    [
        *({"stream": x} for x in ("false", 0, 1, [])),
        *({name: x} for name in ("temperature", "top_p", "min_p", "repetition_penalty") for x in (True, "1", 10**400)),
        *({"logit_bias": x} for x in ([], {"a": 1}, {"1_0": 1}, {"-1": 1}, {"5": "x"}, {"5": True}, {"5": None})),
        *({"generation_config": x} for x in (5, [], "{", "[]", "null")),
        *({name: 5} for name in ("stop", "chat_template_kwargs", "tools", "instructions", "stream_options")),
    ],
    ids=lambda says: str(says)[:40],
)
def test_types_are_jsons_own(says: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(says))):
        honoured(CHAT, **says)


def test_what_says_nothing_is_taken_out() -> None:
    nothing = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "temperature": None, "verbosity": "medium"}
    nothing |= {"response_format": {"type": "text"}, "tool_choice": "none", "reasoning": {"effort": None}}
    assert honoured(CHAT, **nothing) == {**CHAT, "stream": False}
    assert honoured(CHAT, **TOOLS, tool_choice="auto", user="me", stream=True) == {
        **CHAT,
        **TOOLS,
        "user": "me",
        "stream": True,
    }
    both = honoured(CHAT, max_completion_tokens=5, max_tokens=9, generation_config={"top_k": 3})
    assert both == {**CHAT, "stream": False, "max_completion_tokens": 5, "generation_config": '{"top_k": 3}'}
    with pytest.raises(ValueError, match="must have prompt"):
        honoured({"prompt": None})


@pytest.mark.parametrize(
    "said",
    [
        [{"type": "input_text", "text": "x"}],
        [{"role": "user", "content": "x"}, {"type": "function_call", "name": "f"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}, {"role": "assistant", "content": None}],
    ],
)
def test_a_response_takes_texts_and_calls_of_tools(said: list[Any]) -> None:
    assert honoured({"input": said}) == {"input": said, "stream": False}


@pytest.mark.parametrize(
    ("says", "samples"),
    [
        ({}, False),
        ({"temperature": 0.5}, True),
        ({"temperature": 0}, False),
        ({"top_p": 0.9}, True),
        ({"top_p": 1, "top_k": 0, "min_p": 0}, False),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"top_p": 0.9, "temperature": 0}, False),
        ({"temperature": 0.5, "generation_config": '{"do_sample": false}'}, False),
    ],
    ids=str,
)
def test_who_names_what_only_sampling_has_samples(says: dict[str, Any], samples: bool) -> None:
    config = GenerationConfig(do_sample=False)
    settle(config, says)
    assert config.do_sample == samples


def test_fields_that_transformers_does_not_read() -> None:
    config = GenerationConfig()
    says = {"top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "logit_bias": {"7": -2}, "max_output_tokens": 9}
    assert settle(config, says) is False
    assert (config.top_k, config.min_p, config.repetition_penalty) == (3, 0.25, 1.5)
    assert config.sequence_bias == {(7,): -2}
    assert config.max_new_tokens == 9


@pytest.mark.parametrize(
    ("file", "says", "prompt", "limit"),
    [
        ({}, {}, 10, DEFAULT_LIMIT),
        ({}, {}, 4000, 96),
        ({"max_new_tokens": 3000}, {}, 10, 3000),
        ({"max_new_tokens": 3000}, {}, 2000, 2096),
        ({}, {"max_tokens": 5}, 10, 5),
        ({}, {"max_tokens": 96}, 4000, 96),
        ({}, {"max_tokens": 97}, 4000, "room for 96 new ones"),
        ({}, {}, 4095, 1),
        ({}, {}, 4096, "leaves no room for an answer"),
        ({}, {"generation_config": {"max_length": 30}}, 10, 20),
        ({}, {"generation_config": {"max_length": 30}}, 30, None),  # which generate refuses
    ],
    ids=str,
)
def test_an_open_limit_is_what_fits(file: Any, says: dict[str, Any], prompt: int, limit: int | str | None) -> None:
    of_request = says.get("generation_config", {})
    config = GenerationConfig(**file, **of_request)
    is_open = settle(config, {**says, "generation_config": json.dumps(of_request)})
    if isinstance(limit, str):
        with pytest.raises(ValueError, match=limit):
            fit(config, prompt, 4096, is_open=is_open)
        return
    fit(config, prompt, 4096, is_open=is_open)
    assert config.max_new_tokens == limit
