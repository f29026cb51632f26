"""GatedTrainer: learns, resumes to the bit, writes adapter folders, and refuses what gating cannot honour."""

import json

import peft
import pytest
import torch

import mtpkern
from mtpkern.adapter import gate_of, save_adapter
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.trainer import MTPTrainer

EOS = 7


def base(tiny):
    model = tiny.model("llama", vocab_size=41, eos_token_id=EOS)
    del model.config.mtpkern
    return model


def data(n=24):
    """Counting texts, the same three again and again."""
    texts = [[1, 2, *range(10 + 5 * (i % 3), 22 + 5 * (i % 3)), EOS] for i in range(n)]
    return [{"input_ids": ids, "prompt_length": 3} for ids in texts]


def trainer(tiny, out, model=None, **change):
    options = {
        "gated": True,
        "lora_rank": 4,
        "k_max": 4,
        "num_spans": 4,
        "spacing": "random",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 3,
        "save_steps": 3,
        "use_cpu": True,
        "report_to": "none",
    }
    args = MTPConfig(str(out), **{**options, **change})
    return GatedTrainer(model=model or base(tiny), args=args, train_dataset=data(), data_collator=MTPCollator(0))


def trained(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_learns_and_leaves_the_base_as_it_was(tiny, tmp_path):
    model = base(tiny)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    run = trainer(tiny, tmp_path, model, max_steps=60, logging_steps=20, save_strategy="no")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    after = {name.replace("base_layer.", ""): x for name, x in model.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


def test_resumes_to_the_bit_and_keeping_prefixes_changes_none(tiny, tmp_path):
    """The whole run keeps nothing, the resumed one more than the one that it goes on from."""
    options = {"teacher_target": "hard", "gt_warmup_steps": 1, "max_steps": 4, "save_steps": 2}
    whole = trainer(tiny, tmp_path / "whole", **options)
    whole.train()
    assert len(whole.prefixes) == 0
    part = trainer(tiny, tmp_path / "part", prefix_memory=0.01, **{**options, "max_steps": 2})
    passes = []
    part.model.get_base_model().base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    part.train()
    # Each of the three texts once and alone, masks in both steps, scores of them in the second.
    assert (len(part.prefixes), sorted(passes)) == (3, [1, 1, 1, 4, 4, 4])
    again = trainer(tiny, tmp_path / "part", prefix_memory=0.02, **options)
    again.train(resume_from_checkpoint=True)
    want, got = trained(whole), trained(again)
    assert "mask_row" in want
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_writes_an_adapter_that_generate_takes(tiny, tmp_path):
    run = trainer(tiny, tmp_path / "run", save_dtype="bfloat16")
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["mtpkern"]["mask_token_id"] == 41
    loaded = mtpkern.load_adapter(base(tiny), tmp_path / "adapter")
    assert torch.equal(gate_of(loaded).row, run.gate.row.detach())
    ids = torch.tensor([[1, 2, 10, 11]])
    want = base(tiny).generate(ids, max_new_tokens=12, do_sample=False)
    assert mtpkern.generate(loaded, ids, max_new_tokens=12).equal(want)
    mtpkern.load_adapter(base(tiny), tmp_path / "run" / "checkpoint-3")


def test_goes_on_from_an_adapter(tiny, tmp_path):
    first = trainer(tiny, tmp_path / "first")
    first.train()
    second = trainer(tiny, tmp_path / "second", first.model, max_steps=1)
    second.train()
    assert second.gate is first.gate


def test_begins_with_an_adapter_of_a_folder(tiny, tmp_path):
    first = trainer(tiny, tmp_path / "run")
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    second = trainer(tiny, tmp_path / "more", init_adapter=str(tmp_path / "adapter"), k_max=6)
    start, end = trained(second), trained(first)
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], x) for name, x in end.items())
    second.train()
    assert not any(torch.equal(trained(second)[name], x) for name, x in end.items())
    second.save_model(str(tmp_path / "further"))
    settings = json.loads((tmp_path / "further" / "adapter_config.json").read_text())["auto_mapping"]["mtpkern"]
    assert settings["k_max"] == 6


