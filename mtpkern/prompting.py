"""How a prompt is put to a model: as in its training, whose record says so, unless a flag says otherwise.

trained with        a plain prompt                      messages
the chat template   rendered by it                      rendered by it
a separator         followed by it                      each followed by it
nobody has said     as it is                            rendered by the chat template
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtpkern.rows import own_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompting:
    """The way of a call. chat: whether by the chat template, None where nobody has said; separator: without it."""

    chat: bool | None = None
    separator: str | None = None

    @classmethod
    def of(cls, recorded: Mapping[str, Any], chat: bool | None = None, separator: str | None = None) -> Prompting:
        """What a model has recorded (`mtpkern.model.recorded_settings`), but for the flags that are given.

        Raises ValueError for a separator where the chat template is applied.

            Prompting.of({"chat": False, "separator": "\\n"})  # Prompting(chat=False, separator="\\n")
        """
        if chat is None:
            # Who names a separator wants no template.
            chat = recorded.get("chat") if separator is None else False
        elif chat and separator is not None:
            raise ValueError("--separator is of prompts without the chat template; leave it out, or --chat")
        if separator is None and not chat:
            separator = recorded.get("separator")
        return cls(chat, separator)

    def encode(self, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> list[int]:
        """The token ids of a row's prompt or messages; where the template is applied, it brings the special tokens.

        Raises ValueError for a template that is missing, and whatever a template or a tokenizer raises.
        """
        messages = fields.get("messages")
        if self.chat or (self.chat is None and messages):
            if tokenizer.chat_template is None:
                raise ValueError("needs a chat template and the tokenizer has none; give plain prompts")
            messages = messages or [{"role": "user", "content": fields["prompt"]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer(str(text), add_special_tokens=False).input_ids
        if messages and self.separator is None:
            raise ValueError("without the chat template messages are joined by a separator; give it as --separator")
        if messages:
            text = "".join(message["content"] + self.separator for message in messages)
        else:
            text = fields["prompt"]
            # Who writes it himself means this one.
            text += "" if text.endswith(self.separator or "") else self.separator
        return tokenizer(own_bos(tokenizer, text)).input_ids

    def encode_at(self, where: str, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> list[int]:
        """As `encode`; all that is wrong, a prompt without tokens too, is a ValueError that begins with `where`."""
        try:
            ids = self.encode(tokenizer, fields)
        except Exception as error:  # a template and a tokenizer raise what they like
            raise ValueError(f"{where}: {error}") from error
        if not ids:
            raise ValueError(f"{where}: the prompt has no tokens; give one with text in it")
        return ids


def warnings_of(recorded: Mapping[str, Any], prompting: Prompting) -> Iterator[str]:
    """What a user should know before a model is decoded so: prompts unlike its training's, or half a training.

    list(warnings_of({"chat": True, "finished": False}, Prompting(chat=False)))  # two sentences
    """
    if recorded.get("finished") is False:
        yield "its training had not ended when it was saved"
    trained = recorded.get("chat")
    if trained and not prompting.chat:
        yield "it was trained with its chat template, and is asked without (--no-chat)"
    elif trained is False and prompting.chat:
        yield "it was trained without a chat template, and is asked with it (--chat)"
    elif trained is False and prompting.separator != recorded.get("separator"):
        got, had = prompting.separator, recorded.get("separator")
        yield f"it was trained with the separator {had!r} behind a prompt, and is asked with {got!r} (--separator)"
