"""Formats: a row of the usual kinds becomes messages, messages become token ids with one EOS behind the answer.

    columns                  read as
    messages                 [{"role": system | user | assistant, "content": str}, ...]
    conversations            [{"from": system | human | gpt, "value": str}, ...]
    prompt, completion       two strings, or two lists of messages
    query, response          two strings (MetaMathQA)
    question, answer         two strings (GSM8K)
    text                     one string, all of it answer

Other columns are not read. The last message must be the assistant's: it is the answer, what stands before it the
prompt. With the chat template the prompt is what `apply_chat_template(..., add_generation_prompt=True)` gives; without
it the contents are joined by a separator, behind the special tokens that the tokenizer itself puts in front (BOS).
Behind the answer stands exactly one EOS: the template's own, or else the tokenizer's.

In a conversation of several turns the assistant's earlier messages are answers too, each behind its own prompt and up
to its own EOS; but not those with "weight": 0, nor any in the list `prompt`. Where the template writes them otherwise
in a conversation than behind their prompt, or nothing ends them (as without a template), they are counted as such.

Source   arXiv 2602.06019, training data; its Llama has the chat template on, its Qwen3 has it off
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "query-response": ("query", "response"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
TOO_LONG = "longer than the window"
NO_ANSWER_LEFT = "cut inside its prompt"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "user", "assistant")


class BadRow(ValueError):
    """What is wrong with a row: a kind to count by, and the details."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def recognise(columns: Iterable[str], source: str = "data") -> str:
    """The name of the one format whose columns are all there. Raises ValueError where none or several match.

    recognise(["query", "response", "type", "original_question"])  # "query-response"
    """
    columns = sorted(set(columns))
    found = [name for name, needed in FORMATS.items() if set(needed) <= set(columns)]
    known = "; ".join(" and ".join(needed) for needed in FORMATS.values())
    if not found:
        raise ValueError(f"{source}: expected the columns of one format ({known}); got {columns}: rename them")
    if len(found) > 1:
        raise ValueError(f"{source}: the columns {columns} match {' and '.join(found)}; choose one with data_format")
    return found[0]


