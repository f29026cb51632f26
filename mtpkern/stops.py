"""Stop strings: what looks for them in a text that is being written.

transformers' criterion knows of each token the text that it stands for, which it fails to find out with some
tokenizers: of whole words, say, or where it cannot tell a token from the space before it. With those the text is
decoded. Either way a text ends at the same token: the first that completes a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria

# Stands where there is no token: above every vocabulary, and in no stop string.
NO_TOKEN = 1 << 40
# Behind so many tokens the text is that of the whole: the first may lose its space, or begin within a character.
_LEAD = 4
_NO_CHARACTER = "\ufffd"


def stop_criterion(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StoppingCriteria:
    """Says of each prefix [B, T] whether its last token completes one of the strings, with any tokenizer.

    Raises TypeError for what cannot decode.

        model.generate(**inputs, stopping_criteria=[stop_criterion(tokenizer, ["Q:"])])
    """
    if not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"tokenizer must be the model's tokenizer itself, got {tokenizer!r:.60}")
    try:
        return StopStringCriteria(tokenizer, list(strings))
    except Exception:  # whatever comes of a tokenizer that is of another kind than it expects
        return TextStops(tokenizer, strings)


class TextStops(StoppingCriteria):
    """As `StopStringCriteria`, of the decoded text: `TextStops(tokenizer, ["Q:"])(input_ids, None)` is bool [B]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token says a byte at least, so that no match begins before these.
        self.maximum_token_len = max(len(string.encode()) for string in strings) + _LEAD

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether the last token of each of the sequences input_ids [B, T] completes a string, bool [B]."""
        windows = input_ids[:, -self.maximum_token_len :].tolist()
        return torch.tensor([self._completes(row) for row in windows], device=input_ids.device)

    def _completes(self, window: list[int]) -> bool:
        ids = [token for token in window if token < NO_TOKEN]
        # Some decoders make nothing of a character whose first byte is missing, nor of those that follow it.
        for start in range(_LEAD):
            text = self._decode(ids[start:])
            if any(string in text for string in self.strings):
                # What was there before the last token does not count: the prompt may hold a string.
                pairs = zip(text, earlier := self._decode(ids[start:-1]))
                before = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(earlier)))
                return any(text.find(string, max(0, before - len(string) + 1)) >= 0 for string in self.strings)
            if _NO_CHARACTER not in text:
                break
        return False

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))
