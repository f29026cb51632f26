"""A tiny model in llama.cpp's format."""

from typing import Any

import pytest
import torch

from support.models import byte_tokenizer, random_model


def llama_as_gguf(path: Any, *, pre: str = "smollm", eot: bool = True) -> tuple[Any, Any]:
    """A tiny llama as llama.cpp writes one, its matrices in Q8_0: returns the model that it is, and its tokenizer."""
    gguf = pytest.importorskip("gguf")
    tokenizer = byte_tokenizer("qwen")
    model = random_model("llama", vocab_size=261, hidden_size=32, intermediate_size=64, eos_token_id=256)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary.append("ĠĠ")  # a list of one merge is none, to some readers
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(261)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    # As in SmolLM2's: BOS is the begin of a turn, which is not put in front.
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_add_bos_token(False)
    # The template ends an answer with <|im_end|>; that is all that says so.
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    if eot:
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"attn_q": 4, "attn_k": 2}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    state = model.state_dict()
    for name, x in state.items():
        parts = name.split(".")
        if "layers" in parts:
            theirs = f"blk.{parts[2]}.{names[parts[-2]]}"
        else:
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-2]]
        data = x.numpy()
        if data.ndim == 1:
            writer.add_tensor(f"{theirs}.weight", data)
            continue
        n = heads.get(theirs.rpartition(".")[2])
        if n:  # llama.cpp turns neighbours, transformers halves
            data = data.reshape(n, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quantize(data, kind)
        back = gguf.dequantize(packed, kind)
        if n:
            back = back.reshape(n, -1, 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        x.copy_(torch.from_numpy(back.copy()))
        writer.add_tensor(f"{theirs}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer
