"""`mtpkern train` in the hands of torchrun and accelerate."""

import contextlib
import dataclasses
import json
import os
import runpy
import sys

import pytest
import torch
from accelerate.commands import launch
from torch.distributed import run as torchrun

from support.processes import OF_FORKS
from support.recipes import GSM8K, TINY
from support.rows import write


def trained(out):
    assert (out / "model.safetensors").is_file()
    assert "mask_token_id" in json.loads((out / "config.json").read_text())["mtpkern"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_launched_by_torchrun(tmp_path, checkpoint, monkeypatch):
    """Two processes by its launcher, with its environment: forks, which need not import everything again."""
    data, out = write(tmp_path / "rows.jsonl", GSM8K), tmp_path / "out"
    options = ["gsm8k", "--model", checkpoint("qwen"), "--train-data", data, "--eval-data", data]
    options += ["--output-dir", str(out), *TINY]
    elastic_launch = torchrun.elastic_launch

    def main(module, *arguments):
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state()
        PartialState._reset_state()
        # Asks for a pool of threads that a fork has not where its parent had one.
        torch.set_num_threads = lambda n: None
        os.environ |= OF_FORKS
        sys.argv = [module, *arguments]
        with (tmp_path / f"said by {os.environ['RANK']}").open("w") as said, contextlib.redirect_stderr(said):
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as end:
                assert end.code == 0  # noqa: PT017

    def in_forks(config, entrypoint):
        def launch(*words):
            assert [entrypoint, *words] == [sys.executable, "-u", "-m", "mtpkern.train", *options]
            return elastic_launch(dataclasses.replace(config, start_method="fork"), main)(*words[2:])

        return launch

    monkeypatch.setattr(torchrun, "elastic_launch", in_forks)
    torchrun.main(["--standalone", "--nproc-per-node", "2", "-m", "mtpkern.train", *options])
    said = [(tmp_path / f"said by {rank}").read_text() for rank in range(2)]
    # Once for training and once for evaluation, and not by everybody.
    assert [text.count(f"{data}: 12 rows read") for text in said] == [2, 0]
    trained(out)


@pytest.mark.slow("launchers::test_launched_by_torchrun")
def test_launched_by_accelerate(tmp_path, checkpoint, capsys, monkeypatch):
    """What its launcher makes of the command line, run in this process: its environment, its module, its arguments."""
    data, out = write(tmp_path / "rows.jsonl", GSM8K), tmp_path / "out"
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "-m", "mtpkern.train", "gsm8k"]
    options += ["--model", checkpoint("qwen"), "--train-data", data, "--eval-data", data, "--output-dir", str(out)]
    args = launch.launch_command_parser().parse_args([*options, *TINY])
    args, *_ = launch._validate_launch_command(args)
    (python, m, module, *arguments), environment = launch.prepare_simple_launcher_cmd_env(args)
    assert (python, m, module) == (sys.executable, "-m", "mtpkern.train")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().err.count(f"{data}: 12 rows read") == 2
    trained(out)
