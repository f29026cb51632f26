"""16-bit models on a processor without 16-bit products: float32 copies are read in every pass, the prefill's too."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mtpkern
from mtpkern import Static, Verified, packed, packed_weights
from mtpkern.kernels.form import has_products
from mtpkern.packed import PackedProducts, packs
from support.packing import assert_gated_rows_alone_change, error, generate, noted

pytestmark = pytest.mark.skipif(not packed_weights.has_packed_products(torch.float32), reason="torch without oneDNN")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def lacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor as if it had none, whatever it has."""
    monkeypatch.setattr(packed_weights, "has_products", lambda dtype: False if dtype in HALVES else None)
    yield
    mtpkern.release_graphs()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what each product over packed weights has read."""
    return noted(monkeypatch)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_logits_are_at_least_as_near_to_the_truth_as_torchs(
    name: str, dtype: torch.dtype, tiny: SimpleNamespace, products: list[torch.Size]
) -> None:
    model = tiny.model(name).to(dtype)
    ids = tiny.prompts(150)[0]
    ours = PackedProducts()
    with torch.inference_mode():
        torchs = model(ids).logits
        with ours.sought(model):
            first = model(ids).logits
        assert products
        products.clear()
        with ours():
            later = model(ids).logits
        truth = model.double()(ids).logits
    if name != "phi3":  # which joins them itself
        assert len(products) < len([x for x in model.modules() if isinstance(x, nn.Linear)]), "siblings are joined"
    for found in (first, later):
        assert found.dtype == dtype
        assert error(found, truth) <= 1.1 * error(torchs, truth)


def test_every_pass_reads_them_and_weights_stay(tiny: SimpleNamespace, products: list[torch.Size]) -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    tokens = generate(tiny, model, strategy=Static(1))
    plain = [x for x in model.modules() if isinstance(x, nn.Linear)]
    assert max(shape[:-1].numel() for shape in products) == 9 + 6 + 4, "the prefill reads them"
    assert len([shape for shape in products if shape[:-1].numel() == 3]) >= 11
    assert all(torch.equal(x, before[key]) and x.dtype == before[key].dtype for key, x in model.state_dict().items())
    assert not any("forward" in vars(x) for x in plain)
    products.clear()
    assert torch.equal(generate(tiny, model, strategy=Static(1)), tokens)
    assert products


@pytest.mark.parametrize("adapter", [*HALVES, torch.float32])
def test_a_gated_adapter_changes_its_rows_and_no_others(
    adapter: torch.dtype, tiny: SimpleNamespace, products: list[torch.Size]
) -> None:
    assert_gated_rows_alone_change(tiny, torch.bfloat16, adapter)
    assert products


@pytest.mark.parametrize("dtype", HALVES)
def test_the_least_change_of_a_weight_or_bias_is_seen(dtype: torch.dtype, tiny: SimpleNamespace) -> None:
    layer = nn.Linear(577, 193, dtype=dtype)
    before = packed_weights._look([layer])
    for tensor in (layer.weight, layer.bias):
        for at in (0, tensor.numel() // 2, -1):
            bits = tensor.data.view(torch.int16).flatten()
            bits[at] ^= 1
            assert not torch.equal(packed_weights._look([layer]), before)
            bits[at] ^= 1
    assert torch.equal(packed_weights._look([layer]), before)


def test_a_model_that_changes_its_dtype_is_followed(tiny: SimpleNamespace, products: list[torch.Size]) -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16):
        model.to(dtype)
        products.clear()
        generate(tiny, model, max_new_tokens=packed.LEAST_TOKENS if dtype == torch.float32 else 5)
        assert bool(products) == (dtype in HALVES), dtype  # these weights are small: torch's in float32


@pytest.mark.parametrize("between", ["no memory", "another dtype", "a failure", "gradients"])
def test_siblings_are_joined_whatever_came_between(
    between: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, model = (tiny.model("llama").to(torch.bfloat16) for _ in range(2))
    generate(tiny, fresh)
    if between == "no memory":
        with monkeypatch.context() as patch:
            patch.setattr(packed_weights, "available_memory", lambda device: 0)
            generate(tiny, model)
    elif between == "another dtype":
        generate(tiny, model.to(torch.float64), max_new_tokens=packed.LEAST_TOKENS)
        model.to(torch.bfloat16)
    elif between == "gradients":
        model(tiny.prompts(4)[0]).logits.sum().backward()
        generate(tiny, model)
        model.zero_grad()
    else:
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: {}["asked for"])
        with pytest.raises(KeyError):
            generate(tiny, model)
        handle.remove()
    generate(tiny, model)
    ours, wanted = (sorted(len(x.layers) for x in packed_weights.packed_of[one]) for one in (model, fresh))
    assert ours == wanted == [1, 1, 1, 1, 1, 2, 2, 3, 3]


def test_a_row_by_itself_is_torchs(tiny: SimpleNamespace, products: list[torch.Size]) -> None:
    """Which reads half as many bytes for it."""
    model, ids = tiny.model("llama").to(torch.bfloat16), tiny.prompts(9)[0]
    mtpkern.generate(model, ids, strategy=Verified(4), max_new_tokens=24, check_model=False)  # makes the copies
    products.clear()
    mtpkern.generate(model, ids, strategy=Static(1), max_new_tokens=24, check_model=False)
    assert {shape[:-1].numel() for shape in products} == {9}, "the prompt's alone"


def test_a_processor_that_has_them_is_left_to_torch(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, products: list[torch.Size]
) -> None:
    monkeypatch.setattr(packed_weights, "has_products", lambda dtype: None)
    generate(tiny, tiny.model("llama").to(torch.bfloat16), max_new_tokens=packed.LEAST_TOKENS)
    assert not products


def test_what_a_run_must_be_long_for(tiny: SimpleNamespace) -> None:
    assert has_products.__wrapped__(torch.float32) is None
    model = tiny.model("llama").to(torch.float16)
    assert packs(model, packed.LEAST_OF_A_RUN)
    assert not packs(model, packed.LEAST_OF_A_RUN - 1)
