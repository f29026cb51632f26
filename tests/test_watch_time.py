"""Time as a limit: a run ends behind the pass that exceeds it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.generation import MaxTimeCriteria

import mtpkern
from mtpkern import Static
from mtpkern.strategies import Strategy
from support.watching import NEW, STOPS, TOKENS, every_strategy, theirs


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny.model("llama")


@pytest.fixture
def seconds(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pass takes one second."""
    now = [0.0]
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", SimpleNamespace(time=lambda: now[0]))
    hook = model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    yield
    hook.remove()


@every_strategy
def test_time_ends_a_run_behind_the_pass_that_exceeds_it(
    strategy: Strategy, model: Any, inputs: Any, seconds: None
) -> None:
    given = {**inputs, "strategy": strategy, "max_new_tokens": 30, "return_dict_in_generate": True}
    given["check_model"] = False  # a model with hooks is looked at anew, which takes passes
    free = mtpkern.generate(model, **given)
    for limit, passes in ((0, 1), (0.5, 1), (2.5, 3)):
        output = mtpkern.generate(model, **given, max_time=limit)
        assert output.finish_reasons == ["time"] * 3
        assert output.blocks == [blocks[:passes] for blocks in free.blocks]
        for row, all_of_it, blocks in zip(output.sequences, free.sequences, output.blocks):
            assert row[: 12 + sum(blocks)].equal(all_of_it[: 12 + sum(blocks)])
    assert mtpkern.generate(model, **given, max_time=99).finish_reasons == ["length"] * 3


def test_time_is_generates_own_where_a_pass_is_a_token(model: Any, inputs: Any, tiny: Any, seconds: None) -> None:
    given = {**inputs, "max_new_tokens": NEW, "max_time": 4.5, "eos_token_id": STOPS}
    ours = {"strategy": Static(1), "check_model": False}
    output = mtpkern.generate(model, **given, **ours)
    assert output.equal(theirs(model, tiny, **given))
    assert output.shape == (3, 17)
    # The caller's own takes its place.
    output = mtpkern.generate(model, **given, **ours, stopping_criteria=[MaxTimeCriteria(2.5)])
    assert output.equal(theirs(model, tiny, **given, stopping_criteria=[MaxTimeCriteria(2.5)]))
    assert output.shape == (3, 15)


def test_what_the_models_file_says_of_strings_and_time_counts(
    model: Any, tiny: Any, inputs: Any, tokenizer: Any, seconds: None
) -> None:
    own = tiny.model("llama")
    text = mtpkern.generate(own, **inputs, max_new_tokens=NEW)
    string = TOKENS[text[0, 14]]
    own.generation_config.stop_strings = [string]
    with pytest.warns(UserWarning, match="stop_strings="):  # without a tokenizer nobody can look for them
        assert mtpkern.generate(own, **inputs, max_new_tokens=NEW).equal(text)
    expected = mtpkern.generate(own, **inputs, max_new_tokens=NEW, stop_strings=string, tokenizer=tokenizer)
    assert mtpkern.generate(own, **inputs, max_new_tokens=NEW, tokenizer=tokenizer).equal(expected)
    assert not expected.equal(text)
    none = {"stop_strings": None, "max_new_tokens": NEW}
    assert mtpkern.generate(own, **inputs, **none, tokenizer=tokenizer).equal(text)
    own.generation_config.max_time = 0.5
    passes_of_a_second = {**none, "strategy": Static(1), "check_model": False}
    own.register_forward_hook(model._forward_hooks[next(iter(model._forward_hooks))])
    assert mtpkern.generate(own, **inputs, **passes_of_a_second).shape == (3, 13)
    assert mtpkern.generate(own, **inputs, **passes_of_a_second, max_time=2.5).shape == (3, 15)
    assert mtpkern.generate(own, **inputs, **passes_of_a_second, max_time=None).shape == (3, 12 + NEW)
