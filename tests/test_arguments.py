"""What a call may ask for: every field of the installed GenerationConfig, and every model's own file."""

import copy
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor

import mtpkern
from mtpkern.arguments import HONOURED, plain_greedy, read_arguments
from support.models import PUBLISHED

NEW = 3


def theirs(model: Any, tiny: Any, **kwargs: Any) -> Tensor:
    """transformers' own greedy decoding of the same tokens, that of the mask token left out."""

    def hide(head: Any, args: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(tiny.mask), -1e9)

    hook = model.lm_head.register_forward_hook(hide)
    try:
        return LlamaForCausalLM.generate(model, **kwargs)
    finally:
        hook.remove()


# The fields of GenerationConfig

VALUES = (False, True, 0, 7, 0.5, "x", [], [3], {})


FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in HONOURED])
@pytest.mark.filterwarnings("ignore")
def test_every_field_is_inert_or_refused_by_name(name: str, shared: Any, pair: Any, tiny: Any) -> None:
    """No third outcome: what is accepted gives the tokens that transformers gives with it, all else names the field."""
    accepted, refused = [], []
    for value in VALUES:
        config = GenerationConfig()
        setattr(config, name, value)
        outcomes = set()
        for given in ({name: value}, {"generation_config": config}):
            try:
                _, settings, left_out = read_arguments(GenerationConfig(), pair["input_ids"], given)
                outcomes.add("accepted")
            except ValueError as error:
                outcomes.add(str(error).partition(";")[0])
                continue
            assert (settings, left_out) == ({}, {})
        assert outcomes in ({"accepted"}, {f"mtpkern.generate does not support {name}={value!r}"})
        (accepted if outcomes == {"accepted"} else refused).append(value)
    ours = mtpkern.generate(shared, **pair, max_new_tokens=NEW, **{name: accepted[0] if accepted else None})
    for value in accepted:
        try:
            expected = theirs(shared, tiny, **pair, max_new_tokens=NEW, **{name: value})
        except (ValueError, TypeError, AttributeError, IndexError):
            # transformers stumbles over what asks for nothing: an empty list, a wrong type beside which it is greedy.
            expected = theirs(shared, tiny, **pair, max_new_tokens=NEW)
        assert ours.equal(expected), value


@pytest.mark.parametrize(
    "given",
    [
        {"inputs": None},
        {"max_new_tokens": 3.0},
        {"max_new_tokens": torch.tensor(3)},
        {"suppress_tokens": []},
        {"begin_suppress_tokens": []},
        {"guidance_scale": 1},
        {"min_new_tokens": 0},
        {"min_length": 0},
        {"length_penalty": 2.0},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "hybrid"},
        {"tokenizer": SimpleNamespace()},
        {"logits_processor": LogitsProcessorList()},
        {"stopping_criteria": []},
        {"do_sample": False, "temperature": 0.6},
        {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0},
        {"synced_gpus": False, "trust_remote_code": False, "streamer": None, "assistant_model": None},
        {"use_cache": True, "output_scores": False, "output_attentions": False, "return_dict_in_generate": False},
        {"eos_token_id": None, "pad_token_id": None, "max_length": None},
        {"renormalize_logits": True},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.7, "min_p": 0.1, "epsilon_cutoff": 0.2},
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(given: dict[str, Any], shared: Any, pair: Any) -> None:
    expected = mtpkern.generate(shared, **pair, max_new_tokens=NEW)
    assert mtpkern.generate(shared, **{**pair, "max_new_tokens": NEW, **given}).equal(expected)


