"""Logits processors for packed rows: what transformers has prepared, applied to each row's own text, on the device.

transformers calls a processor with the text so far and the scores of its next token. A pass has rows of several texts
of different length, among them drafts: the text of a row is what stands up to the row's own token, that included.
`from_transformers` makes of each processor a description that can be compared (a captured step has it baked in), and
`on` makes of the description what a step calls.

A processor of the caller's own is called for each row alone, with the text as transformers would lay it out. The host
has to know the text for that, so that it waits for every pass, and no graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import logits_process as theirs

# What looks at the scores alone: called as it is, on all rows at once.
_OF_SCORES = (
    *(theirs.TemperatureLogitsWarper, theirs.TopKLogitsWarper, theirs.TopPLogitsWarper, theirs.MinPLogitsWarper),
    *(theirs.TypicalLogitsWarper, theirs.EpsilonLogitsWarper, theirs.LogitNormalization),
)
# Pure functions of text and scores that nobody has brought to packed rows: one row at a time, as a caller's own.
_ROW_BY_ROW = (
    *(theirs.SuppressTokensAtBeginLogitsProcessor, theirs.ForcedBOSTokenLogitsProcessor),
    *(theirs.RepetitionPenaltyLogitsProcessor, theirs.ForcedEOSTokenLogitsProcessor, theirs.EtaLogitsWarper),
    *(theirs.ExponentialDecayLengthPenalty, theirs.TopHLogitsWarper),
)


@dataclass(frozen=True)
class Texts:
    """The texts of R rows; `end` tokens of `tokens[seq]` are known of each.

    tokens [B, C + 1]; seq, end [R]; length [R]: of the text as transformers has it, with the padding in front and the
    row's own token; new [R]: tokens behind the prompt in it, negative for rows of no text; known [R]: whether `end` is
    all of it, which it is not behind masks. prompts [B, T]: as given, padded on the left; None where each sequence is
    laid out as it is alone, without padding.
    """

    tokens: Tensor
    seq: Tensor
    end: Tensor
    length: Tensor
    new: Tensor
    known: Tensor
    prompts: Tensor | None

    def last(self, n: int) -> Tensor:
        """The last n known tokens of each row [R, n]; -1 in front of a text."""
        o = self.end[:, None] - n + torch.arange(n, device=self.end.device)
        return torch.where(o < 0, -1, self.tokens[self.seq[:, None], o.clamp(min=0)])


Apply = Callable[[Tensor, Texts], Tensor]


@dataclass(frozen=True)
class Processor:
    """What is asked of the scores; `on` makes a function of scores [R, V] and texts for a device and a vocabulary."""

    # Whether it looks at the tokens of the text, and whether it has to be called row by row.
    reads_text: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    def on(self, device: torch.device, vocabulary: int) -> Apply:
        """The function, made before any step is captured: itself, where there is nothing to make."""
        return self  # type: ignore[return-value]


def keep_top_p(warper: theirs.TopPLogitsWarper, scores: Tensor) -> Tensor:
    """What transformers' top-p makes of scores [R, V] on a CPU, bit by bit, in a tenth of the time.

    Its time goes to the places of a sorted vocabulary, and only the score at the cut is needed, so that values are
    sorted alone: the same values in the same order, and the same sums of them. Where several tokens have the score at
    the cut and only some of them stay, which ones is up to transformers' sort: those rows are left to it.

        keep_top_p(TopPLogitsWarper(0.9), torch.randn(4, 50_000))
    """
    ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))
    rest = ordered.new_full((len(scores), 1), 1 - warper.top_p)
    # How many tokens are removed: those up to which the sum is at most the rest.
    cut = torch.searchsorted(ordered.softmax(-1).cumsum(-1), rest, right=True)
    cut.clamp_(max=max(0, scores.shape[1] - warper.min_tokens_to_keep))
    least = ordered.gather(1, cut)
    kept = torch.where(scores < least, warper.filter_value, scores)
    tied = (cut > 0) & (ordered.gather(1, (cut - 1).clamp_(min=0)) == least)
    if tied.any():
        rows = tied[:, 0]
        kept[rows] = warper(None, scores[rows])  # type: ignore[arg-type]
    return kept


@dataclass(frozen=True)
class OfScores(Processor):
    """One of transformers' that looks at the scores alone."""

    settings: tuple[Any, ...]
    processor: theirs.LogitsProcessor = field(compare=False)

    def on(self, device: torch.device, vocabulary: int) -> Apply:
        """Theirs as it is; on a CPU, where the host may look at the scores, top-p in a cheaper way."""
        if device.type == "cpu" and type(self.processor) is theirs.TopPLogitsWarper:
            warper = self.processor
            return lambda scores, texts: keep_top_p(warper, scores)
        return lambda scores, texts: self.processor(None, scores)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Suppress(Processor):
    """No `tokens`: ever, or while `new` tokens are fewer than `fewer_new`, or the text is shorter than `shorter`."""

    tokens: tuple[int, ...]
    fewer_new: int | None = None
    shorter: int | None = None

    def on(self, device: torch.device, vocabulary: int) -> Apply:
        """A mask of the vocabulary."""
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[[t for t in self.tokens if 0 <= t < vocabulary]] = True
        banned = mask.to(device, non_blocking=True)

        def apply(scores: Tensor, texts: Texts) -> Tensor:
            if self.fewer_new is None and self.shorter is None:
                return scores.masked_fill(banned, -torch.inf)
            early = texts.length < self.shorter if self.shorter is not None else texts.new < (self.fewer_new or 0)
            return scores.masked_fill(banned & early[:, None], -torch.inf)

        return apply


