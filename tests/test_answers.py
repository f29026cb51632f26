"""Answers to a file of prompts go on where the same options wrote them, and begin anew where that is asked for."""

import functools
import json
import threading

import pytest

from mtpkern import answers
from mtpkern.answers import answers_file

ASKED = [{"prompt": "a"}, {"prompt": "b", "id": 2}]
OPTIONS = {"MODEL": "m", "--max-new-tokens": 8, "--stop": ("x",)}


def write(path, options, rows, **more):
    with answers_file(path, ASKED, options, **more) as (done, file):
        for row in ASKED[done : done + rows]:
            file.write(json.dumps({**row, "text": "t"}) + "\n")
    return done


def test_other_options_are_refused_by_name_and_change_nothing(tmp_path):
    path = tmp_path / "out.jsonl"
    assert write(path, OPTIONS, 1) == 0
    assert write(path, OPTIONS, 1) == 1
    text = path.read_text()
    for done in (2, 1):
        path.write_text("".join(text.splitlines(keepends=True)[:done]))
        with pytest.raises(
            ValueError, match=rf"out.jsonl has {done} answers that other options wrote \(--max-new-tokens 8, now 9\)"
        ):
            write(path, {**OPTIONS, "--max-new-tokens": 9}, 1)
        with pytest.raises(ValueError, match=r"MODEL m, now n; --seed None, now 3.*--overwrite to begin anew"):
            write(path, {**OPTIONS, "MODEL": "n", "--seed": 3}, 1)
        assert len(path.read_text().splitlines()) == done
    assert write(path, {**OPTIONS, "--seed": 3}, 2, overwrite=True) == 0
    assert path.read_text() == text
    assert write(path, {**OPTIONS, "--seed": 3}, 0) == 2


@pytest.mark.skipif(answers.fcntl is None, reason="needs fcntl")
@pytest.mark.parametrize("more", [{}, {"overwrite": True}], ids=str)
def test_two_runs_do_not_write_one_file(more, tmp_path):
    path = tmp_path / "out.jsonl"
    for done in (0, 1):
        with answers_file(path, ASKED, OPTIONS) as (there, file):
            assert there == done
            with pytest.raises(ValueError, match=r"out.jsonl: another run writes its answers there"):
                write(path, OPTIONS, 2, **more)
            file.write(json.dumps({**ASKED[done], "text": "t"}) + "\n")
        assert len(path.read_text().splitlines()) == done + 1


def at_once(*runs):
    """What has become of calls that begin at the same moment: None, or the error."""
    ready, found = threading.Barrier(len(runs)), []

    def run(call):
        ready.wait()
        try:
            found.append(call())
        except Exception as error:
            found.append(str(error))

    threads = [threading.Thread(target=run, args=(call,)) for call in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.skipif(answers.fcntl is None, reason="needs fcntl")
@pytest.mark.parametrize("rows", [0, 2], ids=["none", "all"])
def test_of_two_runs_that_begin_at_once_one_has_the_file(tmp_path, rows):
    """Where it was not there before, and where the other takes it away at its end, having written nothing."""
    for trial in range(60):
        path = tmp_path / f"{trial}.jsonl"
        both = threading.Event()

        def run(name, path=path, both=both):
            with answers_file(path, ASKED, {**OPTIONS, "MODEL": name}) as (done, file):
                assert done == 0
                both.wait(0.02 if rows else 0)
                for row in ASKED[:rows]:
                    file.write(json.dumps({**row, "text": name}) + "\n")
            return name

        said = at_once(*(functools.partial(run, name) for name in "mn"))
        had = [x for x in said if x in ("m", "n")]
        refused = [x for x in said if x not in had]
        assert all("another run writes its answers there" in x for x in refused)
        if rows:
            assert len(had) == 1
            assert {json.loads(line)["text"] for line in path.read_text().splitlines()} == {*had}
            assert json.loads((tmp_path / f"{path.name}.options").read_text())["MODEL"] == had[0]
        else:
            assert had
            assert not path.exists()


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path):
    loop = tmp_path / "loop"
    for path, error, says in (
        (tmp_path / "none" / "out.jsonl", FileNotFoundError, f"there is no folder {tmp_path / 'none'}; make it first"),
        (tmp_path / "file" / "out.jsonl", NotADirectoryError, "nothing can be written in"),
        (loop, OSError, "loop: nothing can be written in"),
    ):
        (tmp_path / "file").touch()
        loop.is_symlink() or loop.symlink_to(loop)
        with pytest.raises(error, match=says):
            write(path, OPTIONS, 1)


def test_where_files_are_not_told_apart_a_run_goes_on(tmp_path, monkeypatch):
    """As on file systems whose numbers of an open file and of its name differ."""
    monkeypatch.setattr(answers.os.path, "samestat", lambda *two: False)
    write(tmp_path / "out.jsonl", OPTIONS, 2)
    with answers_file(tmp_path / "out.jsonl", ASKED, OPTIONS) as (done, _):
        assert done == 2


def test_a_link_stays_where_a_run_has_no_answers(tmp_path):
    (link := tmp_path / "out.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    write(link, OPTIONS, 0)
    assert [*tmp_path.iterdir()] == [link]
    write(link, OPTIONS, 2)
    assert len((tmp_path / "elsewhere.jsonl").read_text().splitlines()) == 2


def test_nothing_is_left_of_a_run_without_answers(tmp_path):
    write(tmp_path / "out.jsonl", OPTIONS, 0)
    assert list(tmp_path.iterdir()) == []


def test_answers_of_which_nobody_knows_go_on(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps({**ASKED[0], "text": "t"}) + "\n")
    assert write(path, OPTIONS, 1) == 1
