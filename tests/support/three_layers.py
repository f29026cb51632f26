"""Tiny models of three layers with a vocabulary of 61, and weights wide enough that predictions differ."""

from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

V, MASK, EOS = 61, 60, 7
EOS_IDS = torch.tensor([EOS])
TINY: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


def llama(seed: int = 0, **change: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY, **change)).eval()


def gemma(**change: Any) -> Any:
    torch.manual_seed(0)
    window = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**TINY, **window, **change)).eval()
