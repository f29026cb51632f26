"""By what name a call has come in, for errors that say what does not support it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_name: ContextVar[str] = ContextVar("_name", default="mtpkern.generate")


def entry() -> str:
    """The name: "mtpkern.generate", unless the call came in by another."""
    return _name.get()


@contextmanager
def entered(name: str) -> Iterator[None]:
    """Name the calls of the block so, unless they have come in by a name already.

    with entered("mtpkern.Engine"):
        ...
    """
    before = _name.get()
    token = _name.set(name if before == "mtpkern.generate" else before)
    try:
        yield
    finally:
        _name.reset(token)
