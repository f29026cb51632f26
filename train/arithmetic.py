"""Grade-school word problems with worked answers, and the small tokenizer that reads them.

A problem tells how the belongings of one person change in two to four steps. Its worked answer repeats names,
things and deeds from the question (easy spans, several tokens at a time) and computes every intermediate result
(hard tokens), and ends in `#### n`. The question fixes the wording of its answer completely, so greedy decoding
has one right output.

Splits   train, validation and test share neither names nor number tuples:
         names    first syllable i and second syllable j make a name of train, validation or test by (i + j) mod 8
                  (0 test, 1 validation, else train): every syllable occurs in training, no name in two splits
         numbers  the tuple of all numbers in the question goes by its BLAKE2 digest mod 8, in the same way
Levels   shipped  two or three steps of +, - and at most one small x, totals from 2 to 99
         medium   two or three steps of +, -, x, /, two-digit operands, totals to 999
         hard     three or four such steps
Tokens   one per word, digit or mark, two per name; a shipped problem has 75 to 155, of which its answer has 45 to 85

`python -m mtpkern.train.arithmetic` prints a few problems of each split with their token counts; with `--write
FOLDER` it writes them as rows for `mtpkern train` (the configuration `arithmetic`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mtpkern.output import exit_status
from mtpkern.train.arguments import refuse, require_one_of

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer (ending in `#### result`) and the result."""

    question: str
    answer: str
    result: int


@dataclass(frozen=True)
class Level:
    """Step counts to choose from and inclusive ranges; `scaling` admits steps that multiply or divide the total."""

    steps: tuple[int, ...]
    start: tuple[int, int]
    change: tuple[int, int]
    groups: tuple[int, int]
    group_size: tuple[int, int]
    limit: int
    scaling: bool


LEVELS = {
    "shipped": Level((2, 2, 3), (11, 60), (2, 20), (2, 5), (2, 6), 99, scaling=False),
    "medium": Level((2, 3), (10, 99), (10, 99), (2, 12), (2, 20), 999, scaling=True),
    "hard": Level((3, 4), (10, 99), (10, 99), (2, 20), (2, 40), 999, scaling=True),
}


def _words(text: str) -> list[str]:
    return text.split()


FIRST_SYLLABLES = _words("Ba Cor Dan El Fen Gil Har Is Jo Kel Lum Mar Nor Os Pel Ron")
SECOND_SYLLABLES = _words("bo din fa gar hen ka lio mi na pu ris sa tom va wen zel")
OBJECTS = _words(
    "apples pears plums lemons melons cherries oranges figs nuts carrots onions potatoes tomatoes eggs buns cakes pies "
    "cookies rolls muffins candies marbles coins stamps cards stickers books pens pencils crayons brushes balloons "
    "buttons beads ribbons shells stones feathers flowers roses tulips seeds leaves kites balls dolls toys blocks "
    "puzzles robots cups plates spoons bottles candles lamps keys ropes bricks nails hats scarves socks gloves shirts "
    "badges tickets posters maps"
)
ADJECTIVES = _words("red blue green yellow white small large round old new shiny striped")
CONTAINERS = _words("bags boxes baskets jars packs crates trays bundles")
CONNECTORS = ("", "Then ", "Later ", "Next ", "After lunch ", "In the evening ", "On Monday ", "On Friday ")

