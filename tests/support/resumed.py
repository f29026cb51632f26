"""A tiny run that is stopped and goes on."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.trainer import MTPTrainer

V, MASK, EOS = 31, 30, 7


def llama(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, eos_token_id=EOS, bos_token_id=1, pad_token_id=0, **shape))


def rows(n=18):
    return [
        {"input_ids": [1, *(8 + (i + j) % 20 for j in range(8 + i % 4)), EOS], "prompt_length": 3} for i in range(n)
    ]


def trainer(path, dataset=None, seed=0, model=llama, **change):
    arguments = {
        "max_steps": 9,
        "save_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "k_min": 2,
        "k_max": 3,
        "num_spans": 2,
    }
    return MTPTrainer(
        model=model(seed),
        teacher=model(3),
        args=MTPConfig(str(path), **arguments | change),
        mask_token_id=MASK,
        train_dataset=dataset or rows(),
        eval_dataset=rows(4),
        data_collator=MTPCollator(0),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


def files_of(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }
