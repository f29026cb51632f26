"""What cannot be decoded is not trained, attention drops nothing in training, and no run writes over its start."""

import json
import logging

import pytest
import torch

from mtpkern.cli import main
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.trainer import MTPTrainer

TEXT = {"input_ids": [1, 2, *range(10, 22), 7], "prompt_length": 3}
OPTIONS = {"k_max": 3, "num_spans": 2, "max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
FLAGS = ["--max-steps", "1", "--per-device-train-batch-size", "2", "--use-cpu", "--warmup-steps", "0", "--k-max", "3"]


def trainer(model, out, gated, **options):
    more = {"gated": True, "lora_rank": 2} if gated else {"teacher_target": "gt"}
    args = MTPConfig(str(out), **{**OPTIONS, **more, **options})
    kind, mask = (GatedTrainer, None) if gated else (MTPTrainer, 31)
    data = {"train_dataset": [TEXT] * 4, "data_collator": MTPCollator(0)}
    return kind(model=model, args=args, mask_token_id=mask, **data)


def untold(model):
    """Without the mask token that the tests' models record, with a stop token."""
    vars(model.config).pop("mtpkern", None)
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    return model


def bloom(tiny):
    return untold(tiny.model("bloom", vocab_size=41, hidden_size=32, n_layer=1, n_head=4, attention="eager"))


@pytest.mark.parametrize("gated", [False, True], ids=["full", "gated"])
def test_a_kind_that_cannot_be_decoded_is_refused_as_it_was(tiny, tmp_path, gated):
    model = bloom(tiny).train()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"cannot decode BloomForCausalLM: .*did not call the attention interface"):
        trainer(model, tmp_path / "out", gated)
    assert model.training
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("gated", [False, True], ids=["full", "gated"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("modernbert-decoder", {"bos_token_id": 1, "eos_token_id": 7}), ("phi", {"logit_scale": 0.5})],
)
def test_logits_that_training_would_read_otherwise_are_refused(tiny, tmp_path, gated, kind, settings):
    """A layer of its own before the head's weight; a factor in the configuration that its forward does not know."""
    model = untold(tiny.model(kind, vocab_size=41, num_hidden_layers=1, **settings))
    with pytest.raises(ValueError, match="makes its logits otherwise than training reads them"):
        trainer(model, tmp_path, gated)


@pytest.mark.parametrize("gated", [False, True], ids=["full", "gated"])
def test_a_window_of_0_is_none(tiny, tmp_path, gated):
    model = untold(tiny.model("qwen2_moe", vocab_size=41, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2))
    assert model.config.sliding_window == 0
    trainer(model, tmp_path, gated).train()


def test_the_command_refuses_it_before_the_data_are_read(tiny, tmp_path, bytes_of, capfd):
    tokenizer = bytes_of("qwen")
    folder, rows = tmp_path / "bloom", tmp_path / "rows.jsonl"
    untold(
        tiny.model("bloom", vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=4, attention="eager")
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": "yes and no"}) + "\n" for i in range(4)))
    flags = ["--model", str(folder), "--train-data", str(rows), "--output-dir", str(tmp_path / "out"), *FLAGS]
    for more in ([], ["--gated", "--lora-rank", "2"]):
        assert main(["train", *flags, *more]) == 2
        err = capfd.readouterr().err
        assert "cannot decode BloomForCausalLM" in err
        assert "Traceback" not in err
        assert "rows" not in err.replace(str(rows), "")


@pytest.mark.parametrize("gated", [False, True], ids=["full", "gated"])
@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4}, "attn_pdrop=0.1"),
        ("opt", {"ffn_dim": 48, "num_hidden_layers": 1, "word_embed_proj_dim": 32, "attention_dropout": 0.2},
         "attention_dropout=0.2"),
        ("llama", {"num_hidden_layers": 1, "attention_dropout": 0.3}, "attention_dropout=0.3"),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" not in x else "",
)  # fmt: skip
def test_attention_drops_nothing_which_is_said_once(tiny, tmp_path, caplog, gated, kind, settings, field):
    model = untold(tiny.model(kind, vocab_size=41, **settings))
    with caplog.at_level(logging.WARNING, "mtpkern.train.checks"):
        run = trainer(model, tmp_path, gated)
        run.train()
    said = [record.getMessage() for record in caplog.records if "drops nothing" in record.getMessage()]
    assert len(said) == 1
    assert field in said[0]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.parametrize("where", ["", "inner", "../start", "link"])
