"""`mtpkern train`: configurations and flags, the shipped configurations on small files, launching, the checkpoint."""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import run as torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.cli import main
from mtpkern.grading import is_right
from mtpkern.train import arithmetic
from mtpkern.train import checkpoint as checkpoint_program
from mtpkern.train.checkpoint import K_MAX, NUM_SPANS, PREFIX_WEIGHT, common_arguments
from mtpkern.train.command import load_student, load_teacher
from mtpkern.train.config import MTPConfig
from mtpkern.train.options import help_text, parse, read_config, shipped_configs

# Rows as the data sets have them: their columns, their order, their kinds of values.
METAMATH = [
    {
        "type": f"{'GSM' if i % 2 else 'MATH'}_AnsAug",
        "query": f"Gracie has {i} marbles and buys 3 more. How many has she now?",
        "original_question": f"Gracie has {i // 3} marbles. How many has she?",
        "response": (
            f"Gracie starts with {i} marbles. She then buys 3 more of them.\nThen she has {i} + 3 = {i + 3}.\n"
            f"#### {i + 3}\nThe answer is: {i + 3}"
        ),
    }
    for i in range(60)
]
GSM8K = [
    {
        "question": f"Natalia sold {i} clips in April and half as many in May. How many in all?",
        "answer": f"She sold {i}/2 = <<{i}/2={i // 2}>>{i // 2} in May.\nIn all {i + i // 2}.\n#### {i + i // 2}",
    }
    for i in range(2, 26, 2)
]
MAGPIE = [
    {
        "uuid": f"0d1e-{i}",
        "model": "meta-llama/Meta-Llama-3-70B-Instruct",
        "gen_input_configs": {"temperature": 1.1, "top_p": 1.0, "input_generator": "x", "seed": None},
        "conversations": [
            {"from": "human", "value": f"Name {i} colours."},
            {"from": "gpt", "value": "Red, green and blue."},
            {"from": "human", "value": "And another?"},
            {"from": "gpt", "value": "Yellow."},
        ],
    }
    for i in range(30)
]
TINY = ["--max-steps", "1", "--per-device-train-batch-size", "2", "--use-cpu", "--warmup-steps", "0"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def checkpoint(tmp_path, tiny, bytes_of):
    """`checkpoint("llama")`: a folder with a tiny random model that has never heard of a mask token."""

    def make(kind, name="start", **settings):
        folder = tmp_path / name
        tokenizer = bytes_of(kind)
        # As Qwen3's, that embedding has rows to spare.
        rows = len(tokenizer) + (40 if kind == "qwen" else 0)
        model = tiny.model("llama" if kind == "llama" else "qwen3", vocab_size=rows, **settings)
        del model.config.mtpkern
        model.config.max_position_embeddings = 2048
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("name", "kind", "rows", "says"),
    [
        ("metamath-llama", "llama", METAMATH, " of them cut)"),
        ("metamath-qwen3", "qwen", METAMATH, " of them cut)"),
        ("magpie", "llama", MAGPIE, " in the other split"),
        ("gsm8k", "qwen", GSM8K, "12 used"),
    ],
)
def test_a_shipped_configuration_trains_and_saves_a_plain_checkpoint(
    tmp_path, checkpoint, capsys, name, kind, rows, says
):
    data = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    start = checkpoint(kind)
    flags = ["--model", start, "--train-data", data, "--output-dir", str(out), *TINY]
    flags += ["--decode-rows", "3", "--decode-tokens", "6"]
    # A share of 1 % of so few groups would be none.
    flags += ["--eval-data", data] if name == "gsm8k" else ["--eval-fraction", "0.2"]
    assert main(["train", name, *flags]) == 0
    report = capsys.readouterr().err
    assert f"training: {data}: {len(rows)} rows read; " in report
    assert f"held out: {data}: {len(rows)} rows read; " in report
    assert says in report
    summary = (out / "summary.md").read_text()
    assert "tokens_per_pass" in summary
    # The paper's decode as its authors do, at all that the model was trained for, beside one token a pass.
    assert ("| confadapt_0.9 |" in summary and "| static_1 |" in summary) == (name != "gsm8k")

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    config = json.loads((out / "config.json").read_text())
    mask = tokenizer.convert_tokens_to_ids("<|mtp|>")
    assert {"mask_token_id": mask, "k_max": 16}.items() <= config["mtpkern"].items()
    assert config["use_cache"]
    before = AutoModelForCausalLM.from_pretrained(start)
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    inputs = tokenizer("Natalia", return_tensors="pt")
    ours = mtpkern.generate(model, **inputs, max_new_tokens=8)
    theirs = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert ours.tolist() == theirs.tolist()