def test_follows_a_base_that_was_trained_since(tiny, tmp_path):
    """In memory or out of a folder; what it is then of is the base as it has become."""
    first = trainer(tiny, tmp_path / "run")
    first.train()
    first.save_model(str(tmp_path / "adapter"))

    def moved():
        model = base(tiny)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        return model

    with pytest.raises(ValueError, match=r"was trained for.*train the adapter further.*--init-adapter"):
        mtpkern.load_adapter(moved(), tmp_path / "adapter")
    with torch.no_grad():
        first.plain.model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.1)
    runs = [trainer(tiny, tmp_path / "there", first.model, max_steps=1)]
    with pytest.warns(UserWarning, match="its drafts are worth less there, until it is trained further"):
        runs += [trainer(tiny, tmp_path / "here", moved(), init_adapter=str(tmp_path / "adapter"), max_steps=1)]
    for run in runs:
        run.train()
        run.save_model(str(tmp_path / "further"))
        mtpkern.load_adapter(moved(), tmp_path / "further")
        with pytest.raises(ValueError, match="was trained for"):
            mtpkern.load_adapter(base(tiny), tmp_path / "further")
    with pytest.raises(ValueError, match=r"was trained for.*44 tokens.*without add_mask_token$"):
        trainer(
            tiny,
            tmp_path / "no",
            tiny.model("llama", vocab_size=44, eos_token_id=EOS),
            init_adapter=str(tmp_path / "adapter"),
        )


def test_a_base_that_is_the_same_keeps_its_name(tiny, tmp_path):
    """By which the folder is decoded; this copy of it was loaded from nowhere."""
    first = trainer(tiny, tmp_path / "run")
    first.gate.record(base="its/name")
    first.save_model(str(tmp_path / "adapter"))
    further = mtpkern.load_adapter(base(tiny), tmp_path / "adapter", is_trainable=True)
    trainer(tiny, tmp_path / "there", further).save_model(str(tmp_path / "further"))
    recorded = [json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("adapter", "further")]
    before, after = (x["auto_mapping"]["mtpkern"] for x in recorded)
    assert before["base"] == after["base"] == "its/name"
    assert before["digest"] == after["digest"]


def test_refuses_to_train_the_base_or_nothing(tiny, tmp_path):
    trainer(tiny, tmp_path / "first").save_model(str(tmp_path / "adapter"))
    model = mtpkern.load_adapter(base(tiny), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"the adapter alone must be trained.*nothing would be.*is_trainable=True"):
        trainer(tiny, tmp_path / "no", model)
    model = mtpkern.load_adapter(base(tiny), tmp_path / "adapter", is_trainable=True)
    model.get_base_model().requires_grad_(True)  # as that of a policy with a twin
    with pytest.raises(ValueError, match=r"the adapter alone must be trained.*embed_tokens.weight would be"):
        trainer(tiny, tmp_path / "no", model)


def test_refuses_adapters_of_fine_tuning(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(tiny), LoraConfig(r=2, target_modules=["q_proj"]))
    says = r"'default' is not gated.*model = model\.merge_and_unload\(\)"
    with pytest.raises(ValueError, match=says):
        trainer(tiny, tmp_path, model)
    with pytest.raises(ValueError, match=r"carries adapters already.*merge_and_unload\(\)"):
        trainer(tiny, tmp_path, model.get_base_model())
    gated = trainer(tiny, tmp_path, base(tiny), max_steps=1)
    gated.save_model(str(tmp_path / "gated"))
    model.load_adapter(str(tmp_path / "gated"), "gated", is_trainable=True)
    model.base_model.set_adapter(["default", "gated"])
    with pytest.raises(ValueError, match=says):
        trainer(tiny, tmp_path, model)
    save_adapter(model, tmp_path / "again")
    mtpkern.load_adapter(base(tiny), tmp_path / "again")
    model.delete_adapter("gated")
    trainer(tiny, tmp_path, model.merge_and_unload())