def test_a_field_of_a_later_transformers_is_refused(shared: Any, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    init = GenerationConfig.__init__

    def later(self: GenerationConfig, **kwargs: Any) -> None:
        self.telepathy = kwargs.pop("telepathy", None)
        init(self, **kwargs)

    monkeypatch.setattr(GenerationConfig, "__init__", later)
    monkeypatch.setattr("mtpkern.arguments.FIELDS", {*FIELDS, "telepathy"})
    for given in ({"telepathy": 3}, {"generation_config": GenerationConfig(telepathy=3)}):
        with pytest.raises(ValueError, match="telepathy=3"):
            mtpkern.generate(shared, **pair, max_new_tokens=NEW, **given)


def test_a_name_that_transformers_does_not_know_is_refused_in_a_config_too(shared: Any, pair: Any) -> None:
    with pytest.raises(ValueError, match=r"tempreature=0\.5"):
        mtpkern.generate(shared, **pair, generation_config=GenerationConfig(max_new_tokens=4, tempreature=0.5))


# Arguments of model.generate that are no fields of GenerationConfig, each with a value that would mean something.
ARGUMENTS: dict[str, Any] = {
    "prefix_allowed_tokens_fn": lambda b, ids: [1, 2],
    "assistant_model": SimpleNamespace(),
    "synced_gpus": True,
    "negative_prompt_ids": torch.ones(2, 2, dtype=torch.long),
    "negative_prompt_attention_mask": torch.ones(2, 2, dtype=torch.long),
    "custom_generate": "some/repository",
    "past_key_values": SimpleNamespace(),
    "cache": SimpleNamespace(),
    "position_ids": torch.arange(6).expand(2, 6),
    "inputs_embeds": torch.zeros(2, 6, 32),
    "assistant_tokenizer": SimpleNamespace(),
    "logits_to_keep": 2,
    "labels": torch.ones(2, 6, dtype=torch.long),
    "no_such_argument": 1,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_not_honoured_are_refused_by_name(name: str, shared: Any, pair: Any) -> None:
    instead = "give the calls a prefix_cache" if name in {"past_key_values", "cache"} else "leave it out"
    with pytest.raises(ValueError, match=f"does not support {name}; {instead}"):
        mtpkern.generate(shared, **pair, max_new_tokens=4, **{name: ARGUMENTS[name]})


def test_prompts_in_a_form_that_is_not_honoured_are_refused_by_its_name(shared: Any) -> None:
    with pytest.raises(ValueError, match="does not support inputs_embeds; leave it out"):
        mtpkern.generate(shared, inputs_embeds=ARGUMENTS["inputs_embeds"], max_new_tokens=4)


def test_prompts_by_either_of_their_names_and_not_by_both(shared: Any, pair: Any) -> None:
    ids, mask = pair["input_ids"], pair["attention_mask"]
    found = mtpkern.generate(shared, inputs=ids, attention_mask=mask, max_new_tokens=4)
    assert found.equal(mtpkern.generate(shared, **pair, max_new_tokens=4))
    with pytest.raises(ValueError, match="inputs and input_ids are two names of the prompts, got both"):
        mtpkern.generate(shared, inputs=ids, **pair, max_new_tokens=4)


def test_every_argument_of_generate_is_accounted_for(shared: Any) -> None:
    known = {"inputs", "generation_config", "kwargs", "trust_remote_code", "stopping_criteria", "streamer"}
    known |= {"logits_processor", *ARGUMENTS}
    assert set(inspect.signature(LlamaForCausalLM.generate).parameters) <= known | {"self"}


def test_what_a_models_own_preparation_adds_is_refused(model: Any, pair: Any) -> None:
    class Adds(LlamaForCausalLM):
        def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
            return LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1.2, pair["input_ids"])])

    model.__class__ = Adds
    with pytest.raises(ValueError, match="the logits processor EncoderRepetitionPenaltyLogitsProcessor"):
        mtpkern.generate(model, **pair, max_new_tokens=4)


# The model's own file

# What they ask for and get no more of is named.
FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{name: (values, []) for name, values in PUBLISHED.items()},
    "Qwen2.5-7B-Instruct": (PUBLISHED["Qwen2.5-7B-Instruct"], ["repetition_penalty=1.05"]),
    "Qwen2.5-0.5B-Instruct": (PUBLISHED["Qwen2.5-0.5B-Instruct"], ["repetition_penalty=1.1"]),
    "stop strings": ({"stop_strings": ["###"], "eos_token_id": 3}, ["stop_strings=['###']"]),
    "whisper-like": (
        {"suppress_tokens": [4, 5], "begin_suppress_tokens": [6], "forced_eos_token_id": 3, "num_beams": 5},
        ["begin_suppress_tokens=[6]", "forced_eos_token_id=3", "num_beams=5", "suppress_tokens=[4, 5]"],
    ),
    "how, not what": (
        {"use_cache": False, "prefill_chunk_size": 4, "output_scores": True, "prompt_lookup_num_tokens": 3},
        [],
    ),
    "a quantised cache": ({"cache_implementation": "quantized"}, ["cache_implementation='quantized'"]),
    "what HF's default is": ({"repetition_penalty": 1.0, "num_beams": 1, "min_length": 0, "guidance_scale": 1.0}, []),
}


