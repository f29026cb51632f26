"""A gated adapter's A rides behind the base's weights: the same tokens by fewer launches."""

import copy
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtpkern import Verified, layers, products, siblings
from mtpkern.adapter import base_alone, gate_of, gated
from mtpkern.baked import fingerprint
from mtpkern.products import whole_of
from support.riding import Ops, adapted, generate, joined, logits, text

# Layers of a decoder layer that are adapted together.
GROUPS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "llama": ({}, [3, 1, 2, 1]),
    "qwen2": ({}, [3, 1, 2, 1]),  # with biases of q, k and v
    "qwen3": ({"attention_bias": True}, [3, 1, 2, 1]),
    "gemma3_text": ({}, [3, 1, 2, 1]),
    "phi3": ({}, [1, 1, 1, 1]),
}


pytestmark = pytest.mark.usefixtures("joins")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weight that each product of several layers has read."""
    seen: list[int] = []
    linear = products.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(weight))
        assert bias is None or len(bias) == len(weight)
        return linear(x, weight, bias)

    monkeypatch.setattr(products, "linear", counted)
    return seen


@pytest.mark.parametrize("kind", GROUPS)
def test_the_bases_product_brings_the_first_half(kind: str, tiny: SimpleNamespace, ops: Ops, read: list[int]) -> None:
    """Of all layers, over parameters that are what they were; where nothing is joined in a pass it is what it was."""
    settings, groups = GROUPS[kind]
    model = adapted(tiny, kind, **settings)
    ids = text(tiny, model)
    expected = logits(model, ids)
    assert {name for name, _ in ops.new()} == {"gated_lora"}
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    found = joined(tiny, model)
    ops.clear()
    torch.testing.assert_close(logits(model, ids, found), expected)
    assert ops.new() == [("gated_expand", n) for n in groups] * 2
    assert len(read) == 2 * len(groups)
    multiplied = ("base_layer.weight", "lora_A.default.weight")
    assert sum(read) == sum(len(p) for name, (p, _) in before.items() if name.endswith(multiplied))
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
    assert torch.equal(logits(model, ids), expected)
    assert not any("forward" in vars(module) or "mtpkern_turn" in vars(module) for module in model.modules())


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("kind", GROUPS)
def test_the_same_tokens(
    kind: str, few: int, tiny: SimpleNamespace, joins: list[bool], ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What masks predict, as without; and verified the original's own."""
    settings, groups = GROUPS[kind]
    ids, mask = tiny.prompts(9, 4)
    original = tiny.model(kind, **settings).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    model = adapted(tiny, kind, **settings)
    joins[0] = False
    expected = generate(tiny, model)
    joins[0] = True
    monkeypatch.setattr("mtpkern.decoder.few_rows", lambda *_: few)
    monkeypatch.setattr(products, "LEAST_WEIGHT", 0)
    ops.clear()
    assert torch.equal(generate(tiny, model), expected)
    # The prefill and the first pass run as they are, each layer by itself, or as siblings.
    assert ops.new()[-2 * len(groups) :] == [("gated_expand", n) for n in groups] * 2
    assert torch.equal(generate(tiny, model, strategy=Verified(3, threshold=0.2)), original)


def test_a_pass_of_the_base_alone_reads_the_weights_alone(tiny: SimpleNamespace, read: list[int]) -> None:
    """Biases too; and so where nobody has opened the gate."""
    model = adapted(tiny, "qwen2")
    ids, _ = tiny.prompts(6, 6)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    found = joined(tiny, model)
    for alone in (True, False):
        read.clear()
        with torch.inference_mode(), found():
            if alone:
                with base_alone(model):
                    got = model(ids, use_cache=False).logits
            else:
                got = model(ids, use_cache=False).logits
        torch.testing.assert_close(got, expected)
        assert read == [64, 32, 96, 32] * 2


