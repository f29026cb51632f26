"""One base serves many gated adapters: loaded, switched and taken away by peft's means, by transformers' or by ours."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mtpkern
from mtpkern.adapter import adopt, gate_of, save_adapter
from mtpkern.adapter_config import digest
from mtpkern.train.lora import add_gated_lora
from support.injecting import injecting


@pytest.fixture(scope="module")
def base(tiny):
    model = tiny.model("llama")
    del model.config.mtpkern
    return model


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Three adapters that differ in what they add, in the row of the mask token, in their layers and in k_max."""
    made = []
    for seed, (targets, k_max) in enumerate((("all-linear", 5), ("all-linear", 3), ("q_proj,down_proj", 4))):
        model = add_gated_lora(copy.deepcopy(base), rank=4, k_max=k_max, targets=targets).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.5, generator=generator)
                elif name == "mask_row":
                    parameter.normal_(0, 1, generator=generator)
        made.append(tmp_path_factory.mktemp("adapter"))
        save_adapter(model, made[-1])
    return made


@pytest.fixture(scope="module")
def alone(base, folders, tiny):
    """What each says upon a base of its own."""
    found = [said(mtpkern.load_adapter(copy.deepcopy(base), folder), tiny) for folder in folders]
    assert not any(a.equal(b) for a, b in pairwise(found))
    return found


def said(model, tiny):
    """Static shows what the masks propose; k_max is as good as any mark of whose settings count."""
    ids, mask = tiny.prompts(7, 4)
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16}
    out = mtpkern.generate(model, **inputs, strategy=mtpkern.Static(3))
    # Rows that are given: by load they would follow the load of the machine.
    greedy = mtpkern.generate(model, **inputs, rows=64, return_dict_in_generate=True)
    k_max = max(n for row in greedy.blocks for n in row)
    return torch.cat([out, torch.full((2, 1), k_max)], dim=1)


def is_clean(model):
    names = {name for name in vars(model) if "mtpkern" in name or name == "peft_config"}
    embedding = model.get_input_embeddings()
    return not names and not embedding._forward_hooks and not embedding._forward_pre_hooks


def test_unloading_leaves_the_base_and_the_next_adapter_is_the_next(base, folders, alone, tiny):
    model = copy.deepcopy(base)
    for folder, want in zip(folders, alone):
        peft_model = mtpkern.load_adapter(model, folder)
        assert said(peft_model, tiny).equal(want)
        model = copy.deepcopy(peft_model).unload()  # a copy's base is its own
        assert is_clean(model)
        assert not is_clean(peft_model.get_base_model())
        with pytest.raises(ValueError, match="records no mask token"):
            mtpkern.generate(model, tiny.prompts(3)[0], strategy=mtpkern.Static(2))


def test_a_model_is_pickled_with_its_adapters(base, folders, alone, tiny):
    """And what it becomes loads and unloads by itself."""
    model = mtpkern.load_adapter(copy.deepcopy(base), folders[0])
    again = pickle.loads(pickle.dumps(model))
    assert said(again, tiny).equal(alone[0])
    again.load_adapter(folders[1], "second")
    again.set_adapter("second")
    assert said(again, tiny).equal(alone[1])
    assert is_clean(again.unload())
    assert said(model, tiny).equal(alone[0])


def test_set_adapter_switches_row_settings_and_layers(base, folders, alone, tiny):
    model = mtpkern.load_adapter(copy.deepcopy(base), folders[0])
    model.load_adapter(str(folders[1]), "second")
    model.load_adapter(str(folders[2]), "third")
    for name, i in (("default", 0), ("second", 1), ("third", 2), ("default", 0), ("third", 2)):
        model.set_adapter(name)
        assert said(model, tiny).equal(alone[i]), name
        assert said(model.get_base_model(), tiny).equal(alone[i]), name
        embedding = model.get_base_model().get_input_embeddings()
        assert len(embedding._forward_hooks) == len(embedding._forward_pre_hooks) == 1
    # A check decodes, too.
    model.set_adapter("default")
    mtpkern.check(model)
    assert gate_of(model.get_base_model()).settings.k_max == 5


def test_each_is_saved_as_itself(base, folders, alone, tiny, tmp_path):
    model = mtpkern.load_adapter(copy.deepcopy(base), folders[0])
    model.load_adapter(str(folders[1]), "second")
    model.set_adapter("second")
    said(model, tiny)
    for name, want in (("second", alone[1]), ("default", alone[0])):
        model.set_adapter(name)
        save_adapter(model, tmp_path / name)
        assert said(mtpkern.load_adapter(copy.deepcopy(base), tmp_path / name), tiny).equal(want)


def test_deleting_and_deactivating(base, folders, alone, tiny):
    model = mtpkern.load_adapter(copy.deepcopy(base), folders[0])
    model.load_adapter(str(folders[1]), "second")
    model.delete_adapter("default")
    assert said(model, tiny).equal(alone[1])
    model.load_adapter(str(folders[2]), "default")  # the name again, and another adapter
    model.set_adapter("default")
    assert said(model, tiny).equal(alone[2])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"2 active gated adapters.*activate one"):
        said(model, tiny)
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"]))
    for active, row in (("default", True), ("plain", False)):
        model.set_adapter(active)
        adopt(model)
        assert ("mask_row" in model.state_dict()) == row == (gate_of(model.get_base_model()) is not None)


