"""generate_batch: what each prompt gets alone, through slots that stay full."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import MaxTimeCriteria, MinNewTokensLengthLogitsProcessor

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, refill
from mtpkern.attention import attention_context
from mtpkern.batching import BatchOutput, generate_batch, iterate_batch
from mtpkern.decoder import Decoder
from mtpkern.kernels.state import RUNNING
from mtpkern.poll import LAG, Poll
from mtpkern.strategies import Strategy

STOP = 3
STRATEGIES = [Verified(3, threshold=0.2), Verified(4, threshold=0.1, masks=3), ConfAdapt(3, threshold=0.3), Static(2)]
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


def mixed_prompts(n: int = 12, seed: int = 0, begin: int = 20) -> tuple[list[list[int]], list[int]]:
    """Prompts from one token up, a third of which begin alike, and how many new tokens each may have."""
    rng = random.Random(seed)

    def words(length: int) -> list[int]:
        return [rng.randint(1, 14) for _ in range(length)]

    alike = words(begin)
    prompts = [words(rng.choice([1, 2, 5, 9, 17, 30])) for _ in range(n - n // 3)]
    prompts += [alike + words(rng.choice([0, 1, 5, 9])) for _ in range(n // 3)]
    rng.shuffle(prompts)
    return prompts, [rng.randint(1, 12) for _ in prompts]


def alone(model: Any, prompt: list[int], new: int, strategy: Strategy | None = None) -> Any:
    output = mtpkern.generate(
        model,
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),  # of padding there is none, whatever the words are
        strategy=strategy,
        max_new_tokens=new,
        eos_token_id=STOP,
        return_dict_in_generate=True,
    )
    return SimpleNamespace(
        tokens=output.sequences[0, len(prompt) :].tolist(),
        blocks=output.blocks[0],
        finish_reason=output.finish_reasons[0],
    )


def assert_as_alone(
    model: Any, prompts: list[list[int]], new: list[int], outputs: list[BatchOutput], strategy: Strategy | None = None
) -> None:
    assert [output.index for output in outputs] == list(range(len(prompts)))
    for prompt, n, output in zip(prompts, new, outputs):
        expected = alone(model, prompt, n, strategy)
        assert output.error is None
        assert (output.tokens, output.finish_reason) == (expected.tokens, expected.finish_reason)
        # How sure the drafts of others were is forgotten where one comes in, which may deal masks out otherwise.
        if strategy is not None and not strategy.masks:
            assert output.blocks == expected.blocks
        assert sum(output.blocks) == len(output.tokens) == round(output.tokens_per_pass * output.passes)


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Any:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def known(model: Any) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Prompts, limits, and what each gets alone."""
    prompts, new = mixed_prompts(seed=1)
    return prompts, new, [alone(model, prompt, n).tokens for prompt, n in zip(prompts, new)]


@pytest.fixture(params=["llama", "gemma3_text", "gated"], scope="module")
def any_model(request: pytest.FixtureRequest, tiny: SimpleNamespace) -> Any:
    if request.param != "gated":
        return tiny.model(request.param, **(WINDOWED if request.param == "gemma3_text" else {}))
    pytest.importorskip("peft")
    from mtpkern.train.lora import add_gated_lora

    base = tiny.model("llama")
    del base.config.mtpkern
    adapted = add_gated_lora(base, rank=4, k_max=5).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=generator)
    return adapted


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sequences and columns of every prefill that runs."""
    seen: list[tuple[int, int]] = []
    original = Decoder.prefill_chunk

    def noted(self: Any, cache: Any, columns: Any, real: Any, position: Any, end: int, **options: Any) -> Any:
        seen.append((len(columns), end - cache.seen))
        return original(self, cache, columns, real, position, end, **options)

    monkeypatch.setattr(Decoder, "prefill_chunk", noted)
    return seen


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """States and copies of the device are read late, as on a GPU."""

    class Event:
        asked = 0

        def __init__(self, device: Any) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

        def query(self) -> bool:
            self.asked += 1
            return self.asked > 2

    init = Poll.__init__

    def late(self: Any, sequences: Any) -> None:
        init(self, sequences)
        self.on_cpu = False
        self.copies = torch.empty(LAG + 1, *self.state().shape, dtype=torch.int64)
        self.events = [Event(None)] * (LAG + 1)

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(Poll, "__init__", late)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
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
@pytest.mark.parametrize("late", [False, True])
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
    model = tiny.model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = torch.nan
        head = model.get_output_embeddings().weight
        head[13] = head[12]  # so that it is never written: of equals the first wins
    prompts, new = mixed_prompts(16)
    prompts = [[5 if token == 13 else token for token in prompt] for prompt in prompts]
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


# Prefixes


def test_a_beginning_that_is_there_is_not_read_again(any_model: Any, prefilled: list[tuple[int, int]]) -> None:
    """The first brings it; all others, in its slot and beside it, read what is their own."""
    begin, rng = [1 + i % 14 for i in range(40)], random.Random(0)
    alike = [begin + [word] + [rng.randint(1, 14) for _ in range(rng.randint(1, 9))] for word in range(1, 8)]
    new = [6] * len(alike)
    outputs = generate_batch(
        any_model, alike, strategy=Static(1), max_new_tokens=new, batch_size=2, order="given", eos_token_id=STOP
    )
    # Of two that come in together the shorter has a few columns of padding, or of what it has already.
    needed = sum(len(prompt) - 1 for prompt in alike) - 40 * (len(alike) - 1)
    assert needed <= sum(n * columns for n, columns in prefilled) <= needed + 9 * len(alike)
    assert [output.shared for output in outputs] == [0] + [40] * (len(alike) - 1)
    prefilled.clear()
    assert_as_alone(any_model, alike, new, outputs, Static(1))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_the_next_turn_of_a_chat_finds_the_last_one(model: Any, strategy: Strategy) -> None:
    """A prompt that goes on behind an answer: keys of what was emitted count as far as they are the tokens' own."""
    first = [5, 9, 2, 14, 7, 7, 1, 12, 4]
    answer = alone(model, first, 12, strategy)
    turns = [first, first + answer.tokens + [8, 1, 9]]
    outputs = generate_batch(
        model, turns, strategy=strategy, max_new_tokens=12, batch_size=1, order="given", eos_token_id=STOP
    )
    assert_as_alone(model, turns, [12, 12], outputs, strategy)
    assert outputs[1].shared == len(first) + sum(outputs[0].blocks[:-1]) > len(first)


