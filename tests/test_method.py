"""A training step is the paper's definition."""

import copy
from fractions import Fraction

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from support.paper import MASK, SHAPE, STOPS, llama, near, texts, trainer
from support.slow import slow_but


def gemma():
    torch.manual_seed(0)
    layers = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **layers, final_logit_softcapping=3.0))


def answers_of(text, n):
    """Of the first n tokens of a text those in answers: {index: index behind the answer's last}."""
    ranges = [*text.get("earlier_answers", ()), (text["prompt_length"], n)]
    return {t: min(end, n) for start, end in ranges for t in range(start, min(end, n))}


def prefixes_of(may, args, k):
    """Where spans stand: one for each region, counted through the tokens that a span may predict first.

    M regions share these evenly; in the paper's sequences each has N/M rows, masks included.
    """
    if args.layout == "paper" and not args.response_only:
        apart = Fraction(args.max_length // args.num_spans - (k - 1))
    else:
        apart = max(Fraction(1), Fraction(len(may), args.num_spans))
    first = args.span_offset % max(1, min(apart, len(may)))
    found = [first + m * apart for m in range(args.num_spans) if first + m * apart < len(may)]
    found = [int(i) for i in found]
    # The first span that reaches the last of them is the text's last.
    return [sorted(may)[i] for i, before in zip(found, [-k, *found]) if before + k < len(may)]


def log_probabilities(model, ids, both_ways_from=None):
    """[T, V] of one text, the mask token never predicted; rows from both_ways_from on see one another."""
    total = len(ids)
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    if both_ways_from is not None:
        visible[both_ways_from:, both_ways_from:] = True
    window = getattr(model.config, "sliding_window", None)
    distance = torch.arange(total)[:, None] - torch.arange(total)
    masks = {"full_attention": visible, "sliding_attention": visible & (distance < (window or total))}
    masks = {name: torch.zeros(1, 1, total, total).masked_fill(~m, -1e9) for name, m in masks.items()}
    mask = masks if window else masks["full_attention"]
    position = torch.arange(total)[None]
    z = model(torch.tensor([ids]), attention_mask=mask, position_ids=position, use_cache=False).logits[0]
    return z.index_fill(1, torch.tensor(MASK), -1e9).log_softmax(-1)


def divergence(q, p):
    """KL(q || p) of log-probabilities, q the teacher's."""
    return (q.exp() * (q - p)).sum()


def definition(student, teacher, args, k):
    """The loss of one step over all texts, and how many rows were dropped behind EOS or a miss."""
    span = prefix = anchor = torch.zeros(())
    rows = answers = prefixes = dropped = 0
    for text in texts():
        ids = text["input_ids"]
        limit = args.max_length or len(ids)
        if args.layout == "paper":
            limit -= args.num_spans * (k - 1)
        ids = ids[:limit]
        n = len(ids)
        answer = answers_of(text, n)
        may = answer if args.response_only else dict.fromkeys(range(1, n), n)
        for i in prefixes_of(may, args, k):
            rows += k
            end = may[i]
            own = log_probabilities(student, ids[:i] + [MASK] * (k - 1), i - 1 if args.bidirectional else None)[i - 1 :]
            said = own.argmax(-1).tolist()
            if args.teacher_target != "gt":
                with torch.no_grad():
                    scored = teacher(ids[:i] + said[: k - 1])[i - 1 :]
            for j in range(k):
                if i + j >= end and not args.eos_padding:
                    dropped += k - j
                    break
                if args.teacher_target == "gt":
                    if i + j >= end and ids[end - 1] not in STOPS:
                        dropped += k - j
                        break
                    wanted = ids[min(i + j, end - 1)]
                else:
                    wanted = int(scored[j].argmax())
                span = span + (divergence(scored[j], own[j]) if args.teacher_target == "soft" else -own[j, wanted])
                ended = args.teacher_target != "gt" and said[j] in STOPS
                missed = args.loss_support == "until_fail" and said[j] != wanted
                if ended or missed:
                    dropped += k - j - 1
                    break
        ours = log_probabilities(student, ids)
        with torch.no_grad():
            theirs = teacher(ids)
        for t in answer:
            # The row before a token predicts it.
            answers += 1
            anchor = anchor + divergence(theirs[t - 1], ours[t - 1])
        for t in answer if args.prefix_scope == "answer" else range(1, n):
            prefixes += 1
            prefix = prefix - ours[t - 1, ids[t]]
    text_loss = args.prefix_weight * prefix / prefixes + args.anchor_kl_weight * anchor / answers
    return span / rows + text_loss, dropped


CASES = {
    "the paper's": {},
    "the paper's layout, whole text": {"layout": "paper", "max_length": 24, "response_only": False},
    "soft, prefix loss and anchor": {"teacher_target": "soft", "prefix_weight": 0.3, "anchor_kl_weight": 0.7},
    "data and anchor, until the first miss": {
        "teacher_target": "gt",
        "loss_support": "until_fail",
        "anchor_kl_weight": 0.5,
    },
    "data, cut off": {"teacher_target": "gt", "max_length": 10, "k_min": 3, "k_max": 3, "span_offset": 4},
    "until the first miss, both ways": {"loss_support": "until_fail", "bidirectional": True, "span_offset": 5},
    "regions narrower than a span": {"num_spans": 6, "span_offset": 8},
    "prefix loss on the prompt too, anchor on the answer": {
        "prefix_scope": "all",
        "prefix_weight": 0.6,
        "anchor_kl_weight": 0.3,
    },
    "soft, both ways, padded": {"teacher_target": "soft", "bidirectional": True, "static_shape": True, "k_max": 5},
    "packed, nothing behind the text": {
        "packing": True,
        "eos_padding": False,
        "prefix_weight": 0.4,
        "teacher_target": "gt",
        "span_offset": 8,
    },
    # Spans longer than the window of 4.
    "windows": {"model": gemma, "teacher_target": "soft", "anchor_kl_weight": 0.2, "k_min": 6, "k_max": 6},
    "adapters": {"lora_rank": 2, "anchor_kl_weight": 0.5, "teacher_target": "soft"},
}


QUICK = ("the paper's", "soft, both ways, padded", "packed, nothing behind the text", "windows", "adapters")


@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_a_step_is_the_definitions(tmp_path, name):
    change = dict(CASES[name])
    model = change.pop("model", llama)()
    teacher = None if "lora_rank" in change else near(model)
    run = trainer(tmp_path, model, teacher, **change)
    slow = copy.deepcopy(run.model)

    def teach(ids):
        if teacher is not None:
            return log_probabilities(teacher, ids)
        with slow.disable_adapter():
            return log_probabilities(slow, ids)

    if teacher is None:
        # Adapters that do something: else student and teacher are the same.
        generator = torch.Generator().manual_seed(3)
        for (parameter_name, p), q in zip(run.model.named_parameters(), slow.parameters()):
            if "lora_B" in parameter_name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
                q.data = p.data.clone()
    want, dropped = definition(slow, teach, run.args, k=run.draw_k(0))
    assert dropped
    trained = {key: p for key, p in slow.named_parameters() if p.requires_grad}
    grads = dict(zip(trained, torch.autograd.grad(want, list(trained.values()))))
    run.train()
    torch.testing.assert_close(run.state.log_history[0]["loss"], want.item(), rtol=1e-5, atol=1e-5)
    for key, p in run.model.named_parameters():
        if p.requires_grad:
            assert grads[key].abs().max() > 1e-4
            torch.testing.assert_close(p.detach(), trained[key].detach() - grads[key], rtol=1e-4, atol=2e-6, msg=key)


def test_defaults_are_the_papers(tmp_path):
    """Those of the method; where the project departs from the paper (layout, response_only) MTPConfig says so."""
    args = MTPConfig(str(tmp_path), use_cpu=True)
    paper = {
        "k_min": 2,
        "k_max": 16,
        "k_scope": "step",
        "num_spans": None,
        "spacing": "stride",
        "span_offset": None,
        "offset_scope": "sequence",
        "teacher_target": "hard",
        "loss_support": "all",
        "gt_warmup_steps": 0,
        "prefix_weight": 0,
        "anchor_kl_weight": 0,
        "bidirectional": False,
        "eos_padding": True,
    }
    assert {name: getattr(args, name) for name in paper} == paper


def test_the_papers_sequence_of_160_rows(tmp_path):
    """Five spans, N / (2 k_max), at every k; at k = 16 that is 85 tokens and 75 masks."""
    run = trainer(
        tmp_path, llama(), near(llama()), layout="paper", max_length=160, k_min=2, k_max=16, num_spans=None,
        span_offset=None, response_only=False,
    )  # fmt: skip
    batch = MTPCollator(0)([{"input_ids": [9] * 200, "prompt_length": 30}] * 3)
    for k in range(2, 17):
        plan = run.plan(batch, k=k, step=0, micro_step=0)
        layout = plan["layout"]
        assert plan["input_ids"].shape == (3, 160 - 5 * (k - 1))
        assert layout.position.shape == (3, 160)
        for prefix in layout.prefix.tolist():
            apart, tokens = 32 - (k - 1), plan["input_ids"].shape[1]
            assert 1 <= prefix[0] <= apart
            assert prefix == [i if i < tokens else 0 for i in range(prefix[0], prefix[0] + 5 * apart, apart)]
        # Every sequence has an offset of its own.
        assert len({tuple(prefix) for prefix in layout.prefix.tolist()}) > 1
    assert plan["input_ids"].shape[1] == 85
