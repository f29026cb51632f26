"""The loop: passes of a decoder until all its sequences have ended, each with the rows and slots that it is to have.

How many rows that is follows from what the host may know. On a CPU it knows the state, so that each pass has those
that it needs and no more. With graphs that differ in their rows it takes one of them a pass ahead (mtpkern.load:
`Ladder`). Else all passes are alike, and the device shares their rows out.
"""

from __future__ import annotations

from contextlib import nullcontext
from time import perf_counter
from typing import TYPE_CHECKING

from mtpkern.adapter import gate_of
from mtpkern.attention import AttentionContext, unrouted
from mtpkern.kernels.state import RUNNING
from mtpkern.load import Bought, price_of
from mtpkern.packed import PackedProducts
from mtpkern.poll import OddsPoll, Poll, TimedPoll
from mtpkern.recordings import recordings_of, rows_in

if TYPE_CHECKING:
    from mtpkern.decoder import Decoder

# Slots that attention reads are rounded up to whole vectors.
SLOT_STEP = 16


def run(decoder: Decoder, route: dict[str, AttentionContext], poll: Poll | None = None) -> None:
    """See `Decoder.run`."""
    poll = poll or decoder.poll()
    own = decoder.poll() if poll.calls_others else poll
    if decoder.on_cpu:
        return _run_on_cpu(decoder, route, poll)
    if isinstance(own, TimedPoll):
        return _run_on_ladder(decoder, route, poll, own)
    R, bought = len(decoder.all_rows.seq), Bought(decoder.strategy.masks)
    for _ in range(decoder.max_passes):
        if not _goes_on(decoder, poll):
            break
        if isinstance(own, OddsPoll) and (own is poll or own.running()):
            decoder.terms.price.fill_(price_of(*own.seen, decoder.strategy.k, R, None, bought=bought))
        if decoder.graph is None:
            decoder.reserve()
            decoder.step(route)
        else:
            decoder.replay(route, R)


def _goes_on(decoder: Decoder, poll: Poll) -> int:
    """How many sequences do; streamers and criteria, who are asked here, may call the model as it is."""
    with unrouted(decoder.model) if poll.calls_others else nullcontext():
        return poll.running()


def _run_on_ladder(decoder: Decoder, route: dict[str, AttentionContext], poll: Poll, timed: TimedPoll) -> None:
    """Where passes come in a few numbers of rows: that of a pass is told to the device a pass ahead."""
    ladder, terms, graph = decoder.ladder, decoder.terms, decoder.graph
    assert terms.budget is not None
    assert graph is not None
    rows = len(decoder.all_rows.seq)
    told: tuple[int, float] = rows, 0.0
    for _ in range(decoder.max_passes):
        if not _goes_on(decoder, poll):
            break
        if poll is not timed:
            if poll.has_queued and timed.passes:
                timed.passes[-1] = 0  # it has read prompts, or what lies behind it counts to its time
            timed.running()
        if timed.replayed:
            ladder.times.saw(timed.replayed, timed.seconds)
        before, told = told, ladder.choose(*timed.seen)
        if told != before:
            terms.budget.fill_(told[0])
            terms.price.fill_(told[1])
        decoder.take(rows)
        made = rows in graph.captured
        timed.passes.append(rows if made else 0)  # 0: no replay, so its time tells nothing
        decoder.replay(route, rows)
        if not made and rows in graph.captured:
            ladder.made_one(rows, graph.seconds[rows])
        ladder.closed = not all(map(graph.may_have, ladder.rungs))
        rows = told[0]


def _run_on_cpu(decoder: Decoder, route: dict[str, AttentionContext], poll: Poll) -> None:
    """Where the state is known, and rows and slots cost."""
    load, products = decoder.load, decoder.products
    baked = products.baked if isinstance(products, PackedProducts) else ()
    recordings = decoder.recordings = recordings_of(decoder.model, baked, decoder.max_new_tokens)
    if recordings is not None and recordings.proven:
        decoder.cache.proven = True  # by an earlier run of the model, which has not changed since
    for _ in range(decoder.max_passes):
        if not _goes_on(decoder, poll):
            break
        _fit(decoder)
        if load is None:
            decoder.step(route)
            continue
        decoder.tell(load)
        rows, began = len(decoder.rows.seq), perf_counter()
        decoder.step(route)
        # Not those that were being recorded or compared, which take longer.
        if recordings is None or recordings.usual:
            load.saw(rows, perf_counter() - began)


def _fit(decoder: Decoder) -> None:
    """Bring the rows in use; attention reads the slots that hold something, for the most rows of a sequence."""
    start, cache, sequences = decoder.all_rows.start, decoder.cache, decoder.sequences
    each = zip(sequences.length.tolist(), sequences.status.tolist())
    longest = max((length for length, status in each if status == RUNNING), default=0)
    needed = cache.scratch + longest + decoder.strategy.k - 1
    cache.slots = min(cache.capacity, -(-needed // SLOT_STEP) * SLOT_STEP)
    cache.reserve(cache.slots)
    cache.max_rows = int(start.diff().max())
    rows = max(1, int(start[-1]))
    # To a model without a gate a mask is a token as any other.
    gate = gate_of(decoder.model)
    decoder.maskless = gate is not None and not (decoder.all_rows.token[:rows] == decoder.mask_token_id).any()
    batch = len(start) - 1
    most = batch if rows <= batch else len(decoder.all_rows.seq)
    cache.rows = decoder.all_rows.first(rows_in(rows, most))