@pytest.mark.parametrize("of", ["--model", "--teacher", "--init-adapter"])
def test_a_run_does_not_write_over_what_it_reads(tmp_path, capfd, where, of):
    start = tmp_path / "start"
    start.mkdir()
    (tmp_path / "link").symlink_to(start)
    (tmp_path / "other").mkdir()
    out = tmp_path / "link" if where == "link" else start / where
    flags = ["--train-data", "rows.jsonl", "--output-dir", str(out), *FLAGS]
    if of != "--model":
        flags += ["--model", str(tmp_path / "other")]
    if of == "--init-adapter":
        flags += ["--gated", "--lora-rank", "2"]
    assert main(["train", *flags, of, str(start)]) == 2
    err = capfd.readouterr().err
    assert f"is, or lies in, {start}, which the run reads and would write over; take another output_dir" in err
    assert list(start.iterdir()) == []


@pytest.mark.parametrize("flags", [["--learning-rate", "nan"], ["--learning-rate", "inf"], ["--weight-decay", "nan"]])
def test_a_number_that_is_none_is_named(tmp_path, capfd, flags):
    common = ["--model", "m", "--train-data", "rows.jsonl", "--output-dir", str(tmp_path / "out"), *FLAGS]
    assert main(["train", *common, *flags]) == 2
    err = capfd.readouterr().err
    assert f"{flags[0][2:].replace('-', '_')} must be a finite number; got {flags[1]}" in err
    assert "Traceback" not in err


def test_adapters_that_were_trained_before_are_no_part_of_the_teacher(tiny, tmp_path, caplog):
    from peft import LoraConfig, get_peft_model

    options = {"lora_rank": 2, "teacher_target": "hard"}
    for taught in (False, True):
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=not taught)
        model = get_peft_model(untold(tiny.model("llama", vocab_size=41)), lora)
        trainer(model, tmp_path, False, **options)
        assert ("what they have learned is unlearned" in caplog.text) == taught
    caplog.clear()
    trainer(model.merge_and_unload(), tmp_path, True)
    assert not caplog.text


@pytest.mark.parametrize("gated", [False, True], ids=["lora", "gated"])
def test_who_teaches_drops_nothing(tiny, tmp_path, gated):
    """Adapters are taught by the model that carries them, in the midst of its training."""
    model = untold(tiny.model("gpt2", vocab_size=41, n_embd=32, n_layer=1, n_head=4))
    run = trainer(model, tmp_path, gated, lora_rank=2, teacher_target="hard")
    seen = set()
    model.transformer.drop.register_forward_hook(
        lambda dropout, args, output: seen.add((torch.is_grad_enabled(), dropout.training, output.equal(args[0])))
    )
    run.train()
    assert seen == {(True, True, False), (False, False, True)}
    assert model.transformer.drop.training


def with_lora(tiny, kind="qwen2", **options):
    from peft import LoraConfig, get_peft_model

    model = untold(tiny.model(kind, vocab_size=41))
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "embed_tokens"]}, {"trainable_token_indices": [3]}])
def test_an_embedding_that_is_adapted_may_be_of_a_kind_that_is_looked_at_first(tiny, tmp_path, options):
    """peft's wrappers of an embedding do not tell how many rows it has."""
    trainer(with_lora(tiny, "starcoder2", **options), tmp_path, False, lora_rank=2).train()


