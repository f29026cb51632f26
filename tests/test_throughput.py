"""Whole runs at an imposed acceptance: the shipped model on a CPU, and the chances of a real model."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mtpkern.bench import models, throughput
from mtpkern.strategies import Verified

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


@pytest.mark.parametrize("name", ["problems", "instructions"])
def test_only_what_was_measured_is_imposed(name):
    assert set(throughput.RIGHT) == {"never", "problems", "instructions"}
    assert all(0 < chance < 1 for chance in throughput.RIGHT[name])


def test_throughput_compares_what_is_made_alike(monkeypatch):
    """On a GPU both sides are captured and compiled; they differ in what their strategies are."""
    made = []

    def note(model, strategy, batch, context, room, **options):
        made.append({"strategy": strategy, "batch": batch, "context": context, **options})
        return SimpleNamespace(_ladder=None, graph=None)

    class Judged:
        device, dtype, config = CUDA, torch.bfloat16, SimpleNamespace(vocab_size=64)

    monkeypatch.setattr(throughput, "model_of", lambda *_: Judged())
    monkeypatch.setattr(throughput, "endless", note)
    monkeypatch.setattr(throughput.Course, "run", lambda *_: (0.5, 2.0))
    for name in ("require_room", "free"):
        monkeypatch.setattr(throughput, name, lambda *_: None)
    with FakeTensorMode():
        list(throughput.measure(CUDA, True, [4], [24], ["never"]))
    plain, ours = made
    assert plain.pop("strategy").k == 1
    assert ours.pop("strategy").verify
    for own in ("rows", "by_load"):
        assert plain.pop(own) != ours.pop(own)
    assert plain == ours == {"batch": 4, "context": 24, "compile": True}
