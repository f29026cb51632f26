"""`mtpkern convert`: a synthetic checkpoint of the published shape becomes a plain one that `generate` decodes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.cli import main
from mtpkern.train.convert import PRESETS, convert


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
    from mtpkern.train import convert as module

    publish(tmp_path / "published", tiny, bytes_of, special=False, eos_token_id=5)
    preset = module.Preset(mask_token_id=300, stop_token_ids=(7, 8), prompts="so", k_max=9)
    monkeypatch.setitem(module.PRESETS, "llama-magpie", preset)
    target = tmp_path / "plain"
    assert main(["convert", str(tmp_path / "published"), str(target), "--preset", "llama-magpie"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == "so"
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.mtpkern == {"mask_token_id": 300, "k_max": 9, "version": 1}
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
    with pytest.raises(ValueError, match=r"stop tokens \[900\] lie outside"):
        convert(str(source), target, stop_token_ids=[900])
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
