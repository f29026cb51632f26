"""What a call of `generate` takes beyond its passes: around them (arguments, buffers, result) and between two of them.

A pass is a step of the decoder, or a chunk of its prefill. On a CPU one thread's processor time is taken, which other
processes do not stretch. On a GPU what lies between passes is hidden behind them, or part of their time; a call is
timed to the end of what the device has to do.

    python -m mtpkern.bench.call --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mtpkern
from mtpkern.bench.report import Goal, Table, percent, program
from mtpkern.bench.step import bytes_read
from mtpkern.bench.timing import Spread, share_of_peak
from mtpkern.compare import ours
from mtpkern.decoder import Decoder
from mtpkern.demo import ASSETS
from mtpkern.model import recorded_settings
from mtpkern.strategies import Static, Strategy, Verified

NEW_TOKENS, PROMPT = 128, 32
SHARE = 3.0
HEADER = ("way", "batch", "call, ms", "around, ms", "between, ms", "of the call", "bandwidth")


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def parts_of(call: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """Seconds of a call: all of it, what lies around prefill and run, and what in these is no pass."""
    spent = dict.fromkeys(("prefill", "run", "prefill_chunk", "step"), 0.0)

    def timed(name: str) -> Callable[..., Any]:
        own = getattr(Decoder, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            began = _clock(device)
            result = own(*args, **kwargs)
            spent[name] += _clock(device) - began
            return result

        return method

    with ExitStack() as stack:
        # Inside of a run a GPU is not waited for, and a graph replays steps that nobody calls.
        for name in ("prefill", "run") if device.type != "cpu" else spent:
            stack.enter_context(patch.object(Decoder, name, timed(name)))
        began = _clock(device)
        call()
        total = _clock(device) - began
    inside = spent["prefill"] + spent["run"]
    between = inside - spent["prefill_chunk"] - spent["step"] if device.type == "cpu" else 0.0
    return total, total - inside, between


def measure_model(model: PreTrainedModel, batches: tuple[int, ...], rounds: int, new_tokens: int) -> Iterator[Table]:
    """Plain decoding and, where the model records its masks, Verified: in turns, medians; row by row."""
    ways: dict[str, Strategy] = {"Static(1)": Static(1)}
    if "k_max" in recorded_settings(model):
        ways["Verified"] = Verified()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    note = f"{new_tokens} new tokens behind {PROMPT} of a random prompt, {model.dtype}, medians of {rounds} rounds. "
    note += "bandwidth: weights, keys and values once a pass, the prefill counted as one, over the time of the call."
    table = Table(f"A call of {type(model).__name__}", note, HEADER)
    for batch in batches:
        ids = torch.randint(vocabulary // 2, (batch, PROMPT), generator=generator).to(model.device)
        # Without padding, and the last token ends no text of these.
        settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "eos_token_id": vocabulary - 1}
        decode = partial(mtpkern.generate, model, ids, max_new_tokens=new_tokens, **settings)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        moved: dict[str, float] = {}
        for name, strategy in ways.items():
            # Makes what later ones find, and says how many passes there are.
            settled = ours(model, {"input_ids": ids, **settings}, strategy=strategy, max_new_tokens=new_tokens)
            passes = max(len(completion.blocks) for completion in settled)
            moved[name] = passes * bytes_read(model, batch, PROMPT + new_tokens // 2)
        for _ in range(rounds):
            for name, strategy in ways.items():
                found[name].append(parts_of(partial(decode, strategy=strategy), model.device))
        for name, parts_found in found.items():
            total, around, between = (Spread.of(x) for x in zip(*parts_found))
            share = 100 * (around.median + between.median) / total.median
            bandwidth = share_of_peak(model.device, 1e6 * total.median, bytes=moved[name])
            times = (f"{1e3 * x.median:.1f}" for x in (total, around, between))
            row = name, str(batch), *times, f"{share:.1f} %", percent(bandwidth)
            goal = Goal(f"beyond the passes, {name}, batch {batch}", SHARE, share, "%", at_most=True)
            record = {"way": name, "batch": batch, "total": total, "around": around, "between": between}
            table = table.plus(row, record | {"bandwidth": bandwidth}, goal)
            yield table


def measure(device: torch.device, quick: bool, model: str = "") -> Iterator[Table]:
    """The table of the shipped checkpoint unless a model is named, as each row is there."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(model or ASSETS, dtype=dtype, trust_remote_code=False)
    loaded = loaded.eval().to(device)
    tiny = quick and device.type == "cpu"
    yield from measure_model(loaded, *(((1,), 1, 8) if tiny else ((1, 8), 3 if quick else 9, NEW_TOKENS)))


if __name__ == "__main__":
    options = {"--model": {"default": "", "help": "path or hub id (default: shipped)"}}
    program("call", "A call", measure, options=options)
