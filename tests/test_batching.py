"""generate_batch: each prompt gets what it gets alone, whatever stands beside it."""

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import MaxTimeCriteria, MinNewTokensLengthLogitsProcessor

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, refill, slots
from mtpkern.attention import attention_context
from mtpkern.batching import generate_batch, iterate_batch
from mtpkern.decoder import Decoder
from mtpkern.kernels.state import RUNNING, Sequences
from mtpkern.strategies import Strategy
from support.batches import STOP, STRATEGIES, alone, assert_as_alone, broken_by_13, mixed_prompts
from support.recording import RecordedStep
from support.slow import slow_but


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Any:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def known(model: Any) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Prompts, limits, and what each gets alone."""
    prompts, new = mixed_prompts(seed=1)
    return prompts, new, [alone(model, prompt, n).tokens for prompt, n in zip(prompts, new)]


@pytest.mark.parametrize("strategy", slow_but(STRATEGIES, *STRATEGIES[:2]), ids=repr)
def test_each_gets_what_it_gets_alone(any_model: Any, strategy: Strategy) -> None:
    prompts, new = mixed_prompts(12)
    options = {"strategy": strategy, "max_new_tokens": new, "eos_token_id": STOP, "batch_size": 3}
    outputs = generate_batch(any_model, prompts, **options)
    assert_as_alone(any_model, prompts, new, outputs, strategy)
    # Of those that begin alike some have found that beginning in a slot.
    assert sum(output.shared >= 20 for output in outputs) >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk": 7, "batch_size": 3},
        {"order": "given", "reuse": False},
        {"batch_size": 64},
        {"batch_size": 1},
        {"batch_invariant": True},
        {"rows": 5, "batch_size": 5},
    ],
    ids=repr,
)
@pytest.mark.parametrize("late", slow_but([False, True], False))
def test_no_option_changes_a_token(
    model: Any, known: Any, options: dict[str, Any], late: bool, request: pytest.FixtureRequest
) -> None:
    prompts, new, expected = known
    if late:
        request.getfixturevalue("lagging")
    outputs = generate_batch(model, prompts, max_new_tokens=new, eos_token_id=STOP, **{"batch_size": 4, **options})
    assert [output.tokens for output in outputs] == expected


def test_slots_stay_full(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until no prompt waits, 95 of 100 slots and more have one that runs; and no pass is made in vain."""
    prompts, new = mixed_prompts(40)
    busy: list[float] = []
    waits: list[int] = []
    step, enter = Decoder.step, refill.enter

    def counted(self: Any, route: Any) -> Any:
        busy.append((self.sequences.status == RUNNING).double().mean().item())
        return step(self, route)

    def entered(decoder: Any, newcomers: Any, *args: Any, **options: Any) -> Any:
        waits.append(len(busy))
        return enter(decoder, newcomers, *args, **options)

    monkeypatch.setattr(Decoder, "step", counted)
    monkeypatch.setattr(refill, "enter", entered)
    outputs = generate_batch(model, prompts, strategy=Verified(3), max_new_tokens=new, batch_size=4)
    before = busy[: waits[-1]]
    assert len(before) > 30
    assert sum(before) / len(before) >= 0.95
    assert sum(busy) * 4 == sum(output.passes - 1 for output in outputs)  # the first is the prefill


