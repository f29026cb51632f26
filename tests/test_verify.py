"""Models that nobody has tried are compared with themselves before they decode."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mtpkern
import mtpkern.verify
from mtpkern import Static
from mtpkern.model import CACHE_ARGUMENTS

TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def untried(model_type: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, "bos_token_id": 1, "eos_token_id": None, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    return model


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes that were compared; nothing is remembered from other tests."""
    seen: list[str] = []
    compare = mtpkern.verify._compare
    monkeypatch.setattr(mtpkern.verify, "_verified", set())
    monkeypatch.setattr(
        mtpkern.verify,
        "_compare",
        lambda model, *a, **kw: (seen.append(type(model).__name__), compare(model, *a, **kw))[1],
    )
    return seen


def decode(model: Any, **options: Any) -> Tensor:
    return mtpkern.generate(
        model, torch.tensor([[3, 4, 5]]), strategy=Static(2), mask_token_id=31, max_new_tokens=5, **options
    )


def test_an_untried_class_is_compared_once_in_a_process(compared: list[str], tiny: Any) -> None:
    for _ in range(2):
        decode(untried("starcoder2"))
    assert compared == ["Starcoder2ForCausalLM"]
    decode(untried("olmo"), check_model=False)
    mtpkern.generate(tiny.model("llama"), torch.tensor([[3, 4, 5]]), max_new_tokens=5)
    assert compared == ["Starcoder2ForCausalLM"]
    decode(untried("olmo"))
    assert compared == ["Starcoder2ForCausalLM", "OlmoForCausalLM"]


