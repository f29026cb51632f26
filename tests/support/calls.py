"""Calls of `generate` as anybody might make them, drawn at random."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, WatermarkingConfig

from mtpkern import ConfAdapt, Static, Verified

# Its builder of tiny models; pytest imports test files by their paths.
sys.path.append(os.path.dirname(__file__))
from test_walk import MASK

PAD, OTHER_PAD = 0, 45


WORDS = range(3, 41)


# Fields of GenerationConfig whose value changes no token where greedy decoding is asked for, as its documentation says.
INERT: list[tuple[str, Any]] = [
    *(("length_penalty", 2.0), ("early_stopping", True), ("num_beams", 1), ("num_return_sequences", 1)),
    *(("min_length", 0), ("min_new_tokens", 0), ("no_repeat_ngram_size", 0), ("repetition_penalty", 1.0)),
    *(("repetition_penalty", 1), ("encoder_repetition_penalty", 1.0), ("encoder_no_repeat_ngram_size", 0)),
    *(("guidance_scale", 1), ("guidance_scale", 1.0), ("guidance_scale", None), ("renormalize_logits", False)),
    *(("suppress_tokens", None), ("suppress_tokens", []), ("begin_suppress_tokens", []), ("bad_words_ids", None)),
    *(
        ("bad_words_ids", []),
        ("stop_strings", None),
        ("stop_strings", []),
        ("max_time", 500.0),
        ("sequence_bias", None),
    ),
    *(("use_cache", True), ("use_cache", None), ("cache_implementation", "dynamic"), ("cache_implementation", None)),
    *(
        ("output_scores", False),
        ("output_logits", False),
        ("output_attentions", False),
        ("output_hidden_states", False),
    ),
    *(("decoder_start_token_id", 3), ("bos_token_id", 1), ("bos_token_id", None), ("num_assistant_tokens", 4)),
    *(("max_matching_ngram_size", 2), ("assistant_confidence_threshold", 0.3), ("diversity_penalty", 0.0)),
    *(("forced_bos_token_id", None), ("forced_eos_token_id", None), ("exponential_decay_length_penalty", None)),
    *(("max_time", None), ("remove_invalid_values", False), ("token_healing", False), ("watermarking_config", None)),
    *(("penalty_alpha", None), ("disable_compile", True), ("do_sample", False), ("do_sample", None)),
    ("prompt_lookup_num_tokens", None),
]


# Without sampling these mean nothing; beside a file that samples they ask for it, unless do_sample=False is said.
SAMPLING: list[tuple[str, Any]] = [
    *(("temperature", 0.5), ("temperature", 1.0), ("top_k", 5), ("top_p", 0.5), ("min_p", 0.1), ("typical_p", 0.5)),
    *(("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1), ("top_h", 0.3)),
]


# What asks for other tokens, for more than tokens, or for another way to them.
ASKING: list[tuple[str, Any]] = [
    *(("num_beams", 2), ("num_return_sequences", 2), ("guidance_scale", 1.5), ("output_hidden_states", True)),
    *(("output_attentions", True), ("stop_strings", ["a"]), ("use_cache", False)),
    *(("cache_implementation", "static"), ("cache_implementation", "quantized"), ("prompt_lookup_num_tokens", 3)),
    *(("penalty_alpha", 0.6), ("dola_layers", "high"), ("token_healing", True), ("remove_invalid_values", True)),
    *(
        ("encoder_repetition_penalty", 1.2),
        ("watermarking_config", WatermarkingConfig(bias=2.5)),
        ("prefill_chunk_size", 4),
    ),
]


# What changes greedy tokens, and is honoured where the call says so; of a file it is left out.
CHANGING: list[tuple[str, Any]] = [
    *(("repetition_penalty", 1.3), ("min_new_tokens", 3), ("min_length", 30), ("suppress_tokens", [5, 6])),
    *(("begin_suppress_tokens", [7]), ("bad_words_ids", [[5], [8, 9]]), ("sequence_bias", {(5,): -3.0, (6, 7): 2.0})),
    *(("forced_eos_token_id", 3), ("renormalize_logits", True), ("exponential_decay_length_penalty", (2, 1.5))),
    *(("output_scores", True), ("output_logits", True)),
]


# Arguments of the call that nobody knows, or that mean what packed rows cannot honour.
STRANGE: list[tuple[str, Any]] = [
    *(("max_tokens", 5), ("tempreature", 0.5), ("max_new_token", 3), ("stop", ["a"]), ("return_tensors", "pt")),
    *(("token_type_ids", torch.ones(1, 1).long()), ("position_ids", torch.ones(1, 1).long()), ("labels", 1)),
    *(("inputs_embeds", torch.ones(1, 1, 32)), ("past_key_values", object()), ("streamer", print)),
    *(("assistant_model", object()), ("prefix_allowed_tokens_fn", print), ("custom_generate", "a/b")),
    *(("synced_gpus", True), ("adapter_names", ["a"]), ("logits_processor", [print]), ("stopping_criteria", [print])),
]


INERT_ARGUMENTS: list[tuple[str, Any]] = [
    *(("tokenizer", object()), ("streamer", None), ("assistant_model", None), ("synced_gpus", False)),
    *(("logits_processor", LogitsProcessorList()), ("stopping_criteria", []), ("prefix_allowed_tokens_fn", None)),
    *(("inputs_embeds", None), ("past_key_values", None), ("position_ids", None)),
]


# Our own arguments with values that they cannot have.
WRONG_OPTIONS: list[tuple[str, Any]] = [
    *(("prefill_chunk", 0), ("prefill_chunk", 1.5), ("prefill_chunk", None), ("prefill_chunk", "4")),
    *(("rows", 0), ("rows", 2.5), ("rows", "many"), ("rows", True), ("batch_invariant", "no"), ("compile", 1)),
    *(("use_graph", "no"), ("use_graph", True), ("wait", "no"), ("wait", None), ("check_model", 0)),
    *(("mask_token_id", 48), ("mask_token_id", -1), ("mask_token_id", "x"), ("mask_token_id", 1.5)),
    *(("strategy", "verified"), ("strategy", Verified), ("strategy", 4)),
    *(("generation_config", {"max_length": 8}), ("generation_config", "greedy")),
]


@dataclass
class Call:
    """A call, and what is wrong with it: for each fault the words of which an error has to say one."""

    ids: Any
    real: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # ours, and arguments that are no fields
    fields: dict[str, Any] = field(default_factory=dict)  # of GenerationConfig, as given
    plain: dict[str, Any] = field(default_factory=dict)  # the same as transformers takes them
    inert: dict[str, Any] = field(default_factory=dict)
    in_config: set[str] = field(default_factory=set)  # given in a generation_config
    file: dict[str, Any] = field(default_factory=dict)
    mask: Any = None
    around: str = "nothing"
    attention: str | None = None
    lossless: bool = True
    faults: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def given(self) -> dict[str, Any]:
        return self._with(self.fields | self.inert) | self.options

    def theirs(self, *, inert: bool) -> dict[str, Any]:
        kwargs = self._with(self.plain | (self.inert if inert else {}))
        if self.mask is not None:
            kwargs["attention_mask"] = self.real
        # Without a max_length of the call's transformers knows what to do; with None it does not.
        kwargs = {n: x for n, x in kwargs.items() if x is not None or (n in self.plain and n != "max_length")}
        return kwargs | {"suppress_tokens": [MASK, *(kwargs.get("suppress_tokens") or [])], "do_sample": False}

    def _with(self, values: dict[str, Any]) -> dict[str, Any]:
        kwargs = {name: x for name, x in values.items() if name not in self.in_config}
        if self.in_config:
            config = GenerationConfig()
            for name in self.in_config & values.keys():
                setattr(config, name, values[name])
            kwargs["generation_config"] = config
        return kwargs

    def __str__(self) -> str:
        shown = {"prompts": list(self.real.shape), "mask": getattr(self.mask, "dtype", self.mask)}
        shown |= {n: x for n, x in self.options.items() if n not in ("input_ids", "inputs", "attention_mask")}
        shown |= self.fields | self.inert | {"in_config": self.in_config, "file": self.file, "around": self.around}
        return f"{shown} faults={list(self.faults)}"


def draw(rng: Random, *, adapters: bool = True) -> Call:
    batch = rng.randint(1, 4)
    longest = rng.choice([1, 3, 5, 8, 12, 12, 30, 30, 124])  # of the 128 positions that a tiny model has
    lengths = [longest, *(rng.randint(1, longest) for _ in range(batch - 1))]
    ids = torch.tensor([[PAD] * (longest - n) + rng.choices(WORDS, k=n) for n in lengths])
    real = (ids != PAD).long()
    call = Call(ids, real)
    _draw_limits(call, rng, longest)
    _draw_tokens(call, rng)
    _draw_mask(call, rng)
    _draw_strategy(call, rng, batch)
    _draw_fields(call, rng)
    if rng.random() < 0.3:
        call.attention = rng.choice(["eager", "sdpa"])
    if adapters and rng.random() < 0.15:
        call.around = rng.choice(
            ["lora", "lora", "prompt tuning", "data parallel", "compiled", "own generate", "training"]
        )
    if rng.random() < 0.08:
        call.around = rng.choice(["dropping", "nan", "no model", "not a model"])
    around = {
        "prompt tuning": ("virtual tokens",),
        "data parallel": ("model.module",),
        "compiled": ("compiled",),
        "dropping": ("training mode",),
        "nan": ("NaN",),
        "no model": ("model must be",),
        "not a model": ("model must be",),
    }
    if call.around in around:
        call.faults[call.around] = around[call.around]
    _draw_prompts(call, rng)
    for name in call.fields.keys() | call.inert.keys():
        if call.in_config and rng.random() < 0.5:
            call.in_config.add(name)
    call.in_config.discard("anything")
    return call


def _draw_limits(call: Call, rng: Random, longest: int) -> None:
    n = rng.randint(1, 8)
    only_length = {"max_new_tokens": None, "max_length": longest + n}
    if rng.random() < 0.35:
        call.in_config.add("anything")  # some fields come in a generation_config
    wrong = rng.choice([0, -1, 3.5, "5", True, float("nan"), float("inf"), [3]])
    name = rng.choice(["max_new_tokens", "max_length"])
    limits: list[tuple[float, dict[str, Any], dict[str, Any], bool]] = [  # weight, given, plain, faulty
        (6, {"max_new_tokens": n}, {"max_new_tokens": n}, False),
        (3, {"max_length": longest + n}, {"max_length": longest + n}, False),
        (2, {"max_new_tokens": n, "max_length": 4}, {"max_new_tokens": n, "max_length": 4}, False),
        (2, {"max_new_tokens": float(n)}, {"max_new_tokens": n}, False),
        (1, {"max_new_tokens": torch.tensor(n)}, {"max_new_tokens": n}, False),
        (1, only_length, only_length, False),
        (1, {"max_new_tokens": n, "max_length": None}, {"max_new_tokens": n}, False),
        (1, {}, {}, False),
        (0.4, {"max_new_tokens": 130}, {"max_new_tokens": 130}, False),
        (0.5, {"max_length": 129}, {"max_length": 129}, False),
        (0.5, {"max_length": longest}, {}, True),
        (0.5, {"max_length": max(1, longest - 2), "max_new_tokens": None}, {}, True),
        (1, {name: wrong}, {}, True),
    ]
    _, call.fields, call.plain, faulty = rng.choices(limits, [w for w, *_ in limits])[0]
    call.fields, call.plain = dict(call.fields), dict(call.plain)
    if faulty:
        call.faults["limit"] = tuple(call.fields)
    if not call.fields and rng.random() < 0.7:
        call.file |= rng.choice([{"max_new_tokens": n}, {"max_length": longest + n}, {"max_new_tokens": float(n)}])
    if not faulty and rng.random() < 0.05:
        call.file |= {"max_new_tokens": 2}


def _draw_tokens(call: Call, rng: Random) -> None:
    stop, several = rng.choice(WORDS), rng.sample(WORDS, 4)
    stops: list[tuple[float, Any, Any]] = [
        *((3, stop, stop), (4, several, several), (1, torch.tensor(several), several), (1, tuple(several), several)),
        *((1, float(stop), stop), (1, torch.tensor(stop), stop), (1, None, None), (0.5, 999, 999), (0.5, [stop], stop)),
    ]
    if rng.random() < 0.7:
        _, given, plain = rng.choices(stops, [w for w, *_ in stops])[0]
        call.fields["eos_token_id"], call.plain["eos_token_id"] = given, plain
    elif rng.random() < 0.4:
        call.file["eos_token_id"] = several
    elif rng.random() < 0.2:
        call.fields["eos_token_id"] = rng.choice(["a", [], [3, "a"], [3, 4.5], True, 4.5, {3}])
        call.faults["eos"] = ("eos_token_id",)
    pads: list[tuple[Any, Any]] = [(PAD, PAD), (OTHER_PAD, OTHER_PAD), (2.0, 2), (torch.tensor(2), 2), (None, None)]
    if rng.random() < 0.6:
        call.fields["pad_token_id"], call.plain["pad_token_id"] = rng.choice(pads)
    elif rng.random() < 0.1:
        call.fields["pad_token_id"] = rng.choice([[1], "x", 1.5, True])
        call.faults["pad"] = ("pad_token_id",)
    if rng.random() < 0.7:
        call.file.setdefault("pad_token_id", PAD)
    if rng.random() < 0.3:
        call.fields["return_dict_in_generate"] = rng.choice([True, True, False, None])


def _draw_mask(call: Call, rng: Random) -> None:
    if rng.random() < 0.2:
        return  # transformers infers one from the padding, or takes all for words
    call.mask = call.real.to(rng.choice([torch.int64] * 3 + [torch.int32, torch.uint8, torch.bool, torch.float32]))
    B, T = call.real.shape
    if rng.random() < 0.1:
        holes, behind, nothing = call.real.clone(), call.real.clone(), call.real.clone()
        holes[-1, T // 2] = 0
        holes[-1, : T // 2] = 1
        behind[0, -1], nothing[-1] = 0, 0
        odd = [call.real * 2, -call.real, call.real * 0.5, call.real.float().masked_fill(call.real == 1, torch.nan)]
        shapes = [torch.ones(T), torch.ones(B, T + 1), torch.ones(B + 1, T), torch.ones(B, 1, T, T), torch.ones(B, 0)]
        others = [call.real.tolist(), "left", call.real.to("meta")]
        call.mask = rng.choice([holes, behind, nothing, *odd, *shapes, *others])
        call.faults["mask"] = ("attention_mask",)


def _draw_strategy(call: Call, rng: Random, batch: int) -> None:
    k, threshold = rng.randint(1, 6), rng.choice([0.0, 0.05, 0.2, 0.6, 1.0])
    kinds: list[tuple[float, Any, bool]] = [
        *(
            (4, Verified(k, threshold=threshold, masks=rng.randint(0, (k - 1) ** 2)), True),
            (3, Static(1), True),
            (1, ConfAdapt(k, threshold=1.0), True),
        ),
        *((1, ConfAdapt(1, threshold=threshold), True), (0.5, None, True), (0.5, Verified(threshold=threshold), True)),
        *((0.5, Static(k), k == 1), (0.5, ConfAdapt(k, threshold=threshold), k == 1 or threshold == 1.0)),
    ]
    _, strategy, call.lossless = rng.choices(kinds, [w for w, *_ in kinds])[0]
    options: dict[str, Any] = {"strategy": strategy, "mask_token_id": rng.choice([MASK, MASK, float(MASK)])}
    least = batch if strategy is None or strategy.verify else batch * strategy.k
    if rng.random() < 0.3:
        options["rows"] = rng.choice([least, least + rng.randint(0, 9), float(least), None])
    elif rng.random() < 0.05 and least > 1:
        options["rows"] = least - 1
        call.faults["rows"] = ("rows",)
    if rng.random() < 0.4:
        options["prefill_chunk"] = rng.choice([1, 2, 3, 5, 8.0, 64])
    for name, values in (("batch_invariant", [True, True, False]), ("use_graph", [None, False]), ("wait", [True])):
        if rng.random() < 0.2:
            options[name] = rng.choice(values)
    if rng.random() < 0.1:
        name, value = rng.choice(WRONG_OPTIONS)
        options[name] = value
        call.faults[name] = (name,)
        if name == "generation_config":
            call.in_config.clear()
    call.options = options


def _draw_fields(call: Call, rng: Random) -> None:
    """What greedy decoding does without, in the call and in the model's file, and what it cannot do."""
    if rng.random() < 0.35:
        call.file |= dict(rng.sample(ASKING + CHANGING, rng.randint(1, 3)) + rng.sample(SAMPLING, rng.randint(0, 2)))
    if call.file.get("num_return_sequences") and not call.file.get("do_sample") and call.file.get("num_beams") != 2:
        call.faults["file"] = (
            "model.generation_config",
        )  # which transformers does not take for greedy decoding, either
    if rng.random() < 0.5:
        call.inert |= dict(rng.sample(INERT, rng.randint(1, 3)))
    if rng.random() < 0.15:
        name, value = rng.choice(SAMPLING)
        call.inert[name] = value
        if call.file.get("do_sample") and "do_sample" not in call.inert:
            call.faults[name] = (name,)
    if rng.random() < 0.2:
        call.options |= dict(rng.sample(INERT_ARGUMENTS, rng.randint(1, 2)))
        if "tokenizer" in call.options:
            call.file.pop("stop_strings", None)  # for which it would have to be one
    if rng.random() < 0.3:
        name, value = rng.choice(CHANGING)
        call.inert.pop(name, None)
        call.fields[name] = call.plain[name] = value
    if rng.random() < 0.1:
        name, value = rng.choice(ASKING)
        call.inert.pop(name, None)
        call.fields[name] = value
        call.faults[name] = (name,)
    if rng.random() < 0.08:
        name, value = rng.choice(STRANGE)
        call.options[name] = value
        call.faults[name] = (name,)


def _draw_prompts(call: Call, rng: Random) -> None:
    """By which name the prompts go in, and prompts that are none."""
    ids = call.ids.to(torch.int32) if rng.random() < 0.1 else call.ids
    name = rng.choice(["input_ids", "input_ids", "inputs"])
    if rng.random() < 0.08:
        stray, masked = ids.clone(), ids.clone()
        stray[0, -1], masked[-1, -1] = rng.choice([-1, 48, 1 << 20]), MASK
        wrong = [ids[0], ids[:, :0], ids.float(), ids.tolist(), None, "text", ids[None], ids > 0, {"input_ids": ids}]
        ids, call.faults["prompts"] = rng.choice(
            [(x, ("input_ids",)) for x in (*wrong, stray)] + [(masked, (f"the mask token {MASK}",))]
        )
    call.options[name] = ids
    if rng.random() < 0.1:
        call.options["inputs" if name == "input_ids" else "input_ids"] = rng.choice([None, call.ids])
        if len({x is None for x in (call.options["inputs"], call.options["input_ids"])}) == 1:
            call.faults["two prompts"] = ("input_ids",)
    if call.mask is not None:
        call.options["attention_mask"] = call.mask
