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
from typing import Any, Generic, Optional, ParamSpec, TypeVar, get_args, get_type_hints

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
        parameters = signature(function).parameters
        self._defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        self._places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        # Of each argument the class and the names of what is handed on, where it is a dataclass.
        self._parts: dict[str, tuple[Any, tuple[str, ...]]] = {}
        flat: dict[str, Any] = {}
        for argument, hint in hints.items():
            kind = next((x for x in (hint, *get_args(hint)) if is_dataclass(x)), None)
            handed = {f.name: get_type_hints(kind)[f.name] for f in fields(kind) if f.compare} if kind else {}
            self._parts[argument] = kind, tuple(handed)
            # One that may be missing is handed on as nothing but None.
            parts = {f"{argument}_{key}": x if hint is kind else Optional[x] for key, x in handed.items()}  # noqa: UP045
            flat |= parts if kind else {argument: hint}

        def run(*values: Any) -> T:
            return self.run(**self._made_again(values))

        of_schema = [Parameter(key, Parameter.POSITIONAL_OR_KEYWORD, annotation=x) for key, x in flat.items()]
        back = None if returns is type(None) else returns
        sign = signature(run).replace(parameters=of_schema, return_annotation=back)
        setattr(run, "__signature__", sign)  # noqa: B010 (no attribute that mypy knows)
        self.registered = torch.library.custom_op(f"mtpkern::{name}", run, mutates_args=mutates)
        self._overload = getattr(torch.ops.mtpkern, name).default

    def run(self, **given: Any) -> T:
        """What the operator does with its arguments, by their names."""
        return self.function(**given)  # type: ignore[call-arg]

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Take this for what comes back, without values, of the same arguments."""
        self.registered.register_fake(lambda *values: function(*self._made_again(values).values()))
        return function

    def _made_again(self, values: Sequence[Any]) -> dict[str, Any]:
        """The arguments of what has been handed on."""
        left, given = iter(values), {}
        for argument, (kind, names) in self._parts.items():
            parts = {name: next(left) for name in names} if kind else {}
            missing = all(x is None for x in parts.values())
            given[argument] = next(left) if not kind else None if missing else kind(**parts)
        return given

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The call through torch's dispatcher."""
        if len(args) > len(self._places) or any(name not in self._parts for name in kwargs):
            raise TypeError(f"arguments are {', '.join(self._parts)}; got {len(args)} in place, {[*kwargs]} by name")
        given = {**self._defaults, **dict(zip(self._places, args)), **kwargs}
        flat: list[Any] = []
        for argument, (kind, names) in self._parts.items():
            value = given[argument]
            flat += [None if value is None else getattr(value, name) for name in names] if kind else [value]
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
    fake      what comes back, without values, of the same arguments; nothing unless given
    """

    def make(reference: Callable[P, T]) -> Op[P, T]:
        made = Op(reference, mutates, name or reference.__name__, float64)
        made.fake(fake or (lambda *_: None))
        return made

    return make


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[P, T]], Operator[P, T]]:
    """Make a function with annotated arguments an operator of torch, eager too: one that has a backward, say.

    Its `.fake` has to follow, and perhaps `.registered.register_autograd`, which knows the arguments as handed on.
    """
    return lambda function: Operator(function, mutates, name)
