"""A model that has changed since its passes were recorded, and what others have put into it or around it."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from mtpkern import Static
from support.packing import generate

pytestmark = pytest.mark.usefixtures("recorded_at_once")


def negated(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


def moved(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = -layer.weight.data


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()


def normed(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(-1)


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -output)


def own_forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda x: 0 * x


def scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


def doubled(model: Any) -> None:
    model.to(torch.float64)


class Negated(LlamaMLP):
    """A class of somebody's."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def of_another_class(model: Any) -> None:
    model.model.layers[0].mlp.__class__ = Negated


def of_another_class_of_theirs(model: Any) -> None:
    model.model.layers[0].mlp.act_fn.__class__ = torch.nn.Tanh


def with_a_function(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = lambda x: -x.tanh()


def traced(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.jit.trace(torch.nn.Tanh(), torch.ones(2))


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize(
    "change",
    [
        *(negated, moved, in_place, normed, hooked, own_forward, scaling, doubled),
        *(of_another_class, of_another_class_of_theirs, with_a_function, traced),
    ],
)
def test_a_model_that_changes_is_followed(
    change: Callable[[Any], None], tiny: SimpleNamespace, replays: list[int], live: Callable[..., Any]
) -> None:
    model = tiny.model("llama")
    before = [generate(tiny, model, max_new_tokens=24) for _ in range(3)][-1]
    assert replays
    change(model)
    wanted = live(generate, tiny, model, max_new_tokens=24)
    assert not torch.equal(wanted, before) or change is doubled
    for _ in range(3):
        assert torch.equal(generate(tiny, model, max_new_tokens=24), wanted)


def test_a_function_in_the_place_of_one_that_has_gone(
    tiny: SimpleNamespace, replays: list[int], live: Callable[..., Any]
) -> None:
    """A recording holds none of the two, so that the second may lie where the first has lain."""
    model, places = tiny.model("llama"), set()
    mlp = model.model.layers[0].mlp
    for i in range(6):
        del mlp.act_fn
        mlp.act_fn = partial(torch.nn.functional.leaky_relu, negative_slope=0.1 + i)
        places.add(id(mlp.act_fn))
        found = [generate(tiny, model, max_new_tokens=24) for _ in range(2)]
        assert replays
        wanted = live(generate, tiny, model, max_new_tokens=24)
        assert all(torch.equal(x, wanted) for x in found)
        replays.clear()
    assert len(places) < 6


@pytest.mark.usefixtures("packs")
def test_an_adapter_that_changes_is_followed(
    tiny: SimpleNamespace, replays: list[int], live: Callable[..., Any]
) -> None:
    """What it proposes is emitted, and so looked at."""
    model = tiny.adapted(tiny.model("llama"))
    strategy = Static(3)

    def run() -> Tensor:
        return generate(tiny, model, strategy=strategy, max_new_tokens=24)  # type: ignore[no-any-return]

    found = [run() for _ in range(3)]
    assert replays
    for change in (
        lambda: [p.data.mul_(-3) for name, p in model.named_parameters() if "lora_B" in name],
        lambda: setattr(model.mask_row, "data", -model.mask_row.data),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
    ):
        change()
        wanted = live(run)
        assert not torch.equal(wanted, found[-1])
        found = [run() for _ in range(3)]
        assert all(torch.equal(x, wanted) for x in found)


class Halved(TorchFunctionMode):
    """What somebody has put around operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if func is torch.nn.functional.silu else out


def test_modes_of_others_are_asked(tiny: SimpleNamespace, replays: list[int], live: Callable[..., Any]) -> None:
    """And what they do ends with them."""
    model = tiny.model("llama")
    wanted = live(generate, tiny, model, max_new_tokens=24)
    with Halved():
        halved = live(generate, tiny, model, max_new_tokens=24)
        found = [generate(tiny, model, max_new_tokens=24) for _ in range(3)]
    assert not torch.equal(halved, wanted)
    assert all(torch.equal(x, halved) for x in found)
    assert not replays
    assert all(torch.equal(generate(tiny, model, max_new_tokens=24), wanted) for _ in range(3))
    assert replays
    with Halved():
        assert torch.equal(generate(tiny, model, max_new_tokens=24), halved)


@pytest.mark.parametrize("of_all", [True, False])
def test_hooks_are_called_in_every_pass(of_all: bool, tiny: SimpleNamespace, replays: list[int]) -> None:
    model = tiny.model("llama")
    for _ in range(3):
        generate(tiny, model, strategy=Static(1))
    replays.clear()
    called: list[Any] = []
    register = register_module_forward_hook if of_all else model.model.norm.register_forward_hook
    handle = register(lambda module, args, output: called.append(module))
    try:
        for _ in range(3):
            generate(tiny, model, strategy=Static(1), max_new_tokens=12)
    finally:
        handle.remove()
    assert called.count(model.model.norm) == 36
    assert not replays


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (modeling_llama, "apply_rotary_pos_emb"),
        (torch.nn.functional, "silu"),
        (LlamaMLP, "__call__"),
        (torch.nn.Module, "__call__"),
    ],
)
def test_functions_that_somebody_replaces_are_called(
    where: Any, name: str, tiny: SimpleNamespace, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libraries of faster kernels do, in the files of a model's classes: before a recording or behind it."""
    model, own = tiny.model("llama"), getattr(where, name)
    before = [generate(tiny, model, max_new_tokens=24) for _ in range(3)][-1]
    assert replays
    replays.clear()
    factor, calls = 1.0, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        out = own(*args, **kwargs)
        if "call" in name:
            return out
        return factor * out if isinstance(out, Tensor) else (factor * out[0], *out[1:])

    with monkeypatch.context() as patch:
        patch.setattr(where, name, theirs)
        for factor in (1.0, 3.0):
            calls.clear()
            got = generate(tiny, model, max_new_tokens=24)
            assert got.equal(before) == (factor == 1 or "call" in name)
            assert len(calls) > 20
        assert not replays
    assert [generate(tiny, model, max_new_tokens=24) for _ in range(3)][-1].equal(before)
    assert replays
