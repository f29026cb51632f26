from dataclasses import replace
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern.attention import NAME, attention_context, exclusive, mtpkern_attention, routed
from mtpkern.kernels.scoring import Scoring


class Recording:
    """An attention context that notes what it is given and returns zeros."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.calls.append({"layer": layer, "shapes": (query.shape, key.shape, value.shape), "scoring": scoring})
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


module: Any = SimpleNamespace(layer_idx=3)
q, k, v = torch.zeros(1, 4, 5, 16), torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16)


def test_what_a_layer_asks_for_reaches_the_context() -> None:
    context = Recording()
    sinks = torch.ones(4)
    out, weights = mtpkern_attention(
        module, q, k, v, None, scaling=0.5, sliding_window=7, softcap=30.0, s_aux=sinks, mtpkern=context
    )
    assert out.shape == (1, 5, 4, 16)
    assert weights is None
    (call,) = context.calls
    assert (call["layer"], call["shapes"]) == (3, (q.shape, k.shape, v.shape))
    scoring = call["scoring"]
    assert scoring.sinks is sinks
    assert replace(scoring, sinks=None) == Scoring(0.5, window=7, softcap=30.0)


def test_what_comes_back_can_be_viewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from transformers' own functions; AFMoE's layers do so."""
    monkeypatch.setattr(Recording, "attend", lambda self, layer, query, *rest: query.transpose(1, 2))
    out, _ = mtpkern_attention(module, q, k, v, None, mtpkern=Recording())
    assert out.view(1, 5, 64).shape == (1, 5, 64)


def test_defaults_of_a_layer_that_asks_for_nothing() -> None:
    context = Recording()
    mtpkern_attention(module, q, k, v, None, mtpkern=context, position_ids=torch.zeros(1, 5), is_causal=True)
    (call,) = context.calls
    assert call["scoring"] == Scoring(16**-0.5)


def test_outside_of_a_context_it_does_not_run() -> None:
    with pytest.raises(RuntimeError, match=r"runs only inside mtpkern.*load the model with attn_implementation='sdpa'"):
        mtpkern_attention(module, q, k, v, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, r"mask of its own \(1, 1, 5, 5\)"),
        ({"dropout": 0.1}, r"attention dropout 0.1.*model.eval\(\)"),
        ({"position_bias": torch.zeros(1)}, "passes position_bias"),
    ],
)
def test_what_the_context_would_drop_is_refused(arguments: dict[str, Any], message: str) -> None:
    arguments = {"attention_mask": None, **arguments}
    with pytest.raises(ValueError, match=message):
        mtpkern_attention(module, q, k, v, mtpkern=Recording(), **arguments)


def test_the_model_calls_the_context_layer_by_layer(model: Any) -> None:
    context = Recording()
    before = model.config._attn_implementation
    with attention_context(model, context) as route:
        assert model.config._attn_implementation == NAME
        model(torch.tensor([[1, 2, 3]]), use_cache=False, **route)
        # A model that forwards no keyword finds it all the same.
        model(torch.tensor([[1, 2, 3]]), use_cache=False)
    assert model.config._attn_implementation == before
    assert [call["layer"] for call in context.calls] == [0, 1, 0, 1]


def test_the_switch_is_undone_after_an_exception(model: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(KeyError), attention_context(model, Recording()):
        raise KeyError
    assert model.config._attn_implementation == before
    with attention_context(model, Recording()):
        pass


def test_one_run_at_a_time(model: Any, tiny: Any) -> None:
    order: list[str] = []

    def refused() -> None:
        with (
            pytest.raises(RuntimeError, match="in another thread; run one call at a time"),
            exclusive(model, wait=False),
        ):
            pass
        order.append("refused")

    def waits() -> None:
        with attention_context(model, Recording()):
            order.append("second")

    threads = [Thread(target=refused), Thread(target=waits)]
    with exclusive(model):
        # In its own thread a run would wait for itself for ever.
        with pytest.raises(RuntimeError, match="in this very thread"), attention_context(model, Recording()):
            pass
        for thread in threads:
            thread.start()
        threads[0].join()
        # Another model is free, and the holder may route its own.
        other = tiny.model("llama")
        with attention_context(other, Recording()), routed(model, Recording()):
            assert model.config._attn_implementation == other.config._attn_implementation == NAME
        order.append("first")
    threads[1].join()
    assert order == ["refused", "first", "second"]


def test_a_run_that_raises_lets_the_next_begin(model: Any) -> None:
    with pytest.raises(KeyError), exclusive(model):
        raise KeyError
    with exclusive(model, wait=False):
        pass


def test_a_forgotten_model_takes_its_lock_along(tiny: Any) -> None:
    import gc

    from mtpkern.attention import _turns

    model = tiny.model("llama")
    with attention_context(model, Recording()):
        assert model in _turns
    held = len(_turns)
    del model
    gc.collect()
    assert len(_turns) < held
