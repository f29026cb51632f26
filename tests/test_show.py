"""Blocks as text, in a terminal and on a page."""

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mtpkern import show
from mtpkern.train.arithmetic import build_tokenizer


class Bytes:
    """A tokenizer of UTF-8 bytes: characters can fall between blocks. 256 is special and has no text."""

    def decode(self, ids, skip_special_tokens=False):
        assert skip_special_tokens
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def test_pieces_are_the_text_block_by_block():
    tokenizer = build_tokenizer()
    text = "After losing 12, Marbo has 40 - 12 = 28 red apples.\n#### 28"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    blocks = [1, 4, 2, len(tokens) - 7]
    parts = show.pieces(tokenizer, tokens, blocks)
    assert len(parts) == 4
    assert "".join(parts) == text
    assert parts[0] == "After"


def test_a_character_belongs_to_the_block_that_completes_it():
    tokens = [*"aé€b".encode(), 256]
    parts = show.pieces(Bytes(), tokens, [2, 2, 3, 1])
    assert parts == ["a", "é", "€b", ""]


def test_text_that_stays_incomplete_is_shown_at_the_end():
    assert show.pieces(Bytes(), list("a€".encode())[:3], [1, 2]) == ["a", "\ufffd"]


def test_blocks_must_fit_the_tokens():
    with pytest.raises(ValueError, match="expected 3, got 2"):
        show.pieces(Bytes(), [1, 2, 3], [1, 1])


def render(colour, **options):
    console = Console(file=io.StringIO(), highlight=False, width=80, **options)
    console.print(show.terminal(["She has", " 12", " [b]figs[/b]"], colour=colour))
    return console.file.getvalue()


def test_terminal_without_colour_parts_the_blocks():
    assert render(False) == "She has| 12| [b]figs[/b]\n"


def test_terminal_with_colour_changes_the_background_at_each_block():
    text = render(True, force_terminal=True, color_system="truecolor", no_color=False)
    for colour in show.LIGHT[:3]:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}m" in text
    assert "[b]figs[/b]" in text


@pytest.mark.parametrize("colour", [False, True])
def test_blocks_do_not_steer_the_terminal(colour):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor" if colour else None)
    console.print(show.terminal(["a\x1b[2J\r", "b\x9b\u202e"], colour=colour))
    shown = console.file.getvalue()
    assert "\x1b[2J" not in shown
    assert not set(shown) & set("\r\x9b\u202e")
    assert r"a\x1b[2J\r" in shown


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert not show.coloured(Console(force_terminal=True, color_system="truecolor"))
    monkeypatch.delenv("NO_COLOR")
    assert show.coloured(Console(force_terminal=True, color_system="truecolor"))
    assert not show.coloured(Console(file=io.StringIO()))


def test_sizes():
    assert show.sizes([4, 8, 3]) == "4 8 3 = 15 tokens in 3 passes"
    assert show.sizes([2]) == "2 = 2 tokens in 1 pass"


class Page(HTMLParser):
    """Tags that are open at each point; every tag must be closed in order."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span":
            self.text.append(data)


def test_page_is_whole_escaped_and_fetches_nothing():
    parts = ["<script>alert(1)</script>", ' & "x"', "\nend"]
    source = show.page("A < B", show.html(parts, [1, 7, 2]))
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == []
    assert page.text == parts
    assert "script" not in page.tags
    assert not {name for name, _ in page.attributes} & {"src", "href", "onload"}
    assert "url(" not in source
    assert "<title>A &lt; B</title>" in source
    assert "<sub>7</sub>" in source
    assert "<sub>1</sub>" not in source
    assert 'title="pass 1: 1 token"' in source
    assert "prefers-color-scheme: dark" in source


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("colours", "text"), [(show.LIGHT, "#000000"), (show.DARK, "#ffffff")])
def test_text_on_every_colour_is_readable(colours, text):
    """WCAG 2 contrast, level AAA."""
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(text)))
        assert (high + 0.05) / (low + 0.05) >= 7, colour


def test_progress_without_a_terminal_prints_a_line_at_each_quarter(capsys):
    with show.progress("work", 8) as done:
        for i in range(1, 9):
            done(i)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["work ..."] + [f"work: {i} of 8" for i in (2, 4, 6, 8)]
