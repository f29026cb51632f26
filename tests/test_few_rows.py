"""Products of few rows as our kernel's while a pass runs: the same tokens, and a model that is what it was."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import ConfAdapt, Verified, layers, products
from mtpkern.adapter import gated
from mtpkern.products import Products


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows, and rows of the weight, of each product that is ours."""
    seen: list[tuple[int, int]] = []

    def count(x: Tensor, weight: Tensor, bias: Any, counters: Tensor) -> Tensor:
        seen.append((x[..., 0].numel(), len(weight)))
        assert counters.dtype == torch.int32
        assert not counters.any()
        return op(x, weight, bias, counters)

    op = products.few_rows_linear
    monkeypatch.setattr(products, "few_rows_linear", count)
    return seen


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_WEIGHT", 0)


@pytest.fixture
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def found(model: Any, ids: Tensor, *, siblings: bool, few_rows: int = 16) -> Products:
    one = Products(siblings, few_rows)
    with torch.inference_mode(), one.sought(model):
        model(ids)
    return one


def logits(model: Any, ids: Tensor, block: Products | None = None) -> Tensor:
    with torch.inference_mode(), (block or Products(wanted=False))():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("siblings", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"), [("llama", {"attention_bias": True}), ("qwen3", {"tie_word_embeddings": True})], ids=str
)
def test_all_products_of_a_pass_and_its_head(
    kind: str, settings: dict[str, Any], siblings: bool, tiny: SimpleNamespace, multiplied: list[tuple[int, int]]
) -> None:
    model = tiny.model(kind, **settings)
    ids, _ = tiny.prompts(7, 7)
    expected = logits(model, ids)
    block = found(model, ids, siblings=siblings)
    assert not multiplied
    torch.testing.assert_close(logits(model, ids, block), expected)
    layer = [64, 32, 96, 32] if siblings else [32, 16, 16, 32, 48, 48, 32]
    assert multiplied == [(14, N) for N in [*layer * 2, tiny.vocabulary]]
    assert torch.equal(logits(model, ids), expected)
    assert len(multiplied) == 2 * len(layer) + 1
    assert not any(name.startswith(("mtpkern", "forward")) for m in model.modules() for name in vars(m))


def test_more_rows_are_torchs(tiny: SimpleNamespace, multiplied: list[tuple[int, int]]) -> None:
    model = tiny.model("llama")
    ids, _ = tiny.prompts(9, 9)
    assert torch.equal(logits(model, ids, found(model, ids, siblings=False)), logits(model, ids))
    assert not multiplied


