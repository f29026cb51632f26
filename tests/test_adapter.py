"""The gated adapter in decoding: the original model's own tokens, whatever stands in the adapter."""

import copy
import functools
import json
import warnings

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

import mtpkern
from mtpkern.adapter import gate_of, save_adapter
from mtpkern.adapter_config import digest
from mtpkern.train.lora import add_gated_lora, add_lora
from support.models import ARCHITECTURES as KINDS
from support.slow import slow_but

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "attention": "eager"},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "granite": {"embedding_multiplier": 2.0},
    "cohere": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    # With a second table of tokens.
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Beside its experts it has layers with the names of an expert's parts.
    "deepseek_v3": {**KINDS["deepseek_v3"], "moe_intermediate_size": 16},
}


def pair(tiny, kind="llama", seed=0, **settings):
    """A base, and the same with an adapter that changes its mask rows."""
    settings = {**ARCHITECTURES[kind], **settings}
    base = tiny.model(kind, seed=seed, **settings)
    del base.config.mtpkern
    peft_model = add_gated_lora(copy.deepcopy(base), rank=4, k_max=5).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return base, peft_model


FULL = ("llama", "phi3")  # of one matrix for each projection, and of one for all


@pytest.mark.parametrize("kind", slow_but(ARCHITECTURES, "llama", "gemma3_text", "gemma4_text", "deepseek_v3"))
def test_verified_writes_the_originals_greedy_output(tiny, kind):
    base, peft_model = pair(tiny, kind)
    ids, mask = tiny.prompts(7, 4, 9)
    for rows in (slice(0, 1), slice(0, 3)) if kind in FULL else (slice(0, 3),):
        inputs = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        want = base.generate(**inputs, do_sample=False, max_new_tokens=16)
        for strategy in (None, mtpkern.Verified(4, 0.0), mtpkern.Static(1))[: 3 if kind in FULL else 2]:
            out = mtpkern.generate(peft_model, **inputs, strategy=strategy, max_new_tokens=16)
            assert out.equal(want), (kind, strategy)


def test_layers_beside_experts(tiny):
    """Of names that peft takes for those of the experts, and a router that gives more than its product."""
    base = tiny.model("phimoe", seed=1, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1)
    del base.config.mtpkern
    peft_model = add_gated_lora(copy.deepcopy(base), rank=4, k_max=5).eval()
    assert any("o_proj" in name for name in peft_model.peft_config["default"].target_modules)
    ids, mask = tiny.prompts(7, 4, 9)
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16}
    assert mtpkern.generate(peft_model, **inputs).equal(base.generate(**inputs, do_sample=False))
    other = tiny.model("deepseek_v3", **KINDS["deepseek_v3"])
    with pytest.raises(ValueError, match="name none of experts that share a tensor"):
        add_gated_lora(other, rank=4, k_max=5, targets="up_proj,gate_proj")


@pytest.mark.parametrize("add", [add_gated_lora, functools.partial(add_lora, mask_token_id=3)])
@pytest.mark.parametrize("targets", ["q_proj,input_layernorm", "nothing_of_that_name"])
def test_adapters_that_cannot_be_made_leave_the_base_as_it_was(tiny, add, targets, monkeypatch):
    """By name beforehand, and where peft finds out in the midst."""
    base = tiny.model("llama")
    layers = list(base.named_modules())
    trained = [parameter.requires_grad for parameter in base.parameters()]
    more = {"k_max": 5} if add is add_gated_lora else {}
    with pytest.raises(ValueError, match="lora_targets must be names of linear layers"):
        add(base, rank=4, targets=targets, **more)
    monkeypatch.setattr("mtpkern.train.lora.require_targets", lambda *given: None)
    with pytest.raises(ValueError, match=r"not supported|not found"):
        add(base, rank=4, targets=targets, **more)
    assert [(name, id(x)) for name, x in base.named_modules()] == [(name, id(x)) for name, x in layers]
    assert [parameter.requires_grad for parameter in base.parameters()] == trained
    assert add_gated_lora(base, rank=4, k_max=5) is not None


