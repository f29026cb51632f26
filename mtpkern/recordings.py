"""Passes on a CPU, recorded: what a CUDA graph is to a GPU.

A fifth to a third of a pass of so small a model as runs on a CPU goes for what stands around its operations: modules,
views, memory for results. So a pass is recorded (mtpkern.recorder), once as many of its number of rows have run as make
it pay, and replayed. Attention, which looks at as many slots as are in use, and what an adapter adds to the rows that
are masks stay calls as they are. The first replay is compared with the pass itself, bit by bit.

Weights are read where they are, so that they may change in place; what else a recording has baked in of its model is
compared at the beginning of each run, as for a CUDA graph (`mtpkern.baked.fingerprint`): a hook that is set in the
middle of one is called from the next on. A model goes without whose pass depends on values (experts in a loop, say),
draws random numbers, or runs what is not the libraries' own, and so does a run inside of somebody's mode of torch
(`TorchFunctionMode`, `torch.device`). Recordings go with the model, or at `mtpkern.release_graphs`.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from mtpkern.baked import fingerprint, namespaces
from mtpkern.foreign import foreign
from mtpkern.model import is_tested, models_of
from mtpkern.output import first_line
from mtpkern.recorder import Memory, NotRecordableError, Recording, record

# Passes of one kind before one is recorded. Recording and the comparison take two to three passes more, a replay saves
# a sixth of one to two fifths: about as many as pay for it, so that nothing costs more than twice what it has to.
WARM_UP = 12
# A pass of more rows has much more to do than what recording saves, and to hold while it is recorded.
MOST_ROWS = 192
# Of a run shorter than this the look at the model would take more than is saved.
LEAST_TOKENS = 16
# Whose modules do nothing but compute, of which a list of operations is all.
_PLAIN = {"torch", "transformers", "peft", "mtpkern"}


def rows_in(needed: int, most: int) -> int:
    """Rows of a pass that needs so many: up to three binary digits, so that few numbers come and are recorded.

    As many whether it is recorded or not, or a call's bits would depend on those before it.

        rows_in(9, most=100), rows_in(33, most=100), rows_in(97, most=100)    # 10, 40, 100
    """
    step = 1 << max(0, (needed - 1).bit_length() - 3)
    rows = min(most, -(-needed // step) * step)
    return rows if rows <= MOST_ROWS else needed


class Recordings:
    """The passes of one model, as they are or as they were recorded: by their rows, and whether any is a mask.

        recordings = recordings_of(model, ())
        logits = recordings(model, forward, owners, input_ids, position, maskless)

    baked: what passes read besides the model that may be another in a later run; the very same, not equal.
    """

    def __init__(self, baked: Sequence[Any]) -> None:
        self.baked = baked
        self.seen: Counter[tuple[int, bool]] = Counter()
        self.made: dict[tuple[int, bool], Recording] = {}
        self.proven: set[tuple[int, bool]] = set()
        self.memory = Memory()
        # The model's, where there are recordings, or has been seen that there can be none.
        self.fingerprint: tuple[Any, ...] | None = None
        self.refused = False
        # Whether the last pass ran as the next of its kind will, so that its time tells something.
        self.usual = True

    def is_of(self, model: PreTrainedModel, baked: Sequence[Any]) -> bool:
        """Whether what is known holds for the model as it is now."""
        same = len(baked) == len(self.baked) and all(x is y for x, y in zip(baked, self.baked))
        return same and (self.fingerprint is None or self.fingerprint == fingerprint(model))

    def _wanted(self, key: tuple[int, bool]) -> bool:
        return self.seen[key] > WARM_UP and key[0] <= MOST_ROWS and not self.refused

    def __call__(
        self,
        model: PreTrainedModel,
        forward: Callable[[Tensor, Tensor], Tensor],
        owners: Sequence[Any],
        input_ids: Tensor,
        position: Tensor,
        maskless: bool,
    ) -> Tensor:
        """Logits of a pass over input_ids and position [1, R]: what `forward` makes of them, or its recording."""
        key = input_ids.shape[1], maskless
        self.seen[key] += 1
        self.usual = not self._wanted(key) or key in self.proven
        if not self._wanted(key) or torch.is_autocast_enabled("cpu"):
            return forward(input_ids, position)
        if key in self.proven:
            return self.made[key](owners, input_ids, position)
        try:
            if self.fingerprint is None:
                self.fingerprint = fingerprint(model)
            if key in self.made:
                found = self.made[key](owners, input_ids, position)
                logits = forward(input_ids, position)
                if not torch.equal(logits, found):
                    raise NotRecordableError("another pass has done something else")
                self.proven.add(key)
                return logits
            if not _is_plain(model):
                raise NotRecordableError("the model holds what may do more than compute")
            self.made[key], logits = record(forward, owners, (input_ids.clone(), position.clone()), self.memory)
            return logits
        except Exception as error:  # of operations that nobody has tried, anything
            self._refuse(error)
        return forward(input_ids, position)

    def _refuse(self, error: Exception) -> None:
        self.refused = True
        self.made.clear()
        self.proven.clear()
        self.memory = Memory()
        if not isinstance(error, NotRecordableError):
            warnings.warn(
                "a pass could not be recorded, and passes of this model run as they are, which takes somewhat longer; "
                f"mtpkern.release_graphs(model) lets the next call try again: {first_line(error)}",
                RuntimeWarning,
                stacklevel=2,
            )


def _is_plain(model: nn.Module) -> bool:
    """Whether all that the model's modules do is to call operations, on tensors that hold their values themselves."""
    known = _PLAIN | sys.stdlib_module_names
    called = (x for space in namespaces(dict.fromkeys(map(type, model.modules()))) for x in space.values())
    if any(isinstance(x, FunctionType) and _root(x) not in known for x in called):
        return False
    for module in model.modules():
        held = vars(module)
        if isinstance(module, torch.jit.ScriptModule) or held.get("_compiled_call_impl") is not None:
            return False
        hooks = (*held["_forward_hooks"].values(), *held["_forward_pre_hooks"].values())
        if any(_root(hook) != "mtpkern" for hook in hooks) or "forward" in held or _root(type(module)) not in _PLAIN:
            return False
        if any(callable(value) and _root(value) not in _PLAIN for value in held.values()):
            return False
        tensors = [x for x in (*held["_parameters"].values(), *held["_buffers"].values()) if x is not None]
        if any(type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" for x in tensors):
            return False
    return True


def _root(what: Any) -> str:
    """The package that a class or a function is of."""
    while isinstance(what, partial):
        what = what.func
    return str(getattr(what, "__module__", "")).partition(".")[0]


# What is known of each model's passes.
_kept: WeakKeyDictionary[PreTrainedModel, Recordings] = WeakKeyDictionary()


def recordings_of(model: PreTrainedModel, baked: Sequence[Any], new_tokens: int) -> Recordings | None:
    """What is known of the passes of a model, for a run of so many tokens; None where passes run as they are.

    The caller holds the model (see `exclusive`).
    """
    if new_tokens < LEAST_TOKENS or not is_tested(model):
        return None
    # What somebody has put around operations or into the model would see none of a replay.
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or foreign(model):
        return None
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    kept = _kept.get(model)
    if kept is None or not kept.is_of(model, baked):
        kept = _kept[model] = Recordings(baked)
    return kept


def forget(model: PreTrainedModel | None = None) -> None:
    """Let the recordings of one model or of all go; a run keeps its own until it ends."""
    for one in models_of(_kept) if model is None else [model]:
        _kept.pop(one, None)
