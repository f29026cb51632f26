"""Compiled decoder layers in decoding: the same tokens, few forms for all layers, a model left as it was."""

import gc
import warnings
import weakref
from collections.abc import Callable
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mtpkern
from mtpkern import ConfAdapt, Verified, layers
from mtpkern.adapter import gate_of
from mtpkern.baked import fingerprint
from mtpkern.compare import encode, read_problems
from mtpkern.demo import ASSETS, load
from mtpkern.layers import CompiledLayers, decoder_layers, wants_compile
from mtpkern.options import strategy_for

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.compile makes, which runs as it was written."""
    made: list[Any] = []

    def count(module: Any, inputs: Any) -> Callable[..., Any]:
        made.append(module)
        return module.forward

    monkeypatch.setattr(layers, "BACKEND", count)
    return made


def generate(tiny: SimpleNamespace, model: Any, **options: Any) -> Tensor:
    ids, mask = tiny.prompts(9, 4)
    options = {"max_new_tokens": 6, "strategy": Verified(3, threshold=0.2), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a fallback would be announced
        return mtpkern.generate(model, ids, attention_mask=mask, **options)


WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "mistral", "phi3"])
def test_few_forms_serve_all_layers(
    architecture: str, forms: list[Any], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made in the first compiled pass, of the parts of a layer around its attention; windows make one more."""
    sliding = architecture == "gemma3_text"
    model = tiny.model(architecture, num_hidden_layers=4, **(WINDOWS if sliding else {}))
    expected = generate(tiny, model)
    by_pass: list[int] = []
    readout = mtpkern.decoder.readout
    monkeypatch.setattr(mtpkern.decoder, "readout", lambda *args: (by_pass.append(len(forms)), readout(*args))[1])
    assert torch.equal(generate(tiny, model, compile=True), expected)
    # The prefill and the first pass run as they are.
    assert by_pass[:2] == [0, 0]
    assert 0 < by_pass[2] <= 4 + sliding
    assert torch.equal(generate(tiny, model, compile=True), expected)
    assert len(forms) == by_pass[2]


def test_our_attention_is_in_no_form(forms: list[Any], tiny: SimpleNamespace) -> None:
    """Or it would be that of one layer; and products, norms and rotation are."""
    generate(tiny, tiny.model("llama"), compile=True)
    called = {str(node.target) for module in forms for node in module.graph.nodes}
    assert not any("mtpkern" in name for name in called)
    assert any("linear" in name for name in called)
    (reason,) = counters["graph_break"]
    assert "mtpkern_attention" in reason


@pytest.mark.slow("layers::test_few_forms_serve_all_layers")
def test_a_gated_adapter_in_compiled_layers(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is part of the forms, and reads the mask rows of its own pass: their predictions are emitted here.

    Siblings share one, and no layer needs forms of its own for that.
    """
    ops: list[str] = []

    def compile_(module: Any, inputs: Any) -> Callable[..., Any]:
        ops.extend(name for node in module.graph.nodes if "gated_lora" in (name := str(node.target)))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    monkeypatch.setattr(layers, "BACKEND", compile_)
    model = tiny.adapted(tiny.model("llama"), "k_proj,v_proj,down_proj")
    options: dict[str, Any] = {"strategy": ConfAdapt(3, threshold=0.15), "max_new_tokens": 12}
    expected = generate(tiny, model, **options)
    with torch.no_grad():
        base = model.get_base_model()
        gate_of(base).row.neg_()
        assert not torch.equal(generate(tiny, model, **options), expected)
        gate_of(base).row.neg_()
    for _ in range(2):
        assert torch.equal(generate(tiny, model, compile=True, **options), expected)
        made = counters["stats"]["unique_graphs"]
        assert made <= 4
        assert len(ops) == 2
    (reason,) = counters["graph_break"]
    assert "mtpkern_attention" in reason


def test_the_model_is_left_as_it_was(forms: list[Any], tiny: SimpleNamespace) -> None:
    """Behind a run, behind one that failed, and with a forward that somebody else has put there."""
    model = tiny.model("llama")
    generate(tiny, model)
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own
    before = fingerprint(model)
    generate(tiny, model, compile=True)
    compiled = CompiledLayers(model)

    def fail() -> None:
        with compiled():
            assert "forward" in vars(model.model.layers[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "forward" not in vars(model.model.layers[0])
    assert vars(model.model.layers[1])["forward"] is own
    assert fingerprint(model) == before


def test_other_threads_run_the_model_as_it_is(forms: list[Any], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    ids, _ = tiny.prompts(5)
    expected = model(ids).logits
    found = []
    with CompiledLayers(model)():
        thread = Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    assert not forms


def test_what_runs_compiled_keeps_no_model(forms: list[Any], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    generate(tiny, model, compile=True)
    gone = weakref.ref(model)
    assert forms
    forms.clear()
    del model
    gc.collect()
    assert gone() is None


def test_layers_that_cannot_be_compiled_go_on(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and it is said and tried once."""
    model = tiny.model("llama", num_hidden_layers=3)
    expected = generate(tiny, model)
    tried = []

    def fail(module: Any, inputs: Any) -> None:
        tried.append(module)
        raise NotImplementedError("no such machine\nand more")

    monkeypatch.setattr(layers, "BACKEND", fail)
    ids, mask = tiny.prompts(9, 4)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "strategy": Verified(3, threshold=0.2)}
    said = r"could not compile the model's layers, which run uncompiled; .*compile=False.*no such machine"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        assert torch.equal(mtpkern.generate(model, ids, compile=True, **options), expected)
    assert len([w for w in caught if "could not compile" in str(w.message)]) == len(tried) == 1
    with pytest.warns(RuntimeWarning, match="Linear has no decoder layers"):
        CompiledLayers(torch.nn.Linear(2, 2))


