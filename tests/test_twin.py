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
    """With passes recorded, weights laid out anew and prefixes kept: none of it is of the model before the step."""
    save_adapter(tiny.adapted(tiny.model("llama")), tmp_path)
    policy = tiny.model("llama")
    del policy.config.mtpkern
    twin = copy.deepcopy(policy, {id(weight): weight for weight in policy.parameters()})
    fast = mtpkern.load_adapter(twin, tmp_path)
    policy.requires_grad_(True)
    assert {id(weight) for weight in policy.parameters()} < {id(weight) for weight in fast.parameters()}
    ids, real = tiny.prompts(12, 9)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real}
    steps, cache, texts = optimizer(policy.parameters()), mtpkern.PrefixCache(), set()
    draws = torch.Generator().manual_seed(0)
    for _ in range(4):
        want = policy.eval().generate(**inputs, do_sample=False, max_new_tokens=40)
        texts.add(tuple(want.flatten().tolist()))
        for strategy in (None, Verified(4, 0.2), Static(1)):
            assert mtpkern.generate(fast, **inputs, strategy=strategy, max_new_tokens=40).equal(want)
        assert mtpkern.generate(fast, **inputs, prefix_cache=cache, max_new_tokens=40).equal(want)
        policy.train()(**inputs, labels=torch.randint(15, (2, 12), generator=draws)).loss.backward()
        steps.step()
        steps.zero_grad()
    assert len(texts) > 2
    assert not any("lora" in name for name, _ in policy.named_parameters())
