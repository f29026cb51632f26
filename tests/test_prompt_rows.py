"""Prompts that captured passes read besides: the same tokens, whatever runs and comes in beside whom."""

import random
from collections import deque
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mtpkern
from mtpkern import Static, Verified, refill, slots
from mtpkern.adapter import base_of
from mtpkern.batching import Batch
from mtpkern.decoder import Decoder
from mtpkern.kernels import gated_lora
from mtpkern.load import Ladder
from mtpkern.poll import Poll, TimedPoll
from mtpkern.prompt_rows import PromptRows, Reads, pieces_of
from support.batches import STOP, WINDOWED, alone, broken_by_13, mixed_prompts
from support.recording import RecordedStep, kept, poison

MASK = 15


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 59)), min_size=1, max_size=5),
    k=st.integers(1, 8),
    rows=st.integers(8, 24),
)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_pieces_are_the_prompts(lengths: list[tuple[int, int]], k: int, rows: int) -> None:
    """One alone in as many passes as it takes, or several in one; the last token and its masks are never parted."""
    prompts = [(7 * slot % 5, np.arange(100, 100 + n), min(known, n - 1)) for slot, (n, known) in enumerate(lengths)]
    if sum(len(ids) - known + k - 1 for _, ids, known in prompts) > rows:
        prompts = prompts[:1]
    passes = list(pieces_of(prompts, [MASK] * (k - 1), rows))
    for pieces in passes:
        assert 0 < sum(len(piece.tokens) for piece in pieces) <= rows
        assert [piece.slot for piece in pieces] == sorted(piece.slot for piece in pieces)
        assert all(piece.ends == (pieces is passes[-1]) for piece in pieces)
    for slot, ids, known in prompts:
        own = [piece for pieces in passes for piece in pieces if piece.slot == slot]
        assert np.concatenate([piece.tokens for piece in own]).tolist() == [*ids[known:], *[MASK] * (k - 1)]
        assert [piece.first for piece in own] == [known + sum(len(x.tokens) for x in own[:i]) for i in range(len(own))]
        assert len(own[-1].tokens) >= k
    if len(passes) > 1:
        # No more passes than it takes.
        assert all(len(pieces[0].tokens) >= rows - k for pieces in passes[:-1])


def test_where_rows_stand() -> None:
    """As the rules of kernels/advance.py say of tokens: scratch slots first, and each sees all up to its own."""
    rows = PromptRows(12, batch=4, k=3, dtype=torch.float32, device=torch.device("cpu"))
    prompts = [(2, np.array([5, 6, 7, 8]), 0), (0, np.array([5, 6, 9]), 2)]
    (pieces,) = pieces_of(prompts, [MASK, MASK], len(rows))
    rows.bring(pieces, trash=8, scratch=3, last_position=4)
    assert rows.start.tolist() == [0, 3, 3, 9, 9]
    assert rows.seq.tolist() == [0] * 3 + [2] * 6 + [3] * 3
    assert rows.token.tolist() == [9, MASK, MASK, 5, 6, 7, 8, MASK, MASK, 0, 0, 0]
    assert rows.position.tolist() == [2, 3, 4, 0, 1, 2, 3, 4, 4, 0, 0, 0]  # none behind the last learned
    # What has no slot stands in the trash and sees nothing, as what is not used.
    assert rows.slot.tolist() == [5, 6, 7, 3, 4, 5, 6, 7, 8, 8, 8, 8]
    assert rows.prefix_end.tolist() == [6, 7, 8, 4, 5, 6, 7, 8, 0, 0, 0, 0]
    assert rows.span_start.tolist() == [6, 7, 8, 4, 5, 6, 7, 8, 9, 9, 9, 9]
    assert rows.place.tolist() == [0, 1, 2, 6, 7, 8, 0, 0, 0, 0, 0, 0]
    assert rows.tail_seq.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert rows.tail_position.tolist()[:6] == [2, 3, 4, 3, 4, 5]
    assert rows.tail_start.tolist() == [0, 3, 3, 6, 6]
    # The next pass's leave nothing of these.
    rows.bring([pieces[0]], trash=8, scratch=3, last_position=None)
    assert rows.start.tolist() == [0, 3, 3, 3, 3]
    assert rows.slot.tolist() == [5, 6, 7] + [8] * 9
    assert rows.tail_start.tolist() == [0, 3, 3, 3, 3]


