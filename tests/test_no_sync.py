"""A decoding step never waits for the device, shown without a device.

Two layers, because each sees what the other cannot. Real tensors on the CPU: every operation of a step passes a
watcher that knows which ones make a GPU wait; transformers takes the very branches that it takes in use. Tensors of
a made-up accelerator, without memory behind them: what reads a value, moves data between host and device or brings
a host tensor into a step has nothing to read; but transformers skips some of its checks on such tensors.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import mtpkern.decoder
from mtpkern import ConfAdapt, Static, Verified, settings
from mtpkern.attention import attention_context
from mtpkern.choosing import Choosing
from mtpkern.decoder import Decoder
from mtpkern.kernels.state import LIMIT
from mtpkern.processors import Bias
from mtpkern.slots import Job, Newcomer, enter
from mtpkern.strategies import Strategy
from mtpkern.watch import Watch, snapshot
from support.made_up_device import FAKE, SyncError, Watcher, to_fake
from support.slow import slow_but

pytestmark = pytest.mark.usefixtures("autocast_off_on_the_made_up_device", "nothing_on_the_host")

STRATEGIES = [Static(1), Static(3), ConfAdapt(k=3, threshold=0.3), Verified(k=3, threshold=0.2, masks=3)]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    # Experts in their default form, grouped_mm; the "eager" one looks for the experts in use, and waits: see below.
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


# Every strategy on one model, every model with all that a strategy can bring.
EACH = pytest.mark.parametrize(
    ("name", "strategy"),
    slow_but(
        [(name, strategy) for name in MODELS for strategy in (STRATEGIES if name == "llama" else STRATEGIES[-1:])],
        *(("llama", STRATEGIES[2]), ("llama", STRATEGIES[3]), ("qwen3_moe", STRATEGIES[3])),
    ),
    ids=repr,
)


def prepare(
    tiny: SimpleNamespace, model: Any, strategy: Strategy, *, batch: int = 3, choosing: Choosing | None = None
) -> Decoder:
    """A decoder behind its prefill. Everything here may sync."""
    input_ids, attention_mask = tiny.prompts(*(9, 4, 12, 7, 8)[:batch])
    decoder = Decoder(
        model,
        strategy,
        mask_token_id=tiny.mask,
        stop_ids=torch.tensor([3, 5]),
        batch=batch,
        capacity=64,
        max_new_tokens=20,
        choosing=choosing,
    )
    with torch.inference_mode():
        decoder.prefill(input_ids.to(model.device), attention_mask.to(model.device))
    return decoder


def watch(decoder: Decoder, watcher: Watcher, steps: int = 3) -> None:
    with attention_context(decoder.model, decoder.cache) as route:
        for _ in range(steps):
            with watcher:
                decoder.step(route)
            assert decoder.cache.proven


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_real_step_has_no_sync(tiny: SimpleNamespace, name: str, strategy: Strategy) -> None:
    decoder = prepare(tiny, tiny.model(name, **MODELS[name]), strategy)
    watch(decoder, Watcher())
    assert decoder.sequences.passes.max() > 1


@EACH
def test_step_on_an_accelerator_has_no_sync(tiny: SimpleNamespace, name: str, strategy: Strategy) -> None:
    model = tiny.model(name, **MODELS[name])
    with FakeTensorMode():
        watch(prepare(tiny, to_fake(model), strategy), Watcher(accelerator=True), steps=1)


# Penalties, biases and ways of sampling, in transformers' order, and the record of what was drawn.
CHOOSING = Choosing.of(
    [
        SequenceBiasLogitsProcessor({(5,): -3.0, (6, 7): 4.0}),
        RepetitionPenaltyLogitsProcessor(1.3),
        NoRepeatNGramLogitsProcessor(3),
        NoBadWordsLogitsProcessor([[4], [2, 2, 1]]),
        MinLengthLogitsProcessor(14, [3, 5]),
        MinNewTokensLengthLogitsProcessor(12, 3, [3, 5]),
        SuppressTokensLogitsProcessor([1]),
        SuppressTokensAtBeginLogitsProcessor([9], 12),
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(12),
        TopPLogitsWarper(0.95),
        MinPLogitsWarper(0.01),
        TypicalLogitsWarper(0.9),
        EpsilonLogitsWarper(0.001),
        LogitNormalization(),
    ],
    12,
    samples=True,
    keeps=frozenset({"logprobs"}),
)


@pytest.mark.parametrize("strategy", slow_but(STRATEGIES, *STRATEGIES[2:]), ids=repr)
def test_choosing_has_no_sync(tiny: SimpleNamespace, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHOOSING is not None
    assert not CHOOSING.on_host
    # On a CPU settings look at their numbers, as the host may there.
    monkeypatch.setattr(settings, "may_look", lambda x: False)
    watch(prepare(tiny, tiny.model("llama"), strategy, choosing=CHOOSING), Watcher())
    # A list cannot be sent to a device that is not there; biases of several tokens are made of lists, before any step.
    others = tuple(x for x in CHOOSING.processors if not (isinstance(x, Bias) and x.reads_text))
    choosing = replace(CHOOSING, processors=others)
    model = tiny.model("llama")
    with FakeTensorMode():
        watch(prepare(tiny, to_fake(model), strategy, choosing=choosing), Watcher(accelerator=True), steps=1)


def test_what_a_watch_adds_has_no_sync(tiny: SimpleNamespace) -> None:
    """The state that the poll copies, and the word that ends a sequence."""
    with FakeTensorMode():
        sequences = prepare(tiny, to_fake(tiny.model("llama")), Verified(k=3)).sequences
        window = torch.arange(-5, 0, device=FAKE)
        with Watcher(accelerator=True):
            assert snapshot(sequences, window).shape == (3, 8)
            sequences.status[1].fill_(1)


@EACH
def test_what_lets_a_prompt_in_has_no_sync(tiny: SimpleNamespace, name: str, strategy: Strategy) -> None:
    """Keys copied from a neighbour, the prefill of the others in chunks, the state; and on a device the new plan."""
    decoder = prepare(tiny, tiny.model(name, **MODELS[name]), strategy)
    prompt = [*decoder.sequences.tokens[0, :9].tolist(), 5, 6, 7, 8]
    newcomer = Newcomer(1, Job(7, np.array(prompt), 20 - len(prompt)), source=0, shared=8)
    owner = torch.zeros(3, dtype=torch.int64)
    with Watcher():
        for _ in enter(decoder, [newcomer], owner, chunk=3):
            pass
    emitted = decoder.sequences.blocks[1, 0]  # by the prefill; drafts stand behind what it is sure of
    assert emitted >= 1
    assert decoder.sequences.length[1] >= 13 + emitted
    assert (decoder.sequences.passes[1], owner[1]) == (1, 7)
    watch(decoder, Watcher(), steps=1)
    with FakeTensorMode():
        fake = prepare(tiny, to_fake(tiny.model("llama")), strategy)
        with Watcher(accelerator=True):
            fake.plan()


@EACH
def test_a_pass_that_reads_prompts_has_no_sync(tiny: SimpleNamespace, name: str, strategy: Strategy) -> None:
    """What brings it its rows on the host's side of the copy, the pass, and what takes in what has been read."""
    decoder = prepare(tiny, tiny.model(name, **MODELS[name]), strategy)
    watch(decoder, Watcher(), steps=1)
    newcomers = [Newcomer(slot, Job(7 + slot, np.array([4, 5, 6, 7 + slot]), 9)) for slot in (2, 0)]
    owner = torch.zeros(3, dtype=torch.int64)
    decoder.sequences.status[[0, 2]] = LIMIT
    decoder.sequences.pending[[0, 2]] = 0
    decoder.plan()
    with attention_context(decoder.model, decoder.cache) as route:
        with Watcher():
            entering = enter(decoder, newcomers, owner, chunk=3, beside=True)
            next(entering)
            assert decoder.reading
            decoder._step_beside(route)
            assert next(entering, None) is None
        decoder.step(route)
    assert owner.tolist() == [7, 0, 9]
    assert (decoder.sequences.length[[0, 2]] > 4).all()
    assert (decoder.sequences.passes[[0, 2]] > 0).all()
    model = tiny.model(name, **MODELS[name])
    with FakeTensorMode():
        fake = prepare(tiny, to_fake(model), strategy)
        with attention_context(fake.model, fake.cache) as route:
            fake.step(route)
            with Watcher(accelerator=True):
                fake._step_beside(route)


