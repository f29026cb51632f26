"""Rows that are in memory become the examples that MTPTrainer takes, by the rules of `mtpkern train`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtpkern.rows import BadRow
from mtpkern.train.data import BadData, EncodedTexts
from mtpkern.train.encoder import Encoder
from mtpkern.train.formats import conversation_of, recognise


def encode_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, chat: bool = True, **options: Any
) -> EncodedTexts:
    """A dataset of examples from rows as TRL has them, or of any other kind of `mtpkern.train.formats`.

    rows: all of one format, by their columns: `prompt` and `completion`, as texts or as lists of messages, `messages`,
    ...; a datasets.Dataset is one. chat: whether the tokenizer's chat template is applied. options: keyword arguments
    of `mtpkern.train.encoder.Encoder`, such as separator, eos_token_ids, mask_token_id and window.

    Raises ValueError with the row's number for one that is faulty, or has more tokens than the window.

        data = encode_rows([{"prompt": "1 + 1?", "completion": " 2"}], tokenizer, chat=False, separator="")
        MTPTrainer(model=model, teacher=teacher, args=config, train_dataset=data, data_collator=collator)
    """
    encode = Encoder(tokenizer, chat=chat, **options)
    found = list(rows)
    data_format = recognise({name for row in found if isinstance(row, Mapping) for name in row}, "rows")
    conversations = []
    for number, row in enumerate(found, 1):
        try:
            conversations.append(conversation_of(row, data_format))
        except BadRow as fault:
            raise BadData(f"row {number}: {fault}") from None
    examples = encode(conversations)
    for number, example in enumerate(examples, 1):
        if isinstance(example, BadRow):
            raise BadData(f"row {number}: {example}")
    return EncodedTexts(example for example in examples if isinstance(example, dict))
