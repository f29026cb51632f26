"""Formats: a row of the usual kinds becomes a conversation, a conversation token ids with one EOS behind the answer.

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
the assistant's: it is the answer, what stands before it the prompt. With the chat template the prompt is what
`apply_chat_template(..., add_generation_prompt=True)` gives; without it the contents are joined by a separator, behind
the special tokens that the tokenizer itself puts in front (BOS), once where the text brings them along. Behind a
finished answer stands exactly one EOS: the template's own, or else the tokenizer's.

In a conversation of several turns the assistant's earlier messages are answers too, each behind its own prompt and up
to its own EOS; but not those with "weight": 0, nor any in the list `prompt`. Where the template writes them otherwise
in a conversation than behind their prompt, or nothing ends them (as without a template), they are counted as such.

Source   arXiv 2602.06019, training data; its Llama has the chat template on, its Qwen3 has it off
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtpkern.rows import BadRow, own_bos, parse, shown, strings
from mtpkern.train.template import ChatTemplate

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
TOO_LONG = "longer than the window"
NO_ANSWER_LEFT = "cut inside its prompt"
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
    if not found:
        raise ValueError(f"{source}: expected the columns of one format ({known}); got {columns}: rename them")
    if len(found) > 1:
        raise ValueError(f"{source}: the columns {columns} match {' and '.join(found)}; choose one with data_format")
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
    tools = _from_json(row.get("tools"), "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("wrong tools", f"tools: expected a list of JSON schemas, or its JSON; got {shown(tools)}")
    options = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise BadRow("wrong options", f"chat_template_kwargs: expected an object, or its JSON; got {shown(options)}")
    read = {*FORMATS[data_format], "system", "system_prompt", "tools", "chat_template_kwargs"}
    columns = frozenset(name for name in row.keys() - read if not _nothing(row[name]))
    return Conversation(messages, tools or [], options or {}, finished, columns)


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
    if data_format == "messages":
        return _checked(_messages(values[0], "messages", "role", "content"))
    if data_format == "conversations":
        return _checked(_messages(values[0], "conversations", "from", "value"))
    if data_format == "generated":
        answer = [{"role": "assistant", "content": _string(row["text"], "text")}]
        if row.get("messages") is None:
            return [{"role": "user", "content": _string(row["prompt"], "prompt")}, *answer]
        return _checked([*_given(row["messages"], "messages"), *answer])
    if data_format == "prompt-completion" and any(isinstance(value, list) for value in values):
        return _checked([*_given(values[0], "prompt"), *_messages(values[1], "completion", "role", "content")])
    prompt, text = (_string(value, name) for name, value in zip(needed, values))
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def _given(value: Any, name: str) -> list[Message]:
    """Messages of a prompt: nothing in it is an answer."""
    messages = _messages(value, name, "role", "content")
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def _messages(value: Any, name: str, role: str, content: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow("no messages", f'{name}: expected a list of {{"{role}", "{content}"}}; got {shown(value)}')
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise BadRow("no messages", f'{name}[{i}]: expected {{"{role}", "{content}"}}; got {shown(turn)}')
        speaker = turn.get(role)
        speaker = _SHAREGPT_ROLES.get(speaker, speaker) if role == "from" and isinstance(speaker, str) else speaker
        if speaker not in _ROLES:
            allowed = ("system", *_SHAREGPT_ROLES, "tool") if role == "from" else _ROLES
            raise BadRow("wrong role", f"{name}[{i}]: {role} must be {', '.join(allowed)}; got {shown(turn.get(role))}")
        further = {k: v for k, v in turn.items() if k not in (role, content, "weight") and not _nothing(v)}
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
    if _nothing(value) and ("tool_calls" in further or "function_call" in further):
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


def _nothing(value: Any) -> bool:
    """Whether a field is as good as absent: files with columns fill them with nulls."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _from_json(value: Any, name: str) -> Any:
    """A column's value, which may be written as JSON; None for nothing."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse(value, "JSON")
        except BadRow as fault:
            raise BadRow(fault.kind, f"{name}: {fault}") from None
    return None if _nothing(value) else value


@dataclass(frozen=True)
class _Rendered:
    """A row as text: the prompts of its answers, the last answer's last, that answer, and how many others are none.

    special   whether the tokenizer puts its special tokens in front; a chat template has written them already
    finished  whether EOS stands behind the answer
    unread    fields of messages that the chat template does not read
    """

    prompts: list[str]
    answer: str
    not_counted: int = 0
    special: bool = False
    finished: bool = True
    unread: frozenset[str] = frozenset()


class Encoder:
    """Turns messages into {"input_ids": list of int, "prompt_length": int}.

    A conversation of several turns has "earlier_answers" besides, a list of (start, end) in tokens.

    tokenizer        with an EOS, and a chat template where `chat`
    chat, separator  see DataArguments
    eos_token_ids    the model's stop tokens; the tokenizer's EOS is one of them in any case
    mask_token_id    of multi-token prediction; must not occur in the data
    window           most tokens of a text; None for no bound
    long_rows        what happens beyond it: "skip", "cut" or "error"
    response_only    with it a text that is cut inside its prompt is of no use

    Raises ValueError for a tokenizer without EOS, or without the chat template that is asked for.

        Encoder(tokenizer, chat=False)([[{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool = True,
        separator: str = "\n\n",
        eos_token_ids: Sequence[int] = (),
        mask_token_id: int | None = None,
        window: int | None = None,
        long_rows: str = "skip",
        response_only: bool = True,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, so no answer would ever end; set tokenizer.eos_token to the model's"
            )
        if chat and tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; set chat: false, or give it one")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer) if chat else None
        self.separator = separator
        self.stops = {tokenizer.eos_token_id, *eos_token_ids}
        self.stop_texts = [text for i in sorted(self.stops) if (text := tokenizer.decode([i]))]
        self.bos = "" if tokenizer.bos_token_id in self.stops else tokenizer.bos_token or ""
        self.adds_bos = bool(self.bos) and own_bos(tokenizer, self.bos) == ""
        self.mask_token_id = mask_token_id
        self.window = window
        self.long_rows = long_rows
        self.response_only = response_only

    def __call__(self, batch: Sequence[Conversation | list[Message]]) -> list[dict[str, Any] | BadRow]:
        """One example, or what is wrong, for each conversation; the tokenizer is called once for all.

        An example that was cut has "cut" besides, an unfinished one "unfinished", one with earlier answers that do not
        count "not_counted", and one with fields that the chat template does not read "unread".
        """
        rendered = [self._render(x if isinstance(x, Conversation) else Conversation(x)) for x in batch]
        ids: dict[int, list[list[int]] | BadRow] = {}
        for special in (True, False):
            which = [i for i, r in enumerate(rendered) if isinstance(r, _Rendered) and r.special == special]
            texts = [[*r.prompts, r.prompts[-1] + r.answer] for i in which if isinstance(r := rendered[i], _Rendered)]
            ids |= dict(zip(which, self._tokenize(texts, special)))
        return [r if isinstance(r, BadRow) else self._finish(r, ids[i]) for i, r in enumerate(rendered)]

    def _tokenize(self, rows: list[list[str]], special: bool) -> list[list[list[int]] | BadRow]:
        """The token ids of each row's texts. A text that no tokenizer takes fails its own row alone."""
        texts = [text for row in rows for text in row]
        try:
            ids = iter(self.tokenizer(texts, add_special_tokens=special).input_ids if texts else [])
        except Exception as error:  # they raise what their author thought of, without saying where
            if len(rows) > 1:
                return [one for row in rows for one in self._tokenize([row], special)]
            said = " ".join(str(error).split()) or type(error).__name__
            return [BadRow("tokenizer", f"the tokenizer does not take this text: {said[:200]}")]
        return [list(islice(ids, len(row))) for row in rows]

    def _render(self, conversation: Conversation) -> _Rendered | BadRow:
        try:
            return self._rendered(self._cleaned(conversation))
        except BadRow as fault:
            return fault

    def _cleaned(self, conversation: Conversation) -> Conversation:
        """The conversation without the BOS in front and the EOS at the end that it brings along.

        Raises BadRow for one that stands elsewhere.
        """
        *before, last = conversation.messages
        answer = last["content"]
        # Some bring a line break behind it, too.
        while (bare := answer.rstrip()).endswith(tuple(self.stop_texts)):
            answer = next(bare.removesuffix(stop) for stop in self.stop_texts if bare.endswith(stop))
        if not answer.strip() and last.keys() <= {"role", "content", "weight"}:
            raise BadRow("empty string", f"the answer is nothing but its end; got {shown(last['content'])}")
        messages = [*before, {**last, "content": answer}]
        messages[0] = {**messages[0], "content": own_bos(self.tokenizer, messages[0]["content"])}
        # A text that is rendered already may begin its turns with what some tokenizers call BOS and do not add.
        bos = self.bos if self.adds_bos or (self.template is not None and before) else ""
        for text in strings([*({**m, "role": ""} for m in messages), conversation.tools, conversation.options]):
            for stop in self.stop_texts:
                if stop in text:
                    raise BadRow("EOS inside a text", f"{stop!r} ends a text and stands inside {shown(text)}")
            if bos and bos in text:
                raise BadRow("BOS inside a text", f"{bos!r} begins a text and stands inside {shown(text)}")
        return replace(conversation, messages=messages)

    def _rendered(self, conversation: Conversation) -> _Rendered:
        """Prompts and answer as text; a plain text has an empty prompt. Raises BadRow."""
        messages = conversation.messages
        *before, last = messages
        answer = last["content"]
        earlier = [i for i, m in enumerate(before) if m["role"] == "assistant" and m.get("weight", 1)]
        finished = conversation.finished
        if self.template is None or not before:
            self._require_plain(conversation)
            prompt = "".join(message["content"] + self.separator for message in before)
            return _Rendered([prompt], answer, len(earlier), special=True, finished=finished)
        unread = self.template.require_read(conversation)
        prompt = self.template.write(conversation, before, prompt=True)
        whole = self.template.write(conversation, messages)
        if not whole.startswith(prompt):
            same = next(i for i, (x, y) in enumerate(zip(prompt, whole + "\0")) if x != y)
            raise BadRow(
                "chat template",
                "the chat template writes a whole conversation otherwise than the prompt of its answer: "
                f"{shown(whole[same:])} instead of {shown(prompt[same:])}; use another template",
            )
        counted = []
        for i in earlier:
            text = self.template.write(conversation, before[:i], prompt=True)
            up_to = self.template.write(conversation, before[: i + 1]) if "tool_calls" in before[i] else None
            if self._answers(whole, text, before[i]["content"], up_to):
                counted.append(text)
        written = whole[len(prompt) :]
        if not finished:
            # What the template writes behind an answer would say that it has come to its end.
            said = answer.strip()
            ends = [at for stop in self.stop_texts if (at := written.find(stop)) >= 0]
            written = written[
                : written.rfind(said) + len(said) if said and said in written else min(ends, default=None)
            ]
        return _Rendered(
            [*counted, prompt], written, len(earlier) - len(counted), finished=finished, unread=frozenset(unread)
        )

    def _require_plain(self, conversation: Conversation) -> None:
        """Raise BadRow for what only a chat template could write."""
        given = {"tools": conversation.tools, "chat_template_kwargs": conversation.options}
        names = [name for name, value in given.items() if value]
        for i, message in enumerate(conversation.messages):
            names += [f"messages[{i}].{name}" for name in message.keys() - {"role", "content", "weight"}]
        if names:
            raise BadRow(
                "no template", f"{', '.join(sorted(names))}: without a chat template (chat: false) it is lost; drop it"
            )

    def _answers(self, whole: str, prompt: str, content: str, up_to: str | None) -> bool:
        """Whether the text of a conversation has, behind a prompt as it stands alone, this content and then an EOS.

        up_to: the conversation up to its end, where more than the content is said
        """
        if not whole.startswith(prompt):
            return False
        if up_to is not None:
            return whole.startswith(up_to) and any(stop in up_to[len(prompt) :] for stop in self.stop_texts)
        rest = whole[len(prompt) :].lstrip()
        behind = rest[len(content.strip()) :].lstrip()
        return rest.startswith(content.strip()) and behind.startswith(tuple(self.stop_texts))

    def _finish(self, text: _Rendered, ids_of: list[list[int]] | BadRow) -> dict[str, Any] | BadRow:
        """The ids with one EOS behind a finished answer, within the window; ids_of each prompt and of the whole."""
        if isinstance(ids_of, BadRow):
            return ids_of
        *before, prompt, whole = ids_of
        if not text.prompts[-1]:
            # The first token of a plain text has nothing before it to be predicted from.
            prompt = whole[:1]
        elif len(prompt) > 1 and prompt[-1] in self.stops and whole[: len(prompt)] != prompt:
            prompt = prompt[:-1]  # from a tokenizer that appends EOS to everything
        if whole[: len(prompt)] != prompt:
            # Tokens run across the border; but a prompt must be what it is when it stands alone.
            whole = prompt + self.tokenizer(text.answer, add_special_tokens=False).input_ids
        border = len(prompt)
        end = next((i for i in range(border, len(whole)) if whole[i] in self.stops), len(whole))
        ids = whole[:end]
        if text.finished:
            ids.append(whole[end] if end < len(whole) else self.tokenizer.eos_token_id)
        if len(ids) == border:
            return BadRow("empty string", "the answer has no tokens of its own; give one with text in it")
        if self.mask_token_id in ids:
            at = ids.index(self.mask_token_id)
            return BadRow("mask token", f"token {at} is the mask token, which no text may hold; take it out")
        # Here too a prompt must be what it is when it stands alone.
        starts = [len(earlier) for earlier in before if ids[: len(earlier)] == earlier]
        ranges = [(start, next(j for j in range(start, border) if ids[j] in self.stops) + 1) for start in starts]
        example: dict[str, Any] = {"input_ids": ids, "prompt_length": border}
        if not_counted := text.not_counted + len(before) - len(starts):
            example["not_counted"] = not_counted
        if not text.finished:
            example["unfinished"] = True
        if text.unread:
            example["unread"] = text.unread
        if self.window is not None and len(ids) > self.window:
            window = self.window
            if self.long_rows != "cut":
                return BadRow(TOO_LONG, f"{len(ids)} tokens, the window has {window} (max_length or the model's own)")
            ranges = [(start, min(end, window)) for start, end in ranges if start < window]
            if self.response_only and border >= window and not ranges:
                return BadRow(NO_ANSWER_LEFT, f"its prompt alone has {border} tokens of the window's {window}")
            example |= {"input_ids": ids[:window], "prompt_length": min(border, window), "cut": True}
        return example | ({"earlier_answers": ranges} if ranges else {})