def test_operations_of_a_step_depend_on_neither_batch_nor_k(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    counts = []
    for batch, k in ((2, 9), (5, 4)):
        for masks in (0, k):
            watcher = Watcher()
            watch(prepare(tiny, model, Verified(k=k, masks=masks), batch=batch), watcher, steps=1)
            counts.append(watcher.operations)
    assert counts[:2] == counts[2:]


# Planted bugs: each must be seen by the layer that claims to see it.

REAL_BUGS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "if": lambda x: bool((x > 0).all()),
    "range": lambda x: list(range(x[0])),
    "allclose": lambda x: torch.allclose(x, x),
    "equal": lambda x: torch.equal(x, x.clone()),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index by mask": lambda x: x[x > 0],
    "assign by mask": lambda x: x.clone().index_put_((x > 0,), x.new_ones(1)),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.clamp(0, 2)),
    "bincount": lambda x: x.clamp(min=0).bincount(),
}
ACCELERATOR_BUGS: dict[str, Callable[[Tensor], object]] = {
    **REAL_BUGS,
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.cpu().numpy(),
    "list to the device": lambda x: torch.tensor([1, 2], device=x.device),
    "number to the device": lambda x: torch.tensor(0.5, device=x.device),
    "host tensor to the device": lambda x: torch.arange(2).to(x.device),
    "index by a list": lambda x: x[[0, 1]],
    "assign by a list": lambda x: x.clone().__setitem__([0, 1], 0),
    "index by a host tensor": lambda x: x[torch.arange(2)],
    "forgotten device": lambda x: torch.zeros(2),
}


