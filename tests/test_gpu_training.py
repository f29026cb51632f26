"""Training on a GPU: the same steps, which wait for nothing."""

import itertools
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from mtpkern.adapter import gate_of
from mtpkern.attention import attention_context
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.gated import BehindPrefixContext, gated_loss
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.layout import build_layout
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.objective import Objective, SpanContext, mtp_loss
from mtpkern.train.prefix import texts_of
from mtpkern.train.trainer import MTPTrainer
from support.training_ops import DEVICE, no_sync

pytestmark = pytest.mark.gpu


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
