"""Code that comes with a checkpoint is never run, and nobody is asked whether it may."""

import ast
import builtins
import json
from pathlib import Path

import pytest

from mtpkern.cli import main

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for room in ("mtpkern", "train", "bench", "kernels") for path in (ROOT / room).glob("*.py"))


# An adapter's folder holds JSON and weights; peft runs nothing of it.
WITHOUT_CODE = {"PeftConfig", "PeftModel"}


def trusting(source):
    """Lines of calls named from_pretrained that do not say trust_remote_code=False."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "from_pretrained"
        and getattr(call.func.value, "id", None) not in WITHOUT_CODE
        and not any(
            k.arg == "trust_remote_code" and isinstance(k.value, ast.Constant) and k.value.value is False
            for k in call.keywords
        )
    ]


def test_every_load_of_ours_says_so():
    assert {path.name: lines for path in SOURCES if (lines := trusting(path.read_text(encoding="utf-8")))} == {}


def test_a_load_that_does_not_is_found():
    assert trusting("x = AutoTokenizer.from_pretrained(name)\nkind.from_pretrained(name, trust_remote_code=trust)") == [
        1,
        2,
    ]
    assert not trusting("kind.from_pretrained(name, trust_remote_code=False)")


@pytest.fixture(params=["tokenizer", "model"])
def checkpoint(request, tiny, bytes_of, tmp_path, monkeypatch):
    """A checkpoint whose tokenizer, or whose model, is defined by a file beside it; a person who says yes to it."""
    folder = tmp_path / "checkpoint"
    tokenizer = bytes_of("llama")
    tiny.model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ran = tmp_path / "ran"
    (folder / "theirs.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class TheirTokenizer(PreTrainedTokenizerFast): pass\n"
        "class TheirConfig(LlamaConfig): model_type = 'theirs'\n"
        "class TheirModel(LlamaForCausalLM): config_class = TheirConfig\n"
    )
    name, changes = {
        "tokenizer": (
            "tokenizer_config.json",
            {
                "tokenizer_class": "TheirTokenizer",
                "auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", "theirs.TheirTokenizer"]},
            },
        ),
        "model": (
            "config.json",
            {
                "model_type": "theirs",
                "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"},
            },
        ),
    }[request.param]
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))
    (folder / "problems.jsonl").write_text('{"prompt": "x", "result": 1}\n')
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    yield folder
    assert not asked
    assert not ran.exists()


@pytest.mark.parametrize("command", ["generate", "demo", "convert"])
def test_code_of_a_checkpoint_is_not_run(command, checkpoint, tmp_path, capsys):
    words = {
        "generate": ["generate", str(checkpoint), "--prompt", "Hi", "--max-new-tokens", "2"],
        "demo": ["demo", "--checkpoint", str(checkpoint), "--problems", "1"],
        "convert": ["convert", str(checkpoint), str(tmp_path / "out"), "--mask-token-id", "5"],
    }[command]
    main(words)  # it may say no, or do without
    if command == "generate":
        err = capsys.readouterr().err
        assert "trust_remote_code" not in err  # there is no such option here
