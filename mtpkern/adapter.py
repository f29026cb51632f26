"""The gated adapter: LoRA that acts on the rows of mask tokens only; every other row is the original model's own.

Prompt, accepted tokens and drafts run through the frozen weights, so the KV cache holds what the original model would
have put there, and what `Verified` emits is the original model's greedy output. `Gate` says which rows of a pass are
masks, and closed, as it is outside of mtpkern, the model is the original to the last bit.

The adapter is peft's: its LoRA layers, and its folder, whose config also says that it is gated, for which base, and
holds the one embedding row that has no place in the base: the mask token is the first id behind the vocabulary, so
neither matrix is resized, no tokenizer changes and no prompt can hold it. peft reads the folder as an adapter that its
invocation token switches on, and since that token never comes, plain peft gives the base. Its layers for hqq and GPTQ
know no such token, and plain peft fails there.

Source   gated LoRA: Samragh et al., arXiv 2507.11851; LoRA on mask rows only: I-DLM's R-ISD, arXiv 2604.11035
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtpkern.adapter_config import is_gated, marked, require_base, require_gateable, row_of, settings_of
from mtpkern.gate import Gate, GatedLora
from mtpkern.loading import require_found
from mtpkern.siblings import Siblings

if TYPE_CHECKING:
    from peft import PeftModel

# What peft does not change where it loads over an adapter, and where the hub has it.
_SHAPE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
_OF_HUB = ("revision", "token", "cache_dir", "subfolder")
_DEAF = (
    "cannot be gated, because peft would adapt all their rows; load the base unquantised, or quantised by "
    "bitsandbytes, torchao, quanto, hqq or GPTQ, and name none of experts that share a tensor"
)


def gate_of(model: nn.Module) -> Gate | None:
    """The gate of a model that carries a gated adapter, None for any other."""
    return getattr(model, "mtpkern_gate", None)


@contextmanager
def gated(model: nn.Module, input_ids: Tensor) -> Iterator[None]:
    """A block in which the model's gate, where it has one, is open for the mask tokens among input_ids [B, T]."""
    gate = gate_of(model)
    if gate is None:
        yield
        return
    with gate.open(input_ids == gate.mask_token_id), model.mtpkern_siblings():  # type: ignore[operator]
        yield


def base_alone(model: nn.Module) -> AbstractContextManager[None]:
    """A block for a pass without mask rows: `gated` without the cost of layers that have nothing to add.

    with base_alone(model):
        logits = model(input_ids=tokens, use_cache=False, ...).logits
    """
    return nullcontext() if gate_of(model) is None else model.mtpkern_siblings.aside()  # type: ignore[operator,union-attr]


