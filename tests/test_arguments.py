"""What a call may ask for: every field of the installed GenerationConfig, every model's own file, every odd value."""

import copy
import inspect
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor

import mtpkern
from mtpkern import Static
from mtpkern.arguments import HONOURED, plain_greedy, read_arguments, require_prompts, whole_number
from mtpkern.custom_generate import write_custom_generate

NEW = 3


@pytest.fixture(scope="module")
def shared(tiny: Any) -> Any:
    return tiny.model("llama")


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny.model("llama")


@pytest.fixture
def inputs(tiny: Any) -> dict[str, Tensor]:
    ids, real = tiny.prompts(6, 4)
    return {"input_ids": ids, "attention_mask": real}


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
def test_every_field_is_inert_or_refused_by_name(name: str, shared: Any, inputs: Any, tiny: Any) -> None:
    """No third outcome: what is accepted gives the tokens that transformers gives with it, all else names the field."""
    accepted, refused = [], []
    for value in VALUES:
        config = GenerationConfig()
        setattr(config, name, value)
        outcomes = set()
        for given in ({name: value}, {"generation_config": config}):
            try:
                _, settings, left_out = read_arguments(GenerationConfig(), inputs["input_ids"], given)
                outcomes.add("accepted")
            except ValueError as error:
                outcomes.add(str(error).partition(";")[0])
                continue
            assert (settings, left_out) == ({}, {})
        assert outcomes in ({"accepted"}, {f"mtpkern.generate does not support {name}={value!r}"})
        (accepted if outcomes == {"accepted"} else refused).append(value)
    ours = mtpkern.generate(shared, **inputs, max_new_tokens=NEW, **{name: accepted[0] if accepted else None})
    for value in accepted:
        try:
            expected = theirs(shared, tiny, **inputs, max_new_tokens=NEW, **{name: value})
        except (ValueError, TypeError, AttributeError, IndexError):
            # transformers stumbles over what asks for nothing: an empty list, a wrong type beside which it is greedy.
            expected = theirs(shared, tiny, **inputs, max_new_tokens=NEW)
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
def test_what_changes_nothing_is_accepted(given: dict[str, Any], shared: Any, inputs: Any) -> None:
    expected = mtpkern.generate(shared, **inputs, max_new_tokens=NEW)
    assert mtpkern.generate(shared, **{**inputs, "max_new_tokens": NEW, **given}).equal(expected)


def test_a_field_of_a_later_transformers_is_refused(shared: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    init = GenerationConfig.__init__

    def later(self: GenerationConfig, **kwargs: Any) -> None:
        self.telepathy = kwargs.pop("telepathy", None)
        init(self, **kwargs)

    monkeypatch.setattr(GenerationConfig, "__init__", later)
    for given in ({"telepathy": 3}, {"generation_config": GenerationConfig(telepathy=3)}):
        with pytest.raises(ValueError, match="telepathy=3"):
            mtpkern.generate(shared, **inputs, max_new_tokens=NEW, **given)


def test_a_name_that_transformers_does_not_know_is_refused_in_a_config_too(shared: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"tempreature=0\.5"):
        mtpkern.generate(shared, **inputs, generation_config=GenerationConfig(max_new_tokens=4, tempreature=0.5))


# Arguments of model.generate that are no fields of GenerationConfig, each with a value that would mean something.
ARGUMENTS: dict[str, Any] = {
    "prefix_allowed_tokens_fn": lambda b, ids: [1, 2],
    "assistant_model": SimpleNamespace(),
    "synced_gpus": True,
    "negative_prompt_ids": torch.ones(2, 2, dtype=torch.long),
    "negative_prompt_attention_mask": torch.ones(2, 2, dtype=torch.long),
    "custom_generate": "some/repository",
    "past_key_values": SimpleNamespace(),
    "position_ids": torch.arange(6).expand(2, 6),
    "inputs_embeds": torch.zeros(2, 6, 32),
    "assistant_tokenizer": SimpleNamespace(),
    "logits_to_keep": 2,
    "labels": torch.ones(2, 6, dtype=torch.long),
    "no_such_argument": 1,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_not_honoured_are_refused_by_name(name: str, shared: Any, inputs: Any) -> None:
    instead = "give the calls a prefix_cache" if name == "past_key_values" else "leave it out"
    with pytest.raises(ValueError, match=f"does not support {name}; {instead}"):
        mtpkern.generate(shared, **inputs, max_new_tokens=4, **{name: ARGUMENTS[name]})


def test_every_argument_of_generate_is_accounted_for(shared: Any) -> None:
    known = {"inputs", "generation_config", "kwargs", "trust_remote_code", "stopping_criteria", "streamer"}
    known |= {"logits_processor", *ARGUMENTS}
    assert set(inspect.signature(LlamaForCausalLM.generate).parameters) <= known | {"self"}


def test_what_a_models_own_preparation_adds_is_refused(model: Any, inputs: Any) -> None:
    class Adds(LlamaForCausalLM):
        def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
            return LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1.2, inputs["input_ids"])])

    model.__class__ = Adds
    with pytest.raises(ValueError, match="the logits processor EncoderRepetitionPenaltyLogitsProcessor"):
        mtpkern.generate(model, **inputs, max_new_tokens=4)


