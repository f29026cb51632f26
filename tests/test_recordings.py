"""Passes of a CPU that are replayed: the tokens and the bits of passes that run, until the model is another."""

import copy
import gc
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
import mtpkern.adapter
import mtpkern.decoder
from mtpkern import ConfAdapt, Static, Verified, packed, packed_weights, recordings
from mtpkern.load import Load
from mtpkern.recorder import Recording
from mtpkern.recordings import recordings_of, rows_in
from mtpkern.strategies import Strategy
from support.models import ARCHITECTURES
from support.packing import generate

# Experts in a loop look at which of them have rows.
LOOPS = {"gpt_oss", "qwen3_moe", "deepseek_v3"}
pytestmark = pytest.mark.usefixtures("recorded_at_once")

STRATEGIES = [Static(1), Static(3), ConfAdapt(3, 0.2), Verified(3, 0.2), Verified(3, 0.2, masks=3)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_tokens(name: str, tiny: SimpleNamespace, replays: list[int], live: Callable[..., Any]) -> None:
    """Memory is NaN before each replay."""
    model = tiny.model(name, **ARCHITECTURES[name])
    for strategy in STRATEGIES:
        wanted = live(generate, tiny, model, strategy=strategy, max_new_tokens=24)
        for _ in range(2):
            assert torch.equal(generate(tiny, model, strategy=strategy, max_new_tokens=24), wanted), strategy
    refused = recordings._kept[model].refused
    assert bool(replays) is not refused
    assert name in LOOPS or not refused


@pytest.mark.parametrize("targets", ["all-linear", "v_proj,down_proj", "o_proj"])
@pytest.mark.usefixtures("packs")
def test_a_gated_adapter(
    targets: str,
    tiny: SimpleNamespace,
    replays: list[int],
    live: Callable[..., Any],
) -> None:
    """With masks and without, whose rows differ from pass to pass; over copies and over torch's products."""
    model = tiny.adapted(tiny.model("llama"), targets)
    for strategy in (ConfAdapt(4, 0.5), Verified(4, 0.2), Verified(4, 0.0), Static(1)):
        options: dict[str, Any] = {"strategy": strategy, "max_new_tokens": 40, "return_dict_in_generate": True}
        wanted = live(generate, tiny, model, **options)
        for _ in range(3):
            found = generate(tiny, model, **options)
            assert torch.equal(found.sequences, wanted.sequences), strategy
            assert found.blocks == wanted.blocks, strategy  # what masks propose shows in these
    assert not recordings._kept[model.get_base_model()].refused
    assert len(set(replays)) > 3


@pytest.mark.usefixtures("packs")
def test_bits_of_every_logit(
    tiny: SimpleNamespace, replays: list[int], live: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a run's first pass to its last."""
    model, seen = tiny.model("qwen3"), list[Tensor]()
    generate(tiny, model)  # copies are made behind a first prompt
    readout = mtpkern.decoder.readout
    monkeypatch.setattr(mtpkern.decoder, "readout", lambda z, *a: (seen.append(z.clone()), readout(z, *a))[1])

    def logits() -> list[Tensor]:
        seen.clear()
        generate(tiny, model, max_new_tokens=40)
        return list(seen)

    wanted = live(logits)
    for _ in range(3):
        found = logits()
        assert len(found) == len(wanted)
        assert all(map(torch.equal, found, wanted))
    assert len(replays) > 20


def test_a_replay_runs_no_module(tiny: SimpleNamespace, replays: list[int]) -> None:
    model = tiny.model("llama")
    for _ in range(3):
        generate(tiny, model, strategy=Static(1))
    called: list[Any] = []
    code = type(model.model.norm).forward.__code__  # not another function in its place, which would be noticed

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code:
            called.append(frame.f_locals["self"])

    replays.clear()
    sys.setprofile(note)
    try:
        generate(tiny, model, strategy=Static(1), max_new_tokens=12)
    finally:
        sys.setprofile(None)
    assert len(replays) == 11  # the first pass, too
    assert called.count(model.model.norm) == 1  # the prompt's


def test_what_cannot_be_recorded_runs(
    tiny: SimpleNamespace, live: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation that fails in an unforeseen way is announced once; a replay of other bits is none."""
    model = tiny.model("llama")
    wanted = live(generate, tiny, model, max_new_tokens=24)

    def fails(self: Recording, owners: Any, *inputs: Tensor) -> Tensor:
        raise IndexError("of an operation")

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "__call__", fails)
        with pytest.warns(RuntimeWarning, match=r"could not be recorded.*of an operation") as told:
            found = [generate(tiny, model, max_new_tokens=24) for _ in range(3)]
        assert all(torch.equal(x, wanted) for x in found)
        assert len(told) == 1
        mtpkern.release_graphs(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with pytest.raises(RuntimeWarning, match="could not be recorded"):
                generate(tiny, model, max_new_tokens=40)
            assert torch.equal(generate(tiny, model, max_new_tokens=24), wanted)  # told once
    own, calls = Recording.__call__, list[int]()

    def other(self: Recording, owners: Any, *inputs: Tensor) -> Tensor:
        calls.append(1)
        return own(self, owners, *inputs).add_(1e-6)

    mtpkern.release_graphs(model)
    monkeypatch.setattr(Recording, "__call__", other)
    for _ in range(3):
        assert torch.equal(generate(tiny, model, max_new_tokens=24), wanted)
    assert len(calls) == 1
    assert recordings._kept[model].refused


def test_a_fault_of_the_pass_itself_is_raised(tiny: SimpleNamespace, replays: list[int]) -> None:
    model = tiny.model("llama")
    for _ in range(3):
        generate(tiny, model, strategy=Static(1))
    replays.clear()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="hold NaN or inf"):
        generate(tiny, model, strategy=Static(1))


def test_recordings_go_with_the_model_and_when_told(tiny: SimpleNamespace, replays: list[int]) -> None:
    for adapted in (False, True):
        model = tiny.adapted(tiny.model("llama")) if adapted else tiny.model("llama")
        generate(tiny, model, max_new_tokens=40)
        pickle.dumps(copy.deepcopy(model).state_dict())
        base = mtpkern.adapter.base_of(model)
        assert recordings._kept[base].made
        mtpkern.release_graphs(model)
        assert base not in recordings._kept
        generate(tiny, model, max_new_tokens=40)
        gone = weakref.ref(base)
        del base, model
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("adapted", [False, True])
def test_a_pass_without_masks_is_another_kind_where_there_is_a_gate(tiny: SimpleNamespace, adapted: bool) -> None:
    """To a model without one a mask is a token as any other, and what was recorded serves for both."""
    model = tiny.adapted(tiny.model("llama")) if adapted else tiny.model("llama")
    for strategy in (Static(1), Verified(3, 0.0)):
        generate(tiny, model, strategy=strategy, max_new_tokens=40)
    kinds = recordings._kept[mtpkern.adapter.base_of(model)].seen
    assert {maskless for _, maskless in kinds} == ({False, True} if adapted else {False})


def test_no_run_is_kept(tiny: SimpleNamespace, replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor its keys and values: a recording calls those of the run that it is called in."""
    model, caches = tiny.model("llama"), list[weakref.ref[Any]]()
    own = mtpkern.decoder.KVCache.__init__

    def noting(self: Any, *args: Any, **options: Any) -> None:
        caches.append(weakref.ref(self))
        own(self, *args, **options)

    monkeypatch.setattr(mtpkern.decoder.KVCache, "__init__", noting)
    for _ in range(3):
        generate(tiny, model, max_new_tokens=24)
    assert replays
    gc.collect()
    assert [cache() for cache in caches] == [None] * 3
    assert recordings._kept[model].made


def test_weights_that_have_changed_are_let_go_first(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or memory would hold copies of both, and the weights."""
    if not packed_weights.has_packed_products(torch.float32):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(packed, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(packed, "LEAST_TOKENS", 1)
    model, kept = tiny.model("llama"), list[bool]()
    generate(tiny, model, max_new_tokens=40)
    assert recordings._kept[model].made
    own = packed_weights.Packed.of
    monkeypatch.setattr(
        packed_weights.Packed, "of", lambda layers: (kept.append(model in recordings._kept), own(layers))[1]
    )
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    generate(tiny, model, max_new_tokens=8)
    assert kept == [False]


def test_autocast_and_short_runs_are_as_they_were(
    tiny: SimpleNamespace, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    for _ in range(3):
        generate(tiny, model)
    replays.clear()
    with torch.autocast("cpu", torch.bfloat16):
        generate(tiny, model)
    monkeypatch.setattr(recordings, "LEAST_TOKENS", 13)
    generate(tiny, model, max_new_tokens=12)
    assert not replays
    generate(tiny, model, max_new_tokens=13)
    assert replays


def test_rows_are_rounded_up_from_the_first_pass_on(
    tiny: SimpleNamespace, live: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a pass of one row a sequence has no more, and one by load no masks where they cost more than they promise."""
    monkeypatch.setattr(Load, "price", lambda *_: 2.0)
    assert [rows_in(n, 100) for n in (1, 7, 9, 17, 33, 99)] == [1, 7, 10, 20, 40, 100]
    assert [rows_in(n, 1000) for n in (160, 161, 192, 193)] == [160, 192, 192, 193]
    model, seen = tiny.model("llama"), list[int]()
    note = lambda _, args, given: seen.append(given["input_ids"].shape[1])  # noqa: E731
    model.model.register_forward_pre_hook(note, with_kwargs=True)
    prompts = torch.arange(27).view(9, 3) % tiny.mask
    for strategy in (Static(1), Verified(6, 0.0), None):
        seen.clear()
        options: dict[str, Any] = {"strategy": strategy, "max_new_tokens": 24, "check_model": False}
        live(mtpkern.generate, model, prompts, mask_token_id=tiny.mask, **options)
        passes = seen[1:]
        if strategy == Verified(6, 0.0):
            assert all(n == rows_in(n, 99) for n in passes)
            assert passes[0] == 99
        else:
            assert 9 in passes, strategy
            assert max(passes) == 9, strategy


@pytest.mark.parametrize("strategy", [None, Verified(4, 0.2)])
def test_passes_that_were_recorded_tell_no_time(
    strategy: Strategy | None, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, replays: list[int]
) -> None:
    """By load; and the tokens are the same, at whatever number of rows."""
    model, told, passes = tiny.model("llama"), list[int](), list[int]()
    monkeypatch.setattr(Load, "saw", lambda self, rows, seconds: told.append(rows))
    step = mtpkern.decoder.Decoder.step
    monkeypatch.setattr(mtpkern.decoder.Decoder, "step", lambda *args: (passes.append(1), step(*args))[1])
    wanted = generate(tiny, model, strategy=Static(1), max_new_tokens=40)
    mtpkern.release_graphs(model)
    passes.clear()
    for _ in range(4):
        assert torch.equal(generate(tiny, model, strategy=strategy, max_new_tokens=40), wanted)
    known = recordings._kept[model]
    assert known.proven
    assert replays
    if strategy is None:
        assert len(told) == len(passes) - len(known.made) - len(known.proven)


def test_another_runs_weights_are_other_recordings(tiny: SimpleNamespace) -> None:
    """Equal is not enough for what is baked in, and nothing is kept of a kind of model that is not tested."""
    model, one, two = tiny.model("llama"), torch.ones(2), torch.ones(2)
    known = recordings_of(model, [one], 64)
    assert known is not None
    assert recordings_of(model, [one], 64) is known
    assert recordings_of(model, [two], 64) is not known
    model.config.model_type = "of_another"
    assert recordings_of(model, [one], 64) is None
