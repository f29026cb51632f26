"""Engine: what goes wrong costs whom it belongs to, and an engine ends in order."""

import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from mtpkern import Engine, Static, Verified
from mtpkern.batching import BatchOutput
from mtpkern.decoder import Decoder
from support.batches import STOP
from support.engines import LONG, Held, free, held, result


class Bad:
    """A streamer that fails at its nth call."""

    def __init__(self, n: int) -> None:
        self.n = n

    def put(self, value: Tensor) -> None:
        self.n -= 1
        if self.n < 0:
            raise KeyError("of the streamer")

    def end(self) -> None:
        if self.n == 3:
            raise KeyError("of its end")


def _bad_criterion(ids: Tensor, scores: Any) -> bool:
    if ids.shape[1] > 6:
        raise KeyError("of a criterion")
    return False


def _leaving(ids: Tensor, scores: Any) -> bool:
    if ids.shape[1] > 6:
        sys.exit("of a criterion")
    return False


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        *({"streamer": n} for n in (0, 1, 2, 3 + LONG + 1)),
        *({"stopping_criteria": [criterion]} for criterion in (_bad_criterion, _leaving)),
    ],
    ids=lambda bad: "-".join(map(str, (*bad, *(x for x in bad.values() if isinstance(x, int))))),
)
def test_an_error_of_ones_own_is_ones_own_alone(
    bad: dict[str, Any], late: bool, model: Any, request: pytest.FixtureRequest
) -> None:
    wanted = free(model, [5, 6, 7], LONG)
    if late:
        request.getfixturevalue("lagging")
    if "streamer" in bad:
        bad = {"streamer": Bad(bad["streamer"])}
    with Engine(model, batch_size=3, max_length=64, strategy=Verified(3, threshold=0.2)) as engine:
        streamer, good = held(engine)
        failing = engine.submit([5, 6, 7], max_new_tokens=LONG, eos_token_id=None, **bad)
        streamer.go.set()
        if "streamer" in bad and bad["streamer"].n > LONG:
            bad["streamer"].n = 3 + LONG + 1
        with pytest.raises((KeyError, SystemExit), match="of"):
            result(failing)
        assert result(good).tokens == wanted
        assert result(engine.submit([5, 6, 7], max_new_tokens=LONG, eos_token_id=None)).tokens == wanted


def test_a_request_in_line_can_be_cancelled(engine: Engine) -> None:
    streamer, first = held(engine, eos_token_id=STOP, max_new_tokens=2)
    waiting = engine.submit([1, 2], max_new_tokens=4, eos_token_id=None)
    assert waiting.cancel()
    streamer.go.set()
    assert not first.cancel()
    result(first)
    with pytest.raises(CancelledError):
        result(waiting)
    assert len(result(engine.submit([1, 2], max_new_tokens=4, eos_token_id=None)).tokens) == 4


def test_closing_lets_all_end_and_takes_no_more(model: Any) -> None:
    engine = Engine(model, batch_size=2, max_length=64, strategy=Static(2))
    futures = [engine.submit([n, 2], max_new_tokens=6, eos_token_id=None) for n in range(1, 8)]
    engine.close()
    assert all(len(future.result(timeout=0).tokens) == 6 for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1], max_new_tokens=1)
    engine.close(cancel=True)