def test_shipped_configurations_are_the_papers():
    assert shipped_configs() == ["arithmetic", "gsm8k", "magpie", "metamath-llama", "metamath-qwen3", "smollm2"]
    for name in shipped_configs():
        parse([name, "--output-dir", "out", "--use-cpu"])
    paper = {
        "layout": "paper",
        "max_length": 160,
        "k_min": 2,
        "k_max": 16,
        # As the authors' runs drew them.
        "k_scope": "rank",
        "offset_scope": "rank",
        "teacher_target": "hard",
        "max_steps": 100_000,
        "warmup_steps": 2000,
        "lr_scheduler_type": "constant_with_warmup",
        "group_field": "original_question",
    }
    llama, qwen = read_config("metamath-llama"), read_config("metamath-qwen3")
    assert paper.items() <= llama.items()
    assert {key: value for key, value in qwen.items() if llama.get(key) != value} == {
        "model": "Qwen/Qwen3-4B-Instruct-2507",
        "chat": False,
        "separator": "\n\n",
    }
    _, _, config = parse(["metamath-llama", "--output-dir", "out", "--use-cpu"])
    assert (config.learning_rate, config.weight_decay, config.adam_beta2, config.max_grad_norm) == (
        1e-5,
        0.01,
        0.999,
        1,
    )
    # On four GPUs.
    assert 4 * config.per_device_train_batch_size * config.gradient_accumulation_steps == 128
    magpie = read_config("magpie")
    assert (magpie["max_length"], 4 * magpie["per_device_train_batch_size"]) == (1024, 16)
    assert magpie["train_data"] == ["Magpie-Align/Magpie-Pro-MT-300K-v0.1", "Magpie-Align/Magpie-Reasoning-V1-150K"]
    assert {key: magpie[key] for key in ("k_scope", "offset_scope")} == {"k_scope": "rank", "offset_scope": "rank"}
    # What the configurations' comments offer besides: the authors' optimizer and precision, and the ablations.
    offered = "--adam-beta2 0.95 --weight-decay 0.1 --bf16 false --pure-bf16 --prefix-weight 1 --prefix-scope all"
    for name in ("metamath-llama", "metamath-qwen3", "magpie"):
        with pytest.warns(UserWarning, match="1e-5 .* never moved"):
            _, _, config = parse([name, "--output-dir", "out", "--use-cpu", *offered.split()])
        assert (config.adam_beta2, config.weight_decay, config.student_dtype) == (0.95, 0.1, "bfloat16")
        parse([name, "--output-dir", "out", "--use-cpu", "--bidirectional", "--decode-rows", "0"])


def test_the_arithmetic_configuration_is_the_checkpoints_recipe(tmp_path, tiny, capsys):
    values = read_config("arithmetic")
    recipe = common_arguments(tmp_path, "warmup", 2e-3)
    changed = {name for name in {*recipe} & {*values} if values[name] != recipe[name]}
    # It has 2,000 steps instead of 2,400 and 300.
    assert changed == {"max_steps", "lr_scheduler_kwargs"}
    assert (values["k_max"], values["num_spans"], values["prefix_weight"]) == (K_MAX, NUM_SPANS, PREFIX_WEIGHT)

    tokenizer = arithmetic.build_tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    del model.config.mtpkern
    model.config.max_position_embeddings = 512
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    arithmetic.main(["--write", str(tmp_path / "rows"), "--problems", "40", "--held-out", "4"])
    flags = ["--model", str(tmp_path / "teacher"), "--train-data", str(tmp_path / "rows" / "train.jsonl")]
    flags += ["--eval-data", str(tmp_path / "rows" / "validation.jsonl"), "--output-dir", str(tmp_path / "out")]
    flags += ["--max-steps", "3", "--gt-warmup-steps", "2", "--eval-steps", "3", "--warmup-steps", "1"]
    flags += ["--lr-scheduler-kwargs", '{"num_decay_steps": 1}', "--decode-rows", "2", "--decode-tokens", "4"]
    flags += ["--per-device-train-batch-size", "4"]
    assert main(["train", "arithmetic", *flags]) == 0
    assert "40 rows read; 40 used" in capsys.readouterr().err
    assert "accuracy | tokens_per_pass" in (tmp_path / "out" / "summary.md").read_text()