@dataclass(frozen=True)
class RepetitionPenalty(Processor):
    """Logits of tokens that the text holds are divided by the penalty, or multiplied where they are negative."""

    penalty: float
    reads_text: ClassVar[bool] = True

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        """Which tokens have been seen, by a scatter of the text."""
        text = texts.tokens[texts.seq]
        known = torch.arange(text.shape[1], device=text.device) < texts.end[:, None]
        punished = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(_among(text, known, scores), punished, scores)


@dataclass(frozen=True)
class NoRepeatNGram(Processor):
    """No n tokens in a row twice."""

    n: int
    reads_text: ClassVar[bool] = True

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        """Every window of the text is compared with its end."""
        text = F.pad(texts.tokens[texts.seq], (0, max(0, self.n - texts.tokens.shape[1])))
        windows = text.unfold(1, self.n, 1)
        o_last = torch.arange(windows.shape[1], device=text.device) + self.n - 1
        same = (windows[..., :-1] == texts.last(self.n - 1)[:, None]).all(-1) & (o_last < texts.end[:, None])
        return scores.masked_fill(_among(windows[..., -1], same, scores), -torch.inf)


@dataclass(frozen=True)
class Bias(Processor):
    """What is added to the logit of a sequence's last token where the text ends in the ones before it."""

    name: str
    biases: tuple[tuple[tuple[int, ...], float], ...]

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        """Only those of several tokens do."""
        return any(len(tokens) > 1 for tokens, _ in self.biases)

    def on(self, device: torch.device, vocabulary: int) -> Apply:
        """A bias for the vocabulary, and for sequences of one length a comparison each."""
        outside = sorted({t for tokens, _ in self.biases for t in tokens if t >= vocabulary})
        if outside:
            raise ValueError(
                f"{self.name} must hold ids from 0 to {vocabulary - 1}, the model's vocabulary; got {outside}; use the "
                "model's own tokenizer"
            )
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

        def apply(scores: Tensor, texts: Texts) -> Tensor:
            bias = always.expand_as(scores)
            if longer:
                bias = bias.clone()
            for before, last, added in longer:
                ends_so = (texts.last(before.shape[1])[:, None] == before).all(-1)
                bias.index_add_(1, last, torch.where(ends_so, added, 0.0).to(bias.dtype))
            return scores + bias

        return apply


@dataclass(frozen=True)
class RowByRow(Processor):
    """A pure function of text and scores, called for each row alone."""

    processor: Any
    reads_text: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
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


def _among(tokens: Tensor, where: Tensor, scores: Tensor) -> Tensor:
    """Which of the vocabulary [R, V] are among each row's tokens [R, n], of which those count that are true there."""
    R, V = scores.shape
    found = scores.new_zeros(R, V + 1, dtype=torch.bool)
    return found.scatter_(1, torch.where(where, tokens.clamp(max=V), V), True)[:, :V]


def from_transformers(processor: Any, T: int) -> Processor:
    """The description of one of transformers' processors for prompts [B, T]; ValueError for one that is unknown.

    from_transformers(TopKLogitsWarper(50), 12)
    """
    kind = type(processor)
    if kind in _OF_SCORES:
        return OfScores((kind, *sorted(vars(processor).items())), processor)
    if kind is theirs.SuppressTokensLogitsProcessor:
        return Suppress(numbers(processor.suppress_tokens))
    if kind is theirs.SuppressTokensAtBeginLogitsProcessor and processor.begin_index == T:
        return Suppress(numbers(processor.begin_suppress_tokens), fewer_new=1)
    if kind is theirs.MinNewTokensLengthLogitsProcessor:
        new, skipped = processor.min_new_tokens, processor.prompt_length_to_skip
        # The prompt's length counts for nothing, so that calls with others share a captured step.
        length = {"fewer_new": new} if skipped == T else {"shorter": skipped + new}
        return Suppress(numbers(processor.eos_token_id), **length)
    if kind is theirs.MinLengthLogitsProcessor:
        return Suppress(numbers(processor.eos_token_id), shorter=processor.min_length)
    if kind is theirs.NoRepeatNGramLogitsProcessor:
        return NoRepeatNGram(processor.ngram_size)
    # How long each row's padding is, a tensor, is known here anyway.
    if kind is theirs.RepetitionPenaltyLogitsProcessor and not isinstance(processor.prompt_ignore_length, int):
        return RepetitionPenalty(processor.penalty)
    if kind in (theirs.SequenceBiasLogitsProcessor, theirs.NoBadWordsLogitsProcessor):
        name = "sequence_bias" if kind is theirs.SequenceBiasLogitsProcessor else "bad_words_ids"
        return Bias(name, tuple((tuple(tokens), float(bias)) for tokens, bias in processor.sequence_bias.items()))
    if kind in _ROW_BY_ROW or not kind.__module__.startswith("transformers."):
        return RowByRow(processor)
    raise ValueError(
        f"mtpkern.generate does not support the logits processor {kind.__name__}, which is no function of text and "
        "scores alone, or is not known here; leave it out, or use model.generate"
    )


def numbers(tokens: Any) -> tuple[int, ...]:
    """Token ids of a tensor or a list, as part of a description: `numbers([1, 2])`."""
    return tuple(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
