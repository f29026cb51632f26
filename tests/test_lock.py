"""One run at a time in a folder; a killed one leaves no lock behind."""

import errno
import inspect
import os
import signal
import time

import pytest
import transformers

from mtpkern.train import lock
from mtpkern.train.lock import alone_in

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="needs fcntl")


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    read, write = os.pipe()
    if not (first := os.fork()):
        with alone_in(tmp_path / "out"):
            # As the workers of a data loader, which outlive a killed run for a while.
            worker = os.fork()
            if worker:
                os.write(write, b"%d" % worker)
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    try:
        with (
            pytest.raises(
                ValueError, match=rf"another run writes there \(process {first} on .*take another output_dir"
            ),
            alone_in(tmp_path / "out"),
        ):
            pass
        with alone_in(tmp_path / "other"):
            pass
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        with alone_in(tmp_path / "out"), alone_in(tmp_path / "out"):
            assert str(os.getpid()) in (tmp_path / "out" / lock.LOCK).read_text()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_push_leaves_the_lock_out(tmp_path):
    """It would read the file, which lets go of a lock, and publish the name of the machine."""
    from huggingface_hub.utils import filter_repo_objects

    pushed = inspect.getsource(transformers.Trainer.push_to_hub)
    assert 'ignore_patterns=["_*"' in pushed
    assert list(filter_repo_objects(["run.json", lock.LOCK], ignore_patterns=["_*"])) == ["run.json"]


def test_a_nested_holder_does_not_let_go(tmp_path):
    with alone_in(tmp_path):
        with alone_in(tmp_path / "." / "."):
            pass
        if not (child := os.fork()):
            try:
                with alone_in(tmp_path.parent / tmp_path.name):
                    os._exit(0)
            except ValueError:
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with alone_in(tmp_path):
        pass
    assert "knows no locks" in caplog.text
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="cannot be written: Not a directory; give another"),
        alone_in(tmp_path / "file" / "out"),
    ):
        pass
