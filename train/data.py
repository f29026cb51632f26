"""Data: what becomes of rows, which of them are skipped and held out, and the datasets that the trainer reads.

what is wrong                       what happens
no JSON, no object, a missing       an error with the row's number; with bad_rows "skip" a counted skip
field, no string, an empty string,
a wrong role, the mask token, BOS
or EOS inside a text, a field that
the chat template does not read, a
text that no tokenizer takes
longer than the window              long_rows: "skip" (counted), "error", or "cut" (counted); a text that is cut
                                    inside its prompt has no answer left and is a counted skip (response_only)
no format or several match, no      an error
row is left, no such file
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mtpkern.grading import RULES
from mtpkern.rows import BadRow, shown
from mtpkern.strategies import strategy_of
from mtpkern.train.arguments import option, refuse, require_one_of
from mtpkern.train.encoder import NO_ANSWER_LEFT, TOO_LONG, Encoder
from mtpkern.train.formats import FORMATS, Conversation, conversation_of, recognise
from mtpkern.train.sources import READERS, Located, read_rows

logger = logging.getLogger(__name__)

# Rows that are tokenized in one call, which the tokenizer spreads over its threads.
_CHUNK = 512
# Rows that are looked at to recognise the format, so that one broken row in front does not hide it.
_PEEK = 100


class BadData(ValueError):
    """Rows that cannot be trained on, found while reading: a stream may meet them late."""


@dataclass
class DataArguments:
    """Where the data lies and how it is read."""

    train_data: list[str] = option(
        MISSING, "Files (.jsonl, .json, .parquet), folders or hub ids for datasets.load_dataset, one or more."
    )
    train_split: str = option("train", "Split of a hub id.")
    subset: str | None = option(None, "Configuration of a hub id, such as 'main'.")
    eval_data: list[str] | None = option(None, "Held-out data, read like train_data.")
    eval_split: str = option("test", "Split of eval_data where that is a hub id.")
    eval_fraction: float = option(0.0, "Share of the groups of train_data to hold out, by a hash of the group.")
    group_field: str | None = option(None, "Rows equal in this column are held out together; the prompt unless given.")
    max_eval_rows: int = option(1000, "Held-out rows to keep at most.")
    decode_rows: int = option(0, "Held-out rows to decode at every evaluation: accuracy and tokens per pass.")
    decode_tokens: int = option(256, "Tokens to decode at most for each of them.")
    decode_strategies: list[str] = option(
        ["verified"],
        "Ways to decode them, as NAME[:K][:THRESHOLD]: verified, static:1, confadapt:0.9 ... Figures bear their names; "
        "the first's also stand without, and choose the best checkpoint.",
    )
    answer_rule: str = option(
        "auto",
        "What makes a decoded answer right: the same number behind '####' (hashes), the same result behind 'The answer "
        "is' (answer-is), the same last-number, the same text (exact); 'auto' goes by each row.",
    )
    data_format: str = option("auto", f"'auto' (by the columns), {', '.join(FORMATS)}.")
    only: str | None = option(None, "COLUMN=PREFIX: rows whose column begins so.")
    chat: bool = option(True, "Apply the chat template; false joins by separator.")
    separator: str = option("\n\n", "Between prompt and answer without a chat template.")
    bad_rows: str = option("error", "What a faulty row does: 'error' or 'skip' (counted).")
    long_rows: str = option("skip", "What a row beyond max_length does: 'skip' (counted), 'cut' or 'error'.")
    streaming: bool = option(False, "Read while training; needs max_steps.")
    shuffle_buffer: int = option(10_000, "Rows among which a stream is shuffled; 0 for none.")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("data_format", ("auto", *FORMATS)),
            ("bad_rows", ("error", "skip")),
            ("long_rows", ("skip", "cut", "error")),
            ("answer_rule", RULES),
        ):
            require_one_of(name, getattr(self, name), allowed)
        for name, least in (("max_eval_rows", 1), ("decode_rows", 0), ("decode_tokens", 1), ("shuffle_buffer", 0)):
            refuse((n := getattr(self, name)) < least, f"{name} must be at least {least}; got {n}")
        for text in self.decode_strategies:
            try:
                strategy_of(text)
            except ValueError as error:
                raise ValueError(f"decode_strategies: {error}") from None
        ways, share, only = self.decode_strategies, self.eval_fraction, self.only
        refuse(not ways, "decode_strategies is empty; leave it out for verified, or set decode_rows to 0")
        refuse(not 0 <= share < 1, f"eval_fraction must be at least 0 and below 1; got {share}")
        refuse(self.eval_data and share, "eval_data and eval_fraction both name held-out rows; give one of them")
        refuse(only is not None and "=" not in only, f"only must be COLUMN=PREFIX, such as type=GSM; got {only!r}")


@dataclass
class Report:
    """What became of the rows of one source: counts, and where the first skip of each kind stands.

    With `live` the 1st, 10th, 100th ... skip of a kind is logged at once: a stream may never come to its end.
    """

    source: str
    live: bool = False
    data_format: str | None = None
    rows: int = 0
    used: int = 0
    cut: int = 0
    unfinished: int = 0
    not_counted: int = 0
    other_split: int = 0
    filtered: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)

    def take(self, example: dict[str, Any]) -> dict[str, Any]:
        """Count an example that is used; returns it without what was only to be counted."""
        self.used += 1
        self.cut += example.pop("cut", False)
        self.unfinished += example.pop("unfinished", False)
        self.not_counted += example.pop("not_counted", 0)
        for name in example.pop("unread", ()):
            self.unread[name] = self.unread.get(name, 0) + 1
        return example

    def skip(self, kind: str, where: str) -> None:
        """Count a skipped row."""
        count, first = self.skipped.get(kind, (0, where))
        self.skipped[kind] = count + 1, first
        if self.live and re.fullmatch("10*", str(count + 1)):
            logger.warning("%s is skipped: %s (%d so far)", where, kind, count + 1)

    def __str__(self) -> str:
        kinds = {"cut": self.cut, "unfinished, without an EOS": self.unfinished}
        of_them = ", ".join(f"{count:,} of them {kind}" for kind, count in kinds.items() if count)
        parts = [f"{self.used:,} used" + (f" ({of_them})" if of_them else "")]
        for count, what in (
            (self.not_counted, "earlier answers not counted (no EOS ends them, or the template writes them otherwise)"),
            (self.other_split, "in the other split"),
            (self.filtered, "left out by 'only'"),
        ):
            parts += [f"{count:,} {what}"] if count else []
        unread = ", ".join(f"{name} (in {count:,} rows)" for name, count in sorted(self.unread.items()))
        parts += [f"fields of messages that the chat template does not read: {unread}"] if unread else []
        parts += [f"{n:,} skipped, {kind} (first: {where})" for kind, (n, where) in sorted(self.skipped.items())]
        return f"{self.source}: {self.rows:,} rows read; " + ", ".join(parts)


def is_held_out(group: str, fraction: float) -> bool:
    """Whether a group of rows is held out: a pure function of its text, up to case, Unicode form and white space.

    The same in every process, and unmoved by rows that come before, between or after.

        is_held_out("How many  apples?", 0.1) == is_held_out("how many apples?", 0.1)
    """
    normal = " ".join(unicodedata.normalize("NFKC", group).casefold().split())
    digest = hashlib.blake2b(normal.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True)
class Source:
    """A named source of rows and the rules by which they become examples; each iteration starts anew.

    held_out   False: without the rows that the hash holds out; True: only those; None: all
    """

    name: str
    rows: Callable[[], Iterator[Located]]
    encode: Encoder
    arguments: DataArguments
    held_out: bool | None = None

    def examples(self, report: Report, part: tuple[int, int] = (0, 1)) -> Iterator[dict[str, Any]]:
        """Examples as of `Encoder`; `report` fills meanwhile. part (i, n) takes every n-th row from row i on."""
        rows = self.rows()
        first = list(islice(rows, _PEEK))
        data_format = self.arguments.data_format
        if data_format == "auto" and first:
            columns = {key for _, row in first if isinstance(row, Mapping) for key in row}
            if not any(isinstance(row, Mapping) for _, row in first):
                where, row = first[0]
                fault = row if isinstance(row, BadRow) else f"expected an object with fields; got {shown(row)}"
                raise ValueError(f"{where}: {fault}; no format shows in the first {len(first)} rows")
            data_format = recognise(columns, self.name)
        report.data_format = data_format
        rows = islice(chain(first, rows), part[0], None, part[1])
        while chunk := list(islice(rows, _CHUNK)):
            fates = [self._fate(row, data_format) for _, row in chunk]
            encoded = iter(self.encode([fate for fate in fates if isinstance(fate, Conversation)]))
            for (where, _), fate in zip(chunk, fates):
                report.rows += 1
                example = next(encoded) if isinstance(fate, Conversation) else fate
                if isinstance(example, dict):
                    yield report.take(example)
                elif isinstance(example, BadRow):
                    self._fault(example, where, report)
                elif example == "filtered":
                    report.filtered += 1
                else:
                    report.other_split += 1

    def _fate(self, row: Any, data_format: str) -> Conversation | BadRow | str:
        """The conversation of a row that is taken, what is wrong with the row, or why a good one is not taken."""
        args = self.arguments
        try:
            conversation = conversation_of(row, data_format)
            if args.only is not None:
                column, prefix = args.only.split("=", 1)
                if not _column(row, column).startswith(prefix):
                    return "filtered"
            if self.held_out is None:
                return conversation
            messages = conversation.messages
            prompts = [message["content"] for message in messages if message["role"] == "user"]
            group = _column(row, args.group_field) if args.group_field else [*prompts, messages[0]["content"]][0]
            return conversation if is_held_out(group, args.eval_fraction) == self.held_out else "other_split"
        except BadRow as fault:
            return fault

    def _fault(self, fault: BadRow, where: str, report: Report) -> None:
        by_length = fault.kind == NO_ANSWER_LEFT or (fault.kind == TOO_LONG and self.arguments.long_rows == "skip")
        if not by_length and (self.arguments.bad_rows == "error" or fault.kind == TOO_LONG):
            remedy = "set long_rows to skip or cut" if fault.kind == TOO_LONG else "mend the row or set bad_rows: skip"
            raise BadData(f"{where}: {fault}; {remedy}")
        report.skip(fault.kind, where)


def _column(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        got = shown(row[name]) if name in row else f"columns {', '.join(map(str, row))}"
        raise BadRow("missing field", f"expected a string in column {name!r}; got {got}")
    return row[name]


class EncodedTexts(Dataset[dict[str, Any]]):
    """Examples in memory, four bytes a token: `texts[0]` is {"input_ids": list of int, "prompt_length": int}.

    An example that came with "earlier_answers" has them again.
    """

    def __init__(self, examples: Iterable[dict[str, Any]]) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])
        self._prompts = array("i")
        self._earlier = array("i")
        self._earlier_ends = array("q", [0])
        for example in examples:
            self._ids.extend(example["input_ids"])
            self._ends.append(len(self._ids))
            self._prompts.append(example["prompt_length"])
            self._earlier.extend(chain.from_iterable(example.get("earlier_answers", ())))
            self._earlier_ends.append(len(self._earlier))

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer, those of earlier turns among them: `EncodedTexts([]).longest_answer == 0`."""
        last = (end - start - prompt for start, end, prompt in zip(self._ends, self._ends[1:], self._prompts))
        earlier = (end - start for start, end in zip(self._earlier[::2], self._earlier[1::2]))
        return max(chain(last, earlier), default=0)

    @property
    def fingerprint(self) -> str:
        """A digest of all examples in their order: `EncodedTexts([]).fingerprint`."""
        parts = (self._ids, self._ends, self._prompts, self._earlier, self._earlier_ends)
        return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=8).hexdigest()

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]
        ids = self._ids[self._ends[i] : self._ends[i + 1]].tolist()
        earlier = self._earlier[self._earlier_ends[i] : self._earlier_ends[i + 1]].tolist()
        example = {"input_ids": ids, "prompt_length": self._prompts[i]}
        return example | ({"earlier_answers": list(zip(earlier[::2], earlier[1::2]))} if earlier else {})


