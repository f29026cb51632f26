"""Encoder: a conversation becomes token ids, with one EOS behind its answer.

With the chat template the prompt is what `apply_chat_template(..., add_generation_prompt=True)` gives; without it the
contents are joined by a separator, behind the special tokens that the tokenizer itself puts in front (BOS), once where
the text brings them along. Behind a finished answer stands exactly one EOS: the template's own, or else the
tokenizer's.

In a conversation of several turns each answer stands behind its own prompt and goes up to its own EOS. An earlier one
that the template writes otherwise there than behind its prompt, or that nothing ends, is counted as such.

Source   arXiv 2602.06019, training data; its Llama has the chat template on, its Qwen3 has it off
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtpkern.rows import BadRow, own_bos, shown, strings
from mtpkern.train.arguments import refuse
from mtpkern.train.formats import Conversation, Message
from mtpkern.train.template import ChatTemplate

TOO_LONG = "longer than the window"
NO_ANSWER_LEFT = "cut inside its prompt"


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
        says = "the tokenizer has no EOS token, so no answer would ever end; set tokenizer.eos_token to the model's"
        refuse(tokenizer.eos_token_id is None, says)
        no_template = chat and tokenizer.chat_template is None
        refuse(no_template, "the tokenizer has no chat template; set chat: false, or give it one")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer) if chat else None
        self.separator = separator
        self.stops = {tokenizer.eos_token_id, *eos_token_ids}
        self.stop_texts = [text for i in sorted(self.stops) if (text := tokenizer.decode([i]))]
        self.bos = "" if tokenizer.bos_token_id in self.stops else tokenizer.bos_token or ""
        self.adds_bos = bool(self.bos) and own_bos(tokenizer, self.bos) == ""
        self.mask_token_id, self.response_only = mask_token_id, response_only
        self.window, self.long_rows = window, long_rows

    def __call__(self, batch: Sequence[Conversation | list[Message]]) -> list[dict[str, Any] | BadRow]:
        """One example, or what is wrong, for each conversation; the tokenizer is called once for all.

        An example that was cut has "cut" besides, an unfinished one "unfinished", one with earlier answers that do not
        count "not_counted", and one with fields that the chat template does not read "unread".
        """
        rendered = [self._render(x if isinstance(x, Conversation) else Conversation(x)) for x in batch]
        ids: dict[int, list[list[int]] | BadRow] = {}
        for special in (True, False):
            some = {i: r for i, r in enumerate(rendered) if isinstance(r, _Rendered) and r.special == special}
            texts = [[*r.prompts, r.prompts[-1] + r.answer] for r in some.values()]
            ids |= dict(zip(some, self._tokenize(texts, special)))
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
        """Without its BOS in front and its EOS at the end. Raises BadRow for one that stands elsewhere."""
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
        marks = [*((stop, "EOS", "ends") for stop in self.stop_texts), *([(bos, "BOS", "begins")] if bos else [])]
        for text in strings([*({**m, "role": ""} for m in messages), conversation.tools, conversation.options]):
            for mark, name, does in marks:
                if mark in text:
                    raise BadRow(f"{name} inside a text", f"{mark!r} {does} a text and stands inside {shown(text)}")
        return replace(conversation, messages=messages)

    def _rendered(self, conversation: Conversation) -> _Rendered:
        """Prompts and answer as text; a plain text has an empty prompt. Raises BadRow."""
        *before, last = conversation.messages
        answer, finished = last["content"], conversation.finished
        earlier = [i for i, m in enumerate(before) if m["role"] == "assistant" and m.get("weight", 1)]
        if self.template is None or not before:
            self._require_plain(conversation)
            prompt = "".join(message["content"] + self.separator for message in before)
            return _Rendered([prompt], answer, len(earlier), special=True, finished=finished)
        unread = self.template.require_read(conversation)
        prompt = self.template.write(conversation, before, prompt=True)
        whole = self.template.write(conversation, conversation.messages)
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
            end = written.rfind(said) + len(said) if said and said in written else min(ends, default=None)
            written = written[:end]
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
            says = f"{', '.join(sorted(names))}: without a chat template (chat: false) it is lost; drop it"
            raise BadRow("no template", says)

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
        # Here too a prompt must be what it is when it stands alone.
        starts = [len(earlier) for earlier in before if ids[: len(earlier)] == earlier]
        ranges = [(start, next(j for j in range(start, border) if ids[j] in self.stops) + 1) for start in starts]
        besides = {
            "not_counted": text.not_counted + len(before) - len(starts),
            "unfinished": not text.finished,
            "unread": text.unread,
        }
        example = self._within(ids, border, ranges)
        return example if isinstance(example, BadRow) else example | {name: x for name, x in besides.items() if x}

    def tokenized(self, row: Mapping[str, Any]) -> dict[str, Any] | BadRow:
        """The example of a row that is tokenized already, as TRL has them; `text` and its kin are not looked at.

        Beside input_ids, what counts: labels, which are -100 elsewhere; else where completion_mask and assistant_masks,
        as far as they are there, are 1; else all. What stands behind the last EOS that counts is left out.

            Encoder(tokenizer, chat=False).tokenized({"input_ids": [5, 6, 2], "completion_mask": [0, 1, 1]})
            # {"input_ids": [5, 6, 2], "prompt_length": 1}
        """
        ids, labels = row.get("input_ids"), row.get("labels")
        marks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
        columns = marks if labels is None else [labels]
        if not isinstance(ids, list) or any(not isinstance(x, list) or len(x) != len(ids) for x in columns):
            says = "input_ids, and labels or masks beside them, must be lists of one length"
            return BadRow("wrong tokens", f"{says}; got {', '.join(shown(x) for x in (ids, *columns))}")
        if row.get("prompt_length") is not None:
            return BadRow("encoded", "its prompt_length says what counts: give examples to the trainer as they are")
        positions = row.get("position_ids")
        if row.get("seq_lengths") is not None or (positions is not None and positions != list(range(len(ids)))):
            says = "several texts are packed into it (seq_lengths, or position_ids that begin anew)"
            return BadRow("packed", f"{says}; give them one by one, and MTPConfig(packing=True) packs them here")
        if not all(row.get("attention_mask") or ()):
            return BadRow("padding", "its attention_mask has zeros; give texts without padding, which batches get here")
        if labels is None:
            counts = [all(bits) for bits in zip(*marks)] if marks else [True] * len(ids)
        elif any(label not in (-100, x) for label, x in zip(labels, ids)):
            return BadRow("wrong labels", f"labels must be -100 or the token itself; got {shown(labels)}")
        else:
            counts = [label != -100 for label in labels]
        # The first token has nothing before it to be predicted from.
        grouped = ((counted, list(at)) for counted, at in groupby(range(1, len(ids)), counts.__getitem__))
        runs = [(at[0], at[-1] + 1) for counted, at in grouped if counted]
        if not runs:
            return BadRow("empty string", "no token of it counts; give one with an answer")
        *earlier, (border, end) = runs
        end = next((i + 1 for i in range(end - 1, border - 1, -1) if ids[i] in self.stops), end)
        return self._within(ids[:end], border, earlier)

    def _within(self, ids: list[int], border: int, earlier: list[tuple[int, int]]) -> dict[str, Any] | BadRow:
        """The example of a text whose answers stand from `border` on and in earlier ranges, within the window."""
        if self.mask_token_id in ids:
            at = ids.index(self.mask_token_id)
            return BadRow("mask token", f"token {at} is the mask token, which no text may hold; take it out")
        example: dict[str, Any] = {"input_ids": ids, "prompt_length": border}
        if (window := self.window) is not None and len(ids) > window:
            if self.long_rows != "cut":
                return BadRow(TOO_LONG, f"{len(ids)} tokens, the window has {window} (max_length or the model's own)")
            earlier = [(start, min(end, window)) for start, end in earlier if start < window]
            if self.response_only and border >= window and not earlier:
                return BadRow(NO_ANSWER_LEFT, f"its prompt alone has {border} tokens of the window's {window}")
            example |= {"input_ids": ids[:window], "prompt_length": min(border, window), "cut": True}
        return example | ({"earlier_answers": earlier} if earlier else {})
