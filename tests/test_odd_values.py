"""Odd values and types of what a call is given: taken as they are meant, or named."""

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import mtpkern
from mtpkern.arguments import require_prompts, whole_number

NEW = 3


# Odd values


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"max_new_tokens": 3.5}, ValueError, "max_new_tokens must be a whole number of at least 1, got 3.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": -2}, ValueError, "at least 1, got -2"),
        ({"max_new_tokens": "5"}, TypeError, "max_new_tokens must be a whole number of at least 1, got '5'"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be a whole number .* got True"),
        ({"max_new_tokens": float("nan")}, ValueError, "got nan"),
        ({"max_new_tokens": float("inf")}, ValueError, "got inf"),
        ({"max_new_tokens": torch.tensor([5, 6])}, TypeError, "max_new_tokens must be a whole number"),
        ({"max_length": 8.5}, ValueError, "max_length must be a whole number of at least 1, got 8.5"),
        ({"max_length": 6, "max_new_tokens": None}, ValueError, "`max_length` is set to 6"),
        ({"generation_config": GenerationConfig(max_length=8.5)}, ValueError, "max_length must be a whole number"),
        ({"generation_config": {"max_length": 8}}, TypeError, "generation_config must be a GenerationConfig, got dict"),
        ({"eos_token_id": "a"}, TypeError, "eos_token_id must be a whole number, got 'a'"),
        ({"eos_token_id": [3, "a"]}, TypeError, "eos_token_id must be a whole number, got 'a'"),
        ({"eos_token_id": [3, 4.5]}, ValueError, "eos_token_id must be a whole number, got 4.5"),
        ({"eos_token_id": True}, TypeError, "eos_token_id must be a whole number, got True"),
        ({"eos_token_id": []}, ValueError, "eos_token_id must be a token id or a list of at least one"),
        ({"pad_token_id": [1]}, TypeError, r"pad_token_id must be a whole number, got \[1\]"),
        ({"max_time": -1}, ValueError, "max_time must be a number of seconds from 0 up, got -1"),
        ({"max_time": float("nan")}, ValueError, "max_time must be a number of seconds from 0 up, got nan"),
        ({"max_time": "5"}, ValueError, "max_time must be a number of seconds from 0 up, got '5'"),
        ({"max_time": True}, ValueError, "max_time must be a number of seconds from 0 up, got True"),
        ({"stop_strings": ["x"]}, ValueError, "stop_strings .* pass the model's tokenizer as tokenizer="),
        ({"stop_strings": [""], "tokenizer": 0}, TypeError, r"a list of texts that are not empty, got \[''\]"),
        ({"stop_strings": [3], "tokenizer": 0}, TypeError, r"stop_strings must be a text, or a list .* got \[3\]"),
        ({"stop_strings": 3, "tokenizer": 0}, TypeError, "stop_strings must be a text, or a list .* got 3"),
        ({"stopping_criteria": print}, TypeError, "must be a StoppingCriteriaList .* got <built-in function print>"),
        ({"stopping_criteria": [3]}, TypeError, r"a list of StoppingCriteria, got \[3\]"),
        ({"streamer": print}, TypeError, r"methods put\(tokens\) and end\(\), .* got builtin_function_or_method"),
        ({"prefill_chunk": 1.5}, ValueError, "prefill_chunk must be a whole number of at least 1, got 1.5"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk must be a whole number of at least 1, got 0"),
        ({"prefill_chunk": None}, TypeError, "prefill_chunk must be a whole number"),
        ({"mask_token_id": 1.5}, ValueError, "mask_token_id must be a whole number, got 1.5"),
        ({"mask_token_id": True}, TypeError, "mask_token_id must be a whole number, got True"),
        ({"mask_token_id": "15"}, TypeError, "mask_token_id must be a whole number, got '15'"),
        ({"mask_token_id": 16}, ValueError, "mask_token_id must be a token of the model, 0 to 15, got 16"),
        ({"rows": 30.5}, ValueError, "rows must be a whole number of at least 1, got 30.5"),
        ({"rows": "many"}, TypeError, "rows must be a whole number"),
        ({"use_graph": "no"}, TypeError, "use_graph must be True or False, got 'no'"),
        ({"compile": 1}, TypeError, "compile must be True or False, got 1"),
        ({"batch_invariant": None}, TypeError, "batch_invariant must be True or False, got None"),
        ({"wait": "no"}, TypeError, "wait must be True or False, got 'no'"),
        ({"check_model": 0}, TypeError, "check_model must be True or False, got 0"),
        ({"inputs": torch.ones(2, 6, dtype=torch.long)}, ValueError, "inputs and input_ids are two names"),
        ({"input_ids": torch.ones(2, 6)}, TypeError, r"input_ids must be whole numbers, got torch\.float32"),
        ({"input_ids": torch.ones(2, 6) > 0}, TypeError, r"input_ids must be whole numbers, got torch\.bool"),
        ({"input_ids": torch.ones(6).long()}, ValueError, r"input_ids must be \[B, T\] .* got shape \[6\]"),
        ({"input_ids": torch.ones(2, 6, device="meta").long()}, ValueError, "input_ids must hold values"),
        ({"attention_mask": torch.ones(2, 6, device="meta")}, ValueError, "attention_mask must hold values"),
        ({"attention_mask": [[1] * 6] * 2}, TypeError, "attention_mask must be a tensor like input_ids, got list"),
        ({"attention_mask": torch.ones(6)}, ValueError, r"the shape of input_ids \[2, 6\], got \[6\]"),
        (
            {"attention_mask": torch.ones(2, 1, 6, 6)},
            ValueError,
            r"the shape of input_ids \[2, 6\], got \[2, 1, 6, 6\]",
        ),
        (
            {"attention_mask": torch.full((2, 6), 2)},
            ValueError,
            r"attention_mask must be 1 .*got 2 in sequences \[0, 1\]",
        ),
        ({"attention_mask": torch.full((2, 6), 0.5)}, ValueError, "attention_mask must be 1 .*got 0.5"),
        ({"attention_mask": torch.full((2, 6), torch.nan)}, ValueError, "attention_mask must be 1 .*got nan"),
        ({"attention_mask": torch.full((2, 6), -1)}, ValueError, "attention_mask must be 1 .*got -1"),
        (
            {"attention_mask": torch.tensor([[1] * 6, [0] * 6])},
            ValueError,
            r"sequences \[1\] of attention_mask .* hide every token",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6])},
            ValueError,
            r"padding_side = 'left'; the attention_mask of sequences \[0\] hides what stands behind a token",
        ),
    ],
    ids=lambda x: "" if not isinstance(x, str) else x,
)
def test_odd_values_are_named(
    given: dict[str, Any], error: type[Exception], message: str, shared: Any, pair: Any
) -> None:
    with pytest.raises(error, match=message):
        mtpkern.generate(shared, **{**pair, "max_new_tokens": 4, **given})


