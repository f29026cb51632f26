"""What stands around a model is honoured exactly or refused by name, and a refusal leaves everything as it was."""

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import Verified
from support.injecting import injecting

NEW = 12
ALL = ["q_proj", "v_proj", "down_proj"]


def wild(model: Any, *, scale: float = 0.3) -> Any:
    """Adapters as they are after training: none of them does nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * scale)
    return model.eval()


def ours(model: Any, tiny: Any, **options: Any) -> Tensor:
    ids, real = tiny.prompts(9, 4, 6)
    return mtpkern.generate(
        model, ids, attention_mask=real, strategy=Verified(3, threshold=0.2), max_new_tokens=NEW, **options
    )


def theirs(model: Any, tiny: Any) -> Tensor:
    ids, real = tiny.prompts(9, 4, 6)
    return model.generate(
        input_ids=ids, attention_mask=real, do_sample=False, max_new_tokens=NEW, suppress_tokens=[tiny.mask]
    )


LAYERWISE: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ALL),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ALL, use_dora=True),
    "lora and an embedding row": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=ALL, trainable_token_indices=[3]
    ),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=ALL, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=ALL),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", LAYERWISE)
def test_adapters_in_the_layers_are_honoured(kind: str, model: Any, tiny: Any) -> None:
    plain = theirs(model, tiny)
    adapted = wild(peft.get_peft_model(model, LAYERWISE[kind]()))
    expected = theirs(adapted, tiny)
    assert not expected.equal(plain)
    assert ours(adapted, tiny).equal(expected)
    assert ours(adapted.get_base_model(), tiny).equal(expected)
    if kind == "lora":
        with adapted.disable_adapter():
            assert ours(adapted, tiny).equal(plain)


@injecting
def test_adapters_that_transformers_has_injected_itself(model: Any, tiny: Any) -> None:
    model.add_adapter(peft.LoraConfig(r=4, target_modules=ALL))
    wild(model)
    assert ours(model, tiny).equal(theirs(model, tiny))
    model.peft_config["default"].alora_invocation_tokens = [3]
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        ours(model, tiny)


def test_mixed_adapters(model: Any, tiny: Any) -> None:
    mixed = peft.get_peft_model(model, LAYERWISE["lora"](), mixed=True)
    mixed.add_adapter("other", LAYERWISE["loha"]())
    mixed.set_adapter(["default", "other"])
    wild(mixed)
    assert ours(mixed, tiny).equal(theirs(mixed, tiny))


AROUND: dict[str, tuple[Callable[[], peft.PeftConfig], str]] = {
    "prompt tuning": (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
    "prefix tuning": (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PREFIX_TUNING"),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "P_TUNING",
    ),
    "adaption prompt": (
        lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
        "ADAPTION_PROMPT is not known",
    ),
    "activated lora": (
        lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[3]),
        "alora_invocation_tokens",
    ),
}


def _state(model: Any) -> tuple[Any, ...]:
    return (
        type(model.config),
        model.config.to_json_string(),
        model.generation_config.to_json_string(),
        {name: p.clone() for name, p in model.state_dict().items()}.keys(),
        sorted(vars(model)),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


@pytest.mark.parametrize("kind", AROUND)
def test_adapters_around_the_model_are_refused_by_name(kind: str, model: Any, tiny: Any) -> None:
    make, why = AROUND[kind]
    adapted = peft.get_peft_model(model, make()).eval()
    expected, state = theirs(adapted, tiny), _state(model)
    with pytest.raises(ValueError, match=f"adapter 'default' of PeftModelForCausalLM.*{why}"):
        ours(adapted, tiny)
    assert _state(model) == state
    assert theirs(adapted, tiny).equal(expected)


def test_adapters_chosen_by_row_are_refused(model: Any, tiny: Any) -> None:
    adapted = wild(peft.get_peft_model(model, LAYERWISE["lora"]()))
    adapted.add_adapter("other", LAYERWISE["lora"]())
    names = ["default", "other", "__base__"]
    state = _state(model)
    with pytest.raises(ValueError, match=r"does not support adapter_names.*set_adapter"):
        ours(adapted, tiny, adapter_names=names)
    assert _state(model) == state
    # An inactive adapter that could not be honoured is in nobody's way.
    assert ours(adapted, tiny).equal(theirs(adapted, tiny))


def test_wrappers_of_torch_are_refused(model: Any, tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"OptimizedModule.*_orig_mod.*compile=True"):
        ours(torch.compile(model), tiny)
    with pytest.raises(ValueError, match=r"DataParallel wraps the model.*model\.module"):
        ours(torch.nn.DataParallel(model), tiny)
    with pytest.raises(TypeError, match="PreTrainedModel of transformers or a PeftModel around one, got Linear"):
        ours(torch.nn.Linear(2, 2), tiny)


def test_what_a_class_does_around_generate_is_done(model: Any, tiny: Any) -> None:
    class Own(type(model)):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)[:, :-1]

    own = Own(model.config).eval()
    own.load_state_dict(model.state_dict())
    ids, _ = tiny.prompts(5)
    want = model.generate(ids, max_new_tokens=8, do_sample=False, suppress_tokens=[tiny.mask])
    assert mtpkern.generate(own, ids, max_new_tokens=8).equal(want[:, :-1])


def test_an_instance_whose_generate_is_ours_does_not_recurse(model: Any, tiny: Any) -> None:
    expected = theirs(model, tiny)
    model.generate = partial(mtpkern.generate, model)
    assert ours(model, tiny).equal(expected)
    ids, real = tiny.prompts(9, 4, 6)
    assert model.generate(ids, attention_mask=real, max_new_tokens=NEW).equal(expected)


def test_a_class_with_a_forward_of_its_own_is_compared_first(model: Any, tiny: Any) -> None:
    """One that acts on each row is decoded; one that depends on the place in the batch is refused."""

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.roll(1, -1)
            return output

    class Placed(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * (1 + torch.arange(output.logits.shape[1])[:, None])
            output.logits[..., 2] += 3 * torch.arange(output.logits.shape[1])
            return output

    shifted, placed = (kind(model.config).eval() for kind in (Shifted, Placed))
    for own in (shifted, placed):
        own.load_state_dict(model.state_dict())
    assert ours(shifted, tiny).equal(theirs(shifted, tiny))
    for _ in range(2):  # the verdict is remembered
        with pytest.raises(ValueError, match=r"cannot decode Placed: its logits differ by up to .*check_model=False"):
            ours(placed, tiny)
    assert ours(placed, tiny, check_model=False).shape == (3, 9 + NEW)


def test_a_hook_on_the_model_is_compared_first(model: Any, tiny: Any) -> None:
    expected = ours(model, tiny)

    def offset(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": None}

    handle = model.register_forward_pre_hook(offset, with_kwargs=True)
    with pytest.raises(ValueError, match="cannot decode LlamaForCausalLM"):
        ours(model, tiny)
    handle.remove()
    assert ours(model, tiny).equal(expected)


def test_weights_that_are_elsewhere_are_refused(model: Any, tiny: Any) -> None:
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has weights that are moved.*\(cpu, meta\).*device_map"):
        ours(model, tiny)
