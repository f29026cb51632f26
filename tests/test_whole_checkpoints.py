"""No moment of a run leaves less than the last whole checkpoint: kills, full disks, evaluations that fail."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from mtpkern.train import resume
from mtpkern.train import run as run_module
from mtpkern.train.disk import DiskFull
from mtpkern.train.resume import checkpoints, is_complete, mark_complete, newest_checkpoint, renew
from mtpkern.train.trainer import MTPTrainer
from support.resumed import rows, same, trainer


def run_until_killed(path, function, nth):
    """Train in a fork that kills itself at the nth call of a function, between one file and the next."""
    module, name = function
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        return
    try:
        calls, original = 0, getattr(module, name)

        def kill(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, kill)
        trainer(path, max_steps=6, save_steps=2, save_total_limit=1).train()
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    ("function", "nth", "left"),
    [
        ((torch, "save"), 1, None),
        # Four calls a checkpoint: arguments, optimizer, scheduler, random state.
        ((torch, "save"), 5, "checkpoint-2"),
        pytest.param((torch, "save"), 8, "checkpoint-2", marks=pytest.mark.slow),
        ((os, "replace"), 4, "checkpoint-2"),
        pytest.param((run_module, "rotate"), 2, "checkpoint-4", marks=pytest.mark.slow),
        ((shutil, "rmtree"), 1, "checkpoint-4"),
    ],
)
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path, function, nth, left):
    run_until_killed(tmp_path, function, nth)
    assert checkpoints(tmp_path)
    newest = newest_checkpoint(tmp_path)
    assert newest == (left and str(tmp_path / left))
    if function == (os, "replace"):
        rest = trainer(tmp_path, max_steps=6, save_steps=2, save_total_limit=1, seed=5)
        rest.train(resume_from_checkpoint=True)
        whole = trainer(tmp_path / "whole", max_steps=6, save_strategy="no")
        whole.train()
        assert same(whole, rest)
        assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-6"]


def moments_of(run, folder):
    """Before every file that Python opens, renames or removes: step, newest checkpoint, a digest of all its files."""
    moments, looking = [], [False]

    def look(event, arguments):
        if looking[0] or event not in {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}:
            return
        path = str(arguments[0])
        # Names in a folder that is being removed are relative to it.
        if path.startswith("/") and not path.startswith(str(folder)):
            return
        looking[0] = True
        newest = newest_checkpoint(folder)
        files = newest and [(path.name, path.read_bytes()) for path in sorted(Path(newest).iterdir())]
        moments.append((run.state.global_step, newest and int(newest.rpartition("-")[2]), hash(str(files))))
        looking[0] = False

    sys.addaudithook(look)
    try:
        run.train()
    finally:
        looking[0] = True  # a hook stays for good
    return moments


def test_no_moment_of_a_run_leaves_less_than_the_last_save(tmp_path):
    moments = moments_of(trainer(tmp_path, max_steps=6, save_steps=2, save_total_limit=1), tmp_path)
    assert len(moments) > 50
    for step, newest, _ in moments:
        # Nothing is promised of the checkpoint of this very step while it is written.
        assert (newest or 0) >= (step - 1) // 2 * 2
    assert {newest for _, newest, _ in moments} == {None, 2, 4, 6}
    # What counts as whole is whole, and stays as it is.
    for checkpoint in (2, 4, 6):
        assert len({files for _, newest, files in moments if newest == checkpoint}) == 1


def test_a_checkpoint_that_is_written_again_is_never_half_of_each(tmp_path):
    trainer(tmp_path, max_steps=2, save_steps=2).train()
    moments = moments_of(trainer(tmp_path, seed=5, max_steps=2, save_steps=2), tmp_path)
    seen = [files for _, newest, files in moments if newest == 2]
    assert len(set(seen)) == 2
    assert None in [newest for _, newest, _ in moments]
    assert seen == sorted(seen, key=seen.index)  # the old, then the new


def test_what_counts_as_whole(tmp_path):
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345")
    assert not is_complete(folder)
    mark_complete(folder)
    assert newest_checkpoint(tmp_path) == str(folder)
    (folder / "weights").write_bytes(b"1234")
    assert newest_checkpoint(tmp_path) is None
    # Of the same size.
    (folder / "weights").write_bytes(b"12346")
    assert newest_checkpoint(tmp_path) is None
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        run.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_without_a_limit_all_are_kept(tmp_path, limit):
    """-1 is none to transformers, and deleted each one as it was saved."""
    trainer(tmp_path, max_steps=2, save_steps=1, save_total_limit=limit).train()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_digest_covers_every_part_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "_PART", 8)
    (tmp_path / "weights").write_bytes(b"0123456789" * 3)
    mark_complete(tmp_path)
    assert is_complete(tmp_path)
    for i in (0, 7, 8, 29):
        changed = bytearray(b"0123456789" * 3)
        changed[i] += 1
        (tmp_path / "weights").write_bytes(changed)
        assert not is_complete(tmp_path)


def test_a_renewed_file_leaves_the_checkpoint_whole_at_every_moment(tmp_path, monkeypatch):
    """Before and behind each of the three renames: mark, file, mark."""
    (tmp_path / "state").write_text("old")
    (tmp_path / "weights").write_text("w")
    mark_complete(tmp_path)
    replace, seen = os.replace, []

    def look(*args):
        assert is_complete(tmp_path)
        replace(*args)
        seen.append((tmp_path / "state").read_text())
        assert is_complete(tmp_path)

    monkeypatch.setattr(os, "replace", look)
    renew(tmp_path, "state", "new")
    assert seen == ["old", "new", "new"]
    (tmp_path / "state").write_text("old")
    assert not is_complete(tmp_path)


def test_an_evaluation_that_fails_costs_no_training(tmp_path, monkeypatch):
    """Whether the step was to be saved or not; and the run goes on from there to the same weights."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 4,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
    }

    def make(path, seed=0, **change):
        return trainer(path, seed=seed, **options | change)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    whole = make(tmp_path / "whole")
    whole.train()
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [x["step"] for x in state["log_history"] if "eval_loss" in x] == [2, 4]
    for delay, left in ((0, "checkpoint-2"), (3, "checkpoint-4")):
        out = tmp_path / str(delay)
        run = make(out, eval_delay=delay)
        monkeypatch.setattr(run, "evaluation_loop", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run.train()
        assert newest_checkpoint(out) == str(out / left)
    rest = make(tmp_path / "0", seed=5)
    rest.train(resume_from_checkpoint=True)
    assert same(whole, rest)


def test_the_best_is_kept_though_it_is_saved_before_it_is_evaluated(tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 4.0])
    loop = MTPTrainer.evaluation_loop

    def score(self, *args, **kwargs):
        assert is_complete(tmp_path / f"checkpoint-{self.state.global_step}")
        output = loop(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(scores)
        return output

    monkeypatch.setattr(MTPTrainer, "evaluation_loop", score)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4, "save_total_limit": 2}
    run = trainer(tmp_path, load_best_model_at_end=True, lr_scheduler_type="constant", **options)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert all(map(is_complete, checkpoints(tmp_path)))
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_model_checkpoint"]) == (1.0, str(tmp_path / "checkpoint-2"))


def test_evaluation_leaves_the_random_state_alone(tmp_path):
    run = trainer(tmp_path)
    before = torch.get_rng_state()
    run.evaluate(rows(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    run = trainer(tmp_path, max_steps=6, save_steps=2, save_total_limit=1)
    with pytest.raises(DiskFull, match=r"the disk is full; about .* are needed"):
        run.train()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    monkeypatch.setattr("mtpkern.train.disk._free", lambda folder: 1000)
    run = trainer(tmp_path / "new")
    with pytest.raises(DiskFull, match=r"0.00 MiB are free, two checkpoints of"):
        run.train()
    assert run.state.global_step == 0
