"""What somebody has put in the place of torch's products, or around them, is done: packed weights would pass it by."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import mtpkern
from mtpkern import Static, packed, packed_weights
from support.packing import generate, noted

pytestmark = pytest.mark.skipif(not packed_weights.has_packed_products(torch.float32), reason="torch without oneDNN")
linear = nn.functional.linear


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small weights and short runs too."""
    monkeypatch.setattr(packed, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(packed, "LEAST_TOKENS", 1)
    yield
    mtpkern.release_graphs()


def coarse(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product as of weights in few bits."""
    return linear(x, (weight * 4).round() / 4, bias)


class Coarse(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (coarse if func is linear else func)(*args, **(kwargs or {}))


@pytest.mark.parametrize("place", ["function", "forward", "mode"])
def test_products_that_are_somebody_s_own_are_computed(
    place: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    before = generate(tiny, model)
    read = noted(monkeypatch)
    around: AbstractContextManager[Any] = Coarse() if place == "mode" else nullcontext()
    with monkeypatch.context() as patch, around:
        if place == "function":
            patch.setattr(nn.functional, "linear", coarse)
        elif place == "forward":
            patch.setattr(nn.Linear, "forward", lambda self, x: coarse(x, self.weight, self.bias))
        found = generate(tiny, model)
    assert not read
    for layer in (x for x in model.modules() if isinstance(x, nn.Linear)):
        layer.weight.data = (layer.weight.data * 4).round() / 4
    assert torch.equal(found, generate(tiny, model))
    assert not torch.equal(found, before), "coarse weights make the same tokens"
    assert read


def test_operations_that_are_counted_are_torchs(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    with FlopCounterMode(display=False) as cold:
        generate(tiny, model, strategy=Static(1))
    generate(tiny, model, strategy=Static(1))
    with FlopCounterMode(display=False) as warm:
        generate(tiny, model, strategy=Static(1))
    assert cold.get_total_flops() == warm.get_total_flops() > 0


def test_without_onednn_torch_goes_without(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    wanted, read = generate(tiny, model), noted(monkeypatch)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(generate(tiny, model), wanted)
    assert not read


def test_a_default_device_is_no_matter(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny.model("llama"), noted(monkeypatch)
    with torch.device("cpu"):
        generate(tiny, model)
    assert read
