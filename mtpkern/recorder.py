"""A pass on a CPU as the list of operations that it is made of.

A `Recorder` notes the operations of one pass. A `Recording` has a place in memory for the result of each, so that all
views are made once, and is the list of what is left to call: half of the operations, and no module's Python. What
depends on more than the number of rows is called as it is, `apart`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes of the smallest piece of memory.
LEAST_PIECE = 64

# What torch.tensor ends with, and does nothing to what has no gradients.
_DETACH = torch.ops.aten.detach_.default
_LINEAR, _VIEW = torch.ops.aten.linear.default, torch.ops.aten.view.default
_MM, _T = torch.ops.aten.mm.default, torch.ops.aten.t.default
# Shaped by values where it is by a mask.
_INDEX, _MASKS = torch.ops.aten.index.Tensor, {torch.bool, torch.uint8}
# What steps are given most, and holds no tensor.
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout}
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
# What torch binds to Python with the same arguments: called so, a small operation takes a microsecond less than by its
# schema.
_BOUND: dict[Any, Callable[..., object]] = {
    getattr(getattr(torch.ops.aten, name), overload): getattr(torch, name)
    for overload, names in {
        "Tensor": ("add", "bitwise_and", "bitwise_or", "eq", "ge", "gt", "le", "lt", "mul", "ne", "sub"),
        "Scalar": ("eq", "ge", "gt", "le", "lt", "ne"),
        "Tensor_Scalar": ("pow",),
        "default": (
            *("addmm", "bitwise_not", "cat", "clamp", "cos", "cumprod", "gather", "maximum", "minimum", "mm", "neg"),
            *("rsqrt", "sin"),
        ),
        "dim": ("mean",),
        "dim_IntList": ("sum",),
        "self": ("where",),
    }.items()
    for name in names
}
_BOUND |= {torch.ops.aten.gelu.default: torch._C._nn.gelu, torch.ops.aten.silu.default: torch._C._nn.silu}


class NotRecordableError(Exception):
    """A pass that no list of operations can stand for."""


_recorder: ContextVar[Recorder | None] = ContextVar("mtpkern_recorder", default=None)


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """call(*args); where a pass is recorded it is called anew in each replay, with the tensors of that.

    A method of one of the recorder's owners is there the same method of the replay's.

        y = apart(cache.attend, layer, query, key, value)
    """
    # Dynamo knows no context variables, and nothing compiled is recorded.
    recorder = None if torch.compiler.is_compiling() else _recorder.get()
    return call(*args) if recorder is None else recorder.apart(call, *args)


class Recorder(TorchDispatchMode):
    """Notes the operations of the block, which run as they would, for `record`."""

    def __init__(self, owners: Sequence[Any] = ()) -> None:
        super().__init__()
        self.owners = owners
        # What was called, with what, and what came of it.
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled while a pass is recorded, and the guard takes as long as a small operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DETACH:
            return func(*args, **kwargs)
        if func is _LINEAR and len(args) == 2 and args[0].is_contiguous() and args[1].dim() == 2:
            # What torch makes of it, but not part by part through here.
            x, weight = args
            flat = self._noted(_VIEW, x, [-1, x.shape[-1]])
            return self._noted(_VIEW, self._noted(_MM, flat, self._noted(_T, weight)), [*x.shape[:-1], len(weight)])
        if _is_composite(func):
            with self:  # of its parts
                return func.decompose(*args, **kwargs)
        reason = _not_recordable(func, func is _INDEX and any(x is not None and x.dtype in _MASKS for x in args[1]))
        if reason:
            raise NotRecordableError(f"{func} {reason}")
        return self._noted(func, *args, **kwargs)

    def _noted(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, out))
        return out

    def apart(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call it, and note that it was called, not what it does."""
        # Its operations, and what else it has called apart, do not come through here.
        token = _recorder.set(None)
        try:
            with torch._C._DisableTorchDispatch():
                out = call(*args)
        finally:
            _recorder.reset(token)
        step = _Apart(call)
        if isinstance(call, MethodType):
            owner = next((i for i, x in enumerate(self.owners) if x is call.__self__), None)
            step = _Apart(call) if owner is None else _Apart(call.__func__, owner)
        self.steps.append((step, args, {}, out))
        return out


