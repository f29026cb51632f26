"""From what a caller passes to the model that decodes: what stands around it is honoured exactly, or refused by name.

A decoding step is a call of the model itself on packed rows of several sequences. So what adapts its layers row by row
(LoRA and its kin) is honoured; what wraps its `forward` or `generate` would be passed over, and is refused.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from mtpkern.adapter import base_of
from mtpkern.adapter_config import is_gated
from mtpkern.entry import entry

# Adapters of peft whose whole effect lies in the model's layers and falls on each row by itself.
_ROW_WISE = {
    *("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "LN_TUNING", "VERA", "FOURIERFT", "HRA", "VBLORA"),
    *("MISS", "RANDLORA", "TRAINABLE_TOKENS", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA", "ROAD"),
}
# What peft takes from a call before the model sees it.
_ADAPTER_ARGUMENTS = ("adapter_names", "alora_offsets", "task_ids")


def unwrapped(model: Any, arguments: dict[str, Any]) -> PreTrainedModel:
    """The model that decodes, from itself or from a PeftModel around it; `arguments` are those of the call.

    Raises ValueError, with the reason, for everything around a model that decoding would pass over: virtual tokens,
    adapters that act by row or by place, compiled and distributed wrappers, weights that move. TypeError for what is
    no model of transformers.

        plain = unwrapped(peft_model, {})
    """
    name = type(model).__name__
    for argument in _ADAPTER_ARGUMENTS:
        if arguments.get(argument) is not None:
            raise ValueError(
                f"{entry()} does not support {argument}: its passes hold rows of several sequences; set one "
                "adapter with set_adapter and decode the sequences of each by themselves"
            )
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{name} wraps a model that torch.compile has compiled, which decoding would pass over; pass the model "
            "itself (model._orig_mod), with compile=True if its passes shall be compiled"
        )
    plain = base_of(model)
    if plain is not model:
        _require_row_wise(name, model.peft_config, model.active_adapters)
        if not isinstance(plain, PreTrainedModel):
            raise TypeError(f"{name} wraps {type(plain).__name__}; expected a PreTrainedModel in it")
        if model.generation_config is not plain.generation_config:
            raise ValueError(
                f"{name} has a generation_config of its own beside that of {type(plain).__name__}; pass it as "
                "generation_config="
            )
    elif isinstance(model, PreTrainedModel):
        adapters = getattr(model, "peft_config", None)
        if adapters:
            from peft.tuners.tuners_utils import BaseTunerLayer

            # By the layers, because who injected them (transformers, or a PeftModel around) keeps his own record.
            layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
            _require_row_wise(name, adapters, sorted({a for layer in layers for a in layer.active_adapters}))
    elif isinstance(getattr(model, "module", None), torch.nn.Module):
        raise ValueError(f"{name} wraps the model, and has no generate of its own; pass the model in it: model.module")
    else:
        raise TypeError(f"model must be a PreTrainedModel of transformers or a PeftModel around one, got {name}")
    _require_plain(plain)
    _warn_of_outliers(plain)
    return plain


def _require_row_wise(name: str, configs: dict[str, Any], active: list[str]) -> None:
    """Refuse active adapters whose effect is not that of layers on each row by itself."""
    for adapter in active:
        config = configs[adapter]
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            why = f"{kind} puts virtual tokens before the prompt"
        elif kind not in _ROW_WISE:
            why = f"{kind} is not known to act in the layers alone, on each row by itself"
        elif getattr(config, "alora_invocation_tokens", None) and not is_gated(config):
            why = "alora_invocation_tokens activate it by place, from a token of the prompt on"
        elif getattr(config, "arrow_config", None):
            why = "arrow_config routes between adapters"
        else:
            continue
        raise ValueError(
            f"mtpkern does not support the adapter {adapter!r} of {name}: {why}; merge it into the weights where peft "
            "can (merge_and_unload), or use model.generate"
        )


def _require_plain(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are not where it runs."""
    name = type(model).__name__
    device = model.device
    for parts in ("fsdp", "pp"):
        if (getattr(model, f"_{parts}_size", None) or 1) > 1:
            raise ValueError(
                f"{name} is split over processes by {parts}_size, whose parts only meet in a forward of transformers' "
                "own; load it whole, or split it by its tp_plan"
            )
    hook = getattr(model, "_hf_hook", None)
    if any(p.device != device or p.is_meta for p in model.parameters()) or type(hook).__name__ == "CpuOffload":
        where = ", ".join(sorted({str(p.device) for p in model.parameters()}))
        raise ValueError(
            f"{name} has weights that are moved while it runs, or lie on several devices ({where}); load it whole on "
            "one device: device_map={'': device}"
        )


def _warn_of_outliers(model: PreTrainedModel) -> None:
    """Say of a form of weights in which a row's outputs hang on the other rows of a pass that they do."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(config, "load_in_8bit", False) and getattr(config, "llm_int8_threshold", 0.0) > 0:
        warnings.warn(
            f"{type(model).__name__} is in 8 bits of bitsandbytes, which look for outliers over all rows of a pass: "
            "what a sequence gets depends on its neighbours, in model.generate too, and several tokens a pass may "
            "differ from one. Load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in 4 "
            "bits, for tokens that do not",
            stacklevel=4,
        )