class StreamedTexts(IterableDataset[dict[str, Any]]):
    """Examples read while training, shuffled in a buffer by (seed, epoch, worker); a loader worker reads its share.

    Raises ValueError, besides what reading raises, where a whole pass brings no example.
    """

    def __init__(self, source: Source, *, buffer: int, seed: int) -> None:
        self.source, self.buffer, self.seed, self.epoch = source, buffer, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer says so before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        part = (info.id, info.num_workers) if info else (0, 1)
        report = Report(self.source.name, live=True)
        examples = self.source.examples(report, part)
        rng = random.Random(f"{self.seed} {self.epoch} {part[0]}")
        waiting = list(islice(examples, self.buffer))
        rng.shuffle(waiting)
        for example in examples:
            if waiting:
                i = rng.randrange(len(waiting))
                example, waiting[i] = waiting[i], example
            yield example
        yield from waiting
        if not report.used and (report.rows or part[0] == 0):
            raise BadData(f"no row is left to train on. {report}")
        logger.info("%s", report)


def _source(
    arguments: DataArguments, encode: Encoder, names: Sequence[str], split: str, held_out: bool | None
) -> Source:
    rows = partial(read_rows, names, split=split, subset=arguments.subset, streaming=arguments.streaming)
    return Source(", ".join(names), rows, encode, arguments, held_out)


