"""What the keys and values of a run take, and whether there is room for them."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedModel

from mtpkern.model import layer_configs

# Buffers of fixed addresses, which a CUDA graph needs, are made at once: at most this share of what is free.
FIXED_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def kv_bytes(model: PreTrainedModel, batch: int, capacity: int, scratch: int = 0) -> int | None:
    """Bytes of keys and values of `batch` sequences of `capacity` tokens each, by the config; None where it is unusual.

    scratch: slots of each sequence that hold no token (`Verified.masks`)

    kv_bytes(model, batch=8, capacity=4096)
    """
    each = [_elements_of(config) for config in layer_configs(model)]
    if None in each:
        return None
    shards = getattr(model, "tp_size", None) or 1
    return batch * (scratch + capacity + 1) * sum(x for x in each if x) * model.dtype.itemsize // shards


def _elements_of(config: Any) -> int | None:
    """Elements of a token's key and value in one layer."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not (_is_size(heads) and _is_size(hidden) and _is_size(kv_heads)):
        return None
    if _is_size(getattr(config, "kv_lora_rank", None)):
        # Latent attention, whose keys and values are unfolded for all heads before they are kept.
        return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return kv_heads * 2 * (getattr(config, "head_dim", None) or hidden // heads)


def _is_size(x: Any) -> TypeGuard[int]:
    return isinstance(x, int) and x > 0


def available_memory(device: torch.device) -> int | None:
    """Bytes that may still be allocated on a device; None where nobody says."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    spare = free_bytes()
    return None if spare is None else min([spare, *_left_in_cgroup()])


def free_bytes() -> int | None:
    """Bytes that this machine can give away without swapping; None where it does not say so as Linux does."""
    try:
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_in_cgroup() -> list[int]:
    """What a container's limit leaves, if it has one: version 2 of control groups, then version 1."""
    left = []
    version_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, usage in (("memory.max", "memory.current"), version_1):
        with suppress(OSError, ValueError):  # no such file, or "max"
            left.append(int((_CGROUP / limit).read_text()) - int((_CGROUP / usage).read_text()))
    return left


def require_room(model: PreTrainedModel, batch: int, tokens: int, *, scratch: int = 0, kept: int = 0) -> None:
    """Raise ValueError, with the bytes, where keys and values of `batch` sequences of `tokens` each can never fit.

    `kept`: bytes that can be had besides, by dropping what earlier calls have kept. Says nothing where the config does
    not tell the sizes, or the system what is free.
    """
    needed, available = kv_bytes(model, batch, tokens, scratch), available_memory(model.device)
    if needed is None or available is None or needed <= available + kept:
        return
    available += kept
    raise ValueError(
        f"keys and values of {batch} sequences of {tokens:,} tokens would take {needed:,} bytes, and {available:,} are "
        f"available on {model.device}: enough for {available * tokens // needed:,} tokens each; lower max_new_tokens "
        "or decode fewer sequences at a time"
    )


def fits_at_once(model: PreTrainedModel, batch: int, capacity: int, *, scratch: int = 0) -> bool:
    """Whether buffers for all tokens may be made before the first; where not, a RuntimeWarning says what follows."""
    needed, available = kv_bytes(model, batch, capacity, scratch), available_memory(model.device)
    if needed is None or available is None or needed <= FIXED_SHARE * available:
        return True
    warnings.warn(
        f"keys and values of {batch} sequences of {capacity:,} tokens would take {needed:,} bytes, more than "
        f"{FIXED_SHARE:.0%} of the {available:,} available on {model.device}: they are made as the texts grow, and the "
        "step runs without a CUDA graph, which is slower; lower max_new_tokens for a graph",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