def test_a_head_that_is_trained_with_the_adapters_is_not_the_teachers(tiny, tmp_path, monkeypatch):
    from mtpkern.train.objective import Objective

    model, heads = with_lora(tiny, modules_to_save=["lm_head"]), []
    before, rows = model.get_base_model().lm_head.original_module.weight.detach().clone(), Objective.rows

    def seen(self, hidden, head, *, of_teacher=False):
        heads.append((of_teacher, head.weight.equal(before)))
        return rows(self, hidden, head, of_teacher=of_teacher)

    monkeypatch.setattr(Objective, "rows", seen)
    options = {"max_steps": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant", "teacher_target": "soft"}
    trainer(model, tmp_path, False, **options).train()
    assert heads == [(False, True), (True, True), (False, False), (True, True)]


@pytest.mark.parametrize(
    ("lora", "options", "says"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "changes the output head"),
        ({"bias": "all"}, {"teacher_target": "hard"}, "bias='all', which changes the base's own weights"),
        ({"init_lora_weights": "pissa"}, {"teacher_target": "soft"}, "='pissa', which changes the base's own weights"),
        ({}, {"lora_rank": 3}, "has rank 2, and lora_rank is 3; set lora_rank: 2"),
        ({}, {"lora_rank": 2, "lora_alpha": 3.0}, "leave lora_alpha and lora_targets out"),
        ({}, {"lora_rank": 2, "lora_targets": "k_proj"}, "leave lora_alpha and lora_targets out"),
    ],
)
def test_adapters_that_would_not_be_what_was_asked_for(tiny, tmp_path, lora, options, says):
    with pytest.raises(ValueError, match=says):
        trainer(with_lora(tiny, **lora), tmp_path, False, **options)


def test_what_would_learn_nothing_is_refused(tiny, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = with_lora(tiny)
    with pytest.raises(ValueError, match="nothing of the model requires a gradient"):
        trainer(model.requires_grad_(False), tmp_path, False)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="'default' puts virtual tokens before a text"):
        trainer(get_peft_model(untold(tiny.model("llama", vocab_size=41)), prompts), tmp_path, False)


def test_without_a_teacher_adapters_may_change_the_base(tiny, tmp_path):
    trainer(with_lora(tiny, bias="all"), tmp_path, False).train()


@pytest.mark.parametrize("gated", [False, True], ids=["full", "gated"])
def test_masks_behind_the_last_learned_position(tiny, tmp_path, gated):
    """They stand at it, as in decoding: what they predict lies behind every text that the model could read."""
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 4, "max_position_embeddings": len(TEXT["input_ids"])}
    model = untold(tiny.model("gpt2", vocab_size=41, **settings))
    run = trainer(model, tmp_path, gated, k_min=3)
    plans = [run.plan(run.data_collator([TEXT]), k=3, step=step, micro_step=0) for step in range(20)]
    assert {int(plan["layout"].position.max()) for plan in plans} == {model.config.n_positions - 1}
    run.train()
    longer = run.data_collator([{**TEXT, "input_ids": [1, *TEXT["input_ids"]]}])
    with pytest.raises(ValueError, match="a text has 16 tokens, the model 15 positions: set max_length to 15"):
        run.plan(longer, k=3, step=0, micro_step=0)


def test_data_of_which_no_batch_is_left(tiny, tmp_path):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 5, "per_device_eval_batch_size": 3}
    run = trainer(untold(tiny.model("llama", vocab_size=41)), tmp_path, False, **options)
    with pytest.raises(ValueError, match=r"leaves no batch of 4 texts: 5 make one.*per_device_train_batch_size"):
        run.train()
    run.train_dataset, run.eval_dataset = [TEXT] * 5, {"one": [TEXT] * 3, "other": [TEXT] * 2}
    run.train()  # which evaluates nothing
    run.args.eval_strategy = "steps"
    with pytest.raises(ValueError, match=r"leaves no batch of 2 texts: 3 make one.*per_device_eval_batch_size"):
        run.train()
