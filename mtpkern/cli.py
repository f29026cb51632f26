"""The command line: `mtpkern demo` and `mtpkern generate`; `mtpkern train` and `mtpkern convert` are handed on.

Heavy imports happen inside the commands, so that `mtpkern --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import mtpkern
from mtpkern.answers import RESULT_FIELDS, answers_file
from mtpkern.cases import Case
from mtpkern.output import exit_status, json_line, printable, whole_file
from mtpkern.rows import BadRow, read_lines, require_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mtpkern.batching import BatchOutput
    from mtpkern.strategies import Strategy

# Commands with a parser of their own, some of the house next door, which this one does not import: a name is looked up
# when it is called for.
_HANDED_ON = {
    "serve": ("mtpkern.serve", "serve a checkpoint to OpenAI clients, whose requests share passes"),
    "eval": ("mtpkern.eval_command", "decode a data set in several ways: accuracy, tokens a pass, wall-clock ratios"),
    "plot": ("mtpkern.plots", "draw the figures of an evaluation, a training run or a benchmark"),
    "bench": ("mtpkern.bench.command", "run a benchmark by its name, or against another commit"),
    "train": ("mtpkern.train.command", "train a checkpoint for multi-token prediction"),
    "convert": ("mtpkern.train.convert", "make a plain checkpoint of a GGUF, quantised weights, or the paper's own"),
}
# Commands whose flags are named like parameters of the library, and the flag for a strategy.
_SAYS_FLAGS = {"demo": "--strategy", "generate": "--strategy", "serve": "--strategy", "eval": "--strategies"}
# Other columns are handed through, but these are known to change what a chat template writes.
_TEMPLATE_FIELDS = ("tools", "documents", "system", "chat_template_kwargs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its `exit_status`, or 2 with a message on stderr where the user can help.

    main(["demo", "--problems", "16"])
    """
    words = list(sys.argv[1:] if argv is None else argv)
    handed_on = words[0] if words and words[0] in _HANDED_ON else None
    args = _parser().parse_args(words) if handed_on is None else argparse.Namespace(command=handed_on)

    def run() -> None:
        if handed_on is None:
            args.run(args)
        else:
            importlib.import_module(_HANDED_ON[handed_on][0]).main(words[1:])

    try:
        return exit_status(run)
    except (ValueError, TypeError, OSError, ImportError) as error:
        said = _in_flags(str(error), args.command) if args.command in _SAYS_FLAGS else str(error)
        # At once: several ranks may say it.
        sys.stderr.write(f"mtpkern {args.command}: {printable(said)}\n")
        return 2


def _in_flags(message: str, command: str) -> str:
    """A message of the library as the command line says it: parameters are flags, or can be set in Python alone."""
    message = message.replace("strategy=mtpkern.Static(1)", f"{_SAYS_FLAGS[command]} static:1")
    message = re.sub(
        r"\b(mask_token_id|max_new_tokens)\b(?:=(\w+)|=)?",
        lambda match: flag(match[1]) + (f" {match[2]}" if match[2] else ""),
        message,
    )
    return re.sub(
        r"\b(?:check_model|attn_implementation|device_map)=(?:'\w+'|\{.*?\}|\w+)", r"\g<0> (in Python)", message
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))  # it quotes what was typed, or what a pattern of the shell has found


