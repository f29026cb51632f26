"""Choosing: which token each row of a pass comes to, where it is more than the argmax of the model's logits.

Processors change the scores (mtpkern.processors), sampling draws (kernels/sample.py), and what was chosen with which
probability is kept where somebody asks for it. Greedy decoding without any of that has no `Choosing` at all.

`Verified` is exact: what a row draws is a function of key, sequence, position and the scores behind the row's text, and
a draft stands where the row before it draws the same: with the probability p(x) that the model's own distribution gives
it, as in rejection sampling of drafts that the proposer was sure of. What is drawn in its place is distributed as p
without x, and the text is the same whatever was drafted: whatever k, masks, rows or load are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtpkern.host import on_device
from mtpkern.kernels.readout import readout
from mtpkern.kernels.sample import sample
from mtpkern.kernels.state import Sequences, Terms
from mtpkern.processors import from_transformers
from mtpkern.settings import Setting, may_look, numbers_in, united
from mtpkern.strategies import ConfAdapt, Strategy
from mtpkern.texts import Apply, Processor, Texts


@dataclass(frozen=True)
class Choosing:
    """What is asked for. Equal ones share a captured step, whatever their settings' numbers are (mtpkern.settings).

    keeps: of "logprobs" (with the confidences), "scores" and "logits", what is kept of every token.
    """

    processors: tuple[Processor, ...] = ()
    samples: bool = False
    keeps: frozenset[str] = frozenset()

    @classmethod
    def of(cls, processors: Sequence[Any], T: int, *, samples: bool, keeps: frozenset[str]) -> Choosing | None:
        """Of transformers' list for prompts [B, T]; None where every pass takes the argmax and nothing is kept."""
        known = tuple(from_transformers(processor, T) for processor in processors)
        return cls(known, samples, keeps) if known or samples or keeps else None

    @property
    def on_host(self) -> bool:
        """Whether a pass needs the host: to call a processor row by row, to find room for distributions."""
        return bool(self.keeps - {"logprobs"}) or any(processor.by_row for processor in self.processors)

    @property
    def may_be_nothing(self) -> bool:
        """Whether there are sequences for which it is the argmax and no more."""
        return not self.keeps and all(isinstance(processor, Setting) for processor in self.processors)

    def require_known(self, vocabulary: int) -> None:
        """Raise ValueError where a processor names tokens that are not among so many."""
        for processor in self.processors:
            processor.require_known(vocabulary)

    def united(self, other: Choosing) -> Choosing | None:
        """One that does for sequences of both in one pass; None where there is none."""
        processors = united(self.processors, other.processors)
        if processors is None or self.keeps != other.keeps:
            return None
        return Choosing(processors, self.samples or other.samples, self.keeps)

    def numbers(self, own: Choosing | None) -> list[float]:
        """A sequence's part in this: 1 where it takes the argmax, and of each processor the sequence's own numbers."""
        own = own or Choosing()
        return [float(not own.samples), *numbers_in(self.processors, own.processors)]