@dataclass(frozen=True)
class _Apart:
    """A function that each replay calls as it is; of an owner's method, the owner's place."""

    call: Callable[..., Any]
    owner: int | None = None


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others in whatever form its tensors are."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _not_recordable(func: Any, by_mask: bool) -> str:
    """Why another pass would do an operation otherwise; empty where it would not."""
    tags = func.tags
    if torch.Tag.nondeterministic_seeded in tags:
        return "draws random numbers"
    if torch.Tag.inplace_view in tags:
        return "makes a tensor a view of itself"
    shaped_by_values = by_mask if func is _INDEX else torch.Tag.dynamic_output_shape in tags
    if torch.Tag.data_dependent_output in tags or shaped_by_values:
        return "depends on values"
    return "tells the host something" if any("Tensor" not in str(x.type) for x in func._schema.returns) else ""


class Memory:
    """Memory for what passes compute in between, shared by the recordings of a model, which run one at a time."""

    def __init__(self) -> None:
        # What nobody reads any more, by its bytes.
        self.free: defaultdict[int, list[Piece]] = defaultdict(list)

    def take(self, like: Tensor) -> tuple[Piece, Tensor]:
        """A piece of memory, and a tensor of this form in it."""
        n = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride())) if like.numel() else 0
        # Of few sizes, or every recording of more rows than those before would have memory of its own.
        size = max(LEAST_PIECE, 1 << (n * like.element_size() - 1).bit_length())
        free = self.free[size]
        piece = free.pop() if free else Piece(torch.empty(size, dtype=torch.uint8))
        form = like.dtype, like.shape, like.stride()
        if form not in piece.tensors:
            piece.tensors[form] = piece.memory.view(like.dtype)[:n].as_strided(like.shape, like.stride())
        return piece, piece.tensors[form]

    def give_back(self, piece: Piece) -> None:
        """Nobody reads there any more."""
        self.free[piece.memory.nbytes].append(piece)


@dataclass(frozen=True)
class Piece:
    """Some memory, and the tensors that have been made in it, which layers of one form share."""

    memory: Tensor
    tensors: dict[Any, Tensor] = field(default_factory=dict)


class Recording:
    """A pass as what there is to call; see `record`, which makes it.

        logits = recording([cache], input_ids, position)    # [R, V], good until the next; input_ids, position [1, R]

    Raises NotRecordableError, when it is made, where the pass has written to what it has not made.
    """

    def __init__(self, recorder: Recorder, inputs: Sequence[Tensor], logits: Tensor, memory: Memory) -> None:
        self.owners: list[Any] = []
        self.calls: list[Callable[[], object]] = []
        # What stands for the tensors of the pass, which live as long as its steps.
        stand_ins: dict[int, Tensor] = {}
        # By where they lie: memory, None where nobody reads it any more, and the last step that does.
        pieces: dict[int, Piece | None] = {}
        read = [_tensors(*given, *named.values()) for _, given, named, _ in recorder.steps]
        made = [_tensors(out) for *_, out in recorder.steps]
        places = {id(x): _place(x) for xs in (inputs, *read, *made) for x in xs}
        written = {places[id(x)] for func, given, named, _ in recorder.steps for x in _mutated(func, given, named)}
        last = {places[id(x)]: i for i, xs in enumerate(zip(read, made)) for x in (*xs[0], *xs[1])}

        def make(x: Tensor) -> Tensor:
            pieces[places[id(x)]], stand_ins[id(x)] = memory.take(x)
            return stand_ins[id(x)]

        def stand_in(x: Tensor) -> Tensor:
            if id(x) not in stand_ins and places[id(x)] in pieces:
                raise NotRecordableError("a view has come about unseen")
            return stand_ins.get(id(x), x)

        self.inputs = [make(x) for x in inputs]
        for i, (func, given, named, out) in enumerate(recorder.steps):
            args, kwargs = _mapped(stand_in, given), _mapped(stand_in, named)
            of_given, of_outs = ({places[id(x)] for x in xs} for xs in (read[i], made[i]))
            if made[i] and not read[i] and not isinstance(func, _Apart) and not of_outs & written:
                continue  # made of nothing, it is the same each time
            if isinstance(func, _Apart):
                if of_outs & of_given or not isinstance(out, Tensor | None):
                    raise NotRecordableError(f"{func.call} returns what it was given, or more than a tensor")
                self.calls.append(partial(_call_apart, func, self.owners, args, None if out is None else make(out)))
            elif func._schema.is_mutable:
                if not all(places[id(x)] in pieces for x in _mutated(func, given, named)):
                    raise NotRecordableError(f"{func} writes to what the pass has not made")
                self.calls.append(partial(func, *args, **kwargs))
            elif made[i] and of_outs <= of_given:
                # A view, whatever its schema says: of memory that stays, and so made once.
                stand_ins.update((id(x), y) for x, y in zip(made[i], _tensors(func(*args, **kwargs))))
            else:
                self.calls.append(_into(func, args, kwargs, [make(x) for x in made[i]]))
            for place in of_given | of_outs:
                if last[place] == i and place != places[id(logits)] and (piece := pieces.get(place)) is not None:
                    memory.give_back(piece)
                    pieces[place] = None
        self.logits = stand_in(logits)
        for left in pieces.values():
            if left is not None:
                memory.give_back(left)

    @torch.inference_mode()
    def __call__(self, owners: Sequence[Any], *inputs: Tensor) -> Tensor:
        """The logits of a pass over these."""
        for stand_in, x in zip(self.inputs, inputs):
            stand_in.copy_(x)
        self.owners[:] = owners
        try:
            for call in self.calls:
                call()
        finally:
            self.owners.clear()  # whose caches are a run's own
        return self.logits


