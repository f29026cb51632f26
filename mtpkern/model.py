"""The one adapter to a Hugging Face model: its mask token, and what it must be like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from inspect import signature
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import Embedding
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mtpkern.adapter import gate_of
from mtpkern.fields import whole_number

# What tests/test_architectures.py compares token by token, by the model_type of the config.
TESTED = {
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite", "gpt_neox"),
    *("qwen3_moe", "gpt_oss", "cohere", "cohere2", "deepseek_v3"),
}
MASK_TOKEN = "<|mtp|>"
CONFIG_KEY = "mtpkern"
CONFIG_VERSION = 1
# What transformers calls an embedding of positions.
_POSITIONS = {"wpe", "position_embeddings", "embed_positions"}
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# These rescale their frequencies by the longest position of the batch: results would depend on what decodes beside.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the model and its tokenizer the mask token; returns its id. Adding it twice changes nothing.

    The token's rows of the embedding and the unembedding are drawn from a normal distribution with the mean and
    variance, per dimension, of the rows in use (arXiv 2602.06019); a fixed generator makes them the same every time.
    Where the embedding has no free row, it grows to a multiple of 64 rows, which matrix products are laid out for;
    those behind the mask token's are the mean of those in use, so that their logit is never the greatest. The id is
    recorded in `model.config.mtpkern`, which `save_pretrained` keeps, and in the generation config's `suppress_tokens`,
    so that no other decoder emits it. Raises ValueError where the model has neither a free row nor an embedding that
    can be resized.

        mask_token_id = mtpkern.add_mask_token(model, tokenizer)
    """
    used = len(tokenizer)
    if MASK_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [MASK_TOKEN]}, replace_extra_special_tokens=False)
    mask_token_id = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    if mask_token_id == recorded_settings(model).get("mask_token_id"):
        return mask_token_id  # the rows are there, and perhaps trained
    others = min(used, mask_token_id)
    added = slice(0)
    if mask_token_id >= model.get_input_embeddings().num_embeddings:
        # Its own initialisation of new rows has almost no variance, and a padded matrix gets none at all: see below.
        model.resize_token_embeddings(mask_token_id + 1, pad_to_multiple_of=64, mean_resizing=False)
        added = slice(mask_token_id + 1, None)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: expected a causal language model")
    if head.weight is not matrices[0]:
        matrices.append(head.weight)
    generator = torch.Generator().manual_seed(mask_token_id)
    with torch.no_grad():
        for weight in matrices:
            rows = weight[:others].float()
            noise = torch.randn(rows.shape[1], generator=generator, dtype=torch.float32).to(rows.device)
            weight[mask_token_id] = (rows.mean(0) + noise * rows.std(0)).to(weight.dtype)
            weight[added] = rows.mean(0).to(weight.dtype)
        bias = getattr(head, "bias", None)
        if bias is not None:
            bias[added] = bias[:others].float().mean().to(bias.dtype)
    suppress_mask_token(model, mask_token_id)
    record_settings(model, mask_token_id=mask_token_id)
    return mask_token_id


def suppress_mask_token(model: PreTrainedModel, mask_token_id: int) -> None:
    """Write into the generation config that no decoder emits the mask token: `suppress_mask_token(model, 49152)`."""
    if model.generation_config is not None:
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = sorted({*suppressed, mask_token_id})


def recorded_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What training has recorded (`GatedSettings`, bidirectional, version) in the config or a gated adapter.

    recorded_settings(model).get("k_max")
    """
    gate = gate_of(model)
    if gate is not None:
        ours = ("mask_token_id", "k_max", "chat", "separator", "finished")
        return {name: value for name in ours if (value := getattr(gate.settings, name)) is not None}
    return dict(getattr(model.config, CONFIG_KEY, None) or {})


def record_settings(model: PreTrainedModel, **settings: Any) -> None:
    """Record settings, beside those already there, in the model's config or the gated adapter that it carries."""
    gate = gate_of(model)
    if gate is not None:
        gate.record(**settings)
        return
    setattr(model.config, CONFIG_KEY, {**recorded_settings(model), **settings, "version": CONFIG_VERSION})


