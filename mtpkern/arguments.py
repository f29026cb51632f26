"""What a call of generate may ask for: honoured, inert (its value changes nothing), or refused by name. Pure functions.

Two may ask: the call (keywords, or a `generation_config` given to it) and the model's own file, generation_config.json.
What only the file asks for, decoding does without: published instruct models come with files that sample. Where that
changes the tokens of `model.generate(do_sample=False)`, as a repetition penalty does, it is said in a warning. A call
that says do_sample=True is decoded with all that the file says of scores, as in transformers.
"""

from __future__ import annotations

import warnings
from copy import copy
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import LogitsProcessor, StopStringCriteria

from mtpkern.entry import entry
from mtpkern.fields import OF_SAMPLING, OF_SCORES, checked_field, whole_number
from mtpkern.model import CACHE_ARGUMENTS
from mtpkern.stops import stop_criterion

# The fields of GenerationConfig, and what each is where nobody says.
FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
DEFAULTS = GenerationConfig._get_default_generation_params()
_LIMITS = ("max_length", "max_new_tokens")
_TOKENS = ("pad_token_id", "bos_token_id")
_PLAIN = {*_LIMITS, *_TOKENS, "eos_token_id", "return_dict_in_generate"}
# Honoured, but no part of plain greedy decoding: these cut what it writes.
_CUTS = {"max_time", "stop_strings"}
# These change scores, or ask for them; of a file they count in a call that samples.
_OF_SCORES = {*OF_SCORES, "renormalize_logits"}
_KEPT_SCORES = {"output_scores", "output_logits"}
HONOURED = {*_PLAIN, *_CUTS, *_OF_SCORES, *_KEPT_SCORES, "do_sample", "num_return_sequences"}
# These say how one samples: honoured in a call that does, refused beside a file that does, otherwise for nothing.
_ONLY_WITH_SAMPLING = set(OF_SAMPLING)
# Any value of these is inert: nothing reads them but beams, assistants, encoders or caches, which are refused by their
# own names, or nothing at all.
_INERT = {
    *("length_penalty", "diversity_penalty"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    *("decoder_start_token_id", "cache_config", "max_cache_len", "low_memory"),
    *("disable_compile", "transformers_version"),
}
# Values that change nothing, beside None and transformers' own default.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1,),
    "min_new_tokens": (0,),
    "penalty_alpha": (0,),
    "early_stopping": (True, "never"),
    "cache_implementation": ("dynamic", "hybrid"),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "renormalize_logits"), (False,)),
    **dict.fromkeys(("token_healing", "is_assistant", "use_mtp"), (False,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), ([], ())),
    "sequence_bias": ({}, []),
}
# What a file may ask for without changing a token: how, with what memory, and what is reported of it.
_ONLY_HOW = {
    *("do_sample", "use_cache", "cache_implementation", "compile_config", "prefill_chunk_size"),
    *("continuous_batching_config", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}
# Arguments of generate that are no fields of GenerationConfig and mean nothing without others, which are refused.
_INERT_ARGUMENTS = {"trust_remote_code"}


def read_arguments(
    file: GenerationConfig, input_ids: Tensor | None, arguments: dict[str, Any]
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """What a call asks for: its prompts [B, T]; keyword arguments for transformers' `generate`; what is left out.

    file: the model's own generation_config; arguments: what `mtpkern.generate` was given by keyword. The keyword
    arguments hold what is honoured, and for all else that the file sets the value that changes nothing. Left out are
    the wishes of the file that would have changed greedy decoding, with their values.

    Raises ValueError or TypeError, by name, for what is neither honoured nor inert.

        file = GenerationConfig(do_sample=True, repetition_penalty=1.1)
        read_arguments(file, ids, {"max_new_tokens": 8.0, "suppress_tokens": []})
        # ids, {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.0}, {"repetition_penalty": 1.1}
    """
    arguments = dict(arguments)
    input_ids, attention_mask = prompts_of(input_ids, arguments), arguments.pop("attention_mask", None)
    tokenizer, criteria = arguments.pop("tokenizer", None), arguments.pop("stopping_criteria", None)
    asked = asked_by(arguments.pop("generation_config", None), file)
    asked |= {name: arguments.pop(name) for name in sorted(FIELDS & arguments.keys())}
    processors = _listed("logits_processor", arguments.pop("logits_processor", None), LogitsProcessor)
    _refuse_arguments(arguments)
    require_tensors(input_ids, attention_mask)
    unknown = {name: value for name, value in asked.items() if name not in FIELDS}
    samples = bool(file.do_sample) and "do_sample" not in asked
    sampling = _checked("do_sample", asked.get("do_sample")) is True
    honoured = HONOURED | _ONLY_WITH_SAMPLING if sampling else HONOURED
    _refuse({n: v for n, v in asked.items() if n not in honoured and not inert(n, v, samples=samples)} | unknown)

    settings = plain_greedy(file)
    if sampling:
        for name in settings.keys() & (_OF_SCORES | _ONLY_WITH_SAMPLING):
            settings[name] = _checked(name, getattr(file, name))
    left_out = {
        name: theirs
        for name in settings.keys() - asked.keys()
        if not inert(name, theirs := getattr(file, name)) and (name not in _ONLY_HOW or theirs == "quantized")
        if not (sampling and name in _OF_SCORES | _ONLY_WITH_SAMPLING)
    }
    left_out.pop("max_time", None)
    if attention_mask is not None:
        settings["attention_mask"] = attention_mask
    criteria = _listed("stopping_criteria", criteria, StoppingCriteria)
    if tokenizer is not None or "stop_strings" in asked:
        left_out.pop("stop_strings", None)
        criteria += _string_criteria(asked.get("stop_strings", file.stop_strings), tokenizer, criteria)
    if criteria:
        settings["stopping_criteria"] = StoppingCriteriaList(criteria)
    if processors:
        settings["logits_processor"] = LogitsProcessorList(processors)
    for name in asked.keys() & honoured - _PLAIN - _CUTS:
        value = _checked(name, asked[name])
        settings[name] = DEFAULTS.get(name) if value is None else value
    if (answers := settings.get("num_return_sequences") or 1) > 1 and not sampling:
        raise ValueError(
            f"num_return_sequences must be 1 where one decodes greedily, which has one answer, got {answers}; pass "
            "do_sample=True for several"
        )
    for name in _PLAIN | {"max_time"}:
        # Without a max_length of the call's, transformers knows what to do; with None it does not.
        given = name in asked and not (name == "max_length" and asked[name] is None)
        value = asked[name] if given else getattr(file, name, None)
        if given or value is not None:
            settings[name] = _checked(name, value)
    _require_valid(file)
    return input_ids, settings, left_out


def plain_greedy(file: GenerationConfig) -> dict[str, Any]:
    """Keyword arguments that make `model.generate` greedy and nothing else, whatever the model's own file asks for.

    For every field that the file sets, the value that changes nothing; but for limits and token ids, which stay.

        model.generate(ids, **plain_greedy(model.generation_config), max_new_tokens=8)
    """
    return {name: DEFAULTS.get(name) for name in sorted(FIELDS - _PLAIN) if getattr(file, name, None) is not None}


def inert(name: str, value: Any, *, samples: bool = False) -> bool:
    """Whether this value of a field of GenerationConfig changes no token of greedy decoding.

    samples: whether the model's own file samples, unless the call says do_sample=False. A field that is not known
    here, such as one of a later transformers, is inert at its default only.

        inert("length_penalty", 2.0), inert("guidance_scale", 1.5)  # True, False
    """
    if value is None or name in _INERT:
        return True
    if name in _ONLY_WITH_SAMPLING:
        return not samples
    neutral = (DEFAULTS.get(name), *_NEUTRAL.get(name, ()))
    return isinstance(value, (Number, str, list, tuple, dict)) and value in neutral


def warn_of_left_out(model_name: str, left_out: dict[str, Any], *, stacklevel: int) -> None:
    """One warning that names what the model's file asks for in vain, and how to compare without it."""
    if not left_out:
        return
    values = ", ".join(f"{name}={value!r}" for name, value in left_out.items())
    without = ", ".join(f"{name}={DEFAULTS.get(name)!r}" for name in left_out)
    warnings.warn(
        f"the generation_config of this {model_name} asks for {values}, which {entry()} decodes without; "
        f"compare with model.generate(..., do_sample=False, {without}). Passing {without} ends this warning.",
        stacklevel=stacklevel + 1,
    )


def require_prepared(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuse what transformers, or a model's own preparation, has made of the call and what is not honoured."""
    honoured = HONOURED | _ONLY_WITH_SAMPLING if generation_config.do_sample else HONOURED
    values = {name: getattr(generation_config, name, None) for name in sorted(FIELDS - honoured)}
    _refuse({name: value for name, value in values.items() if not inert(name, value)})
    expected = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_ARGUMENTS}
    for name, value in model_kwargs.items():
        if name not in expected and value is not None and value is not False:
            raise ValueError(f"{entry()} does not support the model argument {name}; leave it out")


def prompts_of(input_ids: Any, arguments: dict[str, Any]) -> Any:
    """The prompts by either of their names; `inputs` is taken out of the arguments. ValueError for both at once."""
    inputs = arguments.pop("inputs", None)
    if input_ids is not None and inputs is not None:
        raise ValueError("inputs and input_ids are two names of the prompts, got both; leave one out")
    return inputs if input_ids is None else input_ids


def inferred_mask(ids: Tensor, arguments: dict[str, Any], file: GenerationConfig) -> Tensor:
    """What counts of prompts [B, T] of which nobody says it, as transformers has it: all but the token for padding,
    where that is not a stop token, too.
    """
    asked = {**asked_by(arguments.get("generation_config"), file), **arguments}
    pad, stops = (_checked(name, asked.get(name, getattr(file, name))) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or pad in (stops if isinstance(stops, list) else [stops]):
        return torch.ones_like(ids)
    return (ids != pad).long()


def require_tensors(input_ids: Any, attention_mask: Any) -> None:
    """Types and shapes of a call's tensors; their values are looked at later, when they are on the host."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor [B, T], got {type(input_ids).__name__}; unpack encodings: **inputs"
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [B, T] with at least one token, got shape {list(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be whole numbers, got {input_ids.dtype}; give what a tokenizer returns")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor like input_ids, got {type(attention_mask).__name__}; "
            "tokenize with return_tensors='pt'"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = f"{list(input_ids.shape)}, got {list(attention_mask.shape)}"
        raise ValueError(f"attention_mask must have the shape of input_ids {shapes}")
    for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if x is not None and x.device.type == "meta":
            raise ValueError(f"{name} must hold values, got a tensor on the meta device; move it before it is filled")


def require_prompts(input_ids: Tensor, attention_mask: Tensor | None, *, mask_token_id: int, vocabulary: int) -> None:
    """What the prompts hold: ids of the vocabulary, padding on the left alone, no mask token among the words.

    input_ids and attention_mask [B, T] on the host; the mask as given, or as transformers has inferred it.
    """
    outside = (input_ids < 0) | (input_ids >= vocabulary)
    if outside.any():
        raise ValueError(
            f"input_ids must be from 0 to {vocabulary - 1}, the rows of the model's embedding; got "
            f"{input_ids[outside][0].item()} in {_sequences(outside)}; use the model's own tokenizer"
        )
    if attention_mask is not None:
        odd = (attention_mask != 0) & (attention_mask != 1)
        if odd.any():
            raise ValueError(
                f"attention_mask must be 1 where a token counts and 0 at padding, got {attention_mask[odd][0].item()} "
                f"in {_sequences(odd)}"
            )
        hidden = attention_mask == 0
        if hidden.all(1).any():
            raise ValueError(
                f"{_sequences(hidden.all(1))} of attention_mask (where none is given, it follows pad_token_id) hide "
                "every token: expected at least one in each prompt; leave empty prompts out"
            )
        behind = hidden[:, 1:] & ~hidden[:, :-1]
        if behind.any():
            raise ValueError(
                "prompts must be padded on the left: set tokenizer.padding_side = 'left'; the attention_mask of "
                f"{_sequences(behind)} hides what stands behind a token"
            )
    # Left padding may consist of any id; a mask token among the words would be read as a question.
    asking = input_ids == mask_token_id
    if attention_mask is not None:
        asking &= ~hidden
    if asking.any():
        raise ValueError(
            f"the prompt holds the mask token {mask_token_id}, which stands for a token to be predicted, in "
            f"{_sequences(asking)}; take it out"
        )


def require_bool(name: str, value: Any) -> None:
    """Raise TypeError for what is neither True nor False: a text such as "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def asked_by(generation_config: GenerationConfig | None, file: GenerationConfig | None) -> dict[str, Any]:
    """What a generation_config that was given to the call sets; nothing, where it is the model's own."""
    if generation_config is None or generation_config is file:
        return {}
    if not isinstance(generation_config, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}")
    given = {name: value for name, value in vars(generation_config).items() if not name.startswith("_")}
    # Some files carry names that transformers does not know; a config made from such a file asks for nothing by them.
    return {n: v for n, v in given.items() if v is not None and (n in FIELDS or getattr(file, n, None) != v)}


def _require_valid(file: GenerationConfig) -> None:
    """Refuse a file that contradicts itself: transformers looks before it takes what a call says instead."""
    try:
        copy(file).update()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the model's generation_config must be one that transformers takes, got this of it: {error} "
            "Set the field in model.generation_config"
        ) from None


def require_streamer(streamer: Any) -> None:
    """Raise TypeError for what is no streamer of transformers' kind."""
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(
            "streamer must have the methods put(tokens) and end(), as transformers' TextStreamer has, got "
            f"{type(streamer).__name__}"
        )


def _listed(name: str, value: Any, kind: type) -> list[Any]:
    """The criteria or processors of a list; criteria may be any functions."""
    good = isinstance(value, (list, tuple)) and all(
        callable(x) if kind is StoppingCriteria else isinstance(x, kind) for x in value
    )
    if value is not None and not good:
        raise TypeError(f"{name} must be a {kind.__name__}List or a list of {kind.__name__}, got {value!r}")
    return list(value or ())


def _string_criteria(strings: Any, tokenizer: Any, given: list[Any]) -> list[StoppingCriteria]:
    """The criterion that transformers would make, whose own generate loses the tokenizer on the way to a callable."""
    if strings is None or (isinstance(strings, (list, tuple)) and not strings):
        return []
    listed = [strings] if isinstance(strings, str) else strings
    if not isinstance(listed, (list, tuple)) or not all(isinstance(x, str) and x for x in listed):
        raise TypeError(f"stop_strings must be a text, or a list of texts that are not empty, got {strings!r}")
    if tokenizer is None:
        raise ValueError(
            f"stop_strings are looked for in the text, got {strings!r} and no tokenizer: pass the model's tokenizer as "
            "tokenizer="
        )
    if any(type(x) is StopStringCriteria for x in given):
        return []
    return [stop_criterion(tokenizer, listed)]


def _checked(name: str, value: Any) -> Any:
    """The value of an honoured field as transformers takes it."""
    if value is None or name == "return_dict_in_generate":
        return value
    if name in _OF_SCORES | _KEPT_SCORES | _ONLY_WITH_SAMPLING | {"do_sample", "num_return_sequences"}:
        return checked_field(name, value)
    if name == "max_time":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"max_time must be a number of seconds from 0 up, got {value!r}")
        return value
    if name in _LIMITS:
        return whole_number(name, value, least=1)
    if name in _TOKENS:
        return whole_number(name, value)
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return whole_number(name, value)
    if not value:
        raise ValueError(f"{name} must be a token id or a list of at least one, got {value!r}; pass None for no stop")
    return [whole_number(name, x) for x in value]


def _refuse_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what is no field of GenerationConfig: an argument of their generate, of a model, or a misspelt one."""
    for name, value in arguments.items():
        empty = value is None or (isinstance(value, (list, tuple)) and not value)
        if not empty and name not in _INERT_ARGUMENTS and not (name == "synced_gpus" and value is False):
            instead = "give the calls a prefix_cache" if name in CACHE_ARGUMENTS else "leave it out"
            if name == "position_ids":  # transformers makes them before it calls a function
                instead += " (instead of custom_generate=mtpkern.generate set model.generate = "
                instead += "functools.partial(mtpkern.generate, model))"
            raise ValueError(f"{entry()} does not support {name}; {instead}, or use model.generate")


def _refuse(settings: dict[str, Any]) -> None:
    if not settings:
        return
    advice = "leave it out, or use model.generate"
    if settings.keys() & _ONLY_WITH_SAMPLING:
        advice = "it is greedy unless the call says do_sample=True: pass that, or do_sample=False to be greedy"
    elif settings.get("use_cache") is False:
        advice = "keys and values are always cached: leave it out"
    elif "prefill_chunk_size" in settings:
        advice = "pass prefill_chunk, which means tokens over the whole batch"
    values = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    raise ValueError(f"{entry()} does not support {values}; {advice}")


def _sequences(where: Tensor) -> str:
    """The rows with any true element: "sequences [0, 2]"."""
    return f"sequences {where.reshape(len(where), -1).any(1).nonzero().flatten().tolist()}"
