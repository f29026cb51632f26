"""The Triton form of span attention against float64, run by Triton's interpreter where there is no GPU."""

from functools import partial

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from mtpkern.attention import attention_context
from mtpkern.kernels import span_attention as module
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import Tiles, span_attention_reference, span_attention_triton
from mtpkern.kernels.span_mask import Rule, span_mask
from mtpkern.train import objective
from mtpkern.train.layout import build_layout
from support.slow import slow_but

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("forward", "dq", "dkdv")


RAGGED = torch.tensor([[3, 9, 10, 23], [4, 12, 0, 0], [0] * 4]), torch.tensor([24, 18, 0])


def ragged():
    """Three texts, one of them empty; 24 tokens and 4 spans of 3 masks: 36 rows, two tiles of 16 and a quarter."""
    layout = build_layout(*RAGGED, 4, num_tokens=24)
    return layout.position, layout.prefix_end, layout.span_start


def documents():
    """Texts of 7, 13 and 4 tokens in one row, positions from 0 in each, a span of 5 masks behind 3 prefixes."""
    position, end, own = [], [], []
    for first, last in ((0, 7), (7, 20), (20, 24)):
        position += range(last - first)
        end += range(first + 1, last + 1)
        own += range(first + 1, last + 1)
    for prefix, first in ((3, 0), (17, 7), (24, 20)):
        own += [len(position)] * 5
        position += range(prefix - first, prefix - first + 5)
        end += [prefix] * 5
    return tuple(torch.tensor([x], dtype=torch.int32) for x in (position, end, own))


def arbitrary(rows=35, seed=0):
    """Rows in no order at all, within the rule: keys up to the row itself, prefixes in front of spans."""
    generator = torch.Generator().manual_seed(seed)

    def upto(limit):
        return (torch.rand(2, rows, generator=generator) * (limit + 1)).long().clamp(max=limit)

    row = torch.arange(rows)
    end = upto(row)
    own = torch.maximum(end, row - upto(row.clamp(max=6)) + (upto(row) % 3 == 0) * rows)
    return upto(row).int(), end.int(), torch.where(own > row, row + 1, own).int()


def both_ways():
    """The layout of `ragged` whose masks see all of their span."""
    return build_layout(*RAGGED, 4, num_tokens=24, bidirectional=True).rule


def arbitrary_both_ways():
    """Rows in no order, whose spans reach before and behind them."""
    position, end, own = arbitrary()
    row = torch.arange(len(own[0]))
    return position, end, own, torch.where(own <= row, row + 1 + row * 7 % 5, own).clamp(max=len(row))


LAYOUTS = {
    "ragged": ragged,
    "documents": documents,
    "arbitrary": arbitrary,
    "both_ways": both_ways,
    "arbitrary_both_ways": arbitrary_both_ways,
}


def tile(monkeypatch, rows, keys):
    for kernel in KERNELS:
        for size in (2, 4):
            monkeypatch.setitem(module.TILES, (kernel, size), {256: Tiles(rows, keys, 4, 1)})


def draw(rule, heads, kv_heads, dim, dtype, sinks=False):
    """Leaves and the gradient of the output, in the layout of memory that models hand over: heads inside rows."""
    B, T = rule[0].shape
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    leaves = [normal(B, T, h, dim).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]
    leaves += [normal(heads)] * sinks
    return leaves, normal(B, T, heads, dim)


