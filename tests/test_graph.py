"""The captured step: without a GPU, a stand-in records the operations of a step and replays them on the same tensors.

That is what a CUDA graph does: addresses and plain numbers are fixed at the capture, and no Python runs at a replay.
"""

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, graph, layers, products
from mtpkern.attention import attention_context
from mtpkern.decoder import Decoder
from mtpkern.graph import fingerprint, release_graphs
from mtpkern.kernels.form import has_kernels
from mtpkern.load import Ladder
from mtpkern.refill import Slots
from mtpkern.strategies import Strategy


class Recorder(TorchDispatchMode):
    """Notes every operation with the tensors that went in and came out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out


class RecordedStep:
    """Stands in for `CapturedStep`: capturing changes nothing, replaying runs the operations and no Python of ours."""

    captures = 0

    def __init__(self, step: Any, device: torch.device, beside: Any) -> None:
        type(self).captures += 1
        decoder = step.func.__self__
        buffers = [x for pair in decoder.cache.layers.values() for x in pair]
        state = [*vars(decoder.sequences).values(), *vars(decoder.rows).values(), *buffers]
        before = [x.clone() for x in state]
        with Recorder() as recorder:
            step()
        self.operations = recorder.operations
        self.rows = decoder.rows.seq
        with torch.inference_mode():
            for x, y in zip(state, before):
                x.copy_(y)

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():  # neither a view nor in place
                    x.copy_(y)


class Event:
    def __init__(self, device: torch.device) -> None: ...

    def record(self) -> None: ...

    def wait(self) -> None: ...


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordedStep]]:
    """Steps on the CPU are captured, by the stand-in, and kept."""
    monkeypatch.setattr(graph, "CapturedStep", RecordedStep)
    monkeypatch.setattr(graph, "on_side_stream", lambda device: nullcontext())
    monkeypatch.setattr(graph, "memory_of", lambda device: 1 << 40)
    monkeypatch.setattr(torch, "Event", Event)
    for module in ("mtpkern.decoder", "mtpkern.options"):
        monkeypatch.setattr(f"{module}.wants_graph", lambda use_graph, device: use_graph is not False)
    release_graphs()
    RecordedStep.captures = 0
    yield RecordedStep
    release_graphs()


def generate(tiny: SimpleNamespace, model: Any, *lengths: int, seed: int = 1, **options: Any) -> Any:
    ids, mask = tiny.prompts(*lengths, seed=seed)
    return mtpkern.generate(
        model,
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        return_dict_in_generate=True,
        # A model with hooks is looked at anew, which takes passes.
        **{"max_new_tokens": 12, "check_model": False, **options},
    )


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert got.blocks == expected.blocks
    assert got.finish_reasons == expected.finish_reasons


def kept(model: Any) -> list[Decoder]:
    return list(graph._kept.get(model, {}).values())


def poison(decoder: Decoder) -> None:
    """What no run may read of the one before it: faults, stops, wrong plans, NaN in every slot."""
    with torch.inference_mode():
        for x in (*vars(decoder.sequences).values(), *vars(decoder.rows).values()):
            x.fill_(3)
        for pair in decoder.cache.layers.values():
            for x in pair:
                x.fill_(torch.nan)
        decoder.terms.threshold.fill_(torch.nan)
        decoder.terms.stop_ids.fill_(7)
        decoder.terms.price.fill_(7)
        decoder.terms.budget.fill_(1)


# Each with another threshold: it is no part of the graph.
STRATEGIES = {
    "Verified": [Verified(3, threshold=0.2, masks=2), Verified(3, threshold=0.6, masks=2)],
    "ConfAdapt": [ConfAdapt(3, threshold=0.3), Static(3)],
    "Static": [Static(1), ConfAdapt(1, threshold=0.5)],
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_replays_give_the_tokens_of_fresh_runs(name: str, recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    calls: list[dict[str, Any]] = [
        {"lengths": (9, 4, 12)},
        {"lengths": (3, 20, 6), "eos_token_id": [3, 5], "max_new_tokens": 30},
        {"lengths": (5, 5, 5), "eos_token_id": 2, "seed": 4},
        {"lengths": (1, 2, 17), "max_new_tokens": 2},
    ]
    for i, call in enumerate(calls):
        strategy = STRATEGIES[name][i % 2]
        expected = generate(tiny, model, *call["lengths"], strategy=strategy, use_graph=False, **without(call))
        got = generate(tiny, model, *call["lengths"], strategy=strategy, **without(call))
        assert_same(got, expected)
        (decoder,) = kept(model)
        poison(decoder)
    assert recorded.captures == 1


@pytest.mark.parametrize("options", [{}, {"strategy": Verified(threshold=0.1, masks=2)}])
def test_the_ladder_changes_no_token(
    options: dict[str, Any], recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any rung behind any other, told a pass ahead; prices as they come; each rung captured once, in one decoder."""
    rng, model = random.Random(0), tiny.model("llama")
    monkeypatch.setattr("mtpkern.load.FREE_ROWS", 0)
    monkeypatch.setattr("mtpkern.load.STEP", 1)
    used: set[int] = set()

    def choose(ladder: Ladder, *_: Any) -> tuple[int, float]:
        assert len(ladder.rungs) > 2
        rows = rng.choice(ladder.rungs)
        used.add(rows)
        return rows, float("inf") if rows == ladder.rungs[0] else rng.choice([0.0, 0.1, 0.4])

    for seed in range(6):
        call = {"seed": seed, "max_new_tokens": 40, "eos_token_id": 3, **options}
        expected = generate(tiny, model, 9, 4, 12, use_graph=False, **call)
        with monkeypatch.context() as patch:
            patch.setattr(Ladder, "choose", choose)
            got = generate(tiny, model, 9, 4, 12, **call)
        assert torch.equal(got.sequences, expected.sequences)
        assert got.finish_reasons == expected.finish_reasons
        (decoder,) = kept(model)
        assert decoder.graph is not None
        poison(decoder)
    assert recorded.captures == len(decoder.graph.captured) == len(used)
    # On the lowest rung there are no masks, and a row a sequence.
    assert {len(step.rows) for step in decoder.graph.captured.values()} == used


