"""Chat templates: what one reads of a row, and the texts that it writes of a conversation.

A template is a program. It reads variables (messages, tools, enable_thinking, ...) and fields of messages (role,
content, tool_calls, ...); what it does not read is lost without a word. So everything that a row brings and that would
change the text is given to the template, or refused by name where this template does not read it:

    column of the row        tools, chat_template_kwargs: variables of the template. A column that has the name of
                             another variable is refused: it would take effect under chat_template_kwargs alone
    field of a message       given to the template. tool_calls, function_call and reasoning are part of what is said,
                             and refused where it does not read them; others (name, tool_call_id) are counted

Templates looked at: Llama 3.1, Qwen 2.5, Qwen 3, SmolLM2.
"""

from __future__ import annotations

import inspect
import re

from transformers import PreTrainedTokenizerBase

from mtpkern.rows import BadRow
from mtpkern.train.formats import Conversation, Message

# One thing under several names; a template reads one of them.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SAID = ("tool_calls", "function_call", *_REASONING)
_OF_THE_ROLE = {"role", "content"}
# What a row cannot set: parameters of apply_chat_template that are none of the template's.
_VARIABLES_AMONG_PARAMETERS = {"documents", "kwargs"}


class ChatTemplate:
    """A tokenizer's chat template, and what it reads. The tokenizer must have one.

    ChatTemplate(tokenizer).write(conversation, conversation.messages)  # "<|im_start|>user\\n1 + 1?<|im_end|>..."
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from jinja2 import Environment, TemplateSyntaxError, meta, nodes

        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        sources = list(template.values()) if isinstance(template, dict) else [template]
        self.variables: set[str] = set()
        self.fields: set[str] = set()
        for source in sources:
            # A tag of transformers' own; everything else is plain Jinja.
            plain = re.sub(r"{%-?\+?\s*(end)?generation\s*[-+]?%}", "", str(source))
            try:
                tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
            except TemplateSyntaxError as error:
                raise ValueError(f"the tokenizer's chat template is no Jinja ({error}); give it another") from None
            self.variables |= meta.find_undeclared_variables(tree)
            self.fields |= {node.attr for node in tree.find_all(nodes.Getattr)}
            self.fields |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*parameters, "messages"} - _VARIABLES_AMONG_PARAMETERS

    def require_read(self, conversation: Conversation) -> set[str]:
        """The fields of messages that the template does not read and that say nothing. Raises BadRow for others."""
        shadowed = sorted(conversation.columns & (self.variables - {"messages", "tools", "add_generation_prompt"}))
        if shadowed:
            raise BadRow(
                "template variable",
                f"column {shadowed[0]!r} has the name of a variable of the chat template, which columns do not set; "
                "put it into chat_template_kwargs, or rename it",
            )
        if conversation.tools and "tools" not in self.variables:
            raise BadRow("not in the template", "tools: the chat template does not read them; drop them")
        for name in conversation.options:
            if name in self._reserved:
                raise BadRow("template variable", f"chat_template_kwargs must not set {name!r}; take it out")
            if name not in self.variables:
                raise BadRow("not in the template", f"chat_template_kwargs: the chat template does not read {name!r}")
        unread = set()
        for i, message in enumerate(conversation.messages):
            for name in message.keys() - _OF_THE_ROLE - {"weight"}:
                if not self.fields.isdisjoint(_REASONING if name in _REASONING else (name,)):
                    continue
                if name in _SAID:
                    raise BadRow(
                        "not in the template",
                        f"messages[{i}].{name}: the chat template does not read it, so it would be left out; take it "
                        "out, or use a template that writes it",
                    )
                unread.add(name)
        return unread

    def write(self, conversation: Conversation, messages: list[Message], *, prompt: bool = False) -> str:
        """The text of these messages; with `prompt` it ends where the assistant begins. Raises BadRow."""
        given = [self._named(message) for message in messages]
        options = {**({"tools": conversation.tools} if conversation.tools else {}), **conversation.options}
        try:
            text = self.tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=prompt, **options)
        except ImportError:
            raise
        except Exception as error:  # a template is a program, and fails on odd rows like any other
            said = " ".join(str(error).split()) or type(error).__name__
            raise BadRow("chat template", f"the chat template refuses these messages: {said[:200]}") from error
        return str(text)

    def _named(self, message: Message) -> Message:
        """The message as the template knows it: without weight, its reasoning under the name that is read."""
        return {
            next((n for n in _REASONING if n in self.fields), name) if name in _REASONING else name: value
            for name, value in message.items()
            if name != "weight"
        }
