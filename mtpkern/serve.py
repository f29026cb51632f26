"""`mtpkern serve`: an OpenAI-compatible server whose requests share passes.

The server is transformers' own, `transformers serve`, with what comes before and behind decoding: chat templates, the
protocol, streams. It hands requests on one at a time, to one thread that calls the model's `generate`; here its
handlers (mtpkern.handlers) give them to an `Engine`, so that requests of many clients are decoded side by side. What it
leaves open is settled: a long prompt is read while others are answered; who has left is decoded for no longer, streamed
or not; who asks for what is not honoured hears why (`mtpkern.asked`), before a stream begins; an error of ours is told
from one of the client's (`mtpkern.replies`); and an answer ends as OpenAI's do (`mtpkern.pieces`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mtpkern.cli import add_model_options, positive
from mtpkern.output import exit_status

if TYPE_CHECKING:
    import uvicorn
    from transformers import PreTrainedTokenizerBase

    from mtpkern.engine import Engine

_LAST_PORT = 65535
# What tells requests apart, in their answers too.
_ID = "x-request-id"
# Seconds that a server which ends waits for clients to read that.
_LAST_WORDS = 3


def server(engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, *, host: str, port: int) -> uvicorn.Server:
    """The server of an engine, to be run: `run()` serves until Ctrl-C, or until its `should_exit` is set.

    name: what clients call the model. Its handlers are transformers', so that it needs transformers[serving]. Answers
    that are being written then are ended, and say so.

        server(engine, tokenizer, "mine", host="127.0.0.1", port=8000).run()
    """
    import uvicorn
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    from mtpkern.handlers import Chats, Completions, Responses, Served, health, model, models
    from mtpkern.replies import Refused, failed, refused, unreadable, until_left

    served = Served(engine, tokenizer, name)

    @asynccontextmanager
    async def reading(app: FastAPI) -> AsyncIterator[None]:
        with served.reader:
            yield

    app = FastAPI(lifespan=reading, openapi_url=None)
    app.state.served = served
    for path, kind in (("completions", Completions), ("chat/completions", Chats), ("responses", Responses)):
        app.post(f"/v1/{path}")(kind.answered)
    for path, told in (("/v1/models", models), ("/v1/models/{model:path}", model), ("/health", health)):
        app.get(path)(told)

    @app.middleware("http")
    async def told_apart(request: Any, answer: Any) -> Any:
        request.state.request_id = request.headers.get(_ID) or str(uuid4())
        response = await answer(request)
        response.headers[_ID] = request.state.request_id
        return response

    app.add_exception_handler(Refused, refused)
    for error in (HTTPException, RequestValidationError):
        app.add_exception_handler(error, unreadable)
    app.add_exception_handler(Exception, failed)
    app.add_middleware(until_left)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            """As ever, but for answers, which would be waited for."""
            served.end()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=_LAST_WORDS)
    return Server(config)


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="mtpkern serve",
        description="Serve a checkpoint, or a gated adapter upon its base, to OpenAI clients; requests share passes. "
        "Needs pip install 'transformers[serving]'.",
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--strategy", default="verified", metavar="NAME[:K][:THRESHOLD]", help="as of mtpkern generate")
    add("--batch-size", type=positive, default=8, metavar="N", help="requests side by side; others wait (default 8)")
    add(
        "--max-length",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens of a request and its answer (default 4096)",
    )
    add("--host", default="localhost", help="(default localhost)")
    add("--port", type=positive, default=8000, help="(default 8000)")
    add("--name", help="what clients call the model (default: MODEL)")
    args = parser.parse_args(argv)
    if args.port > _LAST_PORT:
        parser.error(f"argument --port: expected a number up to {_LAST_PORT}, got {args.port}")
    if args.name == "":
        parser.error("argument --name: expected what clients call the model, got ''; leave it out for the path")

    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("transformers' server is not here whole; run: pip install 'transformers[serving]'")
    from mtpkern.adapter import base_of
    from mtpkern.engine import Engine
    from mtpkern.loading import device_of, load, quiet
    from mtpkern.strategies import strategy_of

    options: dict[str, Any] = {"strategy": strategy_of(args.strategy), "mask_token_id": args.mask_token_id}
    options |= {"batch_size": args.batch_size, "max_length": args.max_length}
    quiet()
    model, tokenizer = load(args.model, args.dtype, device_of(args.device), base=args.base)
    with Engine(base_of(model), tokenizer=tokenizer, **options) as engine:
        server(engine, tokenizer, args.name or args.model, host=args.host, port=args.port).run()


if __name__ == "__main__":
    sys.exit(exit_status(main))
