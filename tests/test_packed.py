"""Products over weights laid out for few rows: the same tokens, weights as they were, copies that keep up."""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, packed, packed_weights
from mtpkern.adapter import gated
from mtpkern.packed import PackedProducts, packs
from mtpkern.packed_weights import pack
from mtpkern.pool import decoder_for
from mtpkern.recordings import rows_in
from support.packing import generate, noted

pytestmark = pytest.mark.skipif(not packed_weights.has_packed_products(torch.float32), reason="torch without oneDNN")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small weights and short runs too."""
    monkeypatch.setattr(packed, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(packed, "LEAST_TOKENS", 1)
    # Whatever this processor has: 16 bits are test_packed_half.py's.
    monkeypatch.setattr(packed_weights, "has_products", lambda dtype: None)
    yield
    mtpkern.release_graphs()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """What each product over packed weights has read."""
    return noted(monkeypatch)


def plain(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Tensor:
    """The same by torch's own products."""
    with monkeypatch.context() as patch:
        patch.setattr("mtpkern.decoder.packs", lambda *args: False)
        return generate(*args, **options)


def found_in(tiny: SimpleNamespace, model: Any) -> PackedProducts:
    products = PackedProducts()
    with torch.inference_mode(), products.sought(model):
        model(tiny.prompts(5)[0])
    return products


def copies(model: Any) -> list[packed_weights.Packed]:
    return list(packed_weights.packed_of.get(model, ()))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_torchs_products(
    name: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, read: list[torch.Size]
) -> None:
    model = tiny.model(MODELS[name][0], **MODELS[name][1])
    before = {key: x.clone() for key, x in model.state_dict().items()}
    for strategy in (Verified(4, threshold=0.2, masks=2), ConfAdapt(3, threshold=0.1), Static(1)):
        wanted = plain(monkeypatch, tiny, model, strategy=strategy)
        assert not read
        assert torch.equal(generate(tiny, model, strategy=strategy), wanted), strategy
        assert read, "nothing was packed"
        read.clear()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert not any("forward" in vars(module) or "mtpkern_packed" in vars(module) for module in model.modules())


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,down_proj"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_gated_adapter_changes_its_rows_and_no_others(
    targets: str, prompts: int, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, read: list[torch.Size]
) -> None:
    model = tiny.adapted(tiny.model("llama"), targets=targets)
    base = model.get_base_model()
    wanted = plain(monkeypatch, tiny, model, strategy=Verified(4, threshold=0.0))
    assert torch.equal(generate(tiny, model, strategy=Verified(4, threshold=0.0)), wanted)
    assert read
    products = found_in(tiny, base)
    mask = mtpkern.adapter.gate_of(base).mask_token_id
    ids = torch.cat([tiny.prompts(3)[0], torch.tensor([[mask, mask]])], 1).repeat(prompts, 1)
    with torch.inference_mode(), gated(base, ids):
        torchs = base(ids, use_cache=False).logits
    with torch.inference_mode(), products(), gated(base, ids):
        ours = base(ids, use_cache=False).logits
    with torch.inference_mode(), products():
        unadapted = base(ids.where(ids != mask, 0), use_cache=False).logits
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[:, :3], unadapted[:, :3])
    assert not torch.allclose(torchs[:, 3:], unadapted[:, 3:], atol=1e-2), "the adapter does nothing"


def test_nothing_in_an_adapter_reaches_other_rows(tiny: SimpleNamespace) -> None:
    model = tiny.adapted(tiny.model("llama")).get_base_model()
    mask = mtpkern.adapter.gate_of(model).mask_token_id
    ids = torch.tensor([[5, 6, mask, 7, mask]])
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(1, 5, layer.in_features)
    found = []
    for poison in (False, True):
        if poison:
            for low in (layer.lora_A, layer.lora_B):
                low["default"].weight.data.fill_(float("nan"))
        products = found_in(tiny, model)
        with torch.inference_mode(), products(), gated(model, ids):
            found.append(layer(x)[0])
    assert found[1][[2, 4]].isnan().all()
    assert not found[0].isnan().any()
    assert torch.equal(found[0][[0, 1, 3]], found[1][[0, 1, 3]])