def test_the_shipped_model_is_written_over_only_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(checkpoint_program, "publish", lambda work, out: written.append(out))
    for part in ("train_teacher", "train_mtp"):
        monkeypatch.setattr(checkpoint_program, part, lambda *args: None)
    checkpoint_program.main(["--work", str(tmp_path), "--threads", str(torch.get_num_threads())])
    checkpoint_program.main(["--work", str(tmp_path), "--out", "there", "--threads", str(torch.get_num_threads())])
    assert written == [tmp_path / "shipped", Path("there")]
    assert f"the model is in {tmp_path / 'shipped'}" in capsys.readouterr().out


def test_flags_win_over_a_file(tmp_path):
    values = {
        "model": "m",
        "train_data": ["a.jsonl", "b.jsonl"],
        "output_dir": "out",
        "use_cpu": True,
        "learning_rate": 3e-4,
        "chat": False,
        "num_spans": None,
        "lr_scheduler_kwargs": {"num_decay_steps": 7},
        "fsdp": True,
        "report_to": ["none"],
    }
    (tmp_path / "c.json").write_text(json.dumps(values))
    # What YAML 1.1 reads as a string.
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if key != "learning_rate"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "learning_rate: 3e-4"]))
    for name in ("c.json", "c.yaml"):
        model, data, config = parse([str(tmp_path / name), "--k-max", "5", "--chat", "true"])
        assert (model.model, data.train_data, data.chat) == ("m", ["a.jsonl", "b.jsonl"], True)
        assert (config.learning_rate, config.k_max, config.num_spans) == (3e-4, 5, None)
        assert config.lr_scheduler_kwargs == {"num_decay_steps": 7}
        assert config.fsdp is True
        assert config.report_to == []
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "fsdp: false"]).replace("fsdp: true", ""))
    assert not parse([str(tmp_path / "c.yaml")])[2].fsdp


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("lerning_rate: 1", [], r"unknown option 'lerning_rate' \(did you mean 'learning_rate'\?\)"),
        ("k_max: 4\nk_max: 5", [], "k_max given twice"),
        ("- k_max", [], "expected names and values; got list"),
        ("k_max: [", [], "c.yaml: while parsing"),
        (
            "k_max: 4",
            ["--model", "m", "--train-data", "d.jsonl", "--k-max", "many"],
            "k-max: invalid int value: 'many'",
        ),
        ("k_max: 4", [], "missing: --model"),
        ("k_max: 4", ["--kmax", "5"], r"unknown option 'kmax' \(did you mean 'k_max'\?\)"),
        ("k_max: 4", ["--learning", "5"], r"unknown option 'learning' \(did you mean"),
        (
            "k_max: 4",
            ["--model", "m", "second.yaml", "--train-data", "d.jsonl"],
            "unexpected 'second.yaml'; expected one CONFIG",
        ),
        ("streaming: true", ["--model", "m", "--train-data", "d.jsonl", "--use-cpu"], "set max_steps"),
    ],
)
def test_mistakes_in_a_configuration(tmp_path, text, flags, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        parse([str(tmp_path / "c.yaml"), *flags])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--streaming", "--max-steps", "9", "--train-sampling-strategy", "group_by_length"], "group_by_length"),
        (["--decode-rows", "3"], "decode_rows needs held-out rows"),
        (["--eval-strategy", "steps", "--eval-steps", "3"], "eval_strategy needs held-out rows"),
        (["--eval-fraction", "0.1", "--decode-rows", "3", "--bidirectional"], "cannot decode a bidirectional"),
        (["--lora-rank", "2", "--teacher", "t"], "with LoRA the teacher is the student"),
        (["--lora-rank", "2", "--teacher-dtype", "bfloat16"], "teacher_dtype is of a second model"),
        (["--teacher-target", "gt", "--teacher", "t"], "asks no teacher"),
        (["--teacher-target", "gt", "--teacher-dtype", "bfloat16"], "needs none: leave teacher_dtype out"),
        (["--lora-alpha", "8"], "lora_alpha needs lora_rank > 0"),
        (["--lora-targets", "q_proj"], "lora_targets needs lora_rank > 0"),
        (["--max-length", "1"], "max_length must be at least 2, for two tokens; got 1"),
        (
            ["--max-length", "30", "--layout", "paper", "--num-spans", "2"],
            "at least 32, for two tokens and all 30 masks",
        ),
        (["--decode-rows", "-1"], "decode_rows must be at least 0"),
        (["--decode-strategies", "static:1", "confadapt:2:3"], "decode_strategies: .* got 'confadapt:2:3'"),
        (["--answer-rule", "gsm8k"], "answer_rule must be one of auto, hashes, answer-is, last-number, exact"),
        (["--max-steps", "0"], "nothing would be trained"),
        (["--num-train-epochs", "0"], "nothing would be trained"),
        (["--per-device-train-batch-size", "0"], "per_device_train_batch_size must be at least 1"),
        (["--report-to", "foo", "bar"], "report_to names bar, foo, which is not installed or unknown"),
        (["--lr-scheduler-kwargs", "3"], "lr_scheduler_kwargs must be names and values"),
        (["--output-dir", __file__], "output_dir must be a folder"),
    ],
)
def test_options_that_contradict_one_another(flags, says):
    """Before anything is loaded: the model does not exist."""
    with pytest.raises(ValueError, match=says):
        parse(["--model", "m", "--train-data", "d.jsonl", "--output-dir", "out", "--use-cpu", *flags])


