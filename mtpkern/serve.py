"""`mtpkern serve`: an OpenAI-compatible server whose requests share passes.

The server is transformers' own, `transformers serve`, with what comes before and behind decoding: chat templates, the
protocol, streams. It hands requests on one at a time, to one thread that calls the model's `generate`; here they go to
an `Engine`, so that requests of many clients are decoded side by side. What it leaves open is settled here: who has
left is decoded for no longer, streamed or not; who asks for what is not honoured hears why (`mtpkern.asked`), before a
stream begins; an error of ours is told from one of the client's; and an answer ends as OpenAI's do (`mtpkern.pieces`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from inspect import signature
from threading import Event
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from weakref import finalize

from mtpkern import asked
from mtpkern.batching import BatchOutput
from mtpkern.cli import positive
from mtpkern.entry import entered
from mtpkern.model import learned_positions
from mtpkern.output import exit_status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cli.serve import Serve

    from mtpkern.engine import Engine
    from mtpkern.pieces import Answer, Pieces


_LAST_PORT = 65535
# Of transformers' routes those that mean something for the one model there is.
_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/health")
# What a mistake of the user raises.
MISTAKES = TypeError, ValueError
# How transformers' server begins an error in a stream.
_ERROR = 'data: {"error": "'
# What becomes of a request, and of one whose answer is streamed its streamer and its way into the line; each is read in
# a context of its own.
_answer: ContextVar[Answer] = ContextVar("_answer")
_shown: ContextVar[tuple[Pieces, asyncio.Task[None]]] = ContextVar("_shown")


class Refused(ValueError):
    """What the client has to mend."""


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
    """The answer to what is not honoured; without it a client would try that again."""
    # For whom it may concern that the fault is not the client's.
    logging.getLogger(__name__).info("answered with 400", exc_info=error)
    return _said(str(error), 400)


async def unreadable(request: Any, error: Any) -> Any:
    """The same to a body that is no JSON, and to what transformers' server refuses: a path, a model, a field."""
    detail = getattr(error, "detail", None) or f"the body must be a JSON object: {error.errors()[0]['msg']}"
    status = getattr(error, "status_code", 422)
    return _said(str(detail), 400 if status == 422 else status)


async def failed(request: Any, error: Exception) -> Any:
    """The answer where the fault is not the client's; the server's log has the traceback."""
    return _said(str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}", 500)