def test_rows_of_an_empty_decoder_are_nobodys(tiny: SimpleNamespace) -> None:
    """As it is made, and when its next run begins: of the rows beside those that read the first prompt."""
    shape: dict[str, Any] = {"batch": 2, "capacity": 32, "max_new_tokens": 8, "stop_ids": torch.tensor([3])}
    decoder = Decoder(tiny.model("llama"), Verified(3, masks=2), mask_token_id=tiny.mask, **shape)
    for _ in range(2):
        slots.vacate(decoder)
        rows = decoder.all_rows
        assert not rows.start.any()
        assert rows.slot.tolist() == [decoder.cache.capacity] * len(rows.slot)
        assert not rows.prefix_end.any()
        assert (rows.span_start > decoder.cache.capacity).all()
        with torch.inference_mode():
            for x in (*vars(decoder.sequences).values(), *vars(rows).values()):
                x.fill_(3)
        decoder.restart(Verified(3, masks=2), torch.tensor([3]), 8)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As soon as there is a graph, passes read prompts of up to so many rows; how many tokens came in by each pass."""
    monkeypatch.setattr("mtpkern.decoder.PROMPT_ROWS", 16)
    monkeypatch.setattr("mtpkern.load.FREE_ROWS", 0)
    monkeypatch.setattr("mtpkern.load.STEP", 1)

    def reads(decoder: Decoder, rows: int, *, alone: bool) -> bool:
        return decoder.graph is not None and len(decoder.all_rows.seq) in decoder.graph.captured

    brought: list[int] = []
    bring = PromptRows.bring

    def noted(self: PromptRows, pieces: Any, **options: Any) -> None:
        brought.append(sum(len(piece.tokens) for piece in pieces))
        bring(self, pieces, **options)

    monkeypatch.setattr(Decoder, "reads_beside", reads)
    monkeypatch.setattr(PromptRows, "bring", noted)
    return brought


@pytest.fixture
def any_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)

    def choose(ladder: Ladder, *_: Any) -> tuple[int, float]:
        rows = rng.choice(ladder.rungs)
        return rows, float("inf") if rows == ladder.rungs[0] else rng.choice([0.0, 0.1, 0.4])

    monkeypatch.setattr(Ladder, "choose", choose)


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether states are read a step late, as on a GPU."""
    if request.param:
        request.getfixturevalue("lagging")
        monkeypatch.setattr(TimedPoll, "_read", Poll._read)
    return bool(request.param)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gated"])
