"""`mtpkern convert`: synthetic checkpoints of the published shape, quantised ones and GGUFs become plain ones."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.cli import main
from mtpkern.train import convert as module
from mtpkern.train.convert import PRESETS, convert
from mtpkern.train.lora import merged


def publish(folder, tiny, bytes_of, kind="llama", *, special=True, **generation):
    """A checkpoint as the authors publish theirs: plain weights, custom code, 32 special tokens, nothing recorded."""
    tokenizer = bytes_of(kind)
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": [f"<|mtp_special_token_{i}|>" for i in range(32)]})
    model = tiny.model("llama" if kind == "llama" else "qwen3", vocab_size=384)
    del model.config.mtpkern
    model.generation_config.update(**generation)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name = "Llama" if kind == "llama" else "Qwen3"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": f"configuration_{kind}.{name}Config",
        "AutoModelForCausalLM": f"modeling_{kind}.{name}ForCausalLM",
    }
    config["use_cache"] = False
    (folder / "config.json").write_text(json.dumps(config))
    for part in ("configuration", "modeling"):
        (folder / f"{part}_{kind}.py").write_text("raise RuntimeError('custom code was run')\n")
    return tokenizer


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_published_checkpoint_becomes_plain(tmp_path, tiny, bytes_of, kind, capsys):
    source, target = tmp_path / "published", tmp_path / "plain"
    tokenizer = publish(source, tiny, bytes_of, kind)
    mask = tokenizer.convert_tokens_to_ids("<|mtp_special_token_0|>")
    stops = [tokenizer.eos_token_id, tokenizer.eos_token_id + 1]
    assert main(["convert", str(source), str(target), "--stop-token-ids", *map(str, stops)]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoint": str(target), "mask_token_id": mask}

    config = json.loads((target / "config.json").read_text())
    assert config["mtpkern"] == {"mask_token_id": mask, "k_max": 16, "version": 1}
    assert "auto_map" not in config
    assert config["use_cache"]
    assert not list(target.glob("*.py"))
    before = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    after = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert after.dtype == torch.bfloat16
    for (name, x), (other, y) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(x, y)
    assert after.generation_config.eos_token_id == stops
    assert AutoTokenizer.from_pretrained(target).get_vocab() == tokenizer.get_vocab()

    inputs = tokenizer("1 + 1?", return_tensors="pt")
    after = after.float()
    ours = mtpkern.generate(after, **inputs, max_new_tokens=12)
    theirs = after.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=stops[0])
    assert ours.tolist() == theirs.tolist()


def test_presets_are_what_the_model_cards_say():
    """Ids of arXiv 2602.06019's checkpoints: the mask tokens, and each model's end of message and end of text."""
    assert {name: (p.mask_token_id, set(p.stop_token_ids)) for name, p in PRESETS.items()} == {
        "llama-magpie": (128259, {128001, 128009}),
        "qwen3-4b": (151669, {151643, 151645}),
    }


def test_a_preset_fills_in_what_is_not_said(tmp_path, tiny, bytes_of, monkeypatch, capsys):
    publish(tmp_path / "published", tiny, bytes_of, special=False, eos_token_id=5)
    preset = module.Preset(mask_token_id=300, stop_token_ids=(7, 8), prompts={"chat": True}, k_max=9)
    monkeypatch.setitem(module.PRESETS, "llama-magpie", preset)
    target = tmp_path / "plain"
    assert main(["convert", str(tmp_path / "published"), str(target), "--preset", "llama-magpie"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == {"chat": True}
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.mtpkern == {"mask_token_id": 300, "k_max": 9, "version": 1, "chat": True}
    assert model.generation_config.eos_token_id == [7, 8]


def test_nothing_half_written_is_left(tmp_path, tiny, bytes_of, monkeypatch):
    publish(tmp_path / "published", tiny, bytes_of, eos_token_id=5)
    kind = type(AutoTokenizer.from_pretrained(tmp_path / "published"))
    with monkeypatch.context() as broken:
        broken.setattr(kind, "save_pretrained", lambda self, folder: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            convert(str(tmp_path / "published"), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    convert(str(tmp_path / "published"), tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "published"]


def test_refusals(tmp_path, tiny, bytes_of):
    source, target = tmp_path / "published", tmp_path / "plain"
    publish(source, tiny, bytes_of)
    with pytest.raises(ValueError, match=r"mask token is 262, not 128259"):
        convert(str(source), target, preset="llama-magpie")
    with pytest.raises(ValueError, match="names no stop token"):
        convert(str(source), target)
    with pytest.raises(ValueError, match=r"stop tokens \[900, -1\] lie outside"):
        convert(str(source), target, stop_token_ids=[900, 5, -1])
    with pytest.raises(ValueError, match="preset must be one of"):
        convert(str(source), target, preset="gpt-2")
    with pytest.raises(ValueError, match="k_max must be at least 1"):
        convert(str(source), target, k_max=0)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert(str(tmp_path / "nowhere"), target)
    assert not target.exists()
    target.mkdir()
    with pytest.raises(FileExistsError, match="new folder"):
        convert(str(source), target)

    other = tmp_path / "other"
    publish(other, tiny, bytes_of, special=False, eos_token_id=5)
    with pytest.raises(ValueError, match="no mask token to go with k_max"):
        convert(str(other), tmp_path / "x", k_max=4)
    with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
        convert(str(other), tmp_path / "x", dtype="int8")
    with pytest.raises(ValueError, match="0 to 383, got 384"):
        convert(str(other), tmp_path / "x", mask_token_id=384)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"do not fit LlamaForCausalLM.*layers\.1"):
        convert(str(other), tmp_path / "x", mask_token_id=300)

    litgpt = tmp_path / "litgpt"
    litgpt.mkdir()
    (litgpt / "lit_model.pth").touch()
    with pytest.raises(ValueError, match="litgpt convert_from_litgpt"):
        convert(str(litgpt), tmp_path / "x")


# Custom code


@pytest.mark.parametrize("custom_class", [True, False])
def test_code_of_model_and_tokenizer_is_neither_run_nor_kept(tmp_path, tiny, bytes_of, monkeypatch, custom_class):
    source, target, marker = tmp_path / "published", tmp_path / "plain", tmp_path / "marker"
    tokenizer = publish(source, tiny, bytes_of, eos_token_id=5)
    code = f"open({str(marker)!r}, 'w')\nclass Custom: pass\ndef generate(model, **options): pass\n"
    (source / "custom_generate").mkdir()
    for name in ("configuration_llama.py", "modeling_llama.py", "tokenization.py", "custom_generate/generate.py"):
        (source / name).write_text(code)
    for name in ("tokenizer_config.json", "generation_config.json"):
        values = json.loads((source / name).read_text())
        values["auto_map"] = {"AutoTokenizer": ["tokenization.Custom", None], "GenerationConfig": "tokenization.Custom"}
        if custom_class and name == "tokenizer_config.json":
            values["tokenizer_class"] = "Custom"
        (source / name).write_text(json.dumps(values))
    # On a terminal transformers would ask whether to run it.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run custom code"))
    convert(str(source), target)
    assert not marker.exists()
    # The one file is ours, which says what it does; theirs of the same name is gone.
    (own,) = target.rglob("*.py")
    assert "mtpkern.generate(model" in own.read_text()
    assert not [
        path for path in target.glob("*.json") if "auto_map" in path.read_text() or "Custom" in path.read_text()
    ]
    plain = AutoTokenizer.from_pretrained(target)
    assert plain("1 + 1?").input_ids == tokenizer("1 + 1?").input_ids
    assert AutoModelForCausalLM.from_pretrained(target).generation_config.eos_token_id == 5


def test_an_architecture_of_its_own_code_is_refused(tmp_path, tiny, bytes_of):
    source = tmp_path / "published"
    publish(source, tiny, bytes_of, eos_token_id=5)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(ValueError, match="an architecture of its own code, which convert does not run"):
        convert(str(source), tmp_path / "x")
    (source / "tokenizer.json").unlink()
    values = json.loads((source / "tokenizer_config.json").read_text())
    values |= {"auto_map": {"AutoTokenizer": ["tokenization.Custom", None]}, "tokenizer_class": "Custom"}
    (source / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="its tokenizer is code of its own"):
        convert(str(source), tmp_path / "x")


# Plain sources, quantised ones, GGUF


def test_a_plain_source_gets_no_mask_token(tmp_path, tiny, bytes_of, capsys):
    """One's own model in another dtype; `mtpkern train` adds the token."""
    source, target = tmp_path / "own", tmp_path / "plain"
    publish(source, tiny, bytes_of, special=False, eos_token_id=5)
    assert main(["convert", str(source), str(target), "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoint": str(target), "mask_token_id": None}
    model = AutoModelForCausalLM.from_pretrained(target)
    assert not hasattr(model.config, "mtpkern")
    assert model.dtype == torch.float32
    assert model.generation_config.suppress_tokens is None


def test_what_training_has_recorded_is_kept(tmp_path, tiny, bytes_of):
    source, target = tmp_path / "trained", tmp_path / "plain"
    publish(source, tiny, bytes_of, special=False, eos_token_id=5)
    config = json.loads((source / "config.json").read_text())
    recorded = {"mask_token_id": 300, "k_max": 7, "version": 1}
    (source / "config.json").write_text(json.dumps(config | {"mtpkern": recorded}))
    assert convert(str(source), target) == 300
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.mtpkern == recorded
    assert model.generation_config.suppress_tokens == [300]
    with pytest.raises(ValueError, match="mask token is 300, not 5"):
        convert(str(source), tmp_path / "x", mask_token_id=5)


def assert_unquantised(model):
    assert [getattr(model, name, None) or None for name in ("hf_quantizer", "is_quantized")] == [None, None]
    assert not hasattr(model.config, "quantization_config")


def test_quantised_weights_become_floats(tmp_path, tiny, bytes_of):
    """A checkpoint of float8 blocks, as DeepSeek's and Qwen's are published."""
    source, target = tmp_path / "fp8", tmp_path / "plain"
    publish(source, tiny, bytes_of, special=False, eos_token_id=5)
    weights = load_file(source / "model.safetensors")
    expected = {}
    for name in [name for name in weights if "_proj" in name]:
        x = weights[name].float()
        rows, columns = x.shape
        blocks = x.unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
        scale = blocks.abs().amax((1, 3)) / 448
        q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        expected[name] = (q.float() * scale[:, None, :, None]).reshape(rows, columns)
        weights[name] = q.reshape(rows, columns)
        weights[f"{name}_scale_inv"] = scale
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantisation = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8], "fmt": "e4m3"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    convert(str(source), target)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    found = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    for name, x in expected.items():
        assert torch.allclose(found[name], x, rtol=0.02), name  # in bfloat16
    model = AutoModelForCausalLM.from_pretrained(target)
    assert_unquantised(model)
    assert model.dtype == torch.bfloat16


