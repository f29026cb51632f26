"""Steps as graphs, with a stand-in for the graph: the same training, few shapes, and no belief in a wrong replay."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mtpkern.adapter import gate_of
from mtpkern.attention import attention_context
from mtpkern.train import captured, gated, objective
from mtpkern.train.captured import CapturedSteps
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.gated import BehindPrefixContext
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.layout import build_layout
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.prefix import Packing, texts_of
from support.made_up_device import FAKE, SyncError, Watcher, to_fake
from support.slow import slow_but

pytestmark = pytest.mark.usefixtures("autocast_off_on_the_made_up_device")

EOS = 7


class Rerun:
    """A graph's manners without one: it reads its own inputs alone, and writes over what it has written before."""

    made = 0
    fault = 0.0

    def __init__(self, step, inputs, parameters, pool):
        type(self).made += 1
        self.step, self.parameters = step, parameters
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        self.output = step(self.inputs)
        self.gradients = [p.grad for p in parameters]

    def replay(self):
        for p in self.parameters:
            assert p.grad is None
        self.output.copy_(self.step(self.inputs))
        for p, gradient in zip(self.parameters, self.gradients):
            gradient.copy_(p.grad).add_(self.fault)


@pytest.fixture(autouse=True)
def without_device(monkeypatch):
    monkeypatch.setattr(captured, "CapturedStep", Rerun)
    monkeypatch.setattr(captured, "on_side_stream", lambda device: nullcontext())
    monkeypatch.setattr(captured, "TOKENS", 16)
    monkeypatch.setattr(captured, "ROWS", 32)
    monkeypatch.setattr(Rerun, "made", 0)
    monkeypatch.setattr(Rerun, "fault", 0.0)


def trainer(tiny, out, *, graphs, **change):
    model = tiny.model("llama", vocab_size=41, eos_token_id=EOS)
    del model.config.mtpkern
    texts = [[1, 2, *range(8 + i % 9, 16 + i % 9 + i % 7), EOS] for i in range(24)]
    options = {
        "gated": True,
        "lora_rank": 2,
        "k_max": 4,
        "num_spans": 4,
        "spacing": "random",
        "max_steps": 14,
        "per_device_train_batch_size": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }
    run = GatedTrainer(
        model=model,
        args=MTPConfig(str(out), **{**options, **change}),
        train_dataset=[{"input_ids": ids, "prompt_length": 3} for ids in texts],
        data_collator=MTPCollator(0),
    )
    run.args.cuda_graph = graphs
    return run


def logged(run):
    names = ("loss", "agreement", "agreeing_prefix", "confidence_2", "entropy_2", "grad_norm", "span_rows_per_second")
    entries = [x for x in run.state.log_history if "loss" in x]
    assert all(name in entry for entry in entries for name in names)
    return [x[name] for x in entries for name in names[:-1]]


@pytest.mark.parametrize("target", slow_but(["gt", "hard"], "hard"))
def test_replayed_steps_train_the_same(tiny, tmp_path, target):
    """Three k, ragged texts and a smaller batch at the end of the data: a graph for what comes again."""
    runs = [trainer(tiny, tmp_path, graphs=graphs, teacher_target=target) for graphs in (False, True)]
    for run in runs:
        run.train()
    plain, graphed = runs
    assert logged(graphed) == pytest.approx(logged(plain), abs=2e-5)
    for (name, a), (_, b) in zip(plain.model.named_parameters(), graphed.model.named_parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)
    assert 2 <= Rerun.made <= 4
    assert graphed._steps is None


def test_a_replay_that_differs_is_announced_and_never_used(tiny, tmp_path, monkeypatch):
    """A wrong gradient in one weight of many, and one of no number."""
    want = trainer(tiny, tmp_path, graphs=False, max_steps=7, k_min=4)
    want.train()
    for fault in (0.5, float("nan")):
        monkeypatch.setattr(Rerun, "fault", fault)
        run = trainer(tiny, tmp_path, graphs=True, max_steps=7, k_min=4)
        with pytest.warns(RuntimeWarning, match="gradients of a replay lie"):
            run.train()
        assert logged(run) == pytest.approx(logged(want), abs=2e-5)
    assert Rerun.made == 2


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(2))

    def step(x):
        loss = (weight * x["a"]).sum()
        loss.backward()
        return loss.detach()[None]

    def broken(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "CapturedStep", broken)
    steps = CapturedSteps(torch.nn.ParameterList([weight]))
    assert float(steps("gt", {"a": torch.tensor([1.0, 1.0])}, step)) == 2
    with pytest.warns(RuntimeWarning, match="not permitted"):
        assert float(steps("gt", {"a": torch.tensor([2.0, 3.0])}, step)) == 5
    assert weight.grad.tolist() == [2, 3]
    assert float(steps("gt", {"a": torch.tensor([1.0, 3.0])}, step)) == 4
    assert weight.grad.tolist() == [1, 3]


