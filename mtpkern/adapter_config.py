"""What the folder of a gated adapter records beside peft's own settings, and whether it fits a base.

It stands in peft's config, as `auto_mapping`, with the mask token's row.
"""

from __future__ import annotations

import base64
import hashlib
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import LoraConfig

MARK = "mtpkern"
VERSION = 1
# Variants of LoRA whose update is more than a product of two matrices, and what else peft can do to a layer.
_UNGATEABLE = (
    *("use_dora", "lora_bias", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "layer_replication"),
)
# Elements of each weight that the digest of a base reads.
_SAMPLE = 64


@dataclass(frozen=True)
class GatedSettings:
    """What the folder of a gated adapter records beside peft's own settings.

    mask_token_id   the first id behind the base's vocabulary
    k_max           predictions of a pass that it was trained for
    base, digest    the base's name, and a digest of its weights; none where they were quantised
    chat            whether prompts were rendered by the chat template; None where nobody said
    separator       behind a prompt where they were not
    finished        whether the run that made it had ended
    """

    mask_token_id: int
    k_max: int
    base: str
    digest: str
    chat: bool | None = None
    separator: str | None = None
    finished: bool | None = None
    version: int = VERSION


def marked(settings: GatedSettings, row: Tensor) -> dict[str, Any]:
    """What a LoraConfig carries as `auto_mapping`: the settings and the mask token's row, in float32."""
    # Of a copy: memory that numpy has seen is never given back, which FSDP does with what it has gathered.
    data = row.detach().float().cpu().clone().numpy().tobytes()
    return {MARK: {**asdict(settings), "mask_row": base64.b64encode(data).decode("ascii")}}


def is_gated(config: Any) -> bool:
    """Whether a config of peft is that of a gated adapter."""
    return MARK in (getattr(config, "auto_mapping", None) or {})


def settings_of(config: Any) -> GatedSettings:
    """What a gated adapter has recorded. Raises ValueError for a newer version than this one knows."""
    values = {name: x for name, x in config.auto_mapping[MARK].items() if name != "mask_row"}
    if values.get("version", VERSION) > VERSION:
        raise ValueError(f"the gated adapter has version {values['version']}, this mtpkern knows {VERSION}: upgrade it")
    return GatedSettings(**values)


def row_of(config: Any) -> nn.Parameter:
    """The mask token's row [H] float32 that a gated adapter has recorded."""
    data = bytearray(base64.b64decode(config.auto_mapping[MARK]["mask_row"]))
    return nn.Parameter(torch.frombuffer(data, dtype=torch.float32).clone())


def digest(model: PreTrainedModel, *, merged: bool = False) -> str:
    """A digest of a model's weights: shapes, and samples in bfloat16 so that the dtype of loading is no matter.

    merged: as they would be with the LoRA in them that is active and not gated

    digest(model) == digest(the_same_checkpoint_loaded_in_another_dtype)
    digest(peft_model.get_base_model(), merged=True) == digest(peft_model.merge_and_unload())
    """
    hash_ = hashlib.blake2b(digest_size=16)
    layers = dict(model.named_modules()) if merged else {}
    for name, weight in sorted(model.state_dict().items()):
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        name = name.replace(".base_layer.", ".")
        if "lora_" in name or not weight.is_floating_point():
            continue
        for adapter in _plain_lora(layer):
            # The sum rounded once, as merging has it: an adapter may be wider than its base.
            weight = (weight + layer.get_delta_weight(adapter)).to(weight.dtype)  # type: ignore[union-attr]
        flat = weight.flatten()
        step = max(1, len(flat) // _SAMPLE)
        hash_.update(f"{name} {tuple(weight.shape)}".encode())
        hash_.update(flat[::step][:_SAMPLE].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return hash_.hexdigest()


def _plain_lora(layer: Any) -> list[str]:
    """The active adapters of a layer that merging would add to its weight."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return []
    # A variant is merged in a way of its own, or not at all.
    return [name for name in layer.active_adapters if name in layer.lora_A and name not in layer.lora_variant]


def require_gateable(config: LoraConfig | Any) -> None:
    """Raise ValueError for what peft offers and a gate cannot hold: anything but plain LoRA on linear layers."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"only LoRA can be gated; got an adapter of type {kind}")
    changed = [name for name in _UNGATEABLE if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        changed.append("bias")  # trains the base's own, which peft then writes over those of the base
    if changed:
        raise ValueError(f"a gated adapter is plain LoRA on linear layers; got one with {', '.join(changed)}")


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's weights are quantised: by transformers, or by hqq itself."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "hqq_quantized", False))


def base_known_by(model: PreTrainedModel) -> dict[str, Any]:
    """By what an adapter's folder knows the base that it was trained for: `gate.record(**base_known_by(model))`."""
    return {"base": model.name_or_path, "digest": "" if is_quantised(model) else digest(model)}


def require_base(model: PreTrainedModel, settings: GatedSettings, path: str, *, to_train: bool = False) -> None:
    """Raise ValueError where a model is not the base that an adapter was trained for.

    to_train: the adapter is to be trained for this one, so that weights may be others, with a warning
    """
    rows = model.get_input_embeddings().weight.shape[0]
    # Quantised weights, then or now, are stored in a way of their own: nothing to compare.
    found = settings.digest if is_quantised(model) or not settings.digest else digest(model)
    # Of a base that was merged with adapters they may be apart again.
    same = found == settings.digest or digest(model, merged=True) == settings.digest
    if same and rows == settings.mask_token_id:
        return
    says = (
        f"{path} was trained for {settings.base} ({settings.mask_token_id} tokens, weights {settings.digest}), got "
        f"a model with {rows} tokens and weights {found}"
    )
    if rows != settings.mask_token_id:
        raise ValueError(f"{says}: load the base unchanged, without add_mask_token")
    if not to_train:
        raise ValueError(
            f"{says}: load the base unchanged, without add_mask_token, or train the adapter further for a base "
            "that was fine-tuned since (is_trainable=True; mtpkern train --init-adapter)"
        )
    warnings.warn(f"{says}: its drafts are worth less there, until it is trained further", stacklevel=3)
