"""Training of a gated adapter against its definition: one joint pass of all rows, adapters in the mask rows only."""

import pytest
import torch

from mtpkern.adapter import gate_of
from mtpkern.attention import attention_context
from mtpkern.train.gated import BehindPrefixContext, gated_loss
from mtpkern.train.layout import build_layout, pack
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.objective import Objective, SpanContext, backbone, gather_rows, within_text
from mtpkern.train.prefix import Prefixes, texts_of
from support.slow import slow_but
from support.three_layers import EOS, EOS_IDS, V, gemma, llama

K = 4


def tied():
    return llama(tie_word_embeddings=True)


def adapted(make):
    """A model with adapters that do something, and its untouched twin."""
    peft_model = add_gated_lora(make(), rank=4, k_max=K)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=generator)
    return peft_model, make()


def batch(shape="padded"):
    """Two texts with five spans, one of which is missing: padded, with spare mask rows, or packed in one row."""
    torch.manual_seed(1)
    lengths = torch.tensor([14, 11])
    tokens = torch.randint(10, 59, (2, 15))
    for b, n in enumerate(lengths):
        tokens[b, n - 1] = EOS
        tokens[b, n:] = 0
    prefix = torch.tensor([[3, 8, 12], [2, 6, 0]])
    layout = build_layout(prefix, lengths, K, num_tokens=15, mask_rows=15 if shape == "static" else None)
    if shape == "packed":
        layout, (tokens,) = pack(layout, tokens)
    return tokens, layout


def run(peft_model, tokens, layout, texts=None, **options):
    model = peft_model.get_base_model()
    context = BehindPrefixContext(layout, texts)
    with attention_context(model, context), gate_of(model).open_for_training():
        kept = {name: options.pop(name) for name in ("prefixes", "kept") if name in options}
        objective = Objective(EOS_IDS, **{"target": "gt", "loss_support": "until_fail"} | options)
        sums = gated_loss(model, tokens, context, objective, **kept)
        sums.span.backward()
    return sums


def gradients(peft_model):
    found = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    for p in peft_model.parameters():
        p.grad = None
    return found


def joint(peft_model, tokens, layout, **options):
    """All rows in one pass with autograd through everything, and the loss written out."""
    model = peft_model.get_base_model()
    gate = gate_of(model)
    context = SpanContext(layout)
    ids = layout.fill(tokens, gate.mask_token_id)
    with attention_context(model, context), gate.open(ids == gate.mask_token_id):
        states = backbone(model, ids, context)
    logits = (gather_rows(states, layout.row) @ model.get_output_embeddings().weight.T).view(*layout.row.shape, -1)
    said = logits.argmax(-1)
    if options.get("target", "gt") == "gt":
        index = layout.prefix.unsqueeze(-1) + torch.arange(K)
        label = tokens.gather(1, torch.minimum(index, layout.end.unsqueeze(-1) - 1).flatten(1)).view_as(index)
        keep = layout.valid.clone()
        log_q = None
    else:
        fed = layout.fill(tokens, said[..., :-1])
        with torch.no_grad(), attention_context(model, context):
            scored = gather_rows(backbone(model, fed, context), layout.row)
            log_q = (scored @ model.get_output_embeddings().weight.T).log_softmax(-1).view_as(logits)
        label = log_q.argmax(-1)
        keep = layout.valid & ((said == EOS).cumsum(-1) - (said == EOS).int() == 0)
    if not options.get("eos_padding", True):
        keep &= within_text(layout)
    agree = (said == label)[..., 1:] & keep[..., 1:]
    support = keep[..., 1:]
    if options.get("loss_support", "until_fail") == "until_fail":
        right_before = torch.cat([torch.ones_like(agree[..., :1]), agree[..., :-1]], dim=-1).cumprod(-1).bool()
        support = support & right_before
    log_p = logits[..., 1:, :].log_softmax(-1)
    if options.get("target") == "soft":
        losses = (log_q[..., 1:, :].exp() * (log_q[..., 1:, :] - log_p)).sum(-1)
    else:
        losses = -log_p.gather(-1, label[..., 1:, None]).squeeze(-1)
    loss = losses[support].sum()
    loss.backward()
    return loss, agree, keep[..., 1:]


def assert_equal(peft_model, sums, want):
    """Sums and gradients are those of the joint pass."""
    (loss, agree, keep), wanted = want
    torch.testing.assert_close(sums.span, loss, rtol=1e-5, atol=1e-5)
    assert sums.rows[1:].tolist() == keep.float().sum((0, 1)).tolist()
    assert sums.agree[1:].tolist() == agree.float().sum((0, 1)).tolist()
    assert sums.rows[0] == sums.agree[0] == 0
    found = gradients(peft_model)
    assert found.keys() == wanted.keys()
    assert found["mask_row"].abs().sum() > 0
    for name, x in found.items():
        torch.testing.assert_close(x, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def assert_equals_one_joint_pass(make, shape, options):
    """With nothing kept, with one of two texts kept, and with both."""
    peft_model, _ = adapted(make)
    tokens, layout = batch(shape)
    want = joint(peft_model, tokens, layout, **options), gradients(peft_model)
    assert_equal(peft_model, run(peft_model, tokens, layout, **options), want)
    texts = texts_of(layout, tokens.shape[1], [b"first", b"second"])
    prefixes = Prefixes(2**30, states=options.get("target", "gt") != "gt")
    with gate_of(peft_model.get_base_model()).closed():
        prefixes.of(peft_model.get_base_model(), tokens, texts[:1])
    for kept in (1, 2):
        assert len(prefixes) == kept
        assert_equal(peft_model, run(peft_model, tokens, layout, texts, prefixes=prefixes, **options), want)


@pytest.mark.parametrize("make", slow_but([llama, tied, gemma], llama))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_support": "all"},
        {"target": "hard", "loss_support": "all"},
        {"target": "hard"},
        {"target": "soft", "loss_support": "all"},
    ],
)
def test_equals_one_joint_pass(make, options):
    assert_equals_one_joint_pass(make, "padded", options)


@pytest.mark.parametrize("shape", ["static", "packed"])
@pytest.mark.parametrize("target", ["gt", "hard", "soft"])
def test_every_layout_equals_one_joint_pass(shape, target):
    options = {"target": target, "loss_support": "all"}
    assert_equals_one_joint_pass(gemma, shape, options)
    assert_equals_one_joint_pass(gemma, shape, {**options, "eos_padding": False})


@pytest.mark.parametrize("make", [llama, tied, gemma])
def test_a_closed_gate_is_the_base(make):
    peft_model, base = adapted(make)
    tokens = torch.randint(1, V, (2, 9))
    want = base(tokens).logits
    assert torch.equal(peft_model.get_base_model()(tokens).logits, want)
    assert torch.equal(peft_model(tokens).logits, want)