def test_shapes_only_grow_and_are_few(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(()))
    steps = CapturedSteps(torch.nn.ParameterList([weight]))
    assert [steps.tokens(n) for n in (5, 17, 3, 40)] == [16, 32, 32, 48]
    assert [steps.rows(*x) for x in ((4, 60), (4, 64), (4, 65), (4, 50), (1, 9))] == [64, 64, 96, 96, 32]

    def step(x):
        loss = weight * x["a"].sum()
        loss.backward()
        return loss.detach()[None]

    monkeypatch.setattr(captured, "KEPT", 2)
    for n in (1, 2, 3, 1, 2, 3, 1, 3):
        assert float(steps("gt", {"a": torch.ones(n)}, step)) == n == float(weight.grad)
    assert len(steps) == Rerun.made == 2
    assert [steps.spans(n) for n in (2, 1, 3)] == [2, 2, 3]
    assert len(steps) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [({}, "device of type cpu"), ({"gated": False, "lora_rank": 0}, "a loss on all rows")],
)
def test_refuses_where_it_cannot_be(tmp_path, change, says):
    options = {"gated": True, "lora_rank": 2, "use_cpu": True} | change
    with pytest.raises(ValueError, match=says):
        MTPConfig(str(tmp_path), cuda_graph=True, **options)
    assert MTPConfig(str(tmp_path), **options).cuda_graph is False


class OurOpsKnown(Watcher):
    """Head and loss are single ops, whose insides the tests on a GPU watch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mtpkern":
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("bug", [None, "item", "host tensor"])
def test_a_step_asks_the_host_for_nothing(tiny, monkeypatch, bug):
    """Forward and backward on an accelerator that is not there: no wait, no copy, no tensor of the host."""
    model = tiny.model("llama", vocab_size=41, eos_token_id=EOS)
    gate = gate_of(add_gated_lora(model, rank=2, k_max=4).get_base_model())
    layout = build_layout(torch.tensor([[3, 5], [2, 0]]), torch.tensor([9, 6]), 4, num_tokens=12)
    packing = Packing.of(texts_of(layout, 12), 2, 12, rows=32)
    with FakeTensorMode():
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        to_fake(model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)
        gate.row = torch.nn.Parameter(torch.empty(gate.row.shape, device=FAKE))
        fake = {
            name: torch.empty(x.shape, dtype=x.dtype, device=FAKE)
            for name, x in vars(layout).items()
            if isinstance(x, torch.Tensor)
        }
        packing = Packing(*(torch.empty(x.shape, dtype=x.dtype, device=FAKE) for x in vars(packing).values()))
        context = BehindPrefixContext(replace(layout, **fake), packing)
        tokens, eos = torch.empty(2, 12, dtype=torch.int64, device=FAKE), torch.empty(1, dtype=torch.int64, device=FAKE)
        if bug == "item":
            monkeypatch.setattr(objective, "until_fail", lambda agree: agree & bool(agree.any()))
        if bug == "host tensor":
            monkeypatch.setattr(
                objective, "until_fail", lambda agree: agree & torch.ones(agree.shape, dtype=torch.bool)
            )
        seen = nullcontext() if bug is None else pytest.raises(SyncError)
        with attention_context(model, context), gate.open_for_training(), seen, OurOpsKnown(accelerator=True):
            sums = gated.gated_loss(model, tokens, context, objective.Objective(eos, "gt", "until_fail"))
            (sums.span / sums.rows.sum()).backward()
        if bug is None:
            assert gate.row.grad is not None


def test_weights_that_have_moved_are_captured_anew():
    """As where a callback decodes with the model, whose weights then lie together: a graph reads where they were."""
    weight, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    steps = CapturedSteps(torch.nn.ParameterList([weight, frozen]))

    def step(x):
        loss = (weight * frozen * x["a"]).sum()
        loss.backward()
        return loss.detach()[None]

    made = []
    for moved in (None, None, frozen, None, None, weight, None):
        if moved is not None:
            moved.data = 2 * moved.data
        steps("gt", {"a": torch.ones(2)}, step)
        made.append((Rerun.made, len(steps)))
    # Seen once, captured when it comes again; as it is, and once more captured, behind each move.
    assert made == [(0, 0), (1, 1), (1, 0), (2, 1), (2, 1), (2, 0), (3, 1)]
