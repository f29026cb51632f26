"""A run that goes on is the run that was never interrupted; what may differ, and what may not."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from mtpkern.train.record import RECORD, fingerprint
from mtpkern.train.resume import Endless, checkpoints, load_weights
from support.models import ARCHITECTURES, random_model
from support.resumed import files_of, llama, rows, same, trainer
from support.slow import slow_but
from support.trained import EOS, V


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


@pytest.mark.parametrize(
    "kind", slow_but(["lists", "by length", "workers", "stream and workers"], "lists", "stream and workers")
)
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


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3_moe"])
def test_weights_that_files_name_otherwise_come_back(tmp_path, name):
    """When a run goes on, and when its best step is published."""

    def model(seed):
        return random_model(name, seed=seed, vocab_size=V, eos_token_id=EOS, **ARCHITECTURES[name])

    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options = {"max_steps": 3, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "model": model, **best}
    whole = trainer(tmp_path, **options)
    whole.train()
    worst = int(whole.state.best_model_checkpoint.rpartition("-")[2])
    assert worst < 3
    folder = tmp_path / f"checkpoint-{worst}"
    for key, x in type(whole.model).from_pretrained(folder).state_dict().items():
        assert torch.equal(x, whole.model.state_dict()[key]), key
    rest = trainer(tmp_path, seed=9, **options)
    rest.train(resume_from_checkpoint=str(folder))
    assert same(whole, rest)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "up_proj" not in k})
    with pytest.raises(ValueError, match=r"lacks weights .*up_proj\.weight; resume from another"):
        load_weights(model, tmp_path)


def test_endless_stream_goes_on_with_the_next_epoch():
    first, second = (list(s) for s in (Stream(), Stream()))
    assert first == second
    stream = iter(Endless(Stream()))
    assert [next(stream) for _ in range(18)] == first
    again = [next(stream) for _ in range(18)]
    assert again != first
    assert sorted(map(str, again)) == sorted(map(str, first))
    assert list(Endless([])) == []


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
        pytest.param({"max_steps": 2, "save_steps": 2, "lr_scheduler_type": "constant"}, None, marks=pytest.mark.slow),
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
    assert {**files_of(tmp_path), "_lock": None} == {**before, "_lock": None}
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


@pytest.mark.parametrize("kind", slow_but(FREE, "longer", "cadence"))
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
    with pytest.raises(ValueError, match=expected):
        run.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
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


@pytest.mark.parametrize("array", [torch.arange, np.arange])
def test_arrays_are_told_apart_inside_too(array):
    one, other = array(3000), array(3000)
    other[1500] = 7
    assert fingerprint([{"input_ids": one}]) != fingerprint([{"input_ids": other}])


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
