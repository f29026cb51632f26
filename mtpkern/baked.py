"""What a captured or a recorded step has baked in of its model: addresses of weights, settings of modules, functions.

It is compared before the passes of each call; while it is equal, the step may be replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel


def fingerprint(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a captured step has baked in of its model; equal as long as the step may be replayed.

    Of every module: which one it is, addresses and forms of its tensors, its hooks, its plain settings, and which other
    objects it holds (a forward of its own, say); of its class, and of the file that this is of, which functions these
    hold; of the configuration its plain settings. Values of weights are read anew at each replay and may change in
    place; a LoRA that is merged in place shows in the module's list of them.
    """
    facts = [_facts(vars(model.config)), _facts(vars(model.config.get_text_config(decoder=True)))]
    gate = vars(model).get("mtpkern_gate")
    if gate is not None:
        # The mask token's embedding is no parameter of this model.
        facts += _facts(gate.row), gate.mask_token_id
    # By hand, as a walk by torch's own means would take longer than several passes.
    modules: list[torch.nn.Module | None] = [model]
    kinds: dict[type, None] = {}
    while modules:
        module = modules.pop()
        if module is None:
            continue
        held = vars(module)
        modules.extend(held.get("_modules", {}).values())  # one that torch.jit has made shows none
        facts += id(module), type(module)
        kinds[type(module)] = None
        for name, value in held.items():
            # Most of what a module holds is empty, and what is there says so by its name.
            if name in _BOOKKEEPING or value is None or value is False or (isinstance(value, dict) and not value):
                continue
            facts += name, _facts(value)
    facts += (_same(x) for space in namespaces(kinds) for x in space.values() if callable(x))
    return tuple(facts)


def namespaces(kinds: Iterable[type]) -> list[dict[str, Any]]:
    """What modules of these classes call by name: the classes' own, those of their files, torch.nn.functional's.

    Somebody may put other functions there, as libraries of faster kernels do.

        namespaces({LlamaMLP: None})
    """
    files = dict.fromkeys(kind.__module__ for kind in kinds if not kind.__module__.startswith("torch."))
    spaces = [vars(sys.modules[name]) for name in ("torch.nn.functional", *files) if name in sys.modules]
    # Of names with two underscores torch.compile puts some into the files that it compiles.
    public = [{name: x for name, x in space.items() if not name.startswith("__")} for space in spaces]
    return [*public, *(dict(vars(kind)) for kind in (torch.nn.Module, *kinds))]


# What torch keeps in every module and no forward depends on, and what models that see images note anew in every call
# and read where nobody tells them positions, as passes do.
_BOOKKEEPING = set(vars(torch.nn.Module())) | {"rope_deltas"}
_BOOKKEEPING -= {
    *("training", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
}
_PLAIN = {bool, int, float, str, torch.dtype, torch.device}


def _facts(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a quantised or distributed tensor holds others
            return tuple(_facts(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    if isinstance(value, dict):
        return tuple((name, _facts(x)) for name, x in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_facts, value))
    return _same(value)


def _same(value: Any) -> Any:
    """Equal for the same object alone: not for another that has its place in memory once it has gone."""
    try:
        return id(value), ref(value)
    except TypeError:  # of few kinds, whose objects refer to no model and may be kept
        return value
