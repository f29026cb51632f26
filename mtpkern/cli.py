"""The command line: `mtpkern demo` and `mtpkern generate`; `mtpkern train` and `mtpkern convert` are handed on.

Heavy imports happen inside the commands, so that `mtpkern --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from mtpkern.output import json_line, printable, whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mtpkern.compare import Completion
    from mtpkern.strategies import Strategy

# Commands of the house next door, which this one does not import: a name is looked up when it is called for.
_HANDED_ON = {
    "train": ("mtpkern.train.command", "train a checkpoint for multi-token prediction"),
    "convert": ("mtpkern.train.convert", "make a plain checkpoint of one that the paper's authors published"),
}
RESULT_FIELDS = ("text", "tokens", "blocks", "tokens_per_pass")
# Other columns are handed through, but these are known to change what a chat template writes.
_TEMPLATE_FIELDS = ("tools", "documents", "system", "chat_template_kwargs")


@dataclass(frozen=True)
class Row:
    """One prompt: where it came from, its fields, and either its text or its chat messages."""

    where: str
    fields: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat; a plain prompt is what the user says."""
        return self.fields.get("messages") or [{"role": "user", "content": self.fields["prompt"]}]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 with a message on stderr where the user can help.

    main(["demo", "--problems", "16"])
    """
    words = list(sys.argv[1:] if argv is None else argv)
    handed_on = words[0] if words and words[0] in _HANDED_ON else None
    # Such a command has a parser of its own.
    args = _parser().parse_args(words) if handed_on is None else argparse.Namespace(command=handed_on)
    try:
        if handed_on is None:
            args.run(args)
        else:
            importlib.import_module(_HANDED_ON[handed_on][0]).main(words[1:])
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"mtpkern {args.command}: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))  # it quotes what was typed, or what a pattern of the shell has found


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtpkern", description="Several tokens per forward pass.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the shipped checkpoint solves held-out problems, with wall-clock ratios")
    demo.add_argument("--problems", type=_positive, default=64, metavar="N", help="problems in the table (default 64)")
    demo.add_argument("--html", type=Path, metavar="FILE", help="write the coloured blocks as a page")
    demo.add_argument("--checkpoint", type=Path, metavar="DIR", help="a folder like the shipped one")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate",
        help="decode prompts with any checkpoint",
        description="Greedy decoding. --prompt prints the text, with control characters as escapes on a terminal and "
        "as it is anywhere else; --file prints one JSON object a row.",
    )
    generate.add_argument("model", metavar="MODEL", help="a checkpoint's path or hub id")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the prompt itself")
    source.add_argument("--file", type=Path, help='JSONL: {"prompt": "..."} or {"messages": [...]} in each row')
    generate.add_argument("--strategy", choices=("verified", "confadapt", "static"), default="verified")
    generate.add_argument("--k", type=_positive, help="tokens predicted in one pass")
    generate.add_argument("--threshold", type=float, help="confidence above which a token counts as sure, 0 to 1")
    generate.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="(default 256)")
    generate.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="(default 8)")
    generate.add_argument("--mask-token-id", type=int, metavar="ID", help="where the checkpoint does not record it")
    generate.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    generate.add_argument("--device", help="such as cpu or cuda:0 (default: the accelerator, if there is one)")
    generate.add_argument("--chat", action="store_true", help="apply the chat template to plain prompts too")
    generate.add_argument("--show", action="store_true", help="print the text as blocks, one colour a pass")
    generate.add_argument(
        "--output", type=Path, metavar="FILE", help="write JSONL there: a file whole or not at all, a pipe line by line"
    )
    generate.set_defaults(run=_generate)

    for name, (_, text) in _HANDED_ON.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _demo(args: argparse.Namespace) -> None:
    _quiet()
    from mtpkern.demo import ASSETS, demo

    demo(args.problems, html=args.html, folder=args.checkpoint or ASSETS)


def _generate(args: argparse.Namespace) -> None:
    # What can be checked without the model is checked before it is loaded.
    rows = [_row("--prompt", {"prompt": args.prompt})] if args.file is None else read_rows(args.file)
    _quiet()
    strategy = _strategy(args)
    with whole_file(args.output) as output:
        model, tokenizer = _load(args)
        prompts = [_encode(tokenizer, row, chat=args.chat) for row in rows]
        for i in range(0, len(rows), args.batch_size):
            batch = slice(i, i + args.batch_size)
            completions = _complete(model, tokenizer, rows[batch], prompts[batch], strategy, args)
            for row, completion in zip(rows[batch], completions, strict=True):
                _write(tokenizer, row, completion, args, output)
            if output is not None:
                output.flush()  # who reads a pipe waits for it


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file, checked; blank lines are skipped, but counted.

    Raises ValueError with the row's number for what is not an object with either a prompt or messages, or what
    already has a field that the result would bring.

        read_rows(Path("prompts.jsonl"))[0].fields["prompt"]
    """
    from mtpkern.rows import BadRow, read_lines

    rows = []
    for number, fields in read_lines(path):
        where = f"{path}, row {number}"
        if isinstance(fields, BadRow):
            raise ValueError(f"{where}: {fields}")
        rows.append(_row(where, fields))
    if not rows:
        raise ValueError(f'{path}: expected at least one row such as {{"prompt": "..."}}; got none')
    return rows