def test_a_share_that_holds_nothing_out_says_so(tmp_path, checkpoint, capsys):
    """1 % of the few groups of a small file, as metamath-llama asks."""
    flags = ["--model", checkpoint("llama"), "--train-data", write(tmp_path / "rows.jsonl", METAMATH[:3])]
    assert main(["train", "metamath-llama", *flags, "--bf16", "false", "--output-dir", str(tmp_path / "o"), *TINY]) == 2
    assert "eval_fraction 0.01 may hold out none of few groups: raise it" in capsys.readouterr().err


def test_an_anchor_needs_a_teacher_whatever_the_target(tmp_path, checkpoint):
    data, start = write(tmp_path / "rows.jsonl", GSM8K), checkpoint("llama")
    common = ["--model", start, "--train-data", data, "--teacher-target", "gt", "--k-max", "3", *TINY]
    common += ["--learning-rate", "1e-2", "--teacher", start]
    saved = []
    for weight in ("0.5", "5"):
        out = tmp_path / weight
        assert main(["train", *common, "--anchor-kl-weight", weight, "--max-steps", "3", "--output-dir", str(out)]) == 0
        saved.append(AutoModelForCausalLM.from_pretrained(out))
    assert not all(torch.equal(x, y) for x, y in zip(*(model.parameters() for model in saved)))


def test_an_unknown_configuration(capsys):
    assert main(["train", "metamath"]) == 2
    assert "those are arithmetic, gsm8k, magpie, metamath-llama, metamath-qwen3" in capsys.readouterr().err


def test_help_is_short_and_help_all_is_whole(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--k-max" in shown
    assert "--learning-rate" in shown
    assert "--ddp-bucket-cap-mb" not in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert "--ddp-bucket-cap-mb" in help_text(everything=True)
    assert main(["train"]) == 0


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path, checkpoint, capsys):
    data, start = write(tmp_path / "rows.jsonl", GSM8K), checkpoint("llama")
    common = ["--model", start, "--train-data", data, "--use-cpu", "--save-steps", "2", "--streaming", "--k-max", "3"]
    common += ["--learning-rate", "1e-2", "--num-spans", "2", "--lr-scheduler-type", "constant"]
    assert main(["train", *common, "--output-dir", str(tmp_path / "whole"), "--max-steps", "4"]) == 0
    for steps in ("2", "4"):
        assert main(["train", *common, "--output-dir", str(tmp_path / "half"), "--max-steps", steps]) == 0
    state = json.loads((tmp_path / "half" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    whole, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "half"))
    for x, y in zip(whole.parameters(), half.parameters()):
        assert torch.equal(x, y)


def test_nothing_is_pinned_where_there_is_no_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = MTPConfig(str(tmp_path))
    assert not config.dataloader_pin_memory
    assert not config.accelerator_config.non_blocking


def test_a_k_that_no_answer_has_room_for_is_said(tmp_path, checkpoint, capsys):
    flags = ["--model", checkpoint("llama"), "--train-data", write(tmp_path / "rows.jsonl", GSM8K)]
    flags += ["--output-dir", str(tmp_path / "out"), *TINY, "--num-spans", "1"]
    assert main(["train", *flags, "--k-max", "500"]) == 0
    said = capsys.readouterr().err
    longest = max(len(row["answer"].encode()) for row in GSM8K)
    found = re.search(rf"k_max is 500, and the longest of {len(GSM8K)} answers has (\d+) tokens", said)
    assert int(found[1]) == longest + 1  # its EOS
    assert main(["train", *flags, "--k-max", "3", "--output-dir", str(tmp_path / "other")]) == 0
    assert "k_max is" not in capsys.readouterr().err


