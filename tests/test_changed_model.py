"""A model that has changed since its step was captured: noticed, and its graph made anew."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mtpkern
from mtpkern import Static, layers, pool, products
from mtpkern.baked import fingerprint
from mtpkern.decoder import Decoder
from mtpkern.pool import release_graphs
from support.recording import RecordedStep, assert_same, generate, hook, kept


def replace_weight(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


def merge_in_place(model: Any) -> None:
    # As an adapter library does: the data change where they are, and the module notes it in a list.
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data += 1
    layer.merged_adapters = ["default"]


def own_forward(model: Any) -> None:
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: 0 * x


def replace_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def retain(model: Any) -> None:
    model.config.some_setting = 3


CHANGES = [
    *(replace_weight, merge_in_place, hook, own_forward, replace_module, retain),
    *(lambda model: model.to(torch.float64), lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.1)),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_noticed(change: Callable[[Any], object], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    before = fingerprint(model)
    ids = tiny.prompts(4)[0]
    model(ids)
    mtpkern.generate(model, ids, max_new_tokens=3)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # new values in the same place are read anew
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("change", [replace_weight, merge_in_place, hook])
def test_a_graph_of_a_changed_model_is_not_replayed(
    change: Callable[[Any], object], recorded: type[RecordedStep], tiny: SimpleNamespace
) -> None:
    model = tiny.model("llama")
    first = generate(tiny, model, 6, 4)
    (decoder,) = kept(model)
    change(model)
    got = generate(tiny, model, 6, 4)
    assert_same(got, generate(tiny, model, 6, 4, use_graph=False))
    assert not torch.equal(got.sequences, first.sequences)
    assert decoder not in kept(model)
    assert recorded.captures == 2


def test_a_model_is_compared_behind_the_prefill(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the device works on that; and before anything is replayed."""
    model = tiny.model("llama", num_hidden_layers=1)
    expected = generate(tiny, model, 6, 4)
    order: list[str] = []

    def noting(name: str, call: Any) -> Any:
        return lambda *args, **options: (order.append(name), call(*args, **options))[1]

    monkeypatch.setattr(pool, "fingerprint", noting("fingerprint", pool.fingerprint))
    monkeypatch.setattr(Decoder, "prefill", noting("prefill", Decoder.prefill))
    monkeypatch.setattr(RecordedStep, "replay", noting("replay", RecordedStep.replay))
    assert_same(generate(tiny, model, 6, 4), expected)
    assert order[:3] == ["prefill", "fingerprint", "replay"]
    assert order.count("fingerprint") == 1


def more_heads(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, torch.nn.Linear(32, 32, bias=False))
    attention.num_key_value_groups = 1


@pytest.mark.parametrize("change", [lambda model: model.to(torch.float64), more_heads])
def test_buffers_that_no_longer_fit_are_made_anew(
    change: Callable[[Any], object], recorded: type[RecordedStep], tiny: SimpleNamespace
) -> None:
    """Nothing is written to them, which a kernel would do without looking; an error of the model's own stays one."""
    model = tiny.model("llama")
    generate(tiny, model, 6, 4)
    (decoder,) = kept(model)
    forms = [(x.dtype, x.shape) for pair in decoder.cache.layers.values() for x in pair]
    change(model)
    expected = generate(tiny, model, 6, 4, use_graph=False)
    for _ in range(2):
        assert_same(generate(tiny, model, 6, 4), expected)
    (new,) = kept(model)
    assert [(x.dtype, x.shape) for pair in new.cache.layers.values() for x in pair] != forms
    assert recorded.captures == 2

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generate(tiny, model, 6, 4)
    assert not kept(model)
    hook.remove()


@pytest.mark.slow("changed_model::test_siblings_as_one_product_are_captured_and_kept")
def test_compiled_layers_are_captured_and_kept(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that is there for the pass alone is no changed model, and what is kept does not keep its model."""
    made: list[Any] = []
    monkeypatch.setattr(layers, "BACKEND", lambda module, inputs: (made.append(0), module.forward)[1])
    torch._dynamo.reset()
    model = tiny.model("llama")
    model.model.layers[0].owner = [model]  # as adapters and hooks refer to it
    expected = generate(tiny, model, 6, 4, use_graph=False)
    assert_same(generate(tiny, model, 6, 4, compile=True), expected)
    (decoder,) = kept(model)
    forms = len(made)
    assert forms
    for _ in range(2):
        assert_same(generate(tiny, model, 6, 4, compile=True), expected)
        assert kept(model) == [decoder]
    assert recorded.captures == 1
    assert len(made) == forms
    assert_same(generate(tiny, model, 6, 4), expected)  # another graph
    assert recorded.captures == 2
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    torch._dynamo.reset()


def test_siblings_as_one_product_are_captured_and_kept(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights move once, before the model is compared, and a graph of theirs is replayed until they move again."""
    monkeypatch.setattr(products, "CAPTURED", True)
    model = tiny.model("llama")
    expected = generate(tiny, model, 6, 4, use_graph=False)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for strategy in (None, None, Static(1), None):
        got = generate(tiny, model, 6, 4, strategy=strategy)
        assert strategy or got.sequences.equal(expected.sequences)
        places = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(places) == len(held) - 6
    assert recorded.captures == len(kept(model)) == 2
    for decoder in kept(model):
        (step,) = decoder.graph.captured.values()  # type: ignore[union-attr]
        products_ = [func for func, *_ in step.operations if func.name() in ("aten::mm", "aten::linear", "aten::addmm")]
        assert len(products_) == 2 * 4 + 1
    gone = weakref.ref(model)
    assert release_graphs(model) == 2
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(held)
    assert_same(generate(tiny, model, 6, 4), expected)
    assert recorded.captures == 3
    model.half().float()  # elsewhere, and each by itself
    generate(tiny, model, 6, 4)
    assert recorded.captures == 4
    del model
    gc.collect()
    assert gone() is None


def test_merged_lora_is_noticed(tiny: SimpleNamespace) -> None:
    peft = pytest.importorskip("peft")
    model = tiny.model("llama", num_hidden_layers=1)
    prints = [fingerprint(model)]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    prints.append(fingerprint(model))
    layer = model.model.layers[0].self_attn.q_proj
    place = layer.base_layer.weight.data_ptr()
    layer.merge()
    assert layer.base_layer.weight.data_ptr() == place  # what no address tells
    prints.append(fingerprint(model))
    layer.unmerge()
    layer.enable_adapters(False)
    prints.append(fingerprint(model))
    assert len(set(map(str, prints))) == len(prints)
