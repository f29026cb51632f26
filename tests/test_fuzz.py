"""Calls of generate drawn at random: the tokens of `model.generate`, or an error that says what is wrong; nothing else.

What is due stands in the tables here, written from the documentation of transformers and the README, and what tokens
come out says transformers itself. A few models and calls are a test; `python tests/test_fuzz.py` draws for every causal
language model that a tiny configuration can build, prints what it finds and counts.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mtpkern

# Its builder of tiny models; pytest imports test files by their paths.
sys.path.append(os.path.dirname(__file__))
from test_walk import MASK, tiny_model

from support.calls import PAD, Call, draw
from support.slow import slow_but

# The judge


def dressed(model: Any, call: Call) -> Any:
    """The model as this call finds it: with its file, and with something around it."""
    if call.around in ("no model", "not a model"):
        return None if call.around == "no model" else "gpt2"
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig()
    for name, value in call.file.items():
        setattr(model.generation_config, name, value)
    if call.attention is not None:
        try:
            model.set_attn_implementation(call.attention)
        except (ValueError, ImportError):
            call.attention = None
    if call.around in ("training", "dropping"):
        if call.around == "dropping":
            model.dropout_of_theirs = torch.nn.Dropout(0.1)
        elif any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()):
            call.faults["dropping"] = ("training mode",)
        model.train()
    elif call.around == "nan":
        with torch.no_grad():
            head = model.get_output_embeddings()
            head.weight[5] = torch.nan
    elif call.around == "own generate":
        model.generate = partial(mtpkern.generate, model)
    elif call.around == "data parallel":
        return torch.nn.DataParallel(model)
    elif call.around == "compiled":
        return torch.compile(model)
    elif call.around in ("lora", "prompt tuning"):
        import peft

        if call.around == "prompt tuning":
            return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        )
        return adapted.eval()
    return model


def greedy(model: Any, call: Call) -> Tensor | Exception:
    """What transformers makes of the call with nothing in the model's file but limits and token ids."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    honoured = {"max_length", "max_new_tokens", "pad_token_id", "eos_token_id", "bos_token_id"}
    file = {n: int(x) if isinstance(x, float) else x for n, x in call.file.items() if n in honoured}
    before, plain.generation_config = plain.generation_config, GenerationConfig(**file)
    failed: Exception = ValueError("not tried")
    try:
        for inert in (True, False):  # over some values that ask for nothing they stumble
            try:
                return GenerationMixin.generate(plain, call.ids, **call.theirs(inert=inert))
            except Exception as error:
                failed = error
        return failed
    finally:
        plain.generation_config = before


def state(model: Any) -> Any:
    plain = getattr(model, "module", getattr(model, "_orig_mod", model))
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    if not isinstance(plain, PreTrainedModel):
        return None
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()]
    config = plain.config
    return type(config), config._attn_implementation, repr(config), repr(vars(plain.generation_config)), hooks


def _looks(x: Any) -> str:
    return repr(vars(x) if isinstance(x, GenerationConfig) else x)


@dataclass(frozen=True)
class Outcome:
    kind: str
    text: str
    good: bool


# Errors of code that came to something it did not expect, and advice of others that cannot be followed here.
_FOREIGN = re.compile(
    r"size of tensor|out of range in self|out of bounds|expected scalar|has no attribute|unexpected keyword|object is"
)


_EXPECTED = re.compile(
    r"must|needs|is in |expected|support|cannot|is set to|wraps|are two names|was |is an? |has |hold|whole number"
)


_REMEDY = re.compile(r"; |: |, got |\buse\b|\bpass\b|\bset\b|\bleave\b|\bload\b|consider")


def error_of(call: Call, error: Exception, name: str, refused: bool) -> Outcome:
    """Whether an error is due, and whether it says what was wrong, what came, what was expected or what to do."""
    text = f"{type(error).__name__}: {error}"
    kinds = (ValueError, TypeError, RuntimeError) if call.around == "nan" else (ValueError, TypeError)
    named = [fault for fault, words in call.faults.items() if any(word in str(error) for word in words)]
    form = type(error) in kinds and not _FOREIGN.search(str(error).partition("a trial of it ended in")[0])
    form = form and bool(_EXPECTED.search(str(error)) and _REMEDY.search(str(error)))
    if not form or "\n" in str(error):
        return Outcome("an error that does not say", text, False)
    if refused and name in str(error):
        return Outcome("error: a model that is refused", text, True)
    if named:
        return Outcome(f"error: {named[0]}", text, True)
    return Outcome("an error that names nothing of the call's" if call.faults else "refused what is due", text, False)


