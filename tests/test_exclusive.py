"""A call leaves the model as it was, and has it alone: threads, exceptions, faulty logits."""

import copy
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

import pytest
import torch
from torch import Tensor, nn

import mtpkern
import mtpkern.attention
from mtpkern import Static, packed, pool, products, recordings
from mtpkern.attention import exclusive
from mtpkern.packed import unpack
from mtpkern.products import separate
from mtpkern.recordings import forget

# What it leaves behind


def test_the_model_is_as_before(model: Any, inputs: Any) -> None:
    config, generation_config = model.config.to_json_string(), model.generation_config.to_json_string()
    during = []
    model.lm_head.register_forward_hook(lambda *_: during.append(model.config.to_json_string()))
    mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=7)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_json_string() == config
    assert model.generation_config.to_json_string() == generation_config
    # What is saved meanwhile (by a trainer in another thread, say) does not hold our attention's name either.
    assert len(during) > 1
    assert set(during) == {config}


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_the_model_is_as_before_after_an_exception(failing_pass: int, model: Any, inputs: Any) -> None:
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_pass:
            raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=7)
    assert model.config._attn_implementation == "sdpa"
    hook.remove()
    assert mtpkern.generate(model, **inputs, check_model=False, max_new_tokens=7).shape == (3, 19)


@pytest.mark.parametrize("busy_pass", [1, 2])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_second_call_at_the_same_time_is_refused(busy_pass: int, in_thread: bool, model: Any, inputs: Any) -> None:
    """In the prefill and in a step, from the same thread (a hook) or another: no wrong text, one clear error."""
    expected = mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=7)
    errors: list[str] = []
    calls = 0

    def second() -> None:
        try:
            mtpkern.generate(model, **inputs, check_model=False, max_new_tokens=7, wait=not in_thread)
        except RuntimeError as error:
            errors.append(str(error))

    def interfere(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == busy_pass:
            if in_thread:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            else:
                second()

    model.lm_head.register_forward_hook(interfere)
    output = mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=7)
    assert len(errors) == 1
    assert ("in another thread; run one call at a time" if in_thread else "in this very thread") in errors[0]
    assert output.equal(expected)
    assert model.config._attn_implementation == "sdpa"


def test_calls_from_a_pool_of_threads_wait_in_line(model: Any, inputs: Any) -> None:
    """One of them fails in its first pass, which takes nothing from the others."""
    expected = mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=7)
    calls = 0

    def fail_once(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("planted")

    model.lm_head.register_forward_hook(fail_once)

    def call(_: int) -> Tensor:
        return mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=7)

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(call, i) for i in range(8)]
    failed = [x for x in results if x.exception() is not None]
    assert [type(x.exception()) for x in failed] == [KeyError]
    assert all(x.result().equal(expected) for x in results if x not in failed)


@pytest.mark.parametrize("failing_pass", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_faulty_logits_name_their_sequences(failing_pass: int, value: float, model: Any, inputs: Any) -> None:
    k = 3
    calls = 0

    def break_second(head: Any, args: Any, logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_pass:
            logits = logits.clone()
            # The prefill reads k rows a prompt; in a step everybody has 2k - 1.
            logits[0, k if failing_pass == 1 else 2 * k - 1, 5] = value
        return logits

    model.lm_head.register_forward_hook(break_second)
    with pytest.raises(RuntimeError, match=r"NaN or inf for sequences \[1\]"):
        mtpkern.generate(model, **inputs, check_model=False, strategy=Static(k), max_new_tokens=12)


def test_output_and_model_are_as_good_for_training_as_before(model: Any, inputs: Any) -> None:
    """Decoding runs in inference mode, whose tensors autograd does not take: none may be left over."""
    output = mtpkern.generate(model, **inputs, check_model=False, strategy=Static(3), max_new_tokens=7)
    assert not output.is_inference()
    output[0, 0] = 1
    model.train()(output, labels=output).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_another_threads_run_says_so(model: Any, inputs: Any) -> None:
    """Which would wait for ever for a thread that it has not got; the parent, a copy and the forking thread go on."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(model):
            inside.set()
            leave.wait(60)

    def in_child(check: Callable[[], bool]) -> int:
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            torch.set_num_threads(1)  # a pool of the parent's has no threads here
            try:
                os._exit(0 if check() else 3)
            finally:
                os._exit(4)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def refused() -> bool:
        with pytest.raises(RuntimeError, match=r"in the middle of a run .* forked .* decode with a copy"):
            mtpkern.generate(model, **inputs, max_new_tokens=4)
        return True

    want = mtpkern.generate(model, **inputs, max_new_tokens=4)
    copied = copy.deepcopy(model)
    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    try:
        assert in_child(refused) == 0
        assert in_child(lambda: mtpkern.generate(copied, **inputs, max_new_tokens=4).equal(want)) == 0
    finally:
        leave.set()
        thread.join()
    assert in_child(lambda: mtpkern.generate(model, **inputs, max_new_tokens=4).equal(want)) == 0
    assert mtpkern.generate(model, **inputs, max_new_tokens=4).equal(want)


@pytest.mark.parametrize("look", [lambda: pool.kept_bytes(torch.device("cpu")), forget, unpack, separate])
def test_models_may_come_in_while_all_are_looked_at(
    look: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread's does, at any line of the dictionary's."""
    models = [nn.Linear(1, 1) for _ in range(3)]
    places = [(pool, "_kept"), (recordings, "_kept"), (packed, "packed_of"), (packed, "_asked"), (products, "_joined")]
    kept: list[Any] = [WeakKeyDictionary({model: OrderedDict() for model in models}) for _ in places]
    for (module, name), one in zip(places, kept):
        monkeypatch.setattr(module, name, one)

    def come_in(frame: FrameType, event: str, what: Any) -> Any:
        if frame.f_code.co_filename.endswith("weakref.py") and event == "line" and len(models) < 9:
            models.append(nn.Linear(1, 1))
            for one in kept:
                one.data[ref(models[-1])] = OrderedDict()
        return come_in

    before = sys.gettrace()
    sys.settrace(come_in)
    try:
        assert not look()
    finally:
        sys.settrace(before)
    assert len(models) > 3
