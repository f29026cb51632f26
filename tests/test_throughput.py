"""Whole runs at an imposed acceptance: the shipped model on a CPU, and the chances of a real model."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mtpkern.bench import models, throughput
from mtpkern.strategies import Verified
from support.benches import H200

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_drafts_that_are_seldom_right_are_drafts_too():
    """At the threshold of the model whose chances are imposed; at the default one draft a pass would be kept."""
    course = throughput.Course(
        models.build("Qwen3-4B", CPU), 2, 24, 40, Verified(throughput.K, throughput.THRESHOLD, masks=21)
    )
    course.decoder.by_load = False
    tokens = course.run(throughput.MEASURED["problems"])[1]
    assert tokens > 1 + throughput.MEASURED["problems"][0]


def test_the_shipped_model_is_measured_on_a_cpu(tmp_path, capsys):
    words = ["--model", "shipped", "--device", "cpu", "--quick", "--batches", "1", "2", "--contexts", "600"]
    throughput.main([*words, "--most-tokens", "1000", "--right", "problems", "--results", str(tmp_path)])
    assert "DRY RUN" not in capsys.readouterr().out
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert not found["dry_run"]
    assert {"hardware", "torch", "commit", "command", "seed"} <= found["environment"].keys()
    (table,) = found["tables"]
    (record,) = table["records"]
    # Past the positions that it has learned.
    assert (record["B"], record["context"], record["chance"]) == (1, 600, list(throughput.MEASURED["problems"]))
    assert record["ratio"] > 0
    assert table["skipped"] == ["batch 2, context 600: 1,200 tokens, and --most-tokens is 1,000"]


def test_a_busy_machine_is_seen_by_its_own_clock():
    assert (throughput.clock(CPU) is throughput.process_time) == (torch.get_num_threads() == 1)


def test_only_what_has_goals_or_was_measured_is_imposed():
    assert set(throughput.RIGHT) == {"never", "0.62", "problems", "instructions"}
    assert all(0 < chance < 1 for chances in throughput.MEASURED.values() for chance in chances)
    assert sum(throughput.RIGHT["0.62"][0] ** j for j in range(throughput.K)) == pytest.approx(2.57, abs=0.01)


def test_a_chain_that_is_never_short_of_drafts_makes_the_tokens_of_the_goal():
    """Masks behind every draft: 0.62 a draft is 2.57 tokens a pass."""
    torch.manual_seed(0)
    k = throughput.K
    strategy = Verified(k, throughput.THRESHOLD, masks=(k - 1) ** 2)
    course = throughput.Course(models.build("Qwen3-4B", CPU), 16, 24, 50, strategy)
    course.decoder.by_load = False
    assert course.run(throughput.RIGHT["0.62"])[1] == pytest.approx(2.57, abs=0.2)


@pytest.fixture
def made_up_gpu(monkeypatch):
    """Whole runs on a GPU without one: ours take half of the time and make as many tokens as the batch says."""
    tokens = {1: 1.2, 16: 1.1, 64: 0.95, 128: 0.4}

    def course(model, batch, context, passes, strategy):
        return SimpleNamespace(run=lambda chances: (0.5 if strategy.verify else 1.0, tokens[batch]))

    for name, fake in (("climb", lambda course: {}), ("require_room", lambda *_: None), ("free", lambda device: None)):
        monkeypatch.setattr(throughput, name, fake)
    monkeypatch.setattr(throughput, "Course", course)
    monkeypatch.setattr(throughput, "peak", lambda device: H200)
    monkeypatch.setattr(throughput, "share_of_peak", lambda device, us, **work: H200.floor(**work) / us)
    monkeypatch.setattr(throughput, "model_of", lambda *_: models.build("Qwen3-4B", CPU))
    return torch.device("cuda")


def test_goals_stand_beside_their_ratios(made_up_gpu):
    """All that have some on the short grid, as each row is there; by row, in the records and among the goals."""
    tables = list(throughput.measure(made_up_gpu, True))
    assert [len(table.rows) for table in tables] == list(range(1, 9))
    table = tables[-1]
    shown = {(row[0], row[2]): row[table.header.index("goal")] for row in table.rows}
    assert shown == {
        ("1", "never"): "≥ 0.95: met",
        ("1", "0.62"): "≥ 2.4: met",
        ("16", "never"): "≥ 0.95: met",
        ("16", "0.62"): "≥ 2.3: NOT met",
        ("64", "never"): "≥ 0.95: met",
        ("64", "0.62"): "≥ 1.8: met",
        ("128", "never"): "≥ 0.95: NOT met",
        ("128", "0.62"): "–",
    }
    assert [(one["goal"], one["met"]) for one in table.records[2:4]] == [(0.95, True), (2.3, False)]
    assert len(table.goals) == 7


def test_goals_are_those_of_a_context(made_up_gpu):
    (*_, table) = throughput.measure(made_up_gpu, False, [16], [4096])
    assert [(one["right"], one["goal"]) for one in table.records] == [
        ("never", 0.95),
        ("0.62", None),
        ("problems", None),
        ("instructions", None),
    ]


def test_throughput_compares_what_is_made_alike(monkeypatch):
    """On a GPU both sides are captured and compiled; they differ in what their strategies are."""
    made = []

    def note(model, strategy, batch, context, room, **options):
        made.append({"strategy": strategy, "batch": batch, "context": context, **options})
        return SimpleNamespace(ladder=None, graph=None)

    class Judged:
        device, dtype, config = CUDA, torch.bfloat16, SimpleNamespace(vocab_size=64)

    monkeypatch.setattr(throughput, "model_of", lambda *_: Judged())
    monkeypatch.setattr(throughput, "endless", note)
    monkeypatch.setattr(throughput.Course, "run", lambda *_: (0.5, 2.0))
    for name in ("require_room", "free", "share_of_peak", "bytes_read"):
        monkeypatch.setattr(throughput, name, lambda *_, **__: None)
    monkeypatch.setattr(throughput, "peak", lambda device: H200)
    with FakeTensorMode():
        list(throughput.measure(CUDA, True, [4], [24], ["never"]))
    plain, ours = made
    assert plain.pop("strategy").k == 1
    assert ours.pop("strategy").verify
    for own in ("rows", "by_load"):
        assert plain.pop(own) != ours.pop(own)
    assert plain == ours == {"batch": 4, "context": 24, "compile": True}
