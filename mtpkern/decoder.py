"""Decoder: the device state of one decoding run, and its step.

A step is one call of the unmodified model on R packed rows, then `readout`, then `advance`. Every tensor keeps its
address from step to step, and nothing in a step waits for the host or depends on what it knows.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.attention import AttentionContext
from mtpkern.cache import KVCache, PrefillCache
from mtpkern.kernels.advance import RUNNING, Rows, Sequences, advance
from mtpkern.kernels.readout import readout
from mtpkern.strategies import Strategy

# Up to this many rows a pass is bound by reading the weights, so that rows are nearly free; on a CPU each row costs.
FREE_ROWS = 192
FREE_ROWS_CPU = 16
# Slots that attention reads are rounded up to whole vectors.
SLOT_STEP = 16
# How many steps the host runs ahead of what it knows: enough to keep a GPU fed, few enough to waste.
LAG = 3


def default_rows(strategy: Strategy, batch: int, device: torch.device) -> int:
    """Rows of a pass, from B * k to B * (2k - 1), which gives every sequence all its masks.

    Without verification a sequence must have all its masks, or what it emits would depend on its neighbours. Verified
    emits the same with fewer, and gets them while rows are nearly free.
    """
    most = batch * (2 * strategy.k - 1)
    free = FREE_ROWS_CPU if device.type == "cpu" else FREE_ROWS
    return min(most, max(batch * strategy.k, free)) if strategy.verify else most


class Decoder:
    """Decodes B sequences side by side, each at its own pace.

        decoder = Decoder(model, strategy, mask_token_id=m, stop_ids=stops, batch=2, capacity=256, max_new_tokens=64)
        decoder.prefill(input_ids, attention_mask)
        with attention_context(model, decoder.cache) as route:
            decoder.run(route)
        decoder.sequences.tokens, decoder.sequences.length    # the result, on the device

    capacity is the longest prompt + max_new_tokens or more; stop_ids [S] int64; rows is the row budget R of a step,
    from batch * k up.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: Strategy,
        *,
        mask_token_id: int,
        stop_ids: Tensor,
        batch: int,
        capacity: int,
        max_new_tokens: int,
        rows: int | None = None,
    ) -> None:
        device = model.device
        if rows is None:
            rows = default_rows(strategy, batch, device)
        if rows < batch * strategy.k:
            raise ValueError(
                f"rows must be at least batch * k = {batch} * {strategy.k} = {batch * strategy.k}, got {rows}: "
                "fewer could not hold every sequence's pending tokens; raise rows or lower k"
            )
        self.model = model
        self.strategy = strategy
        self.mask_token_id = mask_token_id
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids.to(device)
        self.threshold = torch.tensor(strategy.threshold, device=device)
        self.sequences = Sequences.allocate(batch, capacity, max_new_tokens, device)
        # The rows of this pass, and those that the next is planned in: the same, or the first of them.
        self.rows = self.plan = Rows.allocate(rows, batch, device)
        self.most_rows = rows
        self.cache = KVCache(capacity, self.rows, max_rows=2 * strategy.k - 1)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the left-padded prompts [B, T] with k - 1 masks behind them and take in their first predictions.

        Uses the model's own attention. Returns the logits [B * k, V] that were read out.
        """
        B, T = input_ids.shape
        k, capacity = self.strategy.k, self.cache.capacity
        masks = input_ids.new_full((B, k - 1), self.mask_token_id)
        real = input_ids.new_ones(B, T) if attention_mask is None else attention_mask.long()
        seen = torch.cat([real, torch.ones_like(masks)], dim=1)
        position = (seen.cumsum(1) - 1).clamp(min=0)
        slot = torch.where((seen == 1) & (position < capacity), position, capacity)

        sequences = self.sequences
        sequences.tokens.scatter_(1, slot[:, :T], input_ids)
        sequences.length.copy_(real.sum(1))
        sequences.limit.copy_(sequences.length + self.max_new_tokens)
        # To `advance` the last prompt token is the one pending token, and this pass is like any other.
        sequences.pending.fill_(1)
        self.rows.start.copy_(torch.arange(B + 1, device=input_ids.device) * k)

        logits = self.model(
            input_ids=torch.cat([input_ids, masks], dim=1),
            attention_mask=None if attention_mask is None else seen,
            position_ids=position,
            past_key_values=PrefillCache(self.cache, slot),
            use_cache=True,
            logits_to_keep=k,
        ).logits
        return self._take_in(logits[:, -k:].flatten(0, 1))

    @torch.inference_mode()
    def step(self, route: dict[str, AttentionContext]) -> Tensor:
        """One pass over the planned rows, inside `attention_context`; returns the rows' logits [R, V]."""
        self.cache.memo.clear()
        logits = self.model(
            input_ids=self.rows.token[None],
            position_ids=self.rows.position[None],
            past_key_values=None,
            use_cache=False,
            **route,
        ).logits
        return self._take_in(logits[0])

    def _take_in(self, logits: Tensor) -> Tensor:
        token, confidence = readout(logits, self.mask_token_id)
        advance(
            self.sequences,
            self.plan,
            token,
            confidence,
            self.threshold,
            self.stop_ids,
            k=self.strategy.k,
            verify=self.strategy.verify,
            mask_token_id=self.mask_token_id,
        )
        self.rows = self.cache.rows = self.plan
        return logits

    def run(self, route: dict[str, AttentionContext]) -> None:
        """Step until every sequence is done, at most max_new_tokens passes in all."""
        poll = _Poll(self.sequences.status)
        for _ in range(self.max_new_tokens - 1):
            running = poll.running()
            if not running:
                break
            if poll.on_cpu:
                self._fit(running)
            self.step(route)
            self.require_all_layers()

    def _fit(self, running: int) -> None:
        """On a CPU, where rows and slots cost and the state is known: bring what the running sequences need, no more.

        As sequences finish, the row budget of the next pass shrinks in proportion. Attention reads the slots that hold
        something, and spreads the sequences to the most rows that one of them has.
        """
        length, start, cache = self.sequences.length, self.rows.start, self.cache
        cache.slots = min(cache.capacity, -(-(int(length.max()) + self.strategy.k - 1) // SLOT_STEP) * SLOT_STEP)
        cache.max_rows = int(start.diff().max())
        share = -(-self.most_rows * running // len(length))
        self.plan = self.rows.first(max(share, min(FREE_ROWS_CPU, self.most_rows)))

    def require_all_layers(self) -> None:
        """Raise ValueError where a layer that cached keys did not come to our attention function in a step."""
        missed = sorted(self.cache.layers.keys() - self.cache.attended)
        if missed:
            raise ValueError(
                f"{type(self.model).__name__}: attention layers {missed} cached keys during the prefill but did not "
                "call the attention interface in a decoding step; this architecture cannot be decoded by mtpkern"
            )


class _Poll:
    """Watches `status` [B] through copies that the device makes when it gets there; the host reads them late.

    On a CPU the copy is there at once.
    """

    def __init__(self, status: Tensor) -> None:
        self.status = status
        self.on_cpu = status.device.type == "cpu"
        self.copies: deque[tuple[Tensor, torch.Event]] = deque()

    def running(self) -> int:
        """How many sequences were running a few steps ago (on a CPU: are running now)."""
        if self.on_cpu:
            return int((self.status == RUNNING).sum())
        copy = torch.empty_like(self.status, device="cpu", pin_memory=True)
        copy.copy_(self.status, non_blocking=True)
        event = torch.Event(self.status.device)
        event.record()
        self.copies.append((copy, event))
        if len(self.copies) <= LAG:
            return len(copy)
        copy, event = self.copies.popleft()
        event.synchronize()
        return int((copy == RUNNING).sum())