def test_refuses_to_begin_with_another_adapter(tiny, tmp_path):
    first = trainer(tiny, tmp_path / "run")
    first.save_model(str(tmp_path / "adapter"))
    plain = peft.get_peft_model(base(tiny), peft.LoraConfig(r=4, target_modules="all-linear"))
    plain.save_pretrained(tmp_path / "plain")
    for name, model, options, says in (
        ("adapter", None, {"lora_rank": 8}, "has rank 4, and lora_rank is 8"),
        ("plain", None, {}, "holds another one of peft"),
        ("run", None, {}, "init_adapter must be the folder of a gated adapter"),
        ("adapter", first.model, {}, "has adapters already"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer(tiny, tmp_path / "other", model, init_adapter=str(tmp_path / name), **options)


def test_refuses(tiny, tmp_path):
    for options, says in (
        ({"lora_rank": 0}, "lora_rank"),
        ({"k_min": 1}, "k_min"),
        ({"prefix_weight": 0.5}, "prefix_weight"),
        ({"anchor_kl_weight": 0.5}, "anchor"),
        ({"bidirectional": True}, "bidirectional"),
        ({"torch_compile": True, "activation_checkpointing": True}, "omit one"),
        ({"prefix_memory": -1.0}, "prefix_memory"),
        ({"init_adapter": "adapter", "lora_alpha": 3.0}, "its own lora_alpha"),
        ({"init_adapter": "./nowhere"}, "init_adapter must be the folder"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer(tiny, tmp_path, **options)
    with pytest.raises(ValueError, match=r"prefix_memory .* gated"):
        MTPConfig(str(tmp_path), prefix_memory=1.0)
    with pytest.raises(ValueError, match=r"init_adapter .* gated"):
        MTPConfig(str(tmp_path), init_adapter="adapter")
    args = MTPConfig(str(tmp_path), gated=True, lora_rank=4, k_max=4, use_cpu=True, report_to="none")
    model = base(tiny)
    with pytest.raises(ValueError, match="go together"):
        MTPTrainer(model=model, mask_token_id=40, args=args, train_dataset=data(), data_collator=MTPCollator(0))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {"student_dtype": "bfloat16"}),
        ("float16", {"student_dtype": "float16", "teacher_target": "hard"}),
        ("bfloat16", {"bf16": True}),
    ],
    ids=["bfloat16", "float16", "autocast"],
)
def test_a_narrow_base_learns_what_a_float32_one_does(tiny, tmp_path, dtype, options):
    """The same numbers in both; adapters in float32, and no float32 copy of what is frozen."""
    dtype = getattr(torch, dtype)
    wide = trainer(
        tiny,
        tmp_path / "wide",
        base(tiny).to(dtype).float(),
        max_steps=2,
        logging_steps=1,
        **{k: options[k] for k in options if k == "teacher_target"},
    )
    wide.train()
    student = base(tiny).to(dtype)
    if "student_dtype" not in options:
        student = student.float()
    frozen = sum(p.nbytes for p in student.parameters())
    run = trainer(tiny, tmp_path / "run", student, max_steps=2, prefix_memory=0.01, logging_steps=1, **options)
    run.train()
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in student.model.layers.parameters() if not p.requires_grad} == {student.dtype}
    assert sum(p.nbytes for p in run.model.parameters() if not p.requires_grad) == frozen
    # Both moments of the adapters and of the mask token's row, nothing of the base.
    assert {id(p) for p in run.optimizer.optimizer.state} == {id(p) for p in trained}
    if "student_dtype" in options:
        kept = [x for parts in run.prefixes._kept.values() for x in parts]
        assert {x.dtype for x in kept} == {dtype}
    losses = [[x["loss"] for x in r.state.log_history if "loss" in x] for r in (run, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    run.save_model(str(tmp_path / "adapter"))
    for other in (dtype, torch.float32):
        mtpkern.load_adapter(base(tiny).to(dtype).to(other), tmp_path / "adapter")