def _row(where: str, fields: Any) -> Row:
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
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str) or not fields["prompt"]:
            raise ValueError(f"{where}: prompt must be a string with text in it; got {fields['prompt']!r}")
    else:
        messages = fields["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good or not messages:
            raise ValueError(f'{where}: messages must be a list of {{"role": str, "content": str}}; got {messages!r}')
    return Row(where, fields)


def _strategy(args: argparse.Namespace) -> Strategy | None:
    """The strategy of the options; None (the library's default) where nothing is asked for."""
    from mtpkern.strategies import ConfAdapt, Static, Verified

    given = {name: value for name in ("k", "threshold") if (value := getattr(args, name)) is not None}
    if args.strategy == "static":
        if args.threshold is not None:
            raise ValueError("--strategy static keeps every token and takes no --threshold; use confadapt or verified")
        return Static(**given)
    if args.strategy == "confadapt":
        return ConfAdapt(**given)
    return Verified(**given) if given else None


def _load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(args.device or accelerator or "cpu")
    # Code that comes with a checkpoint is not run, and nobody is asked whether it may.
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{args.model} needs code of its own, which this command does not run; if you trust it, load the model in "
            "Python and call mtpkern.generate"
        ) from error
    return model.to(device).eval(), tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, row: Row, *, chat: bool) -> list[int]:
    """The token ids of a row's prompt; its special tokens come from the chat template, where one is applied."""
    from mtpkern.rows import own_bos

    try:
        if not chat and "messages" not in row.fields:
            ids = tokenizer(own_bos(tokenizer, row.fields["prompt"])).input_ids
        elif tokenizer.chat_template is None:
            raise ValueError("needs a chat template and the tokenizer has none; give plain prompts")
        else:
            text = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(str(text), add_special_tokens=False).input_ids
    except Exception as error:  # a template and a tokenizer raise what they like
        raise ValueError(f"{row.where}: {error}") from error
    if not ids:
        raise ValueError(f"{row.where}: the prompt has no tokens; give one with text in it")
    return ids


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
    strategy: Strategy | None,
    args: argparse.Namespace,
) -> list[Completion]:
    from mtpkern.compare import ours, pad

    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "mask_token_id": args.mask_token_id}
    if model.generation_config.eos_token_id is None:
        options["eos_token_id"] = tokenizer.eos_token_id
    try:
        return ours(model, pad(prompts, model.device), strategy=strategy, **options)
    except ValueError as error:
        span = rows[0].where if len(rows) == 1 else f"{rows[0].where} to {rows[-1].where}"
        raise ValueError(f"{span}: {error}") from error


def _write(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    completion: Completion,
    args: argparse.Namespace,
    output: TextIO | None,
) -> None:
    """One result: JSONL to the file or, for --file, to stdout; as text or blocks to stdout."""
    text = str(tokenizer.decode(completion.tokens, skip_special_tokens=True))
    rate = len(completion.tokens) / len(completion.blocks)
    values = (text, completion.tokens, completion.blocks, round(rate, 3))
    line = json_line(row.fields | dict(zip(RESULT_FIELDS, values, strict=True)))
    if output is not None:
        print(line, file=output)
    if args.show:
        from rich.console import Console

        from mtpkern import show

        console = Console(highlight=False)
        parts = show.pieces(tokenizer, completion.tokens, completion.blocks)
        console.print(show.terminal(parts, colour=show.coloured(console)))
        console.print(f"{show.sizes(completion.blocks)}, {rate:.2f} a pass", style="dim")
    elif args.prompt is not None:
        # A program that reads the text gets it as it is; a terminal would obey it.
        print(printable(text) if sys.stdout.isatty() else text)
    elif output is None:
        print(line)


def _quiet() -> None:
    """No progress bars of others between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
