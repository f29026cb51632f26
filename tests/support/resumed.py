"""A tiny run that is stopped and goes on."""

import torch

from support import trained
from support.trained import EOS


def llama(seed=0):
    return trained.llama(seed, num_hidden_layers=1, initializer_range=0.02)


def rows(n=18):
    return [
        {"input_ids": [1, *(8 + (i + j) % 20 for j in range(8 + i % 4)), EOS], "prompt_length": 3} for i in range(n)
    ]


def trainer(path, dataset=None, seed=0, model=llama, **change):
    options = {"max_steps": 9, "save_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"lr_scheduler_type": "linear", "k_max": 3, "num_spans": 2, "spacing": "stride"}
    return trained.trainer(path, model(seed), model(3), train=dataset or rows(), held=rows(4), **options | change)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


def files_of(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }
