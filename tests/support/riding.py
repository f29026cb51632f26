"""Passes on a CPU in which siblings are one product, with the A of a gated adapter riding along."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mtpkern
from mtpkern import ConfAdapt, siblings
from mtpkern.adapter import gate_of, gated
from mtpkern.products import Products

# Emits what masks predict.
PROPOSED = ConfAdapt(3, threshold=0.15)


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Also in passes that nobody captures; [False] leaves all apart."""
    answer = [True]
    monkeypatch.setattr("mtpkern.decoder.wants_one_product", lambda captured: answer[0])
    monkeypatch.setattr("mtpkern.decoder.packs", lambda *_: False)  # which a CPU's longer runs take
    torch._dynamo.reset()
    counters.clear()
    yield answer
    torch._dynamo.reset()


class Ops(list[tuple[str, int]]):
    """Which op has added the adapter, and to how many layers, since the list was last looked at."""

    def new(self) -> list[tuple[str, int]]:
        seen = list(self)
        self.clear()
        return seen


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Ops:
    seen = Ops()

    def counted(name: str) -> Any:
        op = getattr(siblings, name)
        return lambda outs, *args: (seen.append((name, len(outs))), op(outs, *args))[1]

    for name in ("gated_expand", "gated_lora"):
        monkeypatch.setattr(siblings, name, counted(name))
    return seen


def adapted(tiny: SimpleNamespace, kind: str = "llama", seed: int = 1, **settings: Any) -> Any:
    return tiny.adapted(tiny.model(kind, **settings), seed=seed).get_base_model()


def text(tiny: SimpleNamespace, model: Any) -> Tensor:
    """Two prompts with masks behind them."""
    ids, _ = tiny.prompts(6, 6)
    return torch.cat([ids, ids.new_full((2, 3), gate_of(model).mask_token_id)], dim=1)


def joined(tiny: SimpleNamespace, model: Any) -> Products:
    """The first prefill of a run, behind which A rides along."""
    found = Products()
    with torch.inference_mode(), found.sought(model):
        model(tiny.prompts(5)[0])
    return found


def logits(model: Any, ids: Tensor, found: Products | None = None) -> Tensor:
    with torch.inference_mode(), gated(model, ids), (found or Products(wanted=False))():
        return model(ids, use_cache=False).logits


def generate(tiny: SimpleNamespace, model: Any, **options: Any) -> Tensor:
    ids, mask = tiny.prompts(9, 4)
    options = {"max_new_tokens": 12, "strategy": PROPOSED, "check_model": False, **options}
    return mtpkern.generate(model, ids, attention_mask=mask, **options)
