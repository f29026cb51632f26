"""What handles requests to `mtpkern serve`: transformers' own handlers, with another way to decode.

They read a request, chat template and all, and write its answer, whole or as a stream. Between, they hand it to a
manager, whose place `Served` takes, by a state of all managers, whose place it takes as well. What they leave open
`_Ours` settles, of which each of them is a kind here. Nothing of transformers' is changed, so that a process can have
several servers. What is called for a path finds its server by the request: FastAPI keeps all that it has ever called,
also of servers that have ended, and with it what that holds, which must be no model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from inspect import signature
from threading import Event
from types import coroutine
from typing import Any
from weakref import WeakSet, finalize

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseGenerateManager, BaseHandler, GenerationState, Modality

from mtpkern import asked
from mtpkern.batching import BatchOutput
from mtpkern.engine import Engine
from mtpkern.entry import entered
from mtpkern.model import learned_positions
from mtpkern.pieces import Answer, Pieces
from mtpkern.replies import MISTAKES, Ending, Failed, Missing, cut_short, ending, incomplete, refusing

# What reading raises where a client has sent something else than is expected there.
_ODD = *MISTAKES, LookupError, AttributeError


@dataclass(eq=False)
class _Asked:
    """What is known of a request, by the thread that reads it and by the server's loop, which answers it.

    left: whether nobody waits for the answer any more. answer: there once the request is read.
    """

    loop: asyncio.AbstractEventLoop
    left: Event = field(default_factory=Event)
    seed: int | None = None
    limit_is_open: bool = False
    answer: Answer = field(init=False)


_asked: ContextVar[_Asked] = ContextVar("_asked")


class _Unread:
    """The streamer of an answer that is sent whole, with which it can be ended."""

    def __init__(self, left: Event) -> None:
        self.closed = left

    def put(self, value: Any) -> None: ...

    def put_block(self, new: Any) -> None: ...

    def end(self) -> None: ...


class _Tokenizer:
    """The engine's as the handlers have it: errors of a template are the client's, a stop ends what is parsed."""

    def __init__(self, plain: PreTrainedTokenizerBase) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        with refusing(Exception, what="the chat template cannot write this"):
            return self._plain.apply_chat_template(*args, **kwargs)

    def parse_response(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        text = _asked.get().answer.until().whole(self._plain.decode(tokens))
        return self._plain.parse_response(text, *args, **kwargs)


class Served(GenerationState, BaseGenerateManager):
    """The one model that there is, as the handlers ask for it: how a request that has been read is put in line.

    name: what clients call it. reader: the thread that reads requests; one, so that they are in line as they have come.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.reader = ThreadPoolExecutor(1, "mtpkern serve")
        # Whose answers are not whole, perhaps; whether there are to be no more of them.
        self.open, self.ends = WeakSet[_Asked](), False
        positions = learned_positions(engine.model, needed=engine.max_length - 1)  # the last token is never fed
        self._room = engine.max_length if positions is None else positions + 1

    def take(self, request: _Asked) -> None:
        """Take in a request, to be answered unless `end` comes before that."""
        self.open.add(request)
        if self.ends:
            request.left.set()

    def end(self) -> None:
        """End all answers behind the next pass; they, and whoever comes, are told that the server ends."""
        self.ends = True
        for request in list(self.open):
            request.left.set()

    @property
    def facts(self) -> dict[str, Any]:
        """The model as clients see it listed."""
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}

    def require(self, model: str) -> None:
        """Raise `Missing` for another model."""
        if model != self.name:
            raise Missing(
                f"model must be {self.name!r}, the only one that is served here, or left out; got {model!r:.60}"
            )

    def require_of_template(self, options: dict[str, Any]) -> None:
        """Refuse what a chat template does not read, but the tokenizer that applies it."""
        others = signature(self.tokenizer.apply_chat_template).parameters.keys() - {"documents"}
        if taken := sorted(others & options.keys()):
            raise ValueError(
                f"mtpkern serve does not support {', '.join(taken)} among chat_template_kwargs, which are what the "
                "checkpoint's chat template reads; leave it out"
            )

    def get_model_modality(self, *args: Any, **kwargs: Any) -> Modality:
        """Text, also of a model that sees."""
        return Modality.LLM

    def get_manager(self, *args: Any, **kwargs: Any) -> BaseGenerateManager:
        """Of the one model."""
        return self

    def _put(self, ids: Any, config: Any, streamer: Any) -> Future[BatchOutput]:
        request = _asked.get()
        with entered("mtpkern serve"), refusing(*MISTAKES):
            asked.fit(config, len(ids), self._room, is_open=request.limit_is_open)
            options = {"generation_config": config, "tokenizer": self.tokenizer, "seed": request.seed}
            return self.engine.submit(ids, streamer=streamer, **options)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        """A queue with the pieces of the answer, and who puts them there."""
        request, queue = _asked.get(), asyncio.Queue[Any]()
        request.answer = Answer(config)
        plain = self.tokenizer._tokenizer
        streamer = Pieces(request.answer, plain, request.loop, queue, response_parser, left=request.left)
        self._put(inputs["input_ids"][0], config, streamer).add_done_callback(streamer.finish)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str
    ) -> Any:
        """Text, number of tokens of the prompt, new tokens."""
        request, ids = _asked.get(), inputs["input_ids"][0]
        answer = request.answer = Answer(config)
        future = self._put(ids, config, _Unread(request.left))
        await asyncio.sleep(0)  # here the reader leaves it to the server's loop
        try:
            output = await asyncio.wrap_future(future)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        if output.finish_reason == "closed":
            raise Ending
        answer.settle(output)
        text = self.tokenizer.decode(output.tokens, skip_special_tokens=True)
        return answer.until().whole(text), len(ids), output.tokens

    def stop(self) -> None:
        """Nothing: the engine is another's."""


