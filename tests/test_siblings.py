"""Layers that read the same tensor are adapted together: fewer launches, the same bits."""

import copy
import gc
import weakref
from contextlib import nullcontext
from threading import Thread

import pytest
import torch

import mtpkern
from mtpkern import siblings
from mtpkern.adapter import base_alone, gate_of, gated
from mtpkern.kernels.gated_lora import gated_lora, gated_lora_triton
from mtpkern.train.lora import add_gated_lora

CUDA = torch.cuda.is_available()
# How many layers each launch pair of a decoder layer serves.
GROUPS = {
    "llama": [3, 1, 2, 1],
    "qwen3": [3, 1, 2, 1],
    "gemma3_text": [3, 1, 2, 1],
    "olmo2": [3, 1, 2, 1],
    "cohere": [3, 1, 2, 1],
    "phi3": [1, 1, 1, 1],  # q, k, v are one product here, and gate and up
    "starcoder2": [3, 1, 1, 1],
    "stablelm": [3, 1, 2, 1],
    "gpt_neox": [1, 1, 1, 1],
    # Queries and latents read the same; what is made of either is read by one.
    "deepseek_v3": [2, 1, 1, 1],
}
SETTINGS = {
    "stablelm": {"use_parallel_residual": True},
    "deepseek_v3": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "head_dim": 4,
    },
}
# peft's aLoRA, as which a gated adapter is stored, knows no adapters of experts that are one parameter.
TARGETS = {"deepseek_v3": "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"}


def adapted(tiny, kind="llama", *, dtype=torch.float32, adapter=None, device="cpu", seed=0, **settings):
    """A model with a gated adapter that changes what its mask rows predict."""
    model = tiny.model(kind, **{**SETTINGS.get(kind, {}), **settings})
    del model.config.mtpkern
    peft_model = add_gated_lora(model.to(dtype), rank=4, k_max=4, targets=TARGETS.get(kind, "all-linear")).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(False)
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter or dtype)
        if "lora_B" in name:
            parameter.normal_(0, 0.3, generator=generator)
    return peft_model.to(device).get_base_model()


def text(tiny, model, masks=3):
    """Two prompts with masks behind them: [2, T]."""
    ids, _ = tiny.prompts(6, 6)
    return torch.cat([ids, ids.new_full((2, masks), gate_of(model).mask_token_id)], dim=1).to(model.device)


@torch.inference_mode()
def logits(model, ids):
    with gated(model, ids):
        return model(ids, use_cache=False).logits


@pytest.fixture
def served(monkeypatch):
    """How many layers each call of the op has served, since the list was last cleared."""
    calls = []

    def count(outs, *args):
        calls.append(len(outs))
        return gated_lora(outs, *args)

    monkeypatch.setattr(siblings, "gated_lora", count)
    return calls


@pytest.mark.parametrize("kind", GROUPS)
def test_siblings_are_served_together_with_the_same_bits(kind, tiny, served):
    """Behind the first pass, which was one layer by itself after another and shows who reads what."""
    model = adapted(tiny, kind)
    ids = text(tiny, model)
    first = logits(model, ids)
    assert set(served) == {1}
    before = len(served)
    served.clear()
    assert torch.equal(logits(model, ids), first)
    assert served == GROUPS[kind] * 2
    assert sum(served) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_in_narrow_types_and_in_the_kernels(dtype, tiny, monkeypatch, interpreter):
    """With an adapter in float32, too; rows without a gate are the base's."""
    device = "cuda" if CUDA else "cpu"
    for adapter in {dtype, torch.float32}:
        model = adapted(tiny, dtype=dtype, adapter=adapter, device=device, num_hidden_layers=1)
        ids = text(tiny, model)
        monkeypatch.setattr(siblings, "gated_lora", gated_lora)
        first = logits(model, ids)
        assert torch.equal(logits(model, ids), first)
        monkeypatch.setattr(siblings, "gated_lora", lambda *args: gated_lora_triton(*args))
        together = logits(model, ids)
        model.mtpkern_siblings.found.clear()
        assert torch.equal(logits(model, ids), together)
        with torch.inference_mode():
            base = model(ids, use_cache=False).logits
        assert torch.equal(together[:, :6], base[:, :6])
        assert not torch.equal(together[:, 6:], base[:, 6:])


@pytest.fixture
def mlp(tiny):
    """The MLP of a model whose siblings are known, the model, and a text."""
    model = adapted(tiny, num_hidden_layers=1)
    ids = text(tiny, model)
    logits(model, ids)
    return model.model.layers[0].mlp, model, ids