def test_a_refusal_is_remembered_and_says_what_differs(compared: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mtpkern.cache.decode_attention
    monkeypatch.setattr(
        mtpkern.cache,
        "decode_attention",
        lambda *a, **kw: attend(*a[:-1], replace(a[-1], scale=a[-1].scale * 1.5), **kw),
    )
    model = untried("starcoder2")
    before = model.config.to_json_string()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot decode Starcoder2ForCausalLM: its logits differ by up to \d"):
            decode(model)
    assert len(compared) == 1
    assert model.config.to_json_string() == before
    assert decode(model, check_model=False).shape == (1, 8)
    assert not mtpkern.check(model, mask_token_id=31).ok


def test_a_models_file_and_weights_say_nothing_of_its_kind(compared: list[str]) -> None:
    """Beams and the like in a file change transformers' tokens, but ours is greedy; NaN is one model's fault."""
    broken = untried("starcoder2")
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot decode Starcoder2ForCausalLM: its logits hold NaN or inf"):
            decode(broken)
    assert len(compared) == 1
    model = untried("starcoder2")
    expected = decode(model, check_model=False)
    model.generation_config.update(num_beams=3, repetition_penalty=1.5, stop_strings=["a"], penalty_alpha=0.6, top_k=4)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    model.generation_config.output_attentions = True
    assert decode(model).equal(expected)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert len(compared) == 2


def test_keys_that_are_changed_behind_the_cache_are_found(compared: list[str]) -> None:
    """The prefill attends to other keys than it has cached, a step to those that it caches."""
    from transformers.models.starcoder2 import modeling_starcoder2

    class Doubling(modeling_starcoder2.Starcoder2Attention):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            for name in kwargs.keys() & {*CACHE_ARGUMENTS}:
                kwargs[name] = kwargs[name] and _Behind(kwargs[name])
            return super().forward(hidden_states, *args, **kwargs)

    class _Behind:
        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            key, value = self.cache.update(key, value, *args, **kwargs)
            return key * 1.5, value

    model = untried("starcoder2")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Doubling
    with pytest.raises(ValueError, match="cannot decode Starcoder2ForCausalLM: its logits differ"):
        decode(model)


def test_the_pad_id_is_no_word(tiny: Any) -> None:
    """A roberta counts positions from behind it; with one among the words every position would differ."""
    model = untried("roberta", is_decoder=True, pad_token_id=1, bos_token_id=0)
    ids, real = mtpkern.verify._prompts(model, 31, 128, 20)
    assert not ((ids == 1) & (real == 1)).any()
    assert not (ids == 31).any()
    report = mtpkern.check(model, mask_token_id=31)
    assert report.ok, report


def test_prompts_go_past_the_window_or_the_report_says_so(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("mistral", sliding_window=50)
    assert mtpkern.verify._prompts(model, 15, 128, 20)[0].shape[1] > 50
    assert mtpkern.check(model).not_covered == ()
    monkeypatch.setattr(mtpkern.verify, "WINDOW", 49)
    report = mtpkern.check(model)
    assert report.ok
    assert report.not_covered == ("its sliding window of 50 tokens, as the prompts have 40: pass longer input_ids",)
    one = mtpkern.check(model, tiny.prompts(60)[0])
    assert one.not_covered == ("prompts of different length side by side",)
    # Positions that a model does not have are not asked for.
    short = tiny.model("llama", max_position_embeddings=32)
    assert mtpkern.verify._prompts(short, 15, 128, 20)[0].shape[1] == 10


@pytest.mark.parametrize("window", [126, None])
def test_a_window_that_no_trial_reaches_is_told_or_refused(window: int | None, compared: list[str]) -> None:
    """Its layers have a mask for it, and call attention without."""
    model = untried("phimoe", sliding_window=window)
    if window is None:
        assert decode(model).shape == (1, 8)
        return
    with pytest.raises(ValueError, match=r"layer 0 .*=None, .* of 128 tokens its mask shows 126,"):
        decode(model)


def test_a_window_that_a_layer_tells_and_does_not_keep_to_is_refused(compared: list[str]) -> None:
    model = untried("olmoe", sliding_window=126)
    with pytest.raises(ValueError, match=r"layer 0 .*=126, .* of 128 tokens its mask shows 128,"):
        decode(model)
    assert decode(untried("starcoder2", sliding_window=120)).shape == (1, 8)


def test_a_window_of_which_only_the_cache_knows_is_refused(compared: list[str]) -> None:
    """A file of Llama's may have one: its layers see all of a prompt, and later what transformers' cache has kept."""
    model = untried("llama", sliding_window=126)
    with pytest.raises(ValueError, match=r"layer 0 .*=None, .* mask shows 128, and transformers' own cache keeps 126"):
        decode(model)
    assert decode(untried("llama")).shape == (1, 8)


def test_a_window_that_is_changed_behind_the_layers_is_refused(compared: list[str]) -> None:
    """As masks would be made for the new one, and layers call attention with the old."""
    model = untried("qwen2", use_sliding_window=True, sliding_window=100, max_window_layers=0)
    before = decode(model)
    model.config.sliding_window = 120
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layer 0 .*=100, .* its mask shows 120,"):
            decode(model)
    model.config.sliding_window = 100
    assert decode(model).equal(before)
    assert not compared


def test_in_bfloat16_rounding_is_no_fault(tiny: Any) -> None:
    report = mtpkern.check(tiny.model("llama").to(torch.bfloat16))
    assert report.ok, report
    assert any("bfloat16" in what for what in report.not_covered)
    assert report.max_error <= report.tolerance < report.scale


@pytest.mark.parametrize("wrapped", [False, True], ids=["around the call", "in the model's own forward"])
def test_under_autocast_rounding_is_no_fault(tiny: Any, wrapped: bool) -> None:
    """accelerate puts it around a forward that gives its logits back in float32."""
    model = tiny.model("llama")
    autocast = torch.autocast("cpu", torch.bfloat16)
    if wrapped:
        model.forward = convert_outputs_to_fp32(autocast(model.forward))
    with nullcontext() if wrapped else autocast:
        report = mtpkern.check(model)
        mtpkern.generate(model, torch.tensor([[3, 4, 5]]), max_new_tokens=4)
    assert not report.exact
    assert report.ok, report
    assert report.max_error > 1e-3 * report.scale
    assert any("torch.bfloat16: load it in float32, without autocast" in what for what in report.not_covered)
    assert mtpkern.check(tiny.model("llama")).exact


def test_noise_is_how_far_transformers_is_from_itself(tiny: Any) -> None:
    """It widens the tolerance. Not every processor rounds one row otherwise than several: this model's head does."""
    model = tiny.model("llama").to(torch.bfloat16)
    quiet = mtpkern.check(model)
    model.lm_head.register_forward_hook(lambda _, args, logits: logits * (1 + 2**-6 * (args[0].shape[1] == 1)))
    report = mtpkern.check(model)
    assert report.ok, report
    assert report.noise > max(quiet.noise, 0.05 * report.scale / 4)
    assert report.tolerance == 4 * report.noise > quiet.tolerance


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"k": None}, "k must be a whole number"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must be \[B, T\]"),
        ({"input_ids": torch.tensor([[1.0]])}, "input_ids must be whole numbers"),
        ({"input_ids": torch.tensor([[1, 10**6]])}, "input_ids must be from 0 to"),
    ],
)
def test_what_is_asked_in_vain_is_said(options: dict[str, Any], says: str, tiny: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        mtpkern.check(tiny.model("llama"), **options)
