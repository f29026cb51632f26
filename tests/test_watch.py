"""What watches a run: shown as it is certain, stopped where transformers' own greedy loop stops, whatever the block."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, decoder, generation, graph
from mtpkern.poll import LAG, Poll
from mtpkern.strategies import Strategy
from mtpkern.watch import Watch

NEW = 11
STOPS = [3, 7]
# One letter a token, and some of several: stop strings begin and end inside of tokens.
TOKENS = ["a", "b", "c", "d", "e", "f", "g", "h", "ab", "cab", "dd", "fgh", "i", "j", "bad", "<mask>"]
STRATEGIES = [Static(4), ConfAdapt(5, 0.1), Verified(4, threshold=0.0), Verified(4, threshold=0.0, masks=9)]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def inputs(tiny: Any) -> dict[str, Tensor]:
    ids, real = tiny.prompts(9, 4, 12)
    return {"input_ids": ids, "attention_mask": real}


@pytest.fixture(scope="module")
def one(tiny: Any) -> dict[str, Tensor]:
    ids, real = tiny.prompts(7)
    return {"input_ids": ids, "attention_mask": real}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models

    plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of the device are read late, as on a GPU."""

    class Event:
        def __init__(self, device: Any) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    init = Poll.__init__

    def late(self: Any, sequences: Any) -> None:
        init(self, sequences)
        self.on_cpu = False
        self.copies = torch.empty(LAG + 1, *self.state().shape, dtype=torch.int64)
        self.events = [Event(None)] * (LAG + 1)

    monkeypatch.setattr(Poll, "__init__", late)


@pytest.fixture
def kept(model: Any, monkeypatch: pytest.MonkeyPatch, lagging: None) -> Iterator[Callable[[], int]]:
    """Decoders are kept, and steps captured by a stand-in that runs them; says how many there are."""

    class Captured:
        def __init__(self, step: Any, device: Any, beside: Any) -> None:
            self.replay = step

    class Event:
        def __init__(self, device: Any) -> None: ...
        def record(self) -> None: ...
        def wait(self) -> None: ...

    monkeypatch.setattr(graph, "CapturedStep", Captured)
    monkeypatch.setattr(graph, "on_side_stream", lambda device: nullcontext())
    monkeypatch.setattr(graph, "memory_of", lambda device: 1 << 40)
    monkeypatch.setattr(torch, "Event", Event)
    for module in ("mtpkern.decoder", "mtpkern.options"):
        monkeypatch.setattr(f"{module}.wants_graph", lambda use_graph, device: use_graph is not False)
    graph.release_graphs()
    yield lambda: len(graph._kept.get(model, {}))
    graph.release_graphs()


class Recorder:
    """A streamer that notes what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        assert value.dtype == torch.int64
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


class Asked(StoppingCriteria):
    """A criterion that notes what it is asked of."""

    def __init__(self, rule: Callable[[Tensor], Any]) -> None:
        self.rule = rule
        self.prefixes: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        assert scores is None
        self.prefixes.append(input_ids.tolist())
        return self.rule(input_ids)


RULES: dict[str, Callable[[Tensor], Any]] = {
    "each by itself": lambda ids: (ids[:, -1] == 13) | (ids[:, -2:].sum(1) == 0),
    "one for all": lambda ids: bool((ids[:, -1] == 6).any()),
    "by the batch": lambda ids: (ids[:, -1:] == ids[:, -1]).sum(1) > 1,
    "at once": lambda ids: True,
    "never": lambda ids: False,
    "by the whole text": lambda ids: ids.sum(1) % 11 == 0,
}


def theirs(model: Any, tiny: Any, **kwargs: Any) -> Any:
    return model.generate(**kwargs, do_sample=False, suppress_tokens=[tiny.mask])


def in_step(prompts: Tensor, texts: Tensor, criteria: Any, pad: int, streamer: Any = None) -> Tensor:
    """The loop of transformers' greedy decoding over texts [B, n] that it would write; `theirs` shows that it is."""
    ids, going = prompts, torch.ones(len(prompts), dtype=torch.bool)
    if streamer is not None:
        streamer.put(ids)
    for column in texts.T:
        ids = torch.cat([ids, torch.where(going, column, pad)[:, None]], dim=1)
        going = going & ~criteria(ids, None)
        if streamer is not None:
            streamer.put(ids[:, -1])
        if not going.any():
            break
    if streamer is not None:
        streamer.end()
    return ids


