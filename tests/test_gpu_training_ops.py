"""The ops of training on a GPU: errors like eager's, the same bits every time, few compilations."""

import pytest
import torch

from mtpkern.kernels import distill, span_attention
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.kernels.head import Head, Rows
from mtpkern.kernels.span_mask import span_mask
from mtpkern.train.layout import build_layout, draw_prefixes
from support.losses import distill_loss_reference
from support.training_ops import DEVICE, gradients, no_sync

pytestmark = pytest.mark.gpu


def rule_of(lengths, k, spans, tokens, *, step=0):
    lengths = torch.tensor(lengths)
    prefix = draw_prefixes(lengths, lengths * 0, k, spans, spacing="random", seed=0, step=step)
    layout = build_layout(prefix, lengths, k, num_tokens=tokens).to(DEVICE)
    return layout.position, layout.prefix_end, layout.span_start


def draw(rule, heads, kv_heads, dim, dtype, *, sinks=False):
    """Leaves, and the gradient of the output, heads inside rows as models have them."""
    torch.manual_seed(0)
    B, T = rule[0].shape
    leaves = [torch.randn(B, T, h, dim, device=DEVICE).to(dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]
    leaves += [torch.randn(heads, device=DEVICE).to(dtype)] * sinks
    return leaves, torch.randn(B, T, heads, dim, device=DEVICE).to(dtype)


def eager(query, key, value, rule, scoring):
    """Every step in the dtype of the inputs."""
    groups = query.shape[1] // key.shape[1]
    mask = span_mask(*rule, window=scoring.window)[:, None]
    score = query @ key.repeat_interleave(groups, 1).mT * scoring.scale
    if scoring.softcap is not None:
        score = scoring.softcap * torch.tanh(score / scoring.softcap)
    score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    if scoring.sinks is not None:
        score = torch.cat([score, scoring.sinks[None, :, None, None].expand(*score.shape[:3], 1)], -1)
    weight = score.softmax(-1)[..., : key.shape[2]] * mask
    return (weight @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def assert_error_is_that_of_eager(names, truth, theirs, ours, dtype):
    """Over a whole tensor at once: a greatest error hangs on the draw."""
    for name, t, e, o in zip(names, truth, theirs, ours, strict=True):
        assert (o - t).norm() <= 2 * (e - t).norm() + 2 * torch.finfo(dtype).eps * t.norm(), name


@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window": 70, "softcap": 3.0, "sinks": True}], ids=str)
def test_span_attention_errs_like_eager(dtype, dim, options):
    """Ragged texts, one of them empty, in tiles that are full, cut and skipped; memory nobody wrote is NaN."""
    rule = rule_of([400, 271, 0], 16, 8, 400)
    options = {"scale": dim**-0.5, **options}
    leaves, d_out = draw(rule, 4, 2, dim, dtype, sinks=options.pop("sinks", False))
    truth = gradients(span_attention.span_attention_reference, leaves, d_out, rule, torch.float64, **options)
    theirs = gradients(eager, leaves, d_out, rule, **options)
    ours = gradients(span_attention.span_attention, leaves, d_out, rule, **options)
    assert all(x.dtype == dtype for x in ours)
    assert_error_is_that_of_eager(("out", "dq", "dk", "dv"), truth[:4], theirs[:4], ours[:4], dtype)
    if len(ours) == 5:
        # A number a head, sums that eager may hit by luck: one unit in the last place of what is summed, as in
        # test_triton_span.py.
        one_sign = d_out.double().abs() * truth[0].sign()
        summed = gradients(span_attention.span_attention_reference, leaves, one_sign, rule, torch.float64, **options)[4]
        assert ((ours[4] - truth[4]).abs() <= torch.finfo(dtype).eps * summed.abs()).all()


def loss_case(dtype, rows, vocabulary, width, *, soft, **options):
    """Hidden states and a head that want gradients; targets, or a teacher of one token fewer; weights, some 0."""
    torch.manual_seed(0)

    def normal(*shape):
        return (torch.randn(*shape, device=DEVICE) * shape[-1] ** -0.25).to(dtype)

    head = Head(normal(vocabulary, width).requires_grad_(), banned=vocabulary - 1, **options)
    inputs = {"row_weight": torch.arange(rows, device=DEVICE) % 5 / 2}
    if soft:
        inputs["teacher"] = normal(rows, width), Head(normal(vocabulary - 1, width))
    else:
        inputs["target"] = torch.randint(vocabulary - 1, (rows,), device=DEVICE)
    return normal(rows, width).requires_grad_(), head, inputs


def loss_gradients(form, hidden, head, inputs, dtype=None):
    def to(x):
        if isinstance(x, Head):
            return Head(to(x.weight), None, x.logit_scale, x.softcap, x.banned)
        if isinstance(x, tuple):
            return tuple(map(to, x))
        return x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x

    hidden, head = to(hidden), to(head)
    loss = form(hidden, head, **{name: to(x) for name, x in inputs.items()})
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight))]


@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 3.0}], ids=str)
def test_distill_errs_like_eager(dtype, soft, options):
    """Rows and a vocabulary that fill no chunk and no block; memory nobody wrote is NaN."""
    case = loss_case(dtype, 1100, 9001, 64, soft=soft, **options)
    truth = loss_gradients(distill_loss_reference, *case, torch.float64)
    theirs = loss_gradients(distill_loss_reference, *case)
    assert_error_is_that_of_eager(
        ("loss", "d_hidden", "d_weight"), truth, theirs, loss_gradients(distill_loss, *case), dtype
    )


