"""Beginnings that prompts share are read once."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from mtpkern import Static
from mtpkern.batching import generate_batch, iterate_batch
from mtpkern.decoder import Decoder
from mtpkern.strategies import Strategy
from support.batches import STOP, STRATEGIES, alone, assert_as_alone, mixed_prompts


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Any:
    return tiny.model("llama")


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
