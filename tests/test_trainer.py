"""MTPTrainer: what a step is, and what it leaves."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer

from mtpkern.generation import generate
from mtpkern.train.collator import MTPCollator
from mtpkern.train.trainer import MTPTrainer
from support.trained import EOS, MASK, V, config, data, llama, losses, same_weights, trainer

aten = torch.ops.aten


def test_it_learns_and_logs(tmp_path):
    run = trainer(tmp_path, teacher_target="gt", max_steps=60, prefix_weight=0.5, save_strategy="no")
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_agreeing_prefix"] > before["eval_agreeing_prefix"] + 1
    assert {f"eval_agreement_{j}" for j in range(1, 5)} <= after.keys()
    # Evaluation has the same spans and the same target at every step.
    run.state.global_step, run.args.gt_warmup_steps = 3, 9
    run.args.teacher_target, run.teacher = "hard", llama(3)
    hard = run.evaluate()
    run.state.global_step, run.args.gt_warmup_steps = 7, 0
    assert run.evaluate()["eval_loss"] == hard["eval_loss"] != after["eval_loss"]
    first = run.state.log_history[1]
    assert {"loss", "agreement", "agreeing_prefix", "agreement_1", "confidence_1"} <= first.keys()


def test_gradient_accumulation_equals_one_batch(tmp_path):
    """Micro-batches weigh by their rows: four of one text each step like one of four texts."""
    rows = data(4)
    losses, models = [], []
    for size, steps in ((4, 1), (1, 4)):
        student = llama()
        # Whether a model's own forward counts items is no matter: the loss is not its own.
        student.accepts_loss_kwargs = False
        run = trainer(
            tmp_path / str(size),
            student,
            teacher=None,
            train=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            teacher_target="gt",
            # Every position of the answer, so that the draw does not depend on how the batch is cut.
            num_spans=20,
            k_min=3,
            k_max=3,
            prefix_weight=0.3,
            optim="sgd",
            max_grad_norm=0,
            save_strategy="no",
            train_sampling_strategy="sequential",
        )
        run.train()
        losses.append(run.state.log_history[0]["loss"])
        models.append(run.model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    same_weights(*models, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        same_weights(models[0], llama(), rtol=1e-4, atol=1e-6)


def test_bidirectional_trains_and_is_not_decoded(tmp_path):
    run = trainer(tmp_path, max_steps=1, bidirectional=True)
    assert run.plan(MTPCollator(0)(data(4)), k=3, step=0, micro_step=0)["layout"].span_end is not None
    run.train()
    run.save_model(str(tmp_path / "final"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    with pytest.raises(ValueError, match="bidirectional"):
        generate(model, torch.tensor([[1, 8, 9]]), max_new_tokens=2)


@pytest.mark.parametrize(("change", "spans"), [({}, 8), ({"spacing": "stride"}, 4), ({"layout": "paper"}, 4)])
def test_spans_unless_given(tmp_path, change, spans):
    run = trainer(tmp_path, **{"num_spans": None, "spacing": "random", "max_length": 32, "k_max": 4} | change)
    batch = MTPCollator(0)([{"input_ids": list(range(8, 40)), "prompt_length": 2}])
    assert run.plan(batch, k=2, step=0, micro_step=0)["layout"].prefix.shape == (1, spans)


def test_spans_follow_each_texts_own_length(tmp_path):
    """Not max_length, nor the longest text beside it; and a stride loses none of them on a prompt."""
    rows = [{"input_ids": [1, *[9] * (n - 2), EOS], "prompt_length": p} for n, p in ((24, 4), (50, 40), (9, 2), (5, 4))]
    for spacing, counts in (("stride", [3, 6, 1, 1]), ("random", [6, 10, 2, 1])):
        run = trainer(tmp_path, num_spans=None, k_max=4, spacing=spacing, max_length=500)
        met = set()
        for step in range(40):
            prefix = run.plan(MTPCollator(0)(rows), k=2, step=step, micro_step=0)["layout"].prefix
            assert prefix.shape[1] == max(counts)
            # The text's last token may end a stride a span early.
            found = (prefix > 0).sum(1).tolist()
            assert all(n - (spacing == "stride") <= m <= n for m, n in zip(found[:2], counts)), found
            assert found[2:] == counts[2:]
            met.update(prefix[0].tolist())
        assert met - {0} == set(range(4, 24))
    # Mask rows that do not hang on the texts.
    run = trainer(tmp_path, num_spans=None, k_max=4, max_length=64, static_shape=True)
    assert run.plan(MTPCollator(0)(rows), k=2, step=0, micro_step=0)["layout"].position.shape == (4, 50 + 16 * 3)


def test_spans_of_an_earlier_answer_end_with_it(tmp_path):
    """Two answers in one text give the loss of two texts, the first of which ends with the first answer."""
    first, second = [1, 8, 9, 10, 11, EOS], [12, 13, 14, 15, EOS]
    row = {"input_ids": first + second, "prompt_length": 8}
    both = {**row, "earlier_answers": [(2, 6)]}
    change = {"num_spans": 20, "k_min": 4, "k_max": 4, "teacher_target": "gt", "prefix_weight": 0.5}
    run = trainer(tmp_path, **change)
    apart = [{"input_ids": first, "prompt_length": 2}, row]
    sums = []
    for rows in ([both], apart, [row]):
        plan = run.plan(MTPCollator(0)(rows), k=4, step=0, micro_step=0)
        counts = torch.ones(3)
        with torch.no_grad(), run._span_attention(run.model, plan) as ready:
            loss = run.compute_loss(run.model, run._prepare_inputs(ready), num_items_in_batch=counts)
        sums.append((int(plan["layout"].valid[..., 0].sum()), int(plan["prefix_rows"].sum()), float(loss)))
    assert sums[0] == (7, 7, pytest.approx(sums[1][2], rel=1e-5))
    assert sums[1][:2] == (7, 7)
    assert sums[2][:2] == (3, 3)
    # With spans anywhere the whole text is one, as in the paper.
    anywhere = trainer(tmp_path, response_only=False, **change).plan(MTPCollator(0)([both]), k=4, step=0, micro_step=0)
    assert anywhere["layout"].end.unique().tolist() == [11]
    assert int(anywhere["layout"].valid[..., 0].sum()) == 10


def test_the_attention_switch_is_left_after_training(tmp_path):
    model = llama()
    before = copy.copy(model.config._attn_implementation)
    trainer(tmp_path, student=model, max_steps=1).train()
    assert model.config._attn_implementation == before
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, V)


def test_gt_warmup_is_a_schedule_inside_one_run(tmp_path):
    runs = [
        trainer(tmp_path / str(i), max_steps=3, save_strategy="no", **change)
        for i, change in enumerate(({"teacher_target": "gt"}, {"gt_warmup_steps": 2}, {}))
    ]
    for run in runs:
        run.train()
    data_only, warmed, hard = map(losses, runs)
    assert warmed[:2] == data_only[:2]
    assert warmed[2] != data_only[2]
    assert hard[0] != data_only[0]


@pytest.mark.parametrize("logging_steps", [3, 50])
def test_loss_that_is_not_finite_stops_before_anything_is_saved(tmp_path, logging_steps):
    run = trainer(tmp_path, learning_rate=1e30, save_steps=3, logging_steps=logging_steps)
    with pytest.raises(RuntimeError, match=r"loss of step [23] is not finite.*learning_rate"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_anchor_and_support_reach_the_loss(tmp_path):
    """The loss that is trained on is the mean of the spans' rows plus the weighted mean of the answers' rows."""
    losses = {}
    for name, change in {
        "plain": {},
        "until": {"loss_support": "until_fail"},
        "anchor": {"anchor_kl_weight": 0.5},
        "twice": {"anchor_kl_weight": 1.0},
    }.items():
        logs = trainer(tmp_path / name, teacher_target="gt", **change).evaluate()
        losses[name] = logs["eval_loss"]
        assert logs["eval_entropy_1"] > 0
    assert losses["until"] < losses["plain"] < losses["anchor"]
    assert losses["twice"] - losses["plain"] == pytest.approx(2 * (losses["anchor"] - losses["plain"]), rel=1e-4)
    args = config(tmp_path, teacher_target="gt", anchor_kl_weight=1.0)
    with pytest.raises(ValueError, match="anchor_kl_weight"):
        MTPTrainer(model=llama(), args=args, mask_token_id=MASK)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_by_its_new_and_its_former_name(tmp_path, name):
    """transformers 5.17 knows the former alone, 5.23 asks for the new one."""
    off = config(tmp_path)
    assert (off.activation_checkpointing, off.gradient_checkpointing) == (False, False)
    run = trainer(
        tmp_path, **{name: True, f"{name}_kwargs": '{"use_reentrant": false}'}, max_steps=1, save_strategy="no"
    )
    args = run.args
    assert args.activation_checkpointing is args.gradient_checkpointing is True
    assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    run.train()
    assert run.model.model.layers[0].gradient_checkpointing


class Watcher(TorchDispatchMode):
    """Raises RuntimeError at an operation for whose result a GPU's host would have to wait.

    It does not look into our own ops, which are watched on a GPU (tests/test_gpu_training.py).
    """

    WAITING = {*(aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.bincount)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if func.overloadpacket in self.WAITING or by_mask:
            raise RuntimeError(f"{func} waits")
        return func(*args, **kwargs)


@pytest.mark.parametrize("change", [{}, {"teacher_target": "soft", "packing": True}, {"lora_rank": 2}])
def test_a_step_waits_for_no_result(tmp_path, monkeypatch, change):
    """Forward, teacher, loss and backward; spans are drawn, counted and packed on the host before."""
    options = {"prefix_weight": 0.5, "anchor_kl_weight": 0.5, "activation_checkpointing": True, **change}
    run = trainer(tmp_path, teacher=None if "lora_rank" in change else "random", max_steps=2, **options)
    step, seen = Trainer.training_step, []

    def watched(*args):
        with Watcher():
            seen.append(step(*args))
        return seen[-1]

    monkeypatch.setattr(Trainer, "training_step", watched)
    run.train()
    assert len(seen) == 2
    monkeypatch.setattr("mtpkern.train.trainer.mtp_loss", lambda *args, **kwargs: torch.ones(2).sum().item())
    with pytest.raises(RuntimeError, match="waits"):
        run.train()


def test_throughput_stands_in_logs_of_training_alone(tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "max_steps": 2, "save_strategy": "no"}
    run = trainer(tmp_path, held=data(4), **steps)
    run.train()
    assert sum("eval_loss" in entry for entry in run.state.log_history) == 2
    for entry in run.state.log_history:
        assert ("texts_per_second" in entry) == ("loss" in entry)
