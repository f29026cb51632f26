"""`mtpkern eval`: a data set decoded in several ways, in turns, and what each of them gains and costs.

The results folder holds

    run.json       what makes the evaluation what it is; another one is refused there
    samples.jsonl  a line a prompt: tokens, blocks, time, right or wrong in every way
    results.json   figures of every way (mtpkern.evidence), results.md the same as tables

Batches are appended as they end, so the same command again goes on behind the last whole one. The first way is always
static:1, one token a pass by the same code: what differences and wall-clock ratios refer to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mtpkern
from mtpkern.cases import Case, read_cases
from mtpkern.evidence import ORIGINAL, PLAIN, figures, markdown
from mtpkern.grading import RULES, is_right
from mtpkern.output import json_line, printable, whole_file
from mtpkern.strategies import Strategy, name_of, strategy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mtpkern.compare import Completion
    from mtpkern.prompting import Prompting

# What may differ between two calls that go on with one another.
_FREE = ("command", "date", "hardware", "threads", "python", "torch", "transformers", "mtpkern", "commit")


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
    prompting: Prompting | None = None
    original: PreTrainedModel | None = None
    original_tokenizer: PreTrainedTokenizerBase | None = None
    rule: str = "auto"
    max_new_tokens: int = 256
    stops: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from mtpkern.options import strategy_for
        from mtpkern.strategies import Static

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

    def decode(self, cases: Sequence[Case], *, batch: int, first: int = 0, warm: bool = False) -> list[dict[str, Any]]:
        """The samples (mtpkern.evidence) of cases that are decoded together; ways take turns in being the first.

        batch: the number of this batch; first: the row of its first case; warm: decode once untimed before.
        """
        from mtpkern.compare import ours, pad, rotated, synchronize
        from mtpkern.strategies import Static

        prompts = [self._encode(case) for case in cases]
        inputs = pad(prompts, self.model.device)
        options = self._options()
        ways: dict[str, dict[int, dict[str, Any]]] = {}
        for name in rotated(list(self.ways), batch):
            strategy = self.ways[name]
            if warm:
                ours(self.model, inputs, strategy=strategy, **options)
            synchronize(self.model.device)
            start = time.perf_counter()
            completions = ours(self.model, inputs, strategy=strategy, **options)
            synchronize(self.model.device)
            ways[name] = self._way(cases, completions, (time.perf_counter() - start) / len(cases))
        if self.original is not None:
            there = pad(prompts, self.original.device)
            start = time.perf_counter()
            completions = ours(self.original, there, strategy=Static(1), **options | {"mask_token_id": None})
            synchronize(self.original.device)
            ways[ORIGINAL] = self._way(cases, completions, (time.perf_counter() - start) / len(cases))
            for i, prompt in enumerate(prompts):
                known: dict[tuple[int, ...], float | None] = {}
                for way in ways.values():
                    tokens = tuple(way[i]["tokens"])
                    if tokens not in known:
                        known[tokens] = nll(self.original, prompt, tokens)
                    way[i]["nll"] = known[tokens]
        order = [*self.ways, *([ORIGINAL] if self.original is not None else [])]
        return [
            {"row": first + i, "batch": batch, "ways": {name: ways[name][i] for name in order}}
            for i in range(len(cases))
        ]

    def _encode(self, case: Case) -> list[int]:
        from mtpkern.prompting import Prompting

        try:
            ids = (self.prompting or Prompting()).encode(self.tokenizer, case.fields)
        except Exception as error:  # a template and a tokenizer raise what they like
            raise ValueError(f"{case.where}: {error}") from error
        if not ids:
            raise ValueError(f"{case.where}: the prompt has no tokens; give one with text in it")
        return ids

    def _options(self) -> dict[str, Any]:
        options = {"max_new_tokens": self.max_new_tokens, **self.options}
        # The original stops where the model does.
        stop = self.model.generation_config.eos_token_id
        options["eos_token_id"] = self.tokenizer.eos_token_id if stop is None else stop
        if self.stops:
            options |= {"stop_strings": list(self.stops), "tokenizer": self.tokenizer}
        return options

    def _way(
        self, cases: Sequence[Case], completions: Sequence[Completion], seconds: float
    ) -> dict[int, dict[str, Any]]:
        found = {}
        for i, (case, completion) in enumerate(zip(cases, completions, strict=True)):
            text = cut(str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True)), self.stops)
            found[i] = {
                "tokens": completion.tokens,
                "blocks": completion.blocks,
                "finished": completion.finished,
                "seconds": seconds,
                "text": text,
                "right": None if case.expected is None else is_right(text, case.expected, self.rule),
                "nll": None,
            }
        return found


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings: `cut("Seven. Q: And", ["Q:"])` is "Seven. "."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def nll(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> float | None:
    """Nats of the tokens behind the prompt under the model; None where one is none of its tokens.

    nll(model, [5, 6, 7], [8, 2])
    """
    import torch

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

    settings: what makes the evaluation what it is. Raises ValueError where those of the folder are others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _require_same(folder / "run.json", settings)
    done = _samples_there(folder / "samples.jsonl")
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        warm = True
        for start in range(len(done), len(cases), batch_size):
            batch = cases[start : start + batch_size]
            number = done[-1]["batch"] + 1 if done else 0
            samples = evaluation.decode(batch, batch=number, first=start, warm=warm)
            file.write("".join(json_line(sample) + "\n" for sample in samples))
            file.flush()
            done += samples
            warm = False
            progress(len(done))
    done = done[: len(cases)]
    found = figures(done)
    facts = {name: _said(value) for name, value in settings.items() if value not in (None, [])}
    facts["prompts"] = str(len(done))
    with whole_file(folder / "results.json") as out:
        assert out is not None
        record = {"settings": dict(settings), "ways": {n: str(s) for n, s in evaluation.ways.items()}, "figures": found}
        out.write(json.dumps(record, indent=1) + "\n")
    with whole_file(folder / "results.md") as out:
        assert out is not None
        out.write(markdown(found, f"{Path(str(settings['model'])).name} on {settings['data']}", facts))
    return found


def _said(value: Any) -> str:
    return ", ".join(f"{name} = {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what the evaluation is where nothing stands; raise ValueError, by name, where it is another."""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        names = [n for n in {**before, **settings} if n not in _FREE and before.get(n) != settings.get(n)]
        if names:
            said = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in names)
            raise ValueError(f"{path.parent} holds another evaluation: {said}; give another --output, or remove it")
        return
    if (path.parent / "samples.jsonl").exists():
        raise ValueError(f"{path.parent} holds samples and no run.json that says of what; give another --output")
    with whole_file(path) as out:
        assert out is not None
        out.write(json.dumps(settings, indent=1) + "\n")


