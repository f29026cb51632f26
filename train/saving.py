"""Saving: what has been trained as a plain Hugging Face checkpoint, whole or not at all."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.custom_generate import write_custom_generate
from mtpkern.train.disk import full_disk_named, written_whole


def save_plain(
    plain: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    *,
    state: dict[str, Tensor] | None = None,
    processing_class: Any = None,
) -> None:
    """Write the model in a dtype, with the tokenizer and `custom_generate`; state: its weights where it lies in shards.

    save_plain(model, Path("out"), torch.bfloat16)
    """
    # A tied head that was gathered by itself is a copy of the embedding.
    tied = plain.all_tied_weights_keys if plain.config.get_text_config().tie_word_embeddings else {}
    state = {name: x for name, x in (state or {}).items() if name not in tied} or plain.state_dict()
    state = _cast(state, dtype)
    # The config as the saved weights are, not as they were while training, where the cache is off.
    config = deepcopy(plain.config)
    config.use_cache, config.dtype = True, dtype
    needed = sum(x.nbytes for x in state.values())
    with full_disk_named(folder, needed), written_whole(folder) as part:
        plain.save_pretrained(part, state_dict=state)
        config.save_pretrained(part)
        write_custom_generate(part)
        if processing_class is not None:
            processing_class.save_pretrained(part)


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in another dtype; entries that are one tensor (tied embeddings) go on being one."""
    made: dict[tuple[Any, ...], Tensor] = {}
    return {
        name: made.setdefault((x.data_ptr(), x.shape, x.stride()), x.to(dtype)) if x.is_floating_point() else x
        for name, x in state.items()
    }