def strings_of(texts: list[list[int]]) -> list[str]:
    """Of each text every letter and every few letters, so that stops fall on every place of every block."""
    found: dict[str, None] = {}
    for tokens in texts:
        text = "".join(TOKENS[token] for token in tokens)
        for width in (1, 3):
            found |= dict.fromkeys(text[i : i + width] for i in range(0, len(text) - width + 1, width))
    return list(found)


# Equal to transformers, token by token


@pytest.mark.parametrize("batch", ["one", "inputs"])
@pytest.mark.parametrize("limits", [{}, {"eos_token_id": STOPS}], ids=str)
def test_a_streamer_gets_what_generate_gives_it(
    batch: str, limits: Any, model: Any, tiny: Any, request: pytest.FixtureRequest
) -> None:
    given = {**request.getfixturevalue(batch), "max_new_tokens": NEW, **limits}
    expected = Recorder()
    text = theirs(model, tiny, **given, streamer=expected)
    assert expected.got[-1] == "end"
    for k in (1, 2, 3, 5, 8):
        streamer = Recorder()
        assert mtpkern.generate(model, **given, strategy=Verified(k, 0.0), streamer=streamer).equal(text)
        assert streamer.got == expected.got


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", ["one", "inputs"])
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


@pytest.mark.parametrize("late", [False, True])
@every_strategy
def test_stop_strings_at_every_place_of_a_block(
    strategy: Strategy, late: bool, model: Any, inputs: Any, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    check_strings(strategy, model, inputs, tokenizer, late and request)


def check_strings(strategy: Strategy, model: Any, inputs: Any, tokenizer: Any, late: Any = False) -> None:
    free = mtpkern.generate(
        model, **inputs, max_new_tokens=NEW, strategy=strategy, return_dict_in_generate=True, pad_token_id=0
    )
    texts = free.sequences[:, 12:]
    if late:
        late.getfixturevalue("lagging")
    places = set()
    for string in strings_of(texts.tolist()):
        criterion = StopStringCriteria(tokenizer, string)
        expected = in_step(inputs["input_ids"], texts, criterion, 0)
        output = mtpkern.generate(
            model,
            **inputs,
            max_new_tokens=NEW,
            strategy=strategy,
            stop_strings=[string],
            tokenizer=tokenizer,
            return_dict_in_generate=True,
        )
        assert output.sequences.equal(expected), string
        for b, reason in enumerate(output.finish_reasons):
            emitted = sum(output.blocks[b])
            assert reason == ("stop_string" if "stop_string" in reason else "length")
            assert output.passes[b] == len(output.blocks[b])
            assert output.tokens_per_pass[b] == emitted / output.passes[b]
            # The record is that of the free run, cut.
            assert output.blocks[b][:-1] == free.blocks[b][: output.passes[b] - 1]
            assert 0 < output.blocks[b][-1] <= free.blocks[b][output.passes[b] - 1]
            assert bool(criterion(expected[b : b + 1, : 12 + emitted], None)) == (reason == "stop_string")
            assert (expected[b, 12 + emitted :] == 0).all()
            if reason == "stop_string":
                places.add((free.blocks[b][output.passes[b] - 1], output.blocks[b][-1]))
    width = 2 if strategy.verify else 4
    assert {place for size, place in places if size >= width} >= set(range(1, width + 1))


@pytest.mark.parametrize("late", [False, True])
@every_strategy
def test_criteria_and_streamers_of_every_strategy(
    strategy: Strategy, late: bool, model: Any, inputs: Any, request: pytest.FixtureRequest
) -> None:
    check_columns(strategy, model, inputs, late and request)


def check_columns(strategy: Strategy, model: Any, inputs: Any, late: Any = False) -> None:
    options = {**inputs, "max_new_tokens": NEW, "strategy": strategy, "pad_token_id": 0}
    texts = mtpkern.generate(model, **options)[:, 12:]
    if late:
        late.getfixturevalue("lagging")
    for rule in RULES.values():
        expected, shown, asked, streamer = Asked(rule), Recorder(), Asked(rule), Recorder()
        cut = in_step(inputs["input_ids"], texts, StoppingCriteriaList([expected]), 0, shown)
        output = mtpkern.generate(
            model, **options, stopping_criteria=[asked], streamer=streamer, return_dict_in_generate=True
        )
        assert output.sequences.equal(cut)
        assert asked.prefixes == expected.prefixes
        assert streamer.got == shown.got
        assert set(output.finish_reasons) <= {"criteria", "length"}


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


# transformers' own streamers


def test_text_streamers(model: Any, one: Any, tokenizer: Any, tiny: Any, capsys: Any) -> None:
    given = {**one, "max_new_tokens": NEW}
    theirs(model, tiny, **given, streamer=TextStreamer(tokenizer))
    expected = capsys.readouterr().out
    mtpkern.generate(model, **given, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == expected != ""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=mtpkern.generate, args=(model,), kwargs={**given, "streamer": streamer})
    thread.start()
    chunks = list(streamer)
    thread.join()
    text = tokenizer.decode(theirs(model, tiny, **given)[0, 7:])
    assert "".join(chunks) == text

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True)
        thread = threading.Thread(target=mtpkern.generate, args=(model,), kwargs={**given, "streamer": streamer})
        thread.start()
        return "".join([chunk async for chunk in streamer])

    assert asyncio.run(read()) == text


