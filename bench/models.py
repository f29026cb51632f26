"""Models at the shapes of real ones with random weights: nothing is downloaded, and a CPU rehearses with a tiny one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_NAMES = (*_SIZES, "head_dim", "vocab_size", "tie_word_embeddings")
# The kind of each, and its numbers in the order of _NAMES.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, dict(zip(_NAMES, numbers, strict=True)))
    for name, kind, numbers in (
        ("Qwen3-4B", "qwen3", (2560, 9728, 36, 32, 8, 128, 151_936, True)),
        ("Llama-3.1-8B", "llama", (4096, 14_336, 32, 32, 8, 128, 128_256, False)),
        ("Qwen3-0.6B", "qwen3", (1024, 3072, 28, 16, 8, 128, 151_936, True)),
        ("SmolLM2-135M", "llama", (576, 1536, 30, 9, 3, 64, 49_152, True)),
    )
}
TINY = dict(zip(_NAMES[:-1], (32, 48, 2, 4, 2, 8, 64), strict=True))
MASK = 1
# What the products of a layer read, and the widths of the siblings that read it; likewise the head.
Products = dict[str, tuple[int, tuple[int, ...]]]


def random_model(name: str, tiny: bool, dtype: torch.dtype, device: torch.device, **options: Any) -> PreTrainedModel:
    """A model of this name, or a tiny one of its kind; options are those of its configuration."""
    kind, settings = SHAPES[name]
    config = AutoConfig.for_model(kind, **settings | (TINY if tiny else {}) | options)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model


def build(name: str, device: torch.device) -> PreTrainedModel:
    """A model of this name in bf16 that decodes texts without an end, on the device; on a CPU a tiny one."""
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    recorded = {"mask_token_id": MASK, "k_max": 16, "version": 1}
    tiny = device.type == "cpu"
    options = {"max_position_embeddings": 1 << 18, "mtpkern": recorded, **tokens}
    return random_model(name, tiny, torch.bfloat16, device, **options).eval()


def compiling(device: torch.device) -> AbstractContextManager[object]:
    """A block in which layers are compiled for a GPU; on a CPU, to rehearse, they are but traced.

    A CPU's code would need a C++ compiler.
    """
    return patch("mtpkern.layers.BACKEND", "eager") if device.type == "cpu" else nullcontext()


def products(name: str, tiny: bool = False) -> tuple[Products, Products]:
    """Of a layer and of the head: `products("Qwen3-4B")[0]["o"]` is (4096, (2560,))."""
    s = SHAPES[name][1] | (TINY if tiny else {})
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    wide, narrow = (s[f"num_{heads}_heads"] * s["head_dim"] for heads in ("attention", "key_value"))
    layer: Products = {"q, k, v": (hidden, (wide, narrow, narrow)), "o": (wide, (hidden,))}
    layer |= {"gate, up": (hidden, (inner, inner)), "down": (inner, (hidden,))}
    return layer, {"head": (hidden, (s["vocab_size"],))}