# Options that decide, beside model and strategy, what the answers to prompts are.
_DECIDING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "mask_token_id", "dtype", "chat"),
    *("separator", "base"),
)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtpkern", description="Several tokens per forward pass.")
    parser.add_argument("--version", action="version", version=f"mtpkern {mtpkern.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the shipped checkpoint solves held-out problems, with wall-clock ratios")
    demo.add_argument("--problems", type=positive, default=64, metavar="N", help="problems in the table (default 64)")
    demo.add_argument("--html", type=Path, metavar="FILE", help="write the coloured blocks as a page")
    demo.add_argument("--checkpoint", type=Path, metavar="DIR", help="a folder like the shipped one")
    demo.add_argument("--base", metavar="MODEL", help="of a gated adapter, where its base is not where it was")
    demo.add_argument("--json", action="store_true", help="print the figures as one JSON object, and nothing else")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate",
        help="decode prompts with any checkpoint",
        description="Greedy decoding, unless there is a --temperature. --prompt prints the text, with control "
        "characters as escapes on a terminal and as it is anywhere else; --file prints one JSON object a row. With "
        "--file an --output grows row by row, and the same command again goes on behind those that are there; what "
        "wrote them stands beside, in FILE.options.",
    )
    add = generate.add_argument
    add_model_options(generate)
    add_prompt_options(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the prompt itself")
    source.add_argument("--file", type=Path, help='JSONL: {"prompt": "..."} or {"messages": [...]} in each row')
    add(
        "--strategy",
        default="verified",
        metavar="NAME[:K][:THRESHOLD]",
        help="verified (default), confadapt or static, as in static:1, confadapt:0.9 or verified:8:0.6",
    )
    add("--k", type=positive, help="tokens predicted in one pass, as in --strategy")
    add("--threshold", type=float, help="confidence above which a token counts as sure, 0 to 1")
    add("--masks", type=int, metavar="N", help="rows more a pass of each prompt, for when drafts fail; with verified")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="(default 256)")
    add("--batch-size", type=positive, default=8, metavar="N", help="side by side (default 8)")
    add("--temperature", type=float, metavar="T", help="sample at this temperature; greedy unless given, or at 0")
    add("--top-k", type=positive, metavar="N", help="with --temperature: of the N best tokens alone")
    add("--top-p", type=float, metavar="P", help="with --temperature: of the best that make up P")
    add("--seed", type=int, help="with --temperature: the same text again, whatever the batch size")
    says = "end behind this text, which stays; may be given several times"
    add("--stop", action="append", type=filled, metavar="TEXT", help=says)
    add("--html", type=Path, metavar="FILE", help="with --prompt: the coloured blocks as a page")
    add("--show", action="store_true", help="print prompt and text, in blocks, one colour a pass")
    add("--output", type=Path, metavar="FILE", help="write JSONL there, with --prompt whole or not at all")
    add("--overwrite", action="store_true", help="with --file: begin --output anew, whatever answers it has")
    generate.set_defaults(run=_generate)

    for name, (_, text) in _HANDED_ON.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL to a command, and the options that say how it is loaded."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="path or hub id of a checkpoint, or of a gated adapter")
    add("--mask-token-id", type=int, metavar="ID", help="where the checkpoint does not record it; k = 1 needs none")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--device", help="such as cpu or cuda:0 (default: the accelerator, if there is one)")
    add("--base", metavar="MODEL", help="of a gated adapter, where its base is not where it was")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that say how prompts are put to its MODEL."""
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="apply the chat template or not; unless given as in the training of MODEL, else to messages alone",
    )
    parser.add_argument("--separator", metavar="TEXT", help="what follows a prompt; unless given as in its training")


def positive(text: str) -> int:
    """The number of an option, from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def filled(text: str) -> str:
    """The text of an option, which has some."""
    if not text:
        raise argparse.ArgumentTypeError("expected a text that is not empty")
    return text


def flag(name: str) -> str:
    """An option as it is typed: `flag("top_k")` is "--top-k"."""
    return f"--{name.replace('_', '-')}"


def _demo(args: argparse.Namespace) -> None:
    from mtpkern.loading import quiet

    quiet()
    from mtpkern.demo import ASSETS, demo

    demo(args.problems, html=args.html, folder=args.checkpoint or ASSETS, base=args.base, as_json=args.json)


