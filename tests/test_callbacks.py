"""Processors, criteria and streamers that call the very model that a run decodes with: as with transformers."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import mtpkern
from mtpkern import Static, Verified

NEW = 7


class Asks:
    """Calls the model on the text so far, with a cache and without, and notes what it says."""

    def __init__(self, model: Any, mode: Any) -> None:
        self.model, self.mode, self.seen = model, mode, {}

    def says(self, ids: Tensor) -> Tensor:
        with self.mode():
            cached = self.model(ids, use_cache=True).logits[:, -1]
            plain = self.model(ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(cached, plain)
        self.seen[tuple(ids[0].tolist())] = plain[0].argmax().item()
        return plain


class Processor(Asks, LogitsProcessor):
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.says(ids).detach()


class Criterion(Asks):
    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        self.says(ids)
        return torch.zeros(len(ids), dtype=torch.bool)


class Streamer(Asks):
    def put(self, value: Tensor) -> None:
        self.says(torch.tensor([[3, 4, 5]]))

    def end(self) -> None: ...


KINDS = {
    "processor": lambda *a: {"logits_processor": [Processor(*a)]},
    "criterion": lambda *a: {"stopping_criteria": [Criterion(*a)]},
    "streamer": lambda *a: {"streamer": Streamer(*a)},
}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_calls_the_model(tiny: Any, kind: str, gated: bool) -> None:
    mode = torch.inference_mode if gated or kind == "criterion" else nullcontext
    model = tiny.model("llama", num_hidden_layers=1)
    called = tiny.adapted(model) if gated else model
    ids, _ = tiny.prompts(4)
    given = {"max_new_tokens": NEW}
    hidden = {} if gated else {"suppress_tokens": [tiny.mask]}
    asks = KINDS[kind](model, mode)
    with torch.no_grad() if mode is nullcontext else nullcontext():
        want = model.generate(ids, do_sample=False, **hidden, **given, **KINDS[kind](model, mode))
    for strategy in (Static(1), Verified(3, threshold=0.0)):
        output = mtpkern.generate(called, ids, strategy=strategy, **given, **asks)
        assert output.equal(want), strategy
    if kind != "streamer":
        ((ours,),) = asks.values()
        assert {tuple(want[0, :n].tolist()) for n in range(5, want.shape[1])} <= set(ours.seen)
