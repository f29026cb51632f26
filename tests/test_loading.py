"""Models named on the command line: adapters and their bases, and errors that speak of flags."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from mtpkern.adapter import save_adapter
from mtpkern.cli import main
from mtpkern.loading import require_found
from mtpkern.train.lora import add_gated_lora


@pytest.fixture
def folders(tmp_path, tiny, bytes_of):
    """A base and a gated adapter of it, whose masks are not the base's own."""
    tokenizer = bytes_of("llama")
    base = tiny.model("llama", vocab_size=len(tokenizer), num_hidden_layers=1, eos_token_id=tokenizer.eos_token_id)
    del base.config.mtpkern
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    peft_model = add_gated_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rank=2, k_max=4)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    save_adapter(peft_model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def fails(capsys, *words):
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_generate_takes_an_adapters_folder(folders, tmp_path, capsys, bytes_of):
    base, adapter = folders
    output = tmp_path / "out.jsonl"
    command = ["generate", str(adapter), "--prompt", "Why?", "--max-new-tokens", "12", "--output", str(output)]
    assert main([*command, "--strategy", "confadapt:4:0.0"]) == 0
    assert max(json.loads(output.read_text())["blocks"]) == 4
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([bytes_of("llama")("Why?").input_ids])
    want = plain.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    assert main(command) == 0
    assert json.loads(output.read_text())["tokens"] == want

    # Its base was moved.
    base.rename(tmp_path / "moved")
    said = fails(capsys, *command)
    assert f"{adapter} is an adapter, and its base is not there: {base}: there is no such file or folder" in said
    assert "name its place by --base" in said
    assert main([*command, "--base", str(tmp_path / "moved")]) == 0
    assert json.loads(output.read_text())["tokens"] == want


def test_a_base_that_is_not_the_adapters(folders, tmp_path, capsys):
    base, adapter = folders
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(other)
    command = ["generate", adapter, "--prompt", "Why?", "--base"]
    assert re.search(rf"{adapter} was trained for {base} .* --base names another one", fails(capsys, *command, other))
    assert f"{tmp_path}/no: there is no such file or folder" in fails(capsys, *command, f"{tmp_path}/no")
    assert f"{base} is a model of its own; leave --base out" in fails(
        capsys, "generate", base, "--prompt", "Why?", "--base", other
    )


def test_demo_takes_an_adapters_folder(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mtpkern.demo.MAX_NEW_TOKENS", 4)
    base, adapter = folders
    (adapter / "problems.jsonl").write_text(json.dumps({"prompt": "Why?", "result": 3}) + "\n")
    assert main(["demo", "--checkpoint", str(adapter), "--problems", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 1
    shutil.copy(adapter / "problems.jsonl", base)
    assert "records no k_max" in fails(capsys, "demo", "--checkpoint", base, "--problems", "1")


# Errors


class Hub(BaseHTTPRequestHandler):
    """The hub's interface, as far as it says what there is: the model gpt2 and the data set imdb."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        known = {"/api/models/gpt2": "gpt2", "/api/datasets/imdb": "imdb"}.get(self.path)
        status = 200 if known else 503 if "busy" in self.path else 404
        body = json.dumps({"id": known} if known else {"error": "Repository not found"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_name_without_an_owner(hub, tmp_path, monkeypatch):
    """An old id is asked for once, with what it is an id of; any other is refused, and nothing retries."""
    monkeypatch.chdir(tmp_path)
    for name, kind in (("gpt2", "model"), ("imdb", "dataset"), ("busy", "model"), ("owner/name", "model")):
        require_found(name, kind)
    for name, kind in (("imdb", "model"), ("gpt2", "dataset"), ("no such name", "model")):
        with pytest.raises(FileNotFoundError, match=f"^{name}: there is no such file or folder, .*owner/name"):
            require_found(name, kind)
    assert len(hub.asked) == len(set(hub.asked)) <= 6
    (tmp_path / "cache/models--old").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    asked = len(hub.asked)
    require_found("old")
    require_found("mine")
    assert len(hub.asked) == asked
    # Offline, and where nobody answers.
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setattr(f"huggingface_hub.constants.{name}", value)
            require_found("old")
            with pytest.raises(FileNotFoundError, match=r"^gpt2: there is no such file or folder"):
                require_found("gpt2")


def test_every_command_refuses_such_a_name(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mtpkern.loading._on_hub", lambda name, kind: False)
    base, adapter = folders
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Why?", "completion": "So."}) + "\n")
    train = ["train", "--use-cpu", "--max-steps", "1", "--output-dir", tmp_path / "out", "--chat", "false"]
    for words in (
        ["generate", "nope", "--prompt", "x"],
        ["generate", adapter, "--base", "nope", "--prompt", "x"],
        ["convert", "nope", tmp_path / "new"],
        [*train, "--model", "nope", "--train-data", rows],
        [*train, "--model", base, "--teacher", "nope", "--train-data", rows],
        [*train, "--model", base, "--train-data", "nope"],
    ):
        said = fails(capsys, *words)
        assert "nope: there is no such file or folder, and the hub has not answered to that name" in said, words


def plain_folder(tmp_path, tiny, bytes_of, kind, name="plain", **settings):
    tokenizer = bytes_of("llama")
    model = tiny.model(kind, vocab_size=len(tokenizer) + 1, **settings)
    model.config.mtpkern = {"mask_token_id": len(tokenizer), "k_max": 3}
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / name


def test_errors_of_the_library_name_flags(folders, tmp_path, tiny, bytes_of, capsys, monkeypatch):
    """Whatever the library raises on the way: no name of a Python parameter that is a flag here."""
    _, adapter = folders
    model = plain_folder(tmp_path, tiny, bytes_of, "llama")
    learned = plain_folder(tmp_path, tiny, bytes_of, "gpt2", "learned", max_position_embeddings=24, seed=1)
    ask = ["--prompt", "Why not?"]
    for words, says in (
        ([model, *ask, "--mask-token-id", "999"], "--mask-token-id must be a token of the model, 0 to 262, got 999"),
        ([adapter, *ask, "--mask-token-id", "7"], "has mask token 262, got --mask-token-id 7; leave it out"),
        ([learned, *ask, "--max-new-tokens", "90"], "with --max-new-tokens 90"),
        ([model, *ask, "--max-new-tokens", str(10**13)], "lower --max-new-tokens"),
        ([model, *ask, "--strategy", "greedy"], "--strategy: a strategy is written verified, confadapt or static"),
        ([model, *ask, "--strategy", "static:2", "--k", "3"], "leave out --k and --threshold"),
        ([model, *ask, "--strategy", "verified:0"], "--strategy: Verified: k must be a whole number"),
        ([model, *ask, "--chat", "--separator", "x"], "--separator is of prompts without the chat template"),
    ):
        said = fails(capsys, "generate", *words)
        assert says in said
        assert not re.search("mask_token_id|max_new_tokens|batch_size", said)
    # As of an architecture that nobody has tried.
    monkeypatch.setattr("mtpkern.model.TESTED", ())
    monkeypatch.setattr("mtpkern.verify._verified", set())
    monkeypatch.setattr("mtpkern.verify._fault", lambda *args: "its logits differ")
    said = fails(capsys, "generate", model, *ask)
    assert "check_model=False (in Python) skips this check" in said


def test_no_bars_of_transformers_between_the_lines_of_a_command(tmp_path, tiny, bytes_of, capsys):
    """Neither from loading nor from saving; the library leaves them as they are."""
    from transformers.utils import logging

    logging.enable_progress_bar()
    model = plain_folder(tmp_path, tiny, bytes_of, "llama", eos_token_id=7)
    rows = [{"prompt": f"{i} and 1?", "completion": f"{i + 1}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["--model", model, "--train-data", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "out", "--no-chat"]
    train += ["--use-cpu", "--max-steps", "1", "--k-max", "3", "--num-spans", "1"]
    for command in (
        ["generate", model, "--prompt", "Why?", "--max-new-tokens", "2"],
        ["train", *train],
        ["convert", model, tmp_path / "converted", "--stop-token-ids", "7"],
    ):
        capsys.readouterr()
        AutoModelForCausalLM.from_pretrained(model)
        assert "Loading weights" in capsys.readouterr().err
        assert main([*map(str, command)]) == 0
        captured = capsys.readouterr()
        assert "%|" not in captured.err + captured.out
        logging.enable_progress_bar()


def test_training_on_a_cpu_says_what_to_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mtpkern.train.config.is_torch_bf16_gpu_available", lambda: False)
    said = fails(capsys, "train", "gsm8k", "--output-dir", tmp_path / "out")
    assert "bf16 needs a GPU that computes in bfloat16, and torch finds none here" in said
    assert "--use-cpu --bf16 false" in said
