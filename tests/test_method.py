"""The whole training step against the method's definition, and every option of the method has its effect.

The definition is written as slowly as possible: text by text, span by span, each pass a plain call of the model on one
text with the positions and the 4-D mask written out. The trainer's step (plan, layout, span attention, fused loss, the
counts over micro-batches, the optimizer) must give the same loss and the same new weights.
"""

import copy
from dataclasses import fields
from fractions import Fraction

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.trainer import MTPTrainer

V, MASK, EOS = 41, 40, 7
# Stop tokens that a random model predicts often, so that spans end early.
STOPS = [EOS, *range(30, 40)]
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def llama(**change):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **change))


def gemma():
    torch.manual_seed(0)
    layers = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **layers, final_logit_softcapping=3.0))


def near(model, noise=0.04):
    """A teacher that agrees with the student often, not always."""
    teacher, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in teacher.parameters():
            p += noise * torch.randn(p.shape, generator=generator)
    return teacher


def texts():
    """Of different lengths and prompts: two conversations of two answers, one token of answer, none."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": [1, *torch.randint(8, 30, (n - 2,), generator=generator).tolist(), EOS], "prompt_length": p}
        for n, p in ((17, 4), (12, 3), (18, 11), (16, 12), (9, 8), (6, 6))
    ]
    for row, earlier in ((rows[2], (2, 8)), (rows[3], (3, 5))):
        row["earlier_answers"] = [earlier]
        row["input_ids"][earlier[1] - 1] = EOS
    return rows


def config(path, **change):
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        # Plain gradient descent with rate 1: the step is the gradient.
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "k_min": 4,
        "k_max": 4,
        "num_spans": 3,
        "span_offset": 1,
        # As the longest text: nothing is cut.
        "max_length": 18,
    }
    return MTPConfig(str(path), **settings | change)


def trainer(path, model, teacher, **change):
    model.generation_config.eos_token_id = STOPS
    return MTPTrainer(
        model=model,
        teacher=teacher,
        args=config(path, **change),
        mask_token_id=MASK,
        train_dataset=texts(),
        data_collator=MTPCollator(0),
    )


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


@pytest.mark.parametrize("name", CASES)
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


BASE = {"k_min": 2, "k_max": 6, "num_spans": 2, "span_offset": None, "max_length": 14}
# One change for each option of the method; it must move the loss of the same steps on the same texts.
CHANGES = [
    {"k_min": 6},
    {"k_max": 5},
    {"k_scope": "rank"},
    {"num_spans": 1},
    {"spacing": "random"},
    {"span_offset": 0},
    {"offset_scope": "rank"},
    {"layout": "paper"},
    {"max_length": 11},
    {"response_only": False},
    {"eos_padding": False},
    {"teacher_target": "soft"},
    {"teacher_target": "gt"},
    {"gt_warmup_steps": 2},
    {"loss_support": "until_fail"},
    {"prefix_weight": 0.1},
    {"anchor_kl_weight": 0.1},
    {"bidirectional": True},
]
# What has no effect on the loss of a step, and the test that sees the effect it has.
ELSEWHERE = {
    "gated": "test_gated_trainer.py::test_learns_and_leaves_the_base_as_it_was",
    "prefix_memory": "test_gated_trainer.py::test_resumes_to_the_bit_and_keeping_prefixes_changes_none",
    "prefix_scope": "test_a_step_is_the_definitions",
    "pure_bf16": "test_trainer.py::test_pure_bf16_trains_and_freezes",
    "static_shape": "test_shape_only",
    "packing": "test_shape_only",
    "init_adapter": "test_gated_trainer.py::test_begins_with_an_adapter_of_a_folder",
    "lora_rank": "test_adapters_as_configured",
    "lora_alpha": "test_adapters_as_configured",
    "lora_targets": "test_adapters_as_configured",
    "student_dtype": "test_trainer.py::test_lora_teaches_itself_and_saves_a_plain_model",
    "teacher_dtype": "test_the_teacher_is_cast",
    "save_dtype": "test_trainer.py::test_saved_in_another_dtype",
    "activation_checkpointing": "test_trainer.py::test_checkpointing_by_its_new_and_its_former_name",
    "activation_checkpointing_kwargs": "test_trainer.py::test_checkpointing_by_its_new_and_its_former_name",
    "allow_changes": "test_resume.py::test_an_allowed_change_takes_effect_and_is_recorded",
    "data_seed": "test_order_of_the_data",
    "cuda_graph": "test_captured.py",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "test_compilation.py"),
    "ddp_find_unused_parameters": "test_distributed.py: every weight of DDP has a gradient",
    "remove_unused_columns": "every test: the collator gets prompt_length",
    "logging_nan_inf_filter": "test_trainer.py::test_loss_that_is_not_finite_stops_before_anything_is_saved",
}


def test_every_option_has_a_test():
    ours = {f.name for f in fields(MTPConfig) if f.name in vars(MTPConfig)["__annotations__"]}
    assert ours == {name for change in CHANGES for name in change} | set(ELSEWHERE)


def step_losses(run, change):
    """The losses of eight steps, without any update between them, and the rows of a text."""
    # Not a new MTPConfig: that would take away accelerate's state from under the trainer.
    before, run.args = run.args, copy.copy(run.args)
    vars(run.args).update(change)
    batch, found = MTPCollator(0)(texts()), []
    run.model.train()
    for step in range(8):
        run.state.global_step = step
        (plan,), counts = run.get_batch_samples(iter([batch]), 1, run.args.device)
        with torch.no_grad(), run._span_attention(run.model, plan) as inputs:
            found.append(run.compute_loss(run.model, inputs, num_items_in_batch=counts).item())
    run.args = before
    return found, plan["layout"].position.shape


@pytest.fixture
def plain_run(tmp_path):
    run = trainer(tmp_path, llama(), near(llama()), **BASE)
    return run, *step_losses(run, {})


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(map(str, *change.items())))
def test_an_option_changes_the_loss(plain_run, change):
    run, plain, _ = plain_run
    changed, _ = step_losses(run, change)
    assert changed != pytest.approx(plain, rel=1e-3)
    if change == {"gt_warmup_steps": 2}:
        assert changed[2] == plain[2]


@pytest.mark.parametrize("change", [{"static_shape": True}, {"packing": True}])
def test_shape_only(plain_run, change):
    run, plain, shape = plain_run
    changed, other = step_losses(run, change)
    assert other != shape
    assert changed == pytest.approx(plain, rel=1e-5)


def test_spans_are_drawn_anew(tmp_path):
    """For each step, micro-batch, rank and seed, and never from the global random state."""
    run = trainer(tmp_path, llama(), near(llama()), **BASE | {"spacing": "random"})
    batch = MTPCollator(0)(texts() * 3)

    def draw(step=0, micro_step=0, **change):
        before, run.args = run.args, copy.copy(run.args)
        vars(run.args).update(change)
        torch.manual_seed(step + micro_step)
        prefix = run.plan(batch, k=3, step=step, micro_step=micro_step)["layout"].prefix
        run.args = before
        return prefix.tolist()

    assert draw() == draw()
    changed = [draw(), draw(step=1), draw(micro_step=1), draw(seed=1)]
    assert len({str(x) for x in changed}) == 4
    torch.manual_seed(9)
    assert draw() == changed[0]


def test_adapters_as_configured(tmp_path):
    run = trainer(tmp_path, llama(), None, lora_rank=2, lora_alpha=3, lora_targets="q_proj, down_proj")
    layers = {name: m for name, m in run.model.named_modules() if hasattr(m, "lora_A")}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "down_proj"}
    assert len(layers) == 4
    for layer in layers.values():
        assert layer.lora_A["default"].weight.shape[0] == 2
        assert layer.scaling["default"] == 1.5
    torch.manual_seed(1)
    whole = trainer(tmp_path, llama(), None, lora_rank=2)
    torch.manual_seed(2)
    again = trainer(tmp_path, llama(), None, lora_rank=2)
    other = trainer(tmp_path, llama(), None, lora_rank=2, seed=1)
    layers = {name: m for name, m in whole.model.named_modules() if hasattr(m, "lora_A")}
    for name in layers:
        first, second, third = (
            m.get_submodule(name).lora_A["default"].weight for m in (whole.model, again.model, other.model)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    assert len(layers) == 14
    assert {m.scaling["default"] for m in layers.values()} == {2.0}


def test_the_teacher_is_cast(tmp_path):
    for dtype, want in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        run = trainer(tmp_path, llama(), near(llama()), teacher_dtype=dtype)
        assert run.teacher.dtype == want
        assert run.model.dtype == torch.float32
        assert not any(p.requires_grad for p in run.teacher.parameters())


def test_order_of_the_data(tmp_path):
    def order(**change):
        run = trainer(tmp_path, llama(), None, teacher_target="gt", **change)
        torch.manual_seed(len(change))
        return [length for batch in run.get_train_dataloader() for length in batch["lengths"]]

    assert order() == order(data_seed=42) == order(seed=42)
    assert order(data_seed=1) != order()
    assert order(data_seed=1) == order(seed=1) == order(seed=5, data_seed=1)
