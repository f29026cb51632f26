"""The self-distillation loss on tiny random models: its two passes, its targets and what it logs."""

import copy

import pytest
import torch

from mtpkern.attention import attention_context
from mtpkern.train.layout import build_layout, pack
from mtpkern.train.objective import (
    Objective,
    SpanContext,
    backbone,
    data_targets,
    gather_rows,
    head_of,
    mtp_loss,
    until_fail,
)
from support.three_layers import EOS, EOS_IDS, MASK, llama
from support.three_layers import gemma as gemma_of


def gemma():
    return gemma_of(tie_word_embeddings=False)


def batch(k=4, **options):
    torch.manual_seed(1)
    lengths = torch.tensor([14, 11])
    tokens = torch.randint(10, 59, (2, 15))
    for b, n in enumerate(lengths):
        tokens[b, n - 1] = EOS
        tokens[b, n:] = 0
    prefix = torch.tensor([[3, 8, 12], [2, 6, 0]])
    return tokens, SpanContext(build_layout(prefix, lengths, k, num_tokens=15, **options))


def run(student, teacher, tokens, context, **options):
    with attention_context(student, context):
        rows = {name: options.pop(name) for name in ("prefix_rows", "anchor_rows") if name in options}
        index = {name: x.flatten().nonzero().squeeze(1) for name, x in rows.items()}
        objective = Objective(**{"eos_token_ids": EOS_IDS} | options)
        return mtp_loss(student, teacher, tokens, context, objective, mask_token_id=MASK, **index)


@pytest.mark.parametrize(("make", "bidirectional"), [(llama, False), (gemma, False), (llama, True)])
def test_text_rows_equal_a_plain_causal_forward(make, bidirectional):
    model = make()
    tokens, context = batch(bidirectional=bidirectional)
    with torch.no_grad(), attention_context(model, context):
        states = backbone(model, context.layout.fill(tokens, MASK), context)
    for b, n in enumerate((14, 11)):
        plain = model.base_model(tokens[b : b + 1, :n], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states[b, :n], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("mask_rows", [None, 20])
def test_a_span_equals_causal_decoding_with_masks_appended(make, mask_rows):
    model = make()
    tokens, context = batch(k=4, mask_rows=mask_rows)
    layout = context.layout
    with torch.no_grad(), attention_context(model, context):
        states = backbone(model, layout.fill(tokens, MASK), context)
    rows = gather_rows(states, layout.row).view(2, 3, 4, -1)
    for b, m in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        i = int(layout.prefix[b, m])
        appended = torch.cat([tokens[b, :i], torch.full((3,), MASK)])[None]
        with torch.no_grad():
            plain = model.base_model(appended, use_cache=False).last_hidden_state[0, i - 1 :]
        torch.testing.assert_close(rows[b, m], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gemma])
def test_k1_student_is_teacher(make):
    student = make()
    teacher = copy.deepcopy(student)
    tokens, context = batch(k=1)
    hard = run(student, teacher, tokens, context)
    assert hard.rows.sum() == 5
    assert torch.equal(hard.agree, hard.rows)
    assert hard.agreeing_prefix == hard.spans == 5
    soft = run(student, teacher, tokens, context, target="soft")
    soft.span.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize(("make", "target", "bidirectional"), [(gemma, "hard", False), (llama, "gt", True)])
def test_packed_texts_have_the_loss_of_separate_ones(make, target, bidirectional):
    """Documents do not see one another, windows and spans included; predictions end with their own text."""
    student, teacher = make(), llama(5)
    tokens, context = batch(k=4, mask_rows=20, bidirectional=bidirectional)
    answer = (torch.arange(15) >= 4) & (torch.arange(15) < context.layout.lengths[:, None] - 1)
    packed, (text, rows) = pack(context.layout, tokens, answer)
    assert text.shape == (1, 25)
    assert packed.position.shape == (1, 25 + 2 * (12 if bidirectional else 9))

    def step(tokens, context, rows):
        options = {"target": target, "prefix_rows": rows, "eos_padding": target == "gt"}
        sums = run(student, teacher, tokens, context, **options)
        return sums, torch.autograd.grad(sums.span + sums.prefix, list(student.parameters()))

    sums, grads = step(text, SpanContext(packed), rows)
    want, want_grads = step(tokens, context, answer)
    assert torch.equal(sums.agree, want.agree)
    assert torch.equal(sums.rows, want.rows)
    for a, b in zip([sums.span, sums.prefix, *grads], [want.span, want.prefix, *want_grads]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["hard", "gt"])
