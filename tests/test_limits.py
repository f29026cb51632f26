"""Mistakes in a call that would cost memory without bound, or an error from the depths: said by name, at once."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import mtpkern
from mtpkern import ConfAdapt, Static, Verified
from mtpkern.strategies import strategy_of


@pytest.mark.parametrize("kind", [Static, ConfAdapt, Verified])
def test_k_has_a_bound(kind: Any, tiny: Any) -> None:
    kind(256)
    with pytest.raises(ValueError, match=rf"{kind.__name__}: k must be at most 256, got 257: a pass brings up to 2k"):
        kind(257)
    with pytest.raises(ValueError, match="k must be at most 256, got 1000000"):
        strategy_of(f"{kind.__name__.lower()}:1000000")
    # One that a checkpoint records is no better.
    model = tiny.model("llama", num_hidden_layers=1)
    model.config.mtpkern = {**model.config.mtpkern, "k_max": 1_000_000}
    if kind is ConfAdapt:
        with pytest.raises(ValueError, match="k must be at most 256"):
            mtpkern.generate(model, tiny.prompts(3)[0], strategy=kind(), max_new_tokens=4)


def test_masks_have_a_bound() -> None:
    Verified(40, masks=1024)
    with pytest.raises(ValueError, match="masks must be at most 1024, got 1025"):
        Verified(40, masks=1025)
    with pytest.raises(ValueError, match="masks must be at most 1024"):
        Verified(masks=10**9)


@pytest.mark.parametrize("name", ["forced_eos_token_id", "forced_bos_token_id"])
def test_the_mask_token_cannot_be_forced(name: str, tiny: Any) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    ids, _ = tiny.prompts(1)
    with pytest.raises(ValueError, match=f"{name}={tiny.mask} asks for the mask token"):
        mtpkern.generate(model, ids, max_new_tokens=4, **{name: tiny.mask})
    forced = mtpkern.generate(model, ids, max_new_tokens=4, **{name: 5})
    assert 5 in forced[0, 1:]


class Returns(LogitsProcessor):
    def __init__(self, made: Any) -> None:
        self.made = made

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return self.made(scores)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda scores: None, "NoneType"),
        (lambda scores: scores[0], r"a tensor \[16\]"),
        (lambda scores: scores[:, :3], r"a tensor \[1, 3\]"),
    ],
    ids=["nothing", "flat", "short"],
)
def test_a_processor_that_returns_no_scores(made: Any, says: str, tiny: Any) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=rf"Returns must return the scores \[1, 16\] of the text .*, got {says}"):
        mtpkern.generate(model, tiny.prompts(3)[0], max_new_tokens=4, logits_processor=[Returns(made)])
