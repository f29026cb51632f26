"""The paper's training step on tiny models."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.trainer import MTPTrainer
from support import trained
from support.trained import EOS, MASK

# Stop tokens that a random model predicts often, so that spans end early.
STOPS = [EOS, *range(30, 40)]


SHAPE = trained.SHAPE | {"head_dim": 8}


def llama(**change):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **change))


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
