"""What somebody has put into a model: hooks, forwards and classes that are not those of the libraries.

A kind of model is trusted as transformers has written it; any of these make it another, wherever in it they stand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtpkern.routing import plain_name

# Whose hooks and forwards leave a row's output to the row: wrappers, adapters, weights that are moved or quantised.
_KNOWN = {"torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "torchao", "optimum", "mtpkern"}
# What is of the checkpoint or the machine, and no setting of a computation.
_NAMES = {"transformers_version", "architectures", "dtype", "mtpkern"}

# Classes of the libraries, and the forward that each had when it was looked at.
_plain: dict[type, Any] = {}


def foreign(model: PreTrainedModel) -> tuple[Any, ...]:
    """What stands in a model's modules that no library has put there; equal as long as nobody changes it.

    Hooks and forwards of an instance, classes and their forwards from elsewhere, the functions by which it attends and
    masks where they are, and attention that has been told not to be causal: ((<weakref to the layer>, 7),) say. Empty
    for a model as it was loaded, with adapters or without.

        foreign(model)  # ()
        model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
        foreign(model)  # ((<weakref to the layer>, 7),)
    """
    found: list[Any] = []
    for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        found += [key for key, hook in hooks.items() if not _is_known(hook)]
    prepare = vars(model).get("prepare_inputs_for_generation")
    if prepare is not None and not _is_known(prepare):
        found.append(_mark(prepare))
    # By hand, as a walk by torch's own means would take longer than a small pass.
    modules: list[nn.Module | None] = [model]
    kinds: dict[type, None] = {}  # in order
    for module in modules:
        if module is None:
            continue
        held = module.__dict__
        kinds[type(module)] = None
        if held.get("_modules"):  # one that torch.jit has made shows none
            modules += held["_modules"].values()
        for hooks in (held.get("_forward_hooks", {}), held.get("_forward_pre_hooks", {})):
            if hooks:  # torch counts them through the process
                found += [(ref(module), key) for key, hook in hooks.items() if not _is_known(hook)]
        if "forward" in held and not _is_known(held["forward"]):
            found.append((ref(module), _mark(held["forward"])))
        if "is_causal" in held and held["is_causal"] is False:
            found.append((ref(module), "is_causal"))
    for kind in kinds:
        call: Any = getattr(kind, "forward", None)  # which torch.jit's kinds do not tell
        if _plain.get(kind) is not call:
            if _root(kind.__module__) in _KNOWN and _is_known(call):
                _plain[kind] = call
            else:
                found.append((kind, _mark(call), *(ref(x) for x in modules if type(x) is kind)))
    found += [_mark(call) for call in _attention_of(model, kinds) if not _is_known(call)]
    return tuple(found)


def _attention_of(model: PreTrainedModel, kinds: Iterable[type]) -> list[Any]:
    """The functions by which a model of modules of these kinds attends and masks where nobody routes it."""
    name = plain_name(model.config.get_text_config(decoder=True))
    files = {kind.__module__: sys.modules.get(kind.__module__) for kind in kinds}
    eager = [getattr(file, "eager_attention_forward", None) for file in files.values()] if name == "eager" else []
    return [ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name), *eager]


def _is_known(call: Any) -> bool:
    """Whether a callable, and all that it says to wrap, is the libraries' own."""
    while call is not None:
        wrapped = getattr(call, "__wrapped__", None)
        while isinstance(call, partial):
            call = call.func
        call = getattr(call, "__func__", call)
        # A function's own name of its module may be that of another, which it wraps.
        where = getattr(call, "__globals__", {}).get("__name__") or type(call).__module__
        if _root(where) not in _KNOWN:
            return False
        call = wrapped if wrapped is not None else getattr(call, "__wrapped__", None)
    return True


def _root(module: str) -> str:
    return module.partition(".")[0]


def _mark(call: Callable[..., Any]) -> Any:
    """Equal for the same callable, and for no other that has its place in memory later."""
    call = getattr(call, "__func__", call)
    try:
        return ref(call)
    except TypeError:
        return id(call)


def settings_of(value: Any) -> Any:
    """The settings of a configuration, hashable: equal for models that compute in the same way.

    settings_of(model.config) == settings_of(another_checkpoint_of_the_same_shape.config)
    """
    if isinstance(value, PreTrainedConfig):
        value = {name: x for name, x in vars(value).items() if not name.startswith("_") and name not in _NAMES}
    if isinstance(value, dict):
        return frozenset((name, settings_of(x)) for name, x in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(settings_of, value))
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    # True == 1 is the same setting.
    return value if plain else repr(value)
