"""What stands between `mtpkern serve` and its clients: errors in OpenAI's form, ends of streams, and who has left."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpkern.pieces import Answer

# What a mistake of the user raises.
MISTAKES = TypeError, ValueError
# How transformers' server begins an error in a stream.
_ERROR = 'data: {"error": "'


class Refused(ValueError):
    """What the client has to mend."""

    status = 400
    code: str | None = None


class Missing(Refused):
    """A model that is not there."""

    status = 404
    code = "model_not_found"


class Ending(Refused):
    """What is not answered any more, because the server ends."""

    status = 503

    def __init__(self) -> None:
        super().__init__("the server ends; ask another, or this one once it is there again")


class Failed(RuntimeError):
    """What went wrong while a request was decoded, which is not the client's fault."""


@contextmanager
def refusing(*kinds: type[Exception], what: str = "") -> Iterator[None]:
    """Take errors of these kinds for the client's.

    with refusing(KeyError, what="messages cannot be read"):
        ...
    """
    try:
        yield
    except kinds as error:
        said = str(error) if isinstance(error, MISTAKES) else f"{type(error).__name__}: {error}"
        raise Refused(f"{what}: {said}" if what else said) from error


def until_left(app: Callable[..., Any]) -> Callable[..., Any]:
    """ASGI middleware that cancels the call of a client who leaves before the answer is whole; nothing else does.

    app.add_middleware(until_left)
    """

    async def watched(scope: Any, receive: Callable[[], Any], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        asked, left = asyncio.Event(), asyncio.Event()

        async def hear() -> Any:
            if asked.is_set():
                await left.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body"):
                asked.set()
            return message

        async def listen() -> None:
            await asked.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            call.cancel()

        call = asyncio.ensure_future(app(scope, hear, send))
        listening = asyncio.ensure_future(listen())
        try:
            await call
        except asyncio.CancelledError:
            if not left.is_set():
                raise
        finally:
            listening.cancel()

    return watched


async def refused(request: Any, error: Any) -> Any:
    """The answer to what is not honoured; without it a client would try that again."""
    # For whom it may concern that the fault is not the client's.
    logging.getLogger(__name__).info("answered with %s", error.status, exc_info=error)
    return _said(str(error), error.status, error.code)


async def unreadable(request: Any, error: Any) -> Any:
    """The same to a body that is no JSON, and to what transformers' server refuses: a path, a field."""
    detail = getattr(error, "detail", None) or f"the body must be a JSON object: {error.errors()[0]['msg']}"
    status = getattr(error, "status_code", 422)
    return _said(str(detail), 400 if status == 422 else status)


async def failed(request: Any, error: Exception) -> Any:
    """The answer where the fault is not the client's; the server's log has the traceback."""
    return _said(str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}", 500)


def _said(message: str, status: int, code: str | None = None) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse(_error(message, "server_error" if status >= 500 else "invalid_request_error", code), status)


def _error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def ending(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream as OpenAI's end: by [DONE], or by an error that says what it is."""
    async for piece in pieces:
        if (start := piece.rfind(_ERROR)) >= 0:
            message = json.loads(piece[start:].removeprefix("data: "))["error"]
            yield f"{piece[:start]}data: {json.dumps(_error(message, 'server_error'))}\n\n"
            return
        yield piece
    yield "data: [DONE]\n\n"


def cut_short(response: dict[str, Any]) -> dict[str, Any]:
    """A whole response, said to have come to its limit."""
    return {**response, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}


async def incomplete(pieces: AsyncIterator[str], answer: Answer) -> AsyncIterator[str]:
    """A response's stream, the last event of which says so where its answer has come to its limit."""
    async for piece in pieces:
        # Within a text its quotes would be escaped.
        if answer.cut and '"type":"response.completed"' in piece:
            event = json.loads(piece.removeprefix("data: "))
            event |= {"type": "response.incomplete", "response": cut_short(event["response"])}
            piece = f"data: {json.dumps(event)}\n\n"
        yield piece