def test_what_is_written_into_it_between_passes_is_seen(tiny: SimpleNamespace, ops: Ops) -> None:
    """In place; also where A becomes another tensor, which does not ride before the next run."""
    model = adapted(tiny, num_hidden_layers=1)
    ids = text(tiny, model)
    found, before = joined(tiny, model), logits(model, ids)
    for change in ("in place", "data", "another", "another dtype"):
        down = model.model.layers[0].mlp.down_proj.lora_A["default"]
        with torch.no_grad():
            if change == "in place":
                down.weight.neg_()
            elif change == "data":
                down.weight.data.mul_(2)
            elif change == "another":
                down.weight = nn.Parameter(torch.ones_like(down.weight), requires_grad=False)
            else:
                down.double()
        ops.clear()
        got = logits(model, ids, found)
        rides = change in ("in place", "data")
        assert ops.new() == [("gated_expand", n) for n in (3, 1, 2)] + [("gated_expand" if rides else "gated_lora", 1)]
        torch.testing.assert_close(got, logits(model, ids))
        assert torch.allclose(got, before) is (change == "another dtype")
        before = got
    down.float()
    ops.clear()
    torch.testing.assert_close(logits(model, ids, joined(tiny, model)), before)
    assert ops.new()[-4:] == [("gated_expand", n) for n in (3, 1, 2, 1)]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_who_rides_already_comes_along_where_a_weight_is_another(
    kind: str, name: str, tiny: SimpleNamespace, ops: Ops
) -> None:
    """Its memory is not its own then."""
    model = adapted(tiny, kind, num_hidden_layers=1)
    ids = text(tiny, model)
    expected = logits(model, ids, joined(tiny, model))
    layer = model.model.layers[0].self_attn.k_proj.base_layer
    if (x := getattr(layer, name)) is not None:
        setattr(layer, name, nn.Parameter(x.detach().clone(), requires_grad=False))
    found = joined(tiny, model)
    ops.clear()
    torch.testing.assert_close(logits(model, ids, found), expected)
    assert ops.new() == [("gated_expand", n) for n in (3, 1, 2, 1)]


def float32_in_bfloat16(model: Any, a: nn.Linear) -> None:
    model.to(torch.bfloat16)
    for layer in model.mtpkern_siblings.layers:
        layer.lora_A.float()


def hooked(model: Any, a: nn.Linear) -> None:
    a.register_forward_hook(lambda module, args, output: output)


def held_elsewhere(model: Any, a: nn.Linear) -> None:
    model.register_buffer("alias", a.weight.data)


def part_of_more(model: Any, a: nn.Linear) -> None:
    a.weight.data = torch.cat([a.weight.data] * 2)[: len(a.weight)]


def trained(model: Any, a: nn.Linear) -> None:
    a.weight.requires_grad_().grad = torch.zeros_like(a.weight)


