"""Prefixes: what a frozen model makes of texts, computed once and kept for the whole run where memory allows.

    prefix pass   the tokens of a text under the frozen weights -> keys and values of every layer, hidden states
    kept          by text, trimmed to its length, in the dtype in which the pass attends; first come, first kept
    laid out      the texts of a batch as they stand there, for the rows that stand behind them

Nothing is thrown out for what comes later: in an order drawn anew it is no more likely to come next, so that the share
of texts that are kept is the share of passes that are spared.

On a CPU every text runs alone, and the bits of its keys depend on that text only: not on the batch, nor on what is
kept, so that a resumed run, which has kept nothing yet, equals an uninterrupted one. A GPU would wait for the launches
of so many small passes: there all new texts of a batch run in one row, and equal rounding only.

Source   arXiv 2604.11035, adapters on mask rows behind a prefix that training does not change
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.attention import AttentionContext, routed
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention
from mtpkern.kernels.span_mask import Rule, span_mask
from mtpkern.train.layout import Layout, send, tensors_of

Layers = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Text:
    """Where a text stands in the tokens [B, N] of a batch, and a digest of its ids by which it is known again."""

    row: int
    start: int
    end: int
    name: bytes | None = None

    def __len__(self) -> int:
        return self.end - self.start


def texts_of(layout: Layout, num_tokens: int, names: Sequence[bytes] | None = None) -> list[Text]:
    """The texts of a layout, which lies on the host, packed or one a row; names in the order of the batch.

    texts_of(build_layout(torch.tensor([[2], [2]]), torch.tensor([5, 4]), 3, num_tokens=5), 5)[1]  # Text(1, 0, 4)
    """
    first = (layout.position[:, :num_tokens] == 0) & (layout.prefix_end[:, :num_tokens] > 0)
    starts = first.nonzero().tolist()
    lengths = layout.lengths.tolist()
    ends = [b[1] if b[0] == a[0] else lengths[a[0]] for a, b in zip(starts, [*starts[1:], [-1, 0]])]
    return [Text(row, start, end, name) for (row, start), end, name in zip(starts, ends, names or repeat(None))]


@dataclass(frozen=True)
class Packing:
    """Texts of a batch beside one another in one row, for a pass that asks the host nothing more.

    take      [T] int64: the tokens of the row, as indices into those of the batch, [B * N]
    position  [1, T] int32: counted from 0 in every text
    put       [B * N] int64: the tokens of the batch, as indices into those of the row; any where there is padding
    """

    take: Tensor
    position: Tensor
    put: Tensor

    @classmethod
    def of(cls, texts: Sequence[Text], batch: int, num_tokens: int, rows: int | None = None) -> Packing:
        """On the host; of `rows` tokens, at least those of the texts: the first one again, in texts of its own.

        Packing.of([Text(0, 0, 2), Text(1, 0, 3)], 2, 3).put.tolist()  # [0, 1, 0, 2, 3, 4]
        """
        lengths = torch.tensor([len(text) for text in texts])
        starts = torch.tensor([text.row * num_tokens + text.start for text in texts])
        position = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        take = starts.repeat_interleave(lengths) + position
        put = torch.zeros(batch * num_tokens, dtype=torch.int64)
        put[take] = torch.arange(len(take))
        if rows is not None:
            take, position = (torch.nn.functional.pad(x, (0, rows - len(take))) for x in (take, position))
        return cls(take, position[None].int(), put)

    def to(self, device: torch.device | str) -> Packing:
        """The same on a device."""
        return Packing(**{name: send(x, device) for name, x in tensors_of(self).items()})


# A longer cut of the same text is another; a text without a name is known by its place in the batch.
Key = tuple[bytes | Text, int]


def _key(text: Text) -> Key:
    return text.name or text, len(text)


@dataclass
class PrefixContext:
    """Attention of the prefix pass: texts in one row, each causal by itself, their keys and values kept.

    position   [1, T] int32, counted from 0 in every text
    layers     by layer: keys and values [1, Hkv, T, D]
    """

    position: Tensor
    layers: Layers = field(default_factory=dict)
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    without_dropout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rows = self.position.shape[1]
        end = torch.arange(1, rows + 1, dtype=torch.int32, device=self.position.device)[None]
        self.rule = Rule(self.position, end, end)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Causal attention of one layer: [1, T, Hq, D] (mtpkern.attention.AttentionContext)."""
        self.layers[layer] = _as_attended(key), _as_attended(value)
        mask = shared_mask(self.masks, self.rule, scoring.window)
        return span_attention(query, key, value, self.rule, scoring, mask=mask)


