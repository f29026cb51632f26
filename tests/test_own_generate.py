"""Models whose `generate` is ours, and classes that decode in their own way."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mtpkern
from mtpkern import Static
from mtpkern.custom_generate import write_custom_generate

NEW = 3


# Who calls whom


def test_a_model_whose_generate_is_ours(tiny: Any, pair: Any) -> None:
    """Patched on instances, on two of them, on a class: the call comes through, and each decodes its own model."""
    first, second = tiny.model("llama"), tiny.model("llama", seed=5)
    expected = [mtpkern.generate(m, **pair, max_new_tokens=NEW) for m in (first, second)]
    assert not expected[0].equal(expected[1])
    for m in (first, second):
        m.generate = partial(mtpkern.generate, m, strategy=Static(1))
    for m, tokens in zip((first, second), expected):
        assert m.generate(**pair, max_new_tokens=NEW).equal(tokens)
        assert m.generate(pair["input_ids"], attention_mask=pair["attention_mask"], max_new_tokens=NEW).equal(tokens)
        assert mtpkern.generate(m, **pair, max_new_tokens=NEW).equal(tokens)
    # Each within a pass of the other.
    inner = []
    hook = first.lm_head.register_forward_hook(
        lambda *_: inner.append(second.generate(**pair, max_new_tokens=NEW)) if not inner else None
    )
    assert first.generate(**pair, max_new_tokens=NEW).equal(expected[0])
    assert inner[0].equal(expected[1])
    hook.remove()

    class Ours(LlamaForCausalLM):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return mtpkern.generate(self, *args, **kwargs)

    del first.generate
    first.__class__ = Ours
    assert first.generate(**pair, max_new_tokens=NEW).equal(expected[0])


def test_an_adapted_model_whose_base_generates_with_ours(model: Any, pair: Any) -> None:
    peft = pytest.importorskip("peft")
    expected = mtpkern.generate(model, **pair, max_new_tokens=NEW)
    model.generate = partial(mtpkern.generate, model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert mtpkern.generate(adapted, **pair, max_new_tokens=NEW).equal(expected)
    adapted.generate = partial(mtpkern.generate, adapted)
    assert adapted.generate(**pair, max_new_tokens=NEW).equal(expected)


def test_a_checkpoint_that_brings_our_generate_along(model: Any, pair: Any, tmp_path: Any) -> None:
    """Loaded by somebody who trusts its code it decodes with ours, streamer and all; by others as ever."""
    expected = mtpkern.generate(model, **pair, max_new_tokens=NEW)
    model.save_pretrained(tmp_path)
    write_custom_generate(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert isinstance(loaded.generate, partial)
    shown: list[Tensor] = []
    passes = []
    loaded.register_forward_hook(lambda *_: passes.append(1))
    strategy = {"strategy": Static(NEW), "check_model": False}
    assert loaded.generate(pair["input_ids"], attention_mask=pair["attention_mask"], max_new_tokens=NEW).equal(expected)
    passes.clear()
    streamer = SimpleNamespace(put=shown.append, end=lambda: None)
    output = loaded.generate(**pair, max_new_tokens=NEW, streamer=streamer, return_dict_in_generate=True, **strategy)
    assert torch.stack(shown[1:], dim=1).equal(output.sequences[:, 6:])
    assert output.passes == [1, 1]
    assert len(passes) == 1
    by_name = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    assert model.generate(**pair, max_new_tokens=NEW, **by_name).equal(expected)
    untrusted = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not isinstance(untrusted.generate, partial)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**pair, max_new_tokens=NEW, custom_generate=str(tmp_path), trust_remote_code=False)


def test_handed_to_transformers_as_a_function_it_says_how_to_set_it(model: Any, pair: Any) -> None:
    with pytest.raises(
        ValueError, match=r"position_ids; leave it out \(instead of custom_generate=mtpkern.generate set"
    ):
        model.generate(**pair, max_new_tokens=NEW, custom_generate=mtpkern.generate)
    own = {"custom_generate": partial(mtpkern.generate, model)}
    with pytest.raises(ValueError, match="does not support custom_generate"):
        mtpkern.generate(model, **pair, max_new_tokens=NEW, **own)


def test_a_class_that_decodes_in_its_own_way_is_refused(model: Any, pair: Any) -> None:
    class Own(LlamaForCausalLM):
        def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
            return input_ids

    model.__class__ = Own
    with pytest.raises(ValueError, match=r"Own\.generate decodes in its own way"):
        mtpkern.generate(model, **pair, max_new_tokens=4)


def test_a_model_that_cannot_generate_is_told_so_first(model: Any, pair: Any) -> None:
    del model.config.mtpkern  # nor has it a mask token
    with pytest.raises(ValueError, match="LlamaModel cannot generate; load the model with AutoModelForCausalLM"):
        mtpkern.generate(model.model, **pair, max_new_tokens=4)
    model.generation_config = None
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot generate"):
        mtpkern.generate(model, **pair, max_new_tokens=4)