def load_held_out(
    arguments: DataArguments, encode: Encoder, limit: int | None = None
) -> tuple[EncodedTexts, Report] | None:
    """At most `limit` held-out examples and their report; None where nothing is held out. Raises as `load_data`."""
    if arguments.eval_data:
        return _load(_source(arguments, encode, arguments.eval_data, arguments.eval_split, None), "evaluate", limit)
    if arguments.eval_fraction:
        return _load(_source(arguments, encode, arguments.train_data, arguments.train_split, True), "evaluate", limit)
    return None


def _load(source: Source, purpose: str, limit: int | None = None) -> tuple[EncodedTexts, Report]:
    report = Report(source.name)
    texts = EncodedTexts(islice(source.examples(report), limit))
    if not len(texts):
        share = f"eval_fraction {source.arguments.eval_fraction}"
        few = f"; {share} may hold out none of few groups: raise it, or give eval_data" if source.held_out else ""
        raise BadData(f"no row is left to {purpose} on. {report}{few}")
    return texts, report


def load_data(
    arguments: DataArguments, encode: Encoder, *, seed: int = 0
) -> tuple[EncodedTexts | StreamedTexts, EncodedTexts | None, list[Report]]:
    """Training and held-out examples (None where none are asked for), and reports of what was read for them.

    Raises ValueError for faulty data as the head of this file says.

        train, held_out, reports = load_data(DataArguments(["problems.jsonl"]), Encoder(tokenizer))
    """
    training = _source(
        arguments, encode, arguments.train_data, arguments.train_split, False if arguments.eval_fraction else None
    )
    train: EncodedTexts | StreamedTexts
    reports = []
    if arguments.streaming:
        train = StreamedTexts(training, buffer=arguments.shuffle_buffer, seed=seed)
    else:
        train, report = _load(training, "train")
        reports.append(report)
    found = load_held_out(arguments, encode, arguments.max_eval_rows)
    return (train, None, reports) if found is None else (train, found[0], [*reports, found[1]])