def test_anchor_rows_are_held_to_the_teacher(target):
    student, teacher = llama(0), llama(5)
    tokens, context = batch()
    rows = torch.zeros(2, 15, dtype=torch.bool)
    rows[0, 5:13] = True
    rows[1, 2:10] = True
    sums = run(student, teacher, tokens, context, target=target, anchor_rows=rows)
    want = torch.zeros(())
    for b in range(2):
        text = tokens[b : b + 1]
        p, q = (
            model(text, use_cache=False).logits[0, rows[b]].index_fill(1, torch.tensor(MASK), -1e9).log_softmax(-1)
            for model in (student, teacher)
        )
        want = want + torch.nn.functional.kl_div(p, q.detach(), reduction="sum", log_target=True)
    torch.testing.assert_close(sums.anchor, want, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(sums.anchor, list(student.parameters()))
    for a, b in zip(got, torch.autograd.grad(want, list(student.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    plain = run(student, teacher, tokens, context, target=target)
    assert plain.anchor == 0
    assert torch.equal(plain.span, sums.span)
    # A student that is its teacher is where the anchor pulls it.
    assert run(student, copy.deepcopy(student), tokens, context, target=target, anchor_rows=rows).anchor.abs() < 1e-4


def test_until_fail():
    agree = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert until_fail(agree).int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("target", ["hard", "soft", "gt"])
def test_loss_until_fail_leaves_out_what_decoding_would_drop(target):
    """Rows behind a miss give no loss; the counts by position stay those of all rows."""
    student, teacher = llama(0), copy.deepcopy(llama(0))
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    tokens, context = batch()
    whole = run(student, teacher, tokens, context, target=target)
    part = run(student, teacher, tokens, context, target=target, loss_support="until_fail")
    assert torch.equal(whole.rows, part.rows)
    assert torch.equal(whole.agree, part.agree)
    assert 0 < part.span < whole.span
    # Each span alone: its loss until the miss equals the loss of all rows of a span that short.
    total = torch.zeros(())
    for b, m in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        for k in range(1, 5):
            prefix = torch.zeros(2, 1, dtype=torch.int64)
            prefix[b, 0] = context.layout.prefix[b, m]
            one = SpanContext(build_layout(prefix, context.layout.lengths, k, num_tokens=15))
            with torch.no_grad():
                sums = run(student, teacher, tokens, one, target=target)
            if sums.agreeing_prefix < sums.rows.sum() or k == 4:
                total = total + sums.span
                break
    torch.testing.assert_close(part.span, total, rtol=1e-4, atol=1e-4)


def test_entropy_and_confidence_by_position():
    student, teacher = llama(0), llama(5)
    tokens, context = batch(k=1)
    sums = run(student, teacher, tokens, context)
    p = [
        student(tokens[b : b + 1, :i]).logits[0, -1].index_fill(0, torch.tensor(MASK), -1e9).softmax(-1)
        for b, prefixes in enumerate(([3, 8, 12], [2, 6]))
        for i in prefixes
    ]
    torch.testing.assert_close(sums.entropy, sum(torch.special.entr(x).sum() for x in p)[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.confidence, sum(x.max() for x in p)[None], rtol=1e-4, atol=1e-4)


def test_teacher_is_frozen_and_the_mask_token_never_a_target():
    student, teacher = llama(0), llama(5)
    teacher.requires_grad_(False)
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight[MASK] = 50 * model.lm_head.weight[EOS]
    tokens, context = batch()
    sums = run(student, teacher, tokens, context)
    assert sums.span.isfinite()
    sums.span.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_data_targets_of_a_text_cut_off_before_its_eos():
    tokens = torch.tensor([[11, 12, 13, EOS, 0], [21, 22, 23, 24, 25]])
    layout = build_layout(torch.tensor([[2], [4]]), torch.tensor([4, 5]), 3, num_tokens=5)
    label, known = data_targets(tokens, layout, EOS_IDS)
    assert label[0, 0].tolist() == [13, EOS, EOS]
    assert known[0, 0].tolist() == [True, True, True]
    assert label[1, 0, 0] == 25
    assert known[1, 0].tolist() == [True, False, False]


def test_no_span_at_all_keeps_the_graph_connected():
    student, teacher = llama(), llama(1)
    tokens, _ = batch()
    context = SpanContext(build_layout(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([14, 11]), 3, num_tokens=15))
    sums = run(student, teacher, tokens, context)
    sums.span.backward()
    assert sums.span == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert student.model.embed_tokens.weight.grad is not None


def test_head_of_reads_scale_and_cap():
    model = llama()
    model.config.logit_scale, model.config.final_logit_softcapping = 0.25, 30.0
    head = head_of(model, MASK)
    assert (head.logit_scale, head.softcap, head.banned) == (0.25, 30.0, MASK)


def test_errors():
    student = llama()
    tokens, context = batch()
    with pytest.raises(ValueError, match="teacher"):
        run(student, None, tokens, context)
    with pytest.raises(ValueError, match="anchor"):
        run(student, None, tokens, context, target="gt", anchor_rows=torch.ones(2, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match="loss_support"):
        run(student, student, tokens, context, loss_support="some")
    with pytest.raises(ValueError, match="target"):
        run(student, None, tokens, context, target="harder")


@pytest.mark.parametrize("target", ["hard", "gt"])
def test_without_eos_padding_no_row_reaches_behind_the_text(target):
    tokens, context = batch()
    padded, cut = (run(llama(), llama(5), tokens, context, target=target, eos_padding=p) for p in (True, False))
    # Of all spans only the one with a prefix of 12 of 14 tokens predicts behind EOS: its third and fourth row.
    assert (padded.rows - cut.rows).tolist() == [0, 0, 1, 1]
