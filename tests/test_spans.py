"""Spans that an evaluation keeps: the teacher's loss on each against plain calls of the teacher, and the file."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.adapter import gate_of
from mtpkern.attention import attention_context
from mtpkern.train.gated import BehindPrefixContext, gated_loss
from mtpkern.train.layout import build_layout
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.objective import Objective, SpanContext, mtp_loss
from mtpkern.train.spans import MOST, KeptSpans
from support.trained import data, trainer

V, MASK, EOS, K = 61, 60, 7, 3


def llama(seed):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, initializer_range=0.3, **shape)).eval()


class Seen(KeptSpans):
    def take(self, token, confidence, keep, wanted, head):
        self.token, self.keep = token, keep
        super().take(token, confidence, keep, wanted, head)


@pytest.fixture
def kept():
    student, teacher = llama(0), llama(1)
    tokens = torch.randint(8, 50, (2, 12), generator=torch.Generator().manual_seed(2))
    prefix = torch.tensor([[2, 6], [3, 9]])
    layout = build_layout(prefix, torch.tensor([12, 12]), K, num_tokens=12)
    context, seen = SpanContext(layout), Seen()
    with attention_context(student, context):
        mtp_loss(student, teacher, tokens, context, Objective(torch.tensor([EOS])), mask_token_id=MASK, kept=seen)
    return seen, teacher, tokens, layout


def test_the_teachers_loss_is_that_of_plain_calls(kept):
    seen, teacher, tokens, layout = kept
    whole = [(b, m) for b in range(2) for m in range(2) if seen.keep[b, m].all()]
    assert len(whole) == len(seen.teacher_loss) == len(seen.confidence) > 1
    for (b, m), losses in zip(whole, seen.teacher_loss, strict=True):
        n, span = int(layout.prefix[b, m]), seen.token[b, m]
        with torch.no_grad():
            logits = teacher(torch.cat([tokens[b, :n], span])[None]).logits[0, n - 1 : -1]
        logits[:, MASK] = -torch.inf  # no token of the teacher's either
        expected = torch.nn.functional.cross_entropy(logits, span, reduction="none")
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-4, atol=1e-4)
    assert all(0 < c <= 1 for span in seen.confidence for c in span)


@pytest.mark.parametrize("target", ["hard", "gt"])
def test_of_a_gated_adapter_the_base_is_the_teacher(target):
    base = llama(0)
    model = add_gated_lora(llama(0), rank=2, k_max=K)
    tokens = torch.randint(8, 50, (1, 12), generator=torch.Generator().manual_seed(2))
    layout = build_layout(torch.tensor([[2, 6]]), torch.tensor([12]), K, num_tokens=12)
    context, seen, core = BehindPrefixContext(layout), Seen(), model.get_base_model()
    with attention_context(core, context), gate_of(core).open_for_training():
        gated_loss(core, tokens, context, Objective(torch.tensor([EOS]), target), kept=seen)
    whole = [m for m in range(2) if seen.keep[0, m].all()]
    assert len(whole) == len(seen.teacher_loss) > 0
    for m, losses in zip(whole, seen.teacher_loss, strict=True):
        n, said = int(layout.prefix[0, m]), seen.token[0, m]
        with torch.no_grad():
            own = base(tokens[:, :n]).logits[0, -1:].argmax(-1) if target == "hard" else tokens[0, n : n + 1]
            logits = base(torch.cat([tokens[0, :n], own, said])[None]).logits[0, n:-1]
        expected = torch.nn.functional.cross_entropy(logits, said, reduction="none")
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-4, atol=1e-4)


def test_no_more_than_so_many(kept):
    seen = kept[0]
    hidden, head = torch.randn(MOST * 2 * K, 32), type("Head", (), {"logits": lambda self, x: x})()
    shape = (MOST, 2, K)
    many = KeptSpans()
    for _ in range(2):
        many.take(torch.zeros(shape, dtype=torch.long), torch.ones(shape), torch.ones(shape).bool(), hidden, head)
    assert len(many.teacher_loss) == len(many.confidence) == MOST
    half = KeptSpans()
    half.take(seen.token, torch.ones(seen.token.shape), torch.zeros(seen.token.shape).bool(), hidden, head)
    assert not half.confidence


def test_the_file_goes_on_and_back(tmp_path):
    for step, confidence in ((10, 0.5), (20, 0.6), (20, 0.7), (30, 0.8)):
        KeptSpans([[confidence]], [[1.0]]).write(tmp_path, step)
    KeptSpans().write(tmp_path, 40)
    lines = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    assert [(line["step"], line["confidence"]) for line in lines] == [(10, [0.5]), (20, [0.7]), (30, [0.8])]


def test_an_evaluation_writes_them(tmp_path):
    def written(name, **options):
        trainer(tmp_path / name, **options).evaluate()
        return [json.loads(line) for line in (tmp_path / name / "spans.jsonl").read_text().splitlines()]

    kept = written("hard")
    assert kept
    assert all(len(one["confidence"]) == len(one["teacher_loss"]) == 4 for one in kept)
    # Of several data sets those of each.
    one, other = data(2), data(4)[2:]
    assert written("both", held={"one": one, "other": other}) == written("one", held=one) + written("other", held=other)
    # Nobody reads the student's spans where the data is the target.
    trainer(tmp_path / "gt", teacher_target="gt").evaluate()
    assert not (tmp_path / "gt" / "spans.jsonl").exists()
