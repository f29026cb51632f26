"""Engine: requests from many threads share passes, and each gets what it gets alone."""

import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import mtpkern
from mtpkern import ConfAdapt, Engine, Verified
from mtpkern.decoder import Decoder
from mtpkern.strategies import Strategy
from support.batches import STOP, STRATEGIES, alone, mixed_prompts
from support.engines import LONG, free, held, result
from support.recording import RecordedStep, kept
from support.slow import slow_but


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("strategy", slow_but(STRATEGIES, STRATEGIES[0]), ids=repr)
def test_each_thread_gets_what_it_gets_alone(
    any_model: Any, strategy: Strategy, late: bool, request: pytest.FixtureRequest
) -> None:
    prompts, new = mixed_prompts(16)
    expected = [alone(any_model, prompt, n, strategy).tokens for prompt, n in zip(prompts, new)]
    if late:
        request.getfixturevalue("lagging")
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        ids = torch.tensor([prompts[i]])
        time.sleep(0.003 * (i % 5))
        mask = torch.ones_like(ids)  # the words may be the token for padding
        output = engine.generate(ids, attention_mask=mask, max_new_tokens=new[i], eos_token_id=STOP)
        found[i] = output[0, len(prompts[i]) :].tolist()

    with Engine(any_model, batch_size=4, max_length=64, strategy=strategy) as engine:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(len(prompts))] == expected


def test_who_comes_later_shares_the_passes_of_who_runs(engine: Engine, model: Any, passes: list[int]) -> None:
    streamer, first = held(engine)
    others = [engine.submit([n, n + 1], max_new_tokens=5, eos_token_id=None) for n in range(1, 6)]
    streamer.go.set()
    assert result(first).tokens == streamer.tokens == free(model, [5, 6, 7], LONG)
    for n, future in zip(range(1, 6), others):
        assert result(future).tokens == free(model, [n, n + 1], 5)
    assert max(passes) == 3
    assert streamer.ended


def test_padded_prompts_come_back_as_from_generate(engine: Engine, model: Any, inputs: dict[str, Tensor]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": STOP, "pad_token_id": 9}
    expected = mtpkern.generate(model, **inputs, **options, strategy=Verified(3, threshold=0.2))
    assert torch.equal(engine.generate(**inputs, **options), expected)
    named = {"inputs": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(engine.generate(**named, **options), expected)


@pytest.mark.parametrize("where", ["call", "config", "file"])
def test_without_attention_mask_padding_is_inferred_as_generate_does(
    where: str, engine: Engine, model: Any, inputs: dict[str, Tensor], tiny: Any
) -> None:
    ids, strategy = inputs["input_ids"], Verified(3, threshold=0.2)
    for stop in (STOP, [STOP, tiny.pad]):  # a stop token says nothing about padding
        says: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": stop, "pad_token_id": tiny.pad}
        if where == "config":
            says = {"generation_config": GenerationConfig(**says)}
        elif where == "file":
            model.generation_config.update(**says)
            says = {}
        expected = mtpkern.generate(model, ids, **says, strategy=strategy)
        assert torch.equal(engine.generate(ids, **says), expected)
    assert not torch.equal(expected, mtpkern.generate(model, **inputs, **says, strategy=strategy))
    plain = {**says, "pad_token_id": None}
    assert torch.equal(engine.generate(ids, **plain), mtpkern.generate(model, ids, **plain, strategy=strategy))
    model.generation_config.update(eos_token_id=STOP)
    with pytest.raises(ValueError, match="left"):
        engine.generate(ids.flip(1), max_new_tokens=2, pad_token_id=tiny.pad, eos_token_id=STOP)
    for wrong in ({"pad_token_id": "0"}, {"pad_token_id": [0]}, {"pad_token_id": 0, "eos_token_id": "2"}):
        for call in (engine.generate, partial(mtpkern.generate, model)):
            with pytest.raises(TypeError, match="_token_id must be a whole number"):
                call(ids, max_new_tokens=2, **wrong)


def test_a_call_on_the_models_generate_leads_here(engine: Engine, model: Any, passes: list[int]) -> None:
    expected = free(model, [4, 5], 9)
    passes.clear()
    model.generate = engine.generate
    assert model.generate(torch.tensor([[4, 5]]), max_new_tokens=9, eos_token_id=None)[0, 2:].tolist() == expected
    assert 0 < len(passes) < 9


@pytest.mark.parametrize("B", [1, 3])
def test_draws_are_those_of_generate_behind_the_same_seed(B: int, model: Any, inputs: dict[str, Tensor]) -> None:
    given = {name: x[:B] for name, x in inputs.items()}
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "temperature": 1.3, "eos_token_id": None}
    with Engine(model, batch_size=2, max_length=64, strategy=Verified(3, threshold=0.1)) as engine:
        for seed in (0, 1):
            torch.manual_seed(seed)
            expected = mtpkern.generate(model, **given, **options, strategy=Verified(3, threshold=0.1))
            beside = engine.submit([3, 4, 5], **options)
            torch.manual_seed(seed)
            assert torch.equal(engine.generate(**given, **options), expected)
            result(beside)


@pytest.mark.parametrize("late", [False, True])
def test_many_of_one_seed_draw_the_same(late: bool, model: Any, request: pytest.FixtureRequest) -> None:
    if late:
        request.getfixturevalue("lagging")
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "eos_token_id": None}
    futures = []
    with Engine(model, batch_size=2, max_length=64, strategy=Verified(3, threshold=0.1)) as engine:
        streamer, first = held(engine, **options)
        for _ in range(5):
            torch.manual_seed(0)
            futures.append(engine.submit([1, 2], max_new_tokens=12, **options))
        streamer.go.set()
        drawn = [result(future).tokens for future in futures]
        result(first)
    assert len(drawn[0]) == 12
    assert drawn == [drawn[0]] * 5


