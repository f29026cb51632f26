"""`mtpkern serve`: an OpenAI-compatible server whose requests share passes.

The server is transformers' own, `transformers serve`, with what comes before and behind decoding: chat templates, the
protocol, streams. It hands requests on one at a time, to one thread that calls the model's `generate`; here they go to
an `Engine`, so that requests of many clients are decoded side by side. What it leaves open is settled here: a long
prompt is read while others are answered; who has left is decoded for no longer, streamed or not; who asks for what is
not honoured hears why (`mtpkern.asked`), before a stream begins; an error of ours is told from one of the client's
(`mtpkern.replies`); and an answer ends as OpenAI's do (`mtpkern.pieces`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature, unwrap
from threading import Event
from types import coroutine
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from weakref import finalize

from mtpkern import asked
from mtpkern.batching import BatchOutput
from mtpkern.cli import positive
from mtpkern.entry import entered
from mtpkern.model import learned_positions
from mtpkern.output import exit_status
from mtpkern.replies import (
    MISTAKES,
    Failed,
    Missing,
    Refused,
    ending,
    failed,
    refused,
    refusing,
    unreadable,
    until_left,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cli.serve import Serve

    from mtpkern.engine import Engine
    from mtpkern.pieces import Answer


_LAST_PORT = 65535
# Of transformers' routes those that mean something for the one model there is, of which we say ourselves what it is.
_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/health")
# What is put in the place of something of transformers': the object that has it, its name there, and ours.
_Places = list[tuple[Any, str, Any]]


@dataclass
class _Request:
    """What is known of a request, by the thread that reads it and by the server's loop, which answers it.

    left: whether nobody waits for the answer any more. answer: there once the request is read.
    """

    loop: asyncio.AbstractEventLoop
    left: Event = field(default_factory=Event)
    seed: int | None = None
    limit_is_open: bool = False
    answer: Answer = field(init=False)


_request: ContextVar[_Request] = ContextVar("_request")


class _Unread:
    """The streamer of an answer that is sent whole, with which it can be ended."""

    def __init__(self, left: Event) -> None:
        self.closed = left

    def put(self, value: Any) -> None: ...

    def put_block(self, new: Any) -> None: ...

    def end(self) -> None: ...


@coroutine
def _handed_over() -> Generator[None, None, None]:
    """Where the thread that reads a request leaves it to the server's loop."""
    yield


