"""The captured step: replays give the tokens of fresh runs, and few graphs are kept."""

import gc
import random
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, graph, pool
from mtpkern.attention import attention_context
from mtpkern.decoder import Decoder
from mtpkern.load import Ladder
from mtpkern.poll import Poll
from mtpkern.pool import release_graphs
from mtpkern.refill import Slots
from mtpkern.strategies import Strategy
from support.recording import STRATEGIES, RecordedStep, assert_same, generate, kept, poison
from support.slow import slow_but


@pytest.mark.parametrize("name", STRATEGIES)
def test_replays_give_the_tokens_of_fresh_runs(name: str, recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    calls: list[dict[str, Any]] = [
        {"lengths": (9, 4, 12)},
        {"lengths": (3, 20, 6), "eos_token_id": [3, 5], "max_new_tokens": 30},
        {"lengths": (5, 5, 5), "eos_token_id": 2, "seed": 4},
        {"lengths": (1, 2, 17), "max_new_tokens": 2},
    ]
    for i, call in enumerate(calls):
        strategy = STRATEGIES[name][i % 2]
        expected = generate(tiny, model, *call["lengths"], strategy=strategy, use_graph=False, **without(call))
        got = generate(tiny, model, *call["lengths"], strategy=strategy, **without(call))
        assert_same(got, expected)
        (decoder,) = kept(model)
        poison(decoder)
    assert recorded.captures == 1


MASKED = {"strategy": Verified(threshold=0.1, masks=2)}


@pytest.mark.parametrize("options", slow_but([{}, MASKED], MASKED))
def test_the_ladder_changes_no_token(
    options: dict[str, Any], recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any rung behind any other, told a pass ahead; prices as they come; each rung captured once, in one decoder."""
    rng, model = random.Random(0), tiny.model("llama")
    monkeypatch.setattr("mtpkern.load.FREE_ROWS", 0)
    monkeypatch.setattr("mtpkern.load.STEP", 1)
    used: set[int] = set()

    def choose(ladder: Ladder, *_: Any) -> tuple[int, float]:
        assert len(ladder.rungs) > 2
        rows = rng.choice(ladder.rungs)
        used.add(rows)
        return rows, float("inf") if rows == ladder.rungs[0] else rng.choice([0.0, 0.1, 0.4])

    for seed in range(6):
        call = {"seed": seed, "max_new_tokens": 24, "eos_token_id": 3, **options}
        expected = generate(tiny, model, 9, 4, 12, use_graph=False, **call)
        with monkeypatch.context() as patch:
            patch.setattr(Ladder, "choose", choose)
            got = generate(tiny, model, 9, 4, 12, **call)
        assert torch.equal(got.sequences, expected.sequences)
        assert got.finish_reasons == expected.finish_reasons
        (decoder,) = kept(model)
        assert decoder.graph is not None
        poison(decoder)
    assert recorded.captures == len(decoder.graph.captured) == len(used)
    # On the lowest rung there are no masks, and a row a sequence.
    assert {len(step.rows) for step in decoder.graph.captured.values()} == used


def test_a_rung_that_cannot_be_captured_is_not_chosen_again(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder tells its ladder, which would wish for it in every pass."""
    captured = recorded.__init__

    def only_one(self: RecordedStep, step: Any, device: Any, beside: Any) -> None:
        if beside is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        captured(self, step, device, beside)

    seen: list[bool] = []

    def choose(ladder: Ladder, *_: Any) -> tuple[int, float]:
        seen.append(ladder.closed)
        return (ladder.rungs[-1], 0.0) if len(seen) < 5 else (ladder.rungs[0], float("inf"))

    monkeypatch.setattr("mtpkern.load.FREE_ROWS", 0)
    monkeypatch.setattr("mtpkern.load.STEP", 1)
    monkeypatch.setattr(recorded, "__init__", only_one)
    monkeypatch.setattr(Ladder, "choose", choose)
    with pytest.warns(RuntimeWarning, match="could not be captured"):
        generate(tiny, tiny.model("llama"), 9, 4, 12, max_new_tokens=24)
    assert seen[0] is False
    assert seen[-1] is True


@pytest.mark.parametrize("watched", [False, True])
def test_a_pass_on_the_ladder_asks_once(
    watched: bool, recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of times, odds and whether it goes on; who watches besides is a second."""
    asked, passes = [], []
    running, step = Poll.running, graph.StepGraph.__call__
    monkeypatch.setattr("mtpkern.load.STEP", 1)
    monkeypatch.setattr(Ladder, "choose", lambda ladder, *_: (ladder.rungs[0], float("inf")))
    monkeypatch.setattr(Poll, "running", lambda self: asked.append(self) or running(self))
    monkeypatch.setattr(graph.StepGraph, "__call__", lambda *args: passes.append(args[2]) or step(*args))
    watches = {"stopping_criteria": [lambda ids, scores: False]} if watched else {}
    generate(tiny, tiny.model("llama"), 9, 4, 12, max_new_tokens=24, **watches)
    assert len(set(passes)) > 1
    assert len(passes) > 20
    assert len(asked) in ({2 * len(passes), 2 * len(passes) + 1} if watched else {len(passes), len(passes) + 1})


def without(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "lengths"}


def test_state_keeps_its_addresses(recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    generate(tiny, model, 5, 3)
    (decoder,) = kept(model)
    places = addresses(decoder)
    generate(tiny, model, 7, 20, max_new_tokens=40, eos_token_id=2)
    assert kept(model) == [decoder]
    assert addresses(decoder) == places


@pytest.mark.parametrize("strategy", [Verified(3, threshold=0.2), ConfAdapt(3, threshold=0.3)], ids=repr)
def test_slots_are_refilled_between_replays(
    strategy: Strategy, recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more captures for all prompts of two calls; nothing moves, and the captured step sees every newcomer."""
    model, rng = tiny.model("llama"), random.Random(0)
    prompts = [[rng.randint(1, 14) for _ in range(rng.choice([1, 4, 9, 20]))] for _ in range(9)]
    prompts[7] = prompts[3] + [5, 6] if len(prompts[3]) > 8 else [1] * 15
    new = [rng.randint(1, 15) for _ in prompts]
    places: set[tuple[int, ...]] = set()
    running = Slots.take

    def noted(self: Any, state: Tensor) -> int:
        places.add(tuple(addresses(self.decoder)))
        return running(self, state)

    options: dict[str, Any] = {"strategy": strategy, "max_new_tokens": new, "eos_token_id": 3, "batch_size": 3}
    expected = mtpkern.generate_batch(model, prompts, use_graph=False, **options)
    monkeypatch.setattr(Slots, "take", noted)
    for _ in range(2):
        outputs = mtpkern.generate_batch(model, prompts, **options)
        assert [(o.tokens, o.blocks) for o in outputs] == [(o.tokens, o.blocks) for o in expected]
        (decoder,) = kept(model)
        poison(decoder)
    assert len(places) == 1
    assert recorded.captures == 2  # the pass, and the plan behind a newcomer


@pytest.mark.parametrize("masks", [0, 4])
def test_the_ladder_takes_newcomers_on_any_rung(
    masks: int, recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rng = tiny.model("llama"), random.Random(0)
    monkeypatch.setattr("mtpkern.load.FREE_ROWS", 0)
    monkeypatch.setattr("mtpkern.load.STEP", 1)
    prompts = [[rng.randint(1, 14) for _ in range(rng.choice([1, 4, 9, 20]))] for _ in range(12)]
    options: dict[str, Any] = {"max_new_tokens": 15, "eos_token_id": 3, "batch_size": 3}
    options["strategy"] = Verified(threshold=0.1, masks=masks)
    expected = mtpkern.generate_batch(model, prompts, use_graph=False, **options)

    def choose(ladder: Ladder, *_: Any) -> tuple[int, float]:
        rows = rng.choice(ladder.rungs)
        return rows, float("inf") if rows == ladder.rungs[0] else rng.choice([0.0, 0.1, 0.4])

    monkeypatch.setattr(Ladder, "choose", choose)
    outputs = mtpkern.generate_batch(model, prompts, **options)
    assert [o.tokens for o in outputs] == [o.tokens for o in expected]
    assert recorded.captures > 1


def addresses(decoder: Decoder) -> list[int]:
    tensors = [*vars(decoder.sequences).values(), *vars(decoder.rows).values(), *vars(decoder.terms).values()]
    return [x.data_ptr() for x in [*tensors, *(x for pair in decoder.cache.layers.values() for x in pair)]]


def test_what_is_baked_in_makes_another_graph(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr(pool, "KEPT", 10)
    common = {"max_new_tokens": 5}
    for options in (
        {"strategy": Verified(2)},
        {"strategy": Verified(3)},
        {"strategy": ConfAdapt(2)},
        {"strategy": Verified(2, masks=1)},
        {"strategy": Verified(2), "rows": 4},
        {"strategy": Verified(2), "eos_token_id": [1, 2, 3, 4, 5]},
        {"strategy": Verified(2), "lengths": (4, 255)},
        {"strategy": Verified(2), "batch_invariant": True},
    ):
        before = len(kept(model))
        generate(tiny, model, *options.get("lengths", (4, 4)), **common, **without(options))
        assert len(kept(model)) == before + 1
    assert kept(model)[-1].cache.batch_invariant
    generate(tiny, model, 4, **common, strategy=Verified(2))
    assert len(kept(model)) == before + 2
    with torch.autocast("cpu", torch.bfloat16):  # in which keys have another dtype
        generate(tiny, model, 4, **common, strategy=Verified(2))
    assert len(kept(model)) == before + 3


def test_kept_graphs_are_few(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    monkeypatch.setattr(pool, "KEPT", 2)
    for k in (1, 2, 1, 3):
        generate(tiny, model, 4, strategy=Static(k), max_new_tokens=2)
    assert [decoder.strategy.k for decoder in kept(model)] == [1, 3]  # the one unused for longest has gone
    # The last one stays, however large it is.
    monkeypatch.setattr(pool, "memory_of", lambda device: 1)
    generate(tiny, model, 4, strategy=Static(2), max_new_tokens=2)
    assert [decoder.strategy.k for decoder in kept(model)] == [2]
    assert kept(model)[0].nbytes > 2 * 2 * 8 * 256 * 4
    assert release_graphs(model) == 1
    assert release_graphs(model) == release_graphs() == 0
    with pytest.raises(TypeError, match="must be a model, or None for all of them, got str"):
        release_graphs("model")  # type: ignore[arg-type]


def test_a_forgotten_model_takes_its_graphs_along(recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    generate(tiny, model, 4)
    (decoder,) = [weakref.ref(x) for x in kept(model)]
    held = len(pool._kept)
    del model
    gc.collect()
    assert decoder() is None
    assert len(pool._kept) < held


def test_a_run_that_failed_leaves_nothing(recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    head = model.get_output_embeddings().weight
    good = head.detach().clone()
    with torch.no_grad():
        head.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN"):
        generate(tiny, model, 4)
    assert not kept(model)
    with torch.no_grad():
        head.copy_(good)
    assert_same(generate(tiny, model, 4), generate(tiny, model, 4, use_graph=False))


def test_a_decoder_runs_again(tiny: SimpleNamespace) -> None:
    """Also on a CPU, where rows and slots have shrunk with the sequences that were running."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(9, 4, 12)
    strategy, stop_ids = Verified(3, threshold=0.2), torch.tensor([3])
    results = []
    for again in (False, True):
        decoder = Decoder(
            model, strategy, mask_token_id=tiny.mask, stop_ids=stop_ids, batch=3, capacity=48, max_new_tokens=36
        )
        for n in (8, 36) if again else (36,):
            decoder.restart(strategy, stop_ids, n)
            decoder.prefill(ids, mask)
            with attention_context(model, decoder.cache) as route:
                decoder.run(route)
        results.append((decoder.sequences.tokens[:, :-1].tolist(), decoder.sequences.blocks[:, :-1].tolist()))
    assert results[0] == results[1]


def test_a_kept_decoder_gets_known_keys_at_its_own_addresses(
    tiny: SimpleNamespace, recorded: type[RecordedStep]
) -> None:
    """A prefix is copied into the buffers that a captured step reads, and out of them at the end: both stay whole."""
    model, cache = tiny.model("llama"), mtpkern.PrefixCache()
    options = {"strategy": Verified(3, threshold=0.1)}
    prompts = [tiny.prompts(n)[0][0].tolist() for n in (24, 30)]
    want = [decoded(model, prompt, **options, use_graph=False) for prompt in prompts]
    release_graphs()
    for turn in range(2):
        for prompt, tokens in zip(prompts, want):
            assert decoded(model, prompt, **options, prefix_cache=cache) == tokens
            assert decoded(model, prompt[::-1], **options) != tokens  # another's keys in the same buffers
            assert cache.shared[0] >= (8 if turn or prompt is not prompts[0] else 0)
        assert recorded.captures == 1
    assert len(pool._kept[model]) == 1


def decoded(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    output = mtpkern.generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
    return output[0, len(prompt) :].tolist()