@contextmanager
def kept_on_error(model: nn.Module) -> Iterator[None]:
    """A block behind whose error, Ctrl-C too, the model has all its own again and nothing more.

    Its layers, hooks and modes, and what its configs and its gate record. Weights stay as they are by then.

        with kept_on_error(model):
            peft_model = get_peft_model(model, config)
    """
    base = base_of(model)
    configs = (getattr(base, name, None) for name in ("config", "generation_config"))
    things: list[Any] = [*model.modules(), *configs, gate_of(base)]
    own = [(thing, dict(vars(thing))) for thing in things if hasattr(thing, "__dict__")]
    # Handles of hooks know these very dictionaries. What a device has been given is in others than before.
    inside = [
        (part, copy(part))
        for _, held in own
        for name, part in held.items()
        if isinstance(part, dict) and name not in ("_parameters", "_buffers")
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for thing, held in own:
            vars(thing).clear()
            vars(thing).update(held)
        for part, before in inside:
            part.clear()
            part.update(before)
        for parameter, was in trained:
            parameter.requires_grad_(was)
        raise


@contextmanager
def wrapping(model: nn.Module) -> Iterator[None]:
    """Around peft's wrapping of a model: no warning of an old name; ValueError for layers that cannot be gated.

    Where it fails, which may be at any layer, the model has all its own again.
    """
    with warnings.catch_warnings(), kept_on_error(model):
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            yield
        except Exception as error:
            if not isinstance(error, ValueError) or "alora_invocation_tokens" not in str(error):
                raise
            raise ValueError(f"layers of this model {_DEAF}") from error


def attach(model: nn.Module, row: nn.Parameter, adapter: str = "default") -> Gate:
    """Put the gate of a gated adapter before the LoRA layers of a model, and make it the model's, as `adopt` does.

    row [H]: the mask token's embedding, which becomes the parameter `mask_row` of a PeftModel. Doing it twice changes
    nothing. Raises ValueError, the model as it was before, for layers that would not ask the gate.
    """
    base = base_of(model)
    layers, gate = list(_layers_of(base, adapter)), _gate_before(base, adapter)
    if gate is None:
        # Of some kinds of quantised layers peft adds the update itself, whatever variant it is of.
        deaf = {type(x).__name__ for x in layers if "lora_variant" not in type(x).forward.__code__.co_names}
        if deaf:
            raise ValueError(f"peft's {', '.join(sorted(deaf))} {_DEAF}")
        if base.get_output_embeddings() in layers:
            raise ValueError(
                f"the adapter changes the output head of {type(base).__name__}, which reads other rows than the layers "
                "before it and cannot be gated; leave the head out of target_modules"
            )
        gate = Gate(settings_of(model.peft_config[adapter]), row)  # type: ignore[index, union-attr]
        variant = GatedLora(gate)
        for layer in layers:
            if adapter not in layer.lora_variant:
                # A method, which copies of the layer copy as their own.
                vars(layer)["forward"] = MethodType(_forward_without_offsets, layer)
            layer.lora_variant[adapter] = variant
    if model is not base:
        # Which copies of the model copy as their own; methods, which pickle looks up by name, could not be pickled.
        vars(model.base_model)["unload"] = partial(_unload, model.base_model)
        vars(model)["load_adapter"] = partial(_load_adapter, model)
    _choose(model, gate)
    return gate


def _forward_without_offsets(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of peft's layers for hqq and GPTQ, which do not know where invocation tokens stand when peft says it.

    vars(layer)["forward"] = MethodType(_forward_without_offsets, layer)
    """
    # Of an adapter that has no gate yet peft would adapt every row: better that it fails.
    if all(name in layer.lora_variant for name in layer.active_adapters if name in layer.lora_A):
        kwargs.pop("alora_offsets", None)
    return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]


def _choose(model: nn.Module, gate: Gate | None) -> None:
    """Make this gate the model's: its row stands for the mask token, its rows are adapted. None leaves the base."""
    base = base_of(model)
    if gate_of(base) is gate:
        return
    for module in base.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Gate)]:
                del hooks[key]
    for name in ("mtpkern_gate", "mtpkern_siblings"):
        vars(base).pop(name, None)
    if model is not base:
        model._parameters.pop("mask_row", None)
    if gate is None:
        return
    if model is not base:
        model.register_parameter("mask_row", gate.row)
    embedding = base.get_input_embeddings()  # type: ignore[operator]
    # Some models look a token up in a second table of as many rows.
    tables = [x for x in base.modules() if isinstance(x, nn.Embedding) and len(x.weight) == gate.mask_token_id]
    for table in {embedding, *tables}:
        table.register_forward_pre_hook(gate.hide_mask_tokens)
    embedding.register_forward_hook(gate.embed_mask_tokens)
    base.mtpkern_gate = gate  # type: ignore[assignment]
    # No part of the gate, which the layers hold: they would go with a collection of cycles alone.
    base.mtpkern_siblings = Siblings(base)  # type: ignore[assignment]


def _unload(tuner: Any) -> nn.Module:
    """peft's `unload`, behind which the base has no gate either."""
    base: nn.Module = type(tuner).unload(tuner)
    _choose(base, None)
    return base


