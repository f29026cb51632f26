"""Sampling, logits processors and log-probabilities of `generate` against transformers on the same prefixes."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor

import mtpkern
from mtpkern import ConfAdapt, Static, Verified
from mtpkern.kernels import sample
from mtpkern.strategies import Strategy

NEW = 10
EXACT = [Static(1), Verified(1), Verified(4, threshold=0.1, masks=3), Verified(8, threshold=0.0), ConfAdapt(4, 1.0)]
STOPS = [3, 5, 7, 8]
# What changes greedy tokens.
GREEDY: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [3, 4], [13, 13]]},
    {"sequence_bias": {(5,): -3.0, (6, 7): 4.0, (1, 2, 3): 5.0}},
    {"suppress_tokens": [5, 6]},
    {"begin_suppress_tokens": [8, 10, 13]},
    {"min_new_tokens": 8, "eos_token_id": STOPS},
    {"min_length": 16, "eos_token_id": STOPS},
    {"forced_eos_token_id": 3, "eos_token_id": 3},
    {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "renormalize_logits": True},
]
SAMPLED: list[dict[str, Any]] = [
    {"top_k": 0},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.8, "top_k": 0},
    {"min_p": 0.1, "repetition_penalty": 1.3},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.1},
    {"top_h": 0.5},
]


class NoEven(LogitsProcessor):
    """A caller's own: after an even token only odd ones."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        even = torch.arange(scores.shape[1]) % 2 == 0
        return scores.masked_fill(even & (input_ids[:, -1:] % 2 == 0), -math.inf)


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Any:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def inputs(tiny: SimpleNamespace) -> dict[str, Tensor]:
    ids, mask = tiny.prompts(6, 4, 9)
    # Theirs counts padding as text.
    ids[mask == 0] = tiny.mask
    return {"input_ids": ids, "attention_mask": mask}


def theirs(model: Any, mask: int, **kwargs: Any) -> Any:
    kwargs["suppress_tokens"] = [mask, *(kwargs.get("suppress_tokens") or [])]
    return model.generate(**{"do_sample": False, **kwargs})