OPENINGS = (
    "{name} has {n} {thing}.",
    "{name} starts the day with {n} {thing}.",
    "There are {n} {thing} in the room of {name}.",
    "{name} owns {n} {thing}.",
    "At home {name} keeps {n} {thing}.",
    "{name} brings {n} {thing} to school.",
)
# What the question says, what its answer says after it.
CLOSINGS = (
    ("How many {thing} does {name} have now?", "So {name} has {n} {thing} now."),
    ("How many {thing} does {name} have in the end?", "In the end {name} has {n} {thing}."),
    ("How many {thing} are there now?", "There are {n} {thing} now."),
    ("Find the number of {thing} that {name} has at last.", "At last {name} has {n} {thing}."),
    ("What is the final number of {thing}?", "The final number of {thing} is {n}."),
    ("Count the {thing} of {name} now.", "The count of {name} is now {n} {thing}."),
)
GAINS = (
    ("buys {n} more at the market", "buying {n} more"),
    ("gets {n} more from {other}", "getting {n} more from {other}"),
    ("finds {n} more in the garden", "finding {n} more"),
    ("wins {n} more in a game", "winning {n} more"),
    ("collects {n} more with {other}", "collecting {n} more"),
    ("borrows {n} more from {other}", "borrowing {n} more from {other}"),
    ("takes {n} more from a shelf", "taking {n} more"),
    ("earns {n} more by helping {other}", "earning {n} more"),
    ("receives {n} more as a present", "receiving {n} more"),
    ("picks up {n} more on the way", "picking up {n} more"),
    ("orders {n} more in a shop", "ordering {n} more"),
    ("is handed {n} more by {other}", "being handed {n} more"),
)
LOSSES = (
    ("gives {n} to {other}", "giving {n} to {other}"),
    ("loses {n} in the park", "losing {n}"),
    ("sells {n} to {other}", "selling {n} to {other}"),
    ("lends {n} to {other}", "lending {n} to {other}"),
    ("throws {n} away", "throwing {n} away"),
    ("leaves {n} on the bus", "leaving {n} on the bus"),
    ("breaks {n} by accident", "breaking {n}"),
    ("sends {n} to {other} by mail", "sending {n} to {other}"),
    ("drops {n} into the river", "dropping {n}"),
    ("trades {n} for a drink", "trading {n}"),
    ("hides {n} under a tree", "hiding {n}"),
    ("uses up {n} at work", "using up {n}"),
)
GROUPS = (
    ("buys {g} {box} with {n} {noun} each", "buying"),
    ("gets {g} {box} with {n} {noun} each", "getting"),
    ("finds {g} {box} with {n} {noun} each", "finding"),
    ("wins {g} {box} with {n} {noun} each", "winning"),
)
TIMES = (
    ("gets so many that there are {n} times as many", "getting {n} times as many"),
    ("works until there are {n} times as many", "working for {n} times as many"),
)
SHARES = (
    ("splits all into {n} equal parts and keeps one part", "keeping one of {n} equal parts"),
    ("divides all by {n} and takes one part home", "taking one of {n} equal parts"),
)
# Each pair of deeds above has its own frame, chosen by its place in the list.
FRAMES = (
    "After {deed}, {name} has {a} {op} {n} = {total} {thing}.",
    "{name} has {a} {op} {n} = {total} {thing} after {deed}.",
    "That is {a} {op} {n} = {total} {thing} after {deed}.",
)
GROUP_FRAME = "{g} with {n} {noun} each hold {g} × {n} = {total} {noun}."