def test_one_form_too_many_is_announced(
    forms: list[Any], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layers._LIMIT, "recompile_limit", 1)
    model = tiny.model("gemma3_text", **{**WINDOWS, "layer_types": WINDOWS["layer_types"][:2]})
    ids, _ = tiny.prompts(9)
    with pytest.warns(RuntimeWarning, match="could not compile the model's layers.*recompile_limit"):
        found = mtpkern.generate(model, ids, max_new_tokens=4, compile=True)
    assert torch.equal(found, mtpkern.generate(model, ids, max_new_tokens=4))


def test_memory_that_runs_out_is_no_matter_of_compiling(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", num_hidden_layers=1)

    def fail(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layers, "BACKEND", lambda module, inputs: fail)
    compiled = CompiledLayers(model)
    hidden = torch.zeros(1, 2, 32)
    rotary = (torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
    with pytest.raises(torch.OutOfMemoryError), torch.inference_mode(), compiled():
        model.model.layers[0](hidden, position_embeddings=rotary)
    assert not compiled.failed


def test_outermost_layers_are_compiled(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    outer, inner = model.model.layers
    assert decoder_layers(model) == [outer, inner]
    outer.inner = inner
    assert decoder_layers(model.model.layers[:1]) == [outer]


def test_where_layers_are_compiled_unasked(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [wants_compile(True, False), wants_compile(False, True), wants_compile(None, False)] == [True, False, False]
    for default in (False, True):
        monkeypatch.setattr(layers, "COMPILE_CAPTURED", default)
        assert wants_compile(None, True) is default
    with pytest.raises(TypeError, match="compile must be True or False, got 'no'"):
        generate(tiny, tiny.model("llama", num_hidden_layers=1), compile="no")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_the_shipped_checkpoint_compiled_in_a_graph(batch: int) -> None:
    """In float32 the tokens are those without; a second call, graph or no graph, compiles nothing."""
    model, tokenizer = load(ASSETS)
    model.to("cuda", torch.float32)
    prompts = [problem.prompt for problem in read_problems(ASSETS / "problems.jsonl", batch)]
    inputs: Any = encode(tokenizer, prompts, model.device)
    options: dict[str, Any] = {"strategy": strategy_for(model, Verified()), "max_new_tokens": 24, **inputs}
    expected = mtpkern.generate(model, use_graph=False, compile=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for use_graph in (True, False):
            assert torch.equal(mtpkern.generate(model, use_graph=use_graph, compile=True, **options), expected)
            made = counters["stats"]["unique_graphs"], counters["frames"]["total"]
            assert made[0]
            assert torch.equal(mtpkern.generate(model, use_graph=use_graph, compile=True, **options), expected)
            assert (counters["stats"]["unique_graphs"], counters["frames"]["total"]) == made
    assert mtpkern.release_graphs(model) == 1
