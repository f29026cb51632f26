"""GatedTrainer: learns, resumes to the bit, writes adapter folders, and refuses what gating cannot honour."""

import json

import pytest
import torch

import mtpkern
from mtpkern.adapter import gate_of
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


def test_resumes_to_the_bit(tiny, tmp_path):
    whole = trainer(tiny, tmp_path / "whole")
    whole.train()
    trainer(tiny, tmp_path / "part", max_steps=3).train()
    again = trainer(tiny, tmp_path / "part")
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


def test_refuses(tiny, tmp_path):
    for options, says in (
        ({"lora_rank": 0}, "lora_rank"),
        ({"k_min": 1}, "k_min"),
        ({"prefix_weight": 0.5}, "prefix_weight"),
        ({"anchor_kl_weight": 0.5}, "anchor"),
        ({"bidirectional": True}, "bidirectional"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer(tiny, tmp_path, **options)
    args = MTPConfig(str(tmp_path), gated=True, lora_rank=4, k_max=4, use_cpu=True, report_to="none")
    model = base(tiny)
    with pytest.raises(ValueError, match="go together"):
        MTPTrainer(model=model, mask_token_id=40, args=args, train_dataset=data(), data_collator=MTPCollator(0))
