"""What a training step does with its head, counted: one cast of float32 weights, one product of rows with a loss."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.adapter import gate_of
from mtpkern.attention import attention_context
from mtpkern.kernels import head as heads
from mtpkern.kernels.distill import distill_loss
from mtpkern.kernels.head import Head
from mtpkern.train.gated import BehindPrefixContext, gated_loss
from mtpkern.train.layout import build_layout
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.objective import Objective, SpanContext, mtp_loss

V, H, N, MASK, EOS = 61, 32, 15, 60, 7
K, PREFIXES = 4, torch.tensor([[3, 8, 11], [2, 6, 0]])
SHAPE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def llama(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def counted(action):
    """What an action returns; of its casts and its products on the CPU how many there are of each pair of shapes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        result = action()
    seen = {"aten::_to_copy": [], "aten::mm": []}
    for event in record.events():
        if event.name in seen:
            seen[event.name].append(tuple(tuple(shape) for shape in event.input_shapes[:2]))
    return result, seen["aten::_to_copy"], seen["aten::mm"]


def batch():
    torch.manual_seed(1)
    return torch.randint(10, 59, (2, N)), build_layout(PREFIXES, torch.tensor([N, N - 3]), K, num_tokens=N)


def products_with_head(products):
    """How many rows each product with a head [V, H] had, the smallest first."""
    return sorted(shapes[0][0] for shapes in products if (H, V) in shapes)


def loss_of(student, teacher, target, support="all", **options):
    tokens, layout = batch()
    context = SpanContext(layout)
    objective = Objective(torch.tensor([EOS]), target, support)
    with attention_context(student, context):
        return mtp_loss(student, teacher, tokens, context, objective, mask_token_id=MASK, **options)


def plain_step(target, support):
    """Sums and gradients."""
    student, teacher = llama(0), None if target == "gt" else llama(1)
    sums = loss_of(student, teacher, target, support)
    sums.span.backward()
    return [*vars(sums).values(), *(p.grad for p in student.parameters())]


def gated_step(target, support):
    adapted = add_gated_lora(llama(0), rank=2, k_max=K)
    student, (tokens, layout) = adapted.get_base_model(), batch()
    context = BehindPrefixContext(layout)
    with attention_context(student, context), gate_of(student).open_for_training():
        sums = gated_loss(student, tokens, context, Objective(torch.tensor([EOS]), target, support))
        sums.span.backward()
    return [*vars(sums).values(), *(p.grad for p in adapted.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("own_teacher", "casts"), [(False, 2), (True, 1)])
def test_a_step_casts_each_head_once(own_teacher, casts):
    student = llama(0)
    teacher = student if own_teacher else llama(1)
    rows = torch.arange(4, 9)
    options = {"target": "hard", "prefix_rows": rows, "anchor_rows": rows}
    if own_teacher:
        # As an adapter's student is, with its adapters off; its attention is held already.
        options["as_teacher"] = torch.no_grad

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            sums = loss_of(student, teacher, **options)
            (sums.span + sums.prefix + sums.anchor).backward()

    _, cast, _ = counted(step)
    assert sum(shapes[0] == (V, H) for shapes in cast) == casts
    assert student.lm_head.weight.grad.dtype == torch.float32


def test_a_head_cast_once_gives_the_same_bits():
    torch.manual_seed(0)
    hidden = torch.randn(9, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    target = torch.randint(V, (9,))
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for head in (Head(weight), Head(weight).narrowed(hidden)):
            loss = distill_loss(hidden, head, target=target)
            found.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    assert head.narrow is not None
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("soft", [False, True])
def test_rows_of_weight_zero_are_in_no_product(soft):
    torch.manual_seed(0)
    hidden = torch.randn(40, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    of_teacher = torch.randn(40, H), Head(torch.randn(V, H))
    target = torch.randint(V, (40,))
    row_weight = torch.randint(0, 2, (40,)).float()
    some = row_weight.nonzero().squeeze(1)

    def gradients(states, weights, target, teacher):
        targets = {"teacher": teacher} if soft else {"target": target}
        loss = distill_loss(states, Head(weight), row_weight=weights, **targets)
        return [loss, *torch.autograd.grad(loss, [hidden, weight])]

    got, _, products = counted(lambda: gradients(hidden, row_weight, target, of_teacher))
    rows = [shape[0] for shapes in products for shape in shapes if shape[0] != V and shape[1:] in ((H,), (V,))]
    assert set(rows) == {H, len(some)}, products
    # The rest alone, with their weights and without: to the last bit.
    for weights in (row_weight[some], None):
        want = gradients(hidden[some], weights, target[some], (of_teacher[0][some], of_teacher[1]))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_rows_of_the_text_without_a_loss_are_in_no_product():
    student = llama(0)
    rows = torch.tensor([3, 4, 5, 19, 20])
    sums, _, products = counted(lambda: loss_of(student, None, target="gt", prefix_rows=rows))
    # Readout of all spans, which their loss takes over, and the loss of the text.
    assert products_with_head(products) == [len(rows), PREFIXES.numel() * K]
    assert sums.prefix > 0


@pytest.mark.parametrize("support", ["all", "until_fail"])
@pytest.mark.parametrize(("target", "readouts"), [("hard", 2), ("soft", 2), ("gt", 1)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_loss_takes_the_product_of_the_readout(monkeypatch, target, support, readouts, gated, narrow):
    """Of a student and of a soft teacher; where two products pass the bound of logits, the loss makes its own."""
    run = gated_step if gated else plain_step
    rows = PREFIXES.numel() * (K - gated)
    # A gated adapter's base reads its own first token, too.
    other = [PREFIXES.numel()] * (gated and target != "gt")
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        got, _, once = counted(lambda: run(target, support))
        monkeypatch.setattr(heads, "LOGITS", 0)
        want, _, twice = counted(lambda: run(target, support))
    assert products_with_head(once) == [*other, *[rows] * readouts]
    more = 2 if target == "soft" else 1
    assert len(products_with_head(twice)) == len(products_with_head(once)) + more
    for a, b in zip(got, want, strict=True):
        # Of rows that are left out, the products may differ in rounding.
        torch.testing.assert_close(a, b, rtol=0, atol=(1e-2 if narrow else 1e-5) * float(b.detach().abs().max()))
