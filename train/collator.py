"""Batches: examples of different lengths, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch


def require_example(x: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no example: fields that are missing, and answers that lie outside the text.

    And for columns of other trainers that say otherwise what counts: masks, labels, positions.

    require_example({"input_ids": [5, 6, 2], "prompt_length": 4})  # ValueError: prompt_length must lie from 0 to ...
    """
    if missing := {"input_ids", "prompt_length"} - x.keys():
        raise ValueError(
            f"an example must have input_ids and prompt_length, as mtpkern.train.encode_rows(rows, tokenizer) "
            f"makes them of rows, tokenized or not; {', '.join(sorted(missing))} missing, got {', '.join(x)}"
        )
    tokens, prompt, earlier = len(x["input_ids"]), int(x["prompt_length"]), earlier_answers(x)
    if not tokens:
        raise ValueError("input_ids must have a token at least; got none: leave the example out")
    if not 0 <= prompt <= tokens or any(not 0 <= start < end <= tokens for start, end in earlier):
        raise ValueError(
            f"prompt_length must lie from 0 to the {tokens} tokens of the text, and each of earlier_answers be a "
            f"(start, end) in them; got prompt_length {prompt}, earlier_answers {earlier}"
        )
    given = {name: [*map(int, x[name])] for name in _OF_OTHERS if x.get(name) is not None}
    if given or x.get("seq_lengths") is not None:
        _require_agreeing(x, given, [*earlier, (prompt, tokens)])


# What other trainers read, a number a token.
_OF_OTHERS = ("attention_mask", "position_ids", "labels", "completion_mask", "assistant_masks")


def require_known(ids: Any, *, rows: int, mask_token_id: int) -> None:
    """Raise ValueError for ids [n] that the model's embedding has no row for, and for its mask token, no text's.

    require_known([5, 6, 300], rows=257, mask_token_id=256)  # ValueError: input_ids must be from 0 to below 257 ...
    """
    ids = torch.as_tensor(ids)
    bounds = [int(x) for x in ids.aminmax()]
    odd = [i for i in bounds if not 0 <= i < rows] + [mask_token_id] * bool((ids == mask_token_id).any())
    if odd:
        raise ValueError(
            f"input_ids must be from 0 to below {rows}, the rows of the model's embedding, and not {mask_token_id}, "
            f"its mask token; got {odd[0]}: encode the text with the model's own tokenizer"
        )


def _require_agreeing(x: Mapping[str, Any], given: Mapping[str, list[int]], answers: list[tuple[int, int]]) -> None:
    """Raise ValueError, by name, for a column that what is trained here would not go by."""
    ids = [*map(int, x["input_ids"])]
    for name, values in given.items():
        if len(values) != len(ids):
            raise ValueError(f"{name} must have a number for each of the {len(ids)} tokens; got {len(values)}")
    if not all(given.get("attention_mask", ids and [1])):
        raise ValueError(
            "attention_mask must be 1 throughout; got zeros: take the padding out of input_ids, batches are padded here"
        )
    if x.get("seq_lengths") is not None or given.get("position_ids", [*range(len(ids))]) != [*range(len(ids))]:
        raise ValueError(
            "several texts are packed into it (seq_lengths, or position_ids that do not count from 0): give them one "
            "by one, MTPConfig(packing=True) packs them"
        )
    counted = {at for start, end in answers for at in range(max(1, start), end)}
    for name in given.keys() - {"attention_mask", "position_ids"}:
        # The first token has nothing before it to be predicted from.
        said = {at for at, value in enumerate(given[name]) if at and (value != -100 if name == "labels" else value)}
        other = [at for at in said if name == "labels" and given[name][at] != ids[at]]
        if other or said != counted:
            at = min(other or said ^ counted)
            raise ValueError(
                f"{name} and prompt_length must say the same of what counts; token {at} is {ids[at]}, {name} has "
                f"{given[name][at]} there, and by prompt_length {x['prompt_length']} it "
                f"{'counts' if at in counted else 'does not count'}: leave {name} out, or leave prompt_length out and "
                f"let mtpkern.train.encode_rows read {name}"
            )


def earlier_answers(x: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Those of an example as numbers; `datasets` has arrays, and None where a row has none: `earlier_answers({})`."""
    found = x.get("earlier_answers")
    return [] if found is None else [(int(start), int(end)) for start, end in found]


class MTPCollator:
    """Right-pads {"input_ids": list, "prompt_length": int} to the longest text of the batch, or to a fixed length.

    The answer is what stands behind the prompt; in a conversation "earlier_answers", a list of (start, end) in tokens,
    names further ones inside it.
    """

    def __init__(self, pad_token_id: int, pad_to: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to = pad_to

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """input_ids [B, N] int64; lengths, prompt_lengths, earlier_answers and digests of the ids, as lists.

        Raises ValueError for a longer text than pad_to, and for what is no example.

        Lists stay on the host, where spans are drawn: reading tensors back from a GPU would wait for it.
        """
        for x in batch:
            require_example(x)
        lengths = [len(x["input_ids"]) for x in batch]
        longest = max(lengths)
        if self.pad_to is not None and longest > self.pad_to:
            raise ValueError(f"texts must have at most pad_to = {self.pad_to} tokens; got {longest}: cut or raise it")
        input_ids = torch.full((len(batch), self.pad_to or longest), self.pad_token_id, dtype=torch.int64)
        for i, x in enumerate(batch):
            input_ids[i, : len(x["input_ids"])] = torch.as_tensor(x["input_ids"])
        texts = zip(input_ids, lengths)
        return {
            "input_ids": input_ids,
            "lengths": lengths,
            "prompt_lengths": [int(x["prompt_length"]) for x in batch],
            "earlier_answers": [earlier_answers(x) for x in batch],
            "digests": [blake2b(ids[:n].numpy().tobytes(), digest_size=16).digest() for ids, n in texts],
        }