# The model's own file

# As published, the ids made small: what decides is which fields they set.
FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Llama-3.1-Instruct": ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 7, 11]}, []),
    "Llama-2-chat": ({"do_sample": True, "max_length": 4096, "temperature": 0.6, "top_p": 0.9}, []),
    "Qwen3": (
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": [3, 7], "pad_token_id": 7},
        [],
    ),
    "Qwen2.5-7B-Instruct": (
        {
            "do_sample": True,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "eos_token_id": [3],
        },
        ["repetition_penalty=1.05"],
    ),
    "Qwen2.5-0.5B-Instruct": ({"do_sample": True, "repetition_penalty": 1.1}, ["repetition_penalty=1.1"]),
    "gemma-2-it": ({"_from_model_config": True, "cache_implementation": "hybrid", "eos_token_id": 1}, []),
    "gemma-3-it": (
        {"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 6], "top_k": 64, "top_p": 0.95},
        [],
    ),
    "Phi-3.5": ({"_from_model_config": True, "eos_token_id": [7, 1, 0], "pad_token_id": 0}, []),
    "Qwen-1": ({"do_sample": True, "chat_format": "chatml", "max_window_size": 64, "max_new_tokens": 5}, []),
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
def test_what_only_the_models_file_asks_for_is_greedy(name: str, model: Any, inputs: Any, tiny: Any) -> None:
    """The stop ids and limits of the file count, its sampling does not; what else would change tokens is said once."""
    values, said = FILES[name]
    stops, pad = values.get("eos_token_id"), values.get("pad_token_id", model.generation_config.pad_token_id)
    plain = theirs(model, tiny, **inputs, max_new_tokens=12, eos_token_id=stops, pad_token_id=pad)
    model.generation_config = GenerationConfig.from_dict({"pad_token_id": pad, **values})
    before = copy.deepcopy(model.generation_config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = mtpkern.generate(model, **inputs, max_new_tokens=12)
    assert output.equal(plain)
    messages = [str(w.message) for w in caught if "mtpkern" in str(w.message)]
    assert len(messages) == bool(said)
    assert all(value in messages[0] for value in said)
    assert model.generation_config == before
    # What the warning names is what makes the two equal, for us and for them.
    _, _, left_out = read_arguments(model.generation_config, inputs["input_ids"], {})
    assert sorted(f"{n}={v!r}" for n, v in left_out.items()) == sorted(said)
    without = {n: GenerationConfig._get_default_generation_params().get(n) for n in left_out}
    if "output_scores" not in values:
        model.generation_config.use_cache = True
        assert theirs(model, tiny, **inputs, max_new_tokens=12, do_sample=False, **without).equal(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mtpkern.generate(model, **inputs, max_new_tokens=12, **without).equal(plain)


def test_a_file_that_contradicts_itself_is_named(model: Any, inputs: Any) -> None:
    model.generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match=r"^the model's generation_config must be .*num_return_sequences.* Set the"):
        mtpkern.generate(model, **inputs, max_new_tokens=NEW)
    model.generation_config.do_sample = True
    assert mtpkern.generate(model, **inputs, max_new_tokens=NEW).shape == (2, 6 + NEW)


def test_limits_of_the_models_file_count(model: Any, inputs: Any) -> None:
    model.generation_config = GenerationConfig(max_new_tokens=3.0, do_sample=True)
    assert mtpkern.generate(model, **inputs).shape == (2, 9)
    assert mtpkern.generate(model, **inputs, max_new_tokens=2).shape == (2, 8)
    model.generation_config = GenerationConfig(max_length=11, do_sample=True)
    assert mtpkern.generate(model, **inputs).shape == (2, 11)


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
    asked: dict[str, Any], names: str, model: Any, inputs: Any
) -> None:
    """Beside a file that samples, a temperature alone asks for sampling, and greedy tokens would be the wrong ones."""
    model.generation_config.update(do_sample=True, temperature=0.5, repetition_penalty=1.1)
    with pytest.raises(ValueError, match=names):
        mtpkern.generate(model, **inputs, max_new_tokens=4, **asked)


def test_the_models_own_config_given_to_the_call_asks_for_no_more(model: Any, inputs: Any) -> None:
    model.generation_config.update(do_sample=True, temperature=0.6, max_new_tokens=4)
    expected = mtpkern.generate(model, **inputs)
    assert mtpkern.generate(model, **inputs, generation_config=model.generation_config).equal(expected)
    # The call's sampling settings mean nothing once it says do_sample=False, in either place.
    assert mtpkern.generate(model, **inputs, do_sample=False, temperature=0.2).equal(expected)
    config = GenerationConfig(do_sample=False, temperature=0.2, max_new_tokens=4)
    assert mtpkern.generate(model, **inputs, generation_config=config).equal(expected)


def test_plain_greedy_makes_their_generate_greedy(model: Any, inputs: Any, tiny: Any) -> None:
    expected = theirs(model, tiny, **inputs, max_new_tokens=NEW)
    model.generation_config.update(do_sample=True, repetition_penalty=1.5, num_beams=3, eos_token_id=3)
    settings = plain_greedy(model.generation_config)
    assert settings == {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1} | settings
    assert "eos_token_id" not in settings
    assert theirs(model, tiny, **inputs, **settings, max_new_tokens=NEW, eos_token_id=None).equal(expected)


# Who calls whom


def test_a_model_whose_generate_is_ours(tiny: Any, inputs: Any) -> None:
    """Patched on instances, on two of them, on a class: the call comes through, and each decodes its own model."""
    first, second = tiny.model("llama"), tiny.model("llama", seed=5)
    expected = [mtpkern.generate(m, **inputs, max_new_tokens=NEW) for m in (first, second)]
    assert not expected[0].equal(expected[1])
    for m in (first, second):
        m.generate = partial(mtpkern.generate, m, strategy=Static(1))
    for m, tokens in zip((first, second), expected):
        assert m.generate(**inputs, max_new_tokens=NEW).equal(tokens)
        assert m.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=NEW).equal(
            tokens
        )
        assert mtpkern.generate(m, **inputs, max_new_tokens=NEW).equal(tokens)
    # Each within a pass of the other.
    inner = []
    hook = first.lm_head.register_forward_hook(
        lambda *_: inner.append(second.generate(**inputs, max_new_tokens=NEW)) if not inner else None
    )
    assert first.generate(**inputs, max_new_tokens=NEW).equal(expected[0])
    assert inner[0].equal(expected[1])
    hook.remove()

    class Ours(LlamaForCausalLM):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return mtpkern.generate(self, *args, **kwargs)

    del first.generate
    first.__class__ = Ours
    assert first.generate(**inputs, max_new_tokens=NEW).equal(expected[0])