def _generate(args: argparse.Namespace) -> None:
    # What can be checked without the model is checked before it is loaded.
    from mtpkern.loading import quiet

    if args.html is not None and args.prompt is None:
        raise ValueError("--html shows one prompt as a page; give it as --prompt, or leave --html out")
    if args.overwrite and (args.file is None or args.output is None):
        raise ValueError("--overwrite begins the --output of a --file anew; give both, or leave --overwrite out")
    if None not in (args.html, args.output) and os.path.realpath(args.html) == os.path.realpath(args.output):
        raise ValueError(f"{args.html}: --html and --output would overwrite one another; give two names")
    if not args.temperature:
        given = [flag(name) for name in ("top_k", "top_p", "seed") if getattr(args, name) is not None]
        if given:
            says = "says" if len(given) == 1 else "say"
            raise ValueError(
                f"{' and '.join(given)} {says} how to sample, and decoding is greedy; give a --temperature"
            )
    rows = [_row("--prompt", {"prompt": args.prompt})] if args.file is None else read_rows(args.file)
    quiet()
    strategy = _strategy(args)
    if args.file is None or args.output is None:
        files = [nullcontext() if path is None else whole_file(path) for path in (args.output, args.html)]
        with files[0] as output, files[1] as args.page:
            _decode_rows(rows, strategy, args, output)
        return
    if args.output.is_file() and args.output.samefile(args.file):
        raise ValueError(f"{args.output}: --output would overwrite --file, whose prompts it has; give another name")
    options = {"MODEL": args.model, "the strategy": str(strategy)}
    options |= {flag(name): getattr(args, name) for name in _DECIDING}
    with answers_file(args.output, [row.fields for row in rows], options, overwrite=args.overwrite) as (done, output):
        if done:
            there = f"{printable(str(args.output))} has the first {done} of {len(rows)} answers already"
            print(f"{there}, which stay as they are", file=sys.stderr)
        if done < len(rows):
            _decode_rows(rows[done:], strategy, args, output, first=done)


def _decode_rows(
    rows: Sequence[Case], strategy: Strategy, args: argparse.Namespace, output: TextIO | None, first: int = 0
) -> None:
    from mtpkern import show
    from mtpkern.loading import device_of, load
    from mtpkern.model import recorded_settings
    from mtpkern.prompting import Prompting, warnings_of

    model, tokenizer = load(args.model, args.dtype, device_of(args.device), base=args.base)
    recorded = recorded_settings(model)
    prompting = Prompting.of(recorded, args.chat, args.separator)
    for warning in warnings_of(recorded, prompting):
        print(f"mtpkern generate: warning: {printable(args.model)}: {printable(warning)}", file=sys.stderr)
    prompts = [prompting.encode_at(row.where, tokenizer, row.fields) for row in rows]
    # Rows that appear on a terminal tell by themselves how far things are.
    hidden = args.file is not None and (output is not None or not sys.stdout.isatty()) and not args.show
    with show.progress(f"{len(rows)} prompts", len(rows)) if hidden else nullcontext(lambda done: None) as advance:
        completions = _complete(model, tokenizer, rows, prompts, strategy, args, advance, first)
        for row, completion in zip(rows, completions, strict=True):
            _write(tokenizer, row, completion, args, output)
            # Who reads a pipe waits for it, and what is in the file is not lost.
            (output or sys.stdout).flush()


def read_rows(path: Path) -> list[Case]:
    """All rows of a JSONL file, checked; blank lines are skipped, but counted.

    Raises ValueError with the row's number for what is not an object with either a prompt or messages, or what
    already has a field that the result would bring.

        read_rows(Path("prompts.jsonl"))[0].fields["prompt"]
    """
    rows = []
    for number, fields in read_lines(path):
        where = f"{path}, row {number}"
        if isinstance(fields, BadRow):
            raise ValueError(f"{where}: {fields}")
        rows.append(_row(where, fields))
    if not rows:
        raise ValueError(f'{path}: expected at least one row such as {{"prompt": "..."}}; got none')
    return rows


def _row(where: str, fields: Any) -> Case:
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{where}: expected an object with either prompt or messages; got {got}")
    taken = [name for name in RESULT_FIELDS if name in fields]
    if taken:
        raise ValueError(f"{where}: has {', '.join(taken)}, which the result would overwrite; rename it")
    steering = [name for name in _TEMPLATE_FIELDS if fields.get(name)]
    if steering:
        raise ValueError(
            f"{where}: has {', '.join(steering)}, which would change the prompt and is not supported; render it "
            "yourself and give the text as prompt, or rename the column"
        )
    name = "prompt" if "prompt" in fields else "messages"
    require_prompt(where, name, fields[name])
    return Case(where, fields)