def alone(layer, x, rows):
    """What the layer makes of x [B, T, H] by itself."""
    y = layer.base_layer(x)
    siblings.adapt([y], x, rows, [layer], ["default"])
    return y


def test_another_tensor_is_another_matter(mlp, served):
    """Equal or not; asked for twice; in another order; the first never; and nothing is given out late."""
    mlp, model, ids = mlp
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(*ids.shape, 32, generator=generator) for _ in range(2))
    rows = ids == gate_of(model).mask_token_id
    gate, up = mlp.gate_proj, mlp.up_proj
    with torch.inference_mode():
        expected = {(layer, z): alone(layer, z, rows) for layer in (gate, up) for z in (x, other)}
        served.clear()
        for calls, together in (
            ([(gate, x), (up, x)], [2]),
            ([(gate, x), (up, other)], [2, 1]),
            ([(gate, x), (up, other), (up, x)], [2, 1, 1]),
            ([(gate, x), (up, x), (up, x)], [2, 1]),
            ([(up, x), (gate, x)], [1, 2]),
            ([(gate, x), (gate, other), (up, x), (up, other)], [2, 2, 1, 1]),
            ([(gate, x), (gate, x), (up, x)], [2, 2]),
        ):
            with gated(model, ids):
                for layer, z in calls:
                    found = layer(z)
                    assert torch.equal(found, expected[layer, z])
                    found.zero_()  # an output belongs to who asked for it
            assert served == together
            served.clear()
        with gated(model, ids):
            gate(x)
        with gated(model, ids):
            assert torch.equal(up(x), expected[up, x])
            copied = x.clone()
            gate(copied)
            assert torch.equal(up(x), expected[up, x])