def test_other_settings_wait_for_their_turn_and_nobody_is_passed_over(engine: Engine, model: Any) -> None:
    order: list[str] = []
    streamer, first = held(engine)
    futures = {}
    for name, options in (("other", {"eos_token_id": STOP}), ("like the first", {"eos_token_id": None}), ("again", {})):
        futures[name] = engine.submit([1, 2], max_new_tokens=4, **options)
        futures[name].add_done_callback(lambda _, name=name: order.append(name))
    streamer.go.set()
    assert result(futures["other"]).tokens == free(model, [1, 2], 4, eos_token_id=STOP)
    assert result(futures["like the first"]).tokens == free(model, [1, 2], 4)
    result(futures["again"])
    assert first.done()
    assert order == ["other", "like the first", "again"]


def test_criteria_and_limits_are_each_requests_own(model: Any) -> None:
    whole = free(model, [4, 5, 6], 30)
    with Engine(model, batch_size=4, max_length=64, strategy=Verified(3, threshold=0.2)) as engine:
        options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": None}

        def at(n: int) -> Callable[[Tensor, Any], bool]:
            return lambda ids, scores: ids.shape[1] >= 3 + n

        futures = [engine.submit([4, 5, 6], stopping_criteria=[at(n)], **options) for n in (2, 7, 19)]
        futures.append(engine.submit([4, 5, 6], **{**options, "max_new_tokens": 11}))
        outputs = [result(future) for future in futures]
    assert [output.tokens for output in outputs] == [whole[:2], whole[:7], whole[:19], whole[:11]]
    assert [output.finish_reason for output in outputs] == ["criteria"] * 3 + ["length"]


def test_an_idle_engine_leaves_the_model_free_and_sees_what_becomes_of_it(engine: Engine, model: Any) -> None:
    before = result(engine.submit([5, 6], max_new_tokens=20, eos_token_id=None)).tokens
    assert free(model, [5, 6], 20) == before
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5 + p.sin())
    after = free(model, [5, 6], 20)
    assert after != before
    assert result(engine.submit([5, 6], max_new_tokens=20, eos_token_id=None)).tokens == after


def test_blocks_are_read_as_they_come(engine: Engine, model: Any) -> None:
    wanted = free(model, [5, 6, 7], 24)
    blocks = list(engine.stream(torch.tensor([[5, 6, 7]]), max_new_tokens=24, eos_token_id=None))
    assert [token for (new,) in blocks for token in new] == wanted
    assert len(blocks) > 3
    buffer = torch.tensor([[5, 6, 7]])
    with engine.stream(buffer, max_new_tokens=LONG, eos_token_id=None) as blocks:
        buffer.fill_(1)
        next(blocks)
    assert blocks.output[0, :4].tolist() == [5, 6, 7, wanted[0]]
    assert result(engine.submit([5, 6, 7], max_new_tokens=24, eos_token_id=None)).tokens == wanted


def test_a_buffer_may_be_filled_with_the_next(engine: Engine, model: Any) -> None:
    prompts, buffer = torch.tensor([[5, 6, 7], [1, 2, 3]]), torch.empty(3, dtype=torch.int64)
    with engine._line.changed:  # none is read before both are there
        futures = [engine.submit(buffer.copy_(prompt), max_new_tokens=8, eos_token_id=None) for prompt in prompts]
    assert [result(f).tokens for f in futures] == [free(model, prompt.tolist(), 8) for prompt in prompts]


@pytest.mark.parametrize("by_streamer", [False, True])
def test_who_has_left_before_its_turn_is_not_read(
    by_streamer: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    chunk = Decoder.prefill_chunk
    monkeypatch.setattr(Decoder, "prefill_chunk", lambda *x, **y: read.append(int(x[2][0, 0])) or chunk(*x, **y))
    left: Any = SimpleNamespace(closed=threading.Event(), put=lambda value: None, end=lambda: None)
    with Engine(model, batch_size=1, max_length=64, check_model=False) as engine:

        def leave(value: Any) -> None:
            for request in engine._line.inside.values():
                if request.future is second:
                    left.closed.set() if by_streamer else request.end()

        with engine._line.changed:  # both are looked at when the first comes in
            streamer: Any = SimpleNamespace(put=leave, end=lambda: None)
            first = engine.submit([5, 6], max_new_tokens=4, eos_token_id=None, streamer=streamer)
            second = engine.submit([7, 8], max_new_tokens=4, eos_token_id=None, streamer=left)
        assert len(result(first).tokens) == 4
        assert (result(second).finish_reason, result(second).tokens) == ("closed", [])
        prompt = torch.tensor([[7, 8]])
        assert engine.generate(prompt, max_new_tokens=4, streamer=left).equal(prompt) == by_streamer
    assert read == ([5] if by_streamer else [5, 7])


@pytest.mark.parametrize("strategy", [Verified(3, threshold=0.2), ConfAdapt(3, threshold=0.3)], ids=repr)
def test_one_capture_serves_all_runs(strategy: Strategy, recorded: type[RecordedStep], model: Any) -> None:
    prompts, new = mixed_prompts(9)
    expected = [alone(model, p, n, strategy).tokens for p, n in zip(prompts, new)]
    mtpkern.release_graphs()
    recorded.captures = 0
    with Engine(model, batch_size=3, max_length=64, strategy=strategy) as engine:
        for _ in range(2):
            futures = [engine.submit(p, max_new_tokens=n, eos_token_id=STOP) for p, n in zip(prompts, new)]
            assert [result(future).tokens for future in futures] == expected
    assert recorded.captures == 2  # the pass, and the plan behind a newcomer
    assert len(kept(model)) == 1
