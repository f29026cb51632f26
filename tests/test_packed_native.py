"""16-bit models on a processor that has products of 16 bits: copies of the same bits, read as those of float32 are."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import mtpkern
from mtpkern import Static, Verified, packed, packed_weights
from mtpkern.packed import PackedProducts, packs
from mtpkern.packed_weights import Packed, pack
from support.packing import assert_gated_rows_alone_change, error, generate, noted

HALVES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not packed_weights.has_packed_products(dtype), reason=f"no {dtype} products")
    )
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.fixture(autouse=True)
def having(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small weights and short runs too, and both types, where oneDNN can multiply them at all."""
    monkeypatch.setattr(packed, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(packed, "LEAST_TOKENS", 1)
    monkeypatch.setattr(packed_weights, "has_products", lambda dtype: dtype != torch.float32 or None)
    yield
    mtpkern.release_graphs()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_logits_are_as_near_to_the_truth_as_torchs(
    name: str, dtype: torch.dtype, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ours, products = tiny.model(name).to(dtype), PackedProducts(), noted(monkeypatch)
    for length in (1, 9, 150):
        ids = tiny.prompts(length)[0]
        with torch.inference_mode():
            torchs = model(ids).logits
            with ours.sought(model):
                model(ids)
            products.clear()
            with ours():
                found = model(ids).logits
            truth = model.double()(ids).logits
        model.to(dtype)
        assert products
        assert found.dtype == dtype
        assert error(found, truth) <= 1.2 * error(torchs, truth)
        ours = PackedProducts()


@pytest.mark.parametrize("dtype", HALVES)
def test_copies_take_the_bytes_of_the_weights_and_weights_stay(
    dtype: torch.dtype, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, products = tiny.model("llama").to(dtype), noted(monkeypatch)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    tokens = generate(tiny, model, strategy=Static(1))
    assert 3 in {shape[:-1].numel() for shape in products}
    assert all(torch.equal(x, before[key]) and x.dtype == before[key].dtype for key, x in model.state_dict().items())
    copies = packed_weights.packed_of[model]
    assert {copy.dtype for copy in copies} == {dtype}
    weights = [layer.weight for copy in copies for ref in copy.layers if (layer := ref()) is not None]
    assert sum(map(packed_weights._bytes_of_copy, weights)) == sum(weight.nbytes for weight in weights)
    assert torch.equal(generate(tiny, model, strategy=Static(1)), tokens)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_a_gated_adapter_changes_its_rows_and_no_others(
    adapter: torch.dtype, dtype: torch.dtype, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = noted(monkeypatch)
    assert_gated_rows_alone_change(tiny, dtype, adapter)
    assert products


@pytest.mark.parametrize("dtype", HALVES)
def test_copies_follow_the_weights(dtype: torch.dtype, tiny: SimpleNamespace) -> None:
    model = tiny.model("llama").to(dtype)
    generate(tiny, model)
    model.model.layers[0].mlp.down_proj.weight.data.neg_()
    assert torch.equal(generate(tiny, model, strategy=Static(1)), _without(tiny, model))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("adapted", [False, True])
def test_copies_follow_the_dtype_of_the_same_values(adapted: bool, dtype: torch.dtype, tiny: SimpleNamespace) -> None:
    model = tiny.model("llama").to(dtype)
    model = tiny.adapted(model) if adapted else model
    generate(tiny, model)
    generate(tiny, model.float())
    (copies,) = packed_weights.packed_of.values()
    assert {copy.dtype for copy in copies} == {torch.float32}
    assert torch.equal(generate(tiny, model, strategy=Static(1)), _without(tiny, model))


def _without(tiny: SimpleNamespace, model: nn.Module) -> Tensor:
    """Anew, with copies that know of nothing."""
    mtpkern.release_graphs()
    return generate(tiny, model, strategy=Static(1))


def test_what_is_copied_as_what(monkeypatch: pytest.MonkeyPatch, tiny: SimpleNamespace) -> None:
    monkeypatch.setattr(packed_weights, "has_packed_products", lambda dtype: True)
    known: dict[torch.dtype, bool | None] = {torch.bfloat16: True, torch.float16: False}
    monkeypatch.setattr(packed_weights, "has_products", known.get)
    copied = {dtype: packed_weights.dtype_of_copies(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert copied == {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
    # Nobody has measured what is better on this processor.
    monkeypatch.setattr(packed_weights, "has_products", lambda dtype: None)
    assert packed_weights.dtype_of_copies(torch.bfloat16) is None
    assert packed_weights.dtype_of_copies(torch.float32) == torch.float32
    assert packed_weights.dtype_of_copies(torch.float64) is None
    assert not packs(tiny.model("llama").to(torch.bfloat16), 1000)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_is_what_the_layer_s_would_be(dtype: torch.dtype) -> None:
    layer = nn.Linear(72, 50, dtype=dtype)
    copy = Packed.of([layer])
    for rows in (1, 2, 7, 40):
        x = torch.randn(1, rows, 72, dtype=dtype)
        with torch.inference_mode():
            y = packed_weights.product(x, copy.weight, copy.bias)
            truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
            assert y.dtype == dtype
            assert error(y, truth) <= 2 * error(layer(x), truth)


@pytest.mark.parametrize("dtype", HALVES)
def test_drafts_are_confirmed_over_them(dtype: torch.dtype, tiny: SimpleNamespace) -> None:
    model = tiny.model("llama").to(dtype)
    plain, drafted = (generate(tiny, model, strategy=way) for way in (Static(1), Verified(4, threshold=0.0)))
    # Near-ties of a random model apart, which fall as the number of rows has them.
    assert (plain[:, :12] == drafted[:, :12]).float().mean() > 0.8


@pytest.mark.parametrize("dtype", HALVES)
def test_copies_that_are_right_stay_and_so_does_what_was_recorded(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[nn.Module] = []
    monkeypatch.setattr(packed_weights, "forget", forgotten.append)
    model, layers = nn.Module(), [nn.Linear(24, n).to(dtype) for n in (8, 16)]
    first = pack(model, [[layer] for layer in layers])  # type: ignore[arg-type]
    for _ in range(2):
        again = pack(model, [[layer] for layer in layers])  # type: ignore[arg-type]
        assert all(a is b is not None for a, b in zip(again, first, strict=True))
    assert not forgotten
    with torch.no_grad():
        layers[0].weight.neg_()
    one, other = pack(model, [[layer] for layer in layers])  # type: ignore[arg-type]
    assert (one is first[0], other is first[1]) == (False, True)
    assert forgotten == [model]
    pack(model, [layers[1:]])  # type: ignore[list-item]
    assert forgotten == [model, model]