def _samples_there(path: Path) -> list[dict[str, Any]]:
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


def environment(model: PreTrainedModel, command: Sequence[str]) -> dict[str, str]:
    """Hardware, versions, commit where it is a clone, and command: what a number needs beside it."""
    import torch
    import transformers

    device = model.device
    root = Path(__file__).resolve().parents[1]
    try:
        said = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20
        )
        commit = said.stdout.strip() if (root / ".git").exists() else ""
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} cpu",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mtpkern": str(mtpkern.__version__),
        "commit": commit or "unknown",
        "command": shlex.join(["mtpkern", "eval", *command]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mtpkern eval",
        description="Decodes a data set in several ways, in turns: accuracy with its error, tokens a pass, acceptance, "
        "wall-clock ratio and nearness to the original model, as a page, as JSON and a line a prompt. The same command "
        "again goes on where it was stopped.",
    )
    parser.add_argument("model", metavar="MODEL", help="path or hub id of a checkpoint, or of a gated adapter")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL: prompt, question or messages, and what is right as answer, result, completion, response or the "
        "last message",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["verified"],
        metavar="NAME[:K][:THRESHOLD[:MASKS]]",
        help="such as static:2 confadapt:16:0.9 verified verified:4:0.2:9 (default: verified); static:1 always comes "
        "first",
    )
    parser.add_argument("--answer", choices=RULES, default="auto", metavar="RULE", help=f"{', '.join(RULES)}")
    parser.add_argument("--answer-field", metavar="NAME", help="the field of a row that says what is right")
    parser.add_argument("--baseline", metavar="ORIGINAL", help="the model that training began with")
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N rows; more later goes on")
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="(default 256)")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="(default 8)")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="stop strings, such as Q:")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="where the checkpoint does not record it")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the accelerator, if there is one)")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="as in mtpkern generate")
    parser.add_argument("--separator", metavar="TEXT", help="as in mtpkern generate")
    parser.add_argument("--base", metavar="MODEL", help="of a gated adapter, where its base is not where it was")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str]) -> None:
    """The command line: decode, print the tables, write the results.

    Raises ValueError or OSError where the user can help.

        main(["my-model", "--data", "held.jsonl", "--strategies", "verified", "confadapt:0.9", "--output", "runs/eval"])
    """
    args = _parser().parse_args(argv)
    # What can be checked without the model is checked before it is loaded.
    ways = {}
    for text in args.strategies:
        try:
            ways[name_of(text)] = strategy_of(text)
        except ValueError as error:
            raise ValueError(f"--strategies: {error}") from None
    cases = read_cases(args.data, args.limit, args.answer_field)
    from mtpkern import show
    from mtpkern.loading import device_of, load, quiet, require_model
    from mtpkern.model import recorded_settings
    from mtpkern.prompting import Prompting, warnings_of

    for name in filter(None, (args.model, args.baseline)):
        require_model(name)
    quiet()
    device = device_of(args.device)
    model, tokenizer = load(args.model, args.dtype, device, base=args.base)
    original, theirs = load(args.baseline, args.dtype, device) if args.baseline else (None, None)
    recorded = recorded_settings(model)
    prompting = Prompting.of(recorded, args.chat, args.separator)
    for warning in warnings_of(recorded, prompting):
        print(f"mtpkern eval: warning: {printable(args.model)}: {printable(warning)}", file=sys.stderr)
    evaluation = Evaluation(
        model,
        tokenizer,
        ways,
        prompting,
        original,
        theirs,
        args.answer,
        args.max_new_tokens,
        args.stop,
        {} if args.mask_token_id is None else {"mask_token_id": args.mask_token_id},
    )
    settings = {
        "model": args.model,
        "baseline": args.baseline,
        "data": args.data.name,
        # Of the whole file: more of its rows go on with the same evaluation.
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "ways": {name: str(strategy) for name, strategy in evaluation.ways.items()},
        "answer": args.answer,
        "answer_field": args.answer_field,
        "chat": prompting.chat,
        "separator": prompting.separator,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "stop": args.stop,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        **environment(model, argv),
    }
    label = f"{len(cases)} prompts, {len(evaluation.ways)} ways"
    with show.progress(label, len(cases)) as advance:
        evaluate(evaluation, cases, args.output, settings, batch_size=args.batch_size, progress=advance)
    print((args.output / "results.md").read_text(encoding="utf-8"))
