"""Every causal language model of transformers that a tiny configuration can build: HF's tokens, or a refusal by name.

The whole walk takes minutes: `python tests/test_walk.py` prints its table, and the test of it carries the marker slow.
`python tests/test_walk.py --tokens 3000` compares so many tokens of each model, drafts accepted among them, with HF's.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mtpkern
from mtpkern import Static, Verified
from mtpkern.baked import fingerprint
from support.slow import slow_but

NEW = 8
MASK = 47

# Names of one size in the configurations of many models; what a configuration does not have is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 48),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("v_head_dim",), 6),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0),
    "hidden_size_per_layer_input": 8,
    "sliding_window": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "tie_word_embeddings": False,
}


# What would not fit otherwise: rotary widths by hand, latent attention with a head of its own for each key.
BY_TYPE: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "modernbert-decoder": {"local_attention": 8},
}


def tiny_config(model_type: str) -> Any:
    """The default configuration of this type with everything small that has a name in `SIZES`, in its parts too."""
    kind = type(AutoConfig.for_model(model_type))
    sizes = {**_sizes(kind), **BY_TYPE.get(model_type, {})}
    try:
        return kind(**sizes)
    except (AttributeError, TypeError, KeyError, ValueError):
        # One that wants its layer types told, or has no place for them.
        return kind(**{name: value for name, value in sizes.items() if name not in _DERIVED})


_DERIVED = ("layer_types", "mlp_layer_types")


def _sizes(kind: Any) -> dict[str, Any]:
    config = kind()
    names = {*vars(config), *kind.attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in names and name not in kind.attribute_map}
    # Derived from the sizes, unless somebody has left theirs.
    sizes |= {name: None for name in _DERIVED if name in names}
    if getattr(config, "kv_lora_rank", None):
        sizes |= {name: value for name, value in (("num_key_value_heads", 4), ("head_dim", 4)) if name in sizes}
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and name not in kind.attribute_map:
            sizes[name] = {"model_type": part.model_type, **_sizes(type(part))}
    return sizes


def tiny_model(model_type: str, seed: int = 0, auto: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """A model of this type with random weights whose text varies; raises whatever transformers does where it cannot."""
    config = tiny_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        parameters = auto.from_config(config, dtype=torch.float32).parameters()
    if sum(p.numel() for p in parameters) > 3_000_000:
        raise ValueError("stays large")
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and weight.is_floating_point():
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5, generator=generator)
            elif "norm" not in name.lower() and "ln" not in name:
                weight.normal_(0, 0.5, generator=generator)
        model.get_input_embeddings().weight.normal_(0, 1, generator=generator)
    # Defaults of published models (forced tokens, say) are no question of the architecture.
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, MASK, (len(lengths), max(lengths)), generator=generator)
    real = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return words.masked_fill(~real, 0), real.long()


def outcome(model: Any) -> tuple[str, str]:
    """("equal", ""), ("refused", message), or what must not be: ("different", ...), ("error", ...)."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
    name = type(model).__name__
    for lengths in ((6,), (9, 4, 7)):
        ids, real = prompts(*lengths)
        options["attention_mask"] = real
        try:
            greedy = model.generate(ids, do_sample=False, suppress_tokens=[MASK], **options)
        except Exception:
            greedy = None  # then there is nothing to equal
        for strategy in (Static(1), Verified(3, threshold=0.1)):
            try:
                ours = mtpkern.generate(model, ids, mask_token_id=MASK, strategy=strategy, **options)
            except ValueError as error:
                return ("refused" if name in str(error) else "error"), str(error)
            except Exception as error:
                return "error", f"{type(error).__name__}: {error}"
            if greedy is None or not ours.equal(greedy):
                differs = "no greedy decoding" if greedy is None else (ours != greedy).float().mean()
                return "different", f"{lengths}, {strategy}: {differs}"
    assert greedy is not None
    return "equal", f"{len(greedy[:, 9:].unique())} tokens"


def walk(types: list[str]) -> dict[str, list[tuple[str, str]]]:
    table: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for model_type in types:
        try:
            model = tiny_model(model_type)
        except Exception as error:
            table["not built"].append((model_type, f"{type(error).__name__}: {error}".partition("\n")[0][:150]))
            continue
        kind, what = outcome(model)
        table[kind].append((model_type, what.replace("\n", " ")))
        print(f"{model_type:28} {kind:10} {what[:200]!r}", flush=True)
    return table