def _load_adapter(model: Any, path: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
    """peft's `load_adapter`: where the name is taken it writes over the weights, and the gate's row goes with them."""
    from peft import PeftConfig

    before, now = model.peft_config.get(adapter_name), None
    # One that goes on learning takes its row, and keeps its settings, by itself.
    if before is not None and is_gated(before) and not is_trainable:
        now = PeftConfig.from_pretrained(str(path), **{name: kwargs[name] for name in _OF_HUB if name in kwargs})
        other = [name for name in _SHAPE if getattr(now, name, None) != getattr(before, name)]
        if not is_gated(now) or other:
            raise ValueError(
                f"the adapter {adapter_name!r} of this model is gated, and what is in {path} "
                f"{'is another kind' if not is_gated(now) else 'has another ' + ', '.join(other)}; load it under "
                f"another name, or model.delete_adapter({adapter_name!r}) first"
            )
        require_base(base_of(model), settings_of(now), str(path))
    result = type(model).load_adapter(model, path, adapter_name, is_trainable=is_trainable, **kwargs)
    if now is not None:
        gate = _gate_before(base_of(model), adapter_name)
        if gate is not None:
            gate.settings = settings_of(now)
            gate.row.data.copy_(row_of(now))
        before.auto_mapping = now.auto_mapping
    return result


def base_of(model: nn.Module) -> Any:
    """The model of transformers, of one that is peft's the one in it."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model.base_model.model if isinstance(model, peft.PeftMixedModel) else model.get_base_model()
    return model


def _layers_of(base: nn.Module, adapter: str) -> Iterator[Any]:
    """The LoRA layers that an adapter changes."""
    from peft.tuners.lora import LoraLayer

    return (module for module in base.modules() if isinstance(module, LoraLayer) and adapter in module.lora_A)


def _gate_before(base: nn.Module, adapter: str) -> Gate | None:
    """The gate that this adapter asks."""
    asked = (getattr(layer.lora_variant.get(adapter), "gate", None) for layer in _layers_of(base, adapter))
    return next((gate for gate in asked if gate is not None), None)


def require_bare(model: nn.Module) -> None:
    """Raise ValueError for a model whose layers carry adapters already: the next would be written over the first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_of(model)
    if base is not model or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        names = ", ".join(map(repr, getattr(model, "peft_config", None) or {})) or "of peft's"
        raise ValueError(
            f"{type(base).__name__} carries adapters already ({names}); expected the base alone, which unload() of the "
            "PeftModel returns, merge_and_unload() with what fine-tuning has taught them. For a second one beside the "
            "first, let the PeftModel load it: "
            "peft_model.load_adapter(path, 'second'), then peft_model.set_adapter('second')"
        )


def adopt(model: nn.Module) -> None:
    """Make the gate of the active gated adapter, if there is one, the model's, whoever has loaded it or set it.

    Raises ValueError for several that are active, and for one that is of another base or cannot be gated.
    """
    base = base_of(model)
    configs = getattr(model, "peft_config", None) or {}
    gated = {name for name, config in configs.items() if is_gated(config)}
    if not gated:
        return _choose(model, None)
    # peft activates an adapter in all layers, in those too that it does not change.
    anywhere = next((layer for name in gated for layer in _layers_of(base, name)), None)
    active = [name for name in getattr(anywhere, "active_adapters", ()) if name in gated]
    if len(active) > 1:
        raise ValueError(
            f"{type(base).__name__} has {len(active)} active gated adapters ({', '.join(map(repr, active))}), and a "
            "mask token has one row; activate one: model.set_adapter(name)"
        )
    if not active:
        return _choose(model, None)
    [name] = active
    gate = _gate_before(base, name)
    if gate is None:
        require_gateable(configs[name])
        require_base(base, settings_of(configs[name]), f"adapter {name!r}")
        row = row_of(configs[name])
        gate = attach(model, row.requires_grad_(False), name)  # type: ignore[arg-type]
    # A row that is no parameter of the model has stayed where it was.
    if gate.row.device != base.device:
        gate.row.data = gate.row.data.to(base.device)
    _choose(model, gate)


def load_adapter(
    model: PreTrainedModel, path: str | Path, *, dtype: torch.dtype | None = None, is_trainable: bool = False
) -> PeftModel:
    """Give a model the gated adapter of a folder or hub id; `mtpkern.generate` then decodes several tokens a pass.

    The model's own weights stay what they are, and so does what `generate` emits: `Verified`, the default, writes the
    original model's greedy output. The model gets peft's layers in place, as by `PeftModel.from_pretrained`.

    dtype          of the adapter's weights; that of the model unless given, and float32 for one to train
    is_trainable   for `mtpkern.train.GatedTrainer`, which then trains it further; upon weights that are not those that
                   it was trained for, too, such as a fine-tuned base's, with a warning

    Several adapters of one base are switched by peft's own means: model.load_adapter("another", "second"), then
    model.set_adapter("second").

    Raises ValueError for an adapter that is not gated, is gated but for another base, or changes more than linear
    layers, and for a model that carries adapters already; FileNotFoundError for a name that leads nowhere; ImportError
    without peft.

        model = mtpkern.load_adapter(AutoModelForCausalLM.from_pretrained("base"), "adapter")
        ids = mtpkern.generate(model, **inputs, max_new_tokens=256)
    """
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError as error:
        raise ImportError("mtpkern.load_adapter needs peft; run: pip install peft") from error

    require_bare(model)
    require_found(str(path))
    config = PeftConfig.from_pretrained(str(path))
    if not is_gated(config):
        raise ValueError(
            f"{path} is not a gated adapter of mtpkern: expected its mark in adapter_config.json; load it with "
            "peft.PeftModel.from_pretrained, or train one with mtpkern train --gated"
        )
    require_gateable(config)
    require_base(model, settings_of(config), str(path), to_train=is_trainable)
    with wrapping(model):
        peft_model = PeftModel.from_pretrained(model, str(path), is_trainable=is_trainable).eval()
        attach(peft_model, row_of(config))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or name == "mask_row":
            parameter.requires_grad_(is_trainable)
            parameter.data = parameter.data.to(model.device, dtype or (torch.float32 if is_trainable else model.dtype))
    return peft_model


def save_adapter(model: PeftModel, folder: str | Path | None, *, dtype: torch.dtype | None = None) -> None:
    """Write a gated adapter's folder: peft's config with our mark, and its weights, in `dtype` or as they are.

    Of a model in shards all ranks call it, and those without a folder write nothing. Raises ValueError where no gated
    adapter is active.

    save_adapter(peft_model, "adapter", dtype=torch.bfloat16)
    """
    from peft import get_peft_model_state_dict

    # Beside one of fine-tuning it is not the first that is active.
    name = next((name for name in model.active_adapters if is_gated(model.peft_config[name])), None)
    if name is None:
        raise ValueError("none of the active adapters is gated; activate it, model.set_adapter(name), or save by peft")
    record_row(model)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = {key: _whole(x).to("cpu", dtype or x.dtype).contiguous() for key, x in state.items()}
    if folder is None:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder), auto_mapping_dict=config.auto_mapping)


def record_row(model: PeftModel) -> None:
    """Bring the mask token's row, as trained by now, and what the gate records into the config that peft saves."""
    base = model.get_base_model()
    for name in [name for name, config in model.peft_config.items() if is_gated(config)]:
        gate = _gate_before(base, name)
        if gate is not None:
            # In shards the gate's own is what a call has gathered.
            row = model.mask_row if gate is gate_of(base) else gate.row
            model.peft_config[name].auto_mapping = marked(gate.settings, _whole(row))


def _whole(x: Tensor) -> Tensor:
    """The tensor, gathered where it is a shard."""
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x