def test_nothing_outlives_its_pass(mlp):
    """Neither what was fetched nor what was not; nor does a layer keep a forward, also where the pass fails."""
    mlp, model, ids = mlp
    x = torch.zeros(*ids.shape, 32)

    def begin():
        """The first of two siblings is called: what is made of it, and for the other."""
        return weakref.ref(mlp.gate_proj(x)), weakref.ref(mlp.up_proj.mtpkern_turn.left[1])

    def failing():
        with gated(model, ids):
            made.extend(begin())
            raise ZeroDivisionError

    made = []
    with torch.inference_mode():
        with gated(model, ids):
            made += begin()
            assert made[0]() is None
            assert made[1]() is not None
            assert mlp.up_proj(x) is not None
            assert made[1]() is None
            made += begin()
        assert [y() for y in made] == [None] * 4
        with pytest.raises(ZeroDivisionError):
            failing()
        assert made[5]() is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_goes_without_a_collection(tiny):
    model = adapted(tiny, num_hidden_layers=1)
    logits(model, ids := text(tiny, model))
    logits(model, ids)
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.base_layer.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_adapters_that_are_more_than_ours(tiny, served):
    """Switched off, or beside a plain one of some layers: by itself, as peft has it."""
    from peft import LoraConfig

    model = adapted(tiny)
    ids = text(tiny, model)
    first = logits(model, ids)
    attention, found = model.model.layers[1].self_attn, model.mtpkern_siblings.found

    def both_ways():
        served.clear()
        together = logits(model, ids)
        calls = list(served)
        model.mtpkern_siblings.found = []
        assert torch.equal(logits(model, ids), together)
        model.mtpkern_siblings.found = found
        return together, calls

    attention.v_proj.update_layer("plain", 2, 4, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    attention.v_proj.set_adapter(["default", "plain"])
    more, calls = both_ways()
    assert not torch.equal(more, first)
    assert calls == [3, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    attention.v_proj.set_adapter("default")
    attention.k_proj.enable_adapters(False)
    fewer, calls = both_ways()
    assert not torch.equal(fewer, first)
    assert calls == [3, 1, 2, 1, 1, 1, 1, 2, 1]
    attention.k_proj.enable_adapters(True)
    attention.v_proj.set_scale("default", 3.0)
    scaled, calls = both_ways()
    assert not torch.equal(scaled, first)
    attention.v_proj.set_scale("default", 1.0)
    model.model.layers[0].mlp.up_proj.lora_A.double()
    assert torch.equal(logits(model, ids), first)
    model.model.layers[0].mlp.up_proj.lora_A.float()
    again, calls = both_ways()
    assert torch.equal(again, first)
    assert calls == [3, 1, 2, 1] * 2


def test_a_pass_without_masks_is_the_bases_alone(tiny, monkeypatch):
    """To the bit, without peft's forward; but where another adapter has something to add, or somebody's forward is."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    model, forward, calls = adapted(tiny), Linear.forward, []
    ids, _ = tiny.prompts(6, 6)

    def alone():
        calls.clear()
        with torch.inference_mode(), base_alone(model):
            return model(ids, use_cache=False).logits

    expected = logits(model, ids)

    def noted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", noted)
    assert torch.equal(alone(), expected)
    assert not calls
    assert not any("forward" in vars(layer) for layer in model.modules())
    other = model.model.layers[1].self_attn.o_proj
    other.update_layer("plain", 2, 4, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    other.set_adapter(["default", "plain"])
    assert not torch.equal(alone(), expected)
    assert calls == [other]
    other.set_adapter("default")
    theirs = model.model.layers[0].mlp.up_proj
    theirs.forward = own = lambda x: x.new_zeros(*x.shape[:-1], theirs.out_features)
    assert not torch.equal(alone(), expected)
    assert theirs.forward is own


def test_decoding_on_a_cpu_leaves_peft_out_where_no_row_is_a_mask(tiny, monkeypatch):
    from peft.tuners.lora import Linear

    model, forward, calls = adapted(tiny), Linear.forward, []
    ids, _ = tiny.prompts(6, 6)

    def noted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", noted)
    mtpkern.generate(model, ids, strategy=mtpkern.Static(1), max_new_tokens=8, check_model=False)
    # The prefill alone goes through peft's.
    assert len(calls) == len(model.mtpkern_siblings.layers)


def test_other_passes_are_not_touched(tiny, served):
    """With gradients, of another thread, of a copy of the model, and where a layer has somebody's own forward."""
    model = adapted(tiny)
    ids = text(tiny, model)
    first = logits(model, ids)
    twin = copy.deepcopy(model)
    theirs = model.model.layers[0].mlp.up_proj
    theirs.forward = own = theirs.forward
    served.clear()
    assert torch.equal(logits(model, ids), first)
    assert served == [3, 1, 1, 1, 1, 3, 1, 2, 1]
    assert theirs.forward is own
    del theirs.forward
    with torch.inference_mode():
        expected, found = model(ids, use_cache=False).logits, []
    with torch.inference_mode(), gated(model, ids):
        thread = Thread(target=lambda: found.append(model(ids, use_cache=False).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    with gated(model, ids):
        torch.testing.assert_close(model(ids, use_cache=False).logits, first)
    served.clear()
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.neg_()
    assert not torch.equal(logits(twin, ids), first)
    assert served == GROUPS["llama"] * 2
    assert torch.equal(logits(model, ids), first)


def test_a_first_pass_that_fails_shows_nothing(tiny, served):
    model = adapted(tiny)
    ids = text(tiny, model)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, ids)
    hook.remove()
    first = logits(model, ids)
    assert set(served) == {1}
    served.clear()
    assert torch.equal(logits(model, ids), first)
    assert served == GROUPS["llama"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_in_a_graph(compile, tiny, monkeypatch):
    """What masks predict is emitted here: the same by one layer after another, and captured."""
    model = adapted(tiny, device="cuda")
    ids, mask = (x.to("cuda") for x in tiny.prompts(9, 4))
    options = {"attention_mask": mask, "strategy": mtpkern.ConfAdapt(3, threshold=0.15), "max_new_tokens": 24}
    with monkeypatch.context() as patch:
        patch.setattr(siblings.Siblings, "__call__", lambda self: nullcontext())
        expected = mtpkern.generate(model, ids, use_graph=False, compile=False, **options)
    for use_graph in (False, True, True):
        found = mtpkern.generate(model, ids, use_graph=use_graph, compile=compile, **options)
        assert torch.equal(found, expected)
    assert model.mtpkern_siblings.found
    assert mtpkern.release_graphs(model) == 1


@pytest.mark.parametrize(
    ("base", "adapter", "taken"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_matrices_are_cast_only_where_the_op_does_not_take_them(base, adapter, taken, tiny, monkeypatch):
    """A cast would be a launch of each captured pass, and one to bfloat16 would lose digits of the adapter."""
    model = tiny.adapted(tiny.model("llama").to(base)).get_base_model()
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data = x.data.to(adapter)
    seen = []
    op = siblings.gated_lora
    monkeypatch.setattr(siblings, "gated_lora", lambda *args: seen.append(args[3][0].dtype) or op(*args))
    mask = gate_of(model).mask_token_id
    ids = torch.tensor([[3, mask]])
    with torch.inference_mode(), gated(model, ids):
        model(ids, use_cache=False)
    assert set(seen) == {taken}