def _said(message: str, status: int) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse(_error(message, "server_error" if status >= 500 else "invalid_request_error"), status)


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _ending(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream as OpenAI's end: by [DONE], or by an error that says what it is."""
    async for piece in pieces:
        if (start := piece.rfind(_ERROR)) >= 0:
            message = json.loads(piece[start:].removeprefix("data: "))["error"]
            yield f"{piece[:start]}data: {json.dumps(_error(message, 'server_error'))}\n\n"
            return
        yield piece
    yield "data: [DONE]\n\n"


def _require_readable(body: dict[str, Any], question: str, not_of_templates: set[str]) -> None:
    """Refuse what transformers' server would fail to read, and options of chat templates that are none of theirs."""
    if isinstance(body[question], str):
        body[question].encode()  # half a character
    if taken := sorted(not_of_templates & body.get("chat_template_kwargs", {}).keys()):
        raise ValueError(
            f"mtpkern serve does not support {', '.join(taken)} among chat_template_kwargs, which are what the "
            "checkpoint's chat template reads; leave it out"
        )


@contextmanager
def serving(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, *, background: bool, **options: Any
) -> Iterator[Serve]:
    """transformers' server, whose one model is the engine's; until it ends, or in the background while the block runs.

    name: what /v1/models calls the model; options: transformers' own of `transformers serve`, host and port say.

        with serving(engine, tokenizer, "mine", background=True, host="127.0.0.1", port=8000):
            ...
    """
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import StreamingResponse
    from openai.types.responses import ResponseIncompleteEvent
    from starlette.exceptions import HTTPException
    from transformers.cli.serve import Serve
    from transformers.cli.serving import chat_completion, response, server, utils
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler

    from mtpkern.pieces import Answer, Pieces

    questions = {CompletionHandler: "prompt", ChatCompletionHandler: "messages", ResponseHandler: "input"}
    model, build = engine.model, server.build_server
    handler, manager = utils.BaseHandler, utils.GenerateManager
    validate, configure = handler._validate_request, handler._build_generation_config
    template, parse = tokenizer.apply_chat_template, utils.parse_assistant_message
    not_of_templates = signature(template).parameters.keys() - {"documents"}
    response_of, completed_of = response.Response, response.ResponseCompletedEvent
    positions = learned_positions(model, needed=engine.max_length - 1)  # the last token is never fed
    room = engine.max_length if positions is None else positions + 1

    def validated(self: Any, body: dict[str, Any]) -> None:
        validate(self, {name: value for name, value in body.items() if name not in asked.OURS})
        for kind, question in questions.items():
            if isinstance(self, kind):
                with refusing(*MISTAKES):
                    asked.require_honoured(body, question)
                    _require_readable(body, question, not_of_templates)

    def configured(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with refusing(*MISTAKES):
            config = configure(self, body, *args, **kwargs)
            asked.settle(config, body)
        return config

    def careful(read: Callable[..., Any], what: str, *kinds: type[Exception]) -> Callable[..., Any]:
        def reading(*args: Any, **kwargs: Any) -> Any:
            with refusing(*kinds, what=what):
                return read(*args, **kwargs)

        return reading

    def put(ids: Any, config: Any, streamer: Any) -> Future[BatchOutput]:
        options = {"generation_config": config, "tokenizer": tokenizer, "seed": asked.seed.get()}
        with entered("mtpkern serve"), refusing(*MISTAKES):
            return engine.submit(ids, streamer=streamer, **options)

    async def ask(ids: Any, config: Any, streamer: Any) -> Future[BatchOutput]:
        """Put a request in line, by another thread, so that no stream waits until it is read."""
        with refusing(*MISTAKES):
            asked.fit(config, len(ids), room)
        try:
            return await asyncio.to_thread(put, ids, config, streamer)
        except asyncio.CancelledError:
            streamer.closed.set()
            raise

    async def show(ids: Any, config: Any, streamer: Pieces) -> None:
        (await ask(ids, config, streamer)).add_done_callback(streamer.finish)

    def streaming(
        self: Any, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        answer = Answer(config)
        _answer.set(answer)
        streamer = Pieces(answer, tokenizer._tokenizer, loop, queue, response_parser)
        _shown.set((streamer, loop.create_task(show(inputs["input_ids"][0], config, streamer))))
        return queue, streamer

    async def whole(self: Any, model: Any, processor: Any, inputs: Any, config: Any, request_id: str) -> Any:
        answer, streamer, ids = Answer(config), _Unread(), inputs["input_ids"][0]
        _answer.set(answer)
        future = await ask(ids, config, streamer)
        try:
            output = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            streamer.closed.set()
            raise
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        answer.settle(output)
        text = tokenizer.decode(output.tokens, skip_special_tokens=True)
        return answer.until().whole(text), len(ids), output.tokens

    def parsed(processor: Any, model: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        text = _answer.get().until().whole(tokenizer.decode(tokens))
        return parse(processor, model, text, *args, **kwargs)

    def handling(handle: Callable[..., Any]) -> Callable[..., Any]:
        async def handled(self: Any, *args: Any) -> Any:
            answer = await handle(self, *args)
            if isinstance(answer, StreamingResponse):
                streamer, asking = _shown.get()
                # Whoever leaves before the first piece is not heard of otherwise.
                finalize(answer.body_iterator, streamer.cancel)
                await asking  # what is refused is refused before the stream begins
                if not isinstance(self, ResponseHandler):
                    answer.body_iterator = _ending(answer.body_iterator)
            return answer

        return handled

    def response_cut(**facts: Any) -> Any:
        if facts["status"] == "completed" and _answer.get().cut:
            facts |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return response_of(**facts)

    def event_cut(**facts: Any) -> Any:
        if facts["response"].status == "incomplete":
            return ResponseIncompleteEvent(**{**facts, "type": "response.incomplete"})
        return completed_of(**facts)

    def built(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]
        app.add_exception_handler(Refused, refused)
        for kind in (HTTPException, RequestValidationError):
            app.add_exception_handler(kind, unreadable)
        app.add_exception_handler(Exception, failed)
        app.add_middleware(until_left)
        return app

    odd = *MISTAKES, LookupError, AttributeError
    messages = careful(handler.get_processor_inputs_from_messages, "messages cannot be read", *odd)
    read_input = careful(ResponseHandler._normalize_input, "input cannot be read", *odd)
    read_tools = careful(ResponseHandler._normalize_tools, "tools cannot be read", *odd)
    ours: tuple[tuple[Any, str, Any], ...] = (
        (ModelManager, "_load_model", lambda *_, **__: model),
        (ModelManager, "_load_processor", lambda *_, **__: tokenizer),
        # Answers call the model what clients do.
        (ModelManager, "process_model_name", staticmethod(lambda name: name)),
        (handler, "_validate_request", validated),
        (handler, "_build_generation_config", configured),
        (handler, "get_processor_inputs_from_messages", staticmethod(messages)),
        (ResponseHandler, "_normalize_input", staticmethod(read_input)),
        (ResponseHandler, "_normalize_tools", staticmethod(read_tools)),
        (tokenizer, "apply_chat_template", careful(template, "the chat template cannot write this", Exception)),
        *((kind, "handle_request", handling(kind.handle_request)) for kind in questions),
        (manager, "generate_streaming", streaming),
        (manager, "generate_non_streaming", whole),
        *((module, "parse_assistant_message", parsed) for module in (chat_completion, response)),
        (response, "Response", response_cut),
        (response, "ResponseCompletedEvent", event_cut),
        (server, "build_server", built),
        (utils, "InferenceThread", lambda: None),
        (utils, "set_torch_seed", asked.seed.set),
    )
    with ExitStack() as stack:
        for where, name_there, what in ours:
            stack.enter_context(patch.object(where, name_there, what))
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