@pytest.mark.parametrize("stray", [-1, 16, 1 << 40])
@pytest.mark.parametrize("at", [(0, 0), (1, 5)], ids=str)
def test_ids_outside_of_the_vocabulary(stray: int, at: tuple[int, int], shared: Any, pair: Any) -> None:
    """Also in the padding: the embedding looks all of them up."""
    ids = pair["input_ids"].clone()
    ids[at] = stray
    with pytest.raises(ValueError, match=rf"from 0 to 15, .*got {stray} in sequences \[{at[0]}\]"):
        mtpkern.generate(shared, ids, attention_mask=pair["attention_mask"], max_new_tokens=4)


def test_a_prompt_of_padding_alone_is_named_where_the_mask_is_inferred(shared: Any, pair: Any, tiny: Any) -> None:
    ids = pair["input_ids"].clone()
    ids[1] = tiny.pad
    with pytest.raises(ValueError, match=r"sequences \[1\] of attention_mask .*it follows pad_token_id.* hide every"):
        mtpkern.generate(shared, ids, max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32])
def test_masks_of_every_type(dtype: torch.dtype, shared: Any, pair: Any) -> None:
    expected = mtpkern.generate(shared, **pair, max_new_tokens=NEW)
    mask = pair["attention_mask"].to(dtype)
    assert mtpkern.generate(shared, pair["input_ids"], attention_mask=mask, max_new_tokens=NEW).equal(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_every_whole_type(dtype: torch.dtype, shared: Any, pair: Any) -> None:
    expected = mtpkern.generate(shared, **pair, max_new_tokens=NEW)
    ids = pair["input_ids"].to(dtype)
    assert mtpkern.generate(shared, ids, attention_mask=pair["attention_mask"], max_new_tokens=NEW).equal(expected)


def test_whole_numbers_of_every_type_are_taken(shared: Any, pair: Any) -> None:
    numpy = pytest.importorskip("numpy")
    expected = mtpkern.generate(shared, **pair, max_new_tokens=5, eos_token_id=[3, 7], pad_token_id=2)
    given = {"max_new_tokens": numpy.int64(5), "eos_token_id": torch.tensor([3, 7]), "pad_token_id": 2.0}
    options = {"prefill_chunk": 16.0, "rows": numpy.int32(30), "mask_token_id": 15.0}
    assert mtpkern.generate(shared, **pair, **given, **options).equal(expected)
    assert type(whole_number("n", numpy.float64(4))) is int


def test_require_prompts_takes_good_ones(pair: Any) -> None:
    require_prompts(pair["input_ids"], pair["attention_mask"], mask_token_id=15, vocabulary=16)
    require_prompts(pair["input_ids"], None, mask_token_id=15, vocabulary=16)


def test_nothing_of_the_callers_is_changed(shared: Any, pair: Any) -> None:
    config = GenerationConfig(max_new_tokens=4.0, eos_token_id=[3, 7], do_sample=False)
    before, given = copy.deepcopy(config), {**pair, "generation_config": config}
    mtpkern.generate(shared, **given)
    assert config == before
    assert given.keys() == {*pair, "generation_config"}


def test_a_model_of_another_vocabulary_is_judged_by_its_embedding(pair: Any) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.full((1, 3), 39)
    output = mtpkern.generate(
        LlamaForCausalLM(config).eval(), ids, max_new_tokens=2, mask_token_id=38, eos_token_id=None
    )
    assert output.shape == (1, 5)
