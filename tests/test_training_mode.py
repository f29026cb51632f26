"""A model that trains decodes as it is, where nothing in it is random: trainers call its generate between two steps."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch

import mtpkern
from mtpkern import Static, Verified
from mtpkern.model import evaluating, trains


@pytest.fixture
def model(tiny: SimpleNamespace) -> Any:
    return tiny.model("llama").train()


@pytest.fixture
def inputs(tiny: SimpleNamespace) -> dict[str, Any]:
    ids, real = tiny.prompts(9, 5)
    return {"input_ids": ids, "attention_mask": real, "max_new_tokens": 12}


def modes(model: Any) -> list[bool]:
    return [module.training for module in model.modules()]


def test_decodes_as_in_evaluation_and_trains_on(model: Any, inputs: dict[str, Any], tiny: SimpleNamespace) -> None:
    """Its modules are then in the mode in which they were, each of them, frozen ones too."""
    model.model.layers[0].eval()
    before = modes(model)
    want = tiny.model("llama").generate(**inputs, do_sample=False, suppress_tokens=[tiny.mask])
    for strategy in (None, Verified(4, 0.0), Static(1)):
        assert mtpkern.generate(model, **inputs, strategy=strategy).equal(want)
        assert modes(model) == before
    prompts = [inputs["input_ids"][0], inputs["input_ids"][1, -5:]]
    outputs = mtpkern.generate_batch(model, prompts, max_new_tokens=12)
    assert [x.tokens for x in outputs] == [row[9:][: len(x.tokens)].tolist() for row, x in zip(want, outputs)]
    assert modes(model) == before
    assert mtpkern.check(model).ok
    assert modes(model) == before


def test_passes_are_those_of_evaluation(model: Any, inputs: dict[str, Any]) -> None:
    """Activation checkpointing, which keeps no cache, waits for the next step."""
    seen = []
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.model.layers[1].register_forward_hook(lambda layer, args, output: seen.append(layer.training))
    for call in (
        lambda: mtpkern.generate(model, **inputs),
        lambda: mtpkern.generate_batch(model, [[1, 2]], max_new_tokens=4),
        lambda: mtpkern.check(model),
    ):
        seen.clear()
        call()
        assert seen
        assert not any(seen)
    model(inputs["input_ids"])
    assert seen[-1]


def test_an_error_leaves_it_in_training(model: Any, inputs: dict[str, Any]) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mtpkern.generate(model, **inputs, stopping_criteria=[stop])
    assert all(modes(model))
    # Nor is a module asked that does more where its mode changes, such as to merge its weights.
    model.lm_head.train = stop
    mtpkern.generate(model, **inputs)
    assert all(modes(model))
    model.lm_head.training = False
    assert [module for module in model.modules() if not trains(module)] == [model.lm_head]


def test_an_interrupt_on_the_way_back_leaves_it_in_training(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(WeakSet[Any]):
        left = 3

        def discard(self, module: Any) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            super().discard(module)

    monkeypatch.setattr("mtpkern.model._resting", Interrupted())
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(modes(model))
    assert all(modes(model))


@pytest.mark.parametrize(
    ("model_type", "options", "where"),
    [
        ("llama", {"attention_dropout": 0.1}, r"model\.layers\.0\.self_attn\.attention_dropout"),
        ("gpt_neox", {"hidden_dropout": 0.1}, r"random \(gpt_neox\.\w+\.p"),
    ],
)
def test_what_drops_at_random_is_refused(
    model_type: str, options: dict[str, float], where: str, inputs: dict[str, Any], tiny: SimpleNamespace
) -> None:
    model = tiny.model(model_type, **options)
    want = mtpkern.generate(model, **inputs)
    model.train()
    for call in (mtpkern.generate, lambda model, **_: mtpkern.generate_batch(model, [[1, 2]]), mtpkern.check):
        with pytest.raises(ValueError, match=rf"training mode.*{where}.*model\.eval\(\)"):
            call(model, **({} if call is mtpkern.check else inputs))
    for module in model.modules():  # as trainers do who want none of it
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0
    assert mtpkern.generate(model, **inputs).equal(want)


def test_dropout_of_an_adapter_is_refused(model: Any, inputs: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"q_proj\.lora_dropout\.default\.p"):
        mtpkern.generate(adapted.train(), **inputs)
    mtpkern.generate(adapted.eval(), **inputs)


def test_an_adapter_that_came_into_a_model_at_rest(tiny: SimpleNamespace, inputs: dict[str, Any]) -> None:
    """Its layers are in training mode then, and the base is not."""
    from peft import LoraConfig, get_peft_model

    for dropout in (0.5, 0.0):
        config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout, init_lora_weights=False)
        adapted = get_peft_model(tiny.model("llama"), config)
        before = modes(adapted)
        assert any(before)
        assert not adapted.get_base_model().training
        for call in (mtpkern.generate, lambda model, **_: mtpkern.generate_batch(model, [[1, 2]])):
            with pytest.raises(ValueError, match="lora_dropout") if dropout else nullcontext():
                call(adapted, **inputs)
        assert modes(adapted) == before
