"""How a model reads left-padded prompts: as they are, or packed, so that on a CPU no row of padding is computed.

A padded batch has as many rows as its longest prompt times their number, and transformers gives its attention a mask
[B, 1, T, T] for what is padding, with which a CPU computes all scores. Packed, each prompt takes what it would alone,
and all of them share each product.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.adapter import gated
from mtpkern.attention import captured, routed
from mtpkern.cache import CapturedPrefill, Prefill
from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.form import attention_dtype
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring
from mtpkern.model import cache_argument, is_tested

# Prompts are packed where so large a part of their rows would be padding: each then attends by itself, which costs
# short ones a few hundredths of a pass.
LEAST_PADDING = 0.1
# Rows that share a mask, where they need one, which is as wide as what the last of them sees.
TILE = 128


def read_prompts(
    model: PreTrainedModel,
    cache: Prefill,
    columns: Tensor,
    seen: Tensor | None,
    position: Tensor,
    end: int,
    keep: int,
    *,
    may_pack: bool,
) -> Tensor:
    """Run columns cache.seen to `end` of prompts [n, T] at position [n, T]; returns the last logits [n, keep, V].

    seen [n, T]: 0 at padding, None where there is none. Through the model's own attention; where they may be packed,
    rows of padding are many and the tests cover the model, without these and through ours.

        logits = read_prompts(model, cache, columns, seen, position, end, keep=1, may_pack=True)
    """
    if may_pack and seen is not None and is_tested(model) and are_worth_packing(seen):
        prompts = PackedPrompts(cache, seen, end)
        input_ids = prompts.rows(columns)
        with routed(model, prompts) as route, gated(model, input_ids):
            logits: Tensor = model(
                input_ids=input_ids,
                position_ids=prompts.rows(position),
                use_cache=False,
                logits_to_keep=prompts.last(keep),
                **route,
            ).logits
        return logits.view(len(columns), keep, -1)
    here = slice(cache.seen, end)
    with (
        captured(model, cache) if isinstance(cache, CapturedPrefill) else nullcontext(),
        gated(model, columns[:, here]),
    ):
        return model(  # type: ignore[no-any-return]
            input_ids=columns[:, here],
            attention_mask=None if seen is None else seen[:, :end],
            position_ids=position[:, here],
            use_cache=True,
            logits_to_keep=keep,
            **{cache_argument(model): cache},
        ).logits


def are_worth_packing(seen: Tensor) -> bool:
    """Whether prompts with padding where `seen` [n, T] is 0 go sooner without it.

    are_worth_packing(torch.tensor([[0, 0, 1], [1, 1, 1]]))  # True
    """
    return float(seen.float().mean()) <= 1 - LEAST_PADDING


class PackedPrompts:
    """Columns cache.seen to `end` of left-padded prompts, without their padding; the attention context of the pass.

    seen [n, T]: 0 at padding, 1 elsewhere.

        prompts = PackedPrompts(cache, seen, end)
        ids, positions = prompts.rows(columns), prompts.rows(position)
        with routed(model, prompts) as route:
            logits = model(input_ids=ids, position_ids=positions, logits_to_keep=prompts.last(1), **route).logits
    """

    def __init__(self, cache: Prefill, seen: Tensor, end: int) -> None:
        self.cache, self.here = cache, slice(cache.seen, end)
        self.real = seen[:, self.here].bool()
        counts = self.real.sum(1)
        self.ends = counts.cumsum(0)
        self.seq, self.slot = cache.seq.repeat_interleave(counts), self.rows(cache.slot)[0]
        # Of each prompt: its sequence, its rows, and its tokens whose keys are there, of earlier chunks or calls.
        before = seen[:, : cache.seen].sum(1)
        self.each: list[tuple[int, int, int]] = list(zip(cache.seq.tolist(), counts.tolist(), before.tolist()))

    def rows(self, x: Tensor) -> Tensor:
        """What x [n, T] tells of these columns, packed [1, R]."""
        return x[:, self.here][self.real][None]

    def last(self, n: int) -> Tensor:
        """Where the last n rows of each prompt stand [prompts * n]; of a prompt that has fewer here, any."""
        o_n = torch.arange(-n, 0, device=self.ends.device)
        return (self.ends[:, None] + o_n).clamp(min=0).flatten()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Store key and value [1, Hkv, R, D] of a layer, then attend with query [1, Hq, R, D]: [1, R, Hq, D]."""
        kv = self.cache.kv
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        self.cache.bring(layer, "calls attention")
        kv.write(layer, key, value, self.seq, self.slot)
        outs, end = [], 0
        for seq, n, before in self.each:
            first, end = end, end + n
            is_alone = not before and (scoring.window is None or scoring.window >= n)
            if is_alone and scoring.softcap is None and scoring.sinks is None:
                outs.append(_causal(query[first:end], key[first:end], value[first:end], scoring.scale))
                continue
            # In tiles, whose masks are made anew for each layer: kept, they would grow with the square of the prompt.
            k_cache, v_cache = (x[seq : seq + 1] for x in kv.layers[layer])
            for a in range(first, end, TILE):
                tile = slice(a, min(a + TILE, end))
                rows, reach = self._tile(tile), min(kv.scratch + before + tile.stop - first, kv.held)
                q, k, v = (x[tile] for x in (query, key, value))
                outs.append(decode_attention(q, k, v, k_cache, v_cache, rows, scoring, slots=reach))
        return torch.cat(outs)[None]

    def _tile(self, rows: slice) -> PackedRows:
        """Some rows of one prompt: each sees all tokens up to its own."""
        slot = self.slot[rows]
        start = torch.tensor([0, len(slot)], device=slot.device)
        return PackedRows(torch.zeros_like(slot), slot, start, len(slot), slot + 1, slot + 1, self.cache.kv.scratch)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of a prompt's rows [n, H, D] to those up to their own."""
    q, k, v = (x.transpose(0, 1)[None].to(attention_dtype(query)) for x in (query, key, value))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return o[0].transpose(0, 1).to(query.dtype)
