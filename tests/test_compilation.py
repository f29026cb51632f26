"""Compiled decoder layers: the same training, few forms, and nothing left behind between the steps."""

import os

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback, TrainingArguments

from mtpkern.train import config
from mtpkern.train.arithmetic import build_tokenizer
from mtpkern.train.compilation import CompiledLayers
from mtpkern.train.config import MTPConfig
from mtpkern.train.evaluate import HeldOut
from support import trained
from support.trained import EOS, losses

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def llama(seed=0, layers=3):
    return trained.llama(seed, num_hidden_layers=layers)


def rows(n=23):
    """Of many lengths."""
    return [
        {"input_ids": [1, *(8 + (i + j) % 30 for j in range(5 + 7 * i % 40)), EOS], "prompt_length": 3}
        for i in range(n)
    ]


def trainer(path, model=None, **change):
    """Of layers that make nine steps of many k and lengths."""
    options = {"max_steps": 9, "per_device_train_batch_size": 3, "save_strategy": "no", "k_max": 16, "num_spans": 2}
    options |= {"lr_scheduler_type": "linear", "spacing": "stride"}
    teacher = None if change.get("lora_rank") else llama(3)
    return trained.trainer(path, model or llama(), teacher, train=rows(), held=rows(4), **options | change)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_layers_train_the_same(tmp_path, backend):
    """Nine steps with evaluations and held-out prompts between them; two forms, of student and teacher, serve all."""
    held_out = HeldOut([[1, 9, 10], [1, 12]], ["1", "2"], build_tokenizer(), max_new_tokens=6)
    options = {"eval_strategy": "steps", "eval_steps": 4}
    runs = {}
    for name, change in {"plain": {}, "compiled": {"torch_compile_backend": backend}}.items():
        runs[name] = trainer(tmp_path / name, held_out=held_out, **options, **change)
        runs[name].train()
    plain, compiled = runs.values()
    assert compiled.args.torch_compile
    assert counters["stats"]["unique_graphs"] == 2
    assert losses(plain) == pytest.approx(losses(compiled), abs=1e-5)
    decoded = [[x["eval_tokens_per_pass"] for x in run.state.log_history if "eval_loss" in x] for run in runs.values()]
    assert len(decoded[0]) == 3
    assert decoded[0] == decoded[1]
    assert not any("forward" in vars(module) for module in compiled.model.model.modules())
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    for a, b in zip(plain.model.parameters(), compiled.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.slow("compilation::test_compiled_layers_train_the_same")
def test_adapters_and_activation_checkpointing(tmp_path):
    """The layers run again in backward, compiled. Up to the compiler's own work, which is not what is tested here."""
    options = {"lora_rank": 2, "activation_checkpointing": True, "max_steps": 3, "teacher_target": "gt"}
    plain = trainer(tmp_path, **options)
    compiled = trainer(tmp_path, **options, torch_compile_backend="eager")
    for run in (plain, compiled):
        run.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert losses(plain) == pytest.approx(losses(compiled), abs=1e-5)


@pytest.mark.slow("compilation::test_compiled_layers_train_the_same")
def test_gated_adapters_share_forms_too(tmp_path):
    """Steps of several k and lengths, prefixes kept and not: all layers and steps run what the first step has made.

    Up to the compiler's own work, which takes half a minute.
    """
    made, runs = [], {}

    class Counting(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            made.append(counters["stats"]["unique_graphs"])

    for name, change in {"plain": {}, "compiled": {"torch_compile_backend": "eager"}}.items():
        options = {"gated": True, "lora_rank": 2, "lora_targets": "q_proj,down_proj", "k_max": 8, "max_steps": 4}
        # Plain gradient descent: the weights show the gradients.
        options |= {"prefix_memory": 1e-4, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0}
        runs[name] = trainer(tmp_path / name, llama(layers=4), callbacks=[Counting()], **options | change)
        runs[name].train()
    plain, compiled = runs.values()
    assert made == [0] * 4 + [made[4]] * 4
    # Up to attention and behind it, in layer and attention module: without gradient for prefixes, with it for masks.
    assert 0 < made[4] <= 8
    (reason,) = counters["graph_break"]
    assert "mtpkern_attention" in reason
    assert losses(plain) == pytest.approx(losses(compiled), abs=1e-5)
    for (name, a), (_, b) in zip(plain.model.named_parameters(), compiled.model.named_parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)
    assert not any("forward" in vars(module) for module in compiled.model.get_base_model().model.layers)


def test_the_whole_model_is_never_wrapped(tmp_path, monkeypatch):
    """Neither by the flag, nor by what `accelerate launch` puts into the environment, nor by the parent's variables."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(ValueError, match="dynamo_backend is refused"):
        trainer(tmp_path)
    run = trainer(tmp_path, torch_compile_mode="default")
    assert run.args.torch_compile
    assert run.accelerator.prepare_model(run.model) is run.model
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    trainer(tmp_path, torch_compile=True)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    with pytest.raises(ValueError, match="CUDA graphs"):
        trainer(tmp_path, torch_compile_mode="reduce-overhead")
    with pytest.raises(ValueError, match="no decoder layers"):
        CompiledLayers(torch.nn.Linear(2, 2))


def test_what_nobody_asked_for_is_chosen_by_the_device(tmp_path, monkeypatch):
    """On a GPU layers are compiled, a frozen base is narrow and steps are graphs, unless something is against it."""

    def chosen(**options):
        args = MTPConfig(str(tmp_path), **options)
        return args.torch_compile, args.student_dtype, args.cuda_graph

    gated = {"gated": True, "lora_rank": 2}
    assert chosen(use_cpu=True, **gated) == (False, "float32", False)
    real = TrainingArguments.device.fget
    # Asked all the same, which sets up what knows of ranks.
    monkeypatch.setattr(MTPConfig, "device", property(lambda self: real(self) and torch.device("cuda")))
    monkeypatch.setattr(config, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True, raising=False)
    assert chosen(**gated) == (True, "float32", True)
    assert chosen(bf16=True, **gated) == (True, "bfloat16", True)
    assert chosen(bf16=True, student_dtype="float32", torch_compile=False, **gated) == (False, "float32", True)
    # Of other training nobody has measured it.
    assert chosen(bf16=True, lora_rank=2) == (False, "float32", False)
    assert chosen() == (False, "float32", False)
    for change in ({"prefix_memory": 1.0}, {"packing": True}, {"gradient_accumulation_steps": 2}):
        assert chosen(**gated, **change) == (True, "float32", False)
        with pytest.raises(ValueError, match=f"not with .*{next(iter(change))}"):
            chosen(**gated, **change, cuda_graph=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert chosen(**gated)[0] is False
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.warns(UserWarning, match="not compiled under activation_checkpointing"):
        assert chosen(activation_checkpointing=True, **gated) == (False, "float32", False)


def test_layers_that_cannot_be_compiled_run_as_they_are_where_nobody_asked():
    def backend(*args):
        raise RuntimeError("no compiler here")

    model, ids = llama(), torch.tensor([[1, 9, 10, 11]])
    want = model(ids).logits
    with pytest.raises(Exception, match="no compiler here"), CompiledLayers(model, backend=backend)():
        model(ids)
    torch._dynamo.reset()
    layers = CompiledLayers(model, backend=backend, if_it_can=True)
    with pytest.warns(RuntimeWarning, match="no compiler here"), layers():
        assert torch.equal(model(ids).logits, want)
    with layers():
        assert not any("forward" in vars(layer) for layer in model.model.layers)
    with pytest.warns(RuntimeWarning, match="no decoder layers"):
        CompiledLayers(torch.nn.Linear(2, 2), if_it_can=True)