@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_readout_on_hardware(dtype):
    """The greatest logit of the same product, the lowest token of equals; its probability against float64."""
    hidden, head, _ = loss_case(dtype, 1100, 9001, 64, soft=False)
    token, confidence, entropy = head_readout(hidden.detach(), head)
    z = (hidden @ head.weight.t()).detach().double()
    z[:, head.banned] = float("-inf")
    picked = z.gather(1, token[:, None])[:, 0]
    # Two products of one shape may differ in a last digit where the library picks another kernel.
    torch.testing.assert_close(picked, z.amax(1), rtol=4 * torch.finfo(dtype).eps, atol=0)
    # In float32, exponentials of logits around 10 err by some 10 units in the last place of 1.
    tolerance = {"rtol": max(20 * torch.finfo(dtype).eps, 5e-6), "atol": 0}
    torch.testing.assert_close(confidence.double(), z.softmax(-1).amax(1), **tolerance)
    torch.testing.assert_close(entropy.double(), torch.special.entr(z.softmax(-1)).sum(1), **tolerance)
    tie = Head(torch.ones(300, 64, device=DEVICE, dtype=dtype), banned=0)
    assert (head_readout(torch.ones(9, 64, device=DEVICE, dtype=dtype), tie)[0] == 1).all()


@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_product_left_to_the_loss_on_hardware(dtype, soft):
    """The loss and its gradients as where it multiplies again, without a wait."""
    hidden, head, inputs = loss_case(dtype, 1100, 9001, 64, soft=soft)
    teacher = inputs.pop("teacher", None)

    def step(make):
        rows, its = make(hidden, head), make(*teacher) if soft else None
        read = [head_readout(*x).entropy for x in (rows, its) if x is not None]
        loss = distill_loss(*rows, **inputs, teacher=its)
        return [*read, loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight))]

    want = step(Rows)
    with no_sync():
        got = step(Rows.sharing)
    # Two products of one shape may differ in a last digit where the library picks another kernel.
    for a, b in zip(got, want, strict=True):
        assert (a - b).double().norm() <= 4 * torch.finfo(dtype).eps * b.double().norm()


def assert_repeats(run, times=100):
    """Bits, wherever in memory the tensors lie."""
    first = run()
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for i in range(times):
        elsewhere = torch.empty(1 + i * 7919, device=DEVICE)
        for a, b in zip(first, run(), strict=True):
            same &= (a == b).all()
        del elsewhere
    assert same.item()


def test_100_backwards_of_span_attention_are_bitwise_equal():
    rule = rule_of([1024, 700, 1024, 33], 16, 24, 1024)
    leaves, d_out = draw(rule, 8, 2, 128, torch.bfloat16)
    assert_repeats(lambda: gradients(span_attention.span_attention, leaves, d_out, rule, scale=0.1))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_100_backwards_of_distill_are_bitwise_equal(soft):
    case = loss_case(torch.bfloat16, 1500, 32_000, 256, soft=soft)
    assert_repeats(lambda: loss_gradients(distill_loss, *case))


def test_logits_pass_two_to_the_31():
    """One chunk of 2^31 + 2^21 logits: its last rows equal the same rows alone."""
    rows, vocabulary = (1 << 14) + 16, 1 << 17
    hidden, head, inputs = loss_case(torch.bfloat16, rows, vocabulary, 16, soft=False)
    head = Head(head.weight.detach())
    tail = slice(rows - 16, None)

    def d_hidden(part):
        leaf = hidden.detach()[part].requires_grad_()
        loss = distill_loss(leaf, head, **{name: x[part] for name, x in inputs.items()}, chunk=rows)
        return torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(d_hidden(slice(None))[tail], d_hidden(tail), rtol=0.03, atol=1e-3)
    whole, alone = (head_readout(hidden.detach()[part], head, chunk=rows) for part in (slice(None), tail))
    torch.testing.assert_close(whole[1][tail], alone[1], rtol=0.03, atol=0)


def test_ops_do_not_wait_for_the_device():
    rule = rule_of([300, 120], 8, 9, 300)
    leaves, d_out = draw(rule, 4, 2, 64, torch.bfloat16, sinks=True)
    cases = [loss_case(torch.bfloat16, 1100, 9001, 64, soft=soft) for soft in (False, True)]

    def all_ops():
        gradients(span_attention.span_attention, leaves, d_out, rule, scale=0.1, window=50)
        for hidden, head, inputs in cases:
            loss_gradients(distill_loss, hidden, head, inputs)
            head_readout(hidden.detach(), head)

    all_ops()  # compiles
    with no_sync():
        all_ops()


def variants():
    """Compiled kernels of both modules, by name."""
    from triton.runtime.jit import JITFunction

    functions = [f for module in (span_attention, distill) for f in vars(module).values() if isinstance(f, JITFunction)]
    return {f.__name__: sum(len(caches[0]) for caches in f.device_caches.values()) for f in functions}


def test_50_shapes_compile_nothing_new():
    """Lengths, batch sizes, k, offsets, windows and numbers of rows are data."""

    def run(i):
        batch, k, tokens = 1 + i % 4, 2 + i % 15, 40 + 37 * i
        rule = rule_of([tokens - j for j in range(batch)], k, 1 + i % 6, tokens, step=i)
        leaves, d_out = draw(rule, 4, 2, 64, torch.bfloat16)
        window = None if i % 2 else 3 + 5 * i
        gradients(span_attention.span_attention, leaves, d_out, rule, scale=0.1, window=window)
        for soft in (False, True):
            hidden, head, inputs = loss_case(torch.bfloat16, 1 + 41 * i, 512, 64, soft=soft)
            loss_gradients(distill_loss, hidden, head, inputs)
            head_readout(hidden.detach(), head)

    run(1)
    before = variants()
    assert sum(before.values()) >= 6  # forward, dq, plan, dk and dv, loss, readout
    for i in range(50):
        run(i)
    assert variants() == before