def without(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "lengths"}


def test_state_keeps_its_addresses(recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    generate(tiny, model, 5, 3)
    (decoder,) = kept(model)
    places = addresses(decoder)
    generate(tiny, model, 7, 20, max_new_tokens=40, eos_token_id=2)
    assert kept(model) == [decoder]
    assert addresses(decoder) == places


@pytest.mark.parametrize("strategy", [Verified(3, threshold=0.2), ConfAdapt(3, threshold=0.3)], ids=repr)
def test_slots_are_refilled_between_replays(
    strategy: Strategy, recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One capture for all prompts of two calls; nothing moves, and the captured step sees every newcomer."""
    model, rng = tiny.model("llama"), random.Random(0)
    prompts = [[rng.randint(1, 14) for _ in range(rng.choice([1, 4, 9, 20]))] for _ in range(9)]
    prompts[7] = prompts[3] + [5, 6] if len(prompts[3]) > 8 else [1] * 15
    new = [rng.randint(1, 15) for _ in prompts]
    places: set[tuple[int, ...]] = set()
    running = Slots.take

    def noted(self: Any, state: Tensor) -> int:
        places.add(tuple(addresses(self.decoder)))
        return running(self, state)

    options: dict[str, Any] = {"strategy": strategy, "max_new_tokens": new, "eos_token_id": 3, "batch_size": 3}
    expected = mtpkern.generate_batch(model, prompts, use_graph=False, **options)
    monkeypatch.setattr(Slots, "take", noted)
    for _ in range(2):
        outputs = mtpkern.generate_batch(model, prompts, **options)
        assert [(o.tokens, o.blocks) for o in outputs] == [(o.tokens, o.blocks) for o in expected]
        (decoder,) = kept(model)
        poison(decoder)
    assert recorded.captures == len(places) == 1


def test_the_ladder_takes_newcomers_on_any_rung(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rng = tiny.model("llama"), random.Random(0)
    monkeypatch.setattr("mtpkern.load.FREE_ROWS", 0)
    monkeypatch.setattr("mtpkern.load.STEP", 1)
    prompts = [[rng.randint(1, 14) for _ in range(rng.choice([1, 4, 9, 20]))] for _ in range(12)]
    options: dict[str, Any] = {"max_new_tokens": 15, "eos_token_id": 3, "batch_size": 3}
    expected = mtpkern.generate_batch(model, prompts, use_graph=False, **options)

    def choose(ladder: Ladder, *_: Any) -> tuple[int, float]:
        rows = rng.choice(ladder.rungs)
        return rows, float("inf") if rows == ladder.rungs[0] else rng.choice([0.0, 0.1, 0.4])

    monkeypatch.setattr(Ladder, "choose", choose)
    outputs = mtpkern.generate_batch(model, prompts, **options)
    assert [o.tokens for o in outputs] == [o.tokens for o in expected]
    assert recorded.captures > 1


def addresses(decoder: Decoder) -> list[int]:
    tensors = [*vars(decoder.sequences).values(), *vars(decoder.rows).values(), *vars(decoder.terms).values()]
    return [x.data_ptr() for x in [*tensors, *(x for pair in decoder.cache.layers.values() for x in pair)]]


def test_what_is_baked_in_makes_another_graph(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr(graph, "KEPT", 9)
    common = {"max_new_tokens": 5}
    for options in (
        {"strategy": Verified(2)},
        {"strategy": Verified(3)},
        {"strategy": ConfAdapt(2)},
        {"strategy": Verified(2, masks=1)},
        {"strategy": Verified(2), "rows": 4},
        {"strategy": Verified(2), "eos_token_id": [1, 2, 3, 4, 5]},
        {"strategy": Verified(2), "lengths": (4, 255)},
        {"strategy": Verified(2), "batch_invariant": True},
    ):
        before = len(kept(model))
        generate(tiny, model, *options.get("lengths", (4, 4)), **common, **without(options))
        assert len(kept(model)) == before + 1
    assert kept(model)[-1].cache.batch_invariant
    generate(tiny, model, 4, **common, strategy=Verified(2))
    assert len(kept(model)) == before + 2


def test_kept_graphs_are_few(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    monkeypatch.setattr(graph, "KEPT", 2)
    for k in (1, 2, 1, 3):
        generate(tiny, model, 4, strategy=Static(k), max_new_tokens=2)
    assert [decoder.strategy.k for decoder in kept(model)] == [1, 3]  # the one unused for longest has gone
    # The last one stays, however large it is.
    monkeypatch.setattr(graph, "memory_of", lambda device: 1)
    generate(tiny, model, 4, strategy=Static(2), max_new_tokens=2)
    assert [decoder.strategy.k for decoder in kept(model)] == [2]
    assert kept(model)[0].nbytes > 2 * 2 * 8 * 256 * 4
    assert release_graphs(model) == 1
    assert release_graphs(model) == release_graphs() == 0


def test_a_forgotten_model_takes_its_graphs_along(recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    generate(tiny, model, 4)
    (decoder,) = [weakref.ref(x) for x in kept(model)]
    held = len(graph._kept)
    del model
    gc.collect()
    assert decoder() is None
    assert len(graph._kept) < held


def test_a_run_that_failed_leaves_nothing(recorded: type[RecordedStep], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    head = model.get_output_embeddings().weight
    good = head.detach().clone()
    with torch.no_grad():
        head.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN"):
        generate(tiny, model, 4)
    assert not kept(model)
    with torch.no_grad():
        head.copy_(good)
    assert_same(generate(tiny, model, 4), generate(tiny, model, 4, use_graph=False))


def test_a_decoder_runs_again(tiny: SimpleNamespace) -> None:
    """Also on a CPU, where rows and slots have shrunk with the sequences that were running."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(9, 4, 12)
    strategy, stop_ids = Verified(3, threshold=0.2), torch.tensor([3])
    results = []
    for again in (False, True):
        decoder = Decoder(
            model, strategy, mask_token_id=tiny.mask, stop_ids=stop_ids, batch=3, capacity=48, max_new_tokens=36
        )
        for n in (8, 36) if again else (36,):
            decoder.restart(strategy, stop_ids, n)
            decoder.prefill(ids, mask)
            with attention_context(model, decoder.cache) as route:
                decoder.run(route)
        results.append((decoder.sequences.tokens[:, :-1].tolist(), decoder.sequences.blocks[:, :-1].tolist()))
    assert results[0] == results[1]


def replace_weight(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


def merge_in_place(model: Any) -> None:
    # As an adapter library does: the data change where they are, and the module notes it in a list.
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data += 1
    layer.merged_adapters = ["default"]


def hook(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, out: -out)


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

    monkeypatch.setattr(graph, "fingerprint", noting("fingerprint", graph.fingerprint))
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


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "use_graph=False"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"release_graphs\(\)"),
    ],
)
def test_a_step_that_cannot_be_captured_goes_on(
    error: Exception,
    remedy: str,
    recorded: type[RecordedStep],
    tiny: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> None:
        raise error

    model = tiny.model("llama")
    monkeypatch.setattr(graph, "CapturedStep", refuse)
    said = rf"runs without one, which is slower; .*{remedy}.*: {type(error).__name__}: {error.args[0][:9]}"
    with pytest.warns(RuntimeWarning, match=said):
        got = generate(tiny, model, 6, 4)
    expected = generate(tiny, model, 6, 4, use_graph=False)
    assert_same(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert_same(generate(tiny, model, 6, 4), expected)


@pytest.mark.parametrize("broken", [True, False])
def test_a_broken_capture_is_cleared_up(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch leaves open where a capture ends in an error is closed; what it has closed itself is left alone."""
    calls: list[Any] = []
    side = SimpleNamespace(device_index=3, device="cpu")

    class Capture:
        def __init__(self, graph: Any, **options: Any) -> None:
            calls.append(("capture", options.get("pool"), options["stream"] is side))

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            if error[0] and broken:
                raise RuntimeError("operation failed due to a previous error during capture")

    def end(device: int, pool: Any) -> None:
        if not broken:
            raise RuntimeError("not currently recording to mempool_id")
        calls.append(("end", device, pool))

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("clear"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *at: calls.append(("release", *at)), raising=False)
    monkeypatch.setattr(graph, "on_side_stream", lambda device: nullcontext(side))
    with pytest.raises(RuntimeError), graph.capturing(object(), torch.device("cpu")):  # type: ignore[arg-type]
        raise RuntimeError("operation not permitted when stream is capturing")
    after = [("end", 3, (0, 7)), ("release", 3, (0, 7)), ("capture", None, True)] if broken else []
    assert calls == ["clear", ("capture", (0, 7), True), *after, "clear"]


def test_a_kernel_that_does_not_compile(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    model = tiny.model("llama", num_hidden_layers=1)
    expected = generate(tiny, model, 4)
    monkeypatch.setattr("mtpkern.kernels.form._without_kernels", set())
    readout = mtpkern.decoder.readout

    def fail_as_a_kernel(*args: Any, **options: Any) -> Any:
        if has_kernels(model.device):
            raise errors.OutOfResources(300_000, 232_448, "shared memory")
        return readout(*args, **options)

    monkeypatch.setattr("mtpkern.decoder.readout", fail_as_a_kernel)
    with pytest.warns(RuntimeWarning, match=r"could not be compiled for cpu.*plain torch.*OutOfResources.*300000"):
        assert_same(generate(tiny, model, 4), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert_same(generate(tiny, model, 4), expected)

    def fail(*args: Any, **options: Any) -> None:
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr("mtpkern.decoder.readout", fail)
    with pytest.raises(errors.OutOfResources):  # there is nothing left to go to
        generate(tiny, model, 4)


def test_memory_that_was_kept_is_given_up_for_a_prefill(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tiny.model("llama"), tiny.model("llama", num_hidden_layers=1)
    expected = generate(tiny, model, 6, use_graph=False)
    generate(tiny, other, 4)
    prefill = Decoder.prefill

    def short_of_memory(self: Decoder, *args: Any, **options: Any) -> Tensor:
        if kept(other):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, *args, **options)

    monkeypatch.setattr(Decoder, "prefill", short_of_memory)
    assert_same(generate(tiny, model, 6), expected)
    assert not kept(other)
    assert len(kept(model)) == 1


def test_what_a_cpu_cannot_do(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="use_graph=True needs a model on a CUDA or ROCm device, got one on cpu"):
        generate(tiny, model, 4, use_graph=True)
    generate(tiny, model, 4, use_graph=False)
    generate(tiny, model, 4)
    assert not kept(model)


# On a GPU, for real.

SETTINGS = {
    "llama": {},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = {1: (9,), 5: (9, 4, 12, 1, 7)}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[graph.CapturedStep]]:
    """Every step that is captured; nothing kept before or after. A capture that fails fails the test."""
    made: list[graph.CapturedStep] = []

    class Counted(graph.CapturedStep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(graph, "CapturedStep", Counted)
    release_graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield made
    made.clear()
    release_graphs()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("model_name", SETTINGS)
def test_graph_equals_no_graph(
    model_name: str, name: str, batch: int, captures: list[Any], tiny: SimpleNamespace
) -> None:
    model = tiny.model(model_name, **SETTINGS[model_name]).cuda()
    for seed in range(4):
        options: dict[str, Any] = {"strategy": STRATEGIES[name][seed % 2], "seed": seed, "max_new_tokens": 40}
        options["eos_token_id"] = [None, 3][seed // 2]
        expected = generate(tiny, model, *LENGTHS[batch], use_graph=False, **options)
        assert_same(generate(tiny, model, *LENGTHS[batch], **options), expected)
        for decoder in kept(model):
            poison(decoder)
    assert len(captures) == 1


@pytest.mark.gpu
def test_no_token_depends_on_the_form_of_the_run(captures: list[Any], tiny: SimpleNamespace) -> None:
    """Chunks, compilation and the batch-invariant splits, in the graph, against the plain run."""
    model = tiny.model("llama").cuda()
    expected = generate(tiny, model, 30, 17, 5, use_graph=False, max_new_tokens=40)
    for options in ({"prefill_chunk": 21}, {"compile": True}, {"batch_invariant": True}, {"rows": 36}):
        for _ in range(2):
            assert_same(generate(tiny, model, 30, 17, 5, max_new_tokens=40, **options), expected)
    assert len(captures) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("batch", LENGTHS)
def test_a_generation_waits_for_nothing(batch: int, captures: list[Any], tiny: SimpleNamespace) -> None:
    """Prefill without padding and all passes, warm: nothing but the event of the poll, which torch does not count."""
    model = tiny.model("llama").to("cuda", torch.bfloat16)
    stop_ids = torch.tensor([-1])
    ids = tiny.prompts(*[9] * batch)[0].cuda()
    decoder = Decoder(
        model, Verified(3), mask_token_id=tiny.mask, stop_ids=stop_ids, batch=batch, capacity=64, max_new_tokens=40
    )
    for run in range(3):
        decoder.restart(Verified(3), stop_ids, 40)
        torch.cuda.set_sync_debug_mode("error" if run else "default")
        try:
            decoder.prefill(ids)
            with attention_context(model, decoder.cache) as route:
                decoder.run(route)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(captures) == 1
    assert bool((decoder.sequences.passes > 1).all())


@pytest.mark.gpu
def test_what_waits_around_a_generation(captures: list[Any], tiny: SimpleNamespace) -> None:
    """Of ours: both prompts and mask to the host, the stop tokens to the device, the results and their record back."""
    model = tiny.model("llama").cuda()
    generate(tiny, model, 9, 4, eos_token_id=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            generate(tiny, model, 9, 4, eos_token_id=3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in said if "synchronizing" in str(w.message)]
    ours = [place for place in waits if "/mtpkern/" in place and "/tests/" not in place]  # a clone has any name
    assert len(ours) <= 5, ours


@pytest.mark.gpu
def test_two_models_take_turns(captures: list[Any], tiny: SimpleNamespace) -> None:
    models = [tiny.model("llama", seed=seed).cuda() for seed in range(2)]
    for seed in range(3):
        expected = [generate(tiny, model, 9, 4, seed=seed, use_graph=False) for model in models]
        for model, result in zip(models, expected):
            assert_same(generate(tiny, model, 9, 4, seed=seed), result)
    assert len(captures) == 2


@pytest.mark.gpu
def test_a_graph_outlives_the_others(captures: list[Any], tiny: SimpleNamespace) -> None:
    """Neither graphs that go nor whoever clears cuBLAS' workspaces, as torch.compile does, take memory from under it.

    Wide enough, in bfloat16 and with few rows, for products that need a workspace.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_hidden_layers": 1}
    model, other = (tiny.model("llama", seed=seed, **sizes).to("cuda", torch.bfloat16) for seed in range(2))
    expected = [generate(tiny, model, 9, 4) for _ in range(2)][1]  # all replays
    for strategy in (Static(1), Static(2)):
        generate(tiny, model, 9, 4, strategy=strategy)
    generate(tiny, other, 9, 4)
    assert len(captures) == 4

    captures.clear()
    release_graphs(other)
    for key in list(graph._kept[model])[1:]:
        del graph._kept[model][key]
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    elsewhere = [torch.ones(1 << 22, device="cuda") for _ in range(64)]  # takes the place of what is free now
    assert_same(generate(tiny, model, 9, 4), expected)
    assert not captures
    assert all(bool((x == 1).all()) for x in elsewhere)


@pytest.mark.gpu
def test_a_model_that_waits_is_not_captured(tiny: SimpleNamespace) -> None:
    """The capture fails, which is announced, and leaves nothing broken behind."""
    model, other = tiny.model("llama").cuda(), tiny.model("llama", seed=3).cuda()
    expected, others = (generate(tiny, x, 9, 4, use_graph=False) for x in (model, other))
    assert_same(generate(tiny, other, 9, 4), others)
    (before,) = kept(other)
    assert before.graph is not None
    assert before.graph.captured
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: float(out[0].sum()) and None)
    with pytest.warns(RuntimeWarning, match="could not be captured in a CUDA graph"):
        assert_same(generate(tiny, model, 9, 4), expected)
    assert_same(generate(tiny, model, 9, 4), expected)
    # A graph from before is replayed, random numbers can be drawn, and captures go on, in the pool of the other, too.
    assert_same(generate(tiny, other, 9, 4), others)
    assert kept(other) == [before]
    assert float(torch.rand(8, device="cuda").sum()) > 0
    for strategy in (Static(2), Static(3)):
        generate(tiny, other, 9, 4, strategy=strategy)
        assert kept(other)[-1].graph.captured
    hook.remove()
    assert_same(generate(tiny, model, 9, 4), expected)
    assert kept(model)[-1].graph.captured
    torch.cuda.synchronize()
    release_graphs()


@pytest.mark.gpu
def test_memory_does_not_grow(captures: list[Any], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama").cuda()
    held = []
    for call in range(50):
        generate(
            tiny, model, 9 + call % 5, 4, seed=call, max_new_tokens=20, strategy=(Verified(3), Static(1))[call % 2]
        )
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(captures) == 2
    assert held[-1] == held[9]
    release_graphs(model)
    gc.collect()
    assert torch.cuda.memory_allocated() < held[-1]


@pytest.mark.gpu
@pytest.mark.slow
def test_soak(captures: list[Any], tiny: SimpleNamespace) -> None:
    """A hundred thousand passes of two graphs that share a pool, always the same tokens, no memory: about a minute."""
    model = tiny.model("llama").cuda()
    ids, mask = (x.cuda() for x in tiny.prompts(9, 4, 12, 1, 7))
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 100, "return_dict_in_generate": True}
    first: dict[Strategy, Any] = {}
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    steps = runs = 0
    while steps < 100_000:
        for strategy in (Static(1), Verified(3, threshold=0.2)):
            result = mtpkern.generate(model, ids, strategy=strategy, **options)
            before = first.setdefault(strategy, result)
            differences += (result.sequences != before.sequences).any()
            assert result.blocks == before.blocks
            steps += max(result.passes)
        runs += 1
        if runs == 5:
            allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert not differences
    assert len(captures) == 2
    assert torch.cuda.memory_allocated() <= allocated + 4096
    assert torch.cuda.memory_reserved() == reserved


def test_a_kept_decoder_gets_known_keys_at_its_own_addresses(
    tiny: SimpleNamespace, recorded: type[RecordedStep]
) -> None:
    """A prefix is copied into the buffers that a captured step reads, and out of them at the end: both stay whole."""
    model, cache = tiny.model("llama"), mtpkern.PrefixCache()
    options = {"strategy": Verified(3, threshold=0.1)}
    prompts = [tiny.prompts(n)[0][0].tolist() for n in (24, 30)]
    want = [decoded(model, prompt, **options, use_graph=False) for prompt in prompts]
    release_graphs()
    for turn in range(2):
        for prompt, tokens in zip(prompts, want):
            assert decoded(model, prompt, **options, prefix_cache=cache) == tokens
            assert decoded(model, prompt[::-1], **options) != tokens  # another's keys in the same buffers
            assert cache.shared[0] >= (8 if turn or prompt is not prompts[0] else 0)
        assert recorded.captures == 1
    assert len(graph._kept[model]) == 1


def decoded(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    output = mtpkern.generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
    return output[0, len(prompt) :].tolist()
