"""Which weights are trained, in which dtype, and how they are saved: LoRA, bfloat16, tied embeddings."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mtpkern.train.saving import _cast
from support.trained import MASK, llama, same_weights, trainer


def test_saved_model_is_a_plain_checkpoint(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "final"))
    recorded = json.loads((tmp_path / "final" / "config.json").read_text())
    assert {"mask_token_id": MASK, "k_max": 4}.items() <= recorded["mtpkern"].items()
    assert "attn_implementation" not in json.dumps(recorded)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    same_weights(run.model.cpu(), loaded, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_in_another_dtype(tmp_path, tied):
    student = llama(tie_word_embeddings=tied)
    trainer(tmp_path, student=student, save_dtype="bfloat16").save_model(str(tmp_path))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.use_cache
    assert student.dtype == torch.float32
    same_weights(student.bfloat16(), loaded, rtol=0, atol=0)


def test_what_begins_at_one_address_is_not_one_tensor():
    """Views of a weight, and what has no element at all."""
    x, none = torch.arange(6.0), torch.empty(0)
    state = {"x": x, "tied": x, "part": x[:2], "table": x.view(2, 3), "none": none, "nothing": none.view(0, 3)}
    cast = _cast(state, torch.bfloat16)
    assert all(cast[name].equal(value.bfloat16()) for name, value in state.items())
    assert cast["tied"] is cast["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_teaches_itself_and_saves_a_plain_model(tmp_path, dtype):
    student = llama().to(getattr(torch, dtype))
    base = copy.deepcopy(student)
    ids = torch.randint(8, 30, (2, 9))
    ids[1, 5] = MASK
    options = {"lora_rank": 2, "student_dtype": dtype, "save_dtype": dtype, "k_min": 3, "k_max": 3}
    whole = trainer(tmp_path / "a", student=student, teacher=None, **options)
    whole.train()
    torch.manual_seed(1234)
    rest = trainer(tmp_path / "a", student=copy.deepcopy(base), teacher=None, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    trained = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    same_weights(whole.model, rest.model, rtol=0, atol=0)

    with torch.no_grad(), whole.model.disable_adapter():
        assert torch.equal(whole.model.eval()(ids).logits, base(ids).logits)
    whole.save_model(str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "custom_generate" / "generate.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.generation_config.suppress_tokens == [MASK]  # or transformers' own decoding would emit it
    with torch.no_grad():
        changed = (loaded.model.embed_tokens.weight != base.model.embed_tokens.weight).any(1)
        assert changed.nonzero().tolist() == [[MASK]]
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.2, "atol": 0.2}
        torch.testing.assert_close(loaded(ids).logits, whole.model(ids).logits, **close)
        assert not torch.allclose(loaded(ids).logits, base(ids).logits, **close)


def test_pure_bf16_trains_and_freezes(tmp_path):
    """Asked for by name, with a warning: at 1e-5 hardly a weight moves; at a high rate it learns, resumed exactly."""

    def run(name, lr, resume=None, **change):
        change = {"weight_decay": 0.1, "learning_rate": lr, **change}
        made = trainer(tmp_path / name, llama().to(torch.bfloat16 if "pure_bf16" in change else None), **change)
        before = copy.deepcopy(made.model.state_dict())
        made.train(resume_from_checkpoint=resume)
        after = made.model.state_dict()
        same = {key: (after[key] == before[key]).float().mean().item() for key in after if "mlp" in key}
        return made, after, max(same.values()), min(same.values())

    with pytest.warns(UserWarning, match="at 1e-5 .* never moved.*; learning_rate here is 1e-05"):
        made, _, _, still = run("frozen", 1e-5, pure_bf16=True)
    assert made.model.dtype == torch.bfloat16
    assert still > 0.9
    _, _, still, _ = run("float", 1e-5)
    assert still < 0.1

    with pytest.warns(UserWarning, match=r"learning_rate here is 0\.01"):
        made, whole, still, _ = run("whole", 1e-2, pure_bf16=True)
    with pytest.warns(UserWarning, match="pure_bf16"):
        _, rest, _, _ = run("rest", 1e-2, str(tmp_path / "whole" / "checkpoint-2"), pure_bf16=True)
    assert still < 0.5
    assert all(torch.equal(whole[key], rest[key]) for key in whole)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    with pytest.warns(UserWarning, match="pure_bf16"), pytest.raises(ValueError, match=r"dtype=torch\.bfloat16"):
        trainer(tmp_path, pure_bf16=True)
