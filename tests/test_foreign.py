"""A trusted kind of model that somebody has changed is looked at as one that nobody knows."""

import functools
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import mtpkern
import mtpkern.verify
from mtpkern import Static
from mtpkern.foreign import foreign, settings_of


def hook(model: Any) -> None:
    v = torch.ones(model.config.hidden_size)
    model.model.layers[0].register_forward_hook(lambda module, args, o: o + v if o.shape[1] > 1 else o)


def pre_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] + args[0].mean(1, keepdim=True),))


def forward(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    @functools.wraps(plain)  # so that it says to be of transformers
    def mixing(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(hidden_states + hidden_states.mean(1, keepdim=True), *args, **kwargs)

    attention.forward = mixing


class Mixing(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.cumsum(1))


def of_another_class(model: Any) -> None:
    model.model.layers[1].mlp.__class__ = Mixing


def not_causal(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def sharper(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, 3 * query, *args, **kwargs)


def attention(model: Any) -> None:
    AttentionInterface.register("sharper", sharper)
    model.set_attn_implementation("sharper")


CHANGES = (hook, pre_hook, forward, of_another_class, not_causal, attention)


def decode(model: Any, **options: Any) -> torch.Tensor:
    return mtpkern.generate(model, torch.tensor([[3, 4, 5, 6]]), max_new_tokens=6, **options)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    fault = mtpkern.verify._fault
    monkeypatch.setattr(mtpkern.verify, "_fault", lambda *a: (seen.append(a[0]), fault(*a))[1])
    return seen


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_mixes_positions_is_refused(tiny: Any, change: Any, checks: list[Any]) -> None:
    model = tiny.model("llama")
    assert foreign(model) == ()
    change(model)
    assert foreign(model) != ()
    assert foreign(model) == foreign(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot decode LlamaForCausalLM: its logits differ"):
            decode(model)
    assert len(checks) == 1
    decode(model, check_model=False)


def test_a_class_that_is_patched(tiny: Any, checks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny.model("llama"), LlamaAttention.forward
    decode(model)

    def mixing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(self, hidden_states + hidden_states.mean(1, keepdim=True), *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", mixing)
    with pytest.raises(ValueError, match="its logits differ"):
        decode(model)
    monkeypatch.undo()
    decode(model)


def test_attention_that_is_put_in_the_place_of_theirs(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = tiny.model("llama"), tiny.model("llama", attention="eager")
    want = decode(model)

    def short(*args: Any, **kwargs: Any) -> torch.Tensor:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False}).tril().triu(-2)

    for changed, held, name, call in (
        (model, ALL_ATTENTION_FUNCTIONS, "sdpa", sharper),
        (model, ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", short),
        (eager, vars(modeling_llama), "eager_attention_forward", sharper),
    ):
        monkeypatch.setitem(held, name, call)
        with pytest.raises(ValueError, match="its logits differ"):
            decode(changed)
        monkeypatch.undo()
        assert decode(changed).equal(want)


def test_each_state_is_looked_at_once(tiny: Any, checks: list[Any]) -> None:
    model = tiny.model("llama")
    want = decode(model)
    assert not checks
    # What looks on, or acts row by row, is no fault.
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    for _ in range(2):
        assert decode(model).equal(want)
    assert len(checks) == 1
    handle.remove()
    assert decode(model).equal(want)
    assert len(checks) == 1
    hook(model)
    with pytest.raises(ValueError, match="its logits differ"):
        decode(model)
    # A fault goes with its hook.
    model.model.layers[0]._forward_hooks.clear()
    assert decode(model).equal(want)
    everywhere = register_module_forward_hook(lambda module, args, o: o.cumsum(1) if type(module) is LlamaMLP else None)
    try:
        with pytest.raises(ValueError, match="its logits differ"):
            decode(model)
    finally:
        everywhere.remove()


def test_what_the_libraries_put_there_is_theirs(tiny: Any, checks: list[Any]) -> None:
    model = tiny.model("llama")
    want = decode(model)
    add_hook_to_module(model.model.layers[0], ModelHook())
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with torch.no_grad():
        assert decode(model).equal(want)
    assert foreign(model) == ()
    peft_model = tiny.adapted(tiny.model("llama"))
    decode(peft_model)
    assert foreign(peft_model.get_base_model()) == ()
    assert not checks


def test_an_untried_class_is_known_by_its_settings(tiny: Any) -> None:
    one, same, other = (tiny.model("starcoder2", sliding_window=n) for n in (None, None, 4))
    same.config._name_or_path = "elsewhere"
    assert settings_of(one.config) == settings_of(same.config) != settings_of(other.config)
    hash(settings_of(one.config))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"is_causal": False}),
        ("qwen3", {"is_causal": False}),
        ("gemma2", {"use_bidirectional_attention": True, "attention": "eager"}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("starcoder2", {"is_causal": False}),
    ],
)
def test_configured_to_see_both_ways(tiny: Any, kind: str, settings: dict[str, Any]) -> None:
    name = next(name for name in settings if name != "attention")
    model = tiny.model(kind, **settings)
    with pytest.raises(ValueError, match=f"{type(model).__name__} is configured with {name}="):
        decode(model, strategy=Static(2))
    with pytest.raises(ValueError, match=f"configured with {name}="):
        mtpkern.check(model)