def _call_apart(step: _Apart, owners: Sequence[Any], args: Sequence[Any], out: Tensor | None) -> None:
    found = step.call(*args) if step.owner is None else step.call(owners[step.owner], *args)
    if out is not None:
        out.copy_(found)


def _mapped(stand_in: Callable[[Tensor], Tensor], value: Any) -> Any:
    """What a step was given, or has returned, with its tensors replaced; torch's `tree_map` takes ten times as long."""
    if isinstance(value, Tensor):
        return stand_in(value)
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (list, tuple):
        return kind([_mapped(stand_in, x) for x in value])
    if kind is dict:
        return {name: _mapped(stand_in, x) for name, x in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(stand_in, getattr(value, f.name)) for f in fields(value)})
    return value


def _tensors(*values: Any) -> list[Tensor]:
    """All tensors in what a step was given, or has returned."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    _mapped(note, values)
    return found


def _place(x: Tensor) -> int:
    """Where a tensor lies, or an opaque one is; for as long as it lives."""
    return id(x) if x.layout != torch.strided else x.untyped_storage().data_ptr()


def _mutated(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among its arguments that an operation writes to."""
    if isinstance(func, _Apart) or not func._schema.is_mutable:
        return []
    given = zip(func._schema.arguments, [*args, *(kwargs.get(x.name) for x in func._schema.arguments[len(args) :])])
    return _tensors([x for argument, x in given if argument.alias_info is not None and argument.alias_info.is_write])


def _into(func: Any, args: Any, kwargs: Any, outs: list[Tensor]) -> Callable[[], object]:
    """The operation with its results in these."""
    if func in _COPIES:
        return partial(outs[0].copy_, args[0])
    if func in _BOUND:
        return partial(_BOUND[func], *args, **kwargs, out=outs[0])
    into, names = _out_form(func)
    if into is not None and len(names) == len(outs):
        return partial(into, *args, **kwargs, **dict(zip(names, outs)))
    return partial(_copied, partial(func, *args, **kwargs), outs)


def _copied(call: Callable[[], Any], outs: Sequence[Tensor]) -> None:
    for there, x in zip(outs, _tensors(call())):
        there.copy_(x)


@cache
def _out_form(func: Any) -> tuple[Any, list[str]]:
    """The form of an operation that writes into given tensors, and what it calls them."""
    own = [(x.name, str(x.type)) for x in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        form = getattr(func.overloadpacket, name)
        arguments = form._schema.arguments
        outs = [x.name for x in arguments if x.is_out]
        if outs and [(x.name, str(x.type)) for x in arguments if not x.is_out] == own:
            return form, outs
    return None, []


def record(
    forward: Callable[..., Tensor], owners: Sequence[Any], inputs: Sequence[Tensor], memory: Memory
) -> tuple[Recording, Tensor]:
    """forward(*inputs) of tensors that nobody else holds: its recording, and what came out, a pass's logits [R, V].

    owners: what the pass reads by methods that are called `apart`, of which each replay is given its own. Raises
    NotRecordableError for a pass that a list of operations cannot stand for.

        recording, logits = record(forward, [cache], (input_ids.clone(), position.clone()), Memory())
    """
    recorder, modes = Recorder(owners), torch._C._len_torch_dispatch_stack()

    def end() -> None:
        _recorder.set(None)
        while torch._C._len_torch_dispatch_stack() > modes:  # Ctrl-C has kept it from going by itself
            torch._C._pop_torch_dispatch_stack(None)

    try:
        _recorder.set(recorder)
        with recorder:
            logits = forward(*inputs)
    finally:
        try:
            end()
        except BaseException:
            end()
            raise
    return Recording(recorder, inputs, logits, memory), logits
