"""Pool: a decoder for a call: one that an earlier call has left with its graph, or a new one where there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.adapter import gate_of
from mtpkern.cache import KVCache
from mtpkern.decoder import Decoder, places_for
from mtpkern.graph import is_kept, kept_bytes, kept_decoder, release_graphs
from mtpkern.memory import fits_at_once, require_room
from mtpkern.strategies import Strategy
from mtpkern.verify import require_verified

# Capacities are rounded up, so that runs of similar length share their shapes.
CAPACITY_STEP = 16


@contextmanager
def decoder_for(
    model: PreTrainedModel,
    strategy: Strategy,
    stop_ids: Tensor,
    *,
    tokens: int,
    max_new_tokens: int,
    mask_token_id: int,
    use_graph: bool,
    check_model: bool,
    by_load: bool,
    prefill: Callable[[Decoder], None],
    **options: Any,
) -> Iterator[Decoder]:
    """A decoder whose prefill is queued, for a model that decodes right and where there is room for it.

    With a graph one that an earlier call has left, or that is kept for the next.
    """
    if check_model:
        # Where the model has none, any token stands for the masks of a trial.
        known = gate_of(model) is not None or mask_token_id < model.get_input_embeddings().weight.shape[0]
        require_verified(model, mask_token_id if known else 0)

    def shape(capacity: int) -> dict[str, Any]:
        return {"capacity": capacity, "mask_token_id": mask_token_id, **options}

    def make(use_graph: bool) -> Decoder:
        return Decoder(
            model,
            strategy,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            use_graph=use_graph,
            by_load=by_load,
            **shape(slots_for(tokens, use_graph)),
        )

    capacity = slots_for(tokens, use_graph)
    key = (strategy.k, strategy.verify, strategy.masks, places_for(stop_ids), *shape(capacity).values())
    if not (use_graph and is_kept(model, key)):
        scratch = strategy.masks
        require_room(model, options["batch"], tokens, scratch=scratch, kept=kept_bytes(model.device))
        use_graph = use_graph and fits_at_once(model, options["batch"], capacity, scratch=scratch)
    if not use_graph:
        decoder = make(False)
        prefill(decoder)
        yield decoder
        return

    def begin(decoder: Decoder) -> None:
        decoder.by_load = by_load
        decoder.restart(strategy, stop_ids, max_new_tokens)
        prefill(decoder)

    with kept_decoder(model, key, partial(make, True), begin) as decoder:
        yield decoder


def slots_for(tokens: int, use_graph: bool) -> int:
    """Slots for so many tokens. With a graph two sizes per octave, from 256, so that calls share theirs."""
    step = max(256, 1 << (tokens - 1).bit_length() >> 2) if use_graph else CAPACITY_STEP
    return -(-tokens // step) * step


def prefill_with_room(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    chunk: int,
    known: Callable[[KVCache], int] | None = None,
) -> None:
    """Run the prefill; where memory is short, once more without what earlier calls have kept."""
    try:
        decoder.prefill(input_ids, attention_mask, chunk=chunk, known=known)
        return
    except torch.OutOfMemoryError:
        if not release_graphs():
            raise
    # Outside of the handler, whose traceback holds on to what the first attempt has allocated.
    decoder.prefill(input_ids, attention_mask, chunk=chunk, known=known)