@pytest.mark.parametrize(
    "change", [float32_in_bfloat16, hooked, held_elsewhere, part_of_more, trained], ids=lambda f: f.__name__
)
def test_what_cannot_ride_takes_two_launches(change: Any, tiny: SimpleNamespace, ops: Ops, read: list[int]) -> None:
    """Its siblings' weights lie together all the same, and are not moved again and again."""
    model = adapted(tiny, num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    change(model, mlp.up_proj.lora_A["default"])
    ids, place = text(tiny, model), mlp.up_proj.lora_A["default"].weight.data_ptr()
    expected = logits(model, ids)
    found = joined(tiny, model)
    assert mlp.up_proj.lora_A["default"].weight.data_ptr() == place
    assert whole_of((mlp.gate_proj.base_layer, mlp.up_proj.base_layer)) is not None
    ops.clear()
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if model.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(logits(model, ids, found), expected, **tolerance)
    seen = [name for name, _ in ops.new()]
    if change is float32_in_bfloat16:
        assert seen == ["gated_lora"] * 4
        assert read == [64, 96]
    else:
        assert seen == ["gated_expand", "gated_expand", "gated_lora", "gated_expand"]
        assert read == [64 + 12, 32 + 4, 96, 32 + 4]
    before = fingerprint(model)
    joined(tiny, model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("at", [1, 3, 5])
def test_memory_that_runs_out_is_no_error(
    at: int, tiny: SimpleNamespace, joins: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group moves at a time; those that come behind stay, and the tokens are the same."""
    model, moved, original = adapted(tiny), [], products._join
    joins[0] = False
    expected = generate(tiny, model)
    joins[0] = True

    def failing(*args: Any) -> None:
        moved.append(0)
        if len(moved) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(products, "_join", failing)
        assert torch.equal(generate(tiny, model), expected)
    assert len(moved) == at
    assert torch.equal(generate(tiny, model), expected)


def test_another_threads_pass_is_its_own(tiny: SimpleNamespace, ops: Ops) -> None:
    model = adapted(tiny)
    ids = text(tiny, model)
    expected, got = logits(model, ids), list[Tensor]()
    found = joined(tiny, model)
    with torch.inference_mode(), gated(model, ids), found():
        ops.clear()
        thread = Thread(target=lambda: got.append(logits(model, ids)))
        thread.start()
        thread.join()
        assert {name for name, _ in ops.new()} == {"gated_lora"}
        assert torch.equal(got[0], expected)
        model(ids, use_cache=False)
        assert {name for name, _ in ops.new()} == {"gated_expand"}


def test_what_came_along_is_of_that_very_tensor_and_taken_once(tiny: SimpleNamespace, ops: Ops) -> None:
    """Another one's x A^T is not in it; and nothing of a product is held when all have fetched their part."""
    model = adapted(tiny, num_hidden_layers=1)
    ids = text(tiny, model)
    found, layer = joined(tiny, model), model.model.layers[0].mlp.down_proj
    x, other = torch.randn(2, *ids.shape, 48, generator=torch.Generator().manual_seed(0))
    rows = ids == gate_of(model).mask_token_id
    with torch.inference_mode(), gated(model, ids):
        expected = layer(other)
        with found():
            y = layer.base_layer(other)
            layer.base_layer(x)
            siblings.adapt([y], other, rows, [layer], ["default"])
            torch.testing.assert_close(y, expected)
            ops.clear()
            model(ids, use_cache=False)
            assert {name for name, _ in ops.new()} == {"gated_expand"}
            turns = [vars(module).get("mtpkern_turn") for module in model.modules()]
            assert any(turns)
            assert all(turn is None or turn.left is None for turn in turns)


def test_a_copy_that_is_made_in_a_pass_is_a_model(tiny: SimpleNamespace) -> None:
    """Its products are of its own weights, whatever is written into them."""
    model = adapted(tiny)
    ids = text(tiny, model)
    found = joined(tiny, model)
    with torch.inference_mode(False), gated(model, ids), found():
        twin = copy.deepcopy(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*twin.model.layers.parameters(), *other.model.layers.parameters()):
            parameter.mul_(-1.5)
    expected = logits(other, ids)
    torch.testing.assert_close(logits(twin, ids), expected)
    torch.testing.assert_close(logits(twin, ids, joined(tiny, twin)), expected)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow("riders::test_few_forms_serve_all_layers"))]
)
def test_few_forms_serve_all_layers(
    backend: str, tiny: SimpleNamespace, joins: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than where each layer is its own product, and the op of the second half in them."""
    names: list[list[str]] = []

    def compile_(module: Any, inputs: Any) -> Any:
        names.append([str(node.target) for node in module.graph.nodes])
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def counted(word: str) -> int:
        return sum(word in name for form in names for name in form)

    monkeypatch.setattr(layers, "BACKEND", compile_)
    model = adapted(tiny, num_hidden_layers=3)
    joins[0] = False
    expected = generate(tiny, model, compile=True)
    forms = len(names)
    assert counted("gated_lora")
    assert not counted("gated_expand")
    names.clear()
    joins[0] = True
    for _ in range(2):
        assert torch.equal(generate(tiny, model, compile=True), expected)
        assert len(names) <= forms
        assert counted("gated_expand") == 4
        assert not counted("gated_lora")
