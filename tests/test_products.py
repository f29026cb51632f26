"""Layers that read the same tensor as one product: the same tokens, no second copy, and a model that is what it was."""

import copy
import io
from collections.abc import Callable, Iterator
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mtpkern
from mtpkern import ConfAdapt, Verified, layers, products, siblings
from mtpkern.adapter import gated
from mtpkern.attention import exclusive
from mtpkern.baked import fingerprint
from mtpkern.products import wants_one_product, whole_of
from support.riding import joined, logits

# Products of a decoder layer that several layers share: how many each.
SETTINGS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "llama": ("llama", {}, [3, 2]),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}, [3, 2]),
    "qwen2": ("qwen2", {}, [3, 2]),
    "qwen3": ("qwen3", {}, [3, 2]),
    "gemma3": ("gemma3_text", {}, [3, 2]),
    "cohere": ("cohere", {}, [3, 2]),
    "phi3": ("phi3", {}, []),
}


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also in passes that nobody captures."""
    monkeypatch.setattr("mtpkern.decoder.wants_one_product", lambda captured: True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of the weights that each common product has had."""
    seen: list[list[int]] = []

    def count(layers: Any, x: Tensor) -> Any:
        seen.append([layer.out_features for layer in layers])
        return product(layers, x)

    product = products._product
    monkeypatch.setattr(products, "_product", count)
    return seen


def generate(tiny: SimpleNamespace, model: Any, **options: Any) -> Tensor:
    ids, mask = tiny.prompts(9, 4)
    options = {"max_new_tokens": 8, "strategy": Verified(3, threshold=0.2), "check_model": False, **options}
    return mtpkern.generate(model, ids, attention_mask=mask, **options)


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes of all memory that parameters hold, by address."""
    found = (p.untyped_storage() for p in model.parameters())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_tokens_by_fewer_products(name: str, tiny: SimpleNamespace, rows: list[list[int]]) -> None:
    kind, settings, groups = SETTINGS[name]
    model, plain = (tiny.model(kind, **settings) for _ in range(2))
    ids, _ = tiny.prompts(7, 7)
    expected = logits(plain, ids)
    assert torch.equal(generate(tiny, model), generate(tiny, plain, use_graph=False))
    assert [len(x) for x in rows[: 2 * len(groups)]] == groups * 2
    found = joined(tiny, model)
    assert [[len(r().weight) for r in refs] for refs in found.found] == rows[: 2 * len(groups)]  # type: ignore
    torch.testing.assert_close(logits(model, ids, found), expected)
    # Without them each layer is its own, to the bit.
    assert torch.equal(logits(model, ids), expected)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["llama, biased", "qwen3"])
def test_weights_are_what_and_whose_they_were(name: str, tiny: SimpleNamespace, tmp_path: Any) -> None:
    """The same parameters, bits and bytes of memory and of files; copies and casts have memory of their own."""
    kind, settings, _ = SETTINGS[name]
    model = tiny.model(kind, **settings)
    model.save_pretrained(tmp_path / "before")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    held = storages(model)
    joined(tiny, model)
    attention = model.model.layers[1].self_attn
    assert whole_of([attention.q_proj, attention.k_proj, attention.v_proj]) is not None
    assert len(storages(model)) < len(held)
    assert sum(storages(model).values()) == sum(held.values())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name_, (parameter, bits) in before.items():
        assert after[name_] is parameter
        assert torch.equal(parameter, bits)
        assert parameter.requires_grad
        assert parameter.is_leaf
    model.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    assert_saved_whole(model, before, sum(held.values()))
    save_file(model.state_dict(), tmp_path / "state")
    assert all(torch.equal(x, before[name_][1]) for name_, x in load_file(tmp_path / "state").items())
    twin, half = copy.deepcopy(model), copy.deepcopy(model).half()
    for other in (twin, half):
        assert storages(other).keys().isdisjoint(storages(model))
        assert len(storages(other)) == len(held)
    model.double()  # in place
    assert sorted(storages(model).values()) == sorted(2 * n for n in held.values())


def assert_saved_whole(model: Any, before: dict[str, Any], size: int) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert len(file.getvalue()) < 1.5 * size + 40_000
    file.seek(0)
    loaded = torch.load(file)
    assert all(torch.equal(loaded[name], bits) for name, (_, bits) in before.items())


def test_training_goes_on(tiny: SimpleNamespace) -> None:
    """An optimizer that was made before steps the same parameters, and the next passes see it."""
    model, plain = tiny.model("llama"), tiny.model("llama")
    ids, _ = tiny.prompts(7)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    found = joined(tiny, model)
    for m, optimizer in zip((model, plain), optimizers):
        m(ids, labels=ids).loss.backward()
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p, q)
    torch.testing.assert_close(logits(model, ids, found), logits(plain, ids))


def test_release_graphs_gives_each_its_own_again(tiny: SimpleNamespace) -> None:
    """But where a call is running the model, whose graph holds the addresses; of one model or of all."""
    model, other = tiny.model("llama"), tiny.model("qwen3")
    ids, _ = tiny.prompts(7)
    expected, held = logits(model, ids), sorted(storages(model).values())
    parameters = list(model.parameters())
    generate(tiny, model)
    generate(tiny, other)
    places = storages(model).keys()
    for inside in (True, False):
        with exclusive(model):
            if inside:
                mtpkern.release_graphs(model)
            else:
                thread = Thread(target=mtpkern.release_graphs, args=(model,))
                thread.start()
                thread.join()
        assert storages(model).keys() == places
    mtpkern.release_graphs(model)
    assert sorted(storages(model).values()) == held
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(logits(model, ids), expected)
    assert not products._joined.get(model)
    assert products._joined[other]
    generate(tiny, model)
    mtpkern.release_graphs()
    assert not products._joined
    assert sorted(storages(model).values()) == held


def test_addresses_stay_between_calls(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    generate(tiny, model)
    before = fingerprint(model)
    generate(tiny, model, max_new_tokens=4)
    generate(tiny, model, strategy=ConfAdapt(2))
    assert fingerprint(model) == before


def hooked(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: None)


def own_forward(layer: Any) -> None:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)


def in_training(layer: Any) -> None:
    layer.train()


def trained(layer: Any) -> None:
    layer.weight.grad = torch.zeros_like(layer.weight)


def held_elsewhere(layer: Any) -> None:
    layer.register_buffer("alias", layer.weight.data)


def part_of_more(layer: Any) -> None:
    layer.weight.data = torch.cat([layer.weight.data] * 2)[: len(layer.weight)]


def biased(layer: Any) -> None:
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))


def another_kind(layer: Any) -> None:
    layer.__class__ = type("Linear4bit", (nn.Linear,), {})


def another_tensor(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(type("Quantised", (Tensor,), {})))


def inference(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)


def replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.data.clone())


ALONE = [hooked, own_forward, in_training, trained, held_elsewhere, part_of_more, biased, another_kind, another_tensor]


@pytest.mark.parametrize("change", [*ALONE, inference], ids=lambda change: change.__name__)
def test_layers_that_are_more_than_plain_are_left_alone(change: Callable[[Any], None], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    gate, up = model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj
    change(up)
    place = up.weight.data_ptr()
    expected = generate(tiny, tiny.model("llama"))
    assert torch.equal(generate(tiny, model), expected)
    assert whole_of([gate, up]) is None
    assert up.weight.data_ptr() == place
    other = model.model.layers[1].mlp
    assert whole_of([other.gate_proj, other.up_proj]) is not None


@pytest.mark.parametrize(
    "change", [own_forward, another_tensor, replaced, lambda up: up.double().float()], ids=lambda f: f.__name__
)
def test_what_changes_later_is_seen(
    change: Callable[[Any], None], tiny: SimpleNamespace, rows: list[list[int]]
) -> None:
    """Also new values where they were; other layers' products stay."""
    model = tiny.model("llama", num_hidden_layers=1)
    ids, _ = tiny.prompts(7)
    found = joined(tiny, model)
    up = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        up.weight.neg_()
    torch.testing.assert_close(logits(model, ids, found), logits(model, ids))
    assert rows == [[32, 16, 16], [48, 48]]
    change(up)
    rows.clear()
    torch.testing.assert_close(logits(model, ids, found), logits(model, ids))
    assert rows == [[32, 16, 16]]