def outcome(model: Any, call: Call, *, refused: bool) -> Outcome:
    """What generate makes of this call; `refused`: the model is of a kind that a plain call is refused for."""
    name = type(model).__name__
    subject = dressed(model, call)
    before, given = state(subject), call.given()
    shown = copy.deepcopy({n: x for n, x in given.items() if isinstance(x, (Tensor, GenerationConfig, list))})
    try:
        ours = mtpkern.generate(subject, **given)
    except Exception as error:
        found = error_of(call, error, name, refused)
        if not found.good and not call.faults and isinstance(theirs := greedy(subject, call), Exception):
            # Nothing is due where transformers fails, too; the error has to name the model or the limit all the same.
            known = type(error) in (ValueError, TypeError) and (name in str(error) or "max_" in str(error))
            found = Outcome("error: transformers fails, too", found.text + f" | theirs: {theirs}", known)
    else:
        found = tokens_of(call, ours, subject, refused)
    if state(subject) != before:
        return Outcome("something is left changed", found.text, False)
    for key, value in shown.items():
        if _looks(value) != _looks(given[key]):
            return Outcome("an argument is changed", key, False)
    return found


def tokens_of(call: Call, ours: Any, subject: Any, refused: bool) -> Outcome:
    if call.faults or refused:
        return Outcome("decoded what is to be refused", f"{list(call.faults)}", False)
    if bool(call.fields.get("return_dict_in_generate")) != (not isinstance(ours, Tensor)):
        return Outcome("another type of result", type(ours).__name__, False)
    tokens = ours if isinstance(ours, Tensor) else ours.sequences
    theirs = greedy(subject, call)
    if isinstance(theirs, Exception):
        return Outcome("decoded where transformers fails", f"{type(theirs).__name__}: {theirs}", False)
    T = call.ids.shape[1]
    if not call.lossless:
        good = tokens[:, : T + 1].equal(theirs[:, : T + 1]) and tokens.shape[1] <= max(T + 20, theirs.shape[1] + 130)
        good = good and not (tokens[:, T:] == MASK).any().item()
        return Outcome("first tokens, from a strategy that promises no more", f"{tokens.shape}", good)
    if tokens.equal(theirs):
        return Outcome("HF's tokens", f"{list(tokens.shape)}", True)
    return Outcome("other tokens than HF's", f"{tokens[:, T:].tolist()} for {theirs[:, T:].tolist()}", False)


def fuzz(model: Any, seed: str, calls: int, *, of_refused: int = 2) -> list[tuple[str, Outcome]]:
    """Outcomes with the calls they are of, the first of them plain: it says whether the model is refused."""
    plain = Call(torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]]))
    plain.mask, plain.fields, plain.plain = plain.real, {"max_new_tokens": 4}, {"max_new_tokens": 4}
    plain.options = {"mask_token_id": MASK, "input_ids": plain.ids, "attention_mask": plain.real}
    plain.file = {"pad_token_id": PAD}
    greedy(model, plain)  # some settle on another way of theirs in their first call
    first = outcome(model, plain, refused=False)
    refused = first.kind != "HF's tokens" and type(model).__name__ in first.text
    if refused:
        first = Outcome("error: a model that is refused", first.text, True)
    found = [(f"{seed} plain", first)]
    for i in range((of_refused if refused else calls) - 1):
        number = f"{seed} {i}"
        call = draw(Random(number), adapters=not refused)
        try:
            found.append((f"{number}: {call}", outcome(model, call, refused=refused)))
        except Exception as error:
            if call.around not in ("lora", "prompt tuning", "nan"):
                raise
            found.append((f"{number}: {call}", Outcome(f"not tried: no {call.around} for it", repr(error), True)))
    return found


HANDFUL = ("llama", "gpt2", "gemma3_text", "roberta", "deepseek_v3", "bloom")


@pytest.mark.parametrize("model_type", slow_but(HANDFUL, "llama", "gemma3_text", "bloom"))
@pytest.mark.filterwarnings("ignore")
def test_tokens_of_transformers_or_an_error_that_says(model_type: str) -> None:
    found = fuzz(tiny_model(model_type), f"{model_type} 0", 8, of_refused=3)
    assert not [(call, x) for call, x in found if not x.good]


@pytest.mark.slow("fuzz::test_tokens_of_transformers_or_an_error_that_says")
@pytest.mark.timeout(3600)
@pytest.mark.skipif("MTPKERN_WALK" not in os.environ, reason="takes minutes: set MTPKERN_WALK=1")
@pytest.mark.filterwarnings("ignore")
def test_the_whole_fuzz() -> None:
    assert main([]) == 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=5, help="of each model that decodes")
    options = parser.parse_args(argv)
    start, counts, models, bad = time.perf_counter(), Counter[str](), Counter[str](), 0
    for model_type in options.types:
        try:
            model = tiny_model(model_type, options.seed)
        except Exception as error:
            models["not built"] += 1
            print(f"{model_type}: not built: {type(error).__name__}: {str(error)[:100]!r}", flush=True)
            continue
        found = fuzz(model, f"{model_type} {options.seed}", options.calls)
        models["refused" if "refused" in found[0][1].kind else "decoded"] += 1
        for call, x in found:
            counts[x.kind] += 1
            if not x.good:
                bad += 1
                print(f"\n{x.kind}: {call}\n  {x.text[:600]}", flush=True)
    print(f"\n{sum(counts.values())} calls, {dict(models)}, {time.perf_counter() - start:.0f} s, {bad} findings")
    for kind, n in counts.most_common():
        print(f"{n:6} {kind}")
    return bad


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(bool(main(sys.argv[1:])))