def test_the_next_prompt_is_the_one_that_shares_most(model: Any) -> None:
    rng = random.Random(0)
    begins = [[rng.randint(1, 14) for _ in range(20)] for _ in range(2)]
    prompts = [begin + [rng.randint(1, 14)] * 3 for _ in range(4) for begin in begins]
    options: dict[str, Any] = {"max_new_tokens": 2, "batch_size": 1, "order": "given"}
    with iterate_batch(model, prompts, **options) as outputs:
        # Two windows of four prompts, each of two kinds.
        assert [output.index for output in outputs] == [0, 2, 1, 3, 5, 7, 4, 6]


def test_latent_attention_makes_all_keys_anew(tiny: SimpleNamespace) -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    model = tiny.model("deepseek_v3", **latent, num_key_value_heads=4, first_k_dense_replace=2)
    prompts, new = mixed_prompts(9)
    outputs = generate_batch(model, prompts, max_new_tokens=new, eos_token_id=STOP, batch_size=3, prefill_chunk=9)
    assert_as_alone(model, prompts, new, outputs)
    assert {output.shared for output in outputs} == {0}


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


# The iterator


def test_outputs_come_as_they_end(model: Any) -> None:
    prompts = [[5, 6], [7, 8], [9, 1]]
    options: dict[str, Any] = {"strategy": Static(1), "batch_size": 2, "order": "given", "max_new_tokens": [9, 2, 3]}
    assert [output.index for output in iterate_batch(model, prompts, **options)] == [1, 2, 0]


@pytest.mark.parametrize("leave", ["close", "break", "raise"])
def test_a_reader_that_leaves_leaves_the_model_whole(model: Any, leave: str) -> None:
    prompts, new = mixed_prompts()
    before = threading.active_count()
    outputs = iterate_batch(model, prompts, max_new_tokens=new, batch_size=2)
    if leave == "close":
        next(outputs)
        # Between two outputs the model is the reader's, as it was.
        assert model.config._attn_implementation == "sdpa"
        outputs.close()
        assert list(outputs) == []
    else:
        for _ in outputs:
            break
        with suppress(KeyboardInterrupt), outputs:
            if leave == "raise":
                raise KeyboardInterrupt
    assert threading.active_count() == before
    assert (
        alone(model, prompts[0], 5).tokens
        == generate_batch(model, prompts[:1], max_new_tokens=5, eos_token_id=STOP)[0].tokens
    )


def test_an_exception_in_the_middle_leaves_the_model_whole(model: Any) -> None:
    def interrupt(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    prompts, new = mixed_prompts()
    with pytest.raises(KeyboardInterrupt):
        generate_batch(model, prompts, max_new_tokens=new, batch_size=2, progress=interrupt)
    assert model.config._attn_implementation == "sdpa"
    assert_as_alone(model, prompts[:1], [5], generate_batch(model, prompts[:1], max_new_tokens=5, eos_token_id=STOP))


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
