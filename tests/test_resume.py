"""A resumed run equals the uninterrupted one exactly, and a kill at any moment loses no complete checkpoint."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from mtpkern.train import resume
from mtpkern.train import run as run_module
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.disk import DiskFull
from mtpkern.train.record import RECORD
from mtpkern.train.resume import Endless, checkpoints, is_complete, mark_complete, newest_checkpoint, renew
from mtpkern.train.trainer import MTPTrainer

V, MASK, EOS = 31, 30, 7


def llama(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, eos_token_id=EOS, bos_token_id=1, pad_token_id=0, **shape))


def rows(n=18):
    return [
        {"input_ids": [1, *(8 + (i + j) % 20 for j in range(8 + i % 4)), EOS], "prompt_length": 3} for i in range(n)
    ]


class Stream(IterableDataset):
    """Of unknown length, and in another order every epoch; two workers take every second row each."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        order = torch.randperm(18, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        data = rows()
        yield from (data[i] for i in (order if worker is None else order[worker.id :: worker.num_workers]))


def trainer(path, dataset=None, seed=0, **change):
    arguments = {
        "max_steps": 9,
        "save_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "k_min": 2,
        "k_max": 3,
        "num_spans": 2,
    }
    return MTPTrainer(
        model=llama(seed),
        teacher=llama(3),
        args=MTPConfig(str(path), **arguments | change),
        mask_token_id=MASK,
        train_dataset=dataset or rows(),
        eval_dataset=rows(4),
        data_collator=MTPCollator(0),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


@pytest.mark.parametrize("kind", ["lists", "by length", "workers", "stream and workers"])
def test_resumed_run_equals_the_uninterrupted(tmp_path, kind):
    """Six steps of four rows from eighteen: the first epoch ends at step 5, in half a step; resumed from 2 or 5."""
    options = {"dataloader_num_workers": 2 if "workers" in kind else 0, "save_steps": 2, "max_steps": 6}
    if kind == "by length":
        options |= {"train_sampling_strategy": "group_by_length", "save_steps": 5}
    data = Stream if "stream" in kind else rows
    whole = trainer(tmp_path, data(), **options)
    whole.train()
    # Another global random state and other first weights, as in another process.
    rest = trainer(tmp_path, data(), seed=9, **options)
    torch.manual_seed(1234)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{5 if kind == 'by length' else 2}"))
    assert rest.state.global_step == 6
    assert same(whole, rest)
    assert [x["loss"] for x in whole.state.log_history if "loss" in x] == [
        x["loss"] for x in rest.state.log_history if "loss" in x
    ]


def test_endless_stream_goes_on_with_the_next_epoch():
    first, second = (list(s) for s in (Stream(), Stream()))
    assert first == second
    stream = iter(Endless(Stream()))
    assert [next(stream) for _ in range(18)] == first
    again = [next(stream) for _ in range(18)]
    assert again != first
    assert sorted(map(str, again)) == sorted(map(str, first))
    assert list(Endless([])) == []


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
        ((torch, "save"), 8, "checkpoint-2"),
        ((os, "replace"), 4, "checkpoint-2"),
        ((run_module, "rotate"), 2, "checkpoint-4"),
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


def files_of(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


class Rates(TrainerCallback):
    """The learning rates that the optimizer has had, which a log may tell otherwise."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize(
    ("change", "stop"),
    [
        ({"max_steps": 2, "save_steps": 2, "lr_scheduler_type": "constant"}, None),
        ({"max_steps": 3, "lr_scheduler_type": "linear"}, None),
        ({"max_steps": -1, "num_train_epochs": 1, "save_steps": 5, "lr_scheduler_type": "constant"}, None),
        # Stopped by a callback before it had all its steps.
        ({"max_steps": 9, "save_steps": 2, "lr_scheduler_type": "constant"}, 2),
    ],
    ids=["constant", "linear", "epochs", "stopped"],
)
def test_a_run_that_has_ended_trains_and_writes_nothing(tmp_path, monkeypatch, change, stop):
    whole = trainer(tmp_path, **change)
    if stop:
        whole.add_callback(StopAt(stop))
    whole.train()
    before = files_of(tmp_path)
    again = trainer(tmp_path, seed=5, report_to="tensorboard", **change)
    monkeypatch.setattr(Trainer, "training_step", lambda *args: pytest.fail("a step"))
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == again.state.global_step == whole.state.global_step
    assert same(whole, again)
    assert {**files_of(tmp_path), ".lock": None} == {**before, ".lock": None}
    monkeypatch.undo()
    longer = {"num_train_epochs": 1.5} if change["max_steps"] < 0 else {"max_steps": change["max_steps"] + 1}
    more = trainer(tmp_path, **change | longer)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step > whole.state.global_step


FREE = {
    "longer": ({"max_steps": 5}, {"max_steps": 6}),
    "shorter": ({"max_steps": 30, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, {"max_steps": 6}),
    "cadence": (
        {"eval_strategy": "steps", "eval_steps": 2},
        {"logging_steps": 2, "save_steps": 2, "save_total_limit": 1},
    ),
    "workers": ({}, {"dataloader_num_workers": 1, "dataloader_pin_memory": False}),
    "memory": ({}, {"activation_checkpointing": True}),
}


@pytest.mark.parametrize("kind", FREE)
def test_what_is_no_difference_leaves_the_run_what_it_is(tmp_path, kind):
    """The first three steps with one setting, the rest with the other: to the bit a run that had one throughout."""
    first, then = FREE[kind]
    common = {"lr_scheduler_type": "constant", "save_steps": 3, "max_steps": 6}

    def make(path, seed=0, **change):
        return trainer(path, seed=seed, **common | change)

    whole = make(tmp_path / "whole", **{**first, **then, "save_strategy": "no"})
    whole.train()
    start = make(tmp_path / "run", **first)
    start.add_callback(StopAt(3))
    start.train()
    rest = make(tmp_path / "run", seed=9, **{**first, **then})
    torch.manual_seed(1234)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert rest.state.global_step == 6  # the first epoch ends in the fifth step
    assert same(whole, rest)
    if kind == "cadence":
        # Trainer alone would go on as the checkpoint says.
        assert [x["step"] for x in rest.state.log_history if "loss" in x] == [1, 2, 3, 4, 6]
        assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    "change",
    [
        {"k_max": 4},
        {"per_device_train_batch_size": 1},
        {"gradient_accumulation_steps": 1},
        {"learning_rate": 2e-2},
        {"lr_scheduler_type": "linear"},
        {"weight_decay": 0.1},
        {"data_seed": 3},
        {"max_grad_norm": 0.5},
        {"teacher_target": "soft"},
        {"train_sampling_strategy": "sequential"},
        {"ignore_data_skip": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_difference_is_refused_by_name(tmp_path, change, checkpoint_of_three):
    shutil.copytree(checkpoint_of_three, tmp_path / "checkpoint-3")
    name, value = next(iter(change.items()))
    given = {"lr_scheduler_type": "constant", "max_steps": 4, "save_steps": 3} | change
    run = trainer(tmp_path, **given)
    expected = rf"checkpoint-3 is of a run with other settings: {name} was .* and is {value!r}.*--allow-changes {name}$"
    with pytest.raises(ValueError, match=expected):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="allow_changes names k_mox, of which"):
        trainer(tmp_path, allow_changes=["k_mox"], **given).train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def checkpoint_of_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    trainer(folder, max_steps=3, save_steps=3, lr_scheduler_type="constant").train()
    return folder / "checkpoint-3"


def test_other_data_are_a_difference(tmp_path, checkpoint_of_three):
    shutil.copytree(checkpoint_of_three, tmp_path / "checkpoint-3")
    options = {"lr_scheduler_type": "constant", "max_steps": 4, "save_steps": 3}
    for data in (rows(17), [*rows(17), {**rows(18)[17], "prompt_length": 4}], Stream()):
        with pytest.raises(ValueError, match=r"train_dataset was '\w{16}' and is"):
            trainer(tmp_path, data, **options).train(resume_from_checkpoint=True)


def test_an_allowed_change_takes_effect_and_is_recorded(tmp_path, checkpoint_of_three):
    """Trainer alone would go on with the checkpoint's rate and decay."""
    shutil.copytree(checkpoint_of_three, tmp_path / "checkpoint-3")
    options = {"lr_scheduler_type": "constant", "max_steps": 5, "save_steps": 5}
    change = {"learning_rate": 3e-3, "weight_decay": 0.1, "k_max": 4}
    run = trainer(tmp_path, **options, **change, allow_changes=["learning-rate", "weight_decay", "k_max"])
    run.train(resume_from_checkpoint=True)
    assert [x["learning_rate"] for x in run.state.log_history if "learning_rate" in x] == [1e-2] * 3 + [3e-3] * 2
    assert {group["weight_decay"] for group in run.optimizer.param_groups} <= {0.1, 0.0}
    assert max(group["weight_decay"] for group in run.optimizer.param_groups) == 0.1
    record = json.loads((tmp_path / "checkpoint-5" / RECORD).read_text())
    assert record["changes"] == [
        {"step": 3, "k_max": [3, 4], "learning_rate": [0.01, 0.003], "weight_decay": [0.0, 0.1]}
    ]
    assert record["versions"]["torch"] == torch.__version__
    # From here on the new settings are those of the run.
    with pytest.raises(ValueError, match=r"checkpoint-5 .* k_max was 4 and is 3"):
        trainer(tmp_path, **options | {"max_steps": 6}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_schedule_that_follows_the_number_of_steps_is_said(tmp_path, caplog, schedule):
    trainer(tmp_path, max_steps=4, lr_scheduler_type=schedule).train()
    run, had = trainer(tmp_path, max_steps=8, lr_scheduler_type=schedule), Rates()
    run.add_callback(had)
    run.train(resume_from_checkpoint=True)
    said = (
        "lr_scheduler_type linear follows the number of steps: those up to 4 had the rates of a run of 4, from here on"
    )
    assert (said in caplog.text) == (schedule == "linear")
    rates = [x["learning_rate"] for x in run.state.log_history if "learning_rate" in x]
    expected = [1e-2 * f for f in (1, 0.75, 0.5, 0.25, 0.5, 0.375, 0.25, 0.125)] if schedule == "linear" else [1e-2] * 8
    assert rates == pytest.approx(expected)
    assert had.seen == rates[4:]


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
