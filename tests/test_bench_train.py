"""The benchmarks of training: what they compare is the same computation, their floors are right, and they run."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

from mtpkern.attention import attention_context
from mtpkern.bench import distill, gated_step, models, real, span_attention, timing, train_step
from mtpkern.bench.distill import Case, Inputs
from mtpkern.bench.span_attention import FLEX, INTERLEAVED, OURS, SDPA, Shape
from mtpkern.bench.timing import Peak
from mtpkern.kernels.head import Head
from mtpkern.kernels.span_mask import span_mask
from mtpkern.train.layout import build_layout, stride_prefixes
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.objective import Objective, SpanContext, mtp_loss
from support.benches import last

CPU = torch.device("cpu")
H200 = Peak(4.3e12, 790e12, "")


def rule_of(layout):
    return layout.position, layout.prefix_end, layout.span_start


@pytest.fixture
def fake_gpu_memory(monkeypatch):
    """A CPU whose allocator says that the call before last needed 3 GiB at its height."""
    for module in (distill, train_step):
        monkeypatch.setattr(module, "isnan", lambda x: False)
    monkeypatch.setattr(distill, "peak_memory", lambda action, device: float(3 << 30))
    monkeypatch.setattr(train_step, "peak_of", lambda step, device: float(3 << 30))


def trainee_in(dtype):
    return train_step.Trainee(CPU, dtype)


def in_torch(rule, layout):
    """What FlexAttention computes from a rule, by a dense mask."""
    batch, rows = layout.position.shape
    mask = flex_attention.create_mask(rule, batch, 1, rows, rows, device="cpu")
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_pairs_are_those_of_the_mask():
    """Also with texts of different lengths and spans that do not exist."""
    ragged = build_layout(torch.tensor([[2, 5, 0], [1, 3, 6], [0, 0, 0]]), torch.tensor([7, 8, 0]), 3, num_tokens=9)
    for layout in (ragged, *(shape.layout() for shape in span_attention.TINY)):
        assert span_attention.visible_pairs(layout) == span_mask(*rule_of(layout)).sum()


@pytest.mark.parametrize(
    ("shape", "forward", "backward"), zip(span_attention.SHAPES, (64, 256, 36), (161, 640, 72), strict=True)
)
def test_floors_are_those_of_the_design(shape, forward, backward):
    """Microseconds on an H200; the shortest texts move bytes, the others compute."""
    work = span_attention.work(shape, shape.layout())
    assert H200.floor(**work["forward"]) == pytest.approx(forward, rel=0.03)
    assert H200.floor(**work["backward"]) == pytest.approx(backward, rel=0.03)
    assert (work["forward"]["bytes"] / 4.3e12 > work["forward"]["flops"] / 790e12) == (shape.tokens == 160)


def test_interleaved_order_is_that_of_the_paper():
    """18 rows: 4 tokens, 2 masks, and so on; a span's masks stand behind its prefix."""
    layout = build_layout(torch.tensor([stride_prefixes(18, 3, 3)]), torch.tensor([12]), 3, num_tokens=12)
    masks = (span_attention.interleaved_order(layout)[0] >= 12).int().tolist()
    assert masks == [0, 0, 0, 0, 1, 1] * 3


@pytest.mark.parametrize("shape", span_attention.TINY, ids=Shape.text)
def test_rules_of_flex_attention_are_the_span_rule(shape):
    layout = shape.layout()
    batch, rows = layout.position.shape
    dense = span_mask(*rule_of(layout))

    def mask_of(rule):
        return flex_attention.create_mask(rule, batch, 1, rows, rows, device="cpu")[:, 0]

    assert torch.equal(mask_of(span_attention.our_rule(layout)), dense)
    order = span_attention.interleaved_order(layout)
    assert order.sort(1).values.equal(torch.arange(rows).expand(batch, -1))
    moved = torch.stack([mask[o][:, o] for mask, o in zip(dense, order, strict=True)])
    assert torch.equal(mask_of(span_attention.interleaved_rule(layout)), moved)
    assert moved.triu(1).sum() == 0