def test_weights_that_have_changed_places_are_apart(tiny: SimpleNamespace) -> None:
    """In one buffer they still are, but what is read as one would be another's."""
    model = tiny.model("llama", num_hidden_layers=1)
    ids, _ = tiny.prompts(7)
    found, before = joined(tiny, model), logits(model, ids)
    mlp = model.model.layers[0].mlp
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    gate.data, up.data = up.data, gate.data
    assert whole_of([mlp.gate_proj, mlp.up_proj]) is None
    assert not torch.allclose(logits(model, ids), before)
    torch.testing.assert_close(logits(model, ids, found), logits(model, ids))


def test_tied_layers_and_untested_models_are_left_alone(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    generate(tiny, model)
    for layer in (first, second):
        assert whole_of([layer.mlp.gate_proj, layer.mlp.up_proj]) is None
    monkeypatch.setattr("mtpkern.model.TESTED", ())
    model = tiny.model("llama")
    held = storages(model)
    generate(tiny, model)
    assert storages(model) == held


@pytest.mark.parametrize("move", ["_join", "_separate"])
def test_memory_that_runs_out_is_no_error(move: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come behind stay where they are, which are the smaller ones; the next time they are moved, too."""
    model = tiny.model("llama")
    expected, held = generate(tiny, tiny.model("llama")), sorted(storages(model).values())
    moved, original = [], getattr(products, move)

    def fail_at_third(*args: Any) -> None:
        moved.append(0)
        if len(moved) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(*args)

    if move == "_separate":
        joined(tiny, model)
    with monkeypatch.context() as patch:
        patch.setattr(products, move, fail_at_third)
        if move == "_separate":
            mtpkern.release_graphs(model)
        else:
            assert torch.equal(generate(tiny, model), expected)
    # Of two layers gate and up are together, q, k and v not yet, or no longer.
    assert len(storages(model)) == len(held) - 2
    joined(tiny, model)
    assert len(storages(model)) == len(held) - 6
    mtpkern.release_graphs(model)
    assert sorted(storages(model).values()) == held


def test_other_threads_run_the_model_as_it_is(tiny: SimpleNamespace, rows: list[list[int]]) -> None:
    model = tiny.model("llama")
    ids, _ = tiny.prompts(7)
    expected, results = logits(model, ids), list[Tensor]()
    found = joined(tiny, model)
    with found():
        thread = Thread(target=lambda: results.append(logits(model, ids)))
        thread.start()
        thread.join()
        assert torch.equal(results[0], expected)
        assert not rows
        logits(model, ids)
    assert len(rows) == 4


def test_a_gated_adapter_on_top(tiny: SimpleNamespace, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One product of the base's layers, which brings the first half of the adapter's; likewise without masks."""
    served: list[int] = []
    op = siblings.gated_expand
    monkeypatch.setattr(siblings, "gated_expand", lambda outs, *args: (served.append(len(outs)), op(outs, *args))[1])
    model, other = (tiny.adapted(tiny.model("llama")).get_base_model() for _ in range(2))
    ids, _ = tiny.prompts(6, 6)
    ids = torch.cat([ids, ids.new_full((2, 3), model.mtpkern_gate.mask_token_id)], dim=1)
    with gated(model, ids):
        expected = logits(model, ids)
    found = joined(tiny, model)
    served.clear()
    with gated(model, ids):
        torch.testing.assert_close(logits(model, ids, found), expected)
    assert served == [3, 1, 2, 1] * 2
    assert rows == [[32, 16, 16, 4, 4, 4], [32, 4], [48, 48, 4, 4], [32, 4]] * 2
    options = {"strategy": ConfAdapt(3, threshold=0.15), "max_new_tokens": 12}
    assert torch.equal(generate(tiny, model, **options), generate(tiny, other, **options))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama, biased", "aot_eager"),
        pytest.param("adapted", "eager", marks=pytest.mark.slow("products::test_few_forms_serve_all_layers")),
    ],
)
def test_few_forms_serve_all_layers(
    name: str, backend: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as without, with one product where siblings were; and neither are taken for the other."""
    linears: list[int] = []

    def compile_(module: Any, inputs: Any) -> Any:
        linears.append(sum("linear" in str(node.target) for node in module.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def run(wanted: bool) -> Tensor:
        monkeypatch.setattr("mtpkern.decoder.wants_one_product", lambda captured: wanted)
        return generate(tiny, model, compile=True, strategy=ConfAdapt(3, threshold=0.15), max_new_tokens=10)

    monkeypatch.setattr(layers, "BACKEND", compile_)
    kind, settings, _ = SETTINGS.get(name, ("", {}, []))
    if name == "adapted":
        model = tiny.adapted(tiny.model("llama")).get_base_model()
    else:
        model = tiny.model(kind, num_hidden_layers=3, **settings)
    expected = run(False)
    without = len(linears)
    for wanted in (True, True, False):
        assert torch.equal(run(wanted), expected)
        assert without < len(linears) <= 2 * without <= 8
        assert sum(linears[without:]) < sum(linears[:without])


def test_where_siblings_are_one_product_unasked(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In captured passes, where switched on; nowhere on a CPU."""
    for default in (False, True):
        monkeypatch.setattr(products, "CAPTURED", default)
        assert [wants_one_product(True), wants_one_product(False)] == [default, False]
    monkeypatch.setattr("mtpkern.decoder.wants_one_product", wants_one_product)
    model = tiny.model("llama")
    held = storages(model)
    generate(tiny, model)
    assert storages(model) == held


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_in_a_graph(compile: bool, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and used again; then each layer has its own memory again, and the graph is another."""
    monkeypatch.setattr("mtpkern.decoder.wants_one_product", wants_one_product)
    monkeypatch.setattr(products, "CAPTURED", True)
    model = tiny.model("llama").to("cuda")
    ids, mask = (x.to("cuda") for x in tiny.prompts(9, 4))
    options: dict[str, Any] = {"attention_mask": mask, "strategy": ConfAdapt(3, threshold=0.15), "max_new_tokens": 24}
    expected, held = mtpkern.generate(model, ids, use_graph=False, compile=False, **options), storages(model)
    for _ in range(2):
        for _ in range(2):
            assert torch.equal(mtpkern.generate(model, ids, compile=compile, **options), expected)
        assert len(storages(model)) == len(held) - 6
        assert mtpkern.release_graphs(model) == 1
        assert sorted(storages(model).values()) == sorted(held.values())