def test_a_long_prompt_keeps_nobody_waiting(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two chunks of its prefill the others make a pass."""
    rng = random.Random(0)
    prompts = [[5, 6], [6, 7], [rng.randint(1, 14) for _ in range(60)]]
    events: list[str] = []
    chunk, step = Decoder.prefill_chunk, Decoder.step
    monkeypatch.setattr(Decoder, "prefill_chunk", lambda *x, **y: (events.append("chunk"), chunk(*x, **y))[1])
    monkeypatch.setattr(Decoder, "step", lambda *x, **y: (events.append("pass"), step(*x, **y))[1])
    options: dict[str, Any] = {"strategy": Static(1), "max_new_tokens": [2, 20, 3], "batch_size": 2, "order": "given"}
    outputs = generate_batch(model, prompts, prefill_chunk=10, **options)
    assert events[:2] == ["chunk", "pass"]
    assert events[2:14] == ["chunk", "pass"] * 6
    assert [len(output.tokens) for output in outputs] == [2, 20, 3]


def test_while_others_run_chunks_are_small(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless no bit of anybody's attention may depend on who else is there; alone a prompt is read at one go."""
    monkeypatch.setattr(refill, "CHUNK_ON_CPU", 10)
    chunks: list[int] = []
    chunk = Decoder.prefill_chunk

    def noted(self: Decoder, cache: Any, columns: Any, *args: Any, **options: Any) -> Any:
        chunks.append(args[2] - cache.seen)
        return chunk(self, cache, columns, *args, **options)

    monkeypatch.setattr(Decoder, "prefill_chunk", noted)
    options: dict[str, Any] = {"strategy": Static(1), "max_new_tokens": [20, 2, 3], "batch_size": 2, "order": "given"}
    prompts = [[4] * 25, [5] * 3, [6] * 35]
    expected = [alone(model, prompt, new, Static(1)).tokens for prompt, new in zip(prompts, [20, 2, 3])]
    chunks.clear()
    outputs = generate_batch(model, prompts, eos_token_id=STOP, **options)
    assert [output.tokens for output in outputs] == expected
    assert chunks == [25, 10, 10, 10, 5]
    chunks.clear()
    generate_batch(model, prompts, batch_invariant=True, **options)
    assert chunks == [25, 35]
    chunks.clear()
    generate_batch(model, prompts, prefill_chunk=7, **options)
    assert max(chunks) == 7


def test_what_a_prompt_predicts_may_be_worth_another_number_at_its_end(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By load, between whose chunks others have made passes: it has the masks that it began with."""
    monkeypatch.setattr(refill, "CHUNK_ON_CPU", 10)
    numbers = itertools.cycle((4, 2, 3))
    monkeypatch.setattr(Decoder, "predictions", property(lambda self: next(numbers)))
    prompts, new = mixed_prompts(12, seed=7)
    expected = [alone(model, prompt, n).tokens for prompt, n in zip(prompts, new)]
    outputs = generate_batch(model, prompts, max_new_tokens=new, eos_token_id=STOP, batch_size=3)
    assert [output.tokens for output in outputs] == expected


def bad_prompts(tiny: SimpleNamespace) -> dict[int, tuple[Any, str]]:
    return {
        1: ([], "no tokens"),
        3: ([4, tiny.vocabulary], "must be from 0"),
        4: ([4, tiny.mask, 5], "holds the mask token"),
        6: ([5, 13, 5], "NaN"),
        7: ([[1, 2], [3, 4]], "shape"),
        9: ([0.5, 1.0], "whole numbers"),
        10: ([6] * 29 + [13], "NaN"),
        12: (object(), "a text or its token ids"),
    }


@pytest.mark.parametrize("late", [False, True])
def test_a_prompt_that_fails_costs_itself_alone(
    tiny: SimpleNamespace, late: bool, request: pytest.FixtureRequest
) -> None:
    """Among others one whose keys are NaN, in a slot that others get after it."""
    model, prompts, new = broken_by_13(tiny, seed=0)
    expected = [alone(model, prompt, n) for prompt, n in zip(prompts, new)]
    given: list[Any] = list(prompts)
    for number, (prompt, _) in bad_prompts(tiny).items():
        given[number] = prompt
    if late:
        request.getfixturevalue("lagging")
    outputs = generate_batch(model, given, max_new_tokens=new, eos_token_id=STOP, batch_size=3, order="given")
    assert [output.index for output in outputs] == list(range(16))
    for number, output in enumerate(outputs):
        if number in bad_prompts(tiny):
            assert output.finish_reason == "error"
            assert output.tokens == output.blocks == []
            assert bad_prompts(tiny)[number][1] in str(output.error)
        else:
            assert (output.error, output.tokens) == (None, expected[number].tokens)


def test_a_text_that_cannot_be_decoded_costs_itself_alone(model: Any) -> None:
    """By a tokenizer that has not all tokens of the model."""
    backwards = np.array([7, 6, 5])[::-1]  # an array that torch does not take
    prompts = [backwards, np.array([1, 2, 3])]
    first, second = (alone(model, prompt.tolist(), 4).tokens for prompt in prompts)
    decode = {str(second): "the second"}.__getitem__

    class Tokenizer:
        def __call__(self, text: str) -> Any: ...

        def decode(self, ids: list[int], **_: Any) -> str:
            return decode(str(ids))

    tokenizer: Any = Tokenizer()
    outputs = generate_batch(model, prompts, tokenizer=tokenizer, max_new_tokens=4, eos_token_id=STOP)
    assert isinstance(outputs[0].error, KeyError)
    assert str(first) in str(outputs[0].error)
    assert (outputs[1].tokens, outputs[1].text) == (second, "the second")


def test_prompts_for_which_there_is_no_room(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = tiny.model("gpt_neox", max_position_embeddings=40)
    prompts = [[5, 6, 7], [4] * 41, [4] * 38, [5] * 39]
    with monkeypatch.context() as patch:
        patch.setattr("mtpkern.batching.learned_positions", lambda model, needed: 40 if needed > 40 else None)
        outputs = generate_batch(learned, prompts, max_new_tokens=[8, 8, 8, 2], batch_size=2, check_model=False)
    assert [len(output.tokens) for output in outputs] == [8, 0, 0, 2]
    assert ["40 positions" in str(output.error) for output in outputs] == [False, True, True, False]
    monkeypatch.setattr("mtpkern.memory.available_memory", lambda device: 2 * 2 * 2 * 2 * 8 * 4 * 30)
    outputs = generate_batch(tiny.model("llama"), prompts, max_new_tokens=4, batch_size=2)
    assert ["available" in str(output.error) for output in outputs] == [False, True, True, True]
    assert len(outputs[0].tokens) == 4


def test_short_memory_takes_slots_and_no_answer(model: Any, known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, new, expected = known
    step, told = Decoder.step, []

    def short(self: Any, route: Any) -> Any:
        told.append(len(self.sequences.status))
        if told[-1] > 3 and len(told) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, route)

    monkeypatch.setattr(Decoder, "step", short)
    with pytest.warns(RuntimeWarning, match="goes on with 3"):
        outputs = generate_batch(model, prompts, max_new_tokens=new, eos_token_id=STOP, batch_size=6)
    assert [output.tokens for output in outputs] == expected
    assert set(told) == {6, 3}


# The call


def test_texts_limits_and_progress(model: Any, bytes_of: Callable[[str], Any], tiny: SimpleNamespace) -> None:
    tokenizer = bytes_of("qwen")
    spoken = tiny.model("llama", vocab_size=300, eos_token_id=256)
    spoken.config.mtpkern = {"mask_token_id": 299, "k_max": 3, "version": 1}
    done: list[int] = []
    texts = ["Two and two", "is", "four, they say"]
    outputs = generate_batch(spoken, texts, tokenizer=tokenizer, max_new_tokens=5, progress=done.append)
    assert done == [1, 2, 3]
    for text, output in zip(texts, outputs):
        expected = mtpkern.generate(spoken, torch.tensor([tokenizer(text).input_ids]), max_new_tokens=5)
        assert output.tokens == expected[0, len(tokenizer(text).input_ids) :].tolist()
        assert output.text == tokenizer.decode(output.tokens, skip_special_tokens=True)
    prompts: list[Any] = [[5, 6, 7], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), [8] * 12, [8] * 16]
    outputs = generate_batch(model, prompts, max_length=14, strategy=Static(1))
    assert [len(output.tokens) for output in outputs] == [11, 11, 11, 2, 0]
    assert outputs[0].tokens == outputs[1].tokens == outputs[2].tokens
    assert "leaves a prompt of 16 tokens no new one" in str(outputs[4].error)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=STOP)
    assert max(len(o.tokens) for o in generate_batch(model, prompts[:2], generation_config=config)) <= 3
    assert generate_batch(model, [], max_new_tokens=3) == []
    for seed in (-(1 << 63), (1 << 64) - 1):
        assert generate_batch(model, prompts[:1], max_new_tokens=1, do_sample=True, seed=seed)[0].error is None
    assert [type(o.error) for o in generate_batch(model, [[]], max_new_tokens=3)] == [ValueError]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": "x"}, "stop_strings"),
        ({"stopping_criteria": [7]}, "stopping_criteria"),
        ({"logits_processor": [len]}, "logits_processor"),
        ({"logits_processor": [MinNewTokensLengthLogitsProcessor(3, 2, 3)]}, r"MinNewTokensLength.*one length"),
        ({"exponential_decay_length_penalty": (1, 1.5)}, "exponential_decay_length_penalty"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"output_scores": True}, "output_scores"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"streamer": object()}, "streamer"),
        ({"max_time": 1.0}, "max_time"),
        ({"stopping_criteria": [MaxTimeCriteria(1.0)]}, "MaxTimeCriteria"),
        ({"stopping_criteria": 7}, "stopping_criteria"),
        ({"logits_processor": 7}, "logits_processor"),
        ({"tokenizer": "gpt2", "prompts": ["text"]}, "tokenizer must be"),
        ({"prompts": None}, "a list of prompts"),
        ({"prompts": b"text"}, "a list of prompts"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"num_beams": 2}, "num_beams=2, which is no matter of each prompt"),
        ({"max_tokens": 3}, "max_tokens=3, which nobody knows"),
        ({"order": "shortest"}, "'longest' or 'given'"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": [1, 2]}, "2 numbers for 1 prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": torch.ones(2, 3)}, "a list of prompts"),
        ({"prompts": "text"}, "a list of prompts"),
        ({"prompts": ["text"]}, "tokenizer"),
        ({"reuse": 1}, "reuse"),
        ({"strategy": "verified"}, "strategy"),
        ({"rows": 1, "strategy": Static(2)}, "rows must be at least"),
        ({"seed": -(1 << 63) - 1}, "64 bits"),
        ({"seed": 1 << 64}, "64 bits"),
    ],
)
def test_what_is_wrong_for_all_is_refused(model: Any, options: dict[str, Any], message: str) -> None:
    for call in (generate_batch, iterate_batch):
        with pytest.raises((ValueError, TypeError), match=message):
            list(call(model, **{"prompts": [[5, 6]], "max_new_tokens": 4, **options}))


def test_what_shows_progress_is_called(model: Any) -> None:
    with pytest.raises(TypeError, match="progress must be a function"):
        generate_batch(model, [[5, 6]], max_new_tokens=2, progress=True)


def test_no_prompts_and_no_warning(model: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert generate_batch(model, [], max_new_tokens=4) == []
    assert not [str(warning.message) for warning in recwarn]


# What it stands on


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("strategy", [Verified(3, threshold=0.2), ConfAdapt(2, threshold=0.3)], ids=repr)
def test_planning_anew_changes_nothing_where_nobody_has_come_in(
    tiny: SimpleNamespace, strategy: Strategy, rows: int | None
) -> None:
    ids, mask = tiny.prompts(9, 4, 12)
    run = Decoder(
        tiny.model("llama"),
        strategy,
        mask_token_id=tiny.mask,
        stop_ids=torch.tensor([STOP]),
        batch=3,
        capacity=48,
        max_new_tokens=20,
        rows=rows,
    )
    run.prefill(ids, mask)
    with attention_context(run.model, run.cache) as route:
        for _ in range(8):
            state = [*vars(run.all_rows).values(), *vars(run.sequences).values()]
            planned = [x.clone() for x in state]
            run.plan()
            assert all(map(torch.equal, planned, state))
            run.step(route)


def test_newcomers_take_the_form_of_advance_that_captured_passes_have(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come at once: another number of sequences would be compiled in the midst of serving."""
    sizes: list[int] = []
    advance = slots.advance

    def noted(sequences: Sequences, *args: Any, **how: Any) -> None:
        sizes.append(len(sequences.length))
        advance(sequences, *args, **how)

    monkeypatch.setattr(slots, "advance", noted)
    model, prompts = tiny.model("llama"), [[1, 2, n] for n in range(7)]
    options: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 4}
    expected = [output.tokens for output in mtpkern.generate_batch(model, prompts, use_graph=False, **options)]
    assert min(sizes) < 3
    sizes.clear()
    assert [output.tokens for output in mtpkern.generate_batch(model, prompts, **options)] == expected
    assert len(sizes) >= 3
    assert set(sizes) == {3}
