"""Greedy decoding of held-out problems by others' means: transformers' assisted generation, in turns.

All ways write the model's own greedy tokens, for one prompt at a time, and theirs need no training. Prompt lookup
drafts what stood behind the same words before, and gains where an answer repeats its prompt. Assisted generation lets a
small model draft; the shipped one is the smallest of its vocabulary, so its own first layers do (early exit).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtpkern import ASSETS
from mtpkern.bench.report import Table, percent, program
from mtpkern.bench.step import bytes_read
from mtpkern.bench.timing import share_of_peak
from mtpkern.compare import encode, read_problems, rotated, timed
from mtpkern.strategies import Static, Strategy, Verified

LOOKUP, LAYERS = 10, 2
HEADER = ("way", "identical to HF greedy", "tokens/s", "× HF generate, median", "bandwidth")


def measure(device: torch.device, quick: bool) -> Iterator[Table]:
    """A row a way; the table behind each problem."""
    problems, most = (2, 8) if device.type == "cpu" else (16 if quick else 64, 128)
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32, trust_remote_code=False).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS, trust_remote_code=False)
    ways: dict[str, tuple[Strategy | None, dict[str, Any]]] = {
        "HF generate": (None, {}),
        f"HF generate, prompt lookup of {LOOKUP}": (None, {"prompt_lookup_num_tokens": LOOKUP}),
        f"HF generate, assisted by its first {LAYERS} layers": (None, {"assistant_early_exit": LAYERS}),
        "one a pass": (Static(1), {}),
        "Verified": (Verified(), {}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[list[int]]] = {name: [] for name in ways}
    # Bytes of all passes; how many there were is not told of those that draft.
    moved = {name: 0.0 for name, (_, options) in ways.items() if not options}
    for number, problem in enumerate(read_problems(ASSETS / "problems.jsonl", problems + 1), -1):
        inputs = encode(tokenizer, [problem.prompt], device)
        for name in rotated(list(ways), number):
            way, options = ways[name]
            (found,), took = timed(model, inputs, way, max_new_tokens=most, **options)
            # The first is the warm-up.
            if number >= 0:
                seconds[name].append(took)
                tokens[name].append(found.tokens)
                if name in moved:
                    middle = inputs["input_ids"].shape[1] + len(found.tokens) // 2
                    moved[name] += len(found.blocks) * bytes_read(model, 1, middle)
        if number >= 0:
            bandwidth = {name: share_of_peak(device, 1e6 * sum(seconds[name]), bytes=moved[name]) for name in moved}
            yield table_of(seconds, tokens, bandwidth, most)


def table_of(
    seconds: Mapping[str, list[float]],
    tokens: Mapping[str, list[list[int]]],
    bandwidth: Mapping[str, float | None],
    most: int,
) -> Table:
    """Of what each way took and wrote, problem by problem, against the first way."""
    first, *_ = seconds
    note = f"The shipped checkpoint, one prompt at a time, at most {most} tokens, float32; in turns. "
    note += "bandwidth: weights, keys and values once a pass, the prefill counted as one, over the whole time."
    table = Table("Held-out problems", note, HEADER)
    for name in seconds:
        same, of = sum(a == b for a, b in zip(tokens[name], tokens[first])), len(tokens[name])
        rate = sum(map(len, tokens[name])) / sum(seconds[name])
        ratio = median(a / b for a, b in zip(seconds[first], seconds[name]))
        record = {"way": name, "identical": same, "problems": of, "tokens_a_second": rate, "ratio": ratio}
        row = name, f"{same} of {of}", f"{rate:.0f}", f"{ratio:.2f}", percent(bandwidth.get(name))
        table = table.plus(row, record | {"bandwidth": bandwidth.get(name)})
    return table


if __name__ == "__main__":
    program("assisted", "Beside assisted generation", measure)
