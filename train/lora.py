"""LoRA through peft: adapters on the linear layers and one trained row of the embedding, that of the mask token.

The weights without their adapters are the teacher, bit for bit, so no second copy of the model is needed. Merging
adds the adapters to the weights and leaves a plain model.

Source   Hu et al., arXiv 2106.09685; peft's LoraConfig and trainable_token_indices
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtpkern.adapter import attach, gate_of, kept_on_error, load_adapter, require_bare, wrapping
from mtpkern.adapter_config import (
    GatedSettings,
    base_known_by,
    is_gated,
    is_quantised,
    marked,
    require_gateable,
    row_of,
)
from mtpkern.gate import Gate
from mtpkern.loading import require_found
from mtpkern.train.arguments import refuse
from mtpkern.train.config import MTPConfig
from mtpkern.train.extra import LoraConfig, PeftConfig, PeftModel, get_peft_model

# Beside experts that share a tensor: what peft takes, by names of older files, for those tensors, and routers.
_AS_EXPERTS = {"gate", "router", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def add_lora(
    model: PreTrainedModel,
    mask_token_id: int,
    *,
    rank: int,
    alpha: float | None = None,
    targets: str = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """Freeze the model, in place, and give it float32 adapters; the embedding's row `mask_token_id` is trained in full.

    rank, alpha   of every adapter; its product is scaled by alpha / rank, alpha is twice the rank unless given
    targets       names of the linear layers that get one, separated by commas, or "all-linear" (all but the head)
    seed          of the adapters' first weights; all ranks must start from the same ones

        peft_model = add_lora(model, mask_token_id, rank=16)
    """
    require_targets(model, targets)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    config = _config(rank, alpha, targets, trainable_token_indices={name.rpartition(".")[2]: [mask_token_id]})
    return _with_adapters(model, config, seed)


def adapters_asked(args: MTPConfig) -> dict[str, Any]:
    """Rank, alpha, targets and seed that a configuration asks for, as `add_lora` and `add_gated_lora` take them."""
    return {"rank": args.lora_rank, "alpha": args.lora_alpha, "targets": args.lora_targets, "seed": args.seed}


def _config(rank: int, alpha: float | None, targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=targets if targets == "all-linear" else [part.strip() for part in targets.split(",")],
        task_type="CAUSAL_LM",
        **more,
    )


def require_targets(model: PreTrainedModel, targets: str) -> None:
    """Raise ValueError for a name among `lora_targets` that no layer with a matrix bears; weights may be missing.

    with torch.device("meta"):
        require_targets(AutoModelForCausalLM.from_config(config), "q_proj,v_proj")
    """
    if targets == "all-linear" or any(x.ndim > 2 for x in model.parameters()):  # peft has names for shared experts
        return
    embedding = model.get_input_embeddings()
    layers = [
        f".{name}"
        for name, layer in model.named_modules()
        if layer is not embedding and not list(layer.children()) and _has_matrix(layer)
    ]
    unknown = [part for part in targets.split(",") if not any(name.endswith(f".{part.strip()}") for name in layers)]
    refuse(
        unknown,
        f"lora_targets must be names of linear layers, or all-linear; got {', '.join(map(repr, unknown))}, and this "
        f"model's are {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}",
    )


def _has_matrix(layer: nn.Module) -> bool:
    return hasattr(layer, "in_features") or getattr(getattr(layer, "weight", None), "ndim", 0) == 2


def _with_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with wrapping(model):
            peft_model = get_peft_model(model, config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return peft_model


def add_gated_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    k_max: int,
    alpha: float | None = None,
    targets: str = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """As `add_lora`, but the adapters act on mask rows only, and the model's matrices stay as they are.

    The mask token is the first id behind the vocabulary; its embedding, the parameter `mask_row` [H] of the result, is
    drawn with the mean and the variance of the embedding's rows. k_max is recorded in the adapter's folder.
    The linear layers may be quantised, in a way that peft can train beside; experts that share a tensor stay as they
    are, and layers beside them that bear their names. Raises ValueError for any other, and for a quantised embedding or
    head.

        peft_model = add_gated_lora(model, rank=16, k_max=8)
    """
    require_bare(model)
    require_targets(model, targets)
    embedding = model.get_input_embeddings()
    for module in (embedding, model.get_output_embeddings()):
        # hqq's and GPTQ's layers have none of that name.
        plain: Any = getattr(module, "weight", None)
        if type(plain) not in (Tensor, nn.Parameter) or not plain.is_floating_point():
            raise ValueError(
                f"{type(module).__name__} is quantised (its weight: {type(plain).__name__}): embedding and head are "
                "read as plain weights here; leave them out of the quantisation"
            )
    weight = embedding.weight.detach().float()
    # Some models scale what the embedding gives; the row takes the place of the scaled one.
    scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0), dtype=torch.float32).to(weight.device)
    generator = torch.Generator().manual_seed(len(weight))
    noise = torch.randn(weight.shape[1], generator=generator, dtype=torch.float32).to(weight.device)
    row = (weight.mean(0) + noise * weight.std(0)) * scale
    settings = GatedSettings(mask_token_id=len(weight), k_max=k_max, **base_known_by(model))
    # A token that never comes: to peft itself the adapter is off.
    never, marks = [settings.mask_token_id], marked(settings, row)
    shared = any(x.ndim > 2 for x in model.get_decoder().parameters())
    if targets == "all-linear" and (is_quantised(model) or shared):
        # peft looks for nn.Linear, which the layers of hqq and GPTQ are not, and adapts experts that share a tensor,
        # which then cannot ask the gate.
        head, layers, left_out = model.get_output_embeddings(), model.named_modules(), _AS_EXPERTS if shared else set()
        found = (name for name, layer in layers if hasattr(layer, "in_features") and layer is not head)
        targets = ",".join(name for name in found if name.rpartition(".")[2] not in left_out)
    config = _config(rank, alpha, targets, alora_invocation_tokens=never, auto_mapping=marks)
    require_gateable(config)
    row = row_of(config)
    row.data = row.data.to(weight.device)
    with wrapping(model):
        peft_model = _with_adapters(model, config, seed)
        attach(peft_model, row)
    return peft_model


def require_adapter(folder: str, *, rank: int) -> None:
    """Raise ValueError for what holds no gated adapter of this rank; its settings are read, no weights.

    require_adapter("adapter", rank=16)
    """
    try:
        require_found(folder)
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_adapter must be the folder of a gated adapter; got {folder}: {error}") from None
    says = f"init_adapter must be the folder of a gated adapter; {folder} holds another one of peft's: leave it out"
    refuse(not is_gated(config), says)
    r = config.r
    refuse(r != rank, f"init_adapter {folder} has rank {r}, and lora_rank is {rank}; set lora_rank: {r}")


def adapter_to_train(model: PreTrainedModel, folder: str, *, rank: int, k_max: int) -> PeftModel:
    """The model with the gated adapter of a folder, in float32, to be trained on for spans of up to k_max.

    Raises ValueError for an adapter of another rank, or that is not gated, or is of another base.

        peft_model = adapter_to_train(model, "adapter", rank=16, k_max=8)
    """
    require_adapter(folder, rank=rank)
    peft_model = load_adapter(model, folder, is_trainable=True)
    gate = cast(Gate, gate_of(model))
    gate.record(k_max=max(k_max, gate.settings.k_max))
    return peft_model.train()


def keeping(init: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` of a trainer, behind whose error model and teacher are what was given: without its adapters.

    Raises TypeError for what is no model: `@keeping` before `def __init__(self, model, **kwargs)`.
    """

    @wraps(init)
    def checked(self: Any, model: Any, **kwargs: Any) -> None:
        teacher = kwargs.get("teacher")
        for name, given in (("model", model), ("teacher", teacher)):
            if not isinstance(given, nn.Module) and (given is not None or name == "model"):
                raise TypeError(
                    f"{name} must be a loaded model; got {given!r}: give "
                    "AutoModelForCausalLM.from_pretrained(name, dtype='float32')"
                )
        with kept_on_error(model), nullcontext() if teacher is None else kept_on_error(teacher):
            init(self, model, **kwargs)

    return checked


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model: of a PeftModel the one that carries the adapters, else the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy of the model with the adapters added to its weights: `merged(peft_model).save_pretrained("out")`."""
    return merge(copy.deepcopy(model))


def merge(model: PeftModel) -> PreTrainedModel:
    """The model that carries the adapters, in place, with them added to its weights: `merge(peft_model)`.

    Where one of them changes the embedding or the head, and the two share their weight, each then has its own.
    """
    base = plain_model(model)
    parts: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    embedding, head = (part.base_layer if hasattr(part, "lora_A") else part for part in parts)
    if any(hasattr(part, "lora_A") for part in parts) and embedding.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    return cast(PreTrainedModel, model.merge_and_unload())


def adapters_of(model: PeftModel) -> dict[str, dict]:
    """The settings of every adapter by its name, without what says where it lies and with what it was made."""
    passing = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}
    # Sets have no order, and no place in a JSON file.
    return {
        name: {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items() if k not in passing}
        for name, config in model.peft_config.items()
    }