def test_an_adapted_model_whose_base_generates_with_ours(model: Any, inputs: Any) -> None:
    peft = pytest.importorskip("peft")
    expected = mtpkern.generate(model, **inputs, max_new_tokens=NEW)
    model.generate = partial(mtpkern.generate, model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert mtpkern.generate(adapted, **inputs, max_new_tokens=NEW).equal(expected)
    adapted.generate = partial(mtpkern.generate, adapted)
    assert adapted.generate(**inputs, max_new_tokens=NEW).equal(expected)


def test_a_checkpoint_that_brings_our_generate_along(model: Any, inputs: Any, tmp_path: Any) -> None:
    """Loaded by somebody who trusts its code it decodes with ours, streamer and all; by others as ever."""
    expected = mtpkern.generate(model, **inputs, max_new_tokens=NEW)
    model.save_pretrained(tmp_path)
    write_custom_generate(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert isinstance(loaded.generate, partial)
    shown: list[Tensor] = []
    passes = []
    loaded.register_forward_hook(lambda *_: passes.append(1))
    strategy = {"strategy": Static(NEW), "check_model": False}
    assert loaded.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=NEW).equal(
        expected
    )
    passes.clear()
    streamer = SimpleNamespace(put=shown.append, end=lambda: None)
    output = loaded.generate(**inputs, max_new_tokens=NEW, streamer=streamer, return_dict_in_generate=True, **strategy)
    assert torch.stack(shown[1:], dim=1).equal(output.sequences[:, 6:])
    assert output.passes == [1, 1]
    assert len(passes) == 1
    by_name = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    assert model.generate(**inputs, max_new_tokens=NEW, **by_name).equal(expected)
    untrusted = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not isinstance(untrusted.generate, partial)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**inputs, max_new_tokens=NEW, custom_generate=str(tmp_path), trust_remote_code=False)


