"""The same prompts decoded in several ways, with time, passes and right answers counted.

A way is a strategy of ours, or None for Hugging Face's own `generate`. Ways are timed interleaved, batch by batch and
each time in another order, so that a machine that slows down or warms up does so for all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpkern.arguments import plain_greedy
from mtpkern.generation import MTPGenerateOutput, generate
from mtpkern.grading import is_right
from mtpkern.rows import require_file
from mtpkern.strategies import Strategy

T = TypeVar("T")

HF_GENERATE = "hf_generate"


@dataclass(frozen=True)
class Problem:
    """A prompt as the model expects it, and the number that the worked answer must end in."""

    prompt: str
    result: int


@dataclass(frozen=True)
class Completion:
    """The emitted tokens of one sequence, its stop token included, how many each pass emitted, and whether it ended."""

    tokens: list[int]
    blocks: list[int]
    finished: bool = True


def sample_k(blocks: Sequence[int]) -> float:
    """The mean k of one sample: tokens that a pass emitted, without the last, which a stop token or the limit trims.

    Over several samples tokens per pass are pooled, all tokens / all passes, which is what the time goes by; the
    paper's "Eff. k" is the mean over samples of each one's mean k, ± its standard deviation. Of [4, 4, 4, 1] and [2, 1]
    the first is 16 / 6 = 2.67; the second has 4.0 and 2.0, which is 3.0 ± 1.41.

        sample_k([4, 4, 4, 1])  # 4.0
    """
    return mean(blocks[:-1] or blocks)


@dataclass
class Tally:
    """Sums over the problems that one way has decoded."""

    problems: int = 0
    right: int = 0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    sample_ks: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.problems

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return (self.accuracy * (1 - self.accuracy) / self.problems) ** 0.5

    @property
    def tokens_per_pass(self) -> float:
        """Tokens emitted over passes made, summed over the problems; the prefill counts as a pass."""
        return self.tokens / self.passes

    @property
    def effective_k(self) -> tuple[float, float]:
        """The paper's Eff. k: mean over the problems of `sample_k`, and its standard deviation (0 of one problem)."""
        return mean(self.sample_ks), stdev(self.sample_ks) if len(self.sample_ks) > 1 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the whole batch per second of wall-clock time, prefill included."""
        return self.tokens / self.seconds

    def add(self, completions: Sequence[Completion], right: int, seconds: float) -> None:
        """Count one batch in."""
        self.problems += len(completions)
        self.right += right
        self.tokens += sum(len(c.tokens) for c in completions)
        self.passes += sum(len(c.blocks) for c in completions)
        self.sample_ks += [sample_k(c.blocks) for c in completions]
        self.seconds += seconds


def read_problems(path: Path, n: int | None = None) -> list[Problem]:
    """The first n problems (all, if None) of a JSONL file of `Problem`s; ValueError where it holds fewer.

    read_problems(Path("mtpkern/assets/problems.jsonl"), 100)
    """
    require_file(path)
    with path.open(encoding="utf-8") as lines:
        problems = [Problem(**json.loads(line)) for line in lines]
    if n is not None and len(problems) < n:
        raise ValueError(f"{path.name} holds {len(problems)} problems; expected at least {n}: ask for fewer")
    return problems[:n]


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Token ids of the prompts as `generate` takes them: input_ids and attention_mask [B, T], padded on the left.

    encode(tokenizer, ["Ann has 3 eggs.", "Hi"], model.device)["input_ids"].shape[0]  # 2
    """
    return pad([tokenizer(prompt).input_ids for prompt in prompts], device)


def pad(ids: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Rows of token ids as input_ids and attention_mask [B, T]; the padding on the left is hidden by the mask.

    pad([[5, 6], [7]], torch.device("cpu"))["attention_mask"]  # [[1, 1], [0, 1]]
    """
    width = max(map(len, ids))
    # Any id does as padding, since nothing looks at it; 0 is in every vocabulary.
    tokens = [[0] * (width - len(row)) + list(row) for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return {"input_ids": torch.tensor(tokens, device=device), "attention_mask": torch.tensor(mask, device=device)}


def ours(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> list[Completion]:
    """Decode one batch with `mtpkern.generate`; inputs as `pad` makes them, options are keyword arguments of it.

    ours(model, encode(tokenizer, ["Ann has 3 eggs."], model.device), strategy=Verified(k=8), max_new_tokens=64)
    """
    out = generate(model, **{**inputs, **options}, return_dict_in_generate=True)
    assert isinstance(out, MTPGenerateOutput)
    assert out.blocks is not None
    assert out.finish_reasons is not None
    rows = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    ended = [reason in ("stop", "stop_string", "criteria") for reason in out.finish_reasons]
    return [Completion(row[: sum(n)], n, end) for row, n, end in zip(rows, out.blocks, ended, strict=True)]


def hugging_face(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> list[Completion]:
    """Decode one batch with the model's own greedy `generate`; as `ours`, but every block has one token."""
    settings = {**plain_greedy(model.generation_config), "do_sample": False, **options}
    rows = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    stops = options.get("eos_token_id", model.generation_config.eos_token_id)
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    completions = []
    for row in rows:
        # Behind the first stop token there is only padding.
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        completions.append(Completion(row[:end], [1] * end, bool(stops & set(row))))
    return completions


def decode(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], way: Strategy | None, **options: Any
) -> list[Completion]:
    """`ours` with the strategy `way`, or `hugging_face` where that is None."""
    return hugging_face(model, inputs, **options) if way is None else ours(model, inputs, strategy=way, **options)


def timed(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], way: Strategy | None, **options: Any
) -> tuple[list[Completion], float]:
    """`decode`, and the seconds that it took, with the device's queue empty at both ends."""
    synchronize(model.device)
    start = time.perf_counter()
    completions = decode(model, inputs, way, **options)
    synchronize(model.device)
    return completions, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it has a queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count_right(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], completions: list[Completion]) -> int:
    """How many completions end in `####` and their problem's result."""
    texts = [str(tokenizer.decode(c.tokens, skip_special_tokens=True)) for c in completions]
    return sum(is_right(text, f"#### {p.result}") for text, p in zip(texts, problems, strict=True))


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    ways: Mapping[str, Strategy | None],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> dict[str, Tally]:
    """Decode the problems in every way, interleaved; one tally a way. Each way first decodes one batch untimed.

    ways: name -> strategy, None for Hugging Face's generate; progress: called with the number of problems done;
    options: keyword arguments of `model.generate`, such as max_new_tokens.

        tallies = compare(model, tokenizer, problems, {HF_GENERATE: None, "verified": Verified(k=8)}, max_new_tokens=96)
        tallies["verified"].tokens_per_second / tallies[HF_GENERATE].tokens_per_second
    """
    tallies = {name: Tally() for name in ways}
    for number, batch in enumerate(batches(problems, batch_size)):
        inputs = encode(tokenizer, [p.prompt for p in batch], model.device)
        for name in rotated(list(ways), number):
            if number == 0:
                decode(model, inputs, ways[name], **options)
            completions, seconds = timed(model, inputs, ways[name], **options)
            tallies[name].add(completions, count_right(tokenizer, batch, completions), seconds)
        progress(number * batch_size + len(batch))
    return tallies


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in order, `size` at a time."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


def rotated(names: list[str], by: int) -> list[str]:
    """The names with another one first each time, so that no way always runs behind the same other."""
    return names[by % len(names) :] + names[: by % len(names)]