def test_what_has_become_another_kind_of_layer_is_left_alone(
    tiny: SimpleNamespace, multiplied: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with a hook since, one that has a forward of its own, a weight that is another now; and untested models."""
    model = tiny.model("llama", num_hidden_layers=1)
    ids, _ = tiny.prompts(5)
    block = found(model, ids, siblings=False)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    handle = mlp.up_proj.register_forward_hook(lambda module, args, output: -output)
    forward = vars(mlp.down_proj)["forward"] = lambda x: torch.nn.functional.linear(x, mlp.down_proj.weight.neg())
    attention.o_proj.weight = torch.nn.Parameter(-attention.o_proj.weight.detach())
    torch.testing.assert_close(logits(model, ids, block), logits(model, ids))
    assert [N for _, N in multiplied] == [32, 16, 16, 32, 48, tiny.vocabulary]
    assert vars(mlp.down_proj)["forward"] is forward
    handle.remove()
    monkeypatch.setattr("mtpkern.model.TESTED", ())
    assert found(model, ids, siblings=False).counters is None


def test_weights_that_nobody_has_timed_are_torchs(
    tiny: SimpleNamespace, multiplied: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LEAST_WEIGHT", 48 * 32)
    model = tiny.model("llama")
    ids, _ = tiny.prompts(5)
    logits(model, ids, found(model, ids, siblings=False))
    assert set(multiplied) == {(5, 48), (5, 32)}  # gate and up; down


def test_unasked_nowhere(
    tiny: SimpleNamespace, multiplied: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In captured passes on Hopper, where it has been timed; nowhere on a CPU."""
    device = torch.device("cuda", 0)
    for capability, rows in (((9, 0), products.FEW_ROWS), ((8, 9), 0), ((10, 0), 0)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr("torch.version.cuda", "13.0")
        products._is_hopper.cache_clear()
        assert [products.few_rows(True, device), products.few_rows(False, device)] == [rows, 0]
    products._is_hopper.cache_clear()
    ids, _ = tiny.prompts(5)
    mtpkern.generate(tiny.model("llama"), ids, strategy=Verified(3), max_new_tokens=4, check_model=False)
    assert not multiplied


@pytest.mark.parametrize("siblings", [False, True])
def test_below_a_gated_adapter(siblings: bool, tiny: SimpleNamespace, multiplied: list[tuple[int, int]]) -> None:
    model = tiny.adapted(tiny.model("llama")).get_base_model()
    ids, _ = tiny.prompts(5)
    ids = torch.cat([ids, ids.new_full((1, 3), model.mtpkern_gate.mask_token_id)], dim=1)
    with gated(model, ids):
        expected = logits(model, ids)
    block = found(model, ids, siblings=siblings)
    with gated(model, ids):
        torch.testing.assert_close(logits(model, ids, block), expected)
    # With the adapter's, of rank 4 each, where these ride along.
    layer = [64 + 12, 32 + 4, 96 + 8, 32 + 4] if siblings else [32, 16, 16, 32, 48, 48, 32]
    assert multiplied == [(8, N) for N in [*layer * 2, tiny.vocabulary]]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.slow("few_rows::test_all_products_of_a_pass_and_its_head")
def test_compiled_layers_call_the_op(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as few forms as without; the head, which is not compiled, beside them."""
    ours: list[int] = []

    def compile_(module: Any, inputs: Any) -> Any:
        ours.append(sum("few_rows_linear" in str(node.target) for node in module.graph.nodes))
        return torch._dynamo.lookup_backend("eager")(module, inputs)

    def run(few: int) -> Tensor:
        monkeypatch.setattr("mtpkern.decoder.few_rows", lambda *_: few)
        ids, mask = tiny.prompts(9, 4)
        options = {"strategy": ConfAdapt(3, threshold=0.15), "max_new_tokens": 12, "check_model": False}
        return mtpkern.generate(model, ids, attention_mask=mask, compile=True, **options)

    monkeypatch.setattr(layers, "BACKEND", compile_)
    monkeypatch.setattr("mtpkern.decoder.wants_one_product", lambda captured: True)
    model = tiny.model("llama", num_hidden_layers=3)
    expected = run(0)
    without = len(ours)
    assert ours
    assert not any(ours)
    assert torch.equal(run(64), expected)
    assert len(ours) <= 2 * without
    # Of the forms of a layer, one for all layers of a kind: before and behind its attention.
    assert sum(ours) >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_in_a_graph(compile: bool, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and replayed: near what torch's products make, the same again, and counters that are zeros."""
    monkeypatch.setattr("mtpkern.decoder.few_rows", lambda *_: 64)
    model = tiny.model("llama", hidden_size=256, intermediate_size=2048).to("cuda", torch.bfloat16)
    ids, mask = (x.to("cuda") for x in tiny.prompts(9, 4))
    block = found(model, ids[:1], siblings=False, few_rows=64)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, block), expected, rtol=5e-2, atol=5e-2)
    assert not block.counters.any()
    options: dict[str, Any] = {"attention_mask": mask, "strategy": ConfAdapt(3, threshold=0.15), "max_new_tokens": 24}
    # The first pass of all runs as it is, and rounds as torch's products do.
    mtpkern.generate(model, ids, compile=compile, check_model=False, **options)
    first = mtpkern.generate(model, ids, compile=compile, check_model=False, **options)
    for _ in range(2):
        assert torch.equal(mtpkern.generate(model, ids, compile=compile, check_model=False, **options), first)
    mtpkern.release_graphs(model)
