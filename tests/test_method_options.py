"""Every option of the method changes what it says, and nothing else."""

import copy
from dataclasses import fields

import pytest
import torch

from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from support.paper import llama, near, texts, trainer

BASE = {"k_min": 2, "k_max": 6, "num_spans": 2, "span_offset": None, "max_length": 14}


# One change for each option of the method; it must move the loss of the same steps on the same texts.
CHANGES = [
    {"k_min": 6},
    {"k_max": 5},
    {"k_scope": "rank"},
    {"num_spans": 1},
    {"spacing": "random"},
    {"span_offset": 0},
    {"offset_scope": "rank"},
    {"layout": "paper"},
    {"max_length": 11},
    {"response_only": False},
    {"eos_padding": False},
    {"teacher_target": "soft"},
    {"teacher_target": "gt"},
    {"gt_warmup_steps": 2},
    {"loss_support": "until_fail"},
    {"prefix_weight": 0.1},
    {"anchor_kl_weight": 0.1},
    {"bidirectional": True},
]


# What has no effect on the loss of a step, and the test that sees the effect it has.
ELSEWHERE = {
    "gated": "test_gated_trainer.py::test_learns_and_leaves_the_base_as_it_was",
    "prefix_memory": "test_gated_trainer.py::test_resumes_to_the_bit_and_keeping_prefixes_changes_none",
    "prefix_scope": "test_method.py::test_a_step_is_the_definitions",
    "pure_bf16": "test_trained_weights.py::test_pure_bf16_trains_and_freezes",
    "static_shape": "test_shape_only",
    "packing": "test_shape_only",
    "init_adapter": "test_gated_trainer.py::test_begins_with_an_adapter_of_a_folder",
    "lora_rank": "test_adapters_as_configured",
    "lora_alpha": "test_adapters_as_configured",
    "lora_targets": "test_adapters_as_configured",
    "student_dtype": "test_trained_weights.py::test_lora_teaches_itself_and_saves_a_plain_model",
    "teacher_dtype": "test_the_teacher_is_cast",
    "save_dtype": "test_trained_weights.py::test_saved_in_another_dtype",
    "activation_checkpointing": "test_trainer.py::test_checkpointing_by_its_new_and_its_former_name",
    "activation_checkpointing_kwargs": "test_trainer.py::test_checkpointing_by_its_new_and_its_former_name",
    "allow_changes": "test_resume.py::test_an_allowed_change_takes_effect_and_is_recorded",
    "data_seed": "test_order_of_the_data",
    "cuda_graph": "test_captured.py",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "test_compilation.py"),
    "ddp_find_unused_parameters": "test_distributed.py: every weight of DDP has a gradient",
    "remove_unused_columns": "every test: the collator gets prompt_length",
    "logging_nan_inf_filter": "test_trainer.py::test_loss_that_is_not_finite_stops_before_anything_is_saved",
}


def test_every_option_has_a_test():
    ours = {f.name for f in fields(MTPConfig) if f.name in vars(MTPConfig)["__annotations__"]}
    assert ours == {name for change in CHANGES for name in change} | set(ELSEWHERE)


def step_losses(run, change):
    """The losses of eight steps, without any update between them, and the rows of a text."""
    # Not a new MTPConfig: that would take away accelerate's state from under the trainer.
    before, run.args = run.args, copy.copy(run.args)
    vars(run.args).update(change)
    batch, found = MTPCollator(0)(texts()), []
    run.model.train()
    for step in range(8):
        run.state.global_step = step
        (plan,), counts = run.get_batch_samples(iter([batch]), 1, run.args.device)
        with torch.no_grad(), run._span_attention(run.model, plan) as inputs:
            found.append(run.compute_loss(run.model, inputs, num_items_in_batch=counts).item())
    run.args = before
    return found, plan["layout"].position.shape


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """One for all: a step trains nothing, and its options are put back."""
    run = trainer(tmp_path_factory.mktemp("plain"), llama(), near(llama()), **BASE)
    return run, *step_losses(run, {})


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(map(str, *change.items())))
def test_an_option_changes_the_loss(plain_run, change):
    run, plain, _ = plain_run
    changed, _ = step_losses(run, change)
    assert changed != pytest.approx(plain, rel=1e-3)
    if change == {"gt_warmup_steps": 2}:
        assert changed[2] == plain[2]


@pytest.mark.parametrize("change", [{"static_shape": True}, {"packing": True}])
def test_shape_only(plain_run, change):
    run, plain, shape = plain_run
    changed, other = step_losses(run, change)
    assert other != shape
    assert changed == pytest.approx(plain, rel=1e-5)


def test_spans_are_drawn_anew(tmp_path):
    """For each step, micro-batch, rank and seed, and never from the global random state."""
    run = trainer(tmp_path, llama(), near(llama()), **BASE | {"spacing": "random"})
    batch = MTPCollator(0)(texts() * 3)

    def draw(step=0, micro_step=0, **change):
        before, run.args = run.args, copy.copy(run.args)
        vars(run.args).update(change)
        torch.manual_seed(step + micro_step)
        prefix = run.plan(batch, k=3, step=step, micro_step=micro_step)["layout"].prefix
        run.args = before
        return prefix.tolist()

    assert draw() == draw()
    changed = [draw(), draw(step=1), draw(micro_step=1), draw(seed=1)]
    assert len({str(x) for x in changed}) == 4
    torch.manual_seed(9)
    assert draw() == changed[0]


def test_adapters_as_configured(tmp_path):
    run = trainer(tmp_path, llama(), None, lora_rank=2, lora_alpha=3, lora_targets="q_proj, down_proj")
    layers = {name: m for name, m in run.model.named_modules() if hasattr(m, "lora_A")}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "down_proj"}
    assert len(layers) == 4
    for layer in layers.values():
        assert layer.lora_A["default"].weight.shape[0] == 2
        assert layer.scaling["default"] == 1.5
    torch.manual_seed(1)
    whole = trainer(tmp_path, llama(), None, lora_rank=2)
    torch.manual_seed(2)
    again = trainer(tmp_path, llama(), None, lora_rank=2)
    other = trainer(tmp_path, llama(), None, lora_rank=2, seed=1)
    layers = {name: m for name, m in whole.model.named_modules() if hasattr(m, "lora_A")}
    for name in layers:
        first, second, third = (
            m.get_submodule(name).lora_A["default"].weight for m in (whole.model, again.model, other.model)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    assert len(layers) == 14
    assert {m.scaling["default"] for m in layers.values()} == {2.0}


def test_the_teacher_is_cast(tmp_path):
    for dtype, want in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        run = trainer(tmp_path, llama(), near(llama()), teacher_dtype=dtype)
        assert run.teacher.dtype == want
        assert run.model.dtype == torch.float32
        assert not any(p.requires_grad for p in run.teacher.parameters())


def test_order_of_the_data(tmp_path):
    def order(**change):
        run = trainer(tmp_path, llama(), None, teacher_target="gt", **change)
        torch.manual_seed(len(change))
        return [length for batch in run.get_train_dataloader() for length in batch["lengths"]]

    assert order() == order(data_seed=42) == order(seed=42)
    assert order(data_seed=1) != order()
    assert order(data_seed=1) == order(seed=1) == order(seed=5, data_seed=1)