def test_flex_attention_itself_computes_the_same(monkeypatch):
    """Uncompiled, forward alone: all that it does on a CPU without a compiler."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    shape = span_attention.TINY[0]
    layout = shape.layout()
    inputs = span_attention.Inputs.draw(shape, layout.position.shape[1], torch.float32, CPU)
    order = span_attention.interleaved_order(layout)
    moved = [x.detach() for x in inputs.ordered(order).leaves]
    q, k, v = (x.detach() for x in inputs.leaves)
    with torch.no_grad():
        want = span_attention.with_ours(layout)(q, k, v)
        mask = span_attention.block_mask(span_attention.our_rule(layout), layout)
        out = flex_attention.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out, want)
        mask = span_attention.block_mask(span_attention.interleaved_rule(layout), layout)
        out = flex_attention.flex_attention(*moved, block_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out, want.gather(2, order[:, None, :, None].expand_as(want)))


def test_span_attention_runs():
    table, _ = last(span_attention.measure(CPU, quick=True))
    assert [row[0] for row in table.rows] == [OURS, SDPA]
    assert [line.split(":")[0] for line in table.skipped] == [FLEX, INTERLEAVED]
    assert not table.goals


def test_span_attention_runs_with_all_comparators(monkeypatch):
    monkeypatch.setattr(span_attention, "with_flex", in_torch)
    monkeypatch.setattr(span_attention, "SHAPES", span_attention.TINY)
    first, second = last(
        table for shape in span_attention.TINY for table in span_attention.measure_shape(shape, CPU, rounds=1)
    )
    assert [row[0] for row in first.rows] == [OURS, FLEX, INTERLEAVED, SDPA]
    assert not first.skipped
    assert len(first.goals) == 3
    assert "BlockMask" in first.note
    assert [goal.target for goal in second.goals] == [50, 38]


def test_a_comparator_that_is_wrong_is_left_out_and_we_are_not(monkeypatch):
    def interleaved_but_not_moved(rule, layout):
        return in_torch(span_attention.our_rule(layout), layout)

    monkeypatch.setattr(span_attention, "with_flex", interleaved_but_not_moved)
    (table,) = last(span_attention.measure_shape(span_attention.TINY[0], CPU, rounds=1))
    assert [row[0] for row in table.rows] == [OURS, FLEX, SDPA]
    (line,) = table.skipped
    assert line.startswith(f"{INTERLEAVED}: out is off by")

    def off(layout):
        return lambda q, k, v: 1.1 * span_attention.with_sdpa(layout, q.dtype)(q, k, v)

    monkeypatch.setattr(span_attention, "with_ours", off)
    with pytest.raises(RuntimeError, match=f"{OURS}: out is off by .*, against float32"):
        list(span_attention.measure_shape(span_attention.TINY[0], CPU, rounds=1))


def test_bound_and_work_of_head_and_loss():
    hard, soft = (Case(2560, 151_936, 1024, s, trained=t) for s, t in ((False, True), (True, False)))
    assert hard.flops == 6 * 2560 * 151_936 * 1024
    assert soft.flops == hard.flops
    assert hard.bound(2, CPU) == 2 * 151_936 * 1024 + 4 * 2560 * 1024 + 2**29
    assert soft.bound(2, CPU) == 4 * 2560 * 1024 + 2**29


@pytest.mark.parametrize("until_fail", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_all_logits_computes_our_loss(soft, until_fail):
    torch.manual_seed(0)
    inputs = Inputs.draw(Case(32, 50, 16, soft, True, until_fail), torch.float64, CPU)
    ours = distill.step(distill.ours, inputs)
    theirs = [distill.step(lambda x: distill.all_logits(x, torch.float64), inputs)]
    if until_fail:
        # Two spans, each up to its first miss.
        first, second = inputs.row_weight.view(2, distill.SPAN).long().sum(1).tolist()
        assert 0 < first < 16 > second > 0
        assert inputs.row_weight.view(2, distill.SPAN)[0, :first].all()
        theirs.append(distill.step(distill.counted_logits, inputs))
    assert len(ours) == 3
    # In float32 what is made of the rows that count.
    for found, close in zip(theirs, (1e-6, 1e-5)):
        for a, b in zip(ours, found, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=close, check_dtype=False)


def test_a_trained_head_has_float32_weights_under_autocast():
    """And a frozen teacher in autocast's dtype; the gradient is the weights'."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = Inputs.draw(Case(32, 50, 16, True, True, True), torch.float32, CPU)
        assert inputs.weight.dtype == inputs.hidden.dtype == torch.float32
        assert {x.dtype for x in inputs.teacher} == {torch.bfloat16}
        right = distill.step(distill.counted_logits, inputs)
        found = distill.step(distill.ours, inputs)
    assert timing.difference(list(found), list(right), 2e-2) == ""
    assert found[2].dtype == torch.float32