def resolve_mask_token(model: PreTrainedModel, mask_token_id: int | None = None) -> int:
    """The mask token's id: the argument, or what the config records. Raises ValueError for none or one out of range."""
    gate = gate_of(model)
    if gate is not None:
        if mask_token_id not in (None, gate.mask_token_id):
            raise ValueError(
                f"the model's gated adapter has mask token {gate.mask_token_id}, got mask_token_id={mask_token_id}; "
                "leave it out"
            )
        return gate.mask_token_id
    if mask_token_id is None:
        mask_token_id = recorded_settings(model).get("mask_token_id")
    if mask_token_id is None:
        raise ValueError(
            f"{type(model).__name__} records no mask token in its config: pass mask_token_id= for a checkpoint trained "
            "elsewhere, train one with mtpkern.train, or decode one token a pass with strategy=mtpkern.Static(1)"
        )
    mask_token_id = whole_number("mask_token_id", mask_token_id)
    # The weight's shape, because peft's wrapper of an embedding has no num_embeddings.
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= mask_token_id < vocabulary:
        raise ValueError(f"mask_token_id must be a token of the model, 0 to {vocabulary - 1}, got {mask_token_id}")
    return mask_token_id


def mask_token_for(model: PreTrainedModel, k: int, mask_token_id: int | None = None) -> int:
    """The mask token for decoding k tokens a pass: `resolve_mask_token`, but one token a pass asks for no mask.

    A model that records none, and is given none, then gets the first id behind its vocabulary, which nothing emits.

        mask_token_for(untrained, 1)  # 32000, where untrained has 32000 tokens
    """
    if k == 1 and mask_token_id is None and "mask_token_id" not in recorded_settings(model):
        return int(model.get_input_embeddings().weight.shape[0])
    return resolve_mask_token(model, mask_token_id)


def layer_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The text config as each layer sees it: in newer versions of transformers layers may differ."""
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", 1)
    return list(getattr(config, "per_layer_config", None) or [config] * (layers if isinstance(layers, int) else 1))


def learned_positions(model: PreTrainedModel, *, needed: int) -> int | None:
    """How many positions the model has a row for each of, where these are fewer than are needed, or None."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(most, int) or needed <= most:
        return None
    for name, module in model.named_modules():
        # Some leave their first rows unused. Another number of rows is that of a tower beside the decoder.
        is_table = isinstance(module, Embedding) and name.rpartition(".")[2] in _POSITIONS
        if is_table and module.num_embeddings - getattr(module, "offset", 0) == most:
            return most
        tables = (getattr(module, name, None) for name in ("pos_encoding", *_POSITIONS))
        if any(isinstance(table, Tensor) and len(table) == most for table in tables):
            return most  # computed, once and for all
    return None


def is_tested(model: PreTrainedModel) -> bool:
    """Whether the model's class is transformers' own of a kind that the tests cover."""
    return type(model).__module__.startswith("transformers.models.") and model.config.model_type in TESTED


def has_latent_attention(model: PreTrainedModel) -> bool:
    """Whether the model caches what keys and values are made from: told by the rank that they are folded to."""
    return any(getattr(config, "kv_lora_rank", None) is not None for config in layer_configs(model))


