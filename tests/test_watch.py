"""What watches a run: shown as it is certain, stopped where transformers' own greedy loop stops, whatever the block."""

from typing import Any

import pytest
import torch
from transformers import (
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

import mtpkern
from mtpkern import Static, Verified, decoder
from mtpkern.poll import Poll
from mtpkern.strategies import Strategy
from mtpkern.watch import Watch
from support.slow import slow_but
from support.watching import (
    NEW,
    RULES,
    STOPS,
    TOKENS,
    Asked,
    Recorder,
    check_blocks,
    check_columns,
    check_strings,
    every_strategy,
    strings_of,
    theirs,
)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny.model("llama")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", slow_but(["one", "inputs"], "inputs"))
@pytest.mark.filterwarnings("ignore:k=")
def test_criteria_are_asked_what_generate_asks_them(
    rule: str, batch: str, model: Any, tiny: Any, request: pytest.FixtureRequest
) -> None:
    """The same prefixes in the same order, padding included, and the same text, to the streamer too."""
    given = {**request.getfixturevalue(batch), "max_new_tokens": NEW, "eos_token_id": STOPS}
    expected, shown = Asked(RULES[rule]), Recorder()
    text = theirs(model, tiny, **given, stopping_criteria=[expected], streamer=shown)
    for k in (1, 3, 8):
        asked, streamer = Asked(RULES[rule]), Recorder()
        options = {"stopping_criteria": StoppingCriteriaList([asked]), "streamer": streamer}
        assert mtpkern.generate(model, **given, **options, strategy=Verified(k, 0.0)).equal(text)
        assert asked.prefixes == expected.prefixes
        assert streamer.got == shown.got


def test_stop_strings_end_where_generate_ends(model: Any, inputs: Any, tokenizer: Any, tiny: Any) -> None:
    given = {**inputs, "max_new_tokens": NEW, "eos_token_id": STOPS[0]}
    text = theirs(model, tiny, **given)[:, 12:].tolist()
    strings = strings_of(text)
    outputs = set()
    for i, string in enumerate(strings):
        stops = string if i % 3 else [string, strings[i - 1] + "a"]
        expected = theirs(model, tiny, **given, stop_strings=stops, tokenizer=tokenizer)
        output = mtpkern.generate(
            model, **given, stop_strings=stops, tokenizer=tokenizer, strategy=Verified(1 + i % 8, 0.0)
        )
        assert output.equal(expected), string
        outputs.add(str(expected.tolist()))
    assert len(outputs) > 8


@pytest.mark.parametrize("late", slow_but([False, True], False))
@every_strategy
def test_stop_strings_at_every_place_of_a_block(
    strategy: Strategy, late: bool, model: Any, inputs: Any, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    check_strings(strategy, model, inputs, tokenizer, late and request)


@pytest.mark.parametrize("late", [False, True])
@every_strategy
def test_criteria_and_streamers_of_every_strategy(
    strategy: Strategy, late: bool, model: Any, inputs: Any, request: pytest.FixtureRequest
) -> None:
    check_columns(strategy, model, inputs, late and request)


def test_criteria_for_length_and_stop_tokens_take_the_place_of_the_configurations(
    model: Any, inputs: Any, tiny: Any
) -> None:
    """As in transformers, also where they allow more."""
    for criteria in (
        [MaxLengthCriteria(15)],
        [MaxLengthCriteria(30)],
        [EosTokenCriteria([6, 9])],
        [MaxLengthCriteria(5)],
    ):
        given = {**inputs, "max_new_tokens": NEW, "eos_token_id": STOPS, "stopping_criteria": criteria}
        assert mtpkern.generate(model, **given).equal(theirs(model, tiny, **given))


def test_a_stop_token_and_a_stop_string_on_one_token_are_a_stop(model: Any, one: Any, tokenizer: Any) -> None:
    given = {**one, "strategy": Static(4), "max_new_tokens": 8, "tokenizer": tokenizer, "return_dict_in_generate": True}
    token = mtpkern.generate(model, **given).sequences[0, 9].item()
    output = mtpkern.generate(model, **given, stop_strings=TOKENS[token], eos_token_id=token)
    assert output.finish_reasons == ["stop"]
    output = mtpkern.generate(model, **given, stop_strings=TOKENS[token], stopping_criteria=[lambda ids, scores: True])
    assert output.finish_reasons == ["criteria"]


# Blocks


@pytest.mark.parametrize("late", [False, True])
@every_strategy
def test_blocks_are_the_passes(
    strategy: Strategy, late: bool, model: Any, inputs: Any, request: pytest.FixtureRequest
) -> None:
    check_blocks(strategy, model, inputs, late and request)


def test_blocks_show_only_what_will_stand(model: Any, inputs: Any, tokenizer: Any) -> None:
    for options in (
        {"stop_strings": ["ab", "h", "dd"], "tokenizer": tokenizer},
        *({"stopping_criteria": [Asked(rule)]} for rule in RULES.values()),
    ):
        given = {**inputs, "max_new_tokens": NEW, "strategy": Static(4), **options}
        blocks = list(mtpkern.stream(model, **given))
        output = mtpkern.generate(model, **given, return_dict_in_generate=True)
        for b, row in enumerate(output.sequences.tolist()):
            assert [x for block in blocks for x in block[b]] == row[12 : 12 + sum(output.blocks[b])]


# What the device is told


@pytest.mark.parametrize("late", [False, True])
def test_a_sequence_that_is_stopped_brings_no_more_rows(
    late: bool, model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if late:
        request.getfixturevalue("lagging")
    rows: list[list[int]] = []
    step = decoder.Decoder.step

    def noting(self: Any, route: Any) -> Any:
        rows.append(self.rows.start.diff().tolist())
        return step(self, route)

    monkeypatch.setattr(decoder.Decoder, "step", noting)
    second = [lambda ids, scores: (torch.arange(3) == 1) & (ids.shape[1] >= 12 + 6)]
    given = {**inputs, "strategy": Static(3), "max_new_tokens": 24}
    output = mtpkern.generate(model, **given, stopping_criteria=second, return_dict_in_generate=True)
    assert output.blocks[1] == [3, 3]
    assert output.finish_reasons == ["length", "criteria", "length"]
    # Two passes write them; one has been planned by then, and on a GPU another is under way.
    assert all(row[1] for row in rows[: 2 + late])
    assert not any(row[1] for row in rows[2 + late :])
    rows.clear()
    mtpkern.generate(model, **given, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 12 + 6])
    assert len(rows) == 1 + late


def test_nobody_watches_and_nothing_is_added(model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "begin", lambda *_, **__: pytest.fail("somebody watches"))
    seen = []
    take = Poll.take
    monkeypatch.setattr(Poll, "take", lambda self, state: seen.append(state) or take(self, state))
    mtpkern.generate(model, **inputs, max_new_tokens=4, stopping_criteria=[], streamer=None, stop_strings=None)
    assert seen
    assert all(state.shape == (3,) for state in seen)