def test_distill_runs(fake_gpu_memory):
    *cases, readout = last(distill.measure(CPU, quick=False))
    assert len(cases) == 6
    for table in cases:
        some = [distill.COUNTED] if "until the first miss" in table.caption else []
        assert [row[0] for row in table.rows] == [distill.OURS, distill.FLOAT32, *some]
        memory, slope, time = table.goals
        assert memory.measured == 3 * 1024
        assert slope.measured == 0
        assert not memory.met
        assert not math.isnan(time.measured)
    assert len(readout.rows) == 3


def test_peak_memory_counts_above_what_was_there(monkeypatch):
    """The allocator stands at 10, its height is reset behind the warm-up, and the call's own height is 70."""
    state = {"now": 10, "height": 500}
    fakes = {
        "memory_allocated": lambda device: state["now"],
        "reset_peak_memory_stats": lambda device: state.update(height=state["now"]),
        "max_memory_allocated": lambda device: state["height"],
        "synchronize": lambda device: None,
    }
    for module in (distill, timing):
        monkeypatch.setattr(module, "free", lambda device: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    calls = []

    def action(i):
        calls.append(i)
        state["height"] = max(state["height"], 70)

    device = torch.device("cuda")
    assert distill.peak_memory(action, device) == 60
    assert train_step.peak_of(action, device) == 70
    assert calls == [0, 0, 0]


def test_readout_that_picks_wrong_is_an_error(monkeypatch):
    monkeypatch.setattr(distill, "head_readout", lambda hidden, head: (torch.zeros(len(hidden)).long(), None))
    with pytest.raises(RuntimeError, match="greatest"):
        list(distill.measure_readout(Case(24, 50, 16, soft=False, trained=False), CPU, torch.float32, 1))


@pytest.mark.parametrize("all_rows", [False, True])
def test_plain_step_is_the_same_training(all_rows):
    """In float32, without autocast: the loss and every gradient."""
    trainee = trainee_in(torch.float32)
    batch = train_step.TINY_BATCHES[0]
    layout = batch.layout()
    tokens = torch.randint(1, trainee.mask, (batch.size, batch.tokens))

    def gradients(context_of, loss_of):
        trainee.student.zero_grad()
        context = context_of(layout)
        with attention_context(trainee.student, context):
            loss = loss_of(context)
            loss.backward()
        return loss.detach(), [x.grad.clone() for x in trainee.student.parameters()]

    def ours(context):
        sums = mtp_loss(
            trainee.student, trainee.teacher, tokens, context, Objective(trainee.eos), mask_token_id=trainee.mask
        )
        return sums.span / sums.rows.sum()

    def plain(context):
        return trainee.plain_loss(tokens, context, all_rows)

    want, want_grads = gradients(SpanContext, ours)
    loss, grads = gradients(lambda x: train_step.DenseContext(x, dtype=torch.float32), plain)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-8)