def messages_of(row: Any, data_format: str) -> list[Message]:
    """The messages of a row, the answer last; a text is one message of the assistant. Raises BadRow.

    messages_of({"question": "1 + 1?", "answer": "2"}, "question-answer")
    # [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("no object", f"expected an object with fields; got {_shown(row)}")
    needed = FORMATS[data_format]
    missing = [name for name in needed if row.get(name) is None]
    if missing:
        raise BadRow("missing field", f"expected {' and '.join(needed)}; {' and '.join(missing)} missing")
    values = [row[name] for name in needed]
    if data_format == "text":
        return [{"role": "assistant", "content": _string(values[0], "text")}]
    if data_format == "messages":
        return _checked(_messages(values[0], "messages", "role", "content"))
    if data_format == "conversations":
        return _checked(_messages(values[0], "conversations", "from", "value"))
    if data_format == "prompt-completion" and any(isinstance(value, list) for value in values):
        given, wanted = (_messages(value, name, "role", "content") for name, value in zip(needed, values))
        # Nothing in a prompt is an answer.
        return _checked([*({**m, "weight": 0} if m["role"] == "assistant" else m for m in given), *wanted])
    prompt, answer = (_string(value, name) for name, value in zip(needed, values))
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _messages(value: Any, name: str, role: str, content: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow("no messages", f'{name}: expected a list of {{"{role}", "{content}"}}; got {_shown(value)}')
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise BadRow("no messages", f'{name}[{i}]: expected {{"{role}", "{content}"}}; got {_shown(turn)}')
        speaker = turn.get(role)
        speaker = _SHAREGPT_ROLES.get(speaker, speaker) if role == "from" and isinstance(speaker, str) else speaker
        if speaker not in _ROLES:
            allowed = ("system", *_SHAREGPT_ROLES) if role == "from" else _ROLES
            raise BadRow(
                "wrong role", f"{name}[{i}]: {role} must be {', '.join(allowed)}; got {_shown(turn.get(role))}"
            )
        messages.append({"role": speaker, "content": _string(turn.get(content), f"{name}[{i}].{content}")})
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise BadRow("wrong weight", f"{name}[{i}]: weight must be 0 or 1; got {_shown(weight)}")
        if weight == 0 and speaker == "assistant":
            messages[-1]["weight"] = 0
    return messages


def _checked(messages: list[Message]) -> list[Message]:
    """The same messages: perhaps a system prompt, then user and assistant in turn, the assistant last."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow("wrong role", f"user and assistant must take turns, the assistant last; got {', '.join(roles)}")
    if "weight" in messages[-1]:
        raise BadRow("wrong weight", "the last message is the answer; its weight must not be 0")
    return messages


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow("no string", f"{name}: expected a string; got {_shown(value)}")
    if not value.strip():
        raise BadRow("empty string", f"{name}: expected text; got {value!r}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class _Rendered:
    """A row as text: the prompts of its answers, the last answer's last, that answer, and how many others are none."""

    prompts: list[str]
    answer: str
    not_counted: int = 0


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
        self.chat = chat
        self.separator = separator
        self.stops = {tokenizer.eos_token_id, *eos_token_ids}
        self.stop_texts = [text for i in sorted(self.stops) if (text := tokenizer.decode([i]))]
        self.mask_token_id = mask_token_id
        self.window = window
        self.long_rows = long_rows
        self.response_only = response_only

    def __call__(self, batch: Sequence[list[Message]]) -> list[dict[str, Any] | BadRow]:
        """One example, or what is wrong, for each list of messages; the tokenizer is called once for all.

        An example that was cut has "cut" besides, one with earlier answers that do not count "not_counted".
        """
        rendered = [self._render(messages) for messages in batch]
        good = [r for r in rendered if not isinstance(r, BadRow)]
        texts = [text for r in good for text in (*r.prompts, r.prompts[-1] + r.answer)]
        # A chat template has written the special tokens already.
        templated = self.chat and any(r.prompts[-1] for r in good)
        ids = iter(self.tokenizer(texts, add_special_tokens=not templated).input_ids if texts else [])
        return [
            r if isinstance(r, BadRow) else self._finish(r, list(islice(ids, len(r.prompts))), next(ids))
            for r in rendered
        ]

    def _render(self, messages: list[Message]) -> _Rendered | BadRow:
        """Prompts and answer as text; a plain text has an empty prompt."""
        weights = [message.get("weight", 1) for message in messages]
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        *before, last = messages
        earlier = [i for i, m in enumerate(before) if m["role"] == "assistant" and weights[i]]
        # A text may bring its EOS along; there shall be one all the same.
        answer = last["content"]
        for stop in self.stop_texts:
            answer = answer.removesuffix(stop)
        if not answer.strip():
            return BadRow("empty string", f"the answer is nothing but its end; got {last['content']!r}")
        for message in [*before, {"content": answer}]:
            for stop in self.stop_texts:
                if stop in message["content"]:
                    return BadRow(
                        "EOS inside a text", f"{stop!r} ends a text and stands inside {_shown(message['content'])}"
                    )
        if not self.chat or not before:
            prompt = "".join(message["content"] + self.separator for message in before)
            return _Rendered([prompt], answer, len(earlier))
        from jinja2 import TemplateError

        template: Callable[..., Any] = self.tokenizer.apply_chat_template
        try:
            prompt = template(before, tokenize=False, add_generation_prompt=True)
            whole = template([*before, {**last, "content": answer}], tokenize=False)
            prompts = [template(before[:i], tokenize=False, add_generation_prompt=True) for i in earlier]
        except TemplateError as error:
            return BadRow("chat template", f"the chat template refuses these messages: {error}")
        if not whole.startswith(prompt):
            same = next(i for i, (x, y) in enumerate(zip(prompt, whole + "\0")) if x != y)
            return BadRow(
                "chat template",
                "the chat template writes a whole conversation otherwise than the prompt of its answer: "
                f"{_shown(whole[same:])} instead of {_shown(prompt[same:])}; use another template",
            )
        counted = [text for i, text in zip(earlier, prompts) if self._answers(whole, text, before[i]["content"])]
        return _Rendered([*counted, prompt], whole[len(prompt) :], len(earlier) - len(counted))

    def _answers(self, whole: str, prompt: str, content: str) -> bool:
        """Whether the text of a conversation has, behind a prompt as it stands alone, this content and then an EOS."""
        if not whole.startswith(prompt):
            return False
        rest = whole[len(prompt) :].lstrip()
        behind = rest[len(content.strip()) :].lstrip()
        return rest.startswith(content.strip()) and behind.startswith(tuple(self.stop_texts))

    def _finish(self, text: _Rendered, prompts: list[list[int]], whole: list[int]) -> dict[str, Any] | BadRow:
        """The ids with one EOS behind the answer, within the window."""
        *before, prompt = prompts
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
        ids = [*whole[:end], whole[end] if end < len(whole) else self.tokenizer.eos_token_id]
        if self.mask_token_id in ids:
            at = ids.index(self.mask_token_id)
            return BadRow("mask token", f"token {at} is the mask token, which no text may hold; take it out")
        # Here too a prompt must be what it is when it stands alone.
        starts = [len(earlier) for earlier in before if ids[: len(earlier)] == earlier]
        ranges = [(start, next(j for j in range(start, border) if ids[j] in self.stops) + 1) for start in starts]
        example: dict[str, Any] = {"input_ids": ids, "prompt_length": border}
        if not_counted := text.not_counted + len(before) - len(starts):
            example["not_counted"] = not_counted
        if self.window is not None and len(ids) > self.window:
            window = self.window
            if self.long_rows != "cut":
                return BadRow(TOO_LONG, f"{len(ids)} tokens, the window has {window} (max_length or the model's own)")
            ranges = [(start, min(end, window)) for start, end in ranges if start < window]
            if self.response_only and border >= window and not ranges:
                return BadRow(NO_ANSWER_LEFT, f"its prompt alone has {border} tokens of the window's {window}")
            example |= {"input_ids": ids[:window], "prompt_length": min(border, window), "cut": True}
        return example | ({"earlier_answers": ranges} if ranges else {})
