"""Tiny random models, their prompts and their tokenizer of bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor

# So few tokens that drafts come true by chance every few passes.
VOCABULARY = 16
MASK = VOCABULARY - 1
PAD = 0

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Latent attention, with keys and values of different width.
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 4,
}

# Of every kind that the tests cover. Windows are shorter than the texts, caps and multipliers far from 1: what is
# ignored must show.
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, **_SLIDING},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0, **_SLIDING},
    "mistral": {"sliding_window": 5},
    "gemma2": {
        "attention": "eager",
        "query_pre_attn_scalar": 8,
        **_SLIDING,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {"query_pre_attn_scalar": 8, **_SLIDING},
    "phi3": {"sliding_window": 5},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, **_SLIDING},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.8,
    },
    "gpt_neox": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, **_EXPERTS},
    "gpt_oss": {
        "attention": "eager",
        "num_local_experts": 4,
        **_EXPERTS,
        **_SLIDING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, **_SLIDING},
    # Latent attention, with keys and values of different width.
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        **_EXPERTS,
    },
}


def random_model(model_type: str, *, seed: int = 0, attention: str = "sdpa", **settings: Any) -> Any:
    """A tiny random model in float32 whose text varies, its mask token recorded.

    Weights as transformers draws them make a model echo its input: they leave the residual stream to the embedding,
    which gemma scales up besides. Here every matrix is drawn wide, and neither embedding leans on the other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_COMMON, **settings})
    config.mtpkern = {"mask_token_id": MASK, "k_max": 5, "version": 1}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5, generator=generator)
            elif "norm" not in name:
                weight.normal_(0, 0.5, generator=generator)
        model.get_input_embeddings().weight.normal_(0, 1, generator=generator)
        model.get_output_embeddings().weight.normal_(0, 0.5, generator=generator)
    return model


def random_prompts(*lengths: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Left-padded prompts [B, T] of these lengths, without the mask token, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, MASK, (len(lengths), max(lengths)), generator=generator)
    real = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return words.masked_fill(~real, PAD), real.long()


def adapted_model(model: Any, targets: str = "all-linear", seed: int = 1) -> Any:
    """A model with a gated adapter of rank 4 that changes what its mask rows predict; none of it is trained."""
    lora = pytest.importorskip("mtpkern.train.lora")
    del model.config.mtpkern
    peft_model = lora.add_gated_lora(model, rank=4, k_max=4, targets=targets).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(False)
        if "lora_B" in name:
            parameter.normal_(0, 0.5, generator=generator)
    return peft_model


_TEMPLATES = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def byte_tokenizer(kind: str) -> Any:
    """A tokenizer of bytes with the special tokens and the manner of template of Llama 3 ("llama") or Qwen3 ("qwen").

    A blank line is one token, as theirs is; a Llama has BOS put in front, a Qwen has none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "llama":
        special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        others = ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    else:
        special, others = {"eos_token": "<|im_end|>"}, ["<|endoftext|>", "<|im_start|>"]
    tokenizer.add_special_tokens([*special.values(), *others])
    if kind == "llama":
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_TEMPLATES[kind], **special)


# Generation configurations as published, the ids made small: what decides is which fields they set.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-Instruct": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 7, 11]},
    "Llama-2-chat": {"do_sample": True, "max_length": 4096, "temperature": 0.6, "top_p": 0.9},
    "Qwen3": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "eos_token_id": [3, 7],
        "pad_token_id": 7,
    },
    "Qwen2.5-7B-Instruct": {
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "eos_token_id": [3],
    },
    "Qwen2.5-0.5B-Instruct": {"do_sample": True, "repetition_penalty": 1.1},
    "gemma-2-it": {"_from_model_config": True, "cache_implementation": "hybrid", "eos_token_id": 1},
    "gemma-3-it": {
        "cache_implementation": "hybrid",
        "do_sample": True,
        "eos_token_id": [1, 6],
        "top_k": 64,
        "top_p": 0.95,
    },
    "Phi-3.5": {"_from_model_config": True, "eos_token_id": [7, 1, 0], "pad_token_id": 0},
    "Qwen-1": {"do_sample": True, "chat_format": "chatml", "max_window_size": 64, "max_new_tokens": 5},
}
