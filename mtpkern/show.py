"""Blocks made visible: the text of every pass in a colour of its own, for terminals and for a page.

A pass emits a block of tokens. `pieces` cuts the text into the same blocks; `terminal` colours them (or parts them by
"|" where there is no colour) and `page` writes them as one self-contained HTML file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from mtpkern.output import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Light backgrounds for black text and dark ones for white text, hues far apart for colour-blind eyes too: each pair
# keeps a contrast of at least 7 : 1. Neighbouring blocks also differ in lightness.
LIGHT = ("#a6cee3", "#fdd49e", "#c7e9c0", "#f1b6da", "#dfdfdf", "#fff2a8")
DARK = ("#0b4a75", "#6b3d00", "#14532d", "#701a55", "#444444", "#574b00")


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], blocks: Sequence[int]) -> list[str]:
    """The text of each block, so that the pieces put together are the text of all tokens.

    Special tokens have no text; a character whose bytes are spread over several blocks belongs to the one that
    completes it. Raises ValueError where the blocks do not sum to the number of tokens.

        pieces(tokenizer, [5, 6, 7], [1, 2])   # ["She", " has 12"]
    """
    if sum(blocks) != len(tokens):
        raise ValueError(f"blocks must sum to the number of tokens: expected {len(tokens)}, got {sum(blocks)}")
    out: list[str] = []
    shown, end = "", 0
    for i, size in enumerate(blocks):
        end += size
        text = str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))
        if i < len(blocks) - 1:
            text = text.rstrip("\ufffd")
        # Prefixes are decoded, not blocks: what a tokenizer does to the first token of a text happens once.
        out.append(text[len(shown) :])
        shown = shown + out[-1]
    return out


def terminal(parts: Sequence[str], *, colour: bool) -> Text:
    """The blocks as text for rich: one background a block, or "|" between them where `colour` is off.

    Control characters are shown as escapes: what a model writes does not steer the terminal.

        rich.print(terminal(["She", " has 12"], colour=True))
    """
    parts = [printable(part) for part in parts]
    if not colour:
        return Text("|".join(parts))
    return Text.assemble(*((part, f"black on {LIGHT[i % len(LIGHT)]}") for i, part in enumerate(parts)))


def coloured(console: Console) -> bool:
    """Whether the console shows colours: it is a terminal that can, and NO_COLOR is not set."""
    return console.color_system is not None and not console.no_color


def sizes(blocks: Sequence[int]) -> str:
    """The sizes in one line: `sizes([4, 8, 3])` is "4 8 3 = 15 tokens in 3 passes"."""
    passes = "pass" if len(blocks) == 1 else "passes"
    return f"{' '.join(map(str, blocks))} = {sum(blocks)} tokens in {len(blocks)} {passes}"


def html(parts: Sequence[str], blocks: Sequence[int]) -> str:
    """The blocks as an HTML paragraph; text is escaped, and a block of several tokens carries its size.

    html(["She", " has 12"], [1, 2])
    """
    spans = []
    for i, (part, size) in enumerate(zip(parts, blocks, strict=True)):
        label = f"pass {i + 1}: {size} token{'s' if size > 1 else ''}"
        mark = f"<sub>{size}</sub>" if size > 1 else ""
        spans.append(f'<span class="b{i % len(LIGHT)}" title="{label}">{escape(part)}{mark}</span>')
    return f'<p class="blocks">{"".join(spans)}</p>'


def answer_page(tokenizer: PreTrainedTokenizerBase, question: str, tokens: Sequence[int], blocks: Sequence[int]) -> str:
    """A whole page of one answer: the question, the coloured blocks, their sizes.

    answer_page(tokenizer, "How many eggs?", [5, 6, 7], [1, 2])
    """
    asked, answer = f'<p class="question">{escape(question)}</p>', html(pieces(tokenizer, tokens, blocks), blocks)
    size = f"<p>{escape(sizes(blocks))}, {len(tokens) / len(blocks):.2f} a pass</p>"
    return page("Several tokens per pass", "\n".join([asked, answer, size]))


def page(title: str, body: str) -> str:
    """A whole page around `body` (HTML): no scripts, no fonts, nothing fetched; light or dark as the system.

    Path("blocks.html").write_text(page("Blocks", html(parts, blocks)), encoding="utf-8")
    """
    light = " ".join(f".b{i} {{ background: {c}; color: #000 }}" for i, c in enumerate(LIGHT))
    dark = " ".join(f".b{i} {{ background: {c}; color: #fff }}" for i, c in enumerate(DARK))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
body {{ font: 1rem/1.6 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: #fff; color: #111 }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem }}
.blocks {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2 }}
.blocks span {{ padding: .15em 0; border-right: 2px solid transparent; border-radius: .2em }}
.blocks sub {{ font-size: .65em; padding: 0 .2em }}
.question {{ white-space: pre-wrap; border-left: .25rem solid #888; padding-left: 1rem }}
.wide {{ overflow-x: auto }}
h1, h2 {{ line-height: 1.3; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8888 }}
th:first-child, td:first-child {{ text-align: left }}
caption {{ text-align: left }}
@media (max-width: 40rem) {{
th, td {{ padding: .2rem .3rem }}
table {{ font-size: .8rem }}
h1 {{ font-size: 1.5rem }}
}}
{light}
@media (prefers-color-scheme: dark) {{
body {{ background: #111; color: #eee }}
{dark}
}}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, or a line at each quarter where that is no terminal; yields `done -> None`.

    with progress("100 problems", 100) as done:
        done(50)
    """
    console = Console(stderr=True)
    if console.is_terminal:
        # Text for stdout goes there, and not through the bar to stderr.
        with Progress(console=console, transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    quarter = 0

    def line(done: int) -> None:
        nonlocal quarter
        if done * 4 // total > quarter:
            quarter = done * 4 // total
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)

    print(f"{label} ...", file=sys.stderr, flush=True)
    yield line