def test_a_mask_token_that_is_recorded_is_kept(tmp_path, checkpoint):
    folder = checkpoint("llama")
    model, tokenizer = load_student(folder, torch.float32)
    model.config.mtpkern = {**model.config.mtpkern, "mask_token_id": 9}
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load_student(str(tmp_path / "again"), torch.float32)
    assert again.config.mtpkern["mask_token_id"] == 9
    for x, y in zip(model.parameters(), again.parameters()):
        assert torch.equal(x, y)


def test_the_tokenizers_eos_is_a_stop_token(tmp_path, checkpoint):
    folder = checkpoint("llama")
    path = tmp_path / "start" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 3}))
    model, tokenizer = load_student(folder, torch.float32)
    assert model.generation_config.eos_token_id == [3, tokenizer.eos_token_id]


def test_models_that_do_not_fit(tmp_path, checkpoint, bytes_of, capsys):
    start, other = checkpoint("llama"), checkpoint("qwen", "other")
    _, tokenizer = load_student(start, torch.float32)
    with pytest.raises(ValueError, match=r"must share a vocabulary; .* tokens differ, such as"):
        load_teacher(other, start, tokenizer, torch.float32)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(9)])
    tokenizer.save_pretrained(start)
    with pytest.raises(ValueError, match="the model only 262 rows"):
        load_student(start, torch.float32)
    tokenizer = bytes_of("llama")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(start)
    data = write(tmp_path / "rows.jsonl", GSM8K)
    flags = ["--model", start, "--train-data", data, "--output-dir", str(tmp_path / "out"), *TINY]
    assert main(["train", *flags]) == 2
    assert "no EOS token" in capsys.readouterr().err
    bytes_of("llama").save_pretrained(start)
    write(tmp_path / "rows.jsonl", [*GSM8K, {"question": "x"}])
    assert main(["train", *flags]) == 2
    assert capsys.readouterr().err.endswith(
        f"mtpkern train: {data}, line 13: expected question and answer; answer missing; "
        "mend the row or set bad_rows: skip\n"
    )


