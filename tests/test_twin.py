"""A twin of a model, modules of its own upon the same weights, decodes as the model is while that is trained."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

import mtpkern
from mtpkern import Static, Verified
from mtpkern.adapter import save_adapter


def follows(optimizer: Callable[..., Optimizer], tiny: SimpleNamespace, folder: Path) -> Any:
    """Trains a policy while its twin decodes, and beside it one without a twin; returns the policy."""
    save_adapter(tiny.adapted(tiny.model("llama")), folder)
    policy = tiny.model("llama")
    del policy.config.mtpkern
    alone = copy.deepcopy(policy)
    twin = copy.deepcopy(policy, {id(weight): weight for weight in policy.parameters()})
    fast = mtpkern.load_adapter(twin, folder)
    policy.requires_grad_(True)
    assert {id(weight) for weight in policy.parameters()} < {id(weight) for weight in fast.parameters()}
    ids, real = tiny.prompts(12, 9)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real}
    runs = [(model, optimizer(model.parameters())) for model in (policy, alone)]
    cache, texts, draws = mtpkern.PrefixCache(), set(), torch.Generator().manual_seed(0)
    for _ in range(4):
        want = policy.eval().generate(**inputs, do_sample=False, max_new_tokens=40)
        texts.add(tuple(want.flatten().tolist()))
        for strategy in (None, Verified(4, 0.2), Static(1)):
            assert mtpkern.generate(fast, **inputs, strategy=strategy, max_new_tokens=40).equal(want)
        assert mtpkern.generate(fast, **inputs, prefix_cache=cache, max_new_tokens=40).equal(want)
        labels = torch.randint(15, (2, 12), generator=draws)
        for model, steps in runs:
            model.train()(**inputs, labels=labels).loss.backward()
            steps.step()
            steps.zero_grad()
    assert len(texts) > 2
    assert all(torch.equal(x, y) for x, y in zip(policy.parameters(), alone.parameters(), strict=True))
    assert policy.state_dict().keys() == alone.state_dict().keys()
    return policy


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(AdamW, lr=0.02),
        partial(AdamW, lr=0.02, foreach=True),
        partial(AdamW, lr=0.02, fused=True),
        partial(SGD, lr=0.5, momentum=0.9),
    ],
    ids=["AdamW", "foreach", "fused", "SGD"],
)
def test_follows_every_step(optimizer: Callable[..., Optimizer], tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Prefixes that are kept are those of the model before the step."""
    follows(optimizer, tiny, tmp_path)


@pytest.mark.usefixtures("recorded_at_once", "packs")
def test_with_passes_recorded(tiny: SimpleNamespace, tmp_path: Path, replays: list[int]) -> None:
    follows(partial(AdamW, lr=0.02, fused=True), tiny, tmp_path)
    assert replays


@pytest.mark.usefixtures("joins")
def test_with_weights_in_one_buffer(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """As on a GPU, where layers that read the same are one product: weights move, and stay the policy's."""
    policy = follows(partial(AdamW, lr=0.02, foreach=True), tiny, tmp_path)
    layer = policy.model.layers[0].mlp
    assert layer.gate_proj.weight.untyped_storage().data_ptr() == layer.up_proj.weight.untyped_storage().data_ptr()
    policy.save_pretrained(tmp_path / "saved")
    saved = type(policy).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(x, y) for x, y in zip(policy.parameters(), saved.parameters(), strict=True))