def test_what_cannot_become_floats_is_refused(tmp_path, tiny, bytes_of, monkeypatch):
    source = tmp_path / "source"
    publish(source, tiny, bytes_of, special=False, eos_token_id=5)
    config = json.loads((source / "config.json").read_text())
    quantisation = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    load = AutoModelForCausalLM.from_pretrained

    def packed(folder, config, **options):
        del config.quantization_config
        model, info = load(folder, config=config, **options)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.requires_grad_(False)
        weight.data = weight.data.to(torch.float8_e4m3fn)
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", packed)
    with pytest.raises(ValueError, match="cannot turn weights quantised by fp8 into floats"):
        convert(str(source), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_gguf_becomes_plain(tmp_path, write_gguf, capsys, given):
    folder, target = tmp_path / "folder", tmp_path / "plain"
    folder.mkdir()
    model, tokenizer = write_gguf(folder / "tiny.Q8_0.gguf")
    source = folder if given == "folder" else folder / "tiny.Q8_0.gguf"
    assert main(["convert", str(source), str(target)]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoint": str(target), "mask_token_id": None}
    plain = AutoModelForCausalLM.from_pretrained(target)
    assert_unquantised(plain)
    assert plain.dtype == torch.float32
    for name in ("config.json", "tokenizer_config.json"):
        assert "gguf" not in (target / name).read_text().lower()
    for (name, x), (other, y) in zip(plain.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert x.equal(y), name
    again = AutoTokenizer.from_pretrained(target)
    assert again.chat_template == tokenizer.chat_template
    turns = [{"role": "user", "content": "Hello there"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert plain.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(names)
    assert again.eos_token == names[0]  # the file's own
    # What is plain can be trained: it is given its mask token, saved and decoded.
    mtpkern.add_mask_token(plain, again)
    plain.save_pretrained(target)
    ids = torch.tensor([[65, 66, 67]])
    assert mtpkern.generate(AutoModelForCausalLM.from_pretrained(target), ids, max_new_tokens=4).shape[1] > 3


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_an_adapter_is_merged_into_its_base(start, tmp_path, bytes_of, with_tokenizer):
    """As fine-tuning by LoRA leaves it: upon the base that it names, with the tokenizer that lies beside it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    folder, target = tmp_path / "adapter", tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(start)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    lora.save_pretrained(folder)
    own = bytes_of("llama")
    own.chat_template = "{{ messages[0].content }}"
    if with_tokenizer:
        own.save_pretrained(folder)
    assert convert(str(folder), target) is None
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), str(folder))
    want = loaded.merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(target)
    assert got.state_dict().keys() == want.keys()
    assert all(torch.equal(x, want[name]) for name, x in got.state_dict().items())
    assert not torch.equal(
        want["model.layers.0.mlp.up_proj.weight"], base.model.layers[0].mlp.up_proj.base_layer.weight
    )
    template = AutoTokenizer.from_pretrained(target).chat_template
    assert (template == own.chat_template) == with_tokenizer


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_merging_parts_what_shared_a_weight(tiny, bytes_of, tmp_path, layer):
    """The adapter has changed one of the two."""
    from peft import LoraConfig, PeftModel, get_peft_model

    start, folder, target = (tmp_path / name for name in ("start", "adapter", "merged"))
    model = tiny.model("llama", tie_word_embeddings=True, vocab_size=300, eos_token_id=2)
    model.save_pretrained(start)
    bytes_of("llama").save_pretrained(start)
    config = LoraConfig(r=2, target_modules=[layer, "q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(start), config).save_pretrained(folder)
    convert(str(folder), target)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), str(folder))
    ids = torch.tensor([[65, 66, 67]])
    got = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    torch.testing.assert_close(got, loaded(ids).logits, rtol=1e-4, atol=1e-4)
    assert merged(loaded)(ids).logits.equal(got)


def test_adapters_that_cannot_be_merged_or_trained(start, tmp_path, capsys):
    from peft import PromptTuningConfig, get_peft_model

    from mtpkern.adapter import save_adapter
    from mtpkern.train.lora import add_gated_lora

    def base():
        return AutoModelForCausalLM.from_pretrained(start)

    save_adapter(add_gated_lora(base(), rank=2, k_max=3), tmp_path / "gated")
    get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "prompt"
    )
    for name, says in (("gated", "gated adapter.*cannot be merged"), ("prompt", "virtual tokens before a prompt")):
        with pytest.raises(ValueError, match=says):
            convert(str(tmp_path / name), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "1 + 1?", "completion": " 2"}\n')
        flags = ["--train-data", str(rows), "--output-dir", str(tmp_path / "out"), "--use-cpu", "--bf16", "false"]
        assert main(["train", "--model", str(tmp_path / name), *flags]) == 2
        said = capsys.readouterr().err
        assert f"holds an adapter, no model: give what `mtpkern convert {tmp_path / name} NEW` makes of it" in said


def test_adapters_whose_base_is_another(start, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    def saved(name, rows=0, base=None):
        model = AutoModelForCausalLM.from_pretrained(start)
        if rows:
            model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + rows)
        lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": str(start) if base is None else base}))
        return tmp_path / name

    for folder, says in (
        (saved("grown", rows=8), r"does not fit .* size mismatch for .*resize_token_embeddings"),
        (saved("unnamed", base=""), "does not say what model it is upon"),
        (saved("lost", base=str(tmp_path / "nowhere")), "its base is not there: .*nowhere.*base_model_name_or_path"),
        (saved("upper", base=str(saved("lower"))), "is upon .*lower, an adapter too: convert that first"),
    ):
        assert main(["convert", str(folder), str(tmp_path / "merged")]) == 2
        assert re.search(says, capsys.readouterr().err), folder
        assert not (tmp_path / "merged").exists()


def test_digits_stand_alone_where_the_file_says_so(tmp_path, write_gguf):
    for pre, alone in (("smollm", True), ("gpt-2", False)):
        write_gguf(tmp_path / f"{pre}.gguf", pre=pre, eot=False)
        convert(str(tmp_path / f"{pre}.gguf"), tmp_path / pre, dtype="bfloat16")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / pre)
        words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")]
        assert words == (["a", "ĠĠ", "1", "2"] if alone else ["a", "Ġ", "Ġ12"])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / pre)
        assert model.dtype == torch.bfloat16
        assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


def test_ggufs_that_cannot_be_read(tmp_path, monkeypatch):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"expected one GGUF; got a.gguf, b.gguf: give the path of one"):
        convert(str(tmp_path), tmp_path / "x")
    with monkeypatch.context() as without:
        without.setattr("mtpkern.train.gguf.find_spec", lambda name: None)
        with pytest.raises(
            ImportError, match=r"a.gguf: reading a GGUF needs gguf; run: pip install 'mtpkern\[train,gguf\]'"
        ):
            convert(str(tmp_path / "a.gguf"), tmp_path / "x")
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=r"a.gguf: no whole GGUF"):
        convert(str(tmp_path / "a.gguf"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