def test_a_text_streamer_refuses_a_batch_as_in_transformers(model: Any, inputs: Any, tokenizer: Any, tiny: Any) -> None:
    errors = []
    for call in (lambda **kw: theirs(model, tiny, **kw), lambda **kw: mtpkern.generate(model, **kw)):
        with pytest.raises(ValueError, match="batch size 1") as error:
            call(**inputs, max_new_tokens=4, streamer=TextStreamer(tokenizer))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


# Blocks


@pytest.mark.parametrize("late", [False, True])
@every_strategy
def test_blocks_are_the_passes(
    strategy: Strategy, late: bool, model: Any, inputs: Any, request: pytest.FixtureRequest
) -> None:
    check_blocks(strategy, model, inputs, late and request)


def check_blocks(strategy: Strategy, model: Any, inputs: Any, late: Any = False) -> None:
    given = {**inputs, "max_new_tokens": NEW, "eos_token_id": STOPS, "strategy": strategy}
    expected = mtpkern.generate(model, **given, return_dict_in_generate=True)
    if late:
        late.getfixturevalue("lagging")
    stream = mtpkern.stream(model, **given, return_dict_in_generate=True)
    blocks = list(stream)
    for b, text in enumerate(expected.sequences[:, 12:].tolist()):
        assert [len(block[b]) for block in blocks if block[b]] == expected.blocks[b]
        assert [token for block in blocks for token in block[b]] == text[: sum(expected.blocks[b])]
    assert stream.output.sequences.equal(expected.sequences)
    assert stream.output.blocks == expected.blocks
    assert stream.output.finish_reasons == expected.finish_reasons
    assert next(stream, None) is None


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


def second_early(ids: Tensor, scores: Any) -> Tensor:
    return (torch.arange(3) == 1) & (ids.shape[1] >= 12 + 5)


