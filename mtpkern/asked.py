"""What a request to `mtpkern serve` may ask for, field by field: read, without consequence, or refused by name.

Of OpenAI's fields transformers' server leaves out many and says so in its log alone, so that a client takes the answer
for what it asked for. Here a field that is not read has to be one that changes no answer, or to have a value that
changes none.
"""

from __future__ import annotations

import json
from typing import Any

from mtpkern.fields import whole_number

# Tokens of an answer where neither the request nor the model's own file names more, as in transformers' server.
DEFAULT_LIMIT = 1024
# What transformers' server does not know and is passed on to `generate`.
OURS = ("top_k", "min_p", "repetition_penalty")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_READ = {
    *("model", "instructions", "tools", "chat_template_kwargs"),
    *("stream", "seed", "stop", "temperature", "top_p", "logit_bias", "generation_config"),
    *(*LIMITS, *OURS),
}
# These say who asks, what is kept or how soon the answer comes, or forbid what is never done.
_WITHOUT_CONSEQUENCE = {
    *("user", "metadata", "safety_identifier", "store", "service_tier", "prediction", "max_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    "stream_options",  # the last chunk says the usage in any case
    "truncation",  # a prompt that is too long is refused
}
# Values that change nothing, beside None.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("echo", "logprobs", "background"), (False,)),
    **dict.fromkeys(("top_logprobs", "presence_penalty", "frequency_penalty"), (0,)),
    **dict.fromkeys(("functions", "include"), ([],)),
    **dict.fromkeys(("function_call", "tool_choice"), ("auto",)),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "verbosity": ("medium",),
    "text": (
        {},
        {"verbosity": "medium"},
        {"format": {"type": "text"}},
        {"format": {"type": "text"}, "verbosity": "medium"},
    ),
    "reasoning": ({},),
    "suffix": ("",),
}
# Values that change something only where there are tools.
_WITHOUT_TOOLS = {"function_call": "none", "tool_choice": "none", "parallel_tool_calls": False}
_WHY = {
    **dict.fromkeys(("n", "best_of"), "a request has one answer; ask once for each, with a seed of its own"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "the server sends texts alone; mtpkern.generate has return_logprobs"),
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty"),
        "scores are not lowered by how often a token has come; repetition_penalty is honoured",
    ),
    "echo": "the answer is what follows the prompt; put the prompt before it",
    "suffix": "the model does not see what is to follow its answer; leave it out",
    **dict.fromkeys(("response_format", "text"), "nothing holds an answer to a form; ask for it in the prompt"),
    **dict.fromkeys(
        ("tool_choice", "function_call", "parallel_tool_calls"),
        "what the model does with tools is its own choice; leave it out, or the tools",
    ),
    "functions": "tools is their name now",
    **dict.fromkeys(
        ("previous_response_id", "conversation"),
        "the server keeps nothing from one request to the next; send the whole conversation",
    ),
    **dict.fromkeys(
        ("reasoning", "reasoning_effort"),
        "how a model is told to think is up to its chat template; chat_template_kwargs of a chat reach that",
    ),
}
# Others, such as a search, would be run by the server.
_TOOLS = ("function", "custom")
_TEXTS = ("text", "input_text", "output_text")
# JSON's own types, as OpenAI has them: no text is taken for the number or the truth that it names, no truth for 1.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "stream": ((bool,), "true or false"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), ((int, float), "a number")),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs", "stream_options"), ((dict,), "an object")),
    "stop": ((str, list), "a text or a list of texts"),
    "tools": ((list,), "a list"),
    "instructions": ((str,), "a text"),
    "prompt": ((str,), "one text"),
    "generation_config": ((str, dict), "an object, or its JSON"),
}
# Above what a float holds, so that no conversion fails.
_MOST = 1e300


def require_honoured(body: dict[str, Any], question: str) -> None:
    """Refuse by name what a request asks for in vain, and take out of it what says nothing.

    question: the field that is answered, "prompt", "messages" or "input".

    Raises ValueError or TypeError.

        require_honoured({"prompt": "Two and two is", "n": 2}, "prompt")    # ValueError: ... n=2 ...
    """
    for name, value in list(body.items()):
        if value is None or _changes_nothing(name, value, tools=bool(body.get("tools"))):
            # A neutral frequency_penalty, for one, would take the place of a repetition penalty.
            del body[name]
        elif name != question and name not in _READ | _WITHOUT_CONSEQUENCE:
            why = _WHY.get(name, "nothing here does what it asks for; leave it out")
            raise ValueError(f"mtpkern serve does not support {name}={value!r:.60}: {why}")
        elif name in _KINDS:
            _require_kind(name, value)
    if question not in body:
        raise ValueError(f"a request must have {question}, which is what is answered; got {sorted(body)}")
    body.setdefault("stream", False)  # transformers' server streams responses unless told not to
    if "generation_config" in body:
        body["generation_config"] = json.dumps(_object("generation_config", body["generation_config"]))
    for token, bias in body.get("logit_bias", {}).items():
        if not (token.isascii() and token.isdecimal()):
            raise ValueError(f"logit_bias must have the ids of tokens, whole numbers, as its names, got {token!r:.60}")
        _require_kind("logit_bias", bias, ((int, float), f"a number for token {token}"))
    for tool in body.get("tools", ()):
        if not isinstance(tool, dict) or tool.get("type", "function") not in _TOOLS:
            raise ValueError(f"each of tools must be a function, which the client calls itself, got {tool!r:.60}")
    for name in LIMITS:
        if name in body:
            body[name] = whole_number(name, body[name], least=1)
    if "max_completion_tokens" in body:
        body.pop("max_tokens", None)  # its old name
    if question == "messages" or (question == "input" and isinstance(body["input"], list)):
        _require_texts(question, body[question])