@pytest.mark.parametrize("write", ["data", "row", "value", "step", "load", "other"])
def test_copies_follow_the_weights(
    write: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, read: list[torch.Size]
) -> None:
    model = tiny.model("llama", layers=2)
    generate(tiny, model)
    before = copies(model)
    assert before
    generate(tiny, model)
    assert all(a is b for a, b in zip(copies(model), before, strict=True)), "made again without a reason"
    layer = model.model.layers[1].mlp.down_proj
    if write == "data":
        layer.weight.data = torch.randn_like(layer.weight)
    elif write == "row":
        model.lm_head.weight.data[3] += 1.0
    elif write == "value":
        layer.weight.data[5, 7] += 1e-3
    elif write == "step":
        with torch.no_grad():
            layer.weight.mul_(1.5)
    elif write == "load":
        model.load_state_dict({key: x.flip(0) for key, x in model.state_dict().items()})
    else:
        model.model.layers[1].mlp.down_proj = nn.Linear(layer.in_features, layer.out_features, bias=False).eval()
    del layer
    if write == "other":
        gc.collect()  # of the replaced layer nothing is left
    read.clear()
    wanted = plain(monkeypatch, tiny, model)
    assert torch.equal(generate(tiny, model), wanted)
    assert read
    after = copies(model)
    kept = sum(a is b for a in before for b in after)
    assert kept == (0 if write == "load" else len(before) - 1), "what was written to, and that alone, is copied again"