def fine_tuned(base):
    """A base with an adapter of fine-tuning, which acts on every row, on some of its layers."""
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(copy.deepcopy(base), config).eval()


@pytest.mark.parametrize("merged", [False, True], ids=["of the base", "of the two merged"])
def test_beside_an_adapter_of_fine_tuning(base, folders, tiny, tmp_path, merged):
    """The fine-tuned model's own tokens, whichever of the two the gated one was trained for."""
    ids, mask = tiny.prompts(7, 4)
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16}
    model, folder = fine_tuned(base), folders[0]
    want = model.generate(**inputs, do_sample=False)
    assert not want.equal(base.generate(**inputs, do_sample=False))
    if merged:
        alone = add_gated_lora(fine_tuned(base).merge_and_unload(), rank=4, k_max=4).eval()
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(7))
        save_adapter(alone, folder := tmp_path / "adapter")
    model.load_adapter(str(folder), "gated")
    model.base_model.set_adapter(["default", "gated"])
    for strategy in (None, mtpkern.Verified(4, 0.0), mtpkern.Static(1)):
        assert mtpkern.generate(model, **inputs, strategy=strategy).equal(want)
    if merged:
        # And masks see the two together.
        drafts = {**inputs, "strategy": mtpkern.Static(3)}
        assert mtpkern.generate(model, **drafts).equal(mtpkern.generate(alone, **drafts))
        other = copy.deepcopy(base)
        with pytest.raises(ValueError, match="was trained for"):
            mtpkern.load_adapter(other, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_digest_of_what_the_two_make_merged(base, dtype):
    """In whatever dtype: peft's own adapters are float32 upon a base of 16 bits."""
    model = fine_tuned(copy.deepcopy(base).to(dtype))
    assert {x.dtype for name, x in model.named_parameters() if "lora_" in name} == {torch.float32}
    found = digest(model.get_base_model(), merged=True)
    assert found != digest(model.get_base_model())
    assert found == digest(model.merge_and_unload())


def test_beside_another_adapter_than_it_was_merged_with(base, tiny, tmp_path):
    save_adapter(add_gated_lora(fine_tuned(base).merge_and_unload(), rank=4, k_max=4), tmp_path)
    model = fine_tuned(base)
    model.load_adapter(str(tmp_path), "gated")
    model.base_model.set_adapter(["default", "gated"])
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.mul_(2)
    with pytest.raises(ValueError, match="was trained for"):
        mtpkern.generate(model, tiny.prompts(3)[0])


def test_loading_over_an_adapter_takes_its_row_along(base, folders, alone, tiny):
    model = mtpkern.load_adapter(copy.deepcopy(base), folders[0])
    model.load_adapter(str(folders[1]), "default")
    assert said(model, tiny).equal(alone[1])
    with pytest.raises(ValueError, match=r"has another target_modules; load it under another name"):
        model.load_adapter(str(folders[2]), "default")
    assert said(model, tiny).equal(alone[1])


@injecting
def test_loaded_by_transformers_itself(base, folders, alone, tiny):
    model = copy.deepcopy(base)
    model.load_adapter(str(folders[0]))
    assert said(model, tiny).equal(alone[0])
    model.load_adapter(str(folders[1]), adapter_name="second")
    model.set_adapter("second")
    assert said(model, tiny).equal(alone[1])
    model.delete_adapter(["default", "second"])
    ids = tiny.prompts(3)[0]
    assert mtpkern.generate(model, ids, strategy=mtpkern.Static(1), max_new_tokens=8).equal(
        base.generate(ids, do_sample=False, max_new_tokens=8)
    )
    assert gate_of(model) is None


def test_a_base_that_carries_adapters_is_refused(base, folders):
    model = mtpkern.load_adapter(copy.deepcopy(base), folders[0])
    for given in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"carries adapters already \('default'\).*unload\(\).*set_adapter"):
            mtpkern.load_adapter(given, folders[1])
        with pytest.raises(ValueError, match="carries adapters already"):
            add_gated_lora(given, rank=2, k_max=3)


@pytest.mark.parametrize(
    ("of_base", "of_adapter"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_an_adapter_in_another_dtype_than_its_base(base, folders, tiny, of_base, of_adapter):
    model = mtpkern.load_adapter(copy.deepcopy(base).to(of_base), folders[0], dtype=of_adapter)
    rounded = mtpkern.load_adapter(copy.deepcopy(base).to(of_base), folders[0], dtype=torch.bfloat16).to(of_base)
    assert said(model, tiny).equal(said(rounded, tiny))
    # As peft loads them.
    model = copy.deepcopy(base).to(of_base)
    model.load_adapter(str(folders[0]))
    said(model, tiny)


def test_an_adapter_of_the_head_is_refused(tiny):
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="output head of LlamaForCausalLM"):
        tiny.adapted(model, targets="q_proj,lm_head")
    assert not any("lora" in name for name, _ in model.named_parameters()), "the base has its own layers again"
