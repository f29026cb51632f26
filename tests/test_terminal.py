"""What a terminal gets to see: no text of a model steers it."""

import json
import re
import sys

import pytest

from mtpkern.batching import BatchOutput
from mtpkern.cli import main
from mtpkern.train.arithmetic import build_tokenizer
from support.commands import write_jsonl

# What a model or a file could do to the terminal

STEERS = "\x1b[2Ja\r\x9b31m\u202eb\x07"


@pytest.fixture
def steering(chat_solver, monkeypatch):
    """The checkpoint's model writes what would clear the screen and turn text around."""
    tokens = [5, 6]
    monkeypatch.setattr("mtpkern.cli._complete", lambda *args, **kwargs: iter([BatchOutput(0, tokens, [1, 1])]))
    kind = type(build_tokenizer())
    monkeypatch.setattr(kind, "decode", lambda self, ids, **kwargs: STEERS[: len(STEERS) * len(ids) // 2])
    return chat_solver


def steers(text):
    return set(text) & set(STEERS) - set("[2Ja31mb")


@pytest.mark.parametrize("options", ["", "--show", "--output"])
def test_text_of_a_model_does_not_steer_the_terminal(steering, options, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLORTERM", "truecolor")  # rich keeps a style as it first shows it
    command = ["generate", str(steering), "--prompt", "Ba has 3 eggs.", *options.split()]
    assert main([*command, str(output)] if options == "--output" else command) == 0
    out, err = capsys.readouterr()
    out = re.sub("\x1b\\[[0-9;]*m", "", out)  # colours of our own
    assert not steers(out + err)
    assert r"a\r\x9b31m" in out.replace("|", "")
    if output.exists():
        line = output.read_text(encoding="utf-8")
        assert not steers(line)
        assert json.loads(line)["text"] == STEERS


def test_rows_are_printed_without_control_characters(steering, tmp_path, capsys):
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "Ba has 3 eggs.", "id": STEERS}])
    assert main(["generate", str(steering), "--file", str(file)]) == 0
    out = capsys.readouterr().out
    assert not steers(out)
    assert (json.loads(out)["text"], json.loads(out)["id"]) == (STEERS, STEERS)


def test_a_program_that_reads_the_text_gets_it_as_it_is(steering, capsys):
    assert main(["generate", str(steering), "--prompt", "Ba has 3 eggs."]) == 0
    assert capsys.readouterr().out == STEERS + "\n"


def test_errors_quote_without_steering(tmp_path, capsys):
    file = tmp_path / f"in{STEERS}.jsonl"
    for text in (f'{{"prompt": "{STEERS}', json.dumps({STEERS: 1}), json.dumps({"prompt": {"x": STEERS}})):
        file.write_text(text, encoding="utf-8")
        assert main(["generate", "no-model", "--file", str(file)]) == 2
        assert main(["generate", STEERS, "--prompt", "x"]) == 2
        out, err = capsys.readouterr()
        assert err
        assert not steers(out + err)
    with pytest.raises(SystemExit):
        main(["generate", "no-model", "--prompt", "x", f"--{STEERS}"])
    assert not steers(capsys.readouterr().err)
