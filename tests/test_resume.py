"""A resumed run equals the uninterrupted one exactly, and a kill at any moment loses no complete checkpoint."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.train import trainer as trainer_module
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.resume import Endless, checkpoints, is_complete, mark_complete, newest_checkpoint
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
        data_collator=MTPCollator(0),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


@pytest.mark.parametrize("kind", ["lists", "by length", "workers", "stream and workers"])
def test_resumed_run_equals_the_uninterrupted(tmp_path, kind):
    """Nine steps of four rows from eighteen: the first epoch ends at step 5, in half a step; resumed from 3 or 6."""
    options = {"dataloader_num_workers": 2 if "workers" in kind else 0, "save_steps": 3}
    if kind == "by length":
        options["train_sampling_strategy"] = "group_by_length"
    data = Stream if "stream" in kind else rows
    whole = trainer(tmp_path, data(), **options)
    whole.train()
    # Another global random state and other first weights, as in another process.
    rest = trainer(tmp_path, data(), seed=9, **options)
    torch.manual_seed(1234)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{6 if kind == 'by length' else 3}"))
    assert rest.state.global_step == 9
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
        ((trainer_module, "rotate"), 2, "checkpoint-4"),
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
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        run.train(resume_from_checkpoint=str(folder))
