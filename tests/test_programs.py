"""Commands as programs: devices, versions, readers that leave, interrupts."""

import shlex
import subprocess
import sys

import pytest

import mtpkern
import mtpkern.batching
from mtpkern.cli import main
from support.slow import slow_but


def test_an_interrupt_leaves_no_draft(chat_solver, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        assert len(list(tmp_path.iterdir())) == 1  # the draft is there
        raise KeyboardInterrupt

    monkeypatch.setattr("mtpkern.refill.enter", interrupt)
    command = ["generate", str(chat_solver), "--prompt", "Ba has 3 eggs.", "--output", str(tmp_path / "out.jsonl")]
    assert main(command) == 130
    assert list(tmp_path.iterdir()) == []


def test_devices_that_are_not_here(chat_solver, capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for device in ("cuda", "cuda:3", "mps", "meta"):
        assert main(["generate", str(chat_solver), "--prompt", "x", "--device", device]) == 2
        assert f"--device {device}: torch finds no such device here; this machine has cpu" in capsys.readouterr().err
    assert main(["generate", str(chat_solver), "--prompt", "x", "--device", "gpu"]) == 2
    assert "--device gpu: there is no such kind of device" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"mtpkern {mtpkern.__version__}\n"


def test_a_reader_that_leaves():
    """As `| head` does: no traceback, no message, and not the status of success."""
    code = "import sys, mtpkern.cli as c; c._demo = lambda args: print('x' * 100_000); sys.exit(c.main(['demo']))"
    command = f"set -o pipefail; {shlex.join([sys.executable, '-c', code])} | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("module", slow_but(["arithmetic", "layout"], "arithmetic"))
def test_a_program_whose_reader_leaves(module):
    command = f"set -o pipefail; {sys.executable} -u -m mtpkern.train.{module} | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (141, "")


def test_help_needs_no_model_library():
    code = "import sys, mtpkern.cli; mtpkern.cli._parser(); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