class Prefixes:
    """The prefix pass of a model's texts, and what is kept of it.

    max_bytes   what kept texts may take; 0 keeps none
    states      give, and keep, their hidden states too
    passes      how many passes are to be made where so many are needed: more, where other ranks need more, whose passes
                gather the shards of a model together with this one's

        layers, states = Prefixes(2**30).of(model, tokens, texts_of(layout, tokens.shape[1]))
    """

    def __init__(self, max_bytes: int = 0, *, states: bool = False, passes: Callable[[int], int] | None = None) -> None:
        self.max_bytes = max_bytes
        self.states = states
        self.passes = passes
        self.bytes = 0
        self._kept: dict[Key, tuple[Tensor, ...]] = {}
        # By layer: Hkv, and D of keys and values.
        self._shapes: dict[int, tuple[int, int, int]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def of(
        self, model: PreTrainedModel, tokens: Tensor, texts: Sequence[Text] | Packing
    ) -> tuple[Layers, Tensor | None]:
        """Keys and values of every layer [B, Hkv, N, D] for tokens [B, N], and hidden states [B, N, H] if asked for.

        Padding has those of some token. Only texts that are not kept are run; of a packing, in which no text has a
        name, all are, and nothing is kept. The caller has closed the model's gate.
        """
        if isinstance(texts, Packing):
            return self._laid_out(self._run(model, tokens, texts), texts.put, tokens)
        keys = [_key(text) for text in texts]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        # Of a text that comes twice one runs.
        new = list({key: text for key, text in zip(keys, texts) if key not in found}.values())
        alone = tokens.device.type == "cpu"
        groups = [[text] for text in new] if alone else [new] if new else []
        for _ in range(self.passes(len(groups)) - len(groups) if self.passes else 0):
            self._run(model, tokens, self._packed([replace(texts[0], end=texts[0].start + 1)], tokens))
        for group in groups:
            packing = self._packed(group, tokens)
            whole = self._run(model, tokens, packing)
            if len(group) == len(texts) and not self.max_bytes:
                return self._laid_out(whole, packing.put, tokens)
            for text, parts in zip(group, zip(*(x.split([len(text) for text in group]) for x in whole))):
                found[_key(text)] = self._keep(text, parts, copied=not alone)
        rows = tuple(torch.cat(parts) for parts in zip(*(found[key] for key in keys)))
        return self._laid_out(rows, self._packed(texts, tokens).put, tokens)

    @staticmethod
    def _packed(texts: Sequence[Text], tokens: Tensor) -> Packing:
        return Packing.of(texts, *tokens.shape).to(tokens.device)

    def _laid_out(self, rows: Sequence[Tensor], put: Tensor, tokens: Tensor) -> tuple[Layers, Tensor | None]:
        """What stands beside one another in one row [T, ...] as the tokens of the batch stand."""
        batch = [x.index_select(0, put).view(*tokens.shape, -1) for x in rows]
        return self._layers(batch[0]), batch[1] if self.states else None

    def _run(self, model: PreTrainedModel, tokens: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        """Keys and values of all layers side by side [T, sum of Hkv D], hidden states [T, H] if asked for."""
        ids = tokens.flatten().index_select(0, packing.take)[None]
        context = PrefixContext(packing.position)
        with torch.no_grad(), routed(model, context):
            states = hidden_states(model, ids, packing.position, context)
        kept = sorted(context.layers.items())
        self._shapes = {layer: (key.shape[1], key.shape[3], value.shape[3]) for layer, (key, value) in kept}
        rows = torch.cat([x[0].transpose(0, 1).flatten(1) for _, pair in kept for x in pair], dim=1)
        return (rows, states[0]) if self.states else (rows,)

    def _keep(self, text: Text, parts: tuple[Tensor, ...], *, copied: bool) -> tuple[Tensor, ...]:
        size = sum(x.nbytes for x in parts)
        if text.name is None or self.bytes + size > self.max_bytes:
            return parts
        self.bytes += size
        # A part of a whole pass would keep all of that.
        self._kept[_key(text)] = tuple(x.clone() for x in parts) if copied else parts
        return self._kept[_key(text)]

    def _layers(self, rows: Tensor) -> Layers:
        """Views of keys and values [B, Hkv, N, D] by layer."""
        sizes = [n for heads, key, value in self._shapes.values() for n in (heads * key, heads * value)]
        parts = iter(rows.split(sizes, dim=-1))

        def view(heads: int, size: int) -> Tensor:
            return next(parts).unflatten(-1, (heads, size)).transpose(1, 2)

        return {layer: (view(heads, key), view(heads, value)) for layer, (heads, key, value) in self._shapes.items()}


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position: Tensor, context: AttentionContext) -> Tensor:
    """Final hidden states [B, T, H] of rows at these positions."""
    rows = {"input_ids": input_ids, "position_ids": position.long()}
    return model.base_model(**rows, use_cache=False, mtpkern=context).last_hidden_state


def shared_mask(masks: dict[int | None, Tensor], rule: Rule, window: int | None, first: int = 0) -> Tensor | None:
    """The rows from `first` on of the mask with this window, which layers share; None where a kernel needs none."""
    if rule.position.is_cuda:
        return None
    if window not in masks:
        masks[window] = span_mask(*rule, window=window)[:, first:]
    return masks[window]


def _as_attended(x: Tensor) -> Tensor:
    """In the dtype in which attention multiplies it: autocast's where that is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
