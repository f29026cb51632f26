"""`mtpkern eval`: a data set decoded in several ways, in turns, and what each of them gains and costs.

The results folder holds

    run.json       what makes the evaluation what it is; another one is refused there
    samples.jsonl  a line a prompt: tokens, blocks, time, right or wrong in every way
    results.json   figures of every way (mtpkern.evidence), results.md the same as tables

Batches are appended as they end, so the same command again goes on behind the last whole one. The first way is always
static:1, one token a pass by the same code: what differences and wall-clock ratios refer to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpkern.answers import opened_alone
from mtpkern.card import add_to_card
from mtpkern.cases import Case
from mtpkern.compare import Completion, decode, pad, rotated, timed
from mtpkern.evidence import ORIGINAL, PLAIN, figures, markdown
from mtpkern.options import strategy_for
from mtpkern.output import json_line, write_whole
from mtpkern.prompting import Prompting
from mtpkern.strategies import Static, Strategy

# What may differ between two calls that go on with one another.
FREE = ("command", "date", "hardware", "threads", "python", "torch", "transformers", "mtpkern", "commit", "lm_eval")


@dataclass
class Evaluation:
    """A model, its data and the ways in which it is decoded.

    ways      strategies by the names that their figures bear; static_1 is put in front where it is not among them
    original  decoded token by token (by the same code), and asked how likely the answers are
    rule      of mtpkern.grading, for what the cases expect
    stops     stop strings; an answer is judged without them
    options   further keyword arguments of `mtpkern.generate`, such as mask_token_id

    Raises ValueError for an original whose tokens are not the model's.

        evaluation = Evaluation(model, tokenizer, {"verified": Verified()}, max_new_tokens=128)
        samples = evaluation.decode(read_cases(path), batch=0, warm=True)
        figures(samples)["verified"]["accuracy"]
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ways: Mapping[str, Strategy]
    prompting: Prompting = field(default_factory=Prompting)
    original: PreTrainedModel | None = None
    original_tokenizer: PreTrainedTokenizerBase | None = None
    rule: str = "auto"
    max_new_tokens: int = 256
    stops: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ways = {PLAIN: Static(1), **self.ways}
        # A k in any case: without one the rows of a pass, and with them the passes, would follow measured times.
        self.ways = {name: strategy_for(self.model, strategy) for name, strategy in ways.items()}
        if self.original is None:
            return
        ours, theirs = self.tokenizer, self.original_tokenizer or self.tokenizer
        vocabulary = ours.get_vocab()
        other = next((token for token, i in theirs.get_vocab().items() if vocabulary.get(token) != i), None)
        if other is not None:
            raise ValueError(
                f"the original's tokens are not the model's: {other!r} is {theirs.get_vocab()[other]} there and "
                f"{vocabulary.get(other)} here; --baseline is the model that training began with"
            )

    @property
    def names(self) -> dict[str, str]:
        """What each way is called in the samples, the original last: {"verified": "Verified(k=8, ...)"}."""
        original = {} if self.original is None else {ORIGINAL: "Static(k=1)"}
        return {name: str(strategy) for name, strategy in self.ways.items()} | original

    def decode(self, cases: Sequence[Case], *, batch: int, first: int = 0, warm: bool = False) -> list[dict[str, Any]]:
        """The samples (mtpkern.evidence) of cases that are decoded together; ways take turns in being the first.

        batch: the number of this batch; first: the row of its first case; warm: decode once untimed before.
        """
        prompts = [self.prompting.encode_at(case.where, self.tokenizer, case.fields) for case in cases]
        inputs, options = pad(prompts, self.model.device), self._options()
        ways: dict[str, list[dict[str, Any]]] = {}
        for name in rotated(list(self.ways), batch):
            if warm:
                # A graph is captured for the lengths that it is to decode.
                few = {} if self.model.device.type == "cuda" else {"max_new_tokens": min(4, self.max_new_tokens)}
                decode(self.model, inputs, self.ways[name], **options | few)
            ways[name] = self._way(cases, *timed(self.model, inputs, self.ways[name], **options))
        if self.original is not None:
            there = pad(prompts, self.original.device)
            options["mask_token_id"] = None
            ways[ORIGINAL] = self._way(cases, *timed(self.original, there, Static(1), **options))
            for i, prompt in enumerate(prompts):
                known: dict[tuple[int, ...], float | None] = {}
                for way in ways.values():
                    tokens = tuple(way[i]["tokens"])
                    if tokens not in known:
                        known[tokens] = nll(self.original, prompt, tokens)
                    way[i]["nll"] = known[tokens]
        return [
            {"row": first + i, "batch": batch, "ways": {name: ways[name][i] for name in self.names}}
            for i in range(len(cases))
        ]

    def _options(self) -> dict[str, Any]:
        options = {"max_new_tokens": self.max_new_tokens, **self.options}
        # The original stops where the model does.
        stop = self.model.generation_config.eos_token_id
        options["eos_token_id"] = self.tokenizer.eos_token_id if stop is None else stop
        return options | ({"stop_strings": list(self.stops), "tokenizer": self.tokenizer} if self.stops else {})

    def _way(self, cases: Sequence[Case], completions: Sequence[Completion], seconds: float) -> list[dict[str, Any]]:
        texts = [cut(str(self.tokenizer.decode(c.tokens, skip_special_tokens=True)), self.stops) for c in completions]
        return [
            {
                "tokens": completion.tokens,
                "blocks": completion.blocks,
                "finished": completion.finished,
                "seconds": seconds / len(cases),
                "text": text,
                "right": case.right(text, self.rule),
                "nll": None,
            }
            for case, completion, text in zip(cases, completions, texts, strict=True)
        ]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings: `cut("Seven. Q: And", ["Q:"])` is "Seven. "."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def nll(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> float | None:
    """Nats of the tokens behind the prompt under the model; None where one is none of its tokens.

    nll(model, [5, 6, 7], [8, 2])
    """
    if not tokens or max(tokens) >= model.get_input_embeddings().weight.shape[0]:
        return None
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    with torch.inference_mode():
        # Of the prompt's logits only the last counts; a long prompt's would be large.
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(tokens)).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[-len(tokens) :].float(), ids[0, -len(tokens) :], reduction="sum")
    return float(losses)


