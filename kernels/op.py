"""Ops: a signature that stands once, its torch form and its Triton form.

    @op(mutates=["x"])
    def scaled(x: Tensor, scoring: Scoring) -> None:
        \"""What it does. This is the public function, and this its body in plain torch.\"""
        x.mul_(scoring.scale)

    @scaled.kernel
    def scaled_triton(x, scoring):
        _scaled_kernel[(len(x),)](x, scoring.scale)

A call runs the kernel where the device of the first tensor takes it (kernels/form.py), else the torch form, which is
`scaled.reference` too; either at once, since torch's dispatcher would cost more than the ops do on a CPU. torch.compile
sees one operator of torch instead, `mtpkern::scaled`, which does the same when it runs.

Operators of torch take tensors and numbers, so a dataclass among the arguments is handed on as its fields, in their
order, and made again on the other side. A field that does not count in comparisons (compare=False) holds what the torch
form remembers, and stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import update_wrapper
from inspect import Parameter, signature
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

from mtpkern.kernels.form import takes_kernel

P = ParamSpec("P")
T = TypeVar("T")


class Operator(Generic[P, T]):
    """A function as an operator of torch, with a schema made of its annotations: a call goes through the dispatcher."""

    def __init__(self, function: Callable[P, T], mutates: Sequence[str], name: str) -> None:
        update_wrapper(self, function)
        self.function = function
        hints = get_type_hints(function)
        returns = hints.pop("return")
        returns = None if returns is type(None) else returns
        parameters = signature(function).parameters
        self._defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        # Of each argument the class and the fields that are handed on, where it is a dataclass.
        self._parts = {name: _parts(hint) for name, hint in hints.items()}
        flat: dict[str, Any] = {}
        for argument, (kind, names) in self._parts.items():
            of_fields = get_type_hints(kind) if kind else {}
            flat |= {f"{argument}_{name}": of_fields[name] for name in names} if kind else {argument: hints[argument]}

        def run(*values: Any) -> T:
            left = iter(values)
            given = {
                argument: kind(**{name: next(left) for name in names}) if kind else next(left)
                for argument, (kind, names) in self._parts.items()
            }
            return self.run(**given)

        sign = signature(run)
        of_schema = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in flat.items()]
        setattr(run, "__signature__", sign.replace(parameters=of_schema, return_annotation=returns))  # noqa: B010
        self.registered = torch.library.custom_op(f"mtpkern::{name}", run, mutates_args=mutates)
        self._overload = getattr(torch.ops.mtpkern, name).default

    def run(self, **given: Any) -> T:
        """What the operator does with its arguments, by their names."""
        return self.function(**given)  # type: ignore[call-arg]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The call through torch's dispatcher."""
        given = {**self._defaults, **dict(zip(self._parts, args)), **kwargs}
        flat: list[Any] = []
        for argument, (kind, names) in self._parts.items():
            value = given[argument]
            flat += [getattr(value, name) for name in names] if kind else [value]
        return self._overload(*flat)


class Op(Operator[P, T]):
    """The public function of an op, which chooses the form; see the head of this file."""

    def __init__(self, reference: Callable[P, T], mutates: Sequence[str], name: str, float64: bool) -> None:
        super().__init__(reference, mutates, name)
        self.reference = reference
        self._kernel: Callable[..., T] | None = None
        self._float64 = float64
        hints = get_type_hints(reference)
        self._first, self._at = next((name, at) for at, (name, hint) in enumerate(hints.items()) if hint is Tensor)

    def kernel(self, launcher: Callable[..., T]) -> Callable[..., T]:
        """Take this as the Triton form; it has the same arguments."""
        self._kernel = launcher
        return launcher

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The op in the form that the device of its tensors takes."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        x: Any = args[self._at] if self._at < len(args) else kwargs[self._first]
        if takes_kernel(x) and self._kernel is not None and (self._float64 or x.dtype != torch.float64):
            return self._kernel(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def run(self, **given: Any) -> T:
        """The op itself, outside of what torch.compile has made."""
        return self(**given)  # type: ignore[call-arg]


def op(
    *, mutates: Sequence[str] = (), name: str = "", float64: bool = True, fake: Callable[..., Any] | None = None
) -> Callable[[Callable[P, T]], Op[P, T]]:
    """Make an op of its torch form, whose arguments are annotated.

    mutates   names of the tensors that it writes, of a dataclass's "argument_field"
    name      of the operator, the function's unless given
    float64   whether the kernel computes in float64 too
    fake      of the operator's arguments: what comes back, without values; nothing unless given
    """

    def make(reference: Callable[P, T]) -> Op[P, T]:
        made = Op(reference, mutates, name or reference.__name__, float64)
        made.registered.register_fake(fake or (lambda *_: None))
        return made

    return make


def _parts(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The class of a dataclass and its fields that are handed on; None and none for whatever else."""
    if not is_dataclass(hint):
        return None, ()
    return hint, tuple(f.name for f in fields(hint) if f.compare)
