"""The configurations that are shipped: they train, and are the papers'."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.cli import main
from mtpkern.train import arithmetic
from mtpkern.train import checkpoint as checkpoint_program
from mtpkern.train.checkpoint import K_MAX, NUM_SPANS, PREFIX_WEIGHT, common_arguments
from mtpkern.train.options import parse, read_config, shipped_configs
from support.recipes import GSM8K, METAMATH, TINY
from support.rows import write

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


@pytest.mark.parametrize(
    ("name", "kind", "rows", "says"),
    [
        ("metamath-llama", "llama", METAMATH, " of them cut)"),
        pytest.param("metamath-qwen3", "qwen", METAMATH, " of them cut)", marks=pytest.mark.slow),
        ("magpie", "llama", MAGPIE, " in the other split"),
        pytest.param("gsm8k", "qwen", GSM8K, "12 used", marks=pytest.mark.slow),
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


def test_each_phase_of_the_shipped_model_begins_with_the_one_before(tmp_path, monkeypatch):
    """Warm-ups and distillations in turns, each on problems of its own; the last one is what is shipped."""
    made = []
    monkeypatch.setattr(checkpoint_program, "publish", lambda work, out: None)
    monkeypatch.setattr(checkpoint_program, "train_teacher", lambda *args: None)
    monkeypatch.setattr(checkpoint_program, "train_mtp", lambda work, *phase: made.append(phase[:3]))
    checkpoint_program.main(["--work", str(tmp_path), "--threads", str(torch.get_num_threads())])
    assert made == [
        ("warmup", "teacher", "gt"),
        ("distill", "warmup", "hard"),
        ("warmup2", "distill", "gt"),
        ("distill2", "warmup2", "hard"),
        ("warmup3", "distill2", "gt"),
        ("distill3", "warmup3", "hard"),
    ]
    assert [checkpoint_program.data_seed(phase) for phase, *_ in made] == [1, 2, 3, 4, 5, 6]
