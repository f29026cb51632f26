"""Logits processors for packed rows: what transformers has prepared, applied to each row's own text, on the device.

`from_transformers` makes of each processor a description that can be compared (a captured step has it baked in, but for
the numbers of mtpkern.settings), and `on` makes of the description what a step calls.

A processor of the caller's own is called for each row alone, with the text as transformers would lay it out. The host
has to know the text for that, so that it waits for every pass, and no graph is captured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from mtpkern.entry import entry
from mtpkern.settings import (
    MinP,
    MinTokens,
    NoRepeatNGram,
    RepetitionPenalty,
    Setting,
    Temperature,
    TokenBias,
    TopK,
    TopP,
)
from mtpkern.texts import Apply, Processor, Texts, require_tokens

# What looks at the scores alone: called as it is, on all rows at once.
_OF_SCORES = (
    *(theirs.TemperatureLogitsWarper, theirs.TopKLogitsWarper, theirs.TopPLogitsWarper, theirs.MinPLogitsWarper),
    *(theirs.TypicalLogitsWarper, theirs.EpsilonLogitsWarper, theirs.LogitNormalization),
)
# Biases of what comes behind certain tokens, by the argument that asks for them.
_OF_SEQUENCES = {
    theirs.SequenceBiasLogitsProcessor: "sequence_bias",
    theirs.NoBadWordsLogitsProcessor: "bad_words_ids",
}
# Pure functions of text and scores that nobody has brought to packed rows: one row at a time, as a caller's own.
_ROW_BY_ROW = (
    *(theirs.SuppressTokensAtBeginLogitsProcessor, theirs.ForcedBOSTokenLogitsProcessor),
    *(theirs.RepetitionPenaltyLogitsProcessor, theirs.ForcedEOSTokenLogitsProcessor, theirs.EtaLogitsWarper),
    *(theirs.ExponentialDecayLengthPenalty, theirs.TopHLogitsWarper),
)


@dataclass(frozen=True)
class OfScores(Processor):
    """One of transformers' that looks at the scores alone."""

    settings: tuple[Any, ...]
    processor: theirs.LogitsProcessor = field(compare=False)

    def on(self, device: torch.device, vocabulary: int) -> Apply:
        """Theirs as it is."""
        return lambda scores, texts, number: self.processor(None, scores)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bias(Processor):
    """What is added to the logit of a sequence's last token where the text ends in the ones before it.

    name: of the argument that asks for them.
    """

    name: str
    biases: tuple[tuple[tuple[int, ...], float], ...]
    reads_text: ClassVar[bool] = True

    def require_known(self, vocabulary: int) -> None:
        """Raise ValueError where a sequence has tokens that are not among so many."""
        require_tokens(self.name, (token for tokens, _ in self.biases for token in tokens), vocabulary)

    def on(self, device: torch.device, vocabulary: int) -> Apply:
        """A bias for the vocabulary, and for sequences of one length a comparison each."""
        self.require_known(vocabulary)  # a head may have fewer rows than the embedding
        always = torch.zeros(vocabulary, dtype=torch.float32)
        groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for tokens, bias in self.biases:
            if len(tokens) == 1:
                always[tokens[0]] = bias
            else:
                groups.setdefault(len(tokens) - 1, []).append((tokens, bias))
        always = always.to(device, non_blocking=True)
        longer = []
        for group in groups.values():
            words, added = [t for t, _ in group], torch.tensor([b for _, b in group], dtype=torch.float32)
            columns = torch.tensor([t[:-1] for t in words]), torch.tensor([t[-1] for t in words]), added
            longer.append([column.to(device, non_blocking=True) for column in columns])

        def apply(scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
            bias = always.expand_as(scores)
            if longer:
                bias = bias.clone()
            for before, last, added in longer:
                ends_so = (texts.last(before.shape[1])[:, None] == before).all(-1)
                bias.index_add_(1, last, torch.where(ends_so, added, 0.0).to(bias.dtype))
            return scores + bias

        return apply


@dataclass(frozen=True, eq=False)
class RowByRow(Processor):
    """A pure function of text and scores, called for each row alone."""

    processor: Any
    reads_text: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    def __eq__(self, other: object) -> bool:
        """Whether it is the same, or equal; one that cannot be compared, as dataclasses with tensors, is neither."""
        if not isinstance(other, RowByRow) or self.processor is other.processor:
            return isinstance(other, RowByRow)
        try:
            return bool(self.processor == other.processor)
        except Exception:  # of the caller's, and no matter of whoever stands in line with it
            return False

    def __hash__(self) -> int:
        return hash(type(self.processor))

    def __call__(self, scores: Tensor, texts: Texts, number: Tensor) -> Tensor:
        """A loop over the rows whose text is known, on the host's time."""
        processed = scores.clone()
        rows = zip(texts.known.tolist(), texts.seq.tolist(), texts.end.tolist(), texts.new.tolist())
        for r, (known, b, end, new) in enumerate(rows):
            if not known or new < 0:
                continue
            text = texts.tokens[b, :end][None]
            if texts.prompts is not None:
                text = torch.cat([texts.prompts[b], texts.tokens[b, end - new : end]])[None]
            row = self.processor(text, scores[r : r + 1])
            if not isinstance(row, Tensor) or row.shape != scores[r : r + 1].shape:
                got = f"a tensor {list(row.shape)}" if isinstance(row, Tensor) else f"{type(row).__name__}"
                raise ValueError(
                    f"{type(self.processor).__name__} must return the scores [1, {scores.shape[1]}] of the text that "
                    f"it is called with, got {got}"
                )
            processed[r] = row[0]
        return processed


def from_transformers(processor: Any, T: int) -> Processor:
    """The description of one of transformers' processors for prompts [B, T]; ValueError for one that is unknown.

    from_transformers(TopKLogitsWarper(50), 12)
    """
    kind = type(processor)
    if (setting := _setting(processor, T)) is not None:
        return setting
    if kind in _OF_SCORES:
        return OfScores((kind, *sorted(vars(processor).items())), processor)
    if kind in _OF_SEQUENCES:
        biases = tuple((tuple(tokens), float(bias)) for tokens, bias in processor.sequence_bias.items())
        return Bias(_OF_SEQUENCES[kind], biases)
    if kind in _ROW_BY_ROW or not kind.__module__.startswith("transformers."):
        return RowByRow(processor)
    raise ValueError(
        f"{entry()} does not support the logits processor {kind.__name__}, which is no function of text and "
        "scores alone, or is not known here; leave it out, or use model.generate"
    )


def _setting(processor: Any, T: int) -> Setting | None:
    """What a sequence may have of its own, where that is all there is to it."""
    kind = type(processor)
    if kind in _OF_SEQUENCES and all(len(tokens) == 1 for tokens in processor.sequence_bias):
        biases = tuple((token, float(bias)) for (token,), bias in processor.sequence_bias.items())
        return TokenBias(biases, _OF_SEQUENCES[kind])
    if kind is theirs.SuppressTokensLogitsProcessor:
        return TokenBias(tuple((token, -math.inf) for token in numbers(processor.suppress_tokens)))
    if kind is theirs.SuppressTokensAtBeginLogitsProcessor and processor.begin_index == T:
        return MinTokens(1, numbers(processor.begin_suppress_tokens))
    if kind is theirs.MinNewTokensLengthLogitsProcessor:
        new, skipped = processor.min_new_tokens, processor.prompt_length_to_skip
        tokens = numbers(processor.eos_token_id)
        # The prompt's length counts for nothing, so that calls with others share a captured step.
        return MinTokens(new, tokens) if skipped == T else MinTokens(skipped + new, tokens, in_all=True)
    if kind is theirs.MinLengthLogitsProcessor:
        return MinTokens(processor.min_length, numbers(processor.eos_token_id), in_all=True)
    if kind is theirs.NoRepeatNGramLogitsProcessor:
        return NoRepeatNGram(processor.ngram_size)
    if kind is theirs.RepetitionPenaltyLogitsProcessor:
        # How long each row's padding is, a tensor, is known here anyway.
        return None if isinstance(processor.prompt_ignore_length, int) else RepetitionPenalty(processor.penalty)
    if kind is theirs.TemperatureLogitsWarper:
        return Temperature(processor.temperature)
    if kind not in (theirs.TopKLogitsWarper, theirs.TopPLogitsWarper, theirs.MinPLogitsWarper):
        return None
    if processor.filter_value != -math.inf:
        return None
    if kind is theirs.TopKLogitsWarper:
        return TopK(processor.top_k)
    if processor.min_tokens_to_keep > 1:
        return None
    return TopP(1 - processor.top_p) if kind is theirs.TopPLogitsWarper else MinP(processor.min_p)


def numbers(tokens: Any) -> tuple[int, ...]:
    """Token ids of a tensor or a list, as part of a description: `numbers([1, 2])`."""
    return tuple(token for token in (tokens.tolist() if isinstance(tokens, Tensor) else tokens) if token >= 0)
