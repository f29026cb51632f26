"""Requests that sample, each as it likes, share passes with greedy ones, and draw what they draw alone."""

import random
import threading
from typing import Any

import pytest
import torch

import mtpkern
from mtpkern import ConfAdapt, Engine, Static, Verified, choosing, settings
from mtpkern.strategies import Strategy
from support.engines import LONG, free, held, result
from support.recording import RecordedStep, kept

EXACT = Verified(3, threshold=0.1)
OTHER: dict[str, Any] = {"temperature": 0.4, "top_k": 5}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.6},
    {"do_sample": True},
    {"do_sample": True, "temperature": 1.7, "top_k": 0},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.8},
    {"do_sample": True, "top_k": 3, "min_p": 0.05},
    {"do_sample": True, "top_k": 70, "repetition_penalty": 0.7},
    {"sequence_bias": {(3,): 2.5, (9,): -40.0}, "bad_words_ids": [[4], [1]]},
    {"no_repeat_ngram_size": 2, "suppress_tokens": [2, 13]},
    {"do_sample": True, "min_new_tokens": 6, "eos_token_id": [3, 7, 9], "no_repeat_ngram_size": 1},
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("strategy", [EXACT, ConfAdapt(3, threshold=0.3), Static(2)], ids=repr)
def test_each_gets_what_it_gets_alone(
    model: Any, strategy: Strategy, late: bool, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(5)
    asked = [([rng.randrange(1, 14) for _ in range(rng.randrange(1, 9))], rng.choice(SETTINGS)) for _ in range(24)]
    expected = []
    for seed, (prompt, options) in enumerate(asked):
        torch.manual_seed(seed)
        expected.append(free(model, prompt, 12, strategy=strategy, **options))
    if late:
        request.getfixturevalue("lagging")
    futures = []
    with Engine(model, batch_size=4, max_length=64, strategy=strategy) as engine:
        for seed, (prompt, options) in enumerate(asked):
            futures.append(engine.submit(prompt, max_new_tokens=12, seed=seed, **{"eos_token_id": None, **options}))
        assert [result(future).tokens for future in futures] == expected


def test_they_share_passes_with_who_runs(model: Any, passes: list[int]) -> None:
    with Engine(model, batch_size=4, max_length=64, strategy=EXACT) as engine:
        biased = {"sequence_bias": {(3,): 2.0}, "no_repeat_ngram_size": 3}
        streamer, first = held(engine, do_sample=True, temperature=1.3, top_p=0.9, **biased)
        options: list[dict[str, Any]] = [
            *({}, {"do_sample": True}, {"sequence_bias": {(4,): -2.0, (5,): 1.0}, "no_repeat_ngram_size": 2}),
        ]
        others = [engine.submit([1, 2], max_new_tokens=9, eos_token_id=None, **more) for more in options]
        streamer.go.set()
        for future in (*others, first):
            result(future)
    assert max(passes) == 4
    assert passes.count(4) >= 3


def test_those_in_line_share_the_next_run(engine: Engine, passes: list[int]) -> None:
    streamer, first = held(engine)  # a greedy one, so that nobody who samples comes in
    options: list[dict[str, Any]] = [{"repetition_penalty": 1.4}, {"do_sample": True}, {"do_sample": True, **OTHER}]
    others = [engine.submit([1, 2], max_new_tokens=9, eos_token_id=None, **more) for more in options]
    streamer.go.set()
    for future in (first, *others):
        result(future)
    alone = passes.index(3)
    assert set(passes[:alone]) == {1}
    assert passes[alone:].count(3) >= 3


def test_who_asks_for_what_came_of_late_shares_passes(
    engine: Engine, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run without it forgets it again."""
    idle = threading.Event()
    monkeypatch.setattr("mtpkern.line.lend_processors", lambda device: idle.set())
    options: dict[str, Any] = {"eos_token_id": None, "do_sample": True, "no_repeat_ngram_size": 2}
    for together in (1, 2, 2, 0, 1, 2):
        idle.clear()
        passes.clear()
        streamer, first = held(engine)
        others = [engine.submit([1, 2], max_new_tokens=9, **options)] if together else []
        streamer.go.set()
        for future in (first, *others):
            result(future)
        assert max(passes) == max(1, together)
        assert idle.wait(60)


def test_a_pass_in_which_nobody_asks_for_anything_is_read_out_plainly(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever others of the run have asked for before."""
    drawn: list[int] = []
    draw = choosing.sample
    monkeypatch.setattr(choosing, "sample", lambda *args: drawn.append(len(args[0])) or draw(*args))
    with Engine(model, batch_size=1, max_length=64, strategy=EXACT) as engine:
        streamer, first = held(engine, do_sample=True, max_new_tokens=3)
        others = [engine.submit([1, 2], max_new_tokens=LONG, eos_token_id=None, seed=n) for n in range(2)]
        streamer.go.set()
        for future in (first, *others):
            result(future)
    assert 2 <= len(drawn) <= 5


def test_each_ends_at_its_own_stop_tokens(engine: Engine, model: Any, passes: list[int]) -> None:
    """One or several, or none at all, side by side; and in a slot that another's have been in."""
    each: list[Any] = [3, [9, 2], None, [4, 5, 6, 7], 11, None, [12, 2]]
    prompts = [[1 + i % 3, 2 + i] for i in range(len(each))]
    expected = [mtpkern.generate_batch(model, [p], max_new_tokens=30, eos_token_id=e)[0] for p, e in zip(prompts, each)]
    assert {output.finish_reason for output in expected} == {"stop", "length"}
    passes.clear()
    streamer, first = held(engine)
    futures = [engine.submit(p, max_new_tokens=30, eos_token_id=e) for p, e in zip(prompts, each)]
    streamer.go.set()
    result(first)
    found = [result(future) for future in futures]
    assert [(x.tokens, x.finish_reason) for x in found] == [(x.tokens, x.finish_reason) for x in expected]
    assert max(passes) > 2


def test_more_stop_tokens_than_there_are_places_for_wait(engine: Engine, model: Any, passes: list[int]) -> None:
    many = [9, 2, 3, 4, 5]
    (expected,) = mtpkern.generate_batch(model, [[1, 2]], max_new_tokens=30, eos_token_id=many)
    passes.clear()
    streamer, first = held(engine)
    future = engine.submit([1, 2], max_new_tokens=30, eos_token_id=many)
    streamer.go.set()
    result(first)
    assert result(future).tokens == expected.tokens
    assert max(passes) == 1


def test_who_asks_for_more_than_settings_has_a_run_of_its_own(engine: Engine, model: Any, passes: list[int]) -> None:
    ban: dict[str, Any] = {"bad_words_ids": [[3, 9], [7]]}
    expected = [free(model, [1, 2], 6), free(model, [1, 2], 6, **ban)]
    passes.clear()
    streamer, first = held(engine)
    options: list[dict[str, Any]] = [ban, ban, {}]
    others = [engine.submit([1, 2], max_new_tokens=6, eos_token_id=None, **more) for more in options]
    streamer.go.set()
    result(first)
    found = [result(future).tokens for future in others]
    assert found == [expected[1], expected[1], expected[0]]
    assert max(passes) == 2


def test_one_capture_serves_all_numbers(
    recorded: type[RecordedStep], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "may_look", lambda x: False)
    each = [
        {"temperature": t, "top_p": p, "sequence_bias": {(token,): 1.5}, "no_repeat_ngram_size": n, "min_new_tokens": 3}
        for t, p, token, n in ((0.5, 0.9, 3, 2), (1.5, 0.4, 7, 4), (1.0001, 0.999, 2, 3))
    ]
    given = {"input_ids": torch.tensor([[4, 5, 6]]), "max_new_tokens": 12, "strategy": EXACT, "eos_token_id": 9}
    expected = []
    for asked in each:
        torch.manual_seed(3)
        expected.append(mtpkern.generate(model, **given, do_sample=True, use_graph=False, **asked))
    assert not expected[0].equal(expected[1])
    mtpkern.release_graphs()
    recorded.captures = 0
    for asked, tokens in zip(each, expected):
        torch.manual_seed(3)
        assert mtpkern.generate(model, **given, do_sample=True, **asked).equal(tokens)
    assert recorded.captures == 1
    assert len(kept(model)) == 1


def test_a_seed_of_ones_own_is_torchs(model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.4, "eos_token_id": None}
    with Engine(model, batch_size=2, max_length=64, strategy=EXACT) as engine:
        for seed in (0, -5, 2**64 - 1):
            torch.manual_seed(seed)
            expected = free(model, [3, 4], 12, strategy=EXACT, **options)
            torch.manual_seed(7)
            state = torch.get_rng_state()
            assert result(engine.submit([3, 4], seed=seed, **options)).tokens == expected
            ids = torch.tensor([[3, 4]])
            assert engine.generate(ids, seed=seed, **options)[0, 2:].tolist() == expected
            (alone,) = mtpkern.generate_batch(model, [[3, 4]], seed=seed, strategy=EXACT, **options)
            assert alone.tokens == expected
            assert torch.equal(torch.get_rng_state(), state)
        for wrong, error in ((2**64, ValueError), ("a", TypeError), (1.5, ValueError)):
            with pytest.raises(error, match="seed must"):
                engine.submit([3, 4], seed=wrong, **options)
