"""What can go wrong in a capture, and what a run does without one."""

import threading
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
from mtpkern import graph
from mtpkern.decoder import Decoder
from mtpkern.kernels.form import has_kernels
from support.recording import RecordedStep, assert_same, generate, kept


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "use_graph=False"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"release_graphs\(\)"),
    ],
)
def test_a_step_that_cannot_be_captured_goes_on(
    error: Exception,
    remedy: str,
    recorded: type[RecordedStep],
    tiny: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> None:
        raise error

    model = tiny.model("llama")
    monkeypatch.setattr(graph, "CapturedStep", refuse)
    said = rf"runs without one, which is slower; .*{remedy}.*: {type(error).__name__}: {error.args[0][:9]}"
    with pytest.warns(RuntimeWarning, match=said):
        got = generate(tiny, model, 6, 4)
    expected = generate(tiny, model, 6, 4, use_graph=False)
    assert_same(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert_same(generate(tiny, model, 6, 4), expected)


@pytest.mark.parametrize(
    ("refused", "memory", "captured"),
    [("b", False, {"a", "c"}), ("b", True, {"a"}), ("a", False, set()), ("a", True, set())],
)
def test_a_form_that_cannot_be_captured_leaves_the_others(
    refused: str, memory: bool, captured: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is the first, or memory was short: then no other is tried. Each call is one step, whatever happens."""
    steps: list[str] = []
    tried: list[str] = []

    class Captured:
        def __init__(self, step: Any, device: Any, beside: Any) -> None:
            self.step = step
            tried.append(step.args[0])
            if step.args[0] == refused:
                raise torch.OutOfMemoryError("none left") if memory else RuntimeError("capturing")

        def replay(self) -> None:
            self.step()

    monkeypatch.setattr(graph, "CapturedStep", Captured)
    monkeypatch.setattr(graph, "on_side_stream", lambda device: nullcontext())
    step_graph, forms = graph.StepGraph(torch.device("cpu")), [form for form in "abc" for _ in range(6)]
    with pytest.warns(RuntimeWarning, match=rf"the decoding step \({refused}\) could not be captured") as said:
        list(map(step_graph, [partial(steps.append, form) for form in forms], forms))
    assert len(said) == 1
    assert steps == forms
    assert set(step_graph.captured) == captured
    assert tried == sorted({*captured, refused})
    assert {form for form in "abc" if step_graph.may_have(form)} == captured


@pytest.mark.parametrize("broken", [True, False])
def test_a_broken_capture_is_cleared_up(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch leaves open where a capture ends in an error is closed; what it has closed itself is left alone."""
    calls: list[Any] = []
    side = SimpleNamespace(device_index=3, device="cpu")

    class Capture:
        def __init__(self, graph: Any, **options: Any) -> None:
            calls.append(("capture", options.get("pool"), options["stream"] is side))

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            if error[0] and broken:
                raise RuntimeError("operation failed due to a previous error during capture")

    def end(device: int, pool: Any) -> None:
        if not broken:
            raise RuntimeError("not currently recording to mempool_id")
        calls.append(("end", device, pool))

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("clear"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *at: calls.append(("release", *at)), raising=False)
    monkeypatch.setattr(graph, "on_side_stream", lambda device: nullcontext(side))
    with pytest.raises(RuntimeError), graph.capturing(object(), torch.device("cpu")):  # type: ignore[arg-type]
        raise RuntimeError("operation not permitted when stream is capturing")
    after = [("end", 3, (0, 7)), ("release", 3, (0, 7)), ("capture", None, True)] if broken else []
    assert calls == ["clear", ("capture", (0, 7), True), *after, "clear"]


def test_a_kernel_that_does_not_compile(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    model = tiny.model("llama", num_hidden_layers=1)
    expected = generate(tiny, model, 4)
    monkeypatch.setattr("mtpkern.kernels.form._without_kernels", set())
    readout = mtpkern.decoder.readout

    def fail_as_a_kernel(*args: Any, **options: Any) -> Any:
        if has_kernels(model.device):
            raise errors.OutOfResources(300_000, 232_448, "shared memory")
        return readout(*args, **options)

    monkeypatch.setattr("mtpkern.decoder.readout", fail_as_a_kernel)
    with pytest.warns(RuntimeWarning, match=r"could not be compiled for cpu.*plain torch.*OutOfResources.*300000"):
        assert_same(generate(tiny, model, 4), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert_same(generate(tiny, model, 4), expected)

    def fail(*args: Any, **options: Any) -> None:
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr("mtpkern.decoder.readout", fail)
    with pytest.raises(errors.OutOfResources):  # there is nothing left to go to
        generate(tiny, model, 4)


def test_memory_that_was_kept_is_given_up_for_a_prefill(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tiny.model("llama"), tiny.model("llama", num_hidden_layers=1)
    expected = generate(tiny, model, 6, use_graph=False)
    generate(tiny, other, 4)
    prefill = Decoder.prefill

    def short_of_memory(self: Decoder, *args: Any, **options: Any) -> Tensor:
        if kept(other):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, *args, **options)

    monkeypatch.setattr(Decoder, "prefill", short_of_memory)
    assert_same(generate(tiny, model, 6), expected)
    assert not kept(other)
    assert len(kept(model)) == 1


def test_what_a_cpu_cannot_do(tiny: SimpleNamespace) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="use_graph=True needs a model on a CUDA or ROCm device, got one on cpu"):
        generate(tiny, model, 4, use_graph=True)
    generate(tiny, model, 4, use_graph=False)
    generate(tiny, model, 4)
    assert not kept(model)


def test_one_thread_at_a_time_is_on_the_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models in two threads: what one queued while the other captures would be in the other's graph."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graph, "_side_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    inside, seen = threading.Event(), []

    def other() -> None:
        inside.wait(10)
        with graph.on_side_stream(torch.device("cuda", 0)):
            seen.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with graph.on_side_stream(torch.device("cuda", 0)):
        inside.set()
        thread.join(0.2)
        with graph.on_side_stream(torch.device("cuda", 0)):  # a capture that is cleared up
            seen.append("one")
    thread.join(10)
    assert seen == ["one", "other"]
