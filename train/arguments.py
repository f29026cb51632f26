"""The arguments of a run: how an option is declared, and how one that cannot be honoured is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass, with what --help says of it; of a list each object gets its own.

    k_min: int = option(2, "Smallest number of predictions of a span.")
    """
    told = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=told)
    return field(default=default, metadata=told)


def refuse(wrong: object, says: str) -> None:
    """Raise ValueError where something is wrong: `refuse(n < 1, f"n must be at least 1; got {n}")`."""
    if wrong:
        raise ValueError(says)


def require_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError for a value that is not allowed: `require_one_of("k_scope", "all", ("step", "rank"))`."""
    known = list(allowed)
    refuse(value not in known, f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