def _require_kind(name: str, value: Any, kind: tuple[tuple[type, ...], str] | None = None) -> None:
    kinds, said = kind or _KINDS[name]
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits or (isinstance(value, (int, float)) and not -_MOST < value < _MOST):
        raise TypeError(f"{name} must be {said}, got {value!r:.60}")


def _object(name: str, value: Any) -> Any:
    """A JSON object, given as it is or as its text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} must be {_KINDS[name][1]}: {error}") from None
    _require_kind(name, value, ((dict,), _KINDS[name][1]))
    return value


def _changes_nothing(name: str, value: Any, *, tools: bool) -> bool:
    neutral = _NEUTRAL.get(name, ())
    if name in _WITHOUT_TOOLS and not tools:
        neutral += (_WITHOUT_TOOLS[name],)
    value = _without_none(value)
    return any(isinstance(value, bool) == isinstance(x, bool) and value == x for x in neutral)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(x) for name, x in value.items() if x is not None}
    return value


def _require_texts(name: str, messages: Any) -> None:
    """Refuse parts of messages that are no text, which transformers' server leaves out of a text model's prompt."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TypeError(f"{name} must be a list of messages, each with role and content, got {messages!r:.60}")
    if name == "input" and messages and "role" not in messages[0]:
        messages = [{"role": "user", "content": messages}]  # the parts of one
    for message in messages:
        if name == "messages" and not isinstance(message.get("role"), str):
            raise ValueError(f"each of messages must have a role, a text such as 'user', got {message!r:.60}")
        # Of a response's input, items without a role are calls of tools and what has come of them.
        content = message.get("content") if "role" in message else None
        if content is not None and not isinstance(content, (str, list)):
            raise TypeError(f"the content of {name} must be a text or a list of texts, got {content!r:.60}")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in _TEXTS or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"the content of {name} must be texts, {{'type': 'text', 'text': ...}}, got {part!r:.60}"
                )


def settle(config: Any, body: dict[str, Any]) -> bool:
    """Write into a request's generation config what transformers' server does not read.

    Returns whether the limit is open: named neither by the request nor by its generation_config.

    Who names a temperature above 0, or without one a top_p, top_k or min_p that cuts, samples, unless its
    generation_config says whether; temperature 0 is greedy.
    """
    said = json.loads(body.get("generation_config") or "{}")
    for name in OURS:
        if name in body:
            setattr(config, name, body[name])
    limits = [body[name] for name in LIMITS if name in body]
    if limits:
        (config.max_new_tokens,) = limits  # transformers 5.17 does not read all of them
    if body.get("logit_bias"):
        config.sequence_bias = {(int(token),): bias for token, bias in body["logit_bias"].items()}
    cuts = any(body.get(name, off) != off for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)))
    if "do_sample" not in said and ("temperature" in body or cuts):
        config.do_sample = float(body.get("temperature", 1)) != 0
    is_open = not limits and not {"max_new_tokens", "max_length"} & said.keys()
    if is_open and config.max_new_tokens is None:
        config.max_new_tokens = DEFAULT_LIMIT
    return is_open


def fit(config: Any, prompt: int, room: int, *, is_open: bool) -> None:
    """Lower an open limit to what a prompt of so many tokens leaves of the room; raises ValueError where it cannot be.

    fit(config, prompt=56, room=128, is_open=True)    # config.max_new_tokens is 72 at most
    """
    if config.max_new_tokens is None and isinstance(config.max_length, int) and config.max_length > prompt:
        # The server tells by max_new_tokens alone whether an answer was cut.
        config.max_new_tokens, config.max_length = config.max_length - prompt, None
    most = room - prompt
    if most < 1:
        raise ValueError(
            f"the prompt has {prompt} tokens and leaves no room for an answer: together they may have {room} "
            "(--max-length, or the model's positions); shorten it"
        )
    if is_open:
        config.max_new_tokens = min(config.max_new_tokens, most)
    elif config.max_new_tokens is not None and config.max_new_tokens > most:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves room for {most} new ones, as together they may have {room} "
            f"(--max-length, or the model's positions), got max_tokens={config.max_new_tokens}; lower it, or leave it "
            "out for what fits"
        )