def test_what_sees_has_all_layers_of_its_text_adapted():
    """What reads images has tensors of more than two dimensions, which are no experts'."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 16, "num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**size, "image_size": 28})
    peft_model = add_gated_lora(AutoModelForCausalLM.from_config(config), rank=2, k_max=5)
    adapted = {name.partition(".lora_A")[0] for name, _ in peft_model.named_parameters() if "lora_A" in name}
    for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert any(name.endswith(f"language_model.layers.0.{part}") for name in adapted)


def test_mask_rows_are_those_of_the_adapted_model(tiny):
    """What the masks propose is what a model with all rows adapted there would: Static shows it."""
    _, peft_model = pair(tiny)
    ids, mask = tiny.prompts(7, 4)
    inputs = {"input_ids": ids, "attention_mask": mask, "strategy": mtpkern.Static(4), "max_new_tokens": 16}
    with_adapter = mtpkern.generate(peft_model, **inputs)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not with_adapter.equal(mtpkern.generate(peft_model, **inputs))


def test_folder(tiny, tmp_path):
    base, peft_model = pair(tiny)
    ids, mask = tiny.prompts(7, 4)
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "return_dict_in_generate": True}
    want = mtpkern.generate(peft_model, **inputs)
    save_adapter(peft_model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["mtpkern"]["k_max"] == 5
    with warnings.catch_warnings():
        # Of what peft does in a newer transformers, which no user can mend.
        warnings.simplefilter("error", FutureWarning)
        loaded = mtpkern.load_adapter(copy.deepcopy(base), tmp_path)
        add_gated_lora(copy.deepcopy(base), rank=2, k_max=5)
        add_lora(copy.deepcopy(base), 3, rank=2)
    got = mtpkern.generate(loaded, **inputs)
    assert got.sequences.equal(want.sequences)
    assert got.blocks == want.blocks

    from peft import PeftModel

    by_peft = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert by_peft(ids).logits.equal(base(ids).logits)
    again = mtpkern.generate(by_peft, **inputs)
    assert again.sequences.equal(want.sequences)
    assert again.blocks == want.blocks
    assert gate_of(by_peft) is not None


def test_what_is_not_gated_is_not_saved_as_such(tiny, tmp_path):
    _, peft_model = pair(tiny)
    peft_model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    peft_model.set_adapter("plain")
    with pytest.raises(ValueError, match="none of the active adapters is gated"):
        save_adapter(peft_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_leads_nowhere(tiny, monkeypatch):
    monkeypatch.setattr("mtpkern.loading._on_hub", lambda name, kind: False)
    for name in ("./nope", "nope"):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            mtpkern.load_adapter(tiny.model("llama"), name)


def test_refuses_other_bases_and_merging(tiny, tmp_path):
    _, peft_model = pair(tiny)
    save_adapter(peft_model, tmp_path)
    with pytest.raises(ValueError, match="was trained for"):
        mtpkern.load_adapter(tiny.model("llama", seed=3), tmp_path)
    with pytest.raises(ValueError, match="cannot be merged"):
        peft_model.merge_and_unload()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_refuses_what_would_write_over_the_bases_biases(tiny, tmp_path, bias):
    base, peft_model = pair(tiny, "qwen2")
    save_adapter(peft_model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "bias": bias}))
    with pytest.raises(ValueError, match="plain LoRA on linear layers; got one with bias"):
        mtpkern.load_adapter(base, tmp_path)
    assert gate_of(base) is None


def test_an_adapter_of_the_head_is_refused_and_leaves_nothing(tiny, tmp_path):
    base, peft_model = pair(tiny)
    save_adapter(peft_model, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": [*config["target_modules"], "lm_head"]}))
    before = {*vars(base)}, [(name, id(x)) for name, x in base.named_modules()]
    with pytest.raises(ValueError, match="changes the output head"):
        mtpkern.load_adapter(base, tmp_path)
    assert ({*vars(base)}, [(name, id(x)) for name, x in base.named_modules()]) == before
    assert not hasattr(base, "peft_config")


def test_digest_does_not_depend_on_the_dtype(tiny):
    base = tiny.model("llama")
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert digest(base) == digest(copy.deepcopy(base).bfloat16())