@coroutine
def _rest(handling: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """What is left of a coroutine that another thread has begun."""
    return (yield from handling)


async def _read_by(reader: Executor, handle: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    """`await handle(*args)`, which the reader runs as far as `_handed_over`, while streams go on."""

    def begun() -> tuple[bool, Any]:
        handling = handle(*args)
        try:
            handling.send(None)
        except StopIteration as end:
            return True, end.value
        return False, handling

    loop = asyncio.get_running_loop()
    over, what = await loop.run_in_executor(reader, copy_context().run, begun)
    return what if over else await _rest(what)


def _careful(read: Callable[..., Any], what: str, *kinds: type[Exception]) -> Callable[..., Any]:
    """The same function, whose errors of these kinds are the client's."""

    def reading(*args: Any, **kwargs: Any) -> Any:
        with refusing(*kinds, what=what):
            return read(*args, **kwargs)

    return reading


def _require_readable(body: dict[str, Any], question: str, not_of_templates: set[str]) -> None:
    """Refuse what transformers' server would fail to read, and options of chat templates that are none of theirs."""
    if isinstance(body[question], str):
        body[question].encode()  # half a character
    if taken := sorted(not_of_templates & body.get("chat_template_kwargs", {}).keys()):
        raise ValueError(
            f"mtpkern serve does not support {', '.join(taken)} among chat_template_kwargs, which are what the "
            "checkpoint's chat template reads; leave it out"
        )


def _reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> _Places:
    """How a request is read, up to its token ids and its generation config."""
    from transformers.cli.serving import utils
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler

    questions = {CompletionHandler: "prompt", ChatCompletionHandler: "messages", ResponseHandler: "input"}
    handler = utils.BaseHandler
    validate, configure = handler._validate_request, handler._build_generation_config
    template = tokenizer.apply_chat_template
    not_of_templates = signature(template).parameters.keys() - {"documents"}

    def validated(self: Any, body: dict[str, Any]) -> None:
        validate(self, {field: value for field, value in body.items() if field not in asked.OURS})
        question = questions[type(self)]
        with refusing(*MISTAKES):
            asked.require_honoured(body, question)
            _require_readable(body, question, not_of_templates)
        _require_served(body.get("model", name), name)

    def configured(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with refusing(*MISTAKES, what="generation_config cannot be read"):
            config = configure(self, body, *args, **kwargs)
        with refusing(*MISTAKES):
            _request.get().limit_is_open = asked.settle(config, body)
        return config

    def seeded(seed: int) -> None:
        _request.get().seed = seed

    odd = *MISTAKES, LookupError, AttributeError
    messages = _careful(handler.get_processor_inputs_from_messages, "messages cannot be read", *odd)
    read_input = _careful(ResponseHandler._normalize_input, "input cannot be read", *odd)
    read_tools = _careful(ResponseHandler._normalize_tools, "tools cannot be read", *odd)
    return [
        (ModelManager, "_load_model", lambda *_, **__: model),
        (ModelManager, "_load_processor", lambda *_, **__: tokenizer),
        # Answers call the model what clients do.
        (ModelManager, "process_model_name", staticmethod(lambda name: name)),
        (handler, "_validate_request", validated),
        (handler, "_build_generation_config", configured),
        (handler, "get_processor_inputs_from_messages", staticmethod(messages)),
        (ResponseHandler, "_normalize_input", staticmethod(read_input)),
        (ResponseHandler, "_normalize_tools", staticmethod(read_tools)),
        (tokenizer, "apply_chat_template", _careful(template, "the chat template cannot write this", Exception)),
        (utils, "set_torch_seed", seeded),
    ]


def _decoding(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> _Places:
    """How a request that has been read is put in line, and what of its tokens is its answer's text."""
    from transformers.cli.serving import chat_completion, response, utils

    from mtpkern.pieces import Answer, Pieces

    manager, parse = utils.GenerateManager, utils.parse_assistant_message
    positions = learned_positions(engine.model, needed=engine.max_length - 1)  # the last token is never fed
    room = engine.max_length if positions is None else positions + 1

    def put(ids: Any, config: Any, streamer: Any) -> Future[BatchOutput]:
        request = _request.get()
        with entered("mtpkern serve"), refusing(*MISTAKES):
            asked.fit(config, len(ids), room, is_open=request.limit_is_open)
            return engine.submit(
                ids, streamer=streamer, generation_config=config, tokenizer=tokenizer, seed=request.seed
            )

    def streaming(
        self: Any, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        request, queue = _request.get(), asyncio.Queue[Any]()
        request.answer = Answer(config)
        streamer = Pieces(request.answer, tokenizer._tokenizer, request.loop, queue, response_parser, left=request.left)
        put(inputs["input_ids"][0], config, streamer).add_done_callback(streamer.finish)
        return queue, streamer

    async def whole(self: Any, model: Any, processor: Any, inputs: Any, config: Any, request_id: str) -> Any:
        request, ids = _request.get(), inputs["input_ids"][0]
        answer = request.answer = Answer(config)
        future = put(ids, config, _Unread(request.left))
        await _handed_over()
        try:
            output = await asyncio.wrap_future(future)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        answer.settle(output)
        text = tokenizer.decode(output.tokens, skip_special_tokens=True)
        return answer.until().whole(text), len(ids), output.tokens

    def parsed(processor: Any, model: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        text = _request.get().answer.until().whole(tokenizer.decode(tokens))
        return parse(processor, model, text, *args, **kwargs)

    return [
        (manager, "generate_streaming", streaming),
        (manager, "generate_non_streaming", whole),
        *((module, "parse_assistant_message", parsed) for module in (chat_completion, response)),
        (utils, "InferenceThread", lambda: None),
    ]


def _answering(name: str, reader: Executor) -> _Places:
    """How a request is handled from its first byte to the last of its answer, and which there are."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import StreamingResponse
    from openai.types.responses import ResponseIncompleteEvent
    from starlette.exceptions import HTTPException
    from transformers.cli.serving import response, server
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler

    build, response_of, completed_of = server.build_server, response.Response, response.ResponseCompletedEvent

    def handling(handle: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handle)
        async def handled(self: Any, *args: Any) -> Any:
            request = _Request(asyncio.get_running_loop())
            _request.set(request)
            try:
                answer = await _read_by(reader, handle, self, *args)
            except asyncio.CancelledError:
                request.left.set()
                raise
            if isinstance(answer, StreamingResponse):
                # Whoever leaves before the first piece is not heard of otherwise.
                finalize(answer.body_iterator, request.left.set)
                if not isinstance(self, ResponseHandler):
                    answer.body_iterator = ending(answer.body_iterator)
            return answer

        return handled

    def response_cut(**facts: Any) -> Any:
        if facts["status"] == "completed" and _request.get().answer.cut:
            facts |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return response_of(**facts)

    def event_cut(**facts: Any) -> Any:
        if facts["response"].status == "incomplete":
            return ResponseIncompleteEvent(**{**facts, "type": "response.incomplete"})
        return completed_of(**facts)

    def built(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]
        facts = {"id": name, "object": "model", "created": 0, "owned_by": "local"}

        @app.get("/v1/models")
        async def models() -> Any:
            return {"object": "list", "data": [facts]}

        @app.get("/v1/models/{model:path}")
        async def model(model: str) -> Any:
            _require_served(model, name)
            return facts

        app.add_exception_handler(Refused, refused)
        for kind in (HTTPException, RequestValidationError):
            app.add_exception_handler(kind, unreadable)
        app.add_exception_handler(Exception, failed)
        app.add_middleware(until_left)
        return app

    return [
        *(
            # Where another server runs in this process its own is around it.
            (kind, "handle_request", handling(unwrap(kind.handle_request)))
            for kind in (CompletionHandler, ChatCompletionHandler, ResponseHandler)
        ),
        (response, "Response", response_cut),
        (response, "ResponseCompletedEvent", event_cut),
        (server, "build_server", built),
    ]


def _require_served(model: Any, name: str) -> None:
    if model != name:
        raise Missing(f"model must be {name!r}, the only one that is served here, or left out; got {model!r:.60}")


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

    with ExitStack() as stack:
        # One, so that requests are in line as they have come.
        reader = stack.enter_context(ThreadPoolExecutor(1, "mtpkern serve"))
        places = [*_reading(engine.model, tokenizer, name), *_decoding(engine, tokenizer), *_answering(name, reader)]
        for where, name_there, what in places:
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
