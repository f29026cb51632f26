"""generate() in the place of model.generate: the same shapes, limits and stops."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

import mtpkern
import mtpkern.attention
from mtpkern import ConfAdapt, MTPGenerateOutput, Static, Verified, reference
from mtpkern.model import learned_positions
from mtpkern.strategies import Strategy
from support.slow import slow_but

STRATEGIES = [
    Static(3),
    ConfAdapt(k=4, threshold=0.2),
    Verified(k=4, threshold=0.1),
    Verified(k=4, threshold=0.0, masks=9),
]


some_strategies = pytest.mark.parametrize(
    "strategy", slow_but(STRATEGIES, STRATEGIES[1], STRATEGIES[3]), ids=lambda s: type(s).__name__
)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)


def new_tokens(output: Tensor, inputs: dict[str, Tensor]) -> list[list[int]]:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def slow(model: Any, inputs: dict[str, Tensor], strategy: Strategy, new: int, stops: Any = None) -> list[Any]:
    mask = model.config.mtpkern["mask_token_id"]
    return [
        reference.decode(model, row[keep.bool()], strategy, mask_token_id=mask, max_new_tokens=new, eos_token_id=stops)
        for row, keep in zip(inputs["input_ids"], inputs["attention_mask"])
    ]


def greedy(model: Any, mask: int, **kwargs: Any) -> Tensor:
    return model.generate(**kwargs, do_sample=False, suppress_tokens=[mask])


# What it returns


@pytest.mark.parametrize(
    "limits",
    [
        {"max_new_tokens": 11},
        {"max_length": 20},
        {},
        {"max_new_tokens": 14, "eos_token_id": 3},
        {"max_new_tokens": 14, "eos_token_id": [3, 7, 11]},
        {"max_new_tokens": 14, "eos_token_id": [3, 7, 11], "pad_token_id": 9},
        {"max_new_tokens": 1},
        {"generation_config": GenerationConfig(max_new_tokens=9, eos_token_id=[5, 6], pad_token_id=2)},
    ],
    ids=str,
)
def test_output_equals_greedy_generate(limits: dict[str, Any], model: Any, inputs: Any, tiny: Any) -> None:
    expected = greedy(model, tiny.mask, **inputs, **limits)
    output = mtpkern.generate(model, **inputs, **limits)
    assert output.dtype == expected.dtype
    assert output.tolist() == expected.tolist()


def test_a_strategy_without_k_decodes_with_the_recorded_one(
    model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    decoder = mtpkern.pool.Decoder
    monkeypatch.setattr(
        mtpkern.pool,
        "Decoder",
        lambda model, strategy, **kw: seen.append(strategy) or decoder(model, strategy, **kw),
    )
    for k_max in (5, 16):
        model.config.mtpkern["k_max"] = k_max
        mtpkern.generate(model, **inputs, max_new_tokens=2)
    adaptive = [ConfAdapt(threshold=0.5), ConfAdapt(3, 0.5), Static(), Verified(threshold=0.5)]
    for strategy in adaptive:
        mtpkern.generate(model, **inputs, strategy=strategy, max_new_tokens=2)
    del model.config.mtpkern["k_max"]
    mtpkern.generate(model, **inputs, max_new_tokens=2)
    mtpkern.generate(model, **inputs, strategy=ConfAdapt(), max_new_tokens=2)
    assert seen == [
        *(Verified(k=5), Verified(k=12)),
        *(ConfAdapt(16, 0.5), ConfAdapt(3, 0.5), Static(4), Verified(12, 0.5)),
        *(Verified(k=12), ConfAdapt(k=8)),
    ]


@every_strategy
def test_record_of_acceptance(strategy: Strategy, model: Any, inputs: Any) -> None:
    stops = [3, 7]
    output = mtpkern.generate(
        model, **inputs, strategy=strategy, max_new_tokens=14, eos_token_id=stops, return_dict_in_generate=True
    )
    assert isinstance(output, MTPGenerateOutput)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    plain = mtpkern.generate(model, **inputs, strategy=strategy, max_new_tokens=14, eos_token_id=stops)
    assert output.sequences.equal(plain)
    expected = slow(model, inputs, strategy, 14, stops)
    assert output.blocks == [blocks for _, blocks in expected]
    # The prefill is a pass and is counted.
    assert output.passes == [len(blocks) for _, blocks in expected]
    assert output.tokens_per_pass == [len(tokens) / len(blocks) for tokens, blocks in expected]
    assert output.finish_reasons == ["stop" if tokens[-1] in stops else "length" for tokens, _ in expected]
    assert set(output.finish_reasons) == {"stop", "length"}


def test_a_stop_token_at_the_limit_is_a_stop(model: Any, inputs: Any) -> None:
    one = {name: x[:1] for name, x in inputs.items()}
    ((tokens, _),) = slow(model, one, Static(4), 4)
    last = tokens.index(tokens[3]) + 1
    output = mtpkern.generate(
        model, **one, strategy=Static(4), max_new_tokens=last, eos_token_id=tokens[3], return_dict_in_generate=True
    )
    assert output.finish_reasons == ["stop"]
    assert new_tokens(output.sequences, one) == [tokens[:last]]


@some_strategies
def test_stop_token_cuts_exactly_wherever_it_stands_in_a_block(strategy: Strategy, model: Any, tiny: Any) -> None:
    """Every emitted token in turn is the stop token: the text is the same up to its first place, and ends there.

    Every other one comes in a list of two.
    """
    ids, real = tiny.prompts(9, 4, 12, 7)
    inputs = {"input_ids": ids, "attention_mask": real}
    free = slow(model, inputs, strategy, 14)
    places = set()
    for stop in sorted({token for tokens, _ in free for token in tokens}):
        cut = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens, _ in free]
        width = max(map(len, cut))
        output = mtpkern.generate(
            model,
            **inputs,
            strategy=strategy,
            max_new_tokens=14,
            eos_token_id=[stop, tiny.mask] if stop % 2 else stop,
            pad_token_id=tiny.pad,
        )
        assert new_tokens(output, inputs) == [tokens + [tiny.pad] * (width - len(tokens)) for tokens in cut]
        for tokens, blocks in free:
            if stop in tokens:
                ends = torch.tensor(blocks).cumsum(0)
                index = tokens.index(stop)
                block = int((ends <= index).sum())
                places.add((blocks[block], index - (int(ends[block]) - blocks[block])))
    # Three drafts in a row come true too seldom here.
    width = 2 if strategy.verify else 3
    assert {place for size, place in places if size >= width} >= set(range(width))


@some_strategies
def test_limit_is_reached_exactly_and_never_passed(strategy: Strategy, model: Any, inputs: Any) -> None:
    most = 2 * strategy.k + 1
    for new in range(1, most + 1):
        output = mtpkern.generate(model, **inputs, strategy=strategy, max_new_tokens=new, return_dict_in_generate=True)
        expected = slow(model, inputs, strategy, new)
        assert new_tokens(output.sequences, inputs) == [tokens for tokens, _ in expected]
        assert output.blocks == [blocks for _, blocks in expected]
        assert {sum(blocks) for blocks in output.blocks} == {new}
        assert output.finish_reasons == ["length"] * 3


# What it takes


def test_inputs_may_come_as_a_batch_encoding_and_under_either_name(model: Any, inputs: Any) -> None:
    expected = mtpkern.generate(model, inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6)
    assert mtpkern.generate(model, **BatchEncoding(inputs), max_new_tokens=6).equal(expected)
    renamed = {"inputs": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert mtpkern.generate(model, **renamed, max_new_tokens=6).equal(expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.float32])
def test_dtypes_of_the_inputs(dtype: torch.dtype, mask_dtype: torch.dtype, model: Any, inputs: Any) -> None:
    expected = mtpkern.generate(model, **inputs, max_new_tokens=5)
    ids, real = inputs["input_ids"].to(dtype), inputs["attention_mask"].to(mask_dtype)
    output = mtpkern.generate(model, ids, attention_mask=real, max_new_tokens=5)
    assert output.dtype == torch.int64
    assert output.equal(expected)


def test_without_attention_mask_padding_is_inferred_as_transformers_does(model: Any, inputs: Any, tiny: Any) -> None:
    ids = inputs["input_ids"]
    expected = mtpkern.generate(model, **inputs, max_new_tokens=6)
    assert mtpkern.generate(model, ids, max_new_tokens=6).equal(expected)
    assert mtpkern.generate(model, ids, max_new_tokens=6).equal(greedy(model, tiny.mask, inputs=ids, max_new_tokens=6))
    # A padding token that is also a stop token says nothing about padding: then every token counts.
    same = {"eos_token_id": tiny.pad, "pad_token_id": tiny.pad, "max_new_tokens": 6}
    assert mtpkern.generate(model, ids, **same).equal(greedy(model, tiny.mask, inputs=ids, **same))


@every_strategy
def test_padding_may_consist_of_anything(strategy: Strategy, model: Any, inputs: Any, tiny: Any) -> None:
    expected = mtpkern.generate(model, **inputs, strategy=strategy, max_new_tokens=6)
    for filler in (5, tiny.mask):
        ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, filler)
        output = mtpkern.generate(
            model, ids, attention_mask=inputs["attention_mask"], strategy=strategy, max_new_tokens=6
        )
        assert new_tokens(output, inputs) == new_tokens(expected, inputs)
        assert output[:, : ids.shape[1]].equal(ids)


@every_strategy
def test_a_sequence_does_not_depend_on_its_neighbours(strategy: Strategy, model: Any, inputs: Any) -> None:
    together = mtpkern.generate(model, **inputs, strategy=strategy, max_new_tokens=10)
    for b in range(3):
        one = {name: x[b : b + 1] for name, x in inputs.items()}
        alone = mtpkern.generate(model, **one, strategy=strategy, max_new_tokens=10)
        assert new_tokens(alone, one) == new_tokens(together, inputs)[b : b + 1]


def test_mask_token_may_be_given_as_an_argument(model: Any, inputs: Any, tiny: Any) -> None:
    expected = mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=6)
    del model.config.mtpkern
    with pytest.raises(ValueError, match="mask_token_id"):
        mtpkern.generate(model, **inputs, check_model=False, max_new_tokens=6)
    output = mtpkern.generate(
        model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=6, mask_token_id=tiny.mask
    )
    assert output.equal(expected)


@every_strategy
def test_mask_token_is_never_emitted_however_large_its_logit(
    strategy: Strategy, model: Any, inputs: Any, tiny: Any
) -> None:
    expected = mtpkern.generate(model, **inputs, check_model=False, strategy=strategy, max_new_tokens=10)

    def favour(head: Any, args: Any, logits: Tensor) -> Tensor:
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor(tiny.mask), tiny.vocabulary)

    model.lm_head.register_forward_hook(favour)
    output = mtpkern.generate(model, **inputs, check_model=False, strategy=strategy, max_new_tokens=10)
    # It takes no probability either, so the confidences, and with them the blocks, are as before.
    assert output.equal(expected)


def test_no_limit_but_the_default(model: Any, tiny: Any) -> None:
    ids, _ = tiny.prompts(4)
    with pytest.raises(ValueError, match="max_length"):
        mtpkern.generate(model, ids, max_length=4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        mtpkern.generate(model, ids, max_new_tokens=0)


# What it refuses


@pytest.mark.parametrize("strategy", [Static(1), ConfAdapt(1, 0.5), Verified(1)], ids=lambda s: type(s).__name__)
def test_one_token_a_pass_needs_no_mask_token(strategy: Strategy, model: Any, inputs: Any, tiny: Any) -> None:
    del model.config.mtpkern
    theirs = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert mtpkern.generate(model, **inputs, strategy=strategy, max_new_tokens=9).equal(theirs)
    # What would be the mask token is a token like any other: it may be emitted, and stand in a prompt.
    with torch.no_grad():
        model.lm_head.weight[tiny.mask] = 3 * model.lm_head.weight.abs().max()
    inputs["input_ids"][:, -1] = tiny.mask
    theirs = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert mtpkern.generate(model, **inputs, strategy=strategy, max_new_tokens=9).equal(theirs)
    with pytest.raises(ValueError, match=r"strategy=mtpkern.Static\(1\)"):
        mtpkern.generate(model, **inputs, max_new_tokens=9)


def test_one_token_a_pass_without_mask_token_of_a_class_that_no_test_covers(model: Any, inputs: Any) -> None:
    class Own(type(model)):  # type: ignore[misc]
        pass

    own = Own(model.config).eval()
    own.load_state_dict(model.state_dict())
    del own.config.mtpkern
    theirs = own.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert mtpkern.generate(own, **inputs, strategy=Static(1), max_new_tokens=5).equal(theirs)


def test_a_strategy_must_be_one(model: Any, inputs: Any) -> None:
    for wrong in ("static", Static, 4):
        with pytest.raises(TypeError, match="Static, ConfAdapt or Verified"):
            mtpkern.generate(model, **inputs, strategy=wrong, max_new_tokens=4)


def test_rows_that_cannot_hold_the_pending_tokens(model: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"3 \* 4 = 12, got 11"):
        mtpkern.generate(model, **inputs, strategy=Static(4), rows=11, max_new_tokens=4)


def test_rows_beyond_what_a_pass_has_a_use_for_take_no_memory(model: Any, inputs: Any) -> None:
    options: dict[str, Any] = {"strategy": Verified(4, masks=2), "max_new_tokens": 8}
    assert mtpkern.generate(model, **inputs, rows=10**20, **options).equal(mtpkern.generate(model, **inputs, **options))


def test_prompts_that_are_no_tensor_of_two_dimensions(model: Any, inputs: Any) -> None:
    for wrong in (None, [[1, 2]], BatchEncoding(inputs)):
        with pytest.raises(TypeError, match="must be a tensor"):
            mtpkern.generate(model, wrong, max_new_tokens=4)
    for wrong in (torch.tensor([1, 2]), torch.empty(1, 0, dtype=torch.long), torch.empty(0, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"\[B, T\]"):
            mtpkern.generate(model, wrong, max_new_tokens=4)


def test_padding_on_the_right(model: Any, tiny: Any) -> None:
    ids, real = tiny.prompts(4, 6)
    for wrong in (real.flip(1), torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6])):
        with pytest.raises(ValueError, match="padding_side = 'left'"):
            mtpkern.generate(model, ids, attention_mask=wrong, max_new_tokens=4)
    # Inferred from the padding token, too.
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        mtpkern.generate(model, ids.flip(1), max_new_tokens=4)


def test_an_attention_mask_of_another_shape(model: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        mtpkern.generate(model, inputs["input_ids"], attention_mask=torch.zeros(3, 5), max_new_tokens=4)
    with pytest.raises(ValueError, match="attention_mask"):
        mtpkern.generate(model, inputs["input_ids"], attention_mask=torch.zeros(3, 1, 12, 12), max_new_tokens=4)


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_mask_token_among_the_words(with_mask: bool, model: Any, tiny: Any) -> None:
    ids, real = tiny.prompts(6, 6)
    ids[1, 2] = tiny.mask
    with pytest.raises(ValueError, match=f"mask token {tiny.mask}"):
        mtpkern.generate(model, ids, attention_mask=real if with_mask else None, max_new_tokens=4)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gptj"])
@pytest.mark.parametrize("prompt", [28, 32])
def test_up_to_the_last_learned_position(model_type: str, prompt: int, tiny: Any) -> None:
    """Masks may stand behind it; an answer that stops in time is theirs, one that does not is an error that says so."""
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    if not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this version of transformers has no attention interface in it")
    model = tiny.model(model_type, max_position_embeddings=32, **EXTRA[model_type])
    ids, real = tiny.prompts(prompt, 9)
    inputs = {"input_ids": ids, "attention_mask": real}
    for new in range(1, 34 - prompt):
        theirs = greedy(model, tiny.mask, **inputs, max_new_tokens=new)
        for strategy in (Verified(6, threshold=0.0), Static(1)):
            assert mtpkern.generate(model, **inputs, max_new_tokens=new, strategy=strategy).equal(theirs)
    stops = list(range(tiny.mask))
    assert mtpkern.generate(model, **inputs, max_new_tokens=99, eos_token_id=stops).shape == (2, prompt + 1)
    with pytest.raises(ValueError, match=f"has learned 32 positions.* prompt of {prompt} tokens.*max_new_tokens=99"):
        mtpkern.generate(model, **inputs, max_new_tokens=99)
    with pytest.raises(ValueError, match="has learned 32 positions"):
        mtpkern.generate(model, tiny.prompts(33)[0], max_new_tokens=1)


def test_positions_of_a_tower_beside_the_decoder_are_not_its_own(model: Any) -> None:
    model.tower = torch.nn.Module()
    model.tower.position_embeddings = torch.nn.Parameter(torch.zeros(1, 9, 4))
    assert learned_positions(model, needed=10_000_000) is None
    most = model.config.max_position_embeddings
    model.tower.embed_positions = torch.zeros(most, 4)
    assert learned_positions(model, needed=most + 1) == most
    assert learned_positions(model, needed=most) is None


EXTRA = {
    "gpt2": {"n_head": 4, "n_layer": 2, "n_embd": 32, "n_positions": 32},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gptj": {"n_head": 4, "n_layer": 2, "n_embd": 32, "n_positions": 32, "rotary_dim": 4},
}
