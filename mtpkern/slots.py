"""Slots: prompts that enter a decoder's sequences one by one, while the others go on.

A prompt enters in three steps, all queued between two passes and none of them waiting for the device:

    keys     of tokens that another slot holds already are copied
    prefill  of the others but the last, through the model's own attention, chunk by chunk
    state    one pending token, the prompt's last, and the next pass planned anew

To the next pass a newcomer is a sequence like any other: its one pending token, with masks behind it. So what it emits,
pass by pass, is what it would emit alone. Nothing moves: a captured step replays over the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtpkern.decoder import Decoder
from mtpkern.kernels.state import LIMIT, RUNNING


@dataclass(frozen=True)
class Newcomer:
    """A prompt [T] int64 on its way into a slot, to end at `limit` tokens.

    number: the caller's own. source: the slot that holds its first `shared` tokens' keys, at most T - 1; it may be the
    slot itself. dirty: whether the slot may hold keys that are not finite.
    """

    slot: int
    number: int
    prompt: np.ndarray
    limit: int
    source: int = 0
    shared: int = 0
    dirty: bool = False

    @property
    def prefilled(self) -> int:
        """Tokens whose keys are made before its first pass. One at least, as that is what makes buffers."""
        return max(1, len(self.prompt) - 1)


def vacate(decoder: Decoder) -> None:
    """Leave all slots of a new or restarted decoder empty: none of them runs."""
    decoder.sequences.status.fill_(LIMIT)
    decoder.all_rows.start.zero_()


@torch.inference_mode()
def enter(decoder: Decoder, newcomers: Sequence[Newcomer], owner: Tensor, *, chunk: int) -> Iterator[None]:
    """Put prompts into their slots; at the end the next pass has them. Yields between chunks, for passes of the others.

    owner [B] int64 gets their numbers together with the state. chunk: most prompt tokens that the model sees at once,
    over all of them. The model must not be routed. A slot that is a source must not run into another's keys meanwhile:
    copies are made at once, before the first yield.
    """
    cache, device = decoder.cache, decoder.device
    decoder.make_room(max(len(x.prompt) for x in newcomers))
    for x in newcomers:
        if x.dirty:
            # A value that is not finite is seen through any mask, as 0 * NaN.
            cache.clear(x.slot)
    cache.copy_prefixes([(x.source, x.slot, x.shared) for x in newcomers if x.shared and x.source != x.slot])

    # Columns as of left-padded prompts. Those that every newcomer has keys of are not run.
    n, width = len(newcomers), max(x.prefilled for x in newcomers)
    first = width - max(x.prefilled - x.shared for x in newcomers)
    ids, position = np.zeros((2, n, width), dtype=np.int64)
    place = np.full((n, width), cache.capacity)  # padding goes to the trash
    for i, x in enumerate(newcomers):
        here = slice(width - x.prefilled, None)
        ids[i, here] = x.prompt[: x.prefilled]
        position[i, here] = np.arange(x.prefilled)
        place[i, here] = cache.scratch + position[i, here]
    padded = any(x.prefilled < width for x in newcomers)
    seq, slot, columns, told = (_on(device, x) for x in (np.array([x.slot for x in newcomers]), place, ids, position))
    seen = _on(device, (place < cache.capacity).astype(np.int64)) if padded else None
    prefill = decoder.prefill_cache(slot, seq)
    prefill.seen = first
    step = max(1, chunk // n)
    for end in range(first + step, width + step, step):
        decoder.prefill_chunk(prefill, columns, seen, told, min(end, width))
        if end < width:
            yield
    cache.require_cached(decoder.model.config)
    _begin(decoder, newcomers, seq, owner)


def _begin(decoder: Decoder, newcomers: Sequence[Newcomer], seq: Tensor, owner: Tensor) -> None:
    sequences, width = decoder.sequences, max(len(x.prompt) for x in newcomers)
    tokens = np.zeros((len(newcomers), width), dtype=np.int64)
    for i, x in enumerate(newcomers):
        tokens[i, : len(x.prompt)] = x.prompt
    facts = _on(decoder.device, np.array([(len(x.prompt), x.limit, x.number) for x in newcomers]).T.copy())
    sequences.tokens[seq, :width] = _on(decoder.device, tokens)
    sequences.length[seq], sequences.limit[seq], owner[seq] = facts
    # As all begin: nothing emitted, nothing known.
    for count in (sequences.passes, sequences.hits, sequences.chains, sequences.blocks):
        count.index_fill_(0, seq, 0)
    sequences.pending.index_fill_(0, seq, 1)
    sequences.status.index_fill_(0, seq, RUNNING)
    decoder.plan()


def _on(device: torch.device, x: np.ndarray) -> Tensor:
    """A copy on the device, which nobody waits for."""
    here = torch.from_numpy(x)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
