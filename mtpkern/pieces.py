"""Pieces: the text of an answer as clients of `mtpkern serve` get it, whole or while it is being written.

A stop string, and what its last token says behind it, is no part of the text, as OpenAI has it; `mtpkern.generate`
returns tokens, and those of the stop string among them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from threading import Event
from typing import Any

from torch import Tensor
from transformers.cli.serving.utils import DirectStreamer, _StreamError, response_events_to_chunks

from mtpkern.batching import BatchOutput
from mtpkern.replies import Ending


class Until:
    """A text up to the first of some strings, piece by piece: what may be the beginning of one is kept back.

    until = Until(["Q:"])
    until.add("So it is 4. Q"), until.add(": Who")    # "So it is 4. ", ""
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._kept, self._over = tuple(strings), "", False

    def add(self, text: str) -> str:
        """The text that has become certain with one more piece."""
        if self._over:
            return ""
        text = self._kept + text
        found = [(start + len(s), start) for s in self._strings if (start := text.find(s)) >= 0]
        if found:
            # As if it came letter by letter: the first to be whole ends it.
            self._over, self._kept = True, ""
            return text[: min(found)[1]]
        beginnings = (n for s in self._strings for n in range(1, len(s)) if text.endswith(s[:n]))
        certain = len(text) - max(beginnings, default=0)
        self._kept = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What was kept back, where no more comes."""
        kept, self._kept = self._kept, ""
        return kept

    def whole(self, text: str) -> str:
        """A text that comes at once: `Until(["Q:"]).whole("4. Q: Who")` is "4. "."""
        return self.add(text) + self.rest()


class Answer:
    """What becomes of a request, for whoever writes its answer.

    config: its generation config, by which transformers' server takes for cut what has so many tokens. cut: whether
    it has ended at its limit.
    """

    def __init__(self, config: Any) -> None:
        self.cut, self._config = False, config

    def until(self) -> Until:
        """What ends its text, once it is accepted."""
        strings = self._config.stop_strings or ()
        return Until([strings] if isinstance(strings, str) else strings)

    def settle(self, output: BatchOutput) -> None:
        """Note how it has ended."""
        self.cut = output.finish_reason == "length"
        if not self.cut:
            self._config.max_new_tokens = None


class Pieces(DirectStreamer):
    """The streamer of an answer that is sent in pieces; `finish` is for the request's future, and says the last.

    left: whether nobody waits for it any more.

    streamer = Pieces(answer, tokenizer._tokenizer, loop, queue, left=left)
    engine.submit(ids, streamer=streamer).add_done_callback(streamer.finish)
    """

    def __init__(self, answer: Answer, *args: Any, left: Event) -> None:
        super().__init__(*args)
        self._answer, self._until = answer, Until(())
        self._said = 0
        self.closed = self._cancelled = left

    def put(self, value: Tensor) -> None:
        """Send what new tokens [1] say; the first call has the prompt [1, T]."""
        if value.ndim > 1:
            self._until = self._answer.until()
            return
        for token in value.tolist():
            self.total_tokens += 1
            text = self._decode_stream.step(self._tokenizer, token) or ""
            self._said += len(text)
            self._send(self._until.add(text))

    def _send(self, text: str) -> None:
        if text:
            for item in [text] if self._parser is None else response_events_to_chunks(self._parser.feed(text)):
                self._enqueue(item)

    def _enqueue(self, item: Any) -> None:
        # A second Ctrl-C closes the loop while answers are being written.
        if not self._loop.is_closed():
            super()._enqueue(item)

    def end(self) -> None:
        """Nothing: `finish` knows whether the answer is whole."""

    def finish(self, done: Future[BatchOutput]) -> None:
        """Send the end of the answer, or what has gone wrong."""
        error = CancelledError("the server ends") if done.cancelled() else done.exception()
        said = None if error is None else f"{type(error).__name__}: {error}"
        if error is None and done.result().finish_reason == "closed":
            said = str(Ending())  # unless it is the client who has left, who does not hear of it
        if said is not None:
            self._enqueue(_StreamError(json.dumps(said)[1:-1]))
            return
        output = done.result()
        self._answer.settle(output)
        # What ends within a character has been kept back, with all that came together with it.
        text = self._tokenizer.decode(output.tokens, skip_special_tokens=self._parser is None)
        self._send(self._until.add(text[self._said :]) + self._until.rest())
        super().end()
