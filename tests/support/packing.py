"""Runs over packed weights, and what their products have read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import Verified, packed
from mtpkern.adapter import gate_of, gated
from mtpkern.packed import PackedProducts


def noted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what each product over packed weights reads from now on."""
    seen: list[torch.Size] = []
    product = packed.product

    def note(x: Tensor, *weights: Any) -> Tensor:
        seen.append(x.shape)
        return product(x, *weights)

    monkeypatch.setattr(packed, "product", note)
    return seen


def generate(tiny: SimpleNamespace, model: Any, **options: Any) -> Tensor:
    """A short run of three prompts, with drafts."""
    ids, mask = tiny.prompts(9, 4, 6)
    options = {"max_new_tokens": 12, "strategy": Verified(4, threshold=0.2), "check_model": False, **options}
    return mtpkern.generate(model, ids, attention_mask=mask, **options)


def error(found: Tensor, truth: Tensor) -> Tensor:
    """The root mean square of the distance, in float64."""
    return (found.double() - truth).square().mean().sqrt()


def assert_gated_rows_alone_change(tiny: SimpleNamespace, dtype: torch.dtype, adapter: torch.dtype) -> None:
    """Over packed weights as over torch's products, from the pass on in which the copies are made."""
    model = tiny.adapted(tiny.model("llama").to(dtype))
    for name, weight in model.named_parameters():
        if "lora" in name:
            weight.data = weight.data.to(adapter)
    base = model.get_base_model()
    mask = gate_of(base).mask_token_id
    ids = torch.cat([tiny.prompts(3)[0], torch.tensor([[mask, mask]])], 1)
    ours = PackedProducts()
    with torch.inference_mode(), gated(base, ids):
        torchs = base(ids, use_cache=False).logits
        with ours.sought(base):
            first = base(ids, use_cache=False).logits
        with ours():
            later = base(ids, use_cache=False).logits
    with torch.inference_mode(), ours():
        unadapted = base(ids.where(ids != mask, 0), use_cache=False).logits
    for found in (first, later):
        assert error(found, torchs.double()) < 0.05
    assert torch.equal(later[:, :3], unadapted[:, :3])
    assert not torch.allclose(later[:, 3:].float(), unadapted[:, 3:].float(), atol=0.05)
    generate(tiny, model)