def evaluate(
    evaluation: Evaluation,
    cases: Sequence[Case],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Decode what the results folder does not have yet, write all its files, and return the figures of every way.

    settings: what makes the evaluation what it is. Raises ValueError where those of the folder are others, and
    where another run writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with opened_alone(folder / "samples.jsonl") as file:
        require_same(folder / "run.json", settings)
        done = samples_there(folder / "samples.jsonl")
        first = len(done)
        for start in range(first, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            number = done[-1]["batch"] + 1 if done else 0
            samples = evaluation.decode(batch, batch=number, first=start, warm=start == first)
            file.write("".join(json_line(sample) + "\n" for sample in samples))
            file.flush()
            done += samples
            progress(len(done))
    facts = {"prompts": str(len(cases)), **facts_of(settings)}
    title = f"{Path(str(settings['model'])).name} on {settings['data']}"
    return write_results(
        folder, done[: len(cases)], title, {"settings": dict(settings), "ways": evaluation.names}, facts
    )


def facts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings as a page says them, without those that say nothing."""
    return {name: _said(value) for name, value in settings.items() if value not in (None, [])}


def write_results(
    folder: Path, samples: Sequence[Mapping[str, Any]], title: str, record: Mapping[str, Any], facts: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Write results.json (the record and the figures of the samples) and results.md, and return the figures.

    record: its settings name the model, whose card is completed (mtpkern.card), and the data or the task
    """
    found = figures(samples)
    write_whole(folder / "results.json", json.dumps({**record, "figures": found}, indent=1) + "\n")
    write_whole(folder / "results.md", markdown(found, title, facts))
    settings = record["settings"]
    add_to_card(str(settings["model"]), str(settings.get("task", settings.get("data"))), found, facts)
    return found


def _said(value: Any) -> str:
    return ", ".join(f"{name} = {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def require_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what the evaluation is where there are no samples; raise ValueError, by name, where they are of another.

    path: run.json, beside the samples, which the caller has for himself (`opened_alone`)
    """
    samples = path.with_name("samples.jsonl")
    there = samples.exists() and samples.stat().st_size > 0
    if path.exists() and there:
        before = json.loads(path.read_text(encoding="utf-8"))
        names = [n for n in {**before, **settings} if n not in FREE and before.get(n) != settings.get(n)]
        if names:
            said = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in names)
            raise ValueError(f"{path.parent} holds another evaluation: {said}; give another --output, or remove it")
        return
    if there:
        raise ValueError(f"{path.parent} holds samples and no run.json that says of what; give another --output")
    write_whole(path, json.dumps(settings, indent=1) + "\n")


def samples_there(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of samples; half a line, of a run that was killed, is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise ValueError(f"{path}: holds a line that is no sample; give another --output, or remove it") from None