@pytest.mark.parametrize("asked", GREEDY, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_greedy_tokens_are_those_of_transformers(
    tiny: SimpleNamespace, model: Any, inputs: Any, asked: dict[str, Any]
) -> None:
    inputs = {**inputs, "max_new_tokens": NEW, "pad_token_id": 0}
    want = theirs(model, tiny.mask, **inputs, **asked)
    plain = theirs(model, tiny.mask, **inputs, eos_token_id=asked.get("eos_token_id"))
    assert want.shape != plain.shape or not want.equal(plain)
    for strategy in EXACT:
        assert mtpkern.generate(model, **inputs, strategy=strategy, **asked).equal(want), strategy


def test_a_processor_of_the_callers_sees_every_prefix(tiny: SimpleNamespace, model: Any, inputs: Any) -> None:
    want = theirs(model, tiny.mask, **inputs, max_new_tokens=NEW, logits_processor=LogitsProcessorList([NoEven()]))
    for strategy in (*EXACT, Static(3)):
        found = mtpkern.generate(model, **inputs, max_new_tokens=NEW, strategy=strategy, logits_processor=[NoEven()])
        assert found.equal(want) or strategy == Static(3)
        new = found[:, inputs["input_ids"].shape[1] - 1 :]
        assert not ((new[:, :-1] % 2 == 0) & (new[:, 1:] % 2 == 0)).any()
    other = EncoderRepetitionPenaltyLogitsProcessor(1.2, inputs["input_ids"])
    with pytest.raises(ValueError, match="EncoderRepetitionPenaltyLogitsProcessor"):
        mtpkern.generate(model, **inputs, max_new_tokens=NEW, logits_processor=[other])


@pytest.mark.parametrize("strategy", [Static(3), ConfAdapt(3, threshold=0.1)], ids=repr)
def test_tokens_of_a_block_see_those_before_them(model: Any, inputs: Any, strategy: Strategy) -> None:
    """Unverified: no pair comes twice, also where both came in one pass."""
    found = mtpkern.generate(model, **inputs, max_new_tokens=14, strategy=strategy, no_repeat_ngram_size=2)
    T = inputs["input_ids"].shape[1]
    for row, real in zip(found.tolist(), inputs["attention_mask"]):
        text = row[T - int(real.sum()) :]
        pairs = list(pairwise(text))
        new = range(len(text) - 15, len(pairs))
        assert all(pairs[i] not in pairs[:i] for i in new)


@pytest.mark.parametrize("asked", SAMPLED, ids=str)
def test_processed_distributions_are_those_of_transformers_and_the_text_is_one(
    tiny: SimpleNamespace, model: Any, inputs: Any, asked: dict[str, Any]
) -> None:
    """Token by token, of the same prefixes; whatever k, masks and threshold are, the draws are the same."""
    given = {**inputs, "max_new_tokens": NEW, "do_sample": True, "return_dict_in_generate": True, **asked}
    first = None
    for strategy in EXACT[:4]:
        torch.manual_seed(5)
        found = mtpkern.generate(
            model, **given, strategy=strategy, output_scores=True, output_logits=True, return_logprobs=True
        )
        first = first or found
        assert found.sequences.equal(first.sequences), strategy
    assert first is not None
    T = inputs["input_ids"].shape[1]
    new = first.sequences[:, T:]
    # Their own sampling, made to draw what ours drew.
    sampler = iter(new.T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda p, num_samples: next(sampler)[:, None])
        want = theirs(model, tiny.mask, **given, output_scores=True, output_logits=True)
    assert len(first.scores) == len(first.logits) == NEW == len(want.scores)
    for ours, their in ((first.scores, want.scores), (first.logits, want.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(their), rtol=1e-4, atol=1e-4)
    transitions = model.compute_transition_scores(first.sequences, first.scores, normalize_logits=True)
    expected = model.compute_transition_scores(want.sequences, want.scores, normalize_logits=True)
    torch.testing.assert_close(transitions, expected, rtol=1e-4, atol=1e-4)
    own = torch.stack(first.logits, 1).index_fill(2, torch.tensor([tiny.mask]), -math.inf).log_softmax(-1)
    torch.testing.assert_close(first.logprobs, own.gather(2, new[:, :, None])[:, :, 0], rtol=1e-4, atol=1e-4)
    sure = torch.stack(first.scores, 1).softmax(-1).amax(-1)
    torch.testing.assert_close(first.confidences, sure, rtol=1e-4, atol=1e-4)


def test_log_probabilities_end_with_the_sequence(model: Any, inputs: Any) -> None:
    given = {**inputs, "max_new_tokens": 14, "eos_token_id": STOPS, "pad_token_id": 0, "return_logprobs": True}
    given |= {"return_dict_in_generate": True, "strategy": Verified(4, threshold=0.1, masks=3)}
    found = mtpkern.generate(model, **given, output_scores=True)
    plain = mtpkern.generate(model, **given)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert found.logprobs.shape == found.confidences.shape == new.shape
    assert plain.logprobs.equal(found.logprobs)
    for b, n in enumerate(sum(blocks) for blocks in found.blocks):
        assert (found.logprobs[b, :n] < 0).all()
        assert not found.logprobs[b, n:].any()
        # Greedy, without processors: the confidence is the token's probability.
        torch.testing.assert_close(found.logprobs[b, :n].exp(), found.confidences[b, :n])
        assert all(scores[b, 0] == 0 for scores in found.scores[n:])
    with pytest.raises(ValueError, match="return_logprobs needs return_dict_in_generate"):
        mtpkern.generate(model, **inputs, max_new_tokens=3, return_logprobs=True)


def test_a_seed_gives_the_same_text_in_any_company(model: Any, inputs: Any, tiny: SimpleNamespace) -> None:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    given: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.3}

    def text(seed: int, which: slice, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        options: dict[str, Any] = {"input_ids": ids[which], "attention_mask": mask[which], **given, **more}
        return mtpkern.generate(model, **options)[:, ids.shape[1] :]

    whole = text(1, slice(0, 3))
    assert not text(2, slice(0, 3)).equal(whole)
    assert text(1, slice(0, 3)).equal(whole)
    assert text(1, slice(0, 1)).equal(whole[:1])  # fewer neighbours, and none
    assert text(1, slice(0, 2), prefill_chunk=2).equal(whole[:2])
    for rows in (3, 5, 9):
        assert text(1, slice(0, 3), rows=rows, strategy=Verified(4, threshold=0.1, masks=2)).equal(whole)
    answers = text(1, slice(0, 1), num_return_sequences=3)
    assert answers[0].equal(whole[0])
    assert len({tuple(row) for row in answers.tolist()}) == 3
    with pytest.raises(ValueError, match=r"^num_return_sequences must be 1"):
        mtpkern.generate(model, ids, num_return_sequences=2)


def test_what_a_model_asks_for_counts_where_the_call_samples(tiny: SimpleNamespace, inputs: Any) -> None:
    model = tiny.model("llama")
    given = {**inputs, "max_new_tokens": NEW}
    torch.manual_seed(3)
    want = mtpkern.generate(model, **given, do_sample=True, temperature=0.4, repetition_penalty=1.4, top_k=4)
    greedy = mtpkern.generate(model, **given)
    model.generation_config.update(temperature=0.4, repetition_penalty=1.4, top_k=4, do_sample=True)
    torch.manual_seed(3)
    assert mtpkern.generate(model, **given, do_sample=True).equal(want)
    with pytest.warns(UserWarning, match="repetition_penalty"):
        assert mtpkern.generate(model, **given).equal(greedy)


def test_confadapt_is_greedy_where_it_is_sure(model: Any, inputs: Any) -> None:
    given = {**inputs, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
    found = mtpkern.generate(model, **given, do_sample=True, top_k=0, strategy=ConfAdapt(3, threshold=0.5))
    scores = torch.stack(found.scores, 1)
    sure, best = scores.softmax(-1).max(-1)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert new[sure > 0.5].equal(best[sure > 0.5])
    assert (new != best)[sure <= 0.5].any()


# Sequences, with this seed; alpha is 0.001.
DRAWS = 3000


@pytest.mark.parametrize(
    "strategy", [Static(1), Verified(2, threshold=0.0), Verified(3, threshold=0.0, masks=2)], ids=repr
)
def test_pairs_of_tokens_come_as_often_as_the_model_says(
    tiny: SimpleNamespace, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against exactly enumerated probabilities of all pairs; a bias that is planted in what is drawn is found."""
    model = tiny.model("llama", vocab_size=tiny.vocabulary)
    ids = torch.tensor([[4, 9, 2]])
    torch.manual_seed(11)
    asked: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 6}

    def drawn() -> Tensor:
        counts = torch.zeros(tiny.vocabulary, tiny.vocabulary, dtype=torch.float64)
        for _ in range(DRAWS // 500):
            out = mtpkern.generate(model, ids, num_return_sequences=500, max_new_tokens=2, strategy=strategy, **asked)
            counts.index_put_((out[:, 3], out[:, 4]), torch.ones(500, dtype=torch.float64), accumulate=True)
        return counts

    def after(texts: Tensor) -> Tensor:
        with torch.no_grad():
            z = model(texts).logits[:, -1].double() / 0.8
        z[:, tiny.mask] = -math.inf
        return z.masked_fill(z < z.topk(6)[0][:, -1:], -math.inf).softmax(-1)

    pairs = torch.tensor([[4, 9, 2, x] for x in range(tiny.vocabulary)])
    p = after(ids)[0][:, None] * after(pairs)
    assert statistic(drawn(), p) < bound(p)
    # Numbers that are a little too small find the tokens in front too often.
    uniform = sample.uniform
    monkeypatch.setattr(sample, "uniform", lambda *place: uniform(*place) ** 1.3)
    assert statistic(drawn(), p) > bound(p)


def cells(p: Tensor) -> Tensor:
    return p * DRAWS >= 5


def statistic(counts: Tensor, p: Tensor) -> float:
    """Chi-square, the rare pairs in one cell."""
    n, often = counts.sum(), cells(p)
    assert not counts[p == 0].any()
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([p[often], p[~often].sum()[None]]) * n
    return ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()


def bound(p: Tensor) -> float:
    """The 0.999 quantile of chi-square, by Wilson and Hilferty."""
    d = int(cells(p).sum())
    return d * (1 - 2 / (9 * d) + 3.0902 * math.sqrt(2 / (9 * d))) ** 3


def test_drafts_are_kept_as_often_as_they_are_drawn(tiny: SimpleNamespace, model: Any, inputs: Any) -> None:
    """Sampling does not give up on drafts: some passes bring more than one token."""
    torch.manual_seed(0)
    found = mtpkern.generate(
        model,
        **inputs,
        max_new_tokens=40,
        do_sample=True,
        strategy=Verified(4, threshold=0.0),
        return_dict_in_generate=True,
    )
    assert max(map(max, found.blocks)) > 1


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_nothing_hangs_on_the_default_dtype(default: torch.dtype, model: Any, tiny: SimpleNamespace) -> None:
    """It is set for models to be made in: not for thresholds, biases and what is kept."""
    ids, mask = tiny.prompts(9, 4, 7, 5)
    given = {"attention_mask": mask, "max_new_tokens": 24, "return_dict_in_generate": True}
    # Just below what the first masks say, and in 16 bits, of some of them, above it.
    sure = mtpkern.generate(model, ids, strategy=ConfAdapt(4, 0.0), return_logprobs=True, **given).confidences[:, 1]
    options: list[dict[str, Any]] = [{"strategy": ConfAdapt(4, threshold)} for threshold in (sure - 1e-6).tolist()]
    options.append({"sequence_bias": {(5,): 0.1234, (3, 4): 0.3333}, "output_scores": True})
    options += [{**x, "return_logprobs": True} for x in options] + [{"do_sample": True, "top_p": 0.9}]
    before, found = torch.get_default_dtype(), []
    for dtype in (before, default):
        torch.set_default_dtype(dtype)
        try:
            for asked in options:
                torch.manual_seed(0)
                found.append(mtpkern.generate(model, ids, **{"strategy": Verified(3, 0.2)} | given | asked))
        finally:
            torch.set_default_dtype(before)
    for plain, other in zip(found[: len(options)], found[len(options) :], strict=True):
        assert plain.sequences.equal(other.sequences)
        assert plain.blocks == other.blocks
        for name in ("logprobs", "confidences"):
            assert (getattr(plain, name) is None) or getattr(plain, name).equal(getattr(other, name))
        assert all(x.equal(y) for x, y in zip(plain.scores or (), other.scores or (), strict=True))


def test_masks_behind_the_end_of_the_room_see_no_text(tiny: SimpleNamespace) -> None:
    """With one new token there is no room for what masks behind it might follow."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(7, 4, 9)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 1, "no_repeat_ngram_size": 3}
    got = mtpkern.generate(model, ids, strategy=ConfAdapt(8, threshold=0.9), **options)
    assert got.equal(model.generate(ids, do_sample=False, **options))