def test_a_class_that_decodes_in_its_own_way_is_refused(model: Any, inputs: Any) -> None:
    class Own(LlamaForCausalLM):
        def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
            return input_ids

    model.__class__ = Own
    with pytest.raises(ValueError, match=r"Own\.generate decodes in its own way"):
        mtpkern.generate(model, **inputs, max_new_tokens=4)


def test_a_model_that_cannot_generate(model: Any, inputs: Any) -> None:
    model.generation_config = None
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot generate; load the model with AutoModelForCausalLM"):
        mtpkern.generate(model, **inputs, max_new_tokens=4)


# Odd values


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"max_new_tokens": 3.5}, ValueError, "max_new_tokens must be a whole number of at least 1, got 3.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": -2}, ValueError, "at least 1, got -2"),
        ({"max_new_tokens": "5"}, TypeError, "max_new_tokens must be a whole number of at least 1, got '5'"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be a whole number .* got True"),
        ({"max_new_tokens": float("nan")}, ValueError, "got nan"),
        ({"max_new_tokens": float("inf")}, ValueError, "got inf"),
        ({"max_new_tokens": torch.tensor([5, 6])}, TypeError, "max_new_tokens must be a whole number"),
        ({"max_length": 8.5}, ValueError, "max_length must be a whole number of at least 1, got 8.5"),
        ({"max_length": 6, "max_new_tokens": None}, ValueError, "`max_length` is set to 6"),
        ({"generation_config": GenerationConfig(max_length=8.5)}, ValueError, "max_length must be a whole number"),
        ({"generation_config": {"max_length": 8}}, TypeError, "generation_config must be a GenerationConfig, got dict"),
        ({"eos_token_id": "a"}, TypeError, "eos_token_id must be a whole number, got 'a'"),
        ({"eos_token_id": [3, "a"]}, TypeError, "eos_token_id must be a whole number, got 'a'"),
        ({"eos_token_id": [3, 4.5]}, ValueError, "eos_token_id must be a whole number, got 4.5"),
        ({"eos_token_id": True}, TypeError, "eos_token_id must be a whole number, got True"),
        ({"eos_token_id": []}, ValueError, "eos_token_id must be a token id or a list of at least one"),
        ({"pad_token_id": [1]}, TypeError, r"pad_token_id must be a whole number, got \[1\]"),
        ({"max_time": -1}, ValueError, "max_time must be a number of seconds from 0 up, got -1"),
        ({"max_time": float("nan")}, ValueError, "max_time must be a number of seconds from 0 up, got nan"),
        ({"max_time": "5"}, ValueError, "max_time must be a number of seconds from 0 up, got '5'"),
        ({"max_time": True}, ValueError, "max_time must be a number of seconds from 0 up, got True"),
        ({"stop_strings": ["x"]}, ValueError, "stop_strings .* pass the model's tokenizer as tokenizer="),
        ({"stop_strings": [""], "tokenizer": 0}, TypeError, r"a list of texts that are not empty, got \[''\]"),
        ({"stop_strings": [3], "tokenizer": 0}, TypeError, r"stop_strings must be a text, or a list .* got \[3\]"),
        ({"stop_strings": 3, "tokenizer": 0}, TypeError, "stop_strings must be a text, or a list .* got 3"),
        ({"stopping_criteria": print}, TypeError, "must be a StoppingCriteriaList .* got <built-in function print>"),
        ({"stopping_criteria": [3]}, TypeError, r"a list of StoppingCriteria, got \[3\]"),
        ({"streamer": print}, TypeError, r"methods put\(tokens\) and end\(\), .* got builtin_function_or_method"),
        ({"prefill_chunk": 1.5}, ValueError, "prefill_chunk must be a whole number of at least 1, got 1.5"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk must be a whole number of at least 1, got 0"),
        ({"prefill_chunk": None}, TypeError, "prefill_chunk must be a whole number"),
        ({"mask_token_id": 1.5}, ValueError, "mask_token_id must be a whole number, got 1.5"),
        ({"mask_token_id": True}, TypeError, "mask_token_id must be a whole number, got True"),
        ({"mask_token_id": "15"}, TypeError, "mask_token_id must be a whole number, got '15'"),
        ({"mask_token_id": 16}, ValueError, "mask_token_id must be a token of the model, 0 to 15, got 16"),
        ({"rows": 30.5}, ValueError, "rows must be a whole number of at least 1, got 30.5"),
        ({"rows": "many"}, TypeError, "rows must be a whole number"),
        ({"use_graph": "no"}, TypeError, "use_graph must be True or False, got 'no'"),
        ({"compile": 1}, TypeError, "compile must be True or False, got 1"),
        ({"batch_invariant": None}, TypeError, "batch_invariant must be True or False, got None"),
        ({"wait": "no"}, TypeError, "wait must be True or False, got 'no'"),
        ({"check_model": 0}, TypeError, "check_model must be True or False, got 0"),
        ({"inputs": torch.ones(2, 6, dtype=torch.long)}, ValueError, "inputs and input_ids are two names"),
        ({"input_ids": torch.ones(2, 6)}, TypeError, r"input_ids must be whole numbers, got torch\.float32"),
        ({"input_ids": torch.ones(2, 6) > 0}, TypeError, r"input_ids must be whole numbers, got torch\.bool"),
        ({"input_ids": torch.ones(6).long()}, ValueError, r"input_ids must be \[B, T\] .* got shape \[6\]"),
        ({"input_ids": torch.ones(2, 6, device="meta").long()}, ValueError, "input_ids must hold values"),
        ({"attention_mask": torch.ones(2, 6, device="meta")}, ValueError, "attention_mask must hold values"),
        ({"attention_mask": [[1] * 6] * 2}, TypeError, "attention_mask must be a tensor like input_ids, got list"),
        ({"attention_mask": torch.ones(6)}, ValueError, r"the shape of input_ids \[2, 6\], got \[6\]"),
        (
            {"attention_mask": torch.ones(2, 1, 6, 6)},
            ValueError,
            r"the shape of input_ids \[2, 6\], got \[2, 1, 6, 6\]",
        ),
        (
            {"attention_mask": torch.full((2, 6), 2)},
            ValueError,
            r"attention_mask must be 1 .*got 2 in sequences \[0, 1\]",
        ),
        ({"attention_mask": torch.full((2, 6), 0.5)}, ValueError, "attention_mask must be 1 .*got 0.5"),
        ({"attention_mask": torch.full((2, 6), torch.nan)}, ValueError, "attention_mask must be 1 .*got nan"),
        ({"attention_mask": torch.full((2, 6), -1)}, ValueError, "attention_mask must be 1 .*got -1"),
        (
            {"attention_mask": torch.tensor([[1] * 6, [0] * 6])},
            ValueError,
            r"sequences \[1\] of attention_mask .* hide every token",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6])},
            ValueError,
            r"padding_side = 'left'; the attention_mask of sequences \[0\] hides what stands behind a token",
        ),
    ],
    ids=lambda x: "" if not isinstance(x, str) else x,
)
def test_odd_values_are_named(
    given: dict[str, Any], error: type[Exception], message: str, shared: Any, inputs: Any
) -> None:
    with pytest.raises(error, match=message):
        mtpkern.generate(shared, **{**inputs, "max_new_tokens": 4, **given})


