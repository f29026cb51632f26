"""Pool: a decoder for a call: one that an earlier call has left with its graph, or a new one where there is room.

For each model the last `KEPT` decoders with a graph stay, as long as their keys, values and tokens take no more than
`KEPT_SHARE` of the device's memory together; the graphs of a model share one pool for what a step computes in between.
All goes with the model, or at `release_graphs()`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtpkern.adapter import base_of, gate_of
from mtpkern.baked import fingerprint
from mtpkern.decoder import Decoder, places_for
from mtpkern.kernels.form import autocast_of
from mtpkern.memory import fits_at_once, require_room
from mtpkern.model import models_of
from mtpkern.packed import unpack
from mtpkern.products import separate
from mtpkern.recordings import forget
from mtpkern.strategies import Strategy
from mtpkern.verify import require_verified

# Capacities are rounded up, so that runs of similar length share their shapes.
CAPACITY_STEP = 16
# Decoders that stay for each model, and the share of the device's memory that their state may take.
KEPT = 8
KEPT_SHARE = 0.2

# What each model has kept, the last used at the end.
_kept: WeakKeyDictionary[PreTrainedModel, OrderedDict[Hashable, Decoder]] = WeakKeyDictionary()


@contextmanager
def decoder_for(
    model: PreTrainedModel,
    strategy: Strategy,
    stop_ids: Tensor,
    *,
    tokens: int,
    max_new_tokens: int,
    use_graph: bool,
    check_model: bool,
    by_load: bool,
    prefill: Callable[[Decoder], None],
    **options: Any,
) -> Iterator[Decoder]:
    """A decoder whose prefill is queued, for a model that decodes right and where there is room for it.

    With a graph one that an earlier call has left, or that is kept for the next, unless its run raises an error. The
    caller holds the model (see `exclusive`).
    """
    if model.device.type != "cpu":
        # What it has left on the host, from where it has moved.
        unpack(model)
        forget(model)
    if check_model:
        # Where the model has none, any token stands for the masks of a trial.
        mask = options["mask_token_id"]
        known = gate_of(model) is not None or mask < model.get_input_embeddings().weight.shape[0]
        require_verified(model, mask if known else 0)
    capacity = slots_for(tokens, use_graph)
    terms = places_for(len(stop_ids)), capacity, autocast_of(model.device)
    key = (strategy.k, strategy.verify, strategy.masks, *terms, *options.values())
    if not (use_graph and key in _kept.get(model, ())):
        batch, scratch = options["batch"], strategy.masks
        require_room(model, batch, tokens, scratch=scratch, kept=kept_bytes(model.device))
        use_graph = use_graph and fits_at_once(model, batch, capacity, scratch=scratch)

    def make() -> Decoder:
        capacity = slots_for(tokens, use_graph)
        of_run: dict[str, Any] = {"stop_ids": stop_ids, "max_new_tokens": max_new_tokens, "by_load": by_load}
        return Decoder(model, strategy, capacity=capacity, use_graph=use_graph, **of_run, **options)

    def begin(decoder: Decoder) -> None:
        decoder.by_load = by_load
        decoder.restart(strategy, stop_ids, max_new_tokens, options["choosing"])
        prefill(decoder)

    if not use_graph:
        decoder = make()
        try:
            prefill(decoder)
            yield decoder
        finally:
            # Whoever keeps an error of the run keeps all its functions held, this decoder too.
            decoder.cache.layers.clear()
        return
    kept = _kept.setdefault(model, OrderedDict())
    found = kept.pop(key, None)
    try:
        found = _begun(model, kept, found, begin)
        if found is None:
            found = make()
            assert found.graph is not None
            graphs = [other.graph for other in list(kept.values()) if other.graph is not None]
            found.graph.beside = next((step for graph in graphs for step in graph.captured.values()), None)
            begin(found)
        yield found
    except BaseException:
        if found is not None:
            found.cache.layers.clear()  # likewise
        raise
    if found.fingerprint is None:
        # Now, because a model's first forward may change it.
        found.fingerprint = fingerprint(model)
    found.leave()
    kept[key] = found
    room = KEPT_SHARE * memory_of(found.device)
    while len(kept) > KEPT or (len(kept) > 1 and sum(d.nbytes for d in list(kept.values())) > room):
        kept.popitem(last=False)


def _begun(
    model: PreTrainedModel,
    kept: OrderedDict[Hashable, Decoder],
    decoder: Decoder | None,
    begin: Callable[[Decoder], object],
) -> Decoder | None:
    """An earlier call's decoder once its next run has begun; None where there is none that the model still is that of.

    What it has baked in is compared behind the prefill, while the device is at work; where the model has changed since,
    all that was captured before is dropped.
    """
    if decoder is not None:
        decoder.enter(model)
        try:
            begin(decoder)
        except Exception:  # of buffers that no longer fit the model, perhaps
            if decoder.fingerprint == fingerprint(model):
                raise
    now = fingerprint(model)
    for stale in [k for k, other in list(kept.items()) if other.fingerprint != now]:
        kept.pop(stale, None)
    return None if decoder is None or decoder.fingerprint != now else decoder


def _of_all() -> list[OrderedDict[Hashable, Decoder]]:
    """What each model has kept."""
    return [kept for model in models_of(_kept) if (kept := _kept.get(model)) is not None]


def kept_bytes(device: torch.device) -> int:
    """Bytes of keys, values and tokens that earlier calls have left on a device, of all models."""
    return sum(d.nbytes for kept in _of_all() for d in list(kept.values()) if d.device == device)


def release_graphs(model: nn.Module | None = None) -> int:
    """Drop the CUDA graphs and KV buffers that earlier calls of `generate` have kept, of one model or of all.

    A PeftModel stands for the model in it.

    Weights that a pass has moved together (mtpkern.products) are apart again, but of a model that a call is running; on
    a CPU the copies that passes of few rows read (mtpkern.packed) and recorded passes (mtpkern.recordings) go as well.
    Returns how many sets of buffers were dropped. The memory goes back to torch, which returns it to the device at
    `torch.cuda.empty_cache()`. The next call captures anew.

    Call it before torch.save, which would write with a weight all that lies with it, and before accelerate's
    save_model, save_state and load_state, which would leave weights out, or refuse; `save_pretrained` needs none of it.

        mtpkern.release_graphs(model)
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model, or None for all of them, got {type(model).__name__}")
    model = None if model is None else base_of(model)
    dropped = 0
    for kept in _of_all() if model is None else [_kept.get(model, OrderedDict())]:
        dropped += len(kept)
        kept.clear()
    separate(model)
    unpack(model)
    forget(model)
    return dropped


@cache
def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


def slots_for(tokens: int, use_graph: bool) -> int:
    """Slots for so many tokens. With a graph two sizes per octave, from 256, so that calls share theirs."""
    step = max(256, 1 << (tokens - 1).bit_length() >> 2) if use_graph else CAPACITY_STEP
    return -(-tokens // step) * step


def prefill_with_room(decoder: Decoder, **prompts: Any) -> None:
    """Run `decoder.prefill(**prompts)`; where memory is short, once more without what earlier calls have kept."""
    try:
        decoder.prefill(**prompts)
        return
    except torch.OutOfMemoryError:
        if not release_graphs():
            raise
    # Outside of the handler, whose traceback holds on to what the first attempt has allocated.
    decoder.prefill(**prompts)
