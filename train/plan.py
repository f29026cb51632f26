"""Plan: the layout of a batch in training, and which of its rows count, as the options say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtpkern.train.config import MTPConfig
from mtpkern.train.layout import answer_ends, build_layout, draw_within, pack, tokens_apart


def planned(
    args: MTPConfig,
    batch: dict[str, Any],
    *,
    k: int,
    step: int,
    micro_step: int,
    draw: Callable[..., Tensor] = draw_within,
) -> dict[str, Any]:
    """A batch of `MTPCollator` with its layout: a pure function of where its answers lie, the seed, the step, the rank.

    Returns input_ids [B, N], layout, texts (how many there are), prefix_rows and anchor_rows [B, N] bool.

        planned(MTPConfig("out", k_max=4), batch, k=4, step=0, micro_step=0)["layout"]
    """
    tokens = batch["input_ids"]
    lengths, prompts = (torch.as_tensor(batch[name], device="cpu") for name in ("lengths", "prompt_lengths"))
    limit = args.max_length or tokens.shape[1]
    # At most; with the paper's layout, whose rows are as many whatever is in them, of every text.
    most, apart = args.spans_of(limit), None
    if args.layout == "paper":
        if not args.response_only:
            apart = tokens_apart(limit, most, k)
        limit -= most * (k - 1)
    tokens = tokens[:, :limit]
    lengths = lengths.clamp(max=limit)
    end = answer_ends(lengths, prompts, batch["earlier_answers"], num_tokens=tokens.shape[1])
    whole = answer_ends(lengths, torch.zeros_like(lengths), (), num_tokens=tokens.shape[1])
    anchor_rows = _rows_before(end)
    prefix_rows = _rows_before(whole) if args.prefix_scope == "all" else anchor_rows
    if not args.response_only:
        end = whole
    num_spans: int | Tensor = most
    if args.layout != "paper":
        by_length = torch.tensor([args.spans_of(n) for n in lengths.tolist()])
        num_spans = torch.minimum(by_length, (end > 0).sum(1)).clamp(min=1)
    prefix = draw(
        end > 0,
        k,
        num_spans,
        spacing=args.spacing,  # type: ignore[arg-type]
        apart=apart,
        offset=args.span_offset,
        offset_scope=args.offset_scope,
        seed=args.seed,
        step=step,
        micro_step=micro_step,
        rank=args.process_index,
    )
    layout = build_layout(
        prefix,
        lengths,
        k,
        num_tokens=tokens.shape[1],
        end=end.gather(1, prefix),
        mask_rows=most * (args.k_max - 1 + args.bidirectional) if args.static_shape else None,
        bidirectional=args.bidirectional,
    )
    if args.packing:
        layout, (tokens, prefix_rows, anchor_rows) = pack(layout, tokens, prefix_rows, anchor_rows)
    rows = {"prefix_rows": prefix_rows, "anchor_rows": anchor_rows}
    return {"input_ids": tokens, "layout": layout, "texts": len(lengths), **rows}


def _rows_before(end: Tensor) -> Tensor:
    """[B, N] bool: the rows that predict the tokens of `answer_ends`, each the row before its token."""
    return torch.cat([end[:, 1:] > 0, end.new_zeros(len(end), 1, dtype=torch.bool)], dim=1)
