"""generate_batch with sampling, processors and criteria: each prompt gets what it gets alone, whatever is beside it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import LogitsProcessor, MaxLengthCriteria

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, refill
from support.slow import slow_but

PROMPTS = [[5, 6, 7], [4] * 9, [9, 1], [3, 3, 8, 2, 1], [7], [5, 6, 7], [2, 9, 4, 4, 4, 1, 8], [11, 12]]
NEW = [12, 9, 14, 5, 12, 12, 1, 10]


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Any:
    return tiny.model("llama")


class NotTwice(LogitsProcessor):
    """Bans the last token of the text, and one more where the text has an even length: a pure function of both."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
        if input_ids.shape[1] % 2 == 0:
            scores[:, 5] = -torch.inf
        return scores


class SumOfText(StoppingCriteria):
    """Ends a text whose tokens add up to a multiple of 7."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.sum(1) % 7 == 0


def alone(model: Any, prompt: list[int], new: int, **options: Any) -> tuple[list[int], str]:
    ids = torch.tensor([prompt])
    output = mtpkern.generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[0, len(prompt) :].tolist(), output.finish_reasons[0]


GREEDY: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.7},
    "bans": {"suppress_tokens": [4, 5], "bad_words_ids": [[7, 7], [1]], "begin_suppress_tokens": [2, 3]},
    "bias": {"sequence_bias": {(3,): 2.0, (7, 8): -5.0}},
    "least": {"min_new_tokens": 4, "eos_token_id": [1, 2, 3]},
    "n-grams": {"no_repeat_ngram_size": 2},
    "own": {"logits_processor": [NotTwice()]},
    "criterion": {"stopping_criteria": [SumOfText()]},
    "length": {"stopping_criteria": [MaxLengthCriteria(11)]},
}
# Several at once, none of which hides another: each left out shows.
SEVERAL: dict[str, dict[str, Any]] = {
    "scores": {
        "repetition_penalty": 1.3,
        "sequence_bias": {(3,): 2.0, (7, 8): -5.0},
        "min_new_tokens": 3,
        "eos_token_id": [2],
        "stopping_criteria": [SumOfText()],
    },
    "banned": {
        "bad_words_ids": [[7, 7], [1], [9]],
        "no_repeat_ngram_size": 2,
        "logits_processor": [NotTwice()],
        "stopping_criteria": [MaxLengthCriteria(13)],
    },
}


STRATEGIES = [Verified(3, threshold=0.1), Verified(3, threshold=0.1, masks=2), Static(2)]


# Each alone with one strategy in turn, several at once with every one.
@pytest.mark.parametrize(
    ("kind", "strategy"),
    slow_but(
        [
            *((kind, STRATEGIES[i % 3]) for i, kind in enumerate(GREEDY)),
            *((kind, strategy) for kind in SEVERAL for strategy in STRATEGIES),
        ],
        *(("bans", STRATEGIES[1]), *((kind, strategy) for kind in SEVERAL for strategy in STRATEGIES[::2])),
    ),
    ids=str,
)
def test_what_chooses_and_what_stops(model: Any, kind: str, strategy: Any) -> None:
    options = {"strategy": strategy, **{**GREEDY, **SEVERAL}[kind]}
    outputs = mtpkern.generate_batch(model, PROMPTS, max_new_tokens=NEW, batch_size=3, **options)
    plain = mtpkern.generate_batch(model, PROMPTS, max_new_tokens=NEW, batch_size=3, strategy=strategy)
    for prompt, new, output in zip(PROMPTS, NEW, outputs):
        assert output.error is None
        assert (output.tokens, output.finish_reason) == alone(model, prompt, new, **options)
        assert sum(output.blocks) == len(output.tokens)
    assert [output.tokens for output in outputs] != [output.tokens for output in plain]


@pytest.mark.parametrize("strategy", [Static(3), ConfAdapt(3, threshold=0.0), Verified(3, threshold=0.0)], ids=repr)
def test_criteria_read_late_see_prefill_and_first_pass(
    model: Any, strategy: Any, request: pytest.FixtureRequest
) -> None:
    """As a newcomer's first state has both on a GPU: 2k tokens, where every block is as long as it can be."""
    options = {"strategy": strategy, "stopping_criteria": [SumOfText()]}
    expected = [alone(model, prompt, new, **options) for prompt, new in zip(PROMPTS, NEW)]
    request.getfixturevalue("lagging")
    outputs = mtpkern.generate_batch(model, PROMPTS, max_new_tokens=NEW, batch_size=3, **options)
    assert [(output.tokens, output.finish_reason) for output in outputs] == expected


def test_least_tokens_of_a_text_that_nothing_stops(model: Any) -> None:
    """Without stop tokens there is nothing to hold back, as in transformers; what else chooses does."""
    options = {"min_new_tokens": 3, "repetition_penalty": 1.7}
    outputs = mtpkern.generate_batch(model, PROMPTS[:3], max_new_tokens=4, **options)
    assert [output.tokens for output in outputs] == [alone(model, prompt, 4, **options)[0] for prompt in PROMPTS[:3]]


SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 12, "top_p": 0.95}


def sampled(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    torch.manual_seed(3)
    outputs = mtpkern.generate_batch(model, prompts, **{"max_new_tokens": 12, **SAMPLED, **options})
    return [output.tokens for output in outputs]


OWN = {"repetition_penalty": 1.4, "logits_processor": [NotTwice()]}


@pytest.mark.parametrize("extra", slow_but([{}, OWN], OWN), ids=["", "own"])
def test_a_seed_gives_the_same_text_whatever_is_beside_it(model: Any, extra: dict[str, Any]) -> None:
    whole = sampled(model, PROMPTS, **extra)
    assert whole[0] != whole[5]  # one prompt twice draws twice
    for options in ({"batch_size": 2}, {"batch_size": 1, "order": "given"}, {"strategy": Static(1)}, {"reuse": False}):
        assert sampled(model, PROMPTS, **extra, **options) == whole
    # Others beside it, and behind it.
    others = [*PROMPTS[:3], [1] * 20, *PROMPTS[4:], [8, 8, 8]]
    assert [x for i, x in enumerate(sampled(model, others, batch_size=3, **extra)) if i not in (3, 8)] == [
        x for i, x in enumerate(whole) if i != 3
    ]
    torch.manual_seed(4)
    again = mtpkern.generate_batch(model, PROMPTS, max_new_tokens=12, **SAMPLED, **extra)
    assert [output.tokens for output in again] != whole


def test_generate_draws_the_same_from_the_padded_prompts(model: Any) -> None:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(x)) + x for x in PROMPTS])
    real = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in PROMPTS])
    torch.manual_seed(3)
    output = mtpkern.generate(model, ids, attention_mask=real, max_new_tokens=12, **SAMPLED)
    assert sampled(model, PROMPTS, batch_size=3) == output[:, width:].tolist()


def test_confadapt_samples_where_it_is_not_sure(model: Any) -> None:
    strategy = ConfAdapt(3, threshold=0.4)
    first = sampled(model, PROMPTS, strategy=strategy, batch_size=2)
    assert first == sampled(model, PROMPTS, strategy=strategy, batch_size=5)
    assert first != sampled(
        model, PROMPTS, strategy=strategy, do_sample=False, temperature=None, top_k=None, top_p=None
    )


def test_stop_strings(tiny: SimpleNamespace, bytes_of: Any) -> None:
    tokenizer = bytes_of("qwen")
    spoken = tiny.model("llama", vocab_size=300)
    spoken.config.mtpkern = {"mask_token_id": 299, "k_max": 3, "version": 1}
    options = {"tokenizer": tokenizer, "max_new_tokens": 24, "strategy": Verified(3, threshold=0.0)}
    prompts = ["Two and two", "is", "four, they say", "a"]
    plain = mtpkern.generate_batch(spoken, prompts, batch_size=2, **options)
    strings = [str(tokenizer.decode(output.tokens[7:9])) for output in plain]
    strings = [x for x in strings if "\ufffd" not in x] or [str(tokenizer.decode([plain[0].tokens[7]]))]
    outputs = mtpkern.generate_batch(spoken, prompts, batch_size=2, stop_strings=strings, **options)
    options.pop("max_new_tokens")
    for prompt, output in zip(prompts, outputs):
        expected = alone(spoken, tokenizer(prompt).input_ids, 24, stop_strings=strings, **options)
        assert (output.tokens, output.finish_reason) == expected
    assert "stop_string" in {output.finish_reason for output in outputs}


class AtLength(StoppingCriteria):
    """Ends a text of so many tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] in (9, 12)


@pytest.mark.parametrize("masks", [0, 2])
@pytest.mark.parametrize("late", [False, True])
def test_whom_a_criterion_ends_writes_into_no_prompt_that_is_read_in_its_place(
    model: Any, masks: int, late: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of it are planned still, for a pass behind the first chunk."""
    monkeypatch.setattr(refill, "CHUNK_ON_CPU", 20)
    monkeypatch.setattr(refill, "CHUNK_ELSEWHERE", 20)
    prompts = [[5, 6, 7, 1], [4, 2, 9, 9], [6] * 15, *([n, 8, 3, n, 11] * 9 for n in (1, 2, 4, 5))]
    options: dict[str, Any] = {"strategy": Verified(3, threshold=0.1, masks=masks), "stopping_criteria": [AtLength()]}
    options["eos_token_id"] = None
    expected = [alone(model, prompt, 40, **options)[0] for prompt in prompts]
    if late:
        request.getfixturevalue("lagging")
    outputs = mtpkern.generate_batch(
        model, prompts, max_new_tokens=40, batch_size=3, order="given", reuse=False, **options
    )
    assert [output.tokens for output in outputs] == expected
