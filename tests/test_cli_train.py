"""`mtpkern train`: flags, files and mistakes, and what stands in the folder of a run."""

import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from mtpkern.cli import main
from mtpkern.grading import is_right
from mtpkern.train.command import load_student, load_teacher
from mtpkern.train.config import MTPConfig
from mtpkern.train.options import help_text, parse
from support.recipes import GSM8K, METAMATH, TINY
from support.rows import write


def test_flags_win_over_a_file(tmp_path):
    values = {
        "model": "m",
        "train_data": ["a.jsonl", "b.jsonl"],
        "output_dir": "out",
        "use_cpu": True,
        "learning_rate": 3e-4,
        "chat": False,
        "num_spans": None,
        "lr_scheduler_type": "warmup_stable_decay",
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
        ("k_max: 4\nk_min: 2\nk_max: 5", [], "line 3: k_max given twice, before in line 1"),
        ("{k_max: 4, k_max: 5}", [], "k_max given twice"),
        ("separator: 3.0", [], "separator must be a text.*; got 3.0 .*put a text in quotes"),
        ("k_max: 3.0", [], "k_max must be a whole number.*; got 3.0 .*write 3"),
        ("k_max: 4", ["--train-data", "a.jsonl", "--train_data=b.jsonl"], "--train-data given more than once"),
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
        (["--optim-args", "a=b=c"], "optim_args must be names and values, as in a=1,b=2; got 'a=b=c'"),
        (["--logging-steps", "-1"], "logging_steps must be above 0; got -1"),
        (["--save-steps", "0"], "save_steps must be above 0; got 0"),
        (["--eval-steps", "-1"], "eval_steps must be above 0; got -1"),
        (["--eval-accumulation-steps", "0"], "eval_accumulation_steps must be at least 1; got 0"),
        (["--torch-compile-backend", "NOPE"], "torch_compile_backend must be one of None, eager, .*; got 'NOPE'"),
        (["--torch-compile-mode", "NOPE"], "torch_compile_mode must be one of None, default, .*; got 'NOPE'"),
        (["--lr-scheduler-kwargs", "{bad"], "lr_scheduler_kwargs must be names and values, .*; got '{bad'"),
        (["--lr-scheduler-kwargs", '{"nope": 1}'], "lr_scheduler_kwargs has nope, which linear does not know"),
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
        (["--per-device-eval-batch-size", "0"], "per_device_eval_batch_size must be at least 1"),
        (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps must be at least 1; got 0"),
        (["--gradient-accumulation-steps", "-1"], "gradient_accumulation_steps must be at least 1; got -1"),
        (["--learning-rate", "-1"], "learning_rate must be 0 or more; got -1"),
        (["--dataloader-num-workers", "-1"], "dataloader_num_workers must be 0 or more; got -1"),
        (["--max-grad-norm", "-1"], "max_grad_norm must be 0 or more; got -1"),
        (["--adam-beta1", "1.5"], "adam_beta1 must be from 0 to below 1; got 1.5"),
        (["--adam-beta2", "-0.1"], "adam_beta2 must be from 0 to below 1; got -0.1"),
        (["--adam-epsilon", "-1"], "adam_epsilon must be 0 or more; got -1"),
        (["--seed", "-1"], r"seed must be from 0 to below 2\*\*32; got -1"),
        (["--data-seed", str(2**70)], r"data_seed must be from 0 to below 2\*\*63; got 11805"),
        (["--optim-args", "a=1,b"], "optim_args must be names and values, as in a=1,b=2; got 'a=1,b'"),
        (["--prefix-memory", "inf", "--gated", "--lora-rank", "2"], "prefix_memory must be a finite number; got inf"),
        (["--k-max", "1000000"], "k_max must be at most 256"),
        (["--lora-rank", "4", "--lora-alpha", "0"], "lora_alpha must be above 0"),
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
    assert main(["train", *flags, "--k-max", "256"]) == 0
    said = capsys.readouterr().err
    longest = max(len(row["answer"].encode()) for row in GSM8K)
    found = re.search(rf"k_max is 256, and the longest of {len(GSM8K)} answers has (\d+) tokens", said)
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


@pytest.mark.parametrize(
    ("targets", "unknown"), [("nope", "'nope'"), ("q_proj,nope", "'nope'"), ("q_proj,", "''"), ("norm", "'norm'")]
)
def test_targets_that_no_layer_bears_are_told_before_weights(
    tmp_path, checkpoint, capsys, monkeypatch, targets, unknown
):
    model, rows = str(checkpoint("llama")), tmp_path / "rows.jsonl"
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    more = ["--gated"] if targets == "nope" else []
    words = ["--model", model, "--train-data", str(rows), "--output-dir", str(tmp_path / "out"), "--use-cpu"]
    assert main(["train", *words, "--lora-rank", "2", "--lora-targets", targets, *more]) == 2
    said = capsys.readouterr().err
    assert f"lora_targets must be names of linear layers, or all-linear; got {unknown}, and this model's are" in said
    assert "q_proj" in said.split("this model's are")[1]


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
    assert [path.name for path in out.iterdir()] == ["_lock"]
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
