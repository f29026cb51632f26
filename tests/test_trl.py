"""docs/trl.md runs as it stands where TRL is installed, and what its trainers prepare and draw is what it says."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.adapter import base_of, save_adapter
from mtpkern.baked import fingerprint
from mtpkern.foreign import foreign
from mtpkern.train import encode_rows
from mtpkern.train.convert import convert
from mtpkern.train.lora import add_gated_lora
from support.pages import fenced

pytest.importorskip("trl")
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

PAGE = (Path(__file__).resolve().parents[1] / "docs/trl.md").read_text()
PROMPTS = re.findall(r'"prompt": "(.*?)"', (mtpkern.ASSETS / "problems.jsonl").read_text())[:8]
BRIEF: dict[str, Any] = {"max_steps": 3, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}


def load(name: Any = mtpkern.ASSETS) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype="float32")


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(mtpkern.ASSETS)


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there: dict[str, Any] = {}
    for block in fenced(PAGE, "python"):
        exec(compile(block, "docs/trl.md", "exec"), there)
    inputs = {**there["inputs"], "max_new_tokens": 40}
    # The policy has moved, and the twin with it; what was saved is the policy alone.
    trained = load("runs/grpo")
    assert not trained.lm_head.weight.equal(load("runs/merged").lm_head.weight)
    want = trained.generate(**inputs, do_sample=False)
    assert mtpkern.generate(there["fast"], **inputs).equal(want)
    with pytest.raises(ValueError, match="was trained for"):
        mtpkern.load_adapter(trained, "runs/gated")
    with pytest.warns(UserWarning, match="worth less there"):
        further = mtpkern.load_adapter(trained, "runs/gated", is_trainable=True)
    there["GatedTrainer"](
        model=further,
        args=there["MTPConfig"]("runs/further", gated=True, lora_rank=8, k_max=4, **there["brief"]),
        train_dataset=encode_rows(there["own"], there["tokenizer"], chat=False),
        data_collator=there["MTPCollator"](0),
    ).train()
    mtpkern.generate(load("runs/mtp"), **inputs, strategy=mtpkern.Verified(4))
    convert("runs/lora", Path("runs/converted"))
    assert load("runs/converted").generate(**there["inputs"], max_new_tokens=64, do_sample=False).equal(there["want"])


def test_rollouts_through_slots(tokenizer: Any, tmp_path: Path) -> None:
    """Of a `rollout_func`, with the settings of the trainer, each up to its own end."""
    policy, fast = of_twin(load(), tmp_path / "adapter")
    seen: list[int] = []

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        outputs = mtpkern.generate_batch(fast, ids, generation_config=trainer.generation_config, batch_size=3)
        seen.extend(len(output.tokens) for output in outputs)
        assert all(output.tokens[-1] == tokenizer.eos_token_id for output in outputs if len(output.tokens) < 60)
        return {"prompt_ids": ids, "completion_ids": [output.tokens for output in outputs], "logprobs": None}

    options = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 60}
    GRPOTrainer(
        policy,
        lambda completions, **_: [float(i) for i in range(len(completions))],
        GRPOConfig(str(tmp_path / "run"), **BRIEF, **options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        rollout_func=rollouts,
    ).train()
    assert len(seen) == 12
    assert min(seen) < 60


def test_in_bfloat16(tokenizer: Any, tmp_path: Path) -> None:
    """As their configurations ask for it: float32 weights under autocast, in a forward that TRL and accelerate wrap."""
    model = load()
    model.generate = partial(mtpkern.generate, model)
    options = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8}
    GRPOTrainer(
        model,
        lambda completions, **_: [1.0] * len(completions),
        GRPOConfig(str(tmp_path), **{**BRIEF, "bf16": True}, **options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    ).train()
    assert not foreign(model)
    assert model.dtype == torch.float32


def test_a_checkpoint_by_name_writes_its_rollouts_by_itself(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    ours = mtpkern.generate
    monkeypatch.setattr(mtpkern, "generate", lambda *args, **kwargs: calls.append(ours(*args, **kwargs)) or calls[-1])
    options = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8}
    GRPOTrainer(
        str(mtpkern.ASSETS),
        lambda completions, **_: [1.0] * len(completions),
        GRPOConfig(str(tmp_path), **BRIEF, **options, model_init_kwargs={"trust_remote_code": True}),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    ).train()
    assert len(calls) == 3


def of_checkpoint(model: Any, folder: Path) -> tuple[Any, Any]:
    """A policy that decodes by itself, in training mode."""
    return model, model


def adapter(folder: Path, base: Any) -> Path:
    """A gated adapter with drafts that now and then stand."""
    gated = add_gated_lora(base, rank=4, k_max=4)
    with torch.no_grad():
        for name, weight in gated.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    save_adapter(gated, folder)
    return folder


def of_twin(model: Any, folder: Path) -> tuple[Any, Any]:
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    fast = mtpkern.load_adapter(twin, adapter(folder, load()))
    model.requires_grad_(True)
    return model, fast


def of_lora(model: Any, folder: Path) -> tuple[Any, Any]:
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    twin = copy.deepcopy(policy, {id(weight): weight for weight in policy.parameters()})
    twin.load_adapter(str(adapter(folder, load())), "gated")
    twin.base_model.set_adapter(["default", "gated"])
    return policy, twin.eval()


@pytest.mark.parametrize("kind", [of_checkpoint, of_twin, of_lora])
def test_rollouts_are_the_policys_own(kind: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    """At every step: tokens of Static(1) behind the same seed, log-probabilities of the policy's own forward."""
    policy, fast = kind(load(), tmp_path / "adapter")
    drawn: list[torch.Tensor] = []
    seen: list[Any] = []

    def generate(input_ids: Any, attention_mask: Any, **how: Any) -> Any:
        call = partial(mtpkern.generate, fast, input_ids, attention_mask=attention_mask, **how)
        before = torch.get_rng_state()
        output = call(strategy=mtpkern.Verified(4, 0.2), return_dict_in_generate=True, return_logprobs=True)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        assert call(strategy=mtpkern.Static(1)).equal(output.sequences)
        torch.set_rng_state(after)
        prompt, ids = input_ids.shape[1], output.sequences
        real = torch.cat([attention_mask, torch.ones_like(ids[:, prompt:])], dim=1)
        with torch.no_grad():
            logits = policy.eval()(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
        policy.train()
        if kind is of_checkpoint:
            assert max(map(max, output.blocks)) > 1
            logits[..., policy.config.mtpkern["mask_token_id"]] = -torch.inf
        own = logits[:, prompt - 1 : -1].log_softmax(-1).gather(2, ids[:, prompt:, None])[..., 0]
        live = torch.arange(own.shape[1]) < torch.tensor([sum(row) for row in output.blocks])[:, None]
        torch.testing.assert_close(output.logprobs[live], own[live], atol=1e-4, rtol=1e-4)
        drawn.append(ids)
        seen.append(fingerprint(base_of(fast)))
        return ids

    policy.generate = generate
    options = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 24}
    config = GRPOConfig(str(tmp_path / "run"), **BRIEF, **options, learning_rate=1e-3, temperature=1.0)
    before = [weight.clone() for weight in policy.parameters()]
    trainer = GRPOTrainer(
        policy,
        lambda completions, **_: [float(i) for i in range(len(completions))],
        config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(drawn) == 3
    # What has been captured or recorded of a twin serves every step. A policy gets new hooks with its checkpoints.
    assert kind is of_checkpoint or seen == seen[:1] * 3
    moved = [not x.equal(y) for x, y in zip(before, policy.parameters())]
    assert any(moved) if kind is of_lora else all(moved)
    names = {name for name, _ in trainer.model.named_parameters()}
    assert not any("gated" in name or "mask_row" in name for name in names)


def test_what_sfttrainer_has_prepared(tokenizer: Any, tmp_path: Path) -> None:
    """By its tokens, without the text, it is what our own encoding makes of the text."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}\nAnswer:{% endif %}{% endfor %}"
    )
    turns = [
        {"role": role, "content": content}
        for role, content in (("user", "kites?"), ("assistant", "4"), ("user", "pens?"), ("assistant", "5 pens."))
    ]
    for rows, chat, options in (
        ([{"prompt": PROMPTS[0], "completion": " 75"}], False, {}),
        ([{"text": "Jona has 4 kites."}], False, {}),
        ([{"prompt": turns[:1], "completion": turns[1:2]}], True, {}),
        ([{"messages": turns}], True, {"assistant_only_loss": True}),
    ):
        data = Dataset.from_list(rows)
        config = SFTConfig(str(tmp_path), **BRIEF, **options)
        prepared = SFTTrainer(load(), config, train_dataset=data, processing_class=tokenizer).train_dataset
        want = encode_rows(data, tokenizer, chat=chat, **({} if chat else {"separator": ""}))
        # Earlier versions of TRL leave the masks.
        kept = {"input_ids", "labels", "completion_mask", "assistant_masks"}
        tokens = prepared.select_columns(sorted(kept & {*prepared.column_names}))
        assert encode_rows(tokens, tokenizer).fingerprint == want.fingerprint
        assert ("earlier_answers" in want[0]) == ("messages" in rows[0])