def test_who_is_called_back_may_close_it_and_ask_for_more(engine: Engine) -> None:
    later: list[Future[BatchOutput]] = []
    ended = threading.Event()

    def again(_: Any) -> None:
        later.append(engine.submit([1, 2], max_new_tokens=3, eos_token_id=None))
        engine.close()
        ended.set()

    engine.submit([1, 2], max_new_tokens=4, eos_token_id=None).add_done_callback(again)
    assert ended.wait(60)
    assert len(result(later[0]).tokens) == 3
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1, 2])


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError])
def test_a_callback_that_raises_anything_harms_nobody(
    error: type[BaseException], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(future: Future[BatchOutput]) -> None:
        raise error("of a callback")

    told: list[Any] = []
    streamer, first = held(engine)
    others = [engine.submit([1, 2], max_new_tokens=4, eos_token_id=None) for _ in range(2)]
    others[0].add_done_callback(fail)
    others[0].add_done_callback(told.append)
    streamer.go.set()
    for future in (first, *others, engine.submit([1, 2], max_new_tokens=4)):
        assert result(future).error is None
    assert told == others[:1]
    assert f"{error.__name__}('of a callback')" in caplog.text


def test_closing_at_once_ends_those_that_run_and_those_that_wait(model: Any) -> None:
    futures = []
    with pytest.raises(KeyError), Engine(model, batch_size=1, max_length=64) as engine:  # noqa: PT012
        streamer, first = held(engine)
        futures = [first, *(engine.submit([n, 2], max_new_tokens=6, eos_token_id=None) for n in (1, 2))]
        threading.Timer(0.2, streamer.go.set).start()
        raise KeyError
    for future in futures:
        with pytest.raises(CancelledError):
            result(future)
    # The model is whole and free.
    assert len(free(model, [1, 2], 5)) == 5


@pytest.mark.parametrize("cancel", [False, True])
def test_who_waits_for_several_hears_of_those_that_were_cancelled(cancel: bool, model: Any) -> None:
    engine = Engine(model, batch_size=1, max_length=64)
    streamer, first = held(engine)
    # Told by the line's end, or by its head.
    other = engine.submit([1, 2], max_new_tokens=4, eos_token_id=STOP)
    threading.Timer(0.2, streamer.go.set).start()
    if not cancel:
        other.cancel()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait, [first, other], timeout=20)
        engine.close(cancel=cancel)
        assert not waiting.result().not_done


def test_one_that_is_to_be_tried_again_ends_with_the_engine(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, batch_size=2, max_length=64)

    def failing(*args: Any) -> Any:
        engine._line.close(cancel=True)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Decoder, "step", failing)
    with pytest.warns(RuntimeWarning, match="goes on with 1"):  # noqa: PT031
        future = engine.submit([1, 2], max_new_tokens=4, eos_token_id=None)
        engine.close()
    with pytest.raises(CancelledError):
        future.result(timeout=5)


def test_who_is_called_by_the_engine_does_not_wait_for_it(model: Any) -> None:
    engine = Engine(model, max_length=64)
    prompt, said = torch.tensor([[1, 2]]), []

    def ended(future: Future[BatchOutput]) -> None:
        for call in (engine.generate, engine.stream):
            with pytest.raises(RuntimeError, match="own thread"):
                call(prompt, max_new_tokens=2)
        said.append(engine.submit([1, 2], max_new_tokens=3, eos_token_id=None))
        engine.close()
        said.append("closed")

    streamer, first = held(engine)
    first.add_done_callback(ended)
    streamer.go.set()
    engine._thread.join(20)
    assert said[1:] == ["closed"]
    assert len(result(said[0]).tokens) == 3


