"""Engine: requests that come at any time, from any thread, share the passes of one model.

One thread decodes (mtpkern.line). Between two passes it takes in what has been asked for meanwhile, into slots that are
free (mtpkern.refill), so that eight requests at once take little longer than one. A request is what a prompt of
`generate_batch` is: its tokens, and what it draws, are those it gets alone. Who asks for another of the things that the
requests of a run have in common (docs/serving.md, "Who shares passes") waits until those before it have ended, and
whoever comes later waits behind it; nobody waits for ever.
"""

from __future__ import annotations

import weakref
from concurrent.futures import CancelledError, Future
from functools import partial
from threading import Thread, current_thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpkern.arguments import inferred_mask, prompts_of, require_prompts, require_streamer, require_tensors
from mtpkern.batching import Batch, BatchOutput, Prompt
from mtpkern.entry import entered
from mtpkern.fields import whole_number
from mtpkern.kernels.form import autocast_of
from mtpkern.line import Line, Request
from mtpkern.openmp import lend_processors
from mtpkern.options import Options
from mtpkern.readers import tell, telling
from mtpkern.streaming import Stream, end_at_exit, own

# Tokens of a request and its answer, unless the engine is told.
MAX_LENGTH = 2048


class Engine:
    """Decodes requests of many threads side by side; `generate` is a drop-in for `mtpkern.generate`, `submit` its core.

    batch_size: slots, requests that run at a time (8). Others wait in line.
    max_length: tokens that a request and its answer have together, at most (2,048): a GPU's buffers hold as many for
        each slot.
    tokenizer: the model's, for prompts that are texts and for the text of outputs.
    options: of `mtpkern.generate`, for all requests: strategy, mask_token_id, rows, use_graph, compile,
        batch_invariant, prefill_chunk, check_model; and `reuse` of `generate_batch`.

    The model is taken while requests run, and only then: other calls on it wait as for any run. Of a model that
    changes, or moves, while it is idle the next request sees what it is then.

        with mtpkern.Engine(model, tokenizer=tokenizer, batch_size=16) as engine:
            futures = [engine.submit(text, max_new_tokens=100) for text in texts]
            print(futures[0].result().text)

    In a server whose handlers run in threads of their own: `model.generate = engine.generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        max_length: int = MAX_LENGTH,
        **options: Any,
    ) -> None:
        known = {*Options.NAMES, "reuse"} - {"wait"}
        if unknown := sorted(options.keys() - known):
            raise TypeError(
                f"mtpkern.Engine does not know {', '.join(unknown)}; of generate it takes {', '.join(sorted(known))}, "
                "and what is a request's own goes to submit or generate"
            )
        self._of_all: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, **options}
        with entered("mtpkern.Engine"):
            Batch(model, [], max_new_tokens=1, **self._of_all)  # what is wrong with these is said now
        self.model, self.max_length = model, whole_number("max_length", max_length, least=2)
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self._line = Line(self.batch_size, self.max_length, model.device)
        self._autocast = autocast_of(model.device)
        self._thread = Thread(target=self._line.work, name="mtpkern.Engine", daemon=True)
        weakref.finalize(self, self._line.close, cancel=False)
        end_at_exit(self._thread, partial(self._line.close, cancel=True))
        self._thread.start()

    def submit(self, prompt: Prompt, *, streamer: Any = None, **kwargs: Any) -> Future[BatchOutput]:
        """Ask for one prompt's tokens, a text or token ids [T]; returns at once.

        kwargs: what `generate_batch` honours: max_new_tokens, do_sample and its settings, seed, stop_strings,
        stopping_criteria, eos_token_id, generation_config, and a tokenizer in the place of the engine's.
        streamer: as of `generate`, called in the engine's thread. An exception that it raises, or one of the criteria,
            ends this request alone and is what the future raises. As soon as the future has it, or is cancelled, who
            reads a TextIteratorStreamer raises it too; another streamer is told by its `fail(error)`, and where it has
            none by `end`: look at the future then.

        The future's result is a `BatchOutput`. Its `cancel` works as long as the request waits in line. Raises
        ValueError or TypeError for what `generate_batch` would refuse, RuntimeError where the engine is closed.

            engine.submit("Two and two is", max_new_tokens=8).result().text
        """
        with telling(streamer):
            require_streamer(streamer)
            (request,) = self._requests([prompt], streamer, kwargs)
            if streamer is not None:
                request.future.add_done_callback(partial(_tell, streamer))
            self._put(request)
        return request.future

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """`mtpkern.generate` in passes that others share: left-padded prompts [B, T] to [B, T + new] token ids.

        Each prompt is a request; returns when all have ended. Ctrl-C in the waiting thread ends them. seed: as of
        `submit`, where torch's own is not this call's alone. streamer: as of `mtpkern.generate`.
        Refused, besides what `submit` refuses: return_dict_in_generate, and a streamer with more than one prompt.

            output = engine.generate(**tokenizer("Two and two is", return_tensors="pt"), max_new_tokens=64)
        """
        with telling(streamer):
            self._require_other_thread()
            require_streamer(streamer)
            input_ids = prompts_of(input_ids, kwargs)
            require_tensors(input_ids, attention_mask)
            if kwargs.pop("return_dict_in_generate", None):
                raise ValueError(
                    "mtpkern.Engine.generate does not support return_dict_in_generate=True; submit returns an object "
                    "for each prompt"
                )
            if streamer is not None and len(input_ids) > 1:
                raise ValueError(f"a streamer sees one prompt at a time, got {len(input_ids)}; call once for each")
            ids = input_ids.cpu()
            if attention_mask is None:
                attention_mask = inferred_mask(ids, kwargs, self.model.generation_config)
            mask = attention_mask.cpu()
            requests = self._requests([row[real.bool()] for row, real in zip(ids, mask)], streamer, kwargs, (ids, mask))
            self._put(*requests)
            try:
                outputs = [request.future.result() for request in requests]
            except BaseException:
                for request in requests:
                    request.end()
                raise
            filler, width = requests[0].batch.filler, max(len(output.tokens) for output in outputs)
            new = [output.tokens + [filler] * (width - len(output.tokens)) for output in outputs]
            new_tokens = torch.tensor(new, dtype=torch.int64, device=input_ids.device)
            return torch.cat([input_ids.to(torch.int64), new_tokens], dim=1)

    def stream(self, input_ids: Tensor | None = None, **options: Any) -> Stream[list[list[int]]]:
        """As `mtpkern.stream`, of one prompt [1, T] in passes that others share: yields blocks of new tokens.

        for (new,) in engine.stream(**tokenizer("Two and two is", return_tensors="pt"), max_new_tokens=64):
            print(new)
        """
        if options.get("streamer") is not None:
            raise ValueError("Engine.stream is read itself and takes no streamer; pass that to Engine.generate")
        self._require_other_thread()
        return Stream(partial(self.generate, **own(input_ids=input_ids, **options)), self.model.device)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait until those there are have ended; cancel: behind the next pass.

        Called by a streamer, a criterion or a future's callback, which the engine itself waits for, it does not wait.
        """
        self._line.close(cancel=cancel)
        if current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(cancel=kind is not None)

    def _require_other_thread(self) -> None:
        if current_thread() is self._thread:
            raise RuntimeError(
                "a streamer, a criterion or a future's callback runs in the engine's own thread and would wait there "
                "for itself; use Engine.submit, and read its future in another thread"
            )

    def _requests(
        self, prompts: list[Any], streamer: Any, kwargs: dict[str, Any], padded: tuple[Tensor, Tensor] | None = None
    ) -> list[Request]:
        """What each prompt is to be, read and checked."""
        if ours := sorted(kwargs.keys() & {*Options.NAMES, "reuse", "batch_size"} - {"wait"}):
            raise ValueError(f"{', '.join(ours)} is the engine's for all requests: pass it to mtpkern.Engine")
        if idle := sorted(kwargs.keys() & {"wait", "order", "first", "progress"}):
            raise ValueError(
                f"mtpkern.Engine does not support {', '.join(idle)}: requests run as they come; leave it out"
            )
        if autocast_of(self.model.device) != self._autocast:
            raise ValueError(
                f"the engine was made under autocast to {self._autocast}, and this request comes under "
                f"{autocast_of(self.model.device)}; make the engine where its requests come from"
            )
        with entered("mtpkern.Engine"):
            batch = Batch(self.model, prompts, **{**self._of_all, "order": "given", **kwargs})
        if padded is not None:
            vocabulary = batch.model.get_input_embeddings().weight.shape[0]
            require_prompts(*padded, mask_token_id=batch.options.mask_token_id, vocabulary=vocabulary)
        for output in batch.failed:
            assert output.error is not None
            raise output.error
        for job in batch.jobs:
            if job.tokens > self.max_length:
                raise ValueError(
                    f"a prompt of {len(job.ids)} tokens and {job.new} new ones are {job.tokens}, and the engine has "
                    f"room for max_length={self.max_length}; lower max_new_tokens, or raise max_length of the engine"
                )
        key = None if batch.key is None else int(batch.key)
        return [Request(batch, job, streamer, key) for job in batch.jobs]

    def _put(self, *requests: Request) -> None:
        lend_processors(self.model.device)
        self._line.put(requests)


def _tell(streamer: Any, done: Future[BatchOutput]) -> None:
    """Tell a streamer what the future raises."""
    error = CancelledError("this request was cancelled while it waited") if done.cancelled() else done.exception()
    if error is not None:
        tell(streamer, error, end=True)
