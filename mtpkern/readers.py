"""Who reads a streamer in another thread, and what they hear of an error.

transformers' `generate` calls `end` behind the last token and at no error, so that whoever reads a TextIteratorStreamer
waits for ever behind one, unless it has a timeout. Here the reader raises it. `end` alone would make half an answer
look whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer


class _Raised(str):
    """A piece of text that raises an error in who compares it with the end of the stream, as a reader does."""

    error: BaseException

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise self.error


def tell(streamer: Any, error: BaseException, *, end: bool = False) -> None:
    """Have the reader of a streamer hear of an error: by its `fail(error)`, or by raising it.

    So raise the readers of transformers' TextIteratorStreamer and AsyncTextIteratorStreamer. Of any other, which has no
    `fail`, `end` is called where `end` says so.

        tell(streamer, ValueError("of a criterion"))
        next(streamer)    # ValueError
    """
    with suppress(BaseException):  # it may be the streamer that has failed, and whoever tells it has others to serve
        if callable(getattr(streamer, "fail", None)):
            streamer.fail(error)
        elif isinstance(streamer, (TextIteratorStreamer, AsyncTextIteratorStreamer)):
            raised = _Raised()
            raised.error = error
            streamer.on_finalized_text(raised, stream_end=True)
        elif end:
            streamer.end()


@contextmanager
def telling(streamer: Any) -> Iterator[None]:
    """Tell the streamer of what the block raises.

    with telling(streamer):
        ...
    """
    try:
        yield
    except BaseException as error:
        tell(streamer, error)
        raise
