"""Stop strings for tokenizers in which transformers cannot look for them (of whole words, say): in the decoded text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StopStringCriteria

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStops(StoppingCriteria):
    """Ends a sequence whose new text holds one of the strings. start: where it begins, the width T of the prompts.

    model.generate(**inputs, stopping_criteria=[TextStops(tokenizer, ["Q:"], inputs["input_ids"].shape[1])])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        # Asked behind every token, and a token says a byte at least: a match that is new lies in so many of them.
        self.reach = max(len(stop.encode()) for stop in stops) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each of the sequences input_ids [B, T + new] has ended, bool [B]."""
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :].tolist()
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in new]
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def stop_options(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int) -> dict[str, Any]:
    """The stop strings as arguments of `mtpkern.generate`, for prompts of width `start`; none for none.

    mtpkern.generate(model, **inputs, **stop_options(tokenizer, ["Q:"], inputs["input_ids"].shape[1]))
    """
    if not stops:
        return {}
    try:
        StopStringCriteria(tokenizer, list(stops))
    except ValueError:
        return {"stopping_criteria": [TextStops(tokenizer, stops, start)]}
    return {"stop_strings": list(stops), "tokenizer": tokenizer}