def test_who_is_interrupted_while_waiting_ends_the_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    streamer = Held()

    def interrupted(self: Any, timeout: Any = None) -> Any:
        assert streamer.began.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(torch.tensor([[5, 6]]), streamer=streamer, max_new_tokens=LONG, eos_token_id=None)
    monkeypatch.undo()
    streamer.go.set()
    assert len(result(engine.submit([1, 2], max_new_tokens=4, eos_token_id=None)).tokens) == 4
    assert len(streamer.tokens) < LONG


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.submit([1, 2], max_new_tokens=63), "max_length=64"),
        (lambda e: e.submit([], max_new_tokens=3), "no tokens"),
        (lambda e: e.submit("text", max_new_tokens=3), "tokenizer"),
        (lambda e: e.submit([1, 2], max_new_tokens=3, strategy=Static(1)), "strategy is the engine's"),
        (lambda e: e.submit([1, 2], max_new_tokens=3, first=2), "mtpkern.Engine does not support first"),
        (lambda e: e.submit(3, max_new_tokens=3), "token ids .T., got 3"),
        (lambda e: e.submit([1, 2], max_new_tokens=3, streamer=3), "streamer"),
        (lambda e: e.submit([1, 2], max_new_tokens=0), "max_new_tokens"),
        (lambda e: e.generate(torch.ones(2, 3, dtype=torch.int64), streamer=Held(), max_new_tokens=3), "one prompt"),
        (lambda e: e.generate(torch.ones(1, 3, dtype=torch.int64), return_dict_in_generate=True), "submit"),
        (lambda e: e.generate([[1, 2]]), "tensor"),
        (lambda e: e.stream(torch.ones(1, 3, dtype=torch.int64), streamer=Held()), "streamer"),
        (lambda e: Engine(e.model, batch_size=0), "batch_size"),
        (lambda e: Engine(e.model, max_length=1), "max_length"),
        (lambda e: Engine(e.model, max_new_tokens=4), "max_new_tokens"),
        (lambda e: Engine(e.model, rows=1, batch_size=8).submit([1], max_new_tokens=1).result(60), "rows must be"),
    ],
)
def test_what_is_wrong_is_said_at_once(call: Callable[[Engine], Any], says: str, engine: Engine) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        call(engine)
    assert len(result(engine.submit([1, 2], max_new_tokens=4, eos_token_id=None)).tokens) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_newtokens": 5}, "nobody knows; leave it out, or mend its name"),
        ({"num_beams": 2}, "no matter of each prompt alone"),
        ({"position_ids": torch.ones(1, 2)}, "no matter of each prompt alone"),
        ({"stopping_criteria": [MaxTimeCriteria(3.0)]}, "Engine.stream"),
        ({"logits_processor": [MinNewTokensLengthLogitsProcessor(2, 3, 0)]}, "made for prompts of one length"),
        ({"logits_processor": [PrefixConstrainedLogitsProcessor(lambda *_: [1], 1)]}, "no function of text"),
        ({"generation_config": GenerationConfig(some_other_field=3)}, "some_other_field"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors_name_the_engine_and_no_other_way_in(options: dict[str, Any], says: str, engine: Engine) -> None:
    options = {"max_new_tokens": 3, **options}
    for call in (lambda: engine.submit([1, 2], **options), lambda: engine.generate(torch.tensor([[1, 2]]), **options)):
        with pytest.raises(ValueError, match=f"^mtpkern.Engine does not support .*{says}"):
            call()


def test_what_the_file_asks_for_in_vain_is_said_of_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.model.generation_config, "repetition_penalty", 1.5)
    with pytest.warns(UserWarning, match="repetition_penalty=1.5, which mtpkern.Engine decodes without"):
        result(engine.submit([1, 2], eos_token_id=STOP, max_new_tokens=3))


def test_padding_on_the_right_is_refused(engine: Engine) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match="left"):
        engine.generate(torch.ones(2, 3, dtype=torch.int64), attention_mask=mask, max_new_tokens=2)


def test_blocks_are_read_under_the_engines_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16), Engine(model, max_length=32) as engine:
        blocks = list(engine.stream(torch.tensor([[5, 6, 7]]), max_new_tokens=6, eos_token_id=None))
    assert sum(len(new) for (new,) in blocks) == 6


@pytest.mark.parametrize("name", ["sequence_bias", "bad_words_ids"])
def test_tokens_that_the_model_has_not_are_refused_at_once(name: str, engine: Engine) -> None:
    with pytest.raises(ValueError, match=f"{name} must hold ids from 0 to 15"):
        engine.submit([1, 2], **{name: {(3, 16): 1.0} if name == "sequence_bias" else [[16]]})


def test_another_autocast_is_refused(engine: Engine) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        engine.submit([1, 2], max_new_tokens=2)


def test_an_error_of_the_run_costs_those_in_it_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    streamer, first = held(engine)
    later = engine.submit([1, 2], max_new_tokens=4, eos_token_id=STOP, suppress_tokens=[9])  # a run of its own
    step, faults = Decoder.step, [KeyError("of a pass")]

    def failing(*args: Any) -> Any:
        if faults:
            raise faults.pop()
        return step(*args)

    monkeypatch.setattr(Decoder, "step", failing)
    streamer.go.set()
    with pytest.raises(KeyError, match="of a pass"):
        result(first)
    assert result(later).error is None