def test_copies_go_with_the_model_and_when_asked(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    generate(tiny, model)
    assert copies(model)
    mtpkern.release_graphs(model)
    assert not copies(model)
    generate(tiny, model)
    held = len(packed_weights.packed_of)
    del model
    gc.collect()
    assert len(packed_weights.packed_of) == held - 1


def test_a_model_that_has_moved_leaves_nothing_on_the_host(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    generate(tiny, model)
    assert model in packed_weights.packed_of
    model.to("meta")
    run: dict[str, Any] = {"tokens": 8, "max_new_tokens": 4, "use_graph": False, "check_model": False, "by_load": False}
    nothing = decoder_for(model, Static(1), torch.tensor([-1]), **run, prefill=lambda decoder: None, batch=1)
    with pytest.raises(RuntimeError, match="autocast"), nothing:  # on a device on which nothing decodes
        pass
    assert model not in packed_weights.packed_of


def test_without_memory_nothing_is_copied(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, read: list[torch.Size]
) -> None:
    model = tiny.model("llama")
    wanted = plain(monkeypatch, tiny, model)
    needed = sum(x.weight.nbytes for x in model.modules() if isinstance(x, nn.Linear))
    monkeypatch.setattr(packed_weights, "available_memory", lambda device: packed_weights.FREE_PART * needed - 1)
    assert torch.equal(generate(tiny, model), wanted)
    assert not read
    assert not copies(model)
    monkeypatch.setattr(packed_weights, "available_memory", lambda device: packed_weights.FREE_PART * needed)
    assert torch.equal(generate(tiny, model), wanted)
    assert read
    assert copies(model)


def test_a_container_s_limit_counts(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: list[torch.Size]
) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr(mtpkern.memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("0")
    for there, copied in ((100_000, False), (10**9, True)):
        (tmp_path / "memory.max").write_text(str(there))
        generate(tiny, model)
        assert bool(read) == bool(copies(model)) == copied


def test_a_bias_that_comes_or_goes_parts_siblings(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    layer = model.model.layers[0].self_attn.k_proj
    for bias in (nn.Parameter(torch.randn(layer.out_features)), None):
        generate(tiny, model)
        layer.bias = bias
        assert torch.equal(generate(tiny, model), plain(monkeypatch, tiny, model))
        assert sorted(len(one.layers) for one in copies(model)).count(3) == (2 if bias is None else 1)


def test_sizes_are_those_of_the_weights(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, read: list[torch.Size]
) -> None:
    """As pruning leaves them, where it does not tell the layers."""
    model = tiny.model("llama")
    generate(tiny, model)
    mlp = model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight.data = layer.weight.data[:24].clone()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :24].clone()
    read.clear()
    wanted = plain(monkeypatch, tiny, model)
    assert torch.equal(generate(tiny, model), wanted)
    assert read


def test_channels_of_zeros_may_go(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pruning leaves them, until somebody takes them out."""
    model = tiny.model("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight.data[:, 24:] = 0
    generate(tiny, model)
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight.data = layer.weight.data[:24].clone()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :24].clone()
    assert torch.equal(generate(tiny, model), plain(monkeypatch, tiny, model))


def test_rows_that_go_from_one_sibling_to_the_next_are_noticed() -> None:
    layers = [nn.Linear(32, n, bias=False) for n in (24, 8)]
    copied = packed_weights.Packed.of(layers)
    assert copied.is_of(layers)
    both = torch.cat([layer.weight.data for layer in layers])
    for layer, rows in zip(layers, both.split(16)):
        layer.weight.data = rows.clone()
    assert not copied.is_of(layers)


def test_what_is_not_plain_stays_torchs(tiny: SimpleNamespace, read: list[torch.Size]) -> None:
    hooked, half = tiny.model("llama"), tiny.model("llama").to(torch.bfloat16)
    handles = [x.register_forward_hook(lambda *args: None) for x in hooked.modules() if isinstance(x, nn.Linear)]
    for model in (hooked, half):
        generate(tiny, model)
    cast = tiny.model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        generate(tiny, cast)
    assert not read
    assert not copies(cast), "which nothing would read"
    for handle in handles:
        handle.remove()
    generate(tiny, hooked)
    assert read


def test_small_siblings_beside_large_ones_have_no_copies(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes() -> list[int]:
        model = tiny.model("llama")
        generate(tiny, model)
        return [copied.weight.numel() for copied in copies(model)]

    every = sizes()
    monkeypatch.setattr(packed, "LEAST_WEIGHT", max(every))
    assert min(every) < max(every)
    assert sizes() == [n for n in every if n == max(every)]


def test_an_adapter_that_is_switched_off_adds_nothing(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted(tiny.model("llama"))
    base = model.get_base_model()
    generate(tiny, model)
    with model.disable_adapter():
        assert torch.equal(generate(tiny, base), plain(monkeypatch, tiny, base))


@pytest.mark.parametrize("targets", [None, "all-linear", "v_proj", "gate_proj,k_proj"])
def test_a_prompts_many_rows_read_them_too(
    targets: str | None, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, read: list[torch.Size]
) -> None:
    model = tiny.adapted(tiny.model("llama"), targets) if targets else tiny.model("llama")
    wanted = plain(monkeypatch, tiny, model)
    for _ in range(2):  # the first shows who reads the same
        assert torch.equal(generate(tiny, model), wanted)
    prompt = tiny.prompts(5, 9)[0].numel()
    assert max(shape[:-1].numel() for shape in read) >= prompt


def test_a_short_run_copies_nothing(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    monkeypatch.undo()
    assert not packs(model, packed.LEAST_TOKENS)  # whose layers are small
    monkeypatch.setattr(packed, "LEAST_WEIGHT", 1)
    assert packs(model, packed.LEAST_TOKENS)
    packed.unpack(model)
    few = packed.LEAST_OF_A_RUN
    assert not packs(model, packed.LEAST_TOKENS - 2 * few)
    assert not packs(model, few)
    assert packs(model, few), "short runs add up"
    assert not packs(model, few - 1)
    packed.unpack()
    assert not packs(model, few)
    assert not packs(model.to("meta"), 1000)


def test_a_build_without_them_is_found_out(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_weights.has_packed_products.cache_clear()
    try:
        monkeypatch.setattr(packed_weights, "product", lambda x, weight, bias: x.new_zeros(1, 2, 4))
        assert not packs(tiny.model("llama"), 1000)
    finally:
        packed_weights.has_packed_products.cache_clear()


def test_error_is_that_of_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(2, dtype=torch.float64)
    for layer in [nn.Linear(577, n, bias=n > 1) for n in (1, 48, 193)]:
        (one,) = pack(nn.Module(), [[layer]])  # type: ignore[arg-type]
        assert one is not None
        for R in (1, 2, 3, 7, 16, 61, 128):
            x = torch.randn(1, R, 577, generator=generator)
            x[0, 0] = float("nan") if R > 1 else x[0, 0]
            with torch.inference_mode():
                truth = nn.functional.linear(
                    x.double(), *(None if p is None else p.double() for p in (layer.weight, layer.bias))
                )
                for i, y in enumerate((packed_weights.product(x, one.weight, one.bias), layer(x))):
                    squares[i] += (y - truth)[:, min(1, R - 1) :].square().mean()
    assert squares[0].sqrt() <= 2 * squares[1].sqrt()


def test_few_numbers_of_rows_come_for_all_lengths_of_prompts() -> None:
    """Of each oneDNN keeps half a megabyte for every form of a layer."""
    layer = nn.Linear(24, 8)
    copied, numbers = packed_weights.Packed.of([layer]), set[int]()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.mkldnn._linear_pointwise.default:
                numbers.add(args[0].shape[:-1].numel())
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Note():
        for shape in [(1, n) for n in range(1, 1025)] + [(3, 119), (119,), (0,)]:
            x = torch.randn(*shape, 24)
            torch.testing.assert_close(packed_weights.product(x, copied.weight, copied.bias), layer(x))
    assert max(numbers) == 1024
    assert len(numbers - {0}) == 16 + 6 * 8
    assert {rows_in(n, 192) for n in range(1, 193)} <= numbers, "passes have them filled up already"


def test_the_benchmark_compares_the_same_products() -> None:
    bench = pytest.importorskip("mtpkern.bench.packed")
    *_, table = bench.both_ways([(48, (32, 16)), (32, (48,))], (1, 5), 2)
    assert [row[0] for row in table.rows] == ["1", "5"]
    assert table.rows[0][1] == "1.00"


@pytest.mark.parametrize("around", ["bfloat16", "autocast", "cold autocast"])
def test_settings_of_the_process_are_no_matter(
    around: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, read: list[torch.Size]
) -> None:
    model = tiny.model("llama", vocab_size=17)
    if "cold" in around:
        packed_weights.has_packed_products.cache_clear()
    else:
        generate(tiny, model)
    before = copies(model)
    if around == "bfloat16":
        torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in around):
            assert torch.equal(generate(tiny, model), plain(monkeypatch, tiny, model))
    finally:
        torch.set_default_dtype(torch.float32)
    if before:
        assert all(a is b for a, b in zip(copies(model), before, strict=True))
    read.clear()
    generate(tiny, model)
    assert read


def test_an_unloaded_adapter_leaves_a_base_that_is_packed(tiny: SimpleNamespace, read: list[torch.Size]) -> None:
    base = tiny.model("llama")
    generate(tiny, base)
    wanted = len(copies(base))
    model = tiny.adapted(tiny.model("llama"))
    generate(tiny, model)
    bare = model.unload()
    generate(tiny, bare, mask_token_id=tiny.mask)
    assert len(copies(bare)) == wanted


def test_a_copy_that_is_made_in_a_pass_is_a_model(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    wanted = plain(monkeypatch, tiny, model)
    made: list[Any] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: made.append(copy.deepcopy(model)))
    generate(tiny, model, max_new_tokens=3)
    handle.remove()
    assert len(made) > 2
    other = made[-1]
    other.model.layers[0]._forward_hooks.clear()
    assert torch.equal(generate(tiny, other), wanted)


def test_the_callers_default_device_is_no_matter(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for all calls lies on the host, whoever makes it first."""
    packed_weights.has_packed_products.cache_clear()
    packed_weights._row.cache_clear()
    layer = nn.Linear(24, 8)
    with torch.device("meta"):
        assert packed_weights.has_packed_products(torch.float32)
        assert packed_weights.Packed.of([layer]).is_of([layer])
    assert packed_weights._row(24).device.type == "cpu"
