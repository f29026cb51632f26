"""Slots on a CPU: those that become free within a few passes of one another are filled in one prefill."""

from types import SimpleNamespace
from typing import Any

import pytest

from mtpkern import Verified, generate_batch, refill


def test_answers_of_like_length_come_in_together(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny.model("llama"), [[1 + i, 2 + i, 3] for i in range(11)]
    entered: list[int] = []
    enter = refill.enter

    def noted(decoder: Any, newcomers: Any, *args: Any, **options: Any) -> Any:
        entered.append(len(newcomers))
        return enter(decoder, newcomers, *args, **options)

    monkeypatch.setattr(refill, "enter", noted)
    options: dict[str, Any] = {"strategy": Verified(3, threshold=0.0), "max_new_tokens": 41, "batch_size": 4}
    together = generate_batch(model, prompts, **options)
    groups, entered = entered, []
    monkeypatch.setattr(refill, "NEARLY_DONE", -1)
    apart = generate_batch(model, prompts, **options)
    assert sum(groups) == sum(entered) == 11
    assert len(groups) < len(entered)
    for one, other in zip(together, apart):
        assert (one.tokens, one.blocks) == (other.tokens, other.blocks)