@pytest.mark.parametrize("stray", [-1, 16, 1 << 40])
@pytest.mark.parametrize("at", [(0, 0), (1, 5)], ids=str)
def test_ids_outside_of_the_vocabulary(stray: int, at: tuple[int, int], shared: Any, inputs: Any) -> None:
    """Also in the padding: the embedding looks all of them up."""
    ids = inputs["input_ids"].clone()
    ids[at] = stray
    with pytest.raises(ValueError, match=rf"from 0 to 15, .*got {stray} in sequences \[{at[0]}\]"):
        mtpkern.generate(shared, ids, attention_mask=inputs["attention_mask"], max_new_tokens=4)


def test_a_prompt_of_padding_alone_is_named_where_the_mask_is_inferred(shared: Any, inputs: Any, tiny: Any) -> None:
    ids = inputs["input_ids"].clone()
    ids[1] = tiny.pad
    with pytest.raises(ValueError, match=r"sequences \[1\] of attention_mask .*it follows pad_token_id.* hide every"):
        mtpkern.generate(shared, ids, max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32])
def test_masks_of_every_type(dtype: torch.dtype, shared: Any, inputs: Any) -> None:
    expected = mtpkern.generate(shared, **inputs, max_new_tokens=NEW)
    mask = inputs["attention_mask"].to(dtype)
    assert mtpkern.generate(shared, inputs["input_ids"], attention_mask=mask, max_new_tokens=NEW).equal(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_every_whole_type(dtype: torch.dtype, shared: Any, inputs: Any) -> None:
    expected = mtpkern.generate(shared, **inputs, max_new_tokens=NEW)
    ids = inputs["input_ids"].to(dtype)
    assert mtpkern.generate(shared, ids, attention_mask=inputs["attention_mask"], max_new_tokens=NEW).equal(expected)


def test_whole_numbers_of_every_type_are_taken(shared: Any, inputs: Any) -> None:
    numpy = pytest.importorskip("numpy")
    expected = mtpkern.generate(shared, **inputs, max_new_tokens=5, eos_token_id=[3, 7], pad_token_id=2)
    given = {"max_new_tokens": numpy.int64(5), "eos_token_id": torch.tensor([3, 7]), "pad_token_id": 2.0}
    options = {"prefill_chunk": 16.0, "rows": numpy.int32(30), "mask_token_id": 15.0}
    assert mtpkern.generate(shared, **inputs, **given, **options).equal(expected)
    assert type(whole_number("n", numpy.float64(4))) is int


def test_require_prompts_takes_good_ones(inputs: Any) -> None:
    require_prompts(inputs["input_ids"], inputs["attention_mask"], mask_token_id=15, vocabulary=16)
    require_prompts(inputs["input_ids"], None, mask_token_id=15, vocabulary=16)


def test_nothing_of_the_callers_is_changed(shared: Any, inputs: Any) -> None:
    config = GenerationConfig(max_new_tokens=4.0, eos_token_id=[3, 7], do_sample=False)
    before, given = copy.deepcopy(config), {**inputs, "generation_config": config}
    mtpkern.generate(shared, **given)
    assert config == before
    assert given.keys() == {*inputs, "generation_config"}


def test_a_model_of_another_vocabulary_is_judged_by_its_embedding(inputs: Any) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.full((1, 3), 39)
    output = mtpkern.generate(
        LlamaForCausalLM(config).eval(), ids, max_new_tokens=2, mask_token_id=38, eos_token_id=None
    )
    assert output.shape == (1, 5)