def test_a_run_that_begins_anew_shows_nothing_twice(model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a kernel cannot be compiled: with plain operations the same tokens come again."""
    given = {**inputs, "max_new_tokens": NEW, "strategy": Static(3), "check_model": False}
    expected = Recorder()
    text = mtpkern.generate(model, **given, streamer=expected, stopping_criteria=[second_early])
    monkeypatch.setattr(generation, "without_kernels", lambda error, device: isinstance(error, KeyError))
    passes = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyError

    hook = model.register_forward_hook(fail)
    streamer = Recorder()
    again = mtpkern.generate(model, **given, streamer=streamer, stopping_criteria=[second_early])
    hook.remove()
    assert streamer.got == expected.got
    assert again.equal(text)


# Whoever leaves


class Leaves(Exception):
    pass


@pytest.mark.parametrize("error", [Leaves, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["prompts", "tokens", "end", "criterion"])
def test_an_exception_in_a_callback_leaves_model_and_decoder_whole(
    where: str, error: type[BaseException], model: Any, inputs: Any, kept: Callable[[], int]
) -> None:
    given = {**inputs, "max_new_tokens": NEW, "strategy": Static(3)}
    expected = mtpkern.generate(model, **given, return_dict_in_generate=True)
    calls = 0

    def fail(here: str) -> None:
        nonlocal calls
        calls += here == where
        if here == where and calls > 3 * (where in ("tokens", "criterion")):
            raise error

    class Failing:
        def put(self, value: Tensor) -> None:
            fail("prompts" if value.ndim == 2 else "tokens")

        def end(self) -> None:
            fail("end")

    def criterion(ids: Tensor, scores: Any) -> bool:
        fail("criterion")
        return False

    with pytest.raises(error):
        mtpkern.generate(model, **given, streamer=Failing(), stopping_criteria=[criterion])
    assert model.config._attn_implementation == "sdpa"
    # A run that was broken off is not kept; one that had not begun, or was over, is.
    assert kept() == (where in ("prompts", "end"))
    again = mtpkern.generate(model, **given, return_dict_in_generate=True)
    assert again.sequences.equal(expected.sequences)
    assert again.blocks == expected.blocks
    assert kept() == 1


@pytest.mark.parametrize("how", ["close", "with", "break", "forgotten", "interrupt"])
def test_a_reader_that_leaves_early(
    how: str, model: Any, inputs: Any, kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**inputs, "max_new_tokens": 60, "strategy": Static(3), "return_dict_in_generate": True}
    given["check_model"] = False  # a model with hooks is looked at anew, which takes passes
    passes = -100
    read = threading.Event()

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            assert read.wait(10)

    hook = model.register_forward_hook(count)
    expected = mtpkern.generate(model, **given)
    passes = 0
    stream = mtpkern.stream(model, **given)
    assert next(stream) == [row[12:15].tolist() for row in expected.sequences]
    if how == "interrupt":
        items = stream._sink.items
        stream._sink.items = SimpleNamespace(get=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        stream._sink.items = items
    closed, output, thread = stream._sink.closed, None, stream._thread
    if how in ("close", "with"):
        threading.Timer(0.05, read.set).start()
        if how == "close":
            stream.close()
        else:
            with stream:
                pass
        output = stream.output
    elif how == "break":
        threading.Timer(0.05, read.set).start()
        for _ in stream:
            break
    del stream
    assert closed.is_set()
    read.set()
    thread.join()
    if output is not None:
        assert output.finish_reasons == ["closed"] * 3
        assert output.blocks == [blocks[: output.passes[0]] for blocks in expected.blocks]
        assert output.sequences.equal(expected.sequences[:, : output.sequences.shape[1]])
    assert passes < 8
    assert kept() == 1
    passes = -100
    assert mtpkern.generate(model, **given).sequences.equal(expected.sequences)
    hook.remove()


def test_a_stream_raises_what_generate_raises(model: Any, inputs: Any) -> None:
    for wrong, message in (
        ({"num_beams": 2}, "num_beams=2"),
        ({"input_ids": torch.full((3, 12), 99)}, "from 0 to 15"),
        ({"streamer": Recorder()}, "takes no streamer"),
    ):
        with pytest.raises(ValueError, match=message):
            mtpkern.stream(model, **{**inputs, "max_new_tokens": 4, **wrong})

    def fail(ids: Tensor, scores: Any) -> None:
        if ids.shape[1] > 13:
            raise Leaves

    stream = mtpkern.stream(model, **inputs, max_new_tokens=NEW, strategy=Static(1), stopping_criteria=[fail])
    with pytest.raises(TypeError):
        list(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.output is None


def test_a_fault_behind_the_end_is_none(model: Any, one: Any, lagging: None) -> None:
    """A pass that ran before the host could say stop is cut off, whatever it has come to."""
    passes = 0

    def spoil(module: Any, args: Any, logits: Tensor) -> Tensor | None:
        nonlocal passes
        passes += 1
        return logits * torch.nan if passes == 3 else None

    given = {**one, "max_new_tokens": NEW, "strategy": Static(3), "check_model": False}
    expected = mtpkern.generate(model, **given)
    hook = model.lm_head.register_forward_hook(spoil)
    output = mtpkern.generate(model, **given, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 7 + 6])
    assert output.equal(expected[:, : 7 + 6])
    assert passes == 3
    passes = 0
    with pytest.raises(RuntimeError, match="NaN"):
        mtpkern.generate(model, **given, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 7 + 7])
    hook.remove()


# Planted faults


def drafts_count_as_certain(watch: Watch, monkeypatch: Any) -> None:
    poll = Watch.poll

    def planted(self: Watch, sequences: Any, strategy: Any) -> Any:
        made = poll(self, sequences, strategy)
        self.verify = False
        return made

    monkeypatch.setattr(Watch, "poll", planted)


def strings_at_the_end_of_a_block_alone(watch: Watch, monkeypatch: Any) -> None:
    ask = Watch._ask_strings
    monkeypatch.setattr(Watch, "_ask_strings", lambda self, added: ask(self, [min(n, 1) for n in added]))


def one_token_more(watch: Watch, monkeypatch: Any) -> None:
    end = Watch._end

    def late(self: Watch, b: int, at: int, reason: str) -> None:
        end(self, b, min(at + (reason in ("stop_string", "criteria")), self.certain[b]), reason)

    monkeypatch.setattr(Watch, "_end", late)


def padding_is_something_else(watch: Watch, monkeypatch: Any) -> None:
    begin = Watch.begin
    monkeypatch.setattr(Watch, "begin", lambda *args, **options: begin(*args, **{**options, "padding": 5}))


def ends_are_forgotten(watch: Watch, monkeypatch: Any) -> None:
    end = Watch._end

    def keeping(self: Watch, b: int, at: int, reason: str) -> None:
        text = list(self.text[b])
        end(self, b, at, reason)
        self.text[b] = text

    monkeypatch.setattr(Watch, "_end", keeping)


def columns_skip(watch: Watch, monkeypatch: Any) -> None:
    step = Watch._step_columns

    def skipping(self: Watch) -> None:
        self.columns += self.columns == 4
        step(self)

    monkeypatch.setattr(Watch, "_step_columns", skipping)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (drafts_count_as_certain, check_blocks),
        (drafts_count_as_certain, check_columns),
        (strings_at_the_end_of_a_block_alone, check_strings),
        (one_token_more, check_strings),
        (one_token_more, check_columns),
        (padding_is_something_else, check_columns),
        (ends_are_forgotten, check_columns),
        (columns_skip, check_columns),
    ],
    ids=lambda x: x.__name__,
)
def test_a_planted_fault_is_seen(
    fault: Any, check: Any, model: Any, inputs: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(None, monkeypatch)
    strategy = Verified(4, threshold=0.0) if fault is drafts_count_as_certain else Static(4)
    with pytest.raises(AssertionError):
        check(strategy, model, inputs, *([tokenizer] if check is check_strings else []))