def require_readable(arguments: DataArguments) -> str:
    """The format of the training data, by the first rows of every source, without a tokenizer. Raises as `load_data`.

    Raises ValueError for sources of several formats too, of which the first one's would be taken for all.

        require_readable(DataArguments(["problems.jsonl"]))  # "question-answer"
    """
    unread = cast(Encoder, lambda batch: [{} for _ in batch])
    held_out = False if arguments.eval_fraction else None
    found: list[str] = []
    for names, split in ((arguments.train_data, arguments.train_split), (arguments.eval_data, arguments.eval_split)):
        if not names:
            continue
        files = all(Path(name).suffix in READERS for name in names)
        report, formats = Report(", ".join(names)), {}
        for part in [[name] for name in names] if files else [names]:
            source = _source(arguments, unread, part, split, held_out)
            first = list(islice(source.rows(), _PEEK))
            for _ in replace(source, rows=partial(iter, first)).examples(report):
                pass
            if first:
                formats[str(report.data_format)] = source.name
        if not report.rows:
            raise BadData(f"no row is left to read. {report}")
        each = ", ".join(f"{name} of {data_format}" for data_format, name in formats.items())
        refuse(len(formats) > 1, f"sources must have one format; got {each}: make them one, or leave one out")
        found += formats
    return found[0]