def plant(monkeypatch: pytest.MonkeyPatch, bug: Callable[[Tensor], object]) -> None:
    """Let every step do `bug` to the tokens that it has read out."""
    advance = mtpkern.decoder.advance

    def planted(sequences: Any, rows: Any, terms: Any, token: Tensor, *args: Any, **kwargs: Any) -> None:
        bug(token)
        advance(sequences, rows, terms, token, *args, **kwargs)

    monkeypatch.setattr(mtpkern.decoder, "advance", planted)


@pytest.fixture(scope="module")
def real_decoder(tiny: SimpleNamespace) -> Decoder:
    return prepare(tiny, tiny.model("llama"), Verified(k=3))


@pytest.fixture(scope="module")
def fake_decoder(tiny: SimpleNamespace) -> tuple[FakeTensorMode, Decoder]:
    model = tiny.model("llama")
    with FakeTensorMode() as mode:
        return mode, prepare(tiny, to_fake(model), Verified(k=3))


@pytest.mark.parametrize("bug", REAL_BUGS)
def test_planted_bug_is_seen_on_real_tensors(real_decoder: Decoder, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    plant(monkeypatch, REAL_BUGS[bug])
    with pytest.raises(SyncError):
        watch(real_decoder, Watcher())


# Those that real tensors do not show, and a few of the others.
BY_DEVICE = [name for name in ACCELERATOR_BUGS if name not in REAL_BUGS]


@pytest.mark.parametrize("bug", slow_but(ACCELERATOR_BUGS, "item", "nonzero", "index by mask", *BY_DEVICE))
def test_planted_bug_is_seen_on_an_accelerator(
    fake_decoder: tuple[FakeTensorMode, Decoder], monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    mode, decoder = fake_decoder
    plant(monkeypatch, ACCELERATOR_BUGS[bug])
    with mode, pytest.raises(SyncError):
        watch(decoder, Watcher(accelerator=True))


def test_experts_that_sync_are_seen(tiny: SimpleNamespace) -> None:
    # A whole model with a sync in it, as transformers ships it: the watcher must see what nobody planted.
    model = tiny.model("qwen3_moe", **MODELS["qwen3_moe"])
    model.set_experts_implementation("eager")
    with pytest.raises(SyncError):
        watch(prepare(tiny, model, Static(2)), Watcher())


@pytest.mark.gpu
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_run_on_a_gpu_has_no_sync(tiny: SimpleNamespace, name: str, strategy: Strategy, watched: bool) -> None:
    model = tiny.model(name, **MODELS[name]).to("cuda", torch.bfloat16)
    decoder = prepare(tiny, model, strategy)
    poll = None
    if watched:
        shown: list[Any] = []
        watch = Watch(SimpleNamespace(put=shown.append, end=lambda: None), [])
        watch.begin(*tiny.prompts(9, 4, 12), new=20, padding=0, device="cpu")
        poll = watch.poll(decoder.sequences, strategy)
    with attention_context(model, decoder.cache) as route:
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.run(route, poll)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if poll is not None:
        poll.finish()
        assert len(shown) == 1 + max(end for end in watch.ends if end is not None)
