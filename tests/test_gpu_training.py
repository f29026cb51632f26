"""The ops of training on hardware: errors, repeatability, memory nobody wrote, host syncs, variants, a step."""

import itertools
import warnings
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from mtpkern.adapter import gate_of
from mtpkern.attention import attention_context
from mtpkern.kernels import distill, span_attention
from mtpkern.kernels.distill import Head, distill_loss, distill_loss_reference, head_readout
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_mask import Rule, span_mask
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.gated import BehindPrefixContext, gated_loss
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.layout import build_layout, draw_prefixes
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.objective import Objective, SpanContext, mtp_loss
from mtpkern.train.prefix import texts_of
from mtpkern.train.trainer import MTPTrainer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@contextmanager
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def gradients(form, leaves, d_out, rule, dtype=None, **options):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    sinks = leaves[3] if len(leaves) == 4 else None
    out = form(*leaves[:3], Rule(*rule), Scoring(sinks=sinks, **options))
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


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
    whole, alone = (head_readout(hidden.detach()[part], head, rows) for part in (slice(None), tail))
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


def tiny_models(name, **settings):
    """A student and a teacher of two layers whose text varies, the same on every machine."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **sizes, **settings)
    return [AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2)]


MODELS = {
    "qwen3": {},  # hands over queries and keys in float32 under autocast
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
}


def train(models, device, target="hard", *, autocast=False, checkpointing=False, watch=False):
    """Sums and gradients of one step on ragged texts."""
    student, teacher = (model.to(device).train() for model in models)
    if checkpointing:
        student.gradient_checkpointing_enable()
    prefix = torch.tensor([[3, 9, 20, 31], [2, 11, 17, 0]])
    layout = build_layout(prefix, torch.tensor([34, 21]), 5, num_tokens=34).to(device)
    tokens = torch.randint(1, 60, (2, 34), generator=torch.Generator().manual_seed(1)).to(device)
    eos = torch.tensor([0], device=device)

    def step():
        student.zero_grad()
        context = SpanContext(layout)
        with attention_context(student, context):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                sums = mtp_loss(student, teacher, tokens, context, Objective(eos, target), mask_token_id=60)
            sums.span.backward()
        return sums

    sums = step()
    if watch:
        with no_sync():
            sums = step()
    if checkpointing:
        student.gradient_checkpointing_disable()
    # Copies: a model that moves takes its gradients along.
    return sums.span.detach().cpu(), [x.grad.to("cpu", copy=True) for x in student.parameters()]


@pytest.mark.parametrize(("name", "target"), itertools.product(MODELS, ("hard", "soft")))
def test_a_training_step_equals_the_torch_path(name, target):
    """In float32: kernels on the GPU, their torch forms on the CPU."""
    models = tiny_models(name, **MODELS[name])
    want, want_grads = train(models, "cpu", target)
    loss, grads = train(models, DEVICE, target)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_and_activation_checkpointing(name):
    """The second forward of checkpointing repeats the first; bf16 stays near float32; no step waits for the device."""
    models = tiny_models(name, **MODELS[name])
    exact, exact_grads = train(models, DEVICE, "soft")
    loss, grads = train(models, DEVICE, "soft", autocast=True, watch=True)
    again, again_grads = train(models, DEVICE, "soft", autocast=True, checkpointing=True, watch=True)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    for a, b, e in zip(again_grads, grads, exact_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)
        assert torch.nn.functional.cosine_similarity(b.flatten(), e.flatten(), dim=0) > 0.9


def gated_step(name, device, **options):
    """Sums and gradients of one gated step on ragged texts, from the same start on every device."""
    peft_model = add_gated_lora(tiny_models(name, **MODELS[name])[0], rank=4, k_max=5, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, parameter in peft_model.named_parameters():
            if "lora_B" in n:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model = peft_model.to(device).get_base_model()
    layout = build_layout(torch.tensor([[3, 9, 20, 31], [2, 11, 17, 0]]), torch.tensor([34, 21]), 5, num_tokens=34)
    tokens = torch.randint(1, 60, (2, 34), generator=torch.Generator().manual_seed(1)).to(device)
    context = BehindPrefixContext(layout.to(device), texts_of(layout, 34))
    with attention_context(model, context), gate_of(model).open_for_training():
        objective = Objective(
            **{"target": "gt", "loss_support": "until_fail"} | options, eos_token_ids=torch.tensor([0], device=device)
        )
        sums = gated_loss(model, tokens, context, objective)
        sums.span.backward()
    gradients = [x.grad.to("cpu", copy=True) for x in peft_model.parameters() if x.requires_grad]
    return sums.span.detach().cpu(), gradients


@pytest.mark.parametrize(("name", "target"), itertools.product(MODELS, ("gt", "hard", "soft")))
def test_a_gated_step_equals_the_torch_path(name, target):
    """In float32: the mask rows through the kernel for the last rows, the prefixes of all texts in one row."""
    want, want_grads = gated_step(name, "cpu", target=target)
    loss, grads = gated_step(name, DEVICE, target=target)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)


class WatchSteps(TrainerCallback):
    """From the start of the fifth step to the end of the seventh, waiting for the device is an error."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "change",
    [{}, {"packing": True}, {"torch_compile": True}, {"gated": True, "lora_rank": 4}],
    ids=["plain", "packed", "compiled", "gated"],
)
def test_the_trainers_loop_waits_for_nothing(tmp_path, change):
    """Between two logs: loading, drawing, micro-batches, clipping and optimizer; k and lengths differ every step."""
    student, teacher = tiny_models("qwen3")
    student.config.eos_token_id = 0
    texts = [{"input_ids": [1 + (i + j) % 50 for j in range(20 + i % 9)], "prompt_length": 3} for i in range(64)]
    options = {"max_steps": 8, "logging_steps": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    of_kind = (GatedTrainer, {}) if "gated" in change else (MTPTrainer, {"teacher": teacher, "mask_token_id": 60})
    run = of_kind[0](
        model=student,
        **of_kind[1],
        args=MTPConfig(str(tmp_path), k_max=6, num_spans=3, bf16=True, save_strategy="no", **options, **change),
        train_dataset=texts,
        data_collator=MTPCollator(0),
        callbacks=[WatchSteps()],
    )
    try:
        run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.state.global_step == 8


class WatchReplays(TrainerCallback):
    """From the start of the ninth step to the end of the twelfth, when every shape has its graph."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 8:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 12:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True], ids=["layers as they are", "layers compiled"])
def test_replayed_steps_train_the_same_and_wait_for_nothing(tmp_path, compiled):
    """Ragged texts, one k and two numbers of texts; frozen weights narrow, as the command loads them."""
    logged = []
    texts = [{"input_ids": [1 + (i + j) % 50 for j in range(20 + i % 9)], "prompt_length": 3} for i in range(32)]
    for graphs in (False, True):
        student = tiny_models("qwen3")[0].to(torch.bfloat16)
        student.config.eos_token_id = 0
        run = GatedTrainer(
            model=student,
            args=MTPConfig(
                str(tmp_path),
                gated=True,
                lora_rank=4,
                k_min=5,
                k_max=5,
                num_spans=3,
                spacing="random",
                bf16=True,
                max_steps=12,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                logging_steps=12,
                save_strategy="no",
                torch_compile=compiled,
                student_dtype="bfloat16",
                cuda_graph=graphs,
            ),
            train_dataset=texts,
            data_collator=MTPCollator(0),
            callbacks=[WatchReplays()] if graphs else [],
        )
        assert run.args.student_dtype == "bfloat16"
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                run.train()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        logged.append(next(x["loss"] for x in run.state.log_history if "loss" in x))
    assert logged[1] == pytest.approx(logged[0], rel=2e-2)
