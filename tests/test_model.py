"""The adapter: the mask token, what a model must be like, and the check of a model that nobody has tried."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

import mtpkern
import mtpkern.cache
from mtpkern.model import MASK_TOKEN, recorded_settings, require_decodable, resolve_mask_token

WORDS = 14


def word_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """WORDS tokens: <pad>, <eos>, then words."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", **kwargs)


def untrained(tiny: Any, vocabulary: int = WORDS, **settings: Any) -> Any:
    """A model that has never met the mask token."""
    model = tiny.model("llama", vocab_size=vocabulary, **settings)
    del model.config.mtpkern
    return model


def weights(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


# The mask token


@pytest.mark.parametrize("tied", [False, True])
def test_add_mask_token_pads_to_a_multiple_of_64(tied: bool, tiny: Any) -> None:
    model, tokenizer = untrained(tiny, tie_word_embeddings=tied), word_tokenizer()
    before = [w.clone() for w in weights(model)]
    mask = mtpkern.add_mask_token(model, tokenizer)
    assert mask == WORDS == len(tokenizer) - 1
    assert model.config.vocab_size == 64
    assert (weights(model)[0] is weights(model)[1]) == tied
    for old, new in zip(before, weights(model)):
        assert new.shape == (64, 32)
        assert new[:WORDS].equal(old)
        assert not new[WORDS].equal(old.mean(0))
    assert recorded_settings(model) == {"mask_token_id": mask, "version": 1}
    assert resolve_mask_token(model) == mask


def test_padding_is_never_the_greatest_and_the_mask_token_suppressed(tiny: Any) -> None:
    """Rows of zeros, or of a fresh initialisation, would win wherever all other logits are negative."""
    model = untrained(tiny)
    prompts, _ = tiny.prompts(8, 8, 8, 8, 8, 8)
    prompts = prompts.clamp(1, WORDS - 1)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        states = model.model(prompts).last_hidden_state
        direction = states.mean((0, 1))
        head -= 100 * direction / direction.norm() ** 2  # every logit far below 0
    mtpkern.add_mask_token(model, word_tokenizer())
    with torch.no_grad():
        logits = model(prompts).logits
    assert (logits[..., :WORDS].mean(-1) < -10).any()
    assert logits[..., WORDS + 1 :].amax(-1).lt(logits[..., :WORDS].amax(-1)).all()
    # The mask token's own logit may be the greatest, but no decoder emits it.
    with torch.no_grad():
        model.get_output_embeddings().weight[WORDS] = -model.get_output_embeddings().weight[3]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.generation_config.suppress_tokens = None
    assert (model.generate(prompts, **options)[:, 8:] == WORDS).any()
    model.generation_config.suppress_tokens = [WORDS]
    theirs = model.generate(prompts, **options)
    assert not (theirs == WORDS).any()
    assert mtpkern.generate(model, prompts, **options).equal(theirs)


def test_suppressed_tokens_are_kept_and_saved(tiny: Any, tmp_path: Path) -> None:
    model = untrained(tiny)
    model.generation_config.suppress_tokens = [5]
    mask = mtpkern.add_mask_token(model, word_tokenizer())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["suppress_tokens"] == [5, mask]


def test_spare_rows_of_a_padded_vocabulary_are_used(tiny: Any) -> None:
    model, tokenizer = untrained(tiny, 20), word_tokenizer()
    with torch.no_grad():
        for w in weights(model):
            w[WORDS:] = 1e6  # never trained, so they may hold anything and count for nothing
    assert mtpkern.add_mask_token(model, tokenizer) == WORDS
    for w in weights(model):
        assert w.shape[0] == 20
        assert w[WORDS].abs().max() < 100
        assert w[WORDS + 1 :].eq(1e6).all()


def test_mask_rows_have_mean_and_variance_of_the_others(tiny: Any) -> None:
    width = 4096
    model = untrained(tiny, hidden_size=width, intermediate_size=8, num_hidden_layers=1)
    with torch.no_grad():
        for scale, w in zip((0.1, 3.0), weights(model)):
            w.mul_(torch.linspace(0.5, 2, width) * scale).add_(torch.linspace(-4, 4, width) * scale)
    others = [w.clone() for w in weights(model)]
    mask = mtpkern.add_mask_token(model, word_tokenizer())
    rows = []
    for old, w in zip(others, weights(model)):
        z = (w[mask] - old.mean(0)) / old.std(0)
        assert abs(z.mean()) < 0.06
        assert abs(z.std() - 1) < 0.06
        rows.append(z)
    assert abs(torch.corrcoef(torch.stack(rows))[0, 1]) < 0.06
    # A fixed draw: the same model gets the same rows.
    again = untrained(tiny, hidden_size=width, intermediate_size=8, num_hidden_layers=1)
    with torch.no_grad():
        for old, w in zip(others, weights(again)):
            w.copy_(old)
    mtpkern.add_mask_token(again, word_tokenizer())
    assert all(a.equal(b) for a, b in zip(weights(model), weights(again)))


def test_adding_twice_is_adding_once(tiny: Any, tmp_path: Path) -> None:
    model, tokenizer = untrained(tiny), word_tokenizer()
    mask = mtpkern.add_mask_token(model, tokenizer)
    with torch.no_grad():
        for w in weights(model):
            w[mask] += 1  # trained since
    before, size = [w.clone() for w in weights(model)], len(tokenizer)
    assert mtpkern.add_mask_token(model, tokenizer) == mask
    # A fresh tokenizer beside a trained model gets the token, and the trained rows stay.
    fresh = word_tokenizer()
    assert mtpkern.add_mask_token(model, fresh) == mask
    assert len(tokenizer) == len(fresh) == size
    assert all(a.equal(b) for a, b in zip(before, weights(model)))


def test_a_tokenizer_that_knows_the_token_beside_a_model_that_does_not(tiny: Any) -> None:
    tokenizer = word_tokenizer()
    mask = mtpkern.add_mask_token(untrained(tiny), tokenizer)
    other = untrained(tiny)
    assert mtpkern.add_mask_token(other, tokenizer) == mask
    assert len(tokenizer) == WORDS + 1
    assert weights(other)[0].shape[0] == 64
    assert resolve_mask_token(other) == mask


def test_the_mask_token_is_one_special_token_and_disturbs_no_other(tiny: Any, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(extra_special_tokens=["w5"])
    special = list(tokenizer.all_special_tokens)
    mask = mtpkern.add_mask_token(untrained(tiny), tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(t) == WORDS + 1
        assert t(f"w3{MASK_TOKEN}w4")["input_ids"] == [3, mask, 4]
        assert t.decode([3, mask, 4], skip_special_tokens=True).split() == ["w3", "w4"]
        assert sorted(t.all_special_tokens) == sorted([*special, MASK_TOKEN])
        assert (t.pad_token_id, t.eos_token_id) == (0, 1)
    # A doubled entry would give the stop token a second id, and every text would run on.
    contents = [token["content"] for token in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]]
    assert len(contents) == len(set(contents))


def test_the_record_survives_save_and_load_without_custom_code(tiny: Any, tmp_path: Path) -> None:
    model, tokenizer = untrained(tiny), word_tokenizer()
    mask = mtpkern.add_mask_token(model, tokenizer)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mtpkern"] == {"mask_token_id": mask, "version": 1}
    assert "auto_map" not in config
    assert not list(tmp_path.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert resolve_mask_token(loaded) == mask
    ids = torch.tensor([[2, 3, 4]])
    kwargs = {"strategy": mtpkern.Static(3), "max_new_tokens": 8}
    assert mtpkern.generate(loaded, ids, **kwargs).equal(mtpkern.generate(model, ids, **kwargs))


def test_add_mask_token_needs_a_language_model(tiny: Any) -> None:
    with pytest.raises(ValueError, match="no output embedding"):
        mtpkern.add_mask_token(untrained(tiny).model, word_tokenizer())


def test_resolve_mask_token(tiny: Any) -> None:
    model = tiny.model("llama")
    assert resolve_mask_token(model) == tiny.mask
    assert resolve_mask_token(model, 3) == 3
    for wrong in (-1, tiny.vocabulary):
        with pytest.raises(ValueError, match=f"0 to {tiny.vocabulary - 1}, got {wrong}"):
            resolve_mask_token(model, wrong)
    model.config.mtpkern["mask_token_id"] = 999
    with pytest.raises(ValueError, match="got 999"):
        resolve_mask_token(model)
    del model.config.mtpkern
    with pytest.raises(ValueError, match=r"records no mask token.*mask_token_id="):
        resolve_mask_token(model)


# What a model must be like


def test_a_plain_model_is_decodable(tiny: Any) -> None:
    require_decodable(tiny.model("llama"))
    require_decodable(tiny.model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}))


def _refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_decodable(model)
    # generate and check ask, too.
    with pytest.raises(ValueError, match=message):
        mtpkern.generate(model, torch.tensor([[2, 3]]), mask_token_id=1, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        mtpkern.check(model, mask_token_id=1)


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    _refused(AutoModelForSeq2SeqLM.from_config(config).eval(), "encoder-decoder")


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_unknown_layers_are_refused(kind: str, tiny: Any) -> None:
    model = tiny.model("llama")
    model.config.layer_types = ["full_attention", kind]
    _refused(model, f"layers of type {kind}")


def test_models_on_several_devices_are_refused(tiny: Any) -> None:
    model = tiny.model("llama")
    model.hf_device_map = {"": 0}
    require_decodable(model)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    _refused(model, "2 devices by device_map")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_that_depend_on_the_batch_are_refused(rope: dict[str, Any], tiny: Any) -> None:
    _refused(tiny.model("llama", rope_parameters=rope), f"{rope['rope_type']!r} rotary embeddings")


def test_rotary_embeddings_of_one_kind_of_layer_are_looked_at(tiny: Any) -> None:
    model = tiny.model("gemma3_text")
    model.config.rope_parameters["sliding_attention"]["rope_type"] = "dynamic"
    _refused(model, "'dynamic' rotary embeddings")


def test_a_logit_cap_that_sdpa_ignores_is_refused(tiny: Any) -> None:
    model = tiny.model("gemma2", attention="eager")
    require_decodable(model)
    # Some versions of transformers refuse to load it so, some do not.
    model.config._attn_implementation_internal = "sdpa"
    _refused(model, "attn_implementation='eager'")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt_neox_japanese", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    ],
)
def test_models_that_bypass_the_attention_interface_are_refused(model_type: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=16, bos_token_id=None, eos_token_id=None, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.tensor([[2, 3, 4]])
    with pytest.raises(ValueError, match=r"layers \[0, 1\].* did not call the attention interface"):
        mtpkern.generate(model, ids, strategy=mtpkern.Static(2), mask_token_id=1, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"layers \[0, 1\].* did not call the attention interface"):
        mtpkern.check(model, mask_token_id=1)


# The check


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_check_accepts_what_decodes_right(model_type: str, tiny: Any) -> None:
    model = tiny.model(model_type, sliding_window=6) if model_type == "mistral" else tiny.model(model_type)
    for ids in (None, tiny.prompts(30)[0]):
        report = mtpkern.check(model, ids)
        assert report.ok
        assert report.agreement == 1.0
        assert report.max_error < 1e-4
        assert report.scale > 0.1
        assert report.rows == (2 if ids is None else 1) * 4 * 7  # prompts, passes, rows of a pass with k = 4


def _window_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mtpkern.cache.decode_attention
    monkeypatch.setattr(
        mtpkern.cache, "decode_attention", lambda *a, **kw: attend(*a[:-1], replace(a[-1], window=None), **kw)
    )


def _values_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mtpkern.cache.decode_attention
    monkeypatch.setattr(
        mtpkern.cache,
        "decode_attention",
        lambda query, key, value, *a, **kw: attend(query, key, value.flip(1), *a, **kw),
    )


def _wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mtpkern.cache.decode_attention
    monkeypatch.setattr(
        mtpkern.cache,
        "decode_attention",
        lambda *a, **kw: attend(*a[:-1], replace(a[-1], scale=a[-1].scale * 1.05), **kw),
    )


@pytest.mark.parametrize(
    "plant", [_window_ignored, _values_swapped, _wrong_scale], ids=lambda plant: plant.__name__.strip("_")
)
def test_check_finds_what_decodes_wrong(plant: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("mistral", sliding_window=6)
    plant(monkeypatch)
    report = mtpkern.check(model)
    assert not report.ok
    assert report.max_error > 1e-2 * report.scale
