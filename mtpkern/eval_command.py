"""The command `mtpkern eval`: rows of a file (mtpkern.evaluation), or tasks of a harness (mtpkern.lm_harness)."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtpkern import show
from mtpkern.cases import Case, read_cases
from mtpkern.cli import add_model_options, add_prompt_options, filled, flag, positive
from mtpkern.code_answers import STOPS, CodeCase, require_limits
from mtpkern.evaluation import Evaluation, evaluate
from mtpkern.grading import RULES
from mtpkern.loading import device_of, load, quiet, require_model
from mtpkern.model import recorded_settings
from mtpkern.origin import origin
from mtpkern.output import printable
from mtpkern.prompting import Prompting, warnings_of
from mtpkern.sets import CODE, SETS, digest, named_cases
from mtpkern.strategies import Strategy, name_of, strategy_of


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mtpkern eval",
        description="Decodes a data set in several ways, in turns: accuracy with its error, tokens a pass, acceptance, "
        "wall-clock ratio and nearness to the original model, as a page, as JSON and a line a prompt. The same command "
        "again goes on where it was stopped.",
    )
    add = parser.add_argument
    add_model_options(parser)
    add_prompt_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSONL: prompt, question or messages, and what is right as answer, result, completion, response or the "
        f"last message; or one of {', '.join(SETS)}, out of their packages (extra sets)",
    )
    source.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="of lm-evaluation-harness (extra eval); as in the paper: gsm8k_cot bbh ifeval aime25 gpqa cnn_dm",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    add(
        "--strategies",
        nargs="+",
        default=["verified"],
        metavar="NAME[:K][:THRESHOLD[:MASKS]]",
        help="such as static:2 confadapt:16:0.9 verified verified:4:0.2:9 (default: verified); static:1 always comes "
        "first",
    )
    add("--include-path", type=Path, metavar="DIR", help="with --tasks: a folder with tasks in yaml")
    add("--fewshot", type=int, metavar="N", help="with --tasks: examples instead of the task's own number")
    add("--metric", metavar="NAME,FILTER", help="with --tasks: what counts as right; else the task's first")
    add("--answer", choices=RULES, metavar="RULE", help=f"{', '.join(RULES)} (default auto)")
    add("--answer-field", metavar="NAME", help="the field of a row that says what is right")
    add(
        "--run-code",
        action="store_true",
        help="with --data human-eval: judge answers by running them, each in a process of its own with limits on time "
        "and memory; it is no sandbox",
    )
    add("--baseline", metavar="ORIGINAL", help="the model that training began with")
    add("--limit", type=positive, metavar="N", help="the first N rows, or of each task; more later goes on")
    add("--max-new-tokens", type=positive, metavar="N", help="(default 256, or the task's)")
    add("--batch-size", type=positive, default=8, metavar="N", help="(default 8)")
    add("--stop", nargs="+", type=filled, default=[], metavar="TEXT", help="stop strings, such as Q:")
    return parser


def main(argv: Sequence[str]) -> None:
    """The command line: decode, print, write. ValueError, OSError or ImportError where the user can help.

    main(["my-model", "--data", "held.jsonl", "--strategies", "verified", "confadapt:0.9", "--output", "runs/eval"])
    """
    args = _parser().parse_args(argv)
    # What can be checked without the model is checked before it is loaded.
    _require_fitting(args)
    ways = {}
    for text in args.strategies:
        try:
            ways[name_of(text)] = strategy_of(text)
        except ValueError as error:
            raise ValueError(f"--strategies: {error}") from None
    if args.tasks is None:
        _rows(args, argv, ways, *_cases(args))
        return
    if find_spec("lm_eval") is None:
        raise ImportError("--tasks needs lm-evaluation-harness; run: pip install 'mtpkern[eval]'")
    _tasks(args, argv, ways)


def _require_fitting(args: argparse.Namespace) -> None:
    """Raise ValueError, by name, for an option of the other source, and for a place that can hold no results."""
    ours, theirs = ("--data", "--tasks") if args.tasks is None else ("--tasks", "--data")
    of_rows = ("answer", "answer_field", "separator", "stop", "run_code")
    names = ("include_path", "fewshot", "metric") if args.tasks is None else of_rows
    if given := _given(args, names):
        raise ValueError(f"{given}: of {theirs} only; leave it out with {ours}")
    if (args.fewshot or 0) < 0:
        raise ValueError(f"--fewshot must be a number of examples from 0 up, got {args.fewshot}")
    there = next(path for path in (args.output, *args.output.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--output {args.output}: {there} is no folder that can be written in; give another name")
    if args.run_code and str(args.data) != CODE:
        raise ValueError(f"--run-code: of --data {CODE} only, whose answers are code; leave it out")
    judged_otherwise = ("answer", "answer_field") if str(args.data) == CODE else ("answer_field",)
    if str(args.data) in SETS and (given := _given(args, judged_otherwise)):
        raise ValueError(f"{given}: --data {args.data} says itself what is right; leave it out, or give a file")


def _given(args: argparse.Namespace, names: Sequence[str]) -> str:
    """Those of the options that the user has named."""
    unless_given = _parser().get_default
    return ", ".join(flag(name) for name in names if getattr(args, name) != unless_given(name))


def _cases(args: argparse.Namespace) -> tuple[Sequence[Case], str]:
    """What is asked, and a digest of all its rows: more of them go on with the same evaluation."""
    if str(args.data) not in SETS:
        cases = read_cases(args.data, args.limit, args.answer_field)
        return cases, hashlib.sha256(args.data.read_bytes()).hexdigest()
    if args.run_code:
        require_limits()
    cases = named_cases(str(args.data), run_code=args.run_code)
    return cases[: args.limit], digest(cases)


def _rows(
    args: argparse.Namespace, argv: Sequence[str], ways: Mapping[str, Strategy], cases: Sequence[Case], sha256: str
) -> None:
    options = {"rule": args.answer or "auto", "stops": args.stop, "max_new_tokens": args.max_new_tokens or 256}
    evaluation = _loaded(args, ways, **options)
    evaluation.prompting = prompting = Prompting.of(recorded_settings(evaluation.model), args.chat, args.separator)
    if str(args.data) == CODE:
        evaluation.stops = args.stop or ([] if prompting.chat else STOPS)
        cases = [case.in_chat() if prompting.chat and isinstance(case, CodeCase) else case for case in cases]
    _warn(args, evaluation)
    settings = {
        "data": args.data.name,
        "data_sha256": sha256,
        "answer": evaluation.rule,
        "answer_field": args.answer_field,
        "separator": prompting.separator,
        "max_new_tokens": evaluation.max_new_tokens,
        "stop": list(evaluation.stops),
        **({"run_code": args.run_code} if str(args.data) == CODE else {}),
        **_settings(args, argv, evaluation),
    }
    with show.progress(f"{len(cases)} prompts, {len(evaluation.ways)} ways", len(cases)) as advance:
        evaluate(evaluation, cases, args.output, settings, batch_size=args.batch_size, progress=advance)
    print((args.output / "results.md").read_text(encoding="utf-8"))


def _tasks(args: argparse.Namespace, argv: Sequence[str], ways: Mapping[str, Strategy]) -> None:
    from mtpkern import lm_harness  # of an extra

    tasks = lm_harness.tasks_of(args.tasks, args.include_path)
    lm_harness.require_metric(tasks, args.metric)
    evaluation = _loaded(args, ways)
    template = evaluation.tokenizer.chat_template is not None
    chat = recorded_settings(evaluation.model).get("chat", template) if args.chat is None else args.chat
    if chat and not template:
        raise ValueError(f"{args.model}: the tokenizer has no chat template; give --no-chat")
    evaluation.prompting = lm_harness.Rendered(True) if chat else Prompting(False)
    _warn(args, evaluation)
    # What a task asks is part of each sample; here stands what is the same for all.
    settings = {"max_new_tokens": args.max_new_tokens, "lm_eval": version("lm_eval")}
    settings |= _settings(args, argv, evaluation)
    args.output.mkdir(parents=True, exist_ok=True)
    how = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    answers = lm_harness.Answers(evaluation, args.output / "samples.jsonl", **how)
    options = {"chat": bool(chat), "fewshot": args.fewshot, "limit": args.limit, "metric": args.metric}
    for name in lm_harness.evaluate_tasks(answers, tasks, args.output, settings, **options):
        print((args.output / name / "results.md").read_text(encoding="utf-8"))


def _loaded(args: argparse.Namespace, ways: Mapping[str, Strategy], **options: Any) -> Evaluation:
    """The model, and the original where one is named, as an evaluation of the ways."""
    for name in filter(None, (args.model, args.baseline)):
        require_model(name)
    quiet()
    device = device_of(args.device)
    model, tokenizer = load(args.model, args.dtype, device, base=args.base)
    original, theirs = load(args.baseline, args.dtype, device) if args.baseline else (None, None)
    mask = {} if args.mask_token_id is None else {"mask_token_id": args.mask_token_id}
    return Evaluation(model, tokenizer, ways, original=original, original_tokenizer=theirs, options=mask, **options)


def _warn(args: argparse.Namespace, evaluation: Evaluation) -> None:
    for warning in warnings_of(recorded_settings(evaluation.model), evaluation.prompting):
        print(f"mtpkern eval: warning: {printable(args.model)}: {printable(warning)}", file=sys.stderr)


def _settings(args: argparse.Namespace, argv: Sequence[str], evaluation: Evaluation) -> dict[str, Any]:
    """What makes an evaluation what it is, whatever its prompts come from, and what it ran on."""
    model = evaluation.model
    return {
        "model": args.model,
        "baseline": args.baseline,
        "ways": {name: str(strategy) for name, strategy in evaluation.ways.items()},
        "chat": evaluation.prompting.chat,
        "batch_size": args.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **origin(model.device, shlex.join(["mtpkern", "eval", *argv])),
    }
