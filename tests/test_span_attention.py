"""Span attention against a loop over rows, and its gradients against finite differences."""

import math

import pytest
import torch

from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention, span_attention_reference
from mtpkern.kernels.span_mask import span_mask
from mtpkern.train.layout import build_layout

SCALE = 0.37


def case(dtype=torch.float64, heads=4, kv_heads=2, dim=5, **options):
    layout = build_layout(torch.tensor([[2, 5, 0], [1, 3, 6]]), torch.tensor([7, 8]), 3, num_tokens=9, **options)
    generator = torch.Generator().manual_seed(0)
    T = layout.position.shape[1]
    q, k, v = (
        torch.randn(2, h, T, dim, dtype=dtype, generator=generator).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v, layout.rule


def loop(q, k, v, rule, window, softcap, sinks):
    B, Hq, T, D = q.shape
    mask = span_mask(*rule, window=window)
    out = torch.zeros(B, T, Hq, D, dtype=q.dtype)
    for b in range(B):
        for h in range(Hq):
            g = h // (Hq // k.shape[1])
            for r in range(T):
                keys = mask[b, r].nonzero().flatten()
                if not len(keys):
                    continue
                score = k[b, g, keys] @ q[b, h, r] * SCALE
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                weight = score.exp()
                total = weight.sum() + (sinks[h].exp() if sinks is not None else 0)
                out[b, r, h] = weight / total @ v[b, g, keys]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_loop(window, softcap, with_sinks, bidirectional):
    q, k, v, rule = case(bidirectional=bidirectional)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64) if with_sinks else None
    out = span_attention(q, k, v, rule, Scoring(SCALE, window, softcap, sinks))
    torch.testing.assert_close(out, loop(q, k, v, rule, window, softcap, sinks), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("softcap", "bidirectional"), [(None, False), (0.8, True)])
def test_gradients(softcap, bidirectional):
    q, k, v, rule = case(heads=2, kv_heads=1, dim=2, bidirectional=bidirectional)
    sinks = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def f(q, k, v, sinks):
        return span_attention_reference(q, k, v, rule, Scoring(SCALE, window=4, softcap=softcap, sinks=sinks))

    assert torch.autograd.gradcheck(f, (q, k, v, sinks))


def test_autocast_computes_in_its_dtype():
    """Rotated queries and keys come in float32 beside values in autocast's dtype; the error is that of rounding."""
    q, k, v, rule = case(dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    mixed = [q, k, half[2]]
    want = span_attention(*half, rule, Scoring(SCALE))
    with torch.autocast("cpu", torch.bfloat16):
        out = span_attention(*mixed, rule, Scoring(SCALE))
    assert torch.equal(out, want)
    for x, got, other in zip(mixed, torch.autograd.grad(out.sum(), mixed), torch.autograd.grad(want.sum(), half)):
        assert got.dtype == x.dtype
        assert torch.equal(got, other.to(got.dtype))
    truth = span_attention(*(x.double() for x in half), rule, Scoring(SCALE))
    assert (out.double() - truth).abs().max() < 2**-7 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_keys_give_zero_and_no_gradient(dtype):
    q, k, v, rule = case(dtype=dtype)
    empty = ~span_mask(*rule).any(-1)
    assert empty.any()
    out = span_attention(q, k, v, rule, Scoring(SCALE))
    assert (out[empty] == 0).all()
    out.float().square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert (x.grad.transpose(1, 2)[empty] == 0).all()


def test_a_sink_alone_gives_zero():
    q, k, v, rule = case()
    out = span_attention(q, k, v, rule, Scoring(SCALE, sinks=torch.zeros(4, dtype=torch.float64)))
    assert (out[~span_mask(*rule).any(-1)] == 0).all()


def test_large_scores_do_not_overflow():
    q, k, v, rule = case(dtype=torch.float32)
    out = span_attention_reference(q * 1e4, k, v, rule, Scoring(1.0, sinks=torch.full((4,), math.log(2))))
    assert out.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_last_rows_alone(softcap, with_sinks):
    """Queries of the masks only: their rows and gradients, with the keys of the tokens as constants."""
    q, k, v, rule = case()
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64) if with_sinks else None
    scoring = Scoring(SCALE, 4, softcap, sinks)
    constant = [torch.cat([x[:, :, :9].detach(), x[:, :, 9:]], dim=2) for x in (k, v)]
    whole = span_attention(q, *constant, rule, scoring)[:, 9:]
    part = span_attention(q[:, :, 9:], k, v, rule, scoring)
    torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(whole.square().sum(), (q, k, v))
    for x, got, want in zip((q, k, v), torch.autograd.grad(part.square().sum(), (q, k, v)), wanted):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert x is q or not got[:, :, :9].any()
    assert not wanted[0][:, :, :9].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": slice(3)}, "Hkv"),
        *(({name: slice(4)}, r"each tensor of the rule must be \[B, T\]") for name in ("position", "prefix_end")),
        ({"span_end": slice(4)}, r"each tensor of the rule must be \[B, T\]"),
        ({"sinks": torch.zeros(1)}, r"sinks must be \[Hq\] = \[4\]; got \[1\]"),
        ({"window": 0}, "window must be 1 at least"),
    ],
)
def test_errors(change, message, monkeypatch):
    """Before any form is chosen: a kernel would read what is not there."""
    monkeypatch.setattr("mtpkern.kernels.span_attention.span_attention_reference", lambda *_, **__: None)
    q, k, v, rule = case(bidirectional=True)
    scoring = {name: x for name, x in change.items() if name in ("sinks", "window")}
    short = {name: x[:, change[name]] for name, x in rule._asdict().items() if name in change}
    with pytest.raises(ValueError, match=message):
        span_attention(q[:, change.get("query", slice(4))], k, v, rule._replace(**short), Scoring(SCALE, **scoring))
