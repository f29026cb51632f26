"""A tiny run of MTPTrainer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.trainer import MTPTrainer

V, MASK, EOS = 41, 40, 7


SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def llama(seed=0, **change):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | change))


def data(n=24):
    """Counting texts: the answer goes on where the prompt stops."""
    rows = []
    for i in range(n):
        start, length = 8 + i % 7, 10 + i % 4
        ids = [1, *(start + j for j in range(length)), EOS]
        rows.append({"input_ids": ids, "prompt_length": 4})
    return rows


def config(path, **change):
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "k_min": 2,
        "k_max": 4,
        "num_spans": 3,
        "spacing": "random",
    }
    return MTPConfig(str(path), **arguments | change)


def trainer(path, student=None, teacher="random", *, train=None, held=None, **change):
    """On texts of one's own, too: `train`, and `held` to evaluate; with `held_out` it decodes prompts besides."""
    given = {name: change.pop(name) for name in ("held_out", "callbacks") if name in change}
    kind, mask = (GatedTrainer, None) if change.get("gated") else (MTPTrainer, MASK)
    return kind(
        model=student or llama(),
        teacher=llama(3) if teacher == "random" else teacher,
        args=config(path, **change),
        mask_token_id=mask,
        train_dataset=train or data(),
        eval_dataset=held or data(6),
        data_collator=MTPCollator(0),
        **given,
    )


def same_weights(a, b, **tolerance):
    for x, y in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(x, y, **tolerance)


def losses(run):
    return [x["loss"] for x in run.state.log_history if "loss" in x]
