"""Rows that are in memory become the examples that MTPTrainer takes, by the rules of `mtpkern train`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtpkern.rows import BadRow
from mtpkern.train.data import BadData, EncodedTexts, Report
from mtpkern.train.encoder import Encoder
from mtpkern.train.formats import FORMATS, conversation_of, nothing, recognise
from mtpkern.train.sources import without_nulls

logger = logging.getLogger(__name__)

# Columns of TRL's, and of its processors, for what no text stands for.
_IMAGES = ("image", "images", "pixel_values")


def encode_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, chat: bool = True, **options: Any
) -> EncodedTexts:
    """A dataset of examples from rows as TRL has them, or of any other kind of `mtpkern.train.formats`.

    rows: all of one format, by their columns: `prompt` and `completion`, as texts or as lists of messages, `messages`,
    ...; a datasets.Dataset is one. Where they have no such column, but `input_ids`, they are tokenized already
    (`Encoder.tokenized`). chat: whether the tokenizer's chat template is applied. options: keyword arguments of
    `mtpkern.train.encoder.Encoder`, such as separator, eos_token_ids, mask_token_id and window.

    Raises ValueError with the row's number for one that is faulty, or has more tokens than the window. Warns of answers
    that do not count and of fields that no template reads.

        data = encode_rows([{"prompt": "1 + 1?", "completion": " 2"}], tokenizer, chat=False, separator="")
        MTPTrainer(model=model, teacher=teacher, args=config, train_dataset=data, data_collator=collator)
    """
    # Of a datasets.Dataset, which is Arrow's.
    found = [without_nulls(row) for row in rows] if hasattr(rows, "features") else list(rows)
    columns = {name for row in found if isinstance(row, Mapping) for name in row}
    for number, row in enumerate(found, 1):
        seen = [name for name in _IMAGES if name in columns and isinstance(row, Mapping) and not nothing(row.get(name))]
        if seen:
            raise BadData(f"row {number}: {', '.join(seen)}: images are not read here; give rows of text alone")
    if "input_ids" in columns and not any(columns.issuperset(needed) for needed in FORMATS.values()):
        return _kept(map(Encoder(tokenizer, chat=False, **options).tokenized, found))
    encode = Encoder(tokenizer, chat=chat, **options)
    data_format = recognise(columns, "rows")
    conversations = []
    for number, row in enumerate(found, 1):
        try:
            conversations.append(conversation_of(row, data_format))
        except BadRow as fault:
            raise BadData(f"row {number}: {fault}") from None
    return _kept(encode(conversations))


def _kept(examples: Iterable[dict[str, Any] | BadRow]) -> EncodedTexts:
    report, good = Report("rows"), []
    for number, example in enumerate(examples, 1):
        if isinstance(example, BadRow):
            raise BadData(f"row {number}: {example}")
        report.rows += 1
        good.append(report.take(example))
    if report.not_counted or report.unread:
        logger.warning("%s", report)
    return EncodedTexts(good)