@pytest.mark.slow("bench_train::test_steps_run_under_autocast")
def test_train_step_runs(fake_gpu_memory):
    plain, checkpointed, compiled = last(train_step.measure(CPU, quick=False))
    assert [row[0] for row in compiled.rows] == [train_step.OURS, train_step.COMPILED]
    assert not compiled.goals
    for table in (plain, checkpointed):
        assert [row[0] for row in table.rows] == [train_step.OURS, train_step.SPAN_ROWS, train_step.ALL_ROWS]
        assert [goal.met for goal in table.goals if goal.at_most] == [False, False]
        assert not table.skipped
    assert "checkpointing" in checkpointed.caption


def test_steps_run_under_autocast():
    """As on a GPU: float32 weights and gradients, products in bfloat16."""
    trainee = trainee_in(torch.bfloat16)
    assert next(trainee.teacher.parameters()).dtype == torch.bfloat16
    for batch in train_step.TINY_BATCHES[:2]:
        with trainee.on(batch) as steps:
            for step in steps.values():
                assert step(0).isfinite()
                assert all(x.grad.dtype == torch.float32 for x in trainee.student.parameters())


def test_head_of_the_plain_step_bans_the_mask():
    trainee = trainee_in(torch.float32)
    layout = train_step.TINY_BATCHES[0].layout()
    context = train_step.DenseContext(layout, dtype=torch.float32)
    ids = layout.fill(torch.ones(2, 16, dtype=torch.long), trainee.mask)
    with torch.no_grad(), attention_context(trainee.student, context):
        some, all_ = (train_step.span_logits(trainee.student, ids, context, trainee.mask, x) for x in (False, True))
    assert (some[:, trainee.mask] == float("-inf")).all()
    torch.testing.assert_close(some, all_)
    assert isinstance(train_step.head_of(trainee.student, trainee.mask), Head)


def test_an_untaught_adapter_adds_nothing():
    """Whatever it had learned; and no token stops a call, so that all are as long."""
    base = models.random_model("SmolLM2-135M", True, torch.float32, CPU, eos_token_id=0, pad_token_id=1)
    model = add_gated_lora(base, rank=2, k_max=4).get_base_model().eval()
    learned = [p for name, p in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for p in learned:
            p.normal_()
        # All logits are the same, so that the first token is said, which would stop a call.
        model.get_output_embeddings().weight.zero_()
    *_, table = real.untaught(model, [("a", [3, 4, 5]), ("b", [6, 7])], [2], 2, 6)
    assert learned
    assert not any(p.any() for p in learned)
    (record,) = table.records
    assert {way: len(seconds) for way, seconds in record["seconds"].items()} == {"plain": 2, "ours": 2}
    assert table.goals[0].measured == record["sums"]


def test_ways_of_a_gated_step(monkeypatch):
    """One loss in all of them, and the one that keeps prefixes makes one pass a step."""
    monkeypatch.setattr(gated_step, "_peaks_of", gated_step.peaks)
    (table,) = gated_step.take_steps(CPU, True, tiny=True)
    assert [row[0] for row in table.rows] == list(gated_step.WAYS)
    assert len(table.goals) == 2
    work = gated_step.Trainee(tiny=True)
    passes = []
    work.model.base_model.register_forward_pre_hook(lambda *args: passes.append(1))
    work.step(gated_step.KEPT)
    count = {}
    for way in gated_step.WAYS:
        passes.clear()
        work.step(way)
        count[way] = len(passes)
    assert count == {gated_step.KEPT: 1, gated_step.EACH: 3, gated_step.JOINT: 1}
    monkeypatch.setattr(work, "_joint", lambda: 1.0)
    with pytest.raises(ValueError, match="one loss"):
        next(gated_step.seconds(work, 1))
