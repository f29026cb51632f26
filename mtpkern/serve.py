"""`mtpkern serve`: an OpenAI-compatible server whose requests share passes.

The server is transformers' own, `transformers serve`, with what comes before and behind decoding: chat templates, the
protocol, streams. It hands requests on one at a time, to one thread that calls the model's `generate`; here many
threads do, and `generate` is an `Engine`'s, so that requests of many clients are decoded side by side. What it leaves
open is settled here: who has left is decoded for no longer, streamed or not; who asks for what is not honoured hears
why (`mtpkern.asked`); and an error of ours is told from one of the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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

import torch

from mtpkern import asked
from mtpkern.cli import positive
from mtpkern.entry import entered
from mtpkern.model import learned_positions
from mtpkern.output import exit_status
from mtpkern.refill import LOOK_AHEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cli.serve import Serve

    from mtpkern.engine import Engine


_LAST_PORT = 65535
# Whether a request's tokens are there: what goes wrong from then on is not the client's.
_answered: ContextVar[bool] = ContextVar("_answered", default=False)


class Failed(RuntimeError):
    """What went wrong while a request was decoded, which is not the client's fault."""


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
    """The answer to what cannot be read or is not honoured; without it a client would try that again."""
    if _answered.get():
        raise error
    # For whom it may concern that the fault is not the client's.
    logging.getLogger(__name__).info("answered with 400", exc_info=error)
    plain = isinstance(error, (TypeError, ValueError))
    return _said(str(error) if plain else f"{type(error).__name__}: {error}", "invalid_request_error", 400)


async def failed(request: Any, error: Exception) -> Any:
    """The answer where the fault is not the client's; the server's log has the traceback."""
    return _said(str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}", "server_error", 500)


def _said(message: str, kind: str, status: int) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


class _Quoted(str):
    """A message that transformers' server writes between the quotes of a JSON text as it is."""

    def __format__(self, spec: str) -> str:
        return json.dumps(str(self))[1:-1]


@contextmanager
def serving(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, *, background: bool, **options: Any
) -> Iterator[Serve]:
    """transformers' server, whose one model is the engine's; until it ends, or in the background while the block runs.

    name: what /v1/models calls the model; options: transformers' own of `transformers serve`, host and port say.

        with serving(engine, tokenizer, "mine", background=True, host="127.0.0.1", port=8000):
            ...
    """
    from jinja2 import TemplateError
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server, utils
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler

    questions = {CompletionHandler: "prompt", ChatCompletionHandler: "messages", ResponseHandler: "input"}
    model, build = engine.model, server.build_server
    handler, manager = utils.BaseHandler, utils.GenerateManager
    validate, configure = handler._validate_request, handler._build_generation_config
    positions = learned_positions(model, needed=engine.max_length - 1)  # the last token is never fed
    room = engine.max_length if positions is None else positions + 1

    def generate(input_ids: Any, *, attention_mask: Any = None, **kwargs: Any) -> Any:
        with entered("mtpkern serve"):
            future = engine.submit(input_ids, **kwargs, seed=asked.seed.get())
        try:
            new = future.result().tokens
        except utils._GenerationCancelled:
            raise
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        return torch.cat([input_ids, torch.tensor([new], dtype=torch.int64, device=input_ids.device)], 1)

    def validated(self: Any, body: dict[str, Any]) -> None:
        validate(self, {name: value for name, value in body.items() if name not in asked.OURS})
        for kind, question in questions.items():
            if isinstance(self, kind):
                asked.require_honoured(body, question)

    def configured(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = configure(self, body, *args, **kwargs)
        asked.settle(config, body)
        return config

    def streaming(self: Any, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        asked.fit(config, inputs["input_ids"].shape[1], room)
        return stream(self, model, processor, inputs, config, *args, **kwargs)

    async def whole(self: Any, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        asked.fit(config, inputs["input_ids"].shape[1], room)
        answer = await decode(self, model, processor, inputs, config, *args, **kwargs)
        _answered.set(True)
        return answer

    stream, decode = manager.generate_streaming, manager.generate_non_streaming

    class StreamError(utils._StreamError):
        def __init__(self, msg: str) -> None:
            super().__init__(_Quoted(msg))

    def built(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        for kind in (TypeError, ValueError, LookupError, AttributeError, TemplateError):
            app.add_exception_handler(kind, refused)
        app.add_exception_handler(Exception, failed)
        app.add_middleware(until_left)
        return app

    ours: tuple[tuple[Any, str, Any], ...] = (
        (ModelManager, "_load_model", lambda *_, **__: model),
        (ModelManager, "_load_processor", lambda *_, **__: tokenizer),
        (handler, "_validate_request", validated),
        (handler, "_build_generation_config", configured),
        (manager, "generate_streaming", streaming),
        (manager, "generate_non_streaming", whole),
        (server, "build_server", built),
        (utils, "InferenceThread", partial(Waiting, engine)),
        (utils, "set_torch_seed", asked.seed.set),
        (utils, "_StreamError", StreamError),
        # The future tells; an `end` would make half an answer look whole.
        (utils.DirectStreamer, "fail", lambda *_: None),
    )
    with ExitStack() as stack:
        for where, name_there, what in ours:
            stack.enter_context(patch.object(where, name_there, what, create=name_there == "fail"))
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
    if args.port > _LAST_PORT:
        parser.error(f"argument --port: expected a number up to {_LAST_PORT}, got {args.port}")

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