def compared(model_type: str, tokens: int) -> dict[str, int]:
    """How `Verified` compares with HF's greedy decoding over so many tokens in float32, in ragged batches of 32.

    tokens: compared; drafts: of them accepted drafts; ties: sequences that differ from a token on where HF's own two
    best logits are within rounding, behind which nothing is compared; different: all others.
    """
    vocabulary, new = 12, 96  # drafts come true by chance
    sizes = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), vocabulary)
    mask, counts = vocabulary - 1, dict.fromkeys(("tokens", "drafts", "ties", "different"), 0)
    while counts["tokens"] < tokens:
        seed = counts["tokens"]
        model = tiny_model(model_type, seed, **sizes)
        with torch.no_grad():
            model.get_input_embeddings().weight *= 0.2  # some scale it up, and would echo
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 14, (32,), generator=generator)
        ids = torch.randint(1, mask, (32, int(lengths.max())), generator=generator)
        real = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
        ids = ids * real
        options: dict[str, Any] = {"attention_mask": real, "max_new_tokens": new, "pad_token_id": 0}
        theirs = model.generate(ids, do_sample=False, suppress_tokens=[mask], eos_token_id=None, **options)
        output = mtpkern.generate(
            model,
            ids,
            mask_token_id=mask,
            strategy=Verified(4, threshold=0.0),
            rows=32 * 7,
            eos_token_id=None,
            return_dict_in_generate=True,
            **options,
        )
        same = (output.sequences == theirs).long().cumprod(1).sum(1)
        for b, n in enumerate(same.tolist()):
            counts["tokens"] += n - ids.shape[1]
            if n < theirs.shape[1]:
                text = theirs[b : b + 1, ids.shape[1] - int(lengths[b]) : n]
                best = model(text).logits[0, -1, :mask].topk(2).values
                counts["ties" if best[0] - best[1] < 1e-3 else "different"] += 1
        counts["drafts"] += sum(sum(row) - len(row) for row in output.blocks)
    return counts


# Of each kind of outcome a few: what decodes, and each reason that there is for refusing.
MANY = (
    *(
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo",
        "olmo2",
        "smollm3",
    ),
    *("granite", "gpt_neox", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "cohere", "cohere2", "deepseek_v3", "glm"),
    *("glm4", "starcoder2", "opt", "gpt2", "stablelm", "nemotron", "helium", "ministral", "exaone4", "biogpt"),
)
HANDFUL = {
    **dict.fromkeys(("starcoder2", "opt", "roberta", "mixtral", "gpt2", "afmoe"), "equal"),
    "rwkv": "of 2 layers, 0 cached",
    "openai-gpt": "of 2 layers, 0 cached",
    "diffllama": "calls attention more than once in a pass",
    "jetmoe": "attends to keys of 4 heads of 8, but has cached 2 heads of 8",
    "bloom": "did not call the attention interface",
    "bart": "its logits differ by up to",
    "whisper": "from its own greedy decoding",
    "doge": "builds an attention mask of its own",
    "falcon": "a trial of it ended in TypeError",
    "mamba": "layers of type linear_attention",
}
SEEING = ("llava", "qwen3_vl", "gemma3", "gemma4", "idefics3", "mistral3", "internvl", "smolvlm", "aya_vision")


# Of what decodes one, and each way to be refused.
QUICK = [name for name, what in HANDFUL.items() if what != "equal" or name == "starcoder2"]


@pytest.mark.parametrize("model_type", slow_but(HANDFUL, *QUICK))
def test_a_handful(model_type: str) -> None:
    kind, what = outcome(tiny_model(model_type))
    if HANDFUL[model_type] == "equal":
        assert (kind, what) == ("equal", what)
    else:
        assert kind == "refused"
        assert HANDFUL[model_type] in what


@pytest.mark.parametrize("model_type", SEEING)
def test_models_that_see_decode_text(model_type: str) -> None:
    model = tiny_model(model_type, auto=AutoModelForImageTextToText)
    assert outcome(model)[0] == "equal"
    before = fingerprint(model)
    mtpkern.generate(model, prompts(4)[0], mask_token_id=MASK, max_new_tokens=3)
    assert fingerprint(model) == before  # or each call would capture anew
    with pytest.raises(ValueError, match="does not support pixel_values; leave it out"):
        mtpkern.generate(model, prompts(4)[0], mask_token_id=MASK, pixel_values=torch.zeros(1, 3, 8, 8))


@pytest.mark.slow("walk::test_a_handful")
@pytest.mark.timeout(3600)
@pytest.mark.skipif("MTPKERN_WALK" not in os.environ, reason="takes minutes: set MTPKERN_WALK=1")
def test_the_whole_walk() -> None:
    table = walk(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    assert set(table) <= {"equal", "refused", "not built"}, {k: table[k] for k in table if k in ("error", "different")}
    assert len(table["equal"]) > 50


@pytest.mark.slow("walk::test_verified_equals_greedy_over_some_tokens")
@pytest.mark.timeout(3600)
@pytest.mark.skipif("MTPKERN_WALK" not in os.environ, reason="takes minutes: set MTPKERN_WALK=1")
def test_verified_equals_greedy_over_many_tokens() -> None:
    counts = {model_type: compared(model_type, 3500) for model_type in MANY}
    assert sum(count["tokens"] for count in counts.values()) >= 100_000
    assert {model_type: count["different"] for model_type, count in counts.items() if count["different"]} == {}
    assert all(count["ties"] <= 2 for count in counts.values())
    assert all(count["drafts"] > 0.02 * count["tokens"] for count in counts.values())


def test_verified_equals_greedy_over_some_tokens() -> None:
    counts = compared("starcoder2", 500)
    assert counts["tokens"] > 500
    assert counts["drafts"] > 0.02 * counts["tokens"]
    assert counts["different"] == counts["ties"] == 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--tokens"]:
        total = 0
        for each in sys.argv[3:] or MANY:
            result = compared(each, int(sys.argv[2]))
            total += result["tokens"]
            print(f"{each:20} {result}", flush=True)
        print(f"{total} tokens")
        sys.exit()
    found = walk(sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    for kind, entries in found.items():
        print(f"\n{kind}: {len(entries)}")
        for model_type, what in entries:
            print(f"  {model_type}: {what[:300]}")
