"""The ablations on a tiny model: two variants of two steps, a run that is there is not repeated, the table."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.train import ablate
from mtpkern.train.arithmetic import build_tokenizer
from mtpkern.train.config import MTPConfig


@pytest.fixture
def start(tmp_path):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_every_variant_is_a_configuration(tmp_path):
    for change in ablate.variants(600).values():
        config = MTPConfig(str(tmp_path), use_cpu=True, k_max=ablate.K_MAX, **change)
        assert all(getattr(config, name) == value for name, value in change.items())


def test_table_and_resume(tmp_path, start, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["--start", str(start), "--out", str(out), "--steps", "2", "--batch", "2", "--problems", "2"]
    ablate.main([*command, "--seeds", "0", "--only", "hard", "ground truth, then hard"])
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == ["ground-truth-then-hard-2-seed0", "hard-2-seed0"]
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["hard", "ground truth, then hard"]

    result = json.loads((out / "hard-2-seed0" / "result.json").read_text())
    other = {name: value + 1 for name, value in result.items()}
    (out / "hard-2-seed1").mkdir()
    (out / "hard-2-seed1" / "result.json").write_text(json.dumps(other))
    monkeypatch.setattr(ablate, "MTPTrainer", None)
    ablate.main([*command, "--seeds", "0", "1", "--only", "hard"])
    prefix = result["agreeing prefix"]
    assert f"| hard | {prefix + 0.5:.3f} ({prefix:.3f}-{prefix + 1:.3f}) |" in (out / "table.md").read_text()


def test_errors(tmp_path, start, capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--start", str(start), "--only", "harder"])
    assert "harder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablate.main(["--start", str(tmp_path / "nowhere")])
    assert "make checkpoint" in capsys.readouterr().err