def test_what_goes_wrong_while_training_is_one_sentence(tmp_path, checkpoint, capsys):
    data, start, out = write(tmp_path / "rows.jsonl", GSM8K), checkpoint("llama"), tmp_path / "out"
    common = ["--model", start, "--k-max", "3", "--num-spans", "1", *TINY, "--output-dir", str(out)]

    def fails(*flags):
        assert main(["train", *common, *flags]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.splitlines()[-1]

    said = fails("--train-data", data, "--learning-rate", "1e39")
    assert said.startswith("mtpkern train: the weights or loss of step 1 is not finite")
    assert [path.name for path in out.iterdir()] == [".lock"]
    mixed = write(tmp_path / "mixed.jsonl", [*GSM8K, {"question": "x"}])
    for workers in ("0", "1"):
        flags = ["--streaming", "--shuffle-buffer", "2", "--max-steps", "30", "--dataloader-num-workers", workers]
        said = fails("--train-data", mixed, *flags)
        assert said.startswith(f"mtpkern train: {mixed}, line 13: expected question and answer; answer missing")
    (out / "half").mkdir()
    assert "is no checkpoint" in fails("--train-data", data, "--resume-from-checkpoint", str(out / "half"))
    assert "no complete checkpoint" in fails("--train-data", data, "--resume-from-checkpoint", "true")
    assert "no such file or folder" in fails("--train-data", data, "--model", "./nowhere")
    assert "no such file or folder" in fails("--train-data", data, "--teacher", "./nowhere")
    assert "config.json is missing" in fails("--train-data", data, "--model", str(out / "half"))
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1" / "complete.json").write_text("{}")
    assert "checkpoint-1 is there" in fails("--train-data", data, "--resume-from-checkpoint", "false")


def test_a_run_without_evaluations_is_evaluated_at_its_end(tmp_path, checkpoint):
    data, start, out = write(tmp_path / "rows.jsonl", GSM8K), checkpoint("llama"), tmp_path / "out"
    flags = ["--train-data", data, "--eval-data", data, "--decode-rows", "2", "--decode-tokens", "3"]
    flags += ["--report-to", "tensorboard", "--logging-steps", "1"]
    assert main(["train", "--model", start, *flags, "--output-dir", str(out), *TINY]) == 0
    assert "accuracy | tokens_per_pass" in (out / "summary.md").read_text()
    curves = EventAccumulator(str(next(out.glob("runs/*"))))
    curves.Reload()
    assert {"train/agreeing_prefix", "eval/agreeing_prefix", "eval/tokens_per_pass"} <= {*curves.Tags()["scalars"]}


def test_answers_are_judged_by_a_rule(tmp_path, checkpoint, capsys, monkeypatch):
    """MetaMathQA's MATH half ends in LaTeX: counted by what each row's own answer holds, or by one rule for all."""
    ends = ["#### 3\nThe answer is: 3", "The answer is: \\frac{1}{2}", "4 apples"]
    rows = [{"query": f"What is {i}?", "response": f"It is {end}"} for i, end in enumerate(ends)]
    data, start, out = write(tmp_path / "rows.jsonl", rows), checkpoint("llama"), tmp_path / "out"
    said = iter(["#### 3", "The answer is: $\\dfrac12$.", "It is 4 apples"])

    def said_instead(answer, expected, rule):
        return is_right(next(said), expected, rule)

    monkeypatch.setattr("mtpkern.train.command.is_right", said_instead)
    monkeypatch.setattr("mtpkern.train.evaluate.HeldOut.try_out", lambda *args: None)
    flags = ["train", "--model", start, "--train-data", data, "--eval-data", data, "--decode-rows", "9", *TINY]
    flags += ["--decode-tokens", "2", "--decode-strategies", "static:1", "--output-dir", str(out), "--no-chat"]
    assert main(flags) == 0
    assert "100.0%" in capsys.readouterr().out
    assert main([*flags, "--output-dir", str(tmp_path / "other"), "--answer-rule", "hashes"]) == 2
    assert "answer_rule hashes finds nothing to compare with in 2 of 3" in capsys.readouterr().err


def trained(out):
    assert (out / "model.safetensors").is_file()
    assert "mask_token_id" in json.loads((out / "config.json").read_text())["mtpkern"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_launched_by_torchrun(tmp_path, checkpoint, monkeypatch):
    """Two processes by its launcher, with its environment: forks, which need not import everything again."""
    data, out = write(tmp_path / "rows.jsonl", GSM8K), tmp_path / "out"
    options = ["gsm8k", "--model", checkpoint("qwen"), "--train-data", data, "--eval-data", data]
    options += ["--output-dir", str(out), *TINY]
    elastic_launch = torchrun.elastic_launch

    def main(module, *arguments):
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state()
        PartialState._reset_state()
        # Asks for a pool of threads that a fork has not where its parent had one.
        torch.set_num_threads = lambda n: None
        sys.argv = [module, *arguments]
        with (tmp_path / f"said by {os.environ['RANK']}").open("w") as said, contextlib.redirect_stderr(said):
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as end:
                assert end.code == 0  # noqa: PT017

    def in_forks(config, entrypoint):
        def launch(*words):
            assert [entrypoint, *words] == [sys.executable, "-u", "-m", "mtpkern.train", *options]
            return elastic_launch(dataclasses.replace(config, start_method="fork"), main)(*words[2:])

        return launch

    monkeypatch.setattr(torchrun, "elastic_launch", in_forks)
    torchrun.main(["--standalone", "--nproc-per-node", "2", "-m", "mtpkern.train", *options])
    said = [(tmp_path / f"said by {rank}").read_text() for rank in range(2)]
    # Once for training and once for evaluation, and not by everybody.
    assert [text.count(f"{data}: 12 rows read") for text in said] == [2, 0]
    trained(out)


def test_launched_by_accelerate(tmp_path, checkpoint, capsys, monkeypatch):
    """What its launcher makes of the command line, run in this process: its environment, its module, its arguments."""
    data, out = write(tmp_path / "rows.jsonl", GSM8K), tmp_path / "out"
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "-m", "mtpkern.train", "gsm8k"]
    options += ["--model", checkpoint("qwen"), "--train-data", data, "--eval-data", data, "--output-dir", str(out)]
    args = launch.launch_command_parser().parse_args([*options, *TINY])
    args, *_ = launch._validate_launch_command(args)
    (python, m, module, *arguments), environment = launch.prepare_simple_launcher_cmd_env(args)
    assert (python, m, module) == (sys.executable, "-m", "mtpkern.train")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().err.count(f"{data}: 12 rows read") == 2
    trained(out)
