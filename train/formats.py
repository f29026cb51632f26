"""Formats: a row of the usual kinds becomes a conversation, which mtpkern.train.encoder turns into token ids.

    columns                  read as
    messages                 [{"role": system | user | assistant | tool, "content": str, ...}, ...]
    conversations            [{"from": system | human | gpt | tool, "value": str, ...}, ...]
    prompt, completion       two strings, or two lists of messages
    query, response          two strings (MetaMathQA)
    question, answer         two strings (GSM8K)
    text, tokens, blocks     what `mtpkern generate --file` writes: the text is the answer to its prompt or messages
    text                     one string, all of it answer

    beside them
    system, system_prompt    the system prompt of a row that has none
    tools                    schemas of functions for the chat template: a list, or its JSON
    chat_template_kwargs     further variables of the chat template: an object, or its JSON
    finished, finish_reason  false, or "length": the answer was cut, and no EOS stands behind it

Other columns are not read, and refused where the chat template has a variable of that name. The last message must be
the assistant's: it is the answer, what stands before it the prompt. The assistant's earlier messages are answers too,
but not those with "weight": 0, nor any in the list `prompt`.

Source   arXiv 2602.06019, training data; its Llama has the chat template on, its Qwen3 has it off
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mtpkern.rows import BadRow, parse, shown
from mtpkern.train.arguments import refuse

Message = dict[str, Any]

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "query-response": ("query", "response"),
    "question-answer": ("question", "answer"),
    "generated": ("text", "tokens", "blocks"),
    "text": ("text",),
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Who may speak after whom.
_NEXT = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_ROLES = tuple(role for role in _NEXT if role)


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, the answer last, and what else there is to render them by.

    tools     JSON schemas of functions, or none
    options   further variables of the chat template
    finished  False: the answer was cut where it stops, so nothing ends it
    columns   names of the row's other columns that hold something
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    columns: frozenset[str] = frozenset()


def recognise(columns: Iterable[str], source: str = "data") -> str:
    """The name of the one format whose columns are all there. Raises ValueError where none or several match.

    recognise(["query", "response", "type", "original_question"])  # "query-response"
    """
    columns = sorted(set(columns))
    found = [name for name, needed in FORMATS.items() if set(needed) <= set(columns)]
    if "generated" in found:
        # Its prompt is in one of the two, and its answer is the text.
        among = {"messages", "text"} if {"prompt", "messages"} & set(columns) else {"generated"}
        found = [name for name in found if name not in among]
    known = "; ".join(" and ".join(needed) for needed in FORMATS.values())
    refuse(not found, f"{source}: expected the columns of one format ({known}); got {columns}: rename them")
    refuse(len(found) > 1, f"{source}: the columns {columns} match {' and '.join(found)}; choose one with data_format")
    return found[0]


def conversation_of(row: Any, data_format: str) -> Conversation:
    """The conversation of a row. Raises BadRow.

    conversation_of({"question": "1 + 1?", "answer": "2", "system": "Be brief."}, "question-answer").messages[0]
    # {"role": "system", "content": "Be brief."}
    """
    messages = messages_of(row, data_format)
    finished = row.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise BadRow("wrong finished", f"finished: expected true or false; got {shown(finished)}; rename the column")
    if finished is None:
        finished = row.get("finish_reason") != "length"
    if data_format == "text":  # which nothing is rendered of
        return Conversation(messages, finished=finished)
    for name in ("system", "system_prompt"):
        if row.get(name) in (None, ""):
            continue
        prompt = {"role": "system", "content": _string(row[name], name)}
        if messages[0]["role"] != "system":
            messages = [prompt, *messages]
        elif messages[0]["content"] != prompt["content"]:
            raise BadRow("two system prompts", f"{name}: the messages begin with another one; take one of them out")
    tools = _from_json(row.get("tools"), "tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong tools", f"tools: expected a list of JSON schemas, or its JSON; got {shown(tools)}")
    options = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise BadRow("wrong options", f"chat_template_kwargs: expected an object, or its JSON; got {shown(options)}")
    read = {*FORMATS[data_format], "system", "system_prompt", "tools", "chat_template_kwargs"}
    columns = frozenset(name for name in row.keys() - read if not nothing(row[name]))
    return Conversation(messages, tools, options, finished, columns)


def messages_of(row: Any, data_format: str) -> list[Message]:
    """The messages of a row, the answer last; a text is one message of the assistant. Raises BadRow.

    messages_of({"question": "1 + 1?", "answer": "2"}, "question-answer")
    # [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("no object", f"expected an object with fields; got {shown(row)}")
    needed = FORMATS[data_format]
    missing = [name for name in needed if row.get(name) is None]
    if data_format == "generated" and (row.get("prompt") is None) == (row.get("messages") is None):
        raise BadRow("missing field", "expected what `mtpkern generate` writes, with either prompt or messages")
    if missing:
        raise BadRow("missing field", f"expected {' and '.join(needed)}; {' and '.join(missing)} missing")
    values = [row[name] for name in needed]
    if data_format == "text":
        return [{"role": "assistant", "content": _string(values[0], "text")}]
    if data_format in ("messages", "conversations"):
        return _checked(_messages(values[0], data_format))
    if data_format == "generated":
        answer = [{"role": "assistant", "content": _string(row["text"], "text")}]
        if row.get("messages") is None:
            return [{"role": "user", "content": _string(row["prompt"], "prompt")}, *answer]
        return _checked([*_given(row["messages"], "messages"), *answer])
    if data_format == "prompt-completion" and any(isinstance(value, list) for value in values):
        return _checked([*_given(values[0], "prompt"), *_messages(values[1], "completion")])
    prompt, text = (_string(value, name) for name, value in zip(needed, values))
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def _given(value: Any, name: str) -> list[Message]:
    """Messages of a prompt: nothing in it is an answer."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in _messages(value, name)]


def _messages(value: Any, name: str) -> list[Message]:
    role, content = ("from", "value") if name == "conversations" else ("role", "content")
    known = {r: r for r in _ROLES} | (_SHAREGPT_ROLES if role == "from" else {})
    if not isinstance(value, list) or not value:
        raise BadRow("no messages", f'{name}: expected a list of {{"{role}", "{content}"}}; got {shown(value)}')
    messages: list[Message] = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise BadRow("no messages", f'{name}[{i}]: expected {{"{role}", "{content}"}}; got {shown(turn)}')
        said = turn.get(role)
        if not isinstance(said, str) or said not in known:
            allowed = ("system", *_SHAREGPT_ROLES, "tool") if role == "from" else _ROLES
            raise BadRow("wrong role", f"{name}[{i}]: {role} must be {', '.join(allowed)}; got {shown(said)}")
        speaker = known[said]
        further = {k: v for k, v in turn.items() if k not in (role, content, "weight") and not nothing(v)}
        if role == "from" and not further.keys().isdisjoint(("role", "content")):
            raise BadRow("no messages", f"{name}[{i}]: has both {role} and role, or {content} and content; keep one")
        messages.append({"role": speaker, "content": _content(turn.get(content), f"{name}[{i}].{content}", further)})
        messages[-1] |= further
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise BadRow("wrong weight", f"{name}[{i}]: weight must be 0 or 1; got {shown(weight)}")
        if weight == 0 and speaker == "assistant":
            messages[-1]["weight"] = 0
    return messages


def _content(value: Any, name: str, further: Message) -> str:
    """A message's text. Nothing where it calls tools instead; a list of parts where that is one text."""
    if nothing(value) and ("tool_calls" in further or "function_call" in further):
        return ""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        part = value[0]
        if part.get("type", "text") == "text" and part.keys() <= {"type", "text"} and "text" in part:
            return _string(part["text"], f"{name}[0].text")
    return _string(value, name)


def _checked(messages: list[Message]) -> list[Message]:
    """The same messages, where each role may follow the one before it and the assistant is the last."""
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" or any(role not in _NEXT[last] for last, role in zip([None, *roles], roles)):
        raise BadRow("wrong role", f"user and assistant must take turns, the assistant last; got {', '.join(roles)}")
    if "weight" in messages[-1]:
        raise BadRow("wrong weight", "the last message is the answer; its weight must not be 0")
    return messages


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow("no string", f"{name}: expected a string; got {shown(value)}")
    if not value.strip():
        raise BadRow("empty string", f"{name}: expected text; got {shown(value)}")
    return value


def nothing(value: Any) -> bool:
    """Whether a field is as good as absent: files with columns fill them with nulls."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _from_json(value: Any, name: str, unless_given: Any) -> Any:
    """A column's value, which may be written as JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse(value, "JSON")
        except BadRow as fault:
            raise BadRow(fault.kind, f"{name}: {fault}") from None
    return unless_given if nothing(value) else value