def eager(query, key, value, rule, scoring):
    """Attention as transformers' eager form computes it, every step in the dtype of the inputs."""
    groups, before = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    key, value = (torch.cat([x[:, :, :before].detach(), x[:, :, before:]], 2) for x in (key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = span_mask(*rule, window=scoring.window)[:, None, before:]
    score = query @ key.mT * scoring.scale
    if scoring.softcap is not None:
        score = torch.tanh(score / scoring.softcap) * scoring.softcap
    score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    if scoring.sinks is not None:
        score = torch.cat([score, scoring.sinks.view(1, -1, 1, 1).expand(*score.shape[:3], 1)], -1)
    weight = score.softmax(-1)[..., : key.shape[2]] * mask
    return (weight @ value).transpose(1, 2)


def gradients(form, leaves, d_out, rule, dtype=None, **options):
    leaves = [x.to(dtype or x.dtype, copy=True).requires_grad_() for x in leaves]
    sinks = leaves[3] if len(leaves) == 4 else None
    out = form(*leaves[:3], Rule(*rule), Scoring(sinks=sinks, **options))
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def assert_errs_like_eager(leaves, d_out, rule, **options):
    """Against float64, ours and eager's, over a whole tensor at once: a greatest error hangs on the draw.

    The sinks' gradients are a number a head, -sum_r p_r (d_out . out)_r, which any draw can make eager hit by luck:
    they may err by one unit in the last place of what is summed, sum_rd p_r |d_out_rd out_rd|.
    """
    truth = gradients(span_attention_reference, leaves, d_out, rule, torch.float64, **options)
    theirs = gradients(eager, leaves, d_out, rule, **options)
    ours = gradients(span_attention_triton, leaves, d_out, rule, **options)
    eps = torch.finfo(d_out.dtype).eps
    for name, t, e, o in zip(("out", "dq", "dk", "dv"), truth, theirs, ours):
        assert o.dtype == d_out.dtype
        assert (o - t).norm() <= 2 * (e - t).norm() + 2 * eps * t.norm(), name
    if len(leaves) == 4:
        one_sign = d_out.double().abs() * truth[0].sign()
        summed = gradients(span_attention_reference, leaves, one_sign, rule, torch.float64, **options)[4].abs()
        assert ours[4].dtype == d_out.dtype
        assert ((ours[4] - truth[4]).abs() <= eps * summed).all()


@pytest.mark.parametrize(
    ("layout", "tiles", "heads", "dim", "dtype", "options", "sinks"),
    [
        ("ragged", (16, 16), (2, 1), 16, torch.float32, {}, False),
        ("ragged", (16, 16), (2, 1), 24, torch.bfloat16, {}, True),
        ("ragged", (16, 32), (2, 2), 24, torch.float16, {"softcap": 2.0}, True),
        ("ragged", (32, 16), (4, 2), 96, torch.float16, {"window": 5}, False),
        ("documents", (16, 16), (2, 1), 8, torch.float32, {"softcap": 2.0}, False),
        ("documents", (16, 32), (3, 1), 64, torch.float16, {"window": 9}, True),
        ("documents", (32, 16), (4, 2), 96, torch.bfloat16, {"softcap": 2.0, "window": 9}, False),
        ("arbitrary", (16, 16), (2, 1), 16, torch.float32, {}, False),
        ("both_ways", (16, 16), (2, 1), 16, torch.float32, {}, True),
        ("arbitrary_both_ways", (16, 16), (1, 1), 16, torch.float32, {"window": 9}, False),
        ("arbitrary", (32, 16), (1, 1), 16, torch.float32, {"window": 4}, True),
    ],
)
def test_error_is_that_of_eager(monkeypatch, layout, tiles, heads, dim, dtype, options, sinks):
    tile(monkeypatch, *tiles)
    rule = tuple(x.to(DEVICE) for x in LAYOUTS[layout]())
    leaves, d_out = draw(rule, *heads, dim, dtype, sinks)
    options = {"scale": dim**-0.5, **options}
    assert_errs_like_eager(leaves, d_out, rule, **options)


@pytest.mark.parametrize(
    ("layout", "first", "dtype", "options", "sinks"),
    [
        ("ragged", 24, torch.float32, {}, False),
        ("ragged", 24, torch.bfloat16, {"window": 5}, True),
        ("documents", 24, torch.float16, {"softcap": 2.0}, False),
        ("both_ways", 25, torch.float32, {}, False),
        ("arbitrary_both_ways", 17, torch.float32, {"window": 9}, True),
        ("arbitrary", 34, torch.float32, {}, False),
    ],
)
def test_the_last_rows_alone(monkeypatch, layout, first, dtype, options, sinks):
    """The keys in front are constants, their gradient is 0; what lies in front of the queries is never touched."""
    tile(monkeypatch, 16, 32)
    rule = tuple(x.to(DEVICE) for x in LAYOUTS[layout]())
    leaves, d_out = draw(rule, 2, 1, 16, dtype, sinks)
    leaves[0], d_out = leaves[0][:, :, first:], d_out[:, first:]
    assert_errs_like_eager(leaves, d_out, rule, scale=0.25, **options)
    for x in gradients(span_attention_triton, leaves, d_out, rule, scale=0.25, **options)[2:4]:
        assert (x[:, :, :first] == 0).all()
        assert x[:, :, first:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_tiles_that_are_shipped(dtype):
    """On rows that fill no tile and several: 150 tokens, 3 spans of 15 masks."""
    layout = build_layout(torch.tensor([[40, 100, 149]]), torch.tensor([150]), 16, num_tokens=150)
    rule = tuple(x.to(DEVICE) for x in (layout.position, layout.prefix_end, layout.span_start))
    leaves, d_out = draw(rule, 1, 1, 64, dtype)
    assert_errs_like_eager(leaves, d_out, rule, scale=0.125)


def test_rows_that_see_nothing_give_zero_whatever_they_hold(monkeypatch):
    """Queries and output gradients of padding may be any number; the other rows keep their bits."""
    tile(monkeypatch, 16, 16)
    rule = tuple(x[1:].to(DEVICE) for x in ragged())
    leaves, d_out = draw(rule, 2, 1, 16, torch.float32)
    blank = ~span_mask(*rule).any(-1)
    assert blank.any()
    clean = gradients(span_attention_triton, leaves, d_out, rule, scale=0.3)
    leaves[0].transpose(1, 2)[blank] = 1e30
    d_out[blank] = -1e30
    dirty = gradients(span_attention_triton, leaves, d_out, rule, scale=0.3)
    for c, d in zip(clean, dirty):
        assert torch.equal(c, d)
    assert (clean[0][blank] == 0).all()
    for grad in clean[1:]:
        assert (grad.transpose(1, 2)[blank] == 0).all()


def test_no_rows_in_sight():
    rule = tuple(x[2:].to(DEVICE) for x in ragged())
    leaves, d_out = draw(rule, 1, 1, 16, torch.float16, sinks=True)
    for x in gradients(span_attention_triton, leaves, d_out, rule, scale=1.0):
        assert (x == 0).all()


@pytest.mark.parametrize("layout", ["ragged", "documents", "both_ways", "arbitrary_both_ways", *range(3)])
@pytest.mark.parametrize("window", [1 << 30, 3])
def test_plan_visits_each_tile_once_and_masks_where_it_must(layout, window):
    rule = arbitrary(seed=layout) if isinstance(layout, int) else LAYOUTS[layout]()
    (B, T), ROWS, KEYS = rule[0].shape, 4, 8
    plan = torch.empty(B, -(-T // KEYS), 8, dtype=torch.int32, device=DEVICE)
    layout = tuple(x.to(DEVICE) for x in rule)
    module._row_tiles_kernel[plan.shape[1], B](layout, plan, T, T, 0, window, ROWS=ROWS, KEYS=KEYS, TILES=4)
    mask = span_mask(*rule, window=None if window > T else window)
    padded = torch.zeros(B, -(-T // ROWS) * ROWS, -(-T // KEYS) * KEYS, dtype=torch.bool)
    padded[:, :T, :T] = mask
    blocks = padded.unflatten(1, (-1, ROWS)).unflatten(3, (-1, KEYS)).transpose(2, 3)
    for b in range(B):
        for n in range(plan.shape[1]):
            a0, f0, f1, a1, b0, g0, g1, b1 = plan[b, n].tolist()
            assert a0 <= f0 <= f1 <= a1
            assert b0 <= g0 <= g1 <= b1
            visited = [*range(a0, a1), *range(b0, b1)]
            assert len(visited) == len(set(visited))
            seen = blocks[b, :, n].flatten(1).any(-1).nonzero().flatten().tolist()
            assert set(seen) <= set(visited)
            for t in (*range(f0, f1), *range(g0, g1)):
                assert blocks[b, t, n, :, : T - n * KEYS].all()


def test_plan_of_a_sorted_layout_is_tight():
    """A key tile in the middle of the text: later tokens unmasked, spans behind it unmasked, nothing else visited."""
    layout = build_layout(torch.tensor([[8, 16, 24, 32]]), torch.tensor([32]), 9, num_tokens=32)
    plan = torch.empty(1, 8, 8, dtype=torch.int32, device=DEVICE)
    rule = tuple(x.to(DEVICE) for x in (layout.position, layout.prefix_end, layout.span_start))
    module._row_tiles_kernel[8, 1](rule, plan, 64, 64, 0, 1 << 30, ROWS=8, KEYS=8, TILES=4)
    # Tiles 0-3 are tokens; tile 4 + m is the span behind 8 (m + 1) tokens.
    assert plan[0, 1].tolist() == [1, 2, 4, 4, 5, 5, 8, 8]
    # A tile of mask rows is seen by its own span, in part.
    assert plan[0, 5].tolist() == [0, 0, 0, 0, 5, 6, 6, 6]


@pytest.mark.parametrize(
    ("batch", "tokens", "strides"), [(3, 12, (1 << 30, 1 << 22)), (1, 180, (1 << 32, (1 << 24) - 16))]
)
def test_offsets_pass_two_to_the_31(monkeypatch, batch, tokens, strides):
    """The third sequence, and the tile of row 192, begin about 2^31 elements in; what lies between is never touched."""
    tile(monkeypatch, 64, 64)
    prefix, lengths = torch.tensor([[5, 9]] * batch), torch.tensor([tokens] * batch)
    layout = build_layout(prefix, lengths, 8, num_tokens=tokens)
    rule = tuple(x.to(DEVICE) for x in (layout.position, layout.prefix_end, layout.span_start))
    leaves, d_out = draw(rule, 1, 1, 16, torch.float16)
    near = gradients(span_attention_triton, leaves, d_out, rule, scale=0.25)
    size = (batch - 1) * strides[0] + rule[0].shape[1] * strides[1]
    assert size > 1 << 31
    with monkeypatch.context() as plain:
        plain.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        far = torch.empty(size, dtype=torch.float16, device=DEVICE)
    strided = far.as_strided(leaves[0].shape, (strides[0], 16, strides[1], 1))
    for place in range(3):
        strided.copy_(leaves[place])
        moved = [(strided if i == place else x).detach().requires_grad_() for i, x in enumerate(leaves)]
        out = span_attention_triton(*moved, Rule(*rule), Scoring(0.25))
        assert torch.equal(out, near[0])
        # The moved input's own gradient would be as large.
        others = [i for i in range(3) if i != place]
        for i, g in zip(others, torch.autograd.grad(out, [moved[i] for i in others], d_out)):
            assert torch.equal(g, near[1 + i])


def test_autocast_computes_in_its_dtype(monkeypatch):
    """Models with a norm on queries and keys hand over float32 of them beside values in autocast's dtype."""
    tile(monkeypatch, 32, 32)
    rule = tuple(x[:1].to(DEVICE) for x in ragged())
    (q, k, v), d_out = draw(rule, 2, 1, 16, torch.float32)
    half = gradients(span_attention_triton, [x.half() for x in (q, k, v)], d_out, rule, scale=0.3)
    with torch.autocast(DEVICE, torch.float16):
        mixed = gradients(span_attention_triton, [q, k, v.half()], d_out, rule, scale=0.3)
    assert torch.equal(mixed[0], half[0])
    assert [x.dtype for x in mixed[1:]] == [torch.float32, torch.float32, torch.float16]
    for a, b in zip(mixed[1:], half[1:]):
        assert torch.equal(a, b.to(a.dtype))


def test_inputs_need_not_be_dense(monkeypatch):
    """Slices of one fused projection, columns apart, and an output gradient that repeats one number."""
    tile(monkeypatch, 32, 32)
    rule = tuple(x[:1].to(DEVICE) for x in ragged())
    leaves, d_out = draw(rule, 2, 2, 16, torch.float32)
    fused = torch.stack(leaves, -1)
    apart = list(fused.unbind(-1))
    assert apart[0].stride(-1) == 3
    ones = torch.ones(1, device=DEVICE).expand_as(d_out)
    want = gradients(span_attention_triton, leaves, torch.ones_like(d_out), rule, scale=0.3)
    got = [x.detach().requires_grad_() for x in apart]
    out = span_attention_triton(*got, Rule(*rule), Scoring(0.3))
    for a, b in zip([out, *torch.autograd.grad(out, got, ones)], want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", slow_but(["torch", "triton"], "triton", interpreted=True))
def test_a_compiled_step_has_no_graph_break(monkeypatch, form):
    """Loss and gradients of an unmodified Llama with activation checkpointing, compiled whole and not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 41}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)).to(DEVICE).train()
    model.gradient_checkpointing_enable()
    layout = build_layout(torch.tensor([[3, 8, 12], [2, 6, 0]]), torch.tensor([14, 11]), 4, num_tokens=15)
    tokens = torch.randint(10, 39, (2, 15)).to(DEVICE)
    aim = objective.Objective(torch.tensor([7], device=DEVICE), "gt")
    if form == "triton":
        tile(monkeypatch, 32, 32)
        monkeypatch.setattr(objective, "span_attention", lambda *x, mask: span_attention_triton(*x))

    def loss(tokens, context):
        return objective.mtp_loss(model, None, tokens, context, aim, mask_token_id=40).span

    def step(loss):
        model.zero_grad()
        context = objective.SpanContext(layout.to(DEVICE))
        with attention_context(model, context):
            value = loss(tokens, context)
            value.backward()
        return [value.detach(), *(x.grad.clone() for x in model.parameters())]

    compiled = step(torch.compile(loss, backend="aot_eager", fullgraph=True))
    for a, b in zip(compiled, step(loss)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_op_is_what_torch_expects_of_one():
    """Schema, fake tensors and autograd of the registered op, sinks and a cap included."""
    layout = build_layout(torch.tensor([[3]]), torch.tensor([5]), 3, num_tokens=5)
    rule = [x.to(DEVICE) for x in layout.rule[:3]]
    (q, k, v, sinks), _ = draw(rule, 2, 1, 16, torch.float32, sinks=True)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    torch.library.opcheck(torch.ops.mtpkern.span_attention, (*leaves[:3], rule, 0.3, 4, 2.0, leaves[3]))


@pytest.mark.parametrize("checkpointing", slow_but([False, True], True, interpreted=True))
def test_a_training_step_equals_the_torch_path(monkeypatch, checkpointing):
    """Loss and gradients of a tiny model with sliding window: teacher pass, student pass, head and loss."""
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=5,
        layer_types=layers,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    student, teacher = (Gemma3ForCausalLM(config).to(DEVICE).train() for _ in range(2))
    if checkpointing:
        student.gradient_checkpointing_enable()
    layout = build_layout(torch.tensor([[3, 8, 12], [2, 6, 0]]), torch.tensor([14, 11]), 4, num_tokens=15)
    tokens = torch.randint(10, 39, (2, 15)).to(DEVICE)

    def step(target):
        student.zero_grad()
        context = objective.SpanContext(layout.to(DEVICE))
        with attention_context(student, context):
            aim = objective.Objective(torch.tensor([7], device=DEVICE), target)
            sums = objective.mtp_loss(student, teacher, tokens, context, aim, mask_token_id=40)
            sums.span.backward()
        return sums, [x.grad.clone() for x in student.parameters()]

    calls = []

    def in_triton(*args, mask):
        calls.append(args[0].shape)
        return span_attention_triton(*args)

    for target in ("hard", "soft"):
        want, want_grads = step(target)
        with monkeypatch.context() as patch:
            patch.setattr(objective, "span_attention", in_triton)
            patch.setattr(objective, "distill_loss", partial(distill_loss, triton=True))
            patch.setattr(objective, "head_readout", partial(head_readout, triton=True))
            sums, grads = step(target)
        assert torch.equal(sums.agree, want.agree)
        torch.testing.assert_close(sums.span, want.span, rtol=1e-5, atol=1e-5)
        for a, b in zip(grads, want_grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)
    # Both passes of two layers, twice; checkpointing runs the student's layers once more.
    assert len(calls) == 2 * (6 if checkpointing else 4)
