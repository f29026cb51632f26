"""Files that appear whole wherever they are to appear, and text that steers no terminal."""

import json
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import unicodedata

import pytest

from mtpkern.output import exit_status, json_line, printable, whole_file

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes of POSIX")


def write(path, text="new\n"):
    with whole_file(path) as out:
        out.write(text)


def test_a_file_appears_whole_with_the_mode_of_a_new_file(tmp_path):
    path, other = tmp_path / "out.jsonl", tmp_path / "other"
    with whole_file(path) as out:
        out.write("new\n")
        out.flush()
        assert not path.exists()
    other.write_text("")
    assert path.read_text() == "new\n"
    assert path.stat().st_mode == other.stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out.jsonl"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_end_half_way_leaves_what_was_there_and_no_draft(tmp_path, error):
    path = tmp_path / "out.jsonl"
    path.write_text("before")

    def fail():
        with whole_file(path) as out:
            out.write("half")
            out.flush()
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@posix
def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, chain = tmp_path / "there" / "real", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("there/real")
    chain.symlink_to("link")
    write(link, "first\n")  # it points to nothing yet
    assert target.read_text() == "first\n"
    write(chain)
    assert target.read_text() == "new\n"
    assert link.is_symlink()
    assert chain.is_symlink()
    assert [p.name for p in target.parent.iterdir()] == ["real"]


@posix
def test_links_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "far").symlink_to("no/folder/file")
    for name in ("loop", "far"):
        with pytest.raises(OSError, match=name):
            write(tmp_path / name)


@posix
def test_a_file_keeps_its_mode_and_its_other_names(tmp_path):
    secret, name = tmp_path / "secret", tmp_path / "name"
    secret.write_text("before")
    secret.chmod(0o600)
    write(secret)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    name.hardlink_to(secret)
    write(name, "both\n")
    assert secret.read_text() == "both\n"
    assert secret.samefile(name)


@posix
def test_a_pipe_is_written_directly(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe)
    reader.join(timeout=10)
    assert read == ["new\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@posix
def test_a_device_is_written_directly(tmp_path):
    master, slave = os.openpty()
    device = os.ttyname(slave)
    link = tmp_path / "link"
    link.symlink_to(device)
    write(link)
    assert select.select([master], [], [], 10)[0], "nothing has come"
    assert os.read(master, 100).split() == [b"new"]
    assert os.ttyname(slave) == device
    assert stat.S_ISCHR(os.stat(device).st_mode)
    os.close(master)
    os.close(slave)


@posix
@pytest.mark.skipif(not os.path.exists("/dev/fd/1"), reason="no such names here")
@pytest.mark.parametrize(
    ("name", "into"), [("/dev/stdout", "file"), ("/dev/stdout", "pipe"), ("/dev/fd/1", "file"), ("redirected", "file")]
)
def test_stdout_by_name_goes_on_where_stdout_is(tmp_path, name, into):
    """Behind what was printed before, also where stdout is a file, which is neither replaced nor cut."""
    out = tmp_path / "redirected"
    code = (
        "import sys, pathlib; from mtpkern.output import whole_file\n"
        "print('head', flush=True)\n"
        "with whole_file(pathlib.Path(sys.argv[1])) as out: out.write('body\\n')\n"
        "print('tail')"
    )
    with out.open("w") as file:
        stdout = file if into == "file" else subprocess.PIPE
        command = [sys.executable, "-c", code, str(out) if name == "redirected" else name]
        done = subprocess.run(command, stdout=stdout, text=True, check=True)
    assert (out.read_text() if into == "file" else done.stdout) == "head\nbody\ntail\n"


def refuse(path, message):
    with pytest.raises(OSError, match=message), whole_file(path):
        pytest.fail("it must be refused before anything is done")


def test_what_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    refuse(tmp_path, "this is a folder; give another name")
    refuse(tmp_path / "no" / "out", "there is no folder")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file" / "out", "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        refuse(tmp_path / "file", "may not be written")

    def full(**kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    refuse(tmp_path / "new", "new: nothing can be written in .*No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@posix
def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its name may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        refuse(tmp_path / "socket", "neither a file nor a pipe")


@posix
def test_no_draft_follows_a_link_that_was_laid_out_for_it(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "out.jsonl"
    victim.write_text("precious")
    for name in (f".out.jsonl.{os.getpid()}", ".out.jsonl", "out.jsonl.tmp"):
        (tmp_path / name).symlink_to(victim)
    names = set()
    for _ in range(2):
        with whole_file(path):
            names |= {p.name for p in tmp_path.iterdir()}
    assert victim.read_text() == "precious"
    assert len(names) == 4 + 2 + 1  # what was there, two drafts of different names, and the file after the first


def test_a_name_as_long_as_names_may_be(tmp_path):
    write(tmp_path / ("n" * 255))


# Text

SAMPLES = "\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202etxt.exe\u2066\u2028\x7f\x00"


def unsafe(text):
    """What a terminal could obey, by the Unicode database and not by our list."""
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    rest = set(text) - {"\n", "\t"}
    return {
        c for c in rest if unicodedata.category(c) in {"Cc", "Zl", "Zp", "Cs"} or unicodedata.bidirectional(c) in bidi
    }


def test_no_control_character_of_unicode_is_printed():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert unsafe(everything)
    shown = printable(everything)
    assert not unsafe(shown)
    assert shown.encode()  # no half of a pair either
    # All that is text stays: letters of every script, joined emoji, newline and tab.
    text = "tab\tnewline\n€ 語 عربي עברית 👩\u200d🔬 e\u0301 \\x1b"
    assert printable(text) == text


def test_escapes_can_be_read():
    assert printable("a\x1b[31mb\r\n\x9b\u202e") == "a\\x1b[31mb\\r\n\\x9b\\u202e"


def test_json_is_the_same_value_without_control_characters():
    value = {SAMPLES: [SAMPLES, 1.5, None, "€ 語 \t\n \ud800"]}
    line = json_line(value)
    assert not unsafe(line)
    assert "\n" not in line
    assert "€ 語" in line
    assert json.loads(line) == value
    line.encode()


def test_an_interrupt_is_a_line_and_a_status(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert exit_status(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert (exit_status(lambda: None), exit_status(lambda: 3)) == (0, 3)