@pytest.mark.parametrize("where", ["passes", "buffers"])
def test_short_memory_leaves_fewer_slots(where: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[int] = []
    run, init = Decoder.run, Decoder.__init__

    def failing(call: Any) -> Any:
        def short(self: Any, *args: Any, **options: Any) -> Any:
            slots.append(options["batch"] if "batch" in options else len(self.sequences.status))
            if slots[-1] > 1:
                raise torch.OutOfMemoryError("no room")
            return call(self, *args, **options)

        return short

    monkeypatch.setattr(Decoder, *(("run", failing(run)) if where == "passes" else ("__init__", failing(init))))
    with Engine(model, batch_size=4, max_length=64) as engine, pytest.warns(RuntimeWarning, match="goes on with 1"):
        outputs = [result(f) for f in [engine.submit([n, 2], max_new_tokens=4, eos_token_id=None) for n in (1, 2, 3)]]
    assert all(len(output.tokens) == 4 for output in outputs)
    assert slots[:3] == [4, 2, 1]


def test_who_is_tried_again_is_shown_the_prompt_once(
    model: Any, lagging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a first pass on a GPU, whose state is read late, finds no memory."""
    shown: list[list[int]] = []
    streamer = SimpleNamespace(put=lambda value: shown.append(value.flatten().tolist()), end=lambda: None)
    step, tried = Decoder.step, count()

    def failing(self: Decoder, *args: Any) -> Any:
        if not next(tried):
            raise torch.OutOfMemoryError("no room")
        return step(self, *args)

    monkeypatch.setattr(Decoder, "step", failing)
    with Engine(model, batch_size=2, max_length=64) as engine, pytest.warns(RuntimeWarning, match="goes on with 1"):
        output = result(engine.submit([1, 2], max_new_tokens=4, eos_token_id=None, streamer=streamer))
    assert shown == [[1, 2], *([token] for token in output.tokens)]


def test_who_leaves_at_once_leaves_its_own_keys(model: Any, lagging: None) -> None:
    """In the slot of one whose prompt was as long, and whose tokens are not on the host yet."""
    first, asked = [5, 6, 7, 8], list[Future[BatchOutput]]()
    with Engine(model, batch_size=2, max_length=100, strategy=Verified(3, threshold=0.2)) as engine:
        streamer, other = held(engine, max_new_tokens=60)
        before = engine.submit(first, max_new_tokens=6, eos_token_id=None)
        bad = engine.submit([1, 2, 3, 4], max_new_tokens=6, eos_token_id=None, streamer=Bad(0))

        def go_on(future: Future[BatchOutput]) -> None:
            asked.append(engine.submit([*first, *result(before).tokens[:4], 2], max_new_tokens=6, eos_token_id=None))

        bad.add_done_callback(go_on)
        streamer.go.set()
        result(other)
        assert result(asked[0]).tokens == free(model, [*first, *result(before).tokens[:4], 2], 6)


def test_what_no_try_mends_is_told_to_each_and_the_engine_lives(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [torch.OutOfMemoryError("no room"), KeyError("no decoder")]

    def failing(*args: Any, **options: Any) -> Any:
        raise faults[-1]

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # so that one with fewer slots is none
        patch.setattr("mtpkern.batching.decoder_for", failing)
        for says in ("no decoder", "memory does not suffice"):
            for future in [engine.submit([n, 2], max_new_tokens=4) for n in (1, 2)]:
                with pytest.raises((KeyError, RuntimeWarning), match=says):
                    result(future)
            faults.pop()
    assert len(result(engine.submit([1, 2], max_new_tokens=4, eos_token_id=None)).tokens) == 4


def test_an_engine_that_is_forgotten_ends_behind_its_requests(model: Any) -> None:
    engine = Engine(model, max_length=64)
    thread = engine._thread
    future = engine.submit([1, 2], max_new_tokens=LONG, eos_token_id=None)
    del engine
    gc.collect()
    assert len(result(future).tokens) == LONG
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_is_told_that_the_engine_is_its_parents(engine: Engine) -> None:
    """It would wait for ever for a thread, or for a lock, that nobody in it has; the parent goes on."""
    taken, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._line.changed:
            taken.set()
            leave.wait(60)

    streamer, first = held(engine)
    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        try:
            with pytest.raises(RuntimeError, match="forked"):
                engine.submit([1, 2], max_new_tokens=4)
            engine.close()
            os._exit(0)
        finally:
            os._exit(4)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    leave.set()
    thread.join()
    streamer.go.set()
    assert len(result(first).tokens) == LONG
    assert code == 0


def test_an_interpreter_ends_with_one_at_work() -> None:
    code = """
import torch, mtpkern
from mtpkern.demo import load
model, tokenizer = load(mtpkern.ASSETS)
engine = mtpkern.Engine(model, tokenizer=tokenizer)
futures = [engine.submit("How many apples", max_new_tokens=1000, eos_token_id=None) for _ in range(9)]
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
