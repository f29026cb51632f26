"""`mtpkern train` as a run: ended, gone on with, refused; and what is checked before any weights are loaded."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.cli import main
from mtpkern.train import arithmetic, checks, command
from mtpkern.train.options import parse
from support.resumed import files_of
from support.rows import write
from support.slow import slow_but

ROWS = [{"question": f"How many are {i} and 1?", "answer": f"They are {i + 1}.\n#### {i + 1}"} for i in range(8)]
TINY = ["--use-cpu", "--k-max", "3", "--num-spans", "2", "--per-device-train-batch-size", "2"]


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weights is an error."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))


@pytest.mark.parametrize("save", slow_but(["steps", "no"], "steps"))
def test_a_run_that_has_ended_is_left_alone(tmp_path, start, capsys, monkeypatch, save):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    common = ["train", "--model", str(start), "--train-data", data, "--output-dir", str(out), *TINY]
    common += ["--lr-scheduler-type", "constant", "--learning-rate", "1e-2", "--save-strategy", save]
    assert main([*common, "--max-steps", "2"]) == 0
    before = files_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_student", lambda *args: pytest.fail("loaded"))
        for steps in ("2", "1"):
            assert main([*common, "--max-steps", steps, "--report-to", "tensorboard"]) == 0
            assert "has ended at step 2: nothing is left to train; raise max_steps" in capsys.readouterr().err
        # What it would be now is another run, whose place is elsewhere.
        assert main([*common, "--max-steps", "2", "--k-max", "4"]) == 2
        assert "k_max was 3 and is 4. Take those" in capsys.readouterr().err
    after = files_of(out)
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} <= {"_lock"}
    more = main([*common, "--max-steps", "3"])
    if save == "no":
        assert more == 2
        assert "no checkpoint to go on from; take another output_dir" in capsys.readouterr().err
    else:
        assert more == 0
        assert files_of(out)["model.safetensors"] != before["model.safetensors"]
        assert json.loads((out / "run.json").read_text())["step"] == 3


def test_killed_between_the_last_step_and_the_final_model(tmp_path, start, monkeypatch):
    """It trains no further step, but leaves the model."""
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    flags = ["train", "--model", str(start), "--train-data", data, "--output-dir", str(out), "--max-steps", "2", *TINY]
    flags += ["--lr-scheduler-type", "constant", "--learning-rate", "1e-2"]

    def killed(self, *args, **kwargs):
        if kwargs.get("_internal_call"):
            return save(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        save = command.MTPTrainer.save_model
        patch.setattr(command.MTPTrainer, "save_model", killed)
        assert main(flags) == 130
    assert not (out / "model.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(command.MTPTrainer, "training_step", lambda *args: pytest.fail("a step"))
        assert main(flags) == 0
    whole = tmp_path / "whole"
    assert main([*flags, "--output-dir", str(whole)]) == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, whole))
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters()))


def test_other_data_or_model_are_refused_before_weights_are_loaded(tmp_path, start, capsys, monkeypatch):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    flags = ["train", "--model", str(start), "--train-data", data, "--output-dir", str(out), *TINY, "--save-steps", "1"]
    assert main([*flags, "--max-steps", "1"]) == 0
    (start / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\0")
    write(tmp_path / "rows.jsonl", [*ROWS[:-1], ROWS[0]])
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_student", lambda *args: pytest.fail("loaded"))
        assert main([*flags, "--max-steps", "2", "--separator", " "]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "model was 'start (" in said
    assert "train_data was ['rows.jsonl (" in said
    assert "--allow-changes model train_data separator" in said
    # The rows as they are encoded are another matter that it names.
    allowed = ["--allow-changes", "model", "train_data", "separator"]
    assert main([*flags, "--max-steps", "2", "--separator", " ", *allowed]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "--allow-changes train_dataset" in said
    assert main([*flags, "--max-steps", "2", "--separator", " ", *allowed, "train_dataset"]) == 0
    changes = json.loads((out / "run.json").read_text())["changes"]
    assert [sorted(change) for change in changes] == [["model", "separator", "step", "train_data", "train_dataset"]]


def test_a_damaged_checkpoint_is_no_reason_to_start_anew(tmp_path, start, capsys):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    flags = ["train", "--model", str(start), "--train-data", data, "--output-dir", str(out), *TINY, "--save-steps", "1"]
    flags += ["--lr-scheduler-type", "constant"]
    assert main([*flags, "--max-steps", "2"]) == 0
    for step in (2, 1):
        file = out / f"checkpoint-{step}" / "optimizer.pt"
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
        assert main([*flags, "--max-steps", "3"]) == (0 if step == 2 else 2)
        said = capsys.readouterr().err
        if step == 2:
            assert "checkpoint-2 changed since it was written and is passed over" in said
            assert f"going on from {out / 'checkpoint-1'}" in said
            for later in (2, 3):
                (out / f"checkpoint-{later}" / "complete.json").unlink()
            (out / "run.json").unlink()
    assert "checkpoint-1 changed since it was written, and no whole checkpoint is left; bring it back" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k_max: [12]", r"k_max must be a whole number; got \[12\] \(list\): give one value without brackets"),
        ("k_max: '12'", "k_max must be a whole number; got '12' .*: leave the quotes out"),
        ("k_max: true", "k_max must be a whole number; got True"),
        ("k_max: 12.5", "k_max must be a whole number; got 12.5"),
        ("learning_rate: [1e-5]", "learning_rate must be a number; got"),
        ("learning_rate: fast", "learning_rate must be a number; got 'fast'"),
        ("learning_rate: true", "learning_rate must be a number; got True"),
        ("chat: 1", "chat must be true or false; got 1"),
        ("chat: maybe", "chat must be true or false; got 'maybe'"),
        ("model: 7", "model must be a text; got 7 .*: put a text in quotes"),
        ("model: [a]", "model must be a text; got"),
        ("train_split: 2024-01-01", "train_split must be a text; got datetime"),
        ("train_data: 7", "train_data must be a list, each a text; got 7"),
        ("train_data: [a.jsonl, 7]", "train_data must be a list, each a text; got"),
        ("train_data: [a.jsonl, null]", "train_data must be a list, each a text; got"),
        ("train_data: {a: b}", "train_data must be a list, each a text; got"),
        ("lr_scheduler_type: [linear]", "lr_scheduler_type must be a text; got"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs must be names and values or a text; got"),
        ("output_dir: {a: b}", "output_dir must be a text; got"),
    ],
)
def test_a_wrong_type_in_a_file(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        parse([str(tmp_path / "c.yaml"), "--model", "m", "--train-data", "d.jsonl", "--use-cpu"])


def test_a_configuration_that_is_no_utf_8_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes("model: Königsberg\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c.yaml: expected UTF-8 text"):
        parse([str(file)])
    file.write_text("model: m\ntrain_data: d.jsonl\nuse_cpu: true\n", encoding="utf-8-sig")
    assert parse([str(file)])[0].model == "m"


def test_right_types_in_a_file(tmp_path):
    text = "model: m\ntrain_data: a.jsonl\nuse_cpu: yes\nlearning_rate: 1e-5\nweight_decay: 1\nnum_spans: null\n"
    text += (
        "eval_strategy: no\nchat: off\nlr_scheduler_type: warmup_stable_decay\n"
        "lr_scheduler_kwargs: {num_decay_steps: 7}\nwarmup_steps: 5\nreport_to: none\n"
    )
    (tmp_path / "c.yaml").write_text(text)
    _, data, config = parse([str(tmp_path / "c.yaml")])
    assert (data.train_data, data.chat, config.use_cpu) == (["a.jsonl"], False, True)
    assert (config.learning_rate, config.weight_decay, config.eval_strategy) == (1e-5, 1.0, "no")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--train-data": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"--train-data": "rows.jsonl nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"--eval-data": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"--train-data": "columns.jsonl"}, "expected the columns of one format"),
        ({"--eval-data": "columns.jsonl"}, "expected the columns of one format"),
        ({"--train-data": "rows.jsonl late.jsonl"}, "late.jsonl, line 3: expected question and answer; answer missing"),
        ({"--train-data": "empty.jsonl"}, "no row is left to read"),
        ({"--train-data": "texts.jsonl own.jsonl"}, "got texts.jsonl of text, own.jsonl of generated: make them one"),
        ({"--train-data": "rows.jsonl", "--data-format": "text"}, "line 1: expected text; text missing"),
        ({"--group-field": "topic", "--eval-fraction": "0.5"}, "expected a string in column 'topic'"),
        ({"--only": "topic=a"}, "expected a string in column 'topic'"),
        ({"--train-data": "owner/absent"}, "owner/absent cannot be read: the hub is out of reach"),
        ({"--teacher": "./absent"}, "absent: there is no such file or folder"),
        ({"--teacher": "owner/absent"}, "owner/absent cannot be loaded: the hub is out of reach"),
        ({"--teacher": "hollow"}, "hollow: there are no weights in this folder"),
        ({"--model": "hollow"}, "hollow: there are no weights in this folder"),
        ({"--output-dir": "rows.jsonl/out"}, "rows.jsonl is a file"),
    ],
)
def test_what_is_missing_is_said_before_weights_are_loaded(
    tmp_path, start, capsys, monkeypatch, no_weights, change, says
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "columns.jsonl", [{"a": "b"}])
    write(tmp_path / "late.jsonl", [*ROWS[:2], {"question": "x"}])
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "texts.jsonl", [{"text": "x"}])
    write(tmp_path / "own.jsonl", [{"prompt": "x", "text": "y", "tokens": [1], "blocks": [1]}])
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text((start / "config.json").read_text())

    def unreachable(*args, **kwargs):
        raise ConnectionError("the hub is\nout of reach")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    of_config = checks.AutoConfig.from_pretrained

    class Config:
        @staticmethod
        def from_pretrained(name, **options):
            return unreachable() if name == "owner/absent" else of_config(name, **options)

    monkeypatch.setattr(checks, "AutoConfig", Config)
    given = {"--model": "start", "--train-data": "rows.jsonl", "--output-dir": "out"} | change
    flags = [word for name, value in given.items() for word in (name, *value.split())]
    assert main(["train", *flags, *TINY, "--max-steps", "1"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_configuration_says_what_must_exist_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "arithmetic", "--output-dir", "out"]) == 2
    said = capsys.readouterr().err
    assert "runs/problems/train.jsonl: there is no such file" in said
    *_, teacher, data = said.splitlines()
    assert (teacher.split()[2], data.split()[2:4]) == (
        "mtpkern.train.checkpoint",
        ["mtpkern.train.arithmetic", "--write"],
    )
    # Where the problems are there, the teacher is missed.
    arithmetic.main(["--write", "runs/problems", "--problems", "2", "--held-out", "1"])
    assert main(["train", "arithmetic", "--output-dir", "out"]) == 2
    said = capsys.readouterr().err
    assert "runs/checkpoint/teacher" in said
    assert said.endswith(f"{teacher}\n{data}\n")
    assert main(["train", "gsm8k", "--train-data", "nowhere.jsonl"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path, start, capsys, monkeypatch, no_weights):
    def taken(*args):
        raise BlockingIOError

    monkeypatch.setattr("fcntl.lockf", taken)
    flags = ["--model", str(start), "--train-data", write(tmp_path / "rows.jsonl", ROWS), "--max-steps", "1", *TINY]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "out")]) == 2
    assert "another run writes there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "published", slow_but(["Llama-3.1-Instruct", "Qwen2.5-7B-Instruct", "gemma-3-it"], "Qwen2.5-7B-Instruct")
)
def test_a_model_that_samples_by_its_file_is_trained_evaluated_and_decoded(tmp_path, served, capsys, published):
    """As instruct models are published; what the call does not ask for, decoding does not do."""
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    flags = ["--model", str(served(published)), "--train-data", data, "--eval-data", data, "--decode-rows", "2"]
    flags += ["--decode-tokens", "4", "--output-dir", str(out), *TINY, "--num-spans", "1", "--max-steps", "1"]
    flags += ["--eval-strategy", "steps", "--eval-steps", "1", "--warmup-steps", "0"]
    assert main(["train", "gsm8k", *flags]) == 0
    summary = (out / "summary.md").read_text()
    assert "tokens_per_pass" in summary
    assert "nan" not in summary
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out).eval()
    inputs = tokenizer("How many", return_tensors="pt")
    ours = mtpkern.generate(model, **inputs, max_new_tokens=6)
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "How many", "--max-new-tokens", "6"]) == 0
    assert ours.shape[1] > inputs.input_ids.shape[1]
