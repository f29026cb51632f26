"""Decoder: the device state of one decoding run, and its step.

A step is one call of the unmodified model on R packed rows, then `readout`, then `advance`. Every tensor keeps its
address from step to step and from run to run, and nothing in a step waits for the host or depends on what it knows: so
on a GPU the whole step is one CUDA graph (mtpkern.graph).

Where the host waits for the device in a run on a GPU: before the passes, where transformers looks whether padded
prompts need a mask and where a PrefixCache looks at the weights; between passes, for the poll's event a step behind,
for the capture of a new graph, and without a graph each time the buffers may have filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.adapter import base_alone, gated
from mtpkern.attention import AttentionContext, unrouted
from mtpkern.cache import CapturedPrefill, KVCache, Prefill, PrefillCache
from mtpkern.choosing import Choice, Choosing
from mtpkern.graph import StepGraph, wants_graph
from mtpkern.kernels.advance import advance
from mtpkern.kernels.plan import plan
from mtpkern.kernels.readout import readout
from mtpkern.kernels.state import Rows, Sequences, Terms
from mtpkern.layers import CompiledLayers
from mtpkern.load import Ladder, Load, default_rows, times_of
from mtpkern.loop import run
from mtpkern.model import has_latent_attention, learned_positions
from mtpkern.packed import PackedProducts, packs
from mtpkern.parallel import agree
from mtpkern.poll import OddsPoll, Poll, TimedPoll
from mtpkern.products import Products, few_rows, wants_one_product
from mtpkern.prompt_rows import PROMPT_ROWS, PromptRows, ReadingCost, Reads
from mtpkern.prompts import read_prompts
from mtpkern.recordings import Recordings
from mtpkern.strategies import Strategy

# Slots for new tokens that are there from the start, where the buffers may grow.
FIRST_SLOTS = 512
# Tokens of a prefill pass, over the whole batch: enough to keep a GPU busy, few enough for its memory.
PREFILL_CHUNK = 8192


def places_for(stops: int) -> int:
    """How many stop tokens a decoder has room for: the next multiple of four, so that few and fewer share a graph."""
    return -(-stops // 4) * 4


class Decoder:
    """Decodes B sequences side by side, each at its own pace; `restart` prepares for another run of the same shape.

        decoder = Decoder(model, strategy, mask_token_id=m, stop_ids=stops, batch=2, capacity=256, max_new_tokens=64)
        decoder.prefill(input_ids, attention_mask)
        with attention_context(model, decoder.cache) as route:
            decoder.run(route)
        decoder.sequences.tokens, decoder.sequences.length    # the result, on the device

    capacity: tokens, the longest prompt + max_new_tokens or more. stop_ids: [S] int64, of all to begin with.
    rows: the row budget R of a step, from batch * k up, with verification from batch up; in a graph with by_load the
        most that a pass may have.
    by_load: sequences bring no more rows than are worth their time (mtpkern.load), with verification only, whose output
        does not depend on it.
    threshold_by_load: on a CPU, how sure their drafts are to be follows from it as well.
    use_graph: capture the step in a CUDA graph; None does where there is a CUDA device.
    compile: send the model's layers through `torch.compile`, for passes alone (mtpkern.layers).
    batch_invariant: no bit of the attention depends on what else is in the batch (`decode_attention`); the model's
        matrix products still depend on the number of rows.
    choosing: what stands between the model's logits and the tokens (mtpkern.choosing); None: the argmax.
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
        use_graph: bool | None = None,
        compile: bool = False,
        batch_invariant: bool = False,
        by_load: bool = False,
        threshold_by_load: bool = False,
        choosing: Choosing | None = None,
    ) -> None:
        device = model.device
        if rows is None:
            rows = default_rows(strategy, batch, device)
        least = batch if strategy.verify else batch * strategy.k
        if rows < least:
            product = f"batch = {batch}" if strategy.verify else f"batch * k = {batch} * {strategy.k} = {least}"
            raise ValueError(
                f"rows must be at least {product}, got {rows}: fewer could not hold every sequence's pending tokens; "
                f"raise rows{'' if strategy.verify else ' or lower k'}"
            )
        # No pass has a use for more.
        rows = min(rows, batch * strategy.most_rows)
        self.model = model
        self.device = device
        self.mask_token_id = mask_token_id
        # A pass emits at least one token, so capacity bounds the passes of any run.
        self.sequences = Sequences.allocate(batch, capacity, capacity, device)
        # All that a pass is planned in; see `rows`.
        self.all_rows = Rows.allocate(rows, batch, device, strategy.k)
        self.graph = StepGraph(device) if wants_graph(use_graph, device) else None
        self.compile = compile
        self.products: Products | PackedProducts = PackedProducts()
        if not (self.on_cpu and packs(model, max_new_tokens)):
            in_graph = self.graph is not None
            self.products = Products(wants_one_product(in_graph), few_rows(in_graph, device))
        self.cache = KVCache(
            strategy.masks + capacity,
            self.all_rows,
            strategy.most_rows,
            held=None if self.graph else strategy.masks + capacity - max_new_tokens + 2 * strategy.k + FIRST_SLOTS,
            scratch=strategy.masks,
            batch_invariant=batch_invariant,
            model_name=type(model).__name__,
        )
        # A bound on the slots in use, where the host knows no better.
        self._reach = strategy.masks + capacity - max_new_tokens
        # Masks may stand behind the last position that a model has learned; what they predict is never emitted.
        learned = learned_positions(model, needed=capacity + 2 * strategy.k)
        self.last_position = None if learned is None else learned - 1
        self.terms = Terms.allocate(places_for(len(stop_ids)), batch, device, budget=rows if self.graph else None)
        self.choice = None
        if choosing is not None:
            self.choice = Choice(choosing, strategy, self.sequences, self.terms, mask_token_id)
        self.by_load, self.threshold_by_load = by_load, threshold_by_load
        # These live as long as the graphs do.
        self.ladder = Ladder(batch, rows, strategy.k, strategy.masks)
        self.reading_cost = ReadingCost()
        self.fingerprint: tuple[Any, ...] | None = None
        self._layers: CompiledLayers | None = None
        self.recordings: Recordings | None = None
        self._begin(strategy, stop_ids, max_new_tokens)

    @property
    def on_cpu(self) -> bool:
        """Whether the host knows the state, and passes may have any number of rows."""
        return self.device.type == "cpu" and self.graph is None and not self.compile

    @property
    def rows(self) -> Rows:
        """The rows of the next pass: all, or the first of them, as many as it needs or its graph has."""
        return self.cache.rows

    @cached_property
    def prompt_rows(self) -> PromptRows:
        """Those in which passes read prompts besides."""
        sizes = {"batch": len(self.sequences.status), "k": self.strategy.k}
        read = torch.promote_types(self.model.dtype, torch.float32)
        return PromptRows(max(PROMPT_ROWS, self.strategy.k), **sizes, dtype=read, device=self.device)

    @property
    def predictions(self) -> int:
        """How many a prompt makes in its prefill: k, or on a CPU, by load, as many as are worth their time."""
        return self.strategy.k if self.load is None else self.load.predictions(float(self.terms.price))

    @property
    def nbytes(self) -> int:
        """Bytes of the state: keys, values, tokens. What a captured graph computes in between comes on top."""
        return self.cache.nbytes + sum(x.nbytes for x in vars(self.sequences).values())

    def leave(self) -> None:
        """Let the model go, or what is kept would keep its model; `enter` takes it up again, on whatever stream."""
        if self.graph is not None:
            self.graph.idle.record()
        self._layers = None
        del self.model

    def enter(self, model: PreTrainedModel) -> None:
        """Take the model up again that it has left."""
        if self.graph is not None:
            self.graph.idle.wait()
        self.model = model

    @torch.inference_mode()
    def restart(
        self, strategy: Strategy, stop_ids: Tensor, max_new_tokens: int, choosing: Choosing | None = None
    ) -> None:
        """Forget the last run, in place. What the step has baked in, k, verify and masks, must be as before.

        choosing: as before, but for the numbers of its settings.
        """
        assert all(getattr(strategy, name) == getattr(self.strategy, name) for name in ("k", "verify", "masks"))
        for x in (*vars(self.sequences).values(), *vars(self.all_rows).values()):
            x.zero_()
        self.cache.clear()
        self.cache.rows, self.cache.max_rows, self.cache.slots = self.all_rows, strategy.most_rows, self.cache.capacity
        if self.choice is not None and choosing is not None:
            self.choice.choosing = choosing  # with numbers of its own
        self._begin(strategy, stop_ids, max_new_tokens)

    def _begin(self, strategy: Strategy, stop_ids: Tensor, max_new_tokens: int) -> None:
        self.strategy = strategy
        self.planning: dict[str, Any] = {name: getattr(strategy, name) for name in ("k", "verify", "masks")}
        self.planning["mask_token_id"] = self.mask_token_id
        self.max_new_tokens = max_new_tokens
        self.max_passes = max_new_tokens - 1
        self.terms.threshold.fill_(strategy.threshold)
        self.terms.stop_ids.fill_(-1)
        self.terms.stop_ids[:, : len(stop_ids)] = stop_ids.to(self.device)
        self.terms.price.zero_()
        if self.terms.budget is not None:
            self.terms.budget.fill_(len(self.all_rows.seq))
        # Whether the pass is known to have no masks, so that a gated adapter has nothing to do in it.
        self.maskless = False
        # Whether the next pass is to read what the prompt rows have been brought.
        self.reading = False
        self.load = None
        if self.by_load and self.on_cpu:
            times = times_of(self.model, isinstance(self.products, PackedProducts))
            self.load = Load(times, strategy.k, len(self.all_rows.seq), strategy.masks)
            self.tell(self.load)

    def tell(self, load: Load) -> None:
        """Set the price, and the threshold where that is by load too, for what the next pass plans."""
        self.terms.price.fill_(load.price(self.sequences))
        if self.threshold_by_load:
            self.terms.threshold.fill_(load.threshold)

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        chunk: int = PREFILL_CHUNK,
        known: Callable[[KVCache], int] | None = None,
    ) -> Tensor:
        """Run the left-padded prompts [B, T] with masks behind them and take in their first predictions.

        Runs the model on at most `chunk` tokens of all prompts together at a time. known(cache) stores
        keys that are there already, and returns the first column that has to run. Returns the logits [B * k, V], k the
        number of `predictions`.
        """
        B, T = input_ids.shape
        k, scratch, capacity = self.predictions, self.cache.scratch, self.cache.capacity - self.cache.scratch
        masks = input_ids.new_full((B, k - 1), self.mask_token_id)
        real = input_ids.new_ones(B, T) if attention_mask is None else attention_mask.long()
        seen = torch.cat([real, torch.ones_like(masks)], dim=1)
        position = (seen.cumsum(1) - 1).clamp(min=0)
        place = torch.where((seen == 1) & (position < capacity), position, capacity)

        sequences = self.sequences
        sequences.tokens.scatter_(1, place[:, :T], input_ids)
        sequences.length.copy_(real.sum(1))
        sequences.limit.copy_(sequences.length + self.max_new_tokens)
        told = position if self.last_position is None else position.clamp(max=self.last_position)
        # To `advance` the last prompt token is the one pending token, and this pass is like any other.
        sequences.pending.fill_(1)
        self.rows.expect_prefill(k)

        columns, slot = torch.cat([input_ids, masks], dim=1), scratch + place
        mask = None if attention_mask is None else seen
        if mask is not None and self.on_cpu:
            T = int(sequences.length.max())  # in front of them stands padding alone
            columns, slot, mask, told = (x[:, 1 - k - T :] for x in (columns, slot, mask, told))
        cache = self.prefill_cache(slot)
        cache.seen = 0 if known is None else known(self.cache)
        n = max(1, chunk // B)
        for end in [*range(cache.seen + n, T, n), T + k - 1]:
            logits = self.prefill_chunk(cache, columns, mask, told, end, keep=k if end >= T else 1)
        self.cache.require_cached(self.model.config)
        places = None
        if self.choice is not None:
            places = self.choice.begin(input_ids, real, self.max_new_tokens, k)
            agree(self.model, self.choice.key)
        return self._take_in(logits[:, -k:].flatten(0, 1), places)

    def prefill_cache(self, slot: Tensor, seq: Tensor | None = None) -> Prefill:
        """What the model is given as its cache where it reads prompts whose columns belong in slot [n, T]."""
        return (CapturedPrefill if has_latent_attention(self.model) else PrefillCache)(self.cache, slot, seq)

    @torch.inference_mode()
    def prefill_chunk(
        self, cache: Prefill, columns: Tensor, seen: Tensor | None, position: Tensor, end: int, *, keep: int = 1
    ) -> Tensor:
        """Run the columns [n, T] of prompts, those from `cache.seen` to `end`.

        seen [n, T]: 0 at padding, None where there is none. Through the model's own attention, but on a CPU, where rows
        of padding are many, without these (mtpkern.prompts). Returns the logits [n, keep, V] of the last, or more.
        """
        with self.products.sought(self.model):
            logits = read_prompts(self.model, cache, columns, seen, position, end, keep, may_pack=self.on_cpu)
        cache.next_chunk(end)
        return logits

    def reads_beside(self, rows: int, *, alone: bool) -> bool:
        """Whether prompts of so many rows in all are read in passes; else apart, the model being theirs alone.

        By load, with a graph: as soon as what they have taken apart comes to what the first graph took to make. alone:
        whether there is nobody whom they would keep waiting.
        """
        if self.graph is None or not self.by_load:
            return False
        passes = -(-rows // len(self.prompt_rows))
        return self.reading_cost.is_met(self.graph, len(self.all_rows.seq), passes, alone=alone)

    def replay(self, route: dict[str, AttentionContext], rows: int) -> None:
        """A pass of so many rows, that reads prompts besides where it is to."""
        assert self.graph is not None
        if not self.reading:
            return self.graph(partial(self.step, route), rows)
        wider = self.reading_cost.rung(self.graph, self.ladder, rows)
        if wider != rows:
            self.take(wider)
        self.maskless = False  # there are masks behind prompts
        self.graph(partial(self._step_beside, route), Reads(wider))
        self.reading = False

    @torch.inference_mode()
    def step(self, route: dict[str, AttentionContext]) -> Tensor:
        """One pass over the planned rows, inside `attention_context`; returns their logits [R, V], until the next."""
        self.cache.memo.clear()
        live = partial(self._run_model, route)
        if self.recordings is not None and self.cache.proven:
            logits = self.recordings(self.model, live, self._owners(), *self.inputs, self.maskless)
        else:
            logits = live(*self.inputs)
        return self._take_in(logits)

    @torch.inference_mode()
    def _step_beside(self, route: dict[str, AttentionContext]) -> Tensor:
        """As `step`, over the prompt rows besides, which keep what their last have read."""
        beside, R = self.prompt_rows, len(self.rows.seq)
        self.cache.memo.clear()
        self.cache.beside = beside.packed(self.cache.scratch)
        try:
            own = beside.token[None], beside.position[None]
            logits = self._run_model(route, *(torch.cat(pair, dim=1) for pair in zip(self.inputs, own)))
        finally:
            self.cache.beside = None
        beside.keep(*self.read(beside.tails(logits[R:]), beside.tail_seq, beside.tail_position, beside.tail_start))
        return self._take_in(logits[:R])

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Tokens and positions [1, R] of the packed rows; the model is told of none behind its last, if any."""
        position = self.rows.position[None]
        told = position if self.last_position is None else position.clamp(max=self.last_position)
        return self.rows.token[None], told

    def _owners(self) -> list[Any]:
        """The objects that a recorded pass calls and that each run has anew: a replay is handed those of its run."""
        updates = self.products.updates() if isinstance(self.products, PackedProducts) else []
        return [self.cache, *updates]

    def _run_model(self, route: dict[str, AttentionContext], input_ids: Tensor, position: Tensor) -> Tensor:
        """Logits [R, V] of packed rows [1, R]."""
        if self.cache.proven:
            with self._compiled(), self.products():
                return self._forward(route, input_ids, position)
        # A first pass runs uncompiled: it notes which layers attend, and says plainly what is wrong with a model. Its
        # products are those of all passes on a CPU, so that its bits do not depend on what earlier runs have shown.
        self.cache.attended.clear()
        with self.products() if self.on_cpu else nullcontext():
            logits = self._forward(route, input_ids, position)
        self.cache.require_attended()
        return logits

    def _compiled(self) -> AbstractContextManager[None]:
        if not self.compile:
            return nullcontext()
        self._layers = self._layers or CompiledLayers(self.model)
        return self._layers()

    def _forward(self, route: dict[str, AttentionContext], input_ids: Tensor, position: Tensor) -> Tensor:
        with base_alone(self.model) if self.maskless else gated(self.model, input_ids):
            return self.model(input_ids=input_ids, position_ids=position, use_cache=False, **route).logits[0]

    def _take_in(self, logits: Tensor, places: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Read the logits out and advance; places: sequence and position of each row where they are not the plan's."""
        token, confidence = self.read(logits, *(places or (self.rows.seq, self.rows.position)), self.all_rows.start)
        advance(self.sequences, self.all_rows, self.terms, token, confidence, **self.planning)
        return logits

    def read(self, logits: Tensor, seq: Tensor, position: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence [R] of rows [R, V], of which those of sequence b stand from start [B + 1] on."""
        if self.choice is None:
            return readout(logits, self.mask_token_id)
        # A processor may call the model as it is.
        with unrouted(self.model) if self.choice.choosing.on_host else nullcontext():
            return self.choice(logits, seq, position, start)

    def poll(self) -> Poll:
        """What `run` must know of the sequences, and no more."""
        if self.on_cpu or not self.by_load:
            return Poll(self.sequences)
        if self.graph is not None and len(self.ladder.rungs) > 1:
            return TimedPoll(self.sequences)
        # Where there are rows for everybody, everybody has them: they cost the same used or not.
        most = len(self.sequences.status) * self.strategy.most_rows
        return (OddsPoll if most > len(self.all_rows.seq) else Poll)(self.sequences)

    def run(self, route: dict[str, AttentionContext], poll: Poll | None = None) -> None:
        """Step until every sequence is done, at most max_passes.

        poll: this decoder's `poll()`, as by default, or one that asks others besides.
        """
        run(self, route, poll)

    def take(self, rows: int) -> None:
        """Have the next pass so many rows: of the lowest rung one a sequence, none of them a mask."""
        self.cache.rows = self.all_rows.first(rows)
        self.maskless = rows == self.ladder.rungs[0]
        self.cache.max_rows = 1 if self.maskless else self.strategy.most_rows

    def make_room(self, tokens: int) -> None:
        """Keep room for a sequence of so many tokens and its next pass, where buffers grow."""
        cache = self.cache
        self._reach = max(self._reach, cache.scratch + tokens + self.strategy.k)
        cache.reserve(min(cache.capacity, self._reach + self.strategy.k))
        if not self.on_cpu:
            cache.slots = cache.held

    @torch.inference_mode()
    def plan(self) -> None:
        """Plan the next pass anew, because sequences have come in or gone behind the back of `advance`."""
        if self.graph is None:
            self._plan()
        else:
            self.graph(self._plan, "plan")  # more than a hundred operations

    def _plan(self) -> None:
        plan(self.sequences, self.all_rows, self.terms, **self.planning)

    def reserve(self) -> None:
        """Keep room for the next pass where the host does not know how far the sequences are.

        Attention looks at all slots there are, and rows stay as many as they are: torch.compile would make new forms.
        """
        cache, k = self.cache, self.strategy.k
        self._reach += k  # tokens of a pass, at most; the masks behind them come on top
        if min(cache.capacity, self._reach + k) > cache.held:
            self._reach = cache.scratch + int(self.sequences.length.max()) + k
            cache.reserve(min(cache.capacity, self._reach + k))
            cache.slots = cache.held
