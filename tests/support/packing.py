"""Runs over packed weights, and what their products have read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import Verified, packed


def noted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what each product over packed weights reads from now on."""
    seen: list[torch.Size] = []
    product = packed._product

    def note(x: Tensor, *weights: Any) -> Tensor:
        seen.append(x.shape)
        return product(x, *weights)

    monkeypatch.setattr(packed, "_product", note)
    return seen


def generate(tiny: SimpleNamespace, model: Any, **options: Any) -> Tensor:
    """A short run of three prompts, with drafts."""
    ids, mask = tiny.prompts(9, 4, 6)
    options = {"max_new_tokens": 12, "strategy": Verified(4, threshold=0.2), "check_model": False, **options}
    return mtpkern.generate(model, ids, attention_mask=mask, **options)


def error(found: Tensor, truth: Tensor) -> Tensor:
    """The root mean square of the distance, in float64."""
    return (found.double() - truth).square().mean().sqrt()