@pytest.mark.parametrize("masks", [0, 3])
def test_each_gets_what_it_gets_alone(
    name: str,
    masks: int,
    recorded: type[RecordedStep],
    beside: list[int],
    late: bool,
    any_rung: None,
    tiny: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long prompts and short, some that begin alike, on any rung, behind others' leavings; windows, experts, a gate."""
    monkeypatch.setattr(gated_lora, "gated_rows", lambda gate: None)  # a CPU's captured step would have them as numbers
    kind = "llama" if name == "gated" else name
    model = tiny.model(kind, **(WINDOWED if kind == "gemma3_text" else {}))
    model = tiny.adapted(model) if name == "gated" else model
    prompts, new = mixed_prompts(14, seed=3)
    strategy = Verified(threshold=0.1, masks=masks)
    options = {"strategy": strategy, "max_new_tokens": new, "eos_token_id": STOP, "batch_size": 3}
    for turn in range(2):
        outputs = mtpkern.generate_batch(model, prompts, **options)
        assert [output.error for output in outputs] == [None] * len(prompts)
        if not turn:
            continue
        for prompt, n, output in zip(prompts, new, outputs):
            expected = alone(model, prompt, n, strategy=None)
            assert (output.tokens, output.finish_reason) == (expected.tokens, expected.finish_reason)
        assert sum(output.shared >= 19 for output in outputs) >= 2
    assert max(beside) == 16
    assert sum(beside) > 100
    decoder = kept(base_of(model))[0]
    assert decoder.graph is not None
    most = len(decoder.all_rows.seq)
    assert Reads(most) in decoder.graph.captured
    assert not decoder.reading
    poison(decoder)
    assert [output.tokens for output in mtpkern.generate_batch(model, prompts, **options)] == [
        output.tokens for output in outputs
    ]


OPTIONS: dict[str, Any] = {"strategy": Verified(threshold=0.1), "eos_token_id": STOP, "batch_size": 3}


def test_who_samples_draws_what_it_draws_alone(
    recorded: type[RecordedStep], beside: list[int], late: bool, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temperatures, penalties that read the whole text, and the numbers of draws are there before the rows are."""
    monkeypatch.setattr("mtpkern.settings.may_look", lambda x: False)
    model = tiny.model("llama")
    prompts, new = mixed_prompts(10, seed=5)
    asked: list[dict[str, Any]] = [{}, {"do_sample": True}, {"do_sample": True, "temperature": 1.6, "top_p": 0.9}]
    asked += [{"repetition_penalty": 1.5}, {"do_sample": True, "repetition_penalty": 1.7, "top_k": 5}]
    each = [{"max_new_tokens": n, **asked[i % len(asked)]} for i, n in enumerate(new)]
    # Those that all of a run may ask for are known when it begins.
    everything = {"do_sample": True, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1}
    with mtpkern.Engine(model, batch_size=3, max_length=64, strategy=OPTIONS["strategy"]) as engine:
        for turn in range(2):
            first = engine.submit(prompts[0], max_new_tokens=20, eos_token_id=None, seed=0, **everything)
            futures = [engine.submit(p, eos_token_id=STOP, seed=i, **e) for i, (p, e) in enumerate(zip(prompts, each))]
            found = [future.result(60).tokens for future in (first, *futures)]
            if turn:
                assert len(beside) > 5
    for i, (prompt, options) in enumerate(zip(prompts, each)):
        torch.manual_seed(i)
        ids = torch.tensor([prompt])
        expected = mtpkern.generate(
            model, ids, attention_mask=torch.ones_like(ids), eos_token_id=STOP, use_graph=False, **options
        )
        assert found[1 + i] == expected[0, len(prompt) :].tolist()


def test_a_prompt_whose_keys_are_nan_costs_itself_alone(
    recorded: type[RecordedStep], beside: list[int], late: bool, any_rung: None, tiny: SimpleNamespace
) -> None:
    """Long or short, among others, in a slot that others get after it."""
    model, prompts, new = broken_by_13(tiny, seed=2)
    options = {**OPTIONS, "max_new_tokens": new, "order": "given"}
    expected = mtpkern.generate_batch(model, prompts, use_graph=False, **options)
    mtpkern.generate_batch(model, prompts, **options)
    beside.clear()
    bad = {1: [5, 13, 5], 6: [6] * 29 + [13], 9: [13] + [6] * 20, 10: [13]}
    outputs = mtpkern.generate_batch(model, [bad.get(i, prompt) for i, prompt in enumerate(prompts)], **options)
    assert len(beside) > 10
    for i, output in enumerate(outputs):
        if i in bad:
            assert output.tokens == output.blocks == []
            assert "NaN" in str(output.error)
        else:
            assert (output.error, output.tokens) == (None, expected[i].tokens)


def test_whom_a_criterion_ends_writes_into_no_keys_that_are_copied_to_its_place(
    recorded: type[RecordedStep], beside: list[int], late: bool, tiny: SimpleNamespace
) -> None:
    """Rows of it are planned still for the pass that reads the rest of the prompt."""
    model = tiny.model("llama")
    alike = [n * n % 13 + 1 for n in range(20)]
    prompts = [[*alike, 5], [4, 9], [*alike, 7], [8, 2, 2], [*alike, 1, 2], [6], [*alike, 12]]
    new = [60, 30, 3, 30, 3, 30, 3]
    options: dict[str, Any] = {"strategy": Verified(threshold=0.1), "eos_token_id": None}
    options["stopping_criteria"] = [lambda ids, scores, **_: ids.shape[1] == 9]
    expected = mtpkern.generate_batch(model, prompts, max_new_tokens=new, batch_size=1, use_graph=False, **options)
    for _ in range(2):
        beside.clear()
        outputs = mtpkern.generate_batch(model, prompts, max_new_tokens=new, batch_size=2, order="given", **options)
        assert [output.tokens for output in outputs] == [output.tokens for output in expected]
    assert beside
    assert sum(output.shared >= 20 for output in outputs) >= 3
    assert {output.finish_reason for output in outputs} == {"criteria", "length"}


def test_who_leaves_in_the_midst_of_it_leaves_nothing(
    recorded: type[RecordedStep], beside: list[int], tiny: SimpleNamespace
) -> None:
    """A run is closed while a prompt is half read, or read and not taken in; its decoder's next run begins as ever."""
    model = tiny.model("llama")
    prompts, new = mixed_prompts(10, seed=4)
    options = {**OPTIONS, "max_new_tokens": new}
    expected = [output.tokens for output in mtpkern.generate_batch(model, prompts, **options)]
    (decoder,) = kept(model)
    bring = PromptRows.bring
    for n in (1, 2, 3):
        closed, count = Event(), len(beside) + n

        def close(self: PromptRows, *args: Any, closed: Event = closed, count: int = count, **more: Any) -> None:
            bring(self, *args, **more)
            if len(beside) == count:
                closed.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PromptRows, "bring", close)
            Batch(model, prompts, **options).run(lambda output: None, closed)
        assert kept(model) == [decoder]
        poison(decoder)
        decoder.reading = True  # as where a run ends before the pass
        assert [output.tokens for output in mtpkern.generate_batch(model, prompts, **options)] == expected


def test_passes_read_prompts_once_reading_them_apart_has_cost_a_graph(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where rows go by load, and of prompts that are not too long."""
    model = tiny.model("llama")
    monkeypatch.setattr("mtpkern.decoder.PROMPT_ROWS", 8)
    read: list[bool] = []
    enter = slots.enter
    monkeypatch.setattr(
        refill, "enter", lambda *args, beside, **more: (read.append(beside), enter(*args, beside=beside, **more))[1]
    )
    prompts, new = mixed_prompts(12, seed=1)
    prompts += [[4] * 70, [5] * 40]  # with masks more than eight passes; more than four
    new += [3, 3]

    def run(**options: Any) -> list[list[int]]:
        read.clear()
        return [
            o.tokens for o in mtpkern.generate_batch(model, prompts, **{**OPTIONS, "max_new_tokens": new, **options})
        ]

    expected = run(use_graph=False)
    assert run() == expected
    (decoder,) = kept(model)
    graph, most = decoder.graph, len(decoder.all_rows.seq)
    assert graph is not None
    assert decoder.reading_cost.apart > 0
    assert graph.seconds[most] > 0
    decoder.reading_cost.apart = -100.0
    assert run() == expected
    assert not any(read)
    decoder.reading_cost.apart = graph.seconds[most]
    assert run() == expected
    assert sum(read) > 5
    assert not all(read)
    assert Reads(most) in graph.captured
    for passes, idle in ((8, False), (4, True)):
        assert decoder.reads_beside(8 * passes, alone=idle)
        assert not decoder.reads_beside(8 * passes + 1, alone=idle)
    # It stays, whatever is read apart.
    decoder.reading_cost.apart = 0.0
    assert run() == expected
    assert sum(read) > 5
    for options in ({"strategy": Verified(4, threshold=0.1)}, {"strategy": Static(1)}, {"rows": 30}):
        run(**options)
        for other in kept(model):
            other.reading_cost.apart = 100.0
        run(**options)
        assert not any(read)


@pytest.mark.parametrize("error", [RuntimeError("capturing"), torch.OutOfMemoryError("CUDA out of memory")])
def test_where_it_cannot_be_captured_prompts_are_read_apart(
    error: Exception, recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has a graph keeps it, and what has none may still have one, unless memory is short."""
    captured = recorded.__init__

    def all_others(self: RecordedStep, step: Any, device: Any, beside: Any) -> None:
        if getattr(step, "func", step).__name__ == "_step_beside":
            raise error
        captured(self, step, device, beside)

    monkeypatch.setattr(recorded, "__init__", all_others)
    model = tiny.model("llama")
    prompts, new = mixed_prompts(16, seed=1)
    options = {**OPTIONS, "max_new_tokens": new}
    expected = mtpkern.generate_batch(model, prompts, use_graph=False, **options)
    mtpkern.generate_batch(model, prompts, **options)
    (decoder,) = kept(model)
    decoder.reading_cost.apart = 100.0
    said: list[Any] = []
    monkeypatch.setattr("mtpkern.graph._announce", lambda *args: said.append(args))
    outputs = mtpkern.generate_batch(model, prompts, **options)
    assert said == [(error, Reads(decoder.ladder.rungs[-1]))]
    assert [output.tokens for output in outputs] == [output.tokens for output in expected]
    assert decoder.graph is not None
    assert decoder.graph.refused == {Reads(decoder.ladder.rungs[-1])}
    assert decoder.graph.closed == isinstance(error, torch.OutOfMemoryError)
    assert not decoder.reads_beside(3, alone=False)


def test_a_pass_that_reads_prompts_tells_no_rung_its_time(
    recorded: type[RecordedStep],
    beside: list[int],
    any_rung: None,
    tiny: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes longer than one of as many rows."""
    polls: list[TimedPoll] = []
    reads: list[bool] = []
    init, replay = TimedPoll.__init__, Decoder.replay

    def noted(self: TimedPoll, *args: Any) -> None:
        init(self, *args)
        self.passes = deque()  # all of them
        polls.append(self)

    monkeypatch.setattr(TimedPoll, "__init__", noted)
    monkeypatch.setattr(Decoder, "replay", lambda self, *args: reads.append(self.reading) or replay(self, *args))
    (prompts, new), model = mixed_prompts(14, seed=3), tiny.model("llama")
    for _ in range(2):
        polls.clear()
        reads.clear()
        mtpkern.generate_batch(model, prompts, **OPTIONS, max_new_tokens=new)
    (poll,) = polls
    assert len(poll.passes) == len(reads)
    assert sum(reads) > 5
    assert not any(rows for rows, read in zip(poll.passes, reads) if read)


@pytest.mark.parametrize("kind", ["llama", "gated"])
def test_each_rung_may_have_a_graph_that_reads(
    kind: str,
    recorded: type[RecordedStep],
    beside: list[int],
    any_rung: None,
    tiny: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it has paid; until then the next higher that has one. On the lowest, too, there are masks behind prompts."""
    monkeypatch.setattr(gated_lora, "gated_rows", lambda gate: None)
    monkeypatch.setattr("mtpkern.graph.WARM_UP", 1)
    maskless: set[bool] = set()
    step = Decoder._step_beside

    def noted(self: Decoder, *args: Any) -> Any:
        maskless.add(self.maskless)
        return step(self, *args)

    monkeypatch.setattr(Decoder, "_step_beside", noted)
    model = tiny.model("llama") if kind == "llama" else tiny.adapted(tiny.model("llama"))
    prompts, new = mixed_prompts(24, seed=6)
    expected = [alone(model, prompt, n).tokens for prompt, n in zip(prompts, new)]

    def run() -> None:
        outputs = mtpkern.generate_batch(model, prompts, **OPTIONS, max_new_tokens=new)
        assert [output.tokens for output in outputs] == expected

    run()
    decoder = next(decoder for decoder in kept(base_of(model)) if len(decoder.sequences.status) == 3)
    graph, rungs = decoder.graph, decoder.ladder.rungs
    assert graph is not None
    assert len(rungs) > 2

    def reading() -> list[int]:
        return [rung for rung in rungs if Reads(rung) in graph.captured]

    run()
    assert reading() == rungs[-1:]
    for rung in rungs:
        decoder.ladder.times.saw(rung, 1e-3 * rung)
    graph.seconds[rungs[-1]] = 1e9
    run()
    assert reading() == rungs[-1:]
    assert 0 < decoder.reading_cost.saved[rungs[0]] < 1e9
    graph.seconds[rungs[-1]] = 0.0
    run()
    run()
    assert reading() == rungs
    assert maskless == {False}
    graph.closed = True
    run()