def _strategy(args: argparse.Namespace) -> Strategy:
    from mtpkern.strategies import Static, Verified, strategy_of

    try:
        strategy = strategy_of(args.strategy)
    except ValueError as error:
        raise ValueError(f"--strategy: {error}") from None
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be a probability from 0 to 1, got {args.threshold}")
    if args.masks is not None and not isinstance(strategy, Verified):
        raise ValueError(f"--strategy {args.strategy} makes no drafts and takes no --masks; use verified")
    given = {name: value for name in ("k", "threshold", "masks") if (value := getattr(args, name)) is not None}
    if isinstance(strategy, Static) and args.threshold is not None:
        raise ValueError("--strategy static keeps every token and takes no --threshold; use confadapt or verified")
    if given.keys() - {"masks"} and ":" in args.strategy:
        raise ValueError(f"--strategy {args.strategy} says k or threshold by itself; leave out --k and --threshold")
    if args.masks is not None and args.strategy.count(":") == 3:
        raise ValueError(f"--strategy {args.strategy} says the masks by itself; leave out --masks")
    return replace(strategy, **given)


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Case],
    prompts: Sequence[list[int]],
    strategy: Strategy,
    args: argparse.Namespace,
    advance: Callable[[int], object],
    first: int,
) -> Iterator[BatchOutput]:
    """The outputs in the order of the rows, each as soon as those before it are there; an error names its row."""
    from mtpkern.batching import iterate_batch

    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "mask_token_id": args.mask_token_id}
    if model.generation_config.eos_token_id is None:
        options["eos_token_id"] = tokenizer.eos_token_id
    # As given, for then what has ended out of turn is little, should the command be stopped.
    options |= {"strategy": strategy, "batch_size": args.batch_size, "order": "given", "first": first}
    if args.temperature:
        options |= {"do_sample": True, "temperature": args.temperature}
        given = {name: getattr(args, name) for name in ("top_k", "top_p", "seed")}
        options |= {name: value for name, value in given.items() if value is not None}
    if args.stop:
        options |= {"stop_strings": args.stop, "tokenizer": tokenizer}
    ended: dict[int, BatchOutput] = {}
    next_row = 0
    with iterate_batch(model, prompts, **options) as outputs:
        for done, output in enumerate(outputs, 1):
            ended[output.index] = output
            while next_row in ended:
                output = ended.pop(next_row)
                if output.error is not None:
                    kind = RuntimeError if isinstance(output.error, RuntimeError) else ValueError
                    raise kind(f"{rows[next_row].where}: {output.error}") from output.error
                yield output
                next_row += 1
            advance(done)


def _write(
    tokenizer: PreTrainedTokenizerBase, row: Case, one: BatchOutput, args: argparse.Namespace, output: TextIO | None
) -> None:
    """One result: JSONL to the file or, for --file, to stdout; as text or blocks to stdout."""
    from rich.console import Console

    from mtpkern import show

    text = str(tokenizer.decode(one.tokens, skip_special_tokens=True))
    rate, finished = one.tokens_per_pass, one.finish_reason in ("stop", "stop_string")
    values = (text, one.tokens, one.blocks, round(rate, 3), finished)
    line = json_line({**row.fields, **dict(zip(RESULT_FIELDS, values, strict=True))})
    if output is not None:
        print(line, file=output)
    if args.html is not None:
        args.page.write(show.answer_page(tokenizer, row.question, one.tokens, one.blocks))
    if args.show:
        console = Console(highlight=False)
        prompt = row.question if args.file is None else f"{row.where}: {row.question}"
        console.print(printable(prompt), style="italic", markup=False)
        parts = show.pieces(tokenizer, one.tokens, one.blocks)
        console.print(show.terminal(parts, colour=show.coloured(console)))
        console.print(f"{show.sizes(one.blocks)}, {rate:.2f} a pass", style="dim")
    elif args.prompt is not None:
        # A program that reads the text gets it as it is; a terminal would obey it.
        print(printable(text) if sys.stdout.isatty() else text)
    elif output is None:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