def require_decodable(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, for a model that this project would decode wrong."""
    kind = type(model).__name__
    if getattr(model, "generation_config", None) is None:
        raise ValueError(f"{kind} cannot generate; load the model with AutoModelForCausalLM")
    if recorded_settings(model).get("bidirectional"):
        raise ValueError(
            f"{kind} was trained with bidirectional=True: its masks expect to see those behind them, and a decoding "
            "pass is causal; train without it, or measure it by its agreement"
        )
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder; mtpkern decodes causal language models")
    # Some have been made over into readers of a whole text, by one name or another.
    for part in (model.config, config):
        for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
            value = getattr(part, name, None)
            # Gemma's later kinds see images both ways, and text as ever.
            if value is not None and value != "vision" and bool(value) != causal:
                raise ValueError(
                    f"{kind} is configured with {name}={value!r}, so that a token sees those behind it, and no "
                    f"text grows token by token: set model.config.{name} = {causal}, if it was trained so"
                )
    parts = random_in_training(model) if _in_training(model) else {}
    if random := [name for name, part in parts.items() if part.training]:
        raise ValueError(
            f"{kind}, or a part of it, is in training mode, where it drops at random ({', '.join(random[:3])}): call "
            "model.eval() first, or set these to 0"
        )
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if strange:
        raise ValueError(f"{kind} has layers of type {', '.join(strange)}; mtpkern knows full and sliding attention")
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(f"{kind} is spread over {len(devices)} devices by device_map; load it on one")
    # Rotary settings come as one dict, or as one dict per type of layer.
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
        if entry.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            raise ValueError(
                f"{kind} uses {entry['rope_type']!r} rotary embeddings, whose frequencies depend on the longest "
                "sequence of the batch; set rope_parameters to 'default', 'linear', 'llama3' or 'yarn'"
            )
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        raise ValueError(
            f"{kind} caps its attention logits, which 'sdpa' ignores: load it with attn_implementation='eager'"
        )
    own = config._attn_implementation
    if has_latent_attention(model) and own not in ("sdpa", "eager"):
        raise ValueError(
            f"{kind} has latent attention, prefilled through 'sdpa' or 'eager' only, and was loaded with {own!r}; "
            "load it with attn_implementation='sdpa'"
        )


def _in_training(model: nn.Module) -> bool:
    """Whether a part of a model is in training mode, as layers are that peft has put into one at rest."""
    # By hand, as a walk by torch's own means takes seven times as long.
    modules: list[nn.Module | None] = [model]
    for module in modules:
        if module is not None:
            if module.training:
                return True
            modules += module.__dict__.get("_modules", {}).values()  # one that torch.jit has made shows none
    return False


def random_in_training(model: nn.Module) -> dict[str, nn.Module]:
    """What makes a model's output random in training mode, by where it stands: dropout, jitter, layers left out.

    random_in_training(gpt2)["transformer.drop.p"]  # Dropout(p=0.1)
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # What drops without a module of its own, as attention does, keeps its rate by such a name.
        rates = {n: x for n, x in vars(module).items() if "drop" in n or "jitter" in n}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        found |= {f"{name}.{n}".lstrip("."): module for n, x in rates.items() if type(x) in (int, float) and x > 0}
    return found


@contextmanager
def at_rest(parts: Iterable[nn.Module]) -> Iterator[None]:
    """A block in which these parts of a model are in evaluation mode; behind it each is in the mode that it was in.

    Past their `eval`, which some have that changes more than the mode (weights that are merged for evaluation, say).

    with at_rest(random_in_training(model).values()):
        teacher = model(input_ids).logits
    """
    modes = [(part, part.training) for part in parts]

    def undo() -> None:
        for part, mode in modes:
            part.training = mode
            if mode:
                _resting.discard(part)

    try:
        for part, mode in modes:
            part.training = False
            if mode:
                _resting.add(part)
        yield
    finally:
        try:
            undo()
        except BaseException:  # Ctrl-C in the middle of it
            undo()
            raise


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """`at_rest` of a whole model, which takes longer.

    with evaluating(model):
        logits = model(input_ids).logits
    """
    return at_rest(model.modules() if _in_training(model) else ())


# What is in evaluation mode for a while.
_resting = WeakSet[nn.Module]()


def trains(module: nn.Module) -> bool:
    """Whether a module is in training mode, or was before it was put into evaluation mode for a while.

    with evaluating(model.train()):
        model.training, trains(model)    # False, True
    """
    return module.training or module in _resting


# What a model's forward calls its cache, the newer name first (transformers 5.24 renamed it).
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which the model's forward takes a cache.

    model(input_ids, **{cache_argument(model): DynamicCache()})
    """
    return _cache_argument(type(model).forward)


@lru_cache(64)
def _cache_argument(forward: Callable[..., Any]) -> str:
    known = signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), CACHE_ARGUMENTS[-1])


def told_positions(model: PreTrainedModel, text: Tensor) -> dict[str, Tensor]:
    """The positions of a text [1, n], as a keyword argument for the model: some count in ways of their own unless told.

    model(text, use_cache=False, **told_positions(model, text))
    """
    if "position_ids" not in signature(model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(text.shape[1], device=text.device)[None]}


def plain_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers; of one that is made of others, as quantised ones are, those.

    plain_tensors(model)[0].data_ptr()
    """
    found: list[Tensor] = []
    waiting: list[Tensor] = list(chain(model.parameters(), model.buffers()))[::-1]
    while waiting:
        x = waiting.pop()
        if hasattr(x, "__tensor_flatten__"):
            waiting += [getattr(x, name) for name in x.__tensor_flatten__()[0]]
        elif x.numel():
            found.append(x)
    return found


def models_of(kept: WeakKeyDictionary[PreTrainedModel, Any]) -> list[PreTrainedModel]:
    """The models that something is kept of. Not by iteration: in another thread one more model may come in."""
    return [model for reference in kept.keyrefs() if (model := reference()) is not None]
