"""Many prompts, and what each of them gets alone."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mtpkern
from mtpkern import ConfAdapt, Static, Verified
from mtpkern.batching import BatchOutput
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


def broken_by_13(tiny: SimpleNamespace, seed: int) -> tuple[Any, list[list[int]], list[int]]:
    """A model to which token 13 is NaN and that never writes it, prompts without it, and how many new tokens each."""
    model = tiny.model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = torch.nan
        head = model.get_output_embeddings().weight
        head[13] = head[12]  # of equals the first wins
    prompts, new = mixed_prompts(16, seed)
    return model, [[5 if token == 13 else token for token in prompt] for prompt in prompts], new


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


@pytest.fixture(params=["llama", "gemma3_text", "gated"], scope="module")
def any_model(request: pytest.FixtureRequest, tiny: SimpleNamespace) -> Any:
    if request.param != "gated":
        return tiny.model(request.param, **(WINDOWED if request.param == "gemma3_text" else {}))
    return tiny.adapted(tiny.model("llama"))
