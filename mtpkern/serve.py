"""`mtpkern serve`: an OpenAI-compatible server whose requests share passes.

The server is transformers' own, `transformers serve`, with what comes before and behind decoding: chat templates, the
protocol, streams. It hands requests on one at a time, to one thread that calls the model's `generate`; here many
threads do, and `generate` is an `Engine`'s, so that requests of many clients are decoded side by side. Two things it
leaves open are settled here: who has left is decoded for no longer, streamed or not, and who asks for what is refused
hears why.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from mtpkern.cli import positive
from mtpkern.output import exit_status
from mtpkern.refill import LOOK_AHEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cli.serve import Serve

    from mtpkern.engine import Engine


# What a client asks its draws to follow; each request is read in a context of its own.
_seed: ContextVar[int | None] = ContextVar("_seed", default=None)


class Waiting:
    """In the place of transformers' `InferenceThread`: calls run in threads of their own, where they wait for engine.

    Each runs in a copy of the context that it comes from.

    waiting = Waiting(engine)
    waiting.submit(print, "served").result()
    """

    def __init__(self, engine: Engine) -> None:
        self._model = engine.model
        self._pool = ThreadPoolExecutor(LOOK_AHEAD * engine.batch_size, thread_name_prefix="mtpkern.serve")

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Run call(*args, **kwargs)."""
        return self._pool.submit(copy_context().run, call, *args, **kwargs)

    def async_submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """The same, to be awaited; who is cancelled meanwhile leaves the engine behind the next pass."""
        unread = _Unread()
        if call == self._model.generate:
            kwargs["streamer"] = unread
        future = asyncio.wrap_future(self.submit(call, *args, **kwargs))
        future.add_done_callback(lambda done: unread.closed.set() if done.cancelled() else None)
        return future


class _Unread:
    """The streamer of an answer that is sent whole, with which it can be ended."""

    def __init__(self) -> None:
        self.closed = Event()

    def put(self, value: Any) -> None: ...

    def put_block(self, new: Any) -> None: ...

    def end(self) -> None: ...


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


async def refused(request: Any, error: Exception) -> Any:
    """The answer to a request for what is not honoured, which would be "Internal Server Error" and be tried again."""
    from fastapi.responses import JSONResponse

    # For whom it may concern that the fault is not the client's.
    logging.getLogger(__name__).info("answered with 400", exc_info=error)
    said = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": said}, status_code=400)


@contextmanager
def serving(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, *, background: bool, **options: Any
) -> Iterator[Serve]:
    """transformers' server, whose one model is the engine's; until it ends, or in the background while the block runs.

    name: what /v1/models calls the model; options: transformers' own of `transformers serve`, host and port say.

        with serving(engine, tokenizer, "mine", background=True, host="127.0.0.1", port=8000):
            ...
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server, utils
    from transformers.cli.serving.model_manager import ModelManager

    model, build = engine.model, server.build_server

    def generate(*args: Any, **kwargs: Any) -> Any:
        return engine.generate(*args, **kwargs, seed=_seed.get())

    def built(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        for kind in (TypeError, ValueError):
            app.add_exception_handler(kind, refused)
        app.add_middleware(until_left)
        return app

    loaded: dict[str, Callable[..., Any]] = {
        "_load_model": lambda *_, **__: model,
        "_load_processor": lambda *_, **__: tokenizer,
    }
    with ExitStack() as stack:
        for method, ours in loaded.items():
            stack.enter_context(patch.object(ModelManager, method, ours))
        stack.enter_context(patch.object(server, "build_server", built))
        stack.enter_context(patch.object(utils, "InferenceThread", partial(Waiting, engine)))
        stack.enter_context(patch.object(utils, "set_torch_seed", _seed.set))
        stack.enter_context(patch.dict(vars(model), generate=generate))
        served = Serve(force_model=name, non_blocking=background, **options)
        try:
            yield served
        finally:
            if background:
                served.kill_server()


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="mtpkern serve",
        description="Serve a checkpoint, or a gated adapter upon its base, to OpenAI clients; requests share passes. "
        "Needs pip install 'transformers[serving]'.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="path or hub id of a checkpoint, or of a gated adapter")
    add("--strategy", default="verified", metavar="NAME[:K][:THRESHOLD]", help="as of mtpkern generate")
    add("--mask-token-id", type=int, metavar="ID", help="where the checkpoint does not record it")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--device", help="such as cpu or cuda:0 (default: the accelerator, if there is one)")
    add("--base", metavar="MODEL", help="of a gated adapter, where its base is not where it was")
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

    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("transformers' server is not here whole; run: pip install 'transformers[serving]'")
    from mtpkern.adapter import base_of
    from mtpkern.engine import Engine
    from mtpkern.loading import device_of, load, quiet, require_model
    from mtpkern.strategies import strategy_of

    strategy = strategy_of(args.strategy)
    quiet()
    require_model(args.model)
    loaded, tokenizer = load(args.model, args.dtype, device_of(args.device), base=args.base)
    model: PreTrainedModel = base_of(loaded)
    room = {"batch_size": args.batch_size, "max_length": args.max_length}
    options: dict[str, Any] = {"strategy": strategy, "mask_token_id": args.mask_token_id}
    with (
        Engine(model, tokenizer=tokenizer, **room, **options) as engine,
        serving(engine, tokenizer, args.name or args.model, background=False, host=args.host, port=args.port),
    ):
        pass


if __name__ == "__main__":
    sys.exit(exit_status(main))