def _stable(*parts: object) -> int:
    """A 64-bit digest that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _split_of(bucket: int) -> Split:
    return "test" if bucket % 8 == 0 else "validation" if bucket % 8 == 1 else "train"


def names(split: Split) -> list[str]:
    """All names of a split: `"Barbo" in names("train")` and so on; 192 for train, 32 each for the others."""
    pairs = product(enumerate(FIRST_SYLLABLES), enumerate(SECOND_SYLLABLES))
    return [first + second for (i, first), (j, second) in pairs if _split_of(i + j) == split]


def split_of_numbers(numbers: tuple[int, ...]) -> Split:
    """The split that owns a tuple of numbers, listed in the order in which the question gives them."""
    return _split_of(_stable(numbers))


class _Step(NamedTuple):
    kind: str
    numbers: tuple[int, ...]


def _draw_steps(rng: random.Random, level: Level) -> tuple[int, list[_Step]]:
    """A start and steps whose totals stay within 2 and the limit; a group step counts as two (× and then +)."""
    start = total = rng.randint(*level.start)
    steps: list[_Step] = []
    left = rng.choice(level.steps)
    while left:
        kinds = ["gain", "loss"]
        if left >= 2 and all(step.kind != "group" for step in steps):
            kinds.append("group")
        if level.scaling:
            kinds += ["times", "share"]
        kind = rng.choice(kinds)
        n = rng.randint(*(level.change if kind in ("gain", "loss") else level.groups))
        size = rng.randint(*level.group_size) if kind == "group" else 1
        if kind == "share" and total % n:
            continue
        after = {"loss": total - n, "times": total * n, "share": total // n}.get(kind, total + n * size)
        if not 2 <= after <= level.limit:
            # A total may have no legal change left (too small to lose from): start over.
            return _draw_steps(rng, level)
        steps.append(_Step(kind, (n, size) if kind == "group" else (n,)))
        total = after
        left -= 2 if kind == "group" else 1
    return start, steps


_PLAIN = {"gain": (GAINS, "+"), "loss": (LOSSES, "-"), "times": (TIMES, "×"), "share": (SHARES, "÷")}


def _tell(rng: random.Random, split: Split, start: int, steps: list[_Step]) -> Problem:
    name, *others = rng.sample(names(split), 1 + len(steps))
    noun = rng.choice(OBJECTS)
    thing = f"{rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.5 else noun
    common = {"name": name, "noun": noun, "thing": thing}
    question = [rng.choice(OPENINGS).format(n=start, **common)]
    answer = []
    total = start
    for step, other in zip(steps, others):
        connector = rng.choice(CONNECTORS)
        if step.kind == "group":
            (g, n), box = step.numbers, rng.choice(CONTAINERS)
            clause, doing = rng.choice(GROUPS)
            question.append(f"{connector}{name} {clause.format(g=g, box=box, n=n, noun=noun)}.")
            answer.append(GROUP_FRAME.format(g=g, box=box, n=n, total=g * n, **common))
            n, op, deed, frame = g * n, "+", f"{doing} {g * n} more", FRAMES[0]
        else:
            pairs, op = _PLAIN[step.kind]
            (n,), i = step.numbers, rng.randrange(len(pairs))
            clause, deed = (phrase.format(n=n, other=other) for phrase in pairs[i])
            frame = FRAMES[i % len(FRAMES)]
            question.append(f"{connector}{name} {clause}.")
        after = {"+": total + n, "-": total - n, "×": total * n, "÷": total // n}[op]
        answer.append(frame.format(deed=deed, a=total, op=op, n=n, total=after, **common))
        total = after
    ask, tell = rng.choice(CLOSINGS)
    question.append(ask.format(**common))
    answer.append(tell.format(n=total, **common))
    return Problem(" ".join(question), f"{' '.join(answer)}\n#### {total}", total)


def problems(split: Split, n: int | None = None, *, seed: int = 0, difficulty: str = "shipped") -> Iterator[Problem]:
    """Yield `n` problems of a split (endlessly where `n` is None), a pure function of the arguments.

    Problem i depends on (split, seed, difficulty, i) only, so a longer run begins with the shorter one.
    Raises ValueError for an unknown split or difficulty and for a negative `n`.

        next(problems("test")).answer  # "After giving 6 to Osbo, Isna has 40 - 6 = 34 plums. ...\\n#### 34"
    """
    require_one_of("split", split, get_args(Split))
    require_one_of("difficulty", difficulty, LEVELS)
    refuse(n is not None and n < 0, f"n must be None (endless) or at least 0; got {n}")
    return islice(_endless(split, seed, difficulty), n)


def _endless(split: Split, seed: int, difficulty: str) -> Iterator[Problem]:
    for i in count():
        rng = random.Random(_stable(split, seed, difficulty, i))
        while True:
            start, steps = _draw_steps(rng, LEVELS[difficulty])
            if split_of_numbers((start, *(number for step in steps for number in step.numbers))) == split:
                break
        yield _tell(rng, split, start, steps)


def prompt(problem: Problem) -> str:
    """The text that a model is given: `"Question: ... now?\\nAnswer:"`; the answer follows after one space."""
    return f"Question: {problem.question}\nAnswer:"


BOS, EOS, PAD, UNK = "<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"
# Written with Metaspace's mark for a space. A name has no entry of its own: it falls into its two syllables.
_PIECES = r"\n####▁|\nAnswer:|▁Question:|▁[+\-×÷=]▁|▁?[A-Za-z]+|\d|▁|[.,?]"


def _vocabulary() -> list[str]:
    templates = [*OPENINGS, *FRAMES, GROUP_FRAME, *CONNECTORS, *CONTAINERS, *OBJECTS, *ADJECTIVES]
    for pairs in (CLOSINGS, GAINS, LOSSES, GROUPS, TIMES, SHARES):
        templates += [text for pair in pairs for text in pair]
    words = {word for text in templates for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text))}
    return [
        *(PAD, BOS, EOS, UNK),
        *("▁", *"0123456789", *".,?", *(f"▁{op}▁" for op in "+-×÷="), "▁Question:", "\nAnswer:", "\n####▁"),
        *(f"▁{first}" for first in FIRST_SYLLABLES),
        *SECOND_SYLLABLES,
        *(f"▁{word}" for word in sorted(words)),
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of these problems: closed vocabulary, one token per digit, BOS in front, EOS left to `encode`.

    The same in every process, without a network; `save_pretrained` and `AutoTokenizer.from_pretrained` round-trip.
    The mask token of multi-token prediction is not in it.

        build_tokenizer().tokenize("14 + 9 = 23")  # ["▁", "1", "4", "▁+▁", "9", "▁=▁", "2", "3"]
    """
    vocabulary = {token: i for i, token in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(problem: Problem, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """Token ids of BOS, prompt, answer and one EOS, and the number of them that are prompt (BOS included).

    ids, length = encode(problem, tokenizer)
    ids[:length] == tokenizer(prompt(problem)).input_ids
    """
    given = tokenizer(prompt(problem)).input_ids
    answer = tokenizer(problem.answer, add_special_tokens=False).input_ids
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError("tokenizer has no EOS token; use one from build_tokenizer()")
    return [*given, *answer, eos], len(given)


def row(problem: Problem) -> dict[str, str]:
    """The problem as a row for `mtpkern train`, whose ids are those of `encode` with `chat: false, separator: ""`.

    row(problem)  # {"prompt": "Question: ...\\nAnswer:", "completion": " ...\\n#### 21"}
    """
    return {"prompt": prompt(problem), "completion": f" {problem.answer}"}


def write_rows(path: Path, some: Iterable[Problem]) -> None:
    """Write problems as a file of rows: `write_rows(Path("train.jsonl"), problems("train", 64_000, seed=1))`."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(problem), ensure_ascii=False) + "\n" for problem in some)


def main(argv: Sequence[str] = ()) -> None:
    """Print a few problems of each split with their token counts, or write all splits as rows."""
    parser = argparse.ArgumentParser(
        prog="python -m mtpkern.train.arithmetic", description="Print word problems, or write them for mtpkern train."
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write train, validation and test.jsonl there")
    parser.add_argument("--problems", type=int, default=64_000, help="of train.jsonl (%(default)s)")
    parser.add_argument("--held-out", type=int, default=1000, help="of validation.jsonl and test.jsonl (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="0 is what the teacher has learned (%(default)s)")
    parser.add_argument("--difficulty", choices=LEVELS, default="shipped", help="see the module (%(default)s)")
    args = parser.parse_args(argv)
    tokenizer = build_tokenizer()
    for split in get_args(Split):
        found = problems(split, seed=args.seed, difficulty=args.difficulty)
        if args.write is not None:
            args.write.mkdir(parents=True, exist_ok=True)
            path, n = args.write / f"{split}.jsonl", args.problems if split == "train" else args.held_out
            write_rows(path, islice(found, n))
            print(f"{path}: {n:,} problems")
            continue
        for problem in islice(found, 3):
            ids, length = encode(problem, tokenizer)
            print(f"[{split}: {length} + {len(ids) - length} tokens]\n{prompt(problem)} {problem.answer}\n")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