class Choice:
    """The tensors of a choosing in one decoder, and its part of a step; all are made before a step is captured."""

    def __init__(
        self, choosing: Choosing, strategy: Strategy, sequences: Sequences, terms: Terms, mask_token_id: int
    ) -> None:
        self.choosing, self.sequences, self.terms, self.mask_token_id = choosing, sequences, terms, mask_token_id
        self.k, self.verify = strategy.k, strategy.verify
        device, (B, columns) = sequences.tokens.device, sequences.tokens.shape
        self.key, self.prompt, self.padding = (torch.zeros(n, dtype=torch.int64, device=device) for n in (1, B, B))
        # Which sequence of the call each is: two of one prompt draw apart.
        self.stream = torch.arange(B, device=device)
        widths = [1, *(processor.width for processor in choosing.processors)]
        self.own = torch.zeros(B, sum(widths), dtype=torch.float32, device=device)
        self.nothing = torch.tensor(choosing.numbers(None), dtype=torch.float32, device=device)
        # Where the numbers of each processor are among them.
        self.places = [slice(end - width, end) for width, end in zip(widths, accumulate(widths))][1:]
        never = torch.full((1,), torch.inf, dtype=torch.float32, device=device)
        self.greedy_above = terms.threshold[None] if isinstance(strategy, ConfAdapt) else never
        # Unverified, the tokens behind the first are kept as they come, so that each has to see those before it.
        reads_text = any(processor.reads_text for processor in choosing.processors)
        self.levels = strategy.k if reads_text and not strategy.verify else 1
        self.applied: list[Apply] | None = None
        self.logprobs = self.confidences = None
        if "logprobs" in choosing.keeps:
            self.logprobs, self.confidences = torch.zeros(2, B, columns, dtype=torch.float32, device=device)
        self.kept: dict[str, Tensor] = {}
        self.passes = 0
        self.prompts: Tensor | None = None
        self.first = 0

    def begin(self, input_ids: Tensor, real: Tensor, max_new_tokens: int, k: int) -> tuple[Tensor, Tensor]:
        """Begin a run from left-padded prompts [B, T], `real` where a token counts; seq and position of k rows each."""
        if self.choosing.samples:
            self.key.random_()  # once a call, from the device's default generator
        B = len(input_ids)
        torch.arange(B, out=self.stream)
        self.own.copy_(on_device(np.array(self.choosing.numbers(self.choosing), dtype=np.float32), self.own.device))
        self.prompt.copy_(real.sum(1))
        self.padding.copy_(input_ids.shape[1] - self.prompt)
        self.prompts, self.max_new_tokens, self.passes = input_ids, max_new_tokens, 0
        self.kept.clear()
        o_r = torch.arange(B * k, device=input_ids.device)
        seq = o_r // k
        return seq, self.prompt[seq] - 1 + o_r % k

    def vacate(self, key: Tensor | None, first: int) -> None:
        """Begin a run whose prompts come in one by one; key [1] is the call's, where it samples, first: see `enter`."""
        self.first = first
        if key is not None:
            self.key.copy_(key)
        self.padding.zero_()
        self.own.copy_(self.nothing)
        self.prompts, self.passes = None, 0
        self.kept.clear()

    def enter(self, seq: Tensor, length: Tensor, number: Tensor, own: Tensor) -> None:
        """Take in that prompts [n] of these lengths have come into these sequences; each draws by first + number.

        own: `Choosing.numbers` of each, a row.
        """
        self.prompt[seq], self.stream[seq], self.own[seq] = length, number + self.first, own

    def __call__(self, logits: Tensor, seq: Tensor, position: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence [R] of logits [R, V]; seq, position [R] of the rows, start [B + 1] as in `Rows`."""
        if may_look(logits) and self.choosing.may_be_nothing and bool((self.own == self.nothing).all()):
            return readout(logits, self.mask_token_id)
        scores = logits
        if self.choosing.processors or "scores" in self.choosing.keeps:
            scores = logits.to(torch.float32, copy=True)
            scores[:, self.mask_token_id : self.mask_token_id + 1] = -torch.inf
        o_r = torch.arange(len(seq), device=seq.device)
        used, standing = o_r < start[-1], self.sequences.length[seq]
        # A sequence's pending tokens come first; masks follow, whose text is known as far as it stands.
        is_token = used & (o_r - start[seq] < self.sequences.pending[seq])
        if self.levels == 1:
            end = torch.minimum(position + 1, standing)
            scores = self._processed(scores, self._texts(self.sequences.tokens, seq, position, end, used, is_token))
            token, confidence = self._pick(scores, seq, position)
        else:
            token, confidence, scores = self._in_order(scores, seq, position, standing, used)
        if self.choosing.keeps:
            # Verified, what is emitted stems from rows of tokens; else from the last of them and the masks behind it.
            emits = is_token if self.verify else used & (position + 1 >= standing)
            self._keep(logits, scores, (token, confidence), seq, position, emits)
        return token, confidence

    def _texts(self, tokens: Tensor, seq: Tensor, position: Tensor, end: Tensor, used: Tensor, known: Tensor) -> Texts:
        length = position + 1 + self.padding[seq]
        new = torch.where(used, position + 1 - self.prompt[seq], -1)
        return Texts(tokens, seq, end, length, new, known, self.prompts)

    def _processed(self, scores: Tensor, texts: Texts) -> Tensor:
        if self.applied is None:
            device, V = scores.device, scores.shape[1]
            self.applied = [processor.on(device, V) for processor in self.choosing.processors]
        numbers = self.own[texts.seq]
        for apply, place in zip(self.applied, self.places):
            scores = apply(scores, texts, numbers[:, place])
        return scores

    def _pick(self, scores: Tensor, seq: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        if not self.choosing.samples:
            return readout(scores, self.mask_token_id)
        above = torch.where(self.own[seq, 0] > 0, -1.0, self.greedy_above)
        return sample(scores, self.key, self.stream[seq], position + 1, above, self.mask_token_id)

    def _in_order(
        self, scores: Tensor, seq: Tensor, position: Tensor, standing: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As a whole, but row by row of each sequence from the last that stands: each sees what those before chose."""
        tokens = self.sequences.tokens.clone()
        trash = tokens.shape[1] - 1
        token, confidence = readout(scores, self.mask_token_id)
        processed = scores
        for level in range(self.levels):
            turn = used & (position + 1 - standing == level)
            texts = self._texts(tokens, seq, position, position + 1, turn, turn)
            new = self._processed(scores, texts)
            chosen, sure = self._pick(new, seq, position)
            token, confidence = torch.where(turn, chosen, token), torch.where(turn, sure, confidence)
            processed = torch.where(turn[:, None], new, processed)
            place = torch.where(turn, (position + 1).clamp(max=trash), trash)
            tokens[seq, place] = token.clamp(min=0)
        return token, confidence, processed

    def _keep(
        self, logits: Tensor, scores: Tensor, read: tuple[Tensor, Tensor], seq: Tensor, position: Tensor, emits: Tensor
    ) -> None:
        """Note at each token's place what it was chosen with; what was noted there of a draft, or too early, goes."""
        trash = self.sequences.tokens.shape[1] - 1
        place = torch.where(emits, (position + 1).clamp(max=trash), trash)
        if self.logprobs is not None and self.confidences is not None:
            z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
            z[:, self.mask_token_id : self.mask_token_id + 1] = -torch.inf
            token, confidence = read
            logprob = z.gather(1, token.clamp(min=0)[:, None])[:, 0] - z.logsumexp(-1)
            self.logprobs[seq, place] = logprob.float()
            self.confidences[seq, place] = confidence.float()
        self.passes += 1
        for name, rows in (("scores", scores), ("logits", logits)):
            if name not in self.choosing.keeps:
                continue
            kept = self._room(name, rows)
            new = torch.where(emits, position + 1 - self.prompt[seq], kept.shape[1] - 1)
            kept[seq, new.clamp(0, kept.shape[1] - 1)] = rows.float()

    def _room(self, name: str, rows: Tensor) -> Tensor:
        """A buffer [B, n + 1, V] for the tokens that so many passes can have emitted; the last column is trash."""
        needed = min(self.max_new_tokens, self.passes * self.k)
        kept = self.kept.get(name)
        if kept is None or kept.shape[1] <= needed:
            n = min(self.max_new_tokens, 2 * needed) + 1
            larger = rows.new_zeros(len(self.prompt), n, rows.shape[1], dtype=torch.float32)
            if kept is not None:
                larger[:, : kept.shape[1] - 1] = kept[:, :-1]
            kept = self.kept[name] = larger
        return kept

    def of_tokens(self, ends: Tensor, width: int, filler: int) -> dict[str, Any]:
        """What was kept, by its name in the output, of `width` new tokens and for sequences up to these ends [B].

        logprobs and confidences [B, width], 0 and 1 behind the end; scores and logits a tuple of [B, V] for each token,
        all of it on the padding behind the end.
        """
        found: dict[str, Any] = {}
        if self.logprobs is not None and self.confidences is not None:
            o = self.prompt[:, None] + torch.arange(width, device=ends.device)
            behind, o = o >= ends[:, None], o.clamp(max=self.logprobs.shape[1] - 1)
            found["logprobs"] = self.logprobs.gather(1, o).masked_fill(behind, 0)
            found["confidences"] = self.confidences.gather(1, o).masked_fill(behind, 1)
        for name, kept in self.kept.items():
            after = torch.full_like(kept[:1, 0], -torch.inf)
            after[:, filler] = 0
            ended = [(self.prompt + i >= ends)[:, None] for i in range(width)]
            found[name] = tuple(torch.where(at_end, after, kept[:, i]) for i, at_end in enumerate(ended))
        return found