@coroutine
def _rest(handling: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """What is left of a coroutine that another thread has begun."""
    return (yield from handling)


def _careful(read: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The same function, whose errors over what it reads are the client's."""

    def reading(*args: Any, **kwargs: Any) -> Any:
        with refusing(*_ODD, what=f"{what} cannot be read"):
            return read(*args, **kwargs)

    return reading


class _Ours(BaseHandler):
    """What each of the handlers does in another way than transformers'; question: the field that is answered."""

    question: str

    def __init__(self, served: Served) -> None:
        super().__init__(served, served)
        self.served = served

    @classmethod
    async def answered(cls, request: Request, body: dict[str, Any]) -> Any:
        """The answer to a request, by its server."""
        return await cls(request.app.state.served).answer(request, body)

    async def answer(self, request: Request, body: dict[str, Any]) -> Any:
        """The answer to a request; it is read by the reader, while streams go on."""
        mine = _Asked(asyncio.get_running_loop())
        _asked.set(mine)
        self.served.take(mine)

        def begun() -> tuple[bool, Any]:
            if mine.left.is_set():
                raise Ending
            handling = self.handle_request(body, request.state.request_id)
            try:
                handling.send(None)
            except StopIteration as end:
                return True, end.value
            return False, handling

        try:
            over, answer = await mine.loop.run_in_executor(self.served.reader, copy_context().run, begun)
            answer = answer if over else await _rest(answer)
        except asyncio.CancelledError:
            mine.left.set()
            raise
        if isinstance(answer, StreamingResponse):
            # Whoever leaves before the first piece is not heard of otherwise.
            finalize(answer.body_iterator, mine.left.set)
            answer.body_iterator = self._ending(answer.body_iterator)
        return answer

    def _ending(self, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        return ending(pieces)

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request({name: value for name, value in body.items() if name not in asked.OURS})
        with refusing(*MISTAKES):
            asked.require_honoured(body, self.question)
            if isinstance(body[self.question], str):
                body[self.question].encode()  # half a character
            self.served.require_of_template(body.get("chat_template_kwargs", {}))
        self.served.require(body.get("model", self.served.name))

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.served.name, self.served.engine.model, _Tokenizer(self.served.tokenizer)

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        request = _asked.get()
        request.seed = body.pop("seed", None)  # transformers' would seed the process
        with refusing(*MISTAKES, what="generation_config cannot be read"):
            config = super()._build_generation_config(body, *args, **kwargs)
        with refusing(*MISTAKES):
            request.limit_is_open = asked.settle(config, body)
        return config

    get_processor_inputs_from_messages = staticmethod(
        _careful(BaseHandler.get_processor_inputs_from_messages, "messages")
    )


class Completions(_Ours, CompletionHandler):
    """/v1/completions"""

    question = "prompt"


class Chats(_Ours, ChatCompletionHandler):
    """/v1/chat/completions"""

    question = "messages"


class Responses(_Ours, ResponseHandler):
    """/v1/responses, which also say where they are cut."""

    question = "input"
    _normalize_input = staticmethod(_careful(ResponseHandler._normalize_input, "input"))
    _normalize_tools = staticmethod(_careful(ResponseHandler._normalize_tools, "tools"))

    def _ending(self, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        return incomplete(pieces, _asked.get().answer)

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        answer = await super()._non_streaming(*args, **kwargs)
        return JSONResponse(cut_short(json.loads(answer.body))) if _asked.get().answer.cut else answer


async def models(request: Request) -> Any:
    """/v1/models"""
    return {"object": "list", "data": [request.app.state.served.facts]}


async def model(request: Request, model: str) -> Any:
    """/v1/models/{model}"""
    request.app.state.served.require(model)
    return request.app.state.served.facts


async def health() -> Any:
    """/health"""
    return {"status": "ok"}