@pytest.mark.parametrize("name", FILES)
def test_what_only_the_models_file_asks_for_is_greedy(name: str, model: Any, pair: Any, tiny: Any) -> None:
    """The stop ids and limits of the file count, its sampling does not; what else would change tokens is said once."""
    values, said = FILES[name]
    stops, pad = values.get("eos_token_id"), values.get("pad_token_id", model.generation_config.pad_token_id)
    plain = theirs(model, tiny, **pair, max_new_tokens=12, eos_token_id=stops, pad_token_id=pad)
    model.generation_config = GenerationConfig.from_dict({"pad_token_id": pad, **values})
    before = copy.deepcopy(model.generation_config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = mtpkern.generate(model, **pair, max_new_tokens=12)
    assert output.equal(plain)
    messages = [str(w.message) for w in caught if "mtpkern" in str(w.message)]
    assert len(messages) == bool(said)
    assert all(value in messages[0] for value in said)
    assert model.generation_config == before
    # What the warning names is what makes the two equal, for us and for them.
    _, _, left_out = read_arguments(model.generation_config, pair["input_ids"], {})
    assert sorted(f"{n}={v!r}" for n, v in left_out.items()) == sorted(said)
    without = {n: GenerationConfig._get_default_generation_params().get(n) for n in left_out}
    if "output_scores" not in values:
        model.generation_config.use_cache = True
        assert theirs(model, tiny, **pair, max_new_tokens=12, do_sample=False, **without).equal(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mtpkern.generate(model, **pair, max_new_tokens=12, **without).equal(plain)


def test_a_file_that_contradicts_itself_is_named(model: Any, pair: Any) -> None:
    model.generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match=r"^the model's generation_config must be .*num_return_sequences.* Set the"):
        mtpkern.generate(model, **pair, max_new_tokens=NEW)
    model.generation_config.do_sample = True
    assert mtpkern.generate(model, **pair, max_new_tokens=NEW).shape == (2, 6 + NEW)


def test_limits_of_the_models_file_count(model: Any, pair: Any) -> None:
    model.generation_config = GenerationConfig(max_new_tokens=3.0, do_sample=True)
    assert mtpkern.generate(model, **pair).shape == (2, 9)
    assert mtpkern.generate(model, **pair, max_new_tokens=2).shape == (2, 8)
    model.generation_config = GenerationConfig(max_length=11, do_sample=True)
    assert mtpkern.generate(model, **pair).shape == (2, 11)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"temperature": 0.5}, "temperature=0.5; .* says do_sample=True"),
        ({"top_k": 50}, "top_k=50"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"generation_config": GenerationConfig(do_sample=True, num_beams=2)}, "num_beams=2; leave it out"),
    ],
    ids=str,
)
def test_what_the_call_asks_for_is_refused_whatever_the_file_says(
    asked: dict[str, Any], names: str, model: Any, pair: Any
) -> None:
    """Beside a file that samples, a temperature alone asks for sampling, and greedy tokens would be the wrong ones."""
    model.generation_config.update(do_sample=True, temperature=0.5, repetition_penalty=1.1)
    with pytest.raises(ValueError, match=names):
        mtpkern.generate(model, **pair, max_new_tokens=4, **asked)


def test_the_models_own_config_given_to_the_call_asks_for_no_more(model: Any, pair: Any) -> None:
    model.generation_config.update(do_sample=True, temperature=0.6, max_new_tokens=4)
    expected = mtpkern.generate(model, **pair)
    assert mtpkern.generate(model, **pair, generation_config=model.generation_config).equal(expected)
    # The call's sampling settings mean nothing once it says do_sample=False, in either place.
    assert mtpkern.generate(model, **pair, do_sample=False, temperature=0.2).equal(expected)
    config = GenerationConfig(do_sample=False, temperature=0.2, max_new_tokens=4)
    assert mtpkern.generate(model, **pair, generation_config=config).equal(expected)


def test_plain_greedy_makes_their_generate_greedy(model: Any, pair: Any, tiny: Any) -> None:
    expected = theirs(model, tiny, **pair, max_new_tokens=NEW)
    model.generation_config.update(do_sample=True, repetition_penalty=1.5, num_beams=3, eos_token_id=3)
    settings = plain_greedy(model.generation_config)
    assert settings == {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1} | settings
    assert "eos_token_id" not in settings
    assert theirs(model, tiny, **pair, **settings, max_new_tokens=NEW, eos_token_id=None).equal(expected)
