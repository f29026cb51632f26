"""The benchmark of decoding, and of a part of it: the same tokens, tallies and choices."""

import json
from dataclasses import asdict
from importlib import import_module
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from mtpkern.bench import decode, engine, models, real, throughput
from mtpkern.bench.problems import problems
from mtpkern.compare import HF_GENERATE, Completion, Tally, sample_k
from mtpkern.strategies import ConfAdapt, Static, Verified


@pytest.fixture(scope="module")
def checkpoint(solver):
    folder = solver(3)
    lines = [json.dumps(vars(p)) for p in problems("test", 8)]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_tally():
    tally = Tally()
    tally.add([Completion([1, 2, 3], [2, 1]), Completion([1], [1])], right=1, seconds=0.5)
    tally.add([Completion([1, 2], [1, 1]), Completion([1, 2], [2])], right=2, seconds=1.5)
    assert (tally.problems, tally.right, tally.tokens, tally.passes) == (4, 3, 8, 6)
    assert tally.accuracy == 0.75
    assert tally.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert tally.tokens_per_pass == pytest.approx(8 / 6)
    assert tally.tokens_per_second == 4
    assert tally.sample_ks == [2, 1, 1, 2]
    assert tally.effective_k == (1.5, pytest.approx((1 / 3) ** 0.5))


def test_tokens_per_pass_in_two_ways():
    """The worked example: pooled, the long sample weighs more; Eff. k is a mean over samples, last passes left out."""
    tally, samples = Tally(), [[4, 4, 4, 1], [2, 1]]
    assert [sample_k(blocks) for blocks in samples] == [4, 2]
    tally.add([Completion([0] * sum(blocks), blocks) for blocks in samples], right=0, seconds=1)
    assert tally.tokens_per_pass == pytest.approx(16 / 6)
    assert tally.effective_k == (3, pytest.approx(2**0.5))
    # A sample of one pass has nothing else; of one sample there is no deviation.
    assert sample_k([3]) == 3
    alone = Tally()
    alone.add([Completion([0] * 3, [3])], right=0, seconds=1)
    assert alone.effective_k == (3, 0)


def figures(accuracy, tokens_per_pass):
    """As `Bench.count` returns them, the two numbers that the choice looks at."""
    return {"accuracy": accuracy / 100, "tokens_per_pass": tokens_per_pass}


def test_choice_keeps_the_accuracy(checkpoint, monkeypatch):
    bench = decode.Bench(checkpoint, torch.device("cpu"))

    def count(label, held, ways):
        out = {}
        for name, s in ways.items():
            if isinstance(s, Static):
                out[name] = figures(100, 1)
            elif isinstance(s, ConfAdapt):
                # Careless thresholds are faster and wrong more often; 0.8 keeps exactly 97 %.
                out[name] = figures(
                    {0.5: 50, 0.6: 80, 0.7: 96, 0.8: 97, 0.9: 99}.get(s.threshold, 100), 5 - s.threshold
                )
            else:
                out[name] = figures(100, 4 - abs(s.threshold - 0.4))
        return out

    monkeypatch.setattr(bench, "count", count)
    assert bench.choose([]) == (ConfAdapt(3, 0.8), Verified(3, 0.4))


def test_identity_is_counted_by_tokens(checkpoint):
    bench = decode.Bench(checkpoint, torch.device("cpu"))
    assert bench.strategy(Verified) == Verified(3)
    held = problems("test", 3)
    greedy = [Completion([1, 2, 3], [1, 1, 1])] * 3
    mixed = [Completion([1, 2, 3], [3]), Completion([1, 2], [2]), Completion([1, 2, 4], [2, 1])]
    result = bench.figures(held, mixed, greedy)
    assert result["identical_to_hf_greedy"] == 1
    assert result["blocks_by_size"] == {"3": 1, "2": 2, "1": 1}
    assert result["tokens_per_pass"] == 2
    assert result["effective_k"] == pytest.approx((3 + 2 + 2) / 3)


def test_the_whole_benchmark(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "CONFADAPT", (0.5, 0.9))
    monkeypatch.setattr(decode, "VERIFIED", (0.3, 0.6))
    monkeypatch.setattr(decode, "MAX_NEW_TOKENS", 8)
    options = "--problems 4 --validation 4 --rounds 1 --per-round 2 --name tiny"
    decode.main([*options.split(), "--checkpoint", str(checkpoint), "--results", str(tmp_path)])
    record = json.loads((tmp_path / "tiny.json").read_text())
    accuracy = record["accuracy"]
    assert list(accuracy) == [
        *(HF_GENERATE, "Static(1)", "ConfAdapt(3, 0.5)", "ConfAdapt(3, 0.9)", "Verified(3, 0.3)", "Verified(3, 0.6)")
    ]
    # Lossless is lossless on a random model as well.
    for name, figures in accuracy.items():
        if not name.startswith("ConfAdapt"):
            assert figures["identical_to_hf_greedy"] == figures["problems"] == 4
    for way in ("Static(1)", HF_GENERATE):
        assert [accuracy[way][name] for name in ("tokens_per_pass", "effective_k", "effective_k_deviation")] == [
            1,
            1,
            0,
        ]
    for batch in (1, 8):
        assert record[f"speed_batch_{batch}"][HF_GENERATE]["ratio"]["median"] == 1
    page = (tmp_path / "tiny.md").read_text()
    assert page in capsys.readouterr().out
    for caption in ("Accuracy and tokens per pass", "Wall-clock time, batch 1"):
        assert f"## {caption}" in page


@pytest.mark.parametrize("main", [decode.main, real.main])
def test_no_number_of_nothing(main, capsys):
    names = {decode.main: "problems validation rounds per-round", real.main: "number batch-size max-new-tokens"}
    for name in names[main].split():
        with pytest.raises(SystemExit):
            main([f"--{name}", "0"])
        assert "expected a whole number of at least 1, got '0'" in capsys.readouterr().err


def test_answers_are_compared_with_what_the_page_says(capsys):
    """Of prompts that nothing else decodes, ours would be identical to themselves."""
    for words in ("--against", "--against hf_generate --hf 3"):
        with pytest.raises(SystemExit):
            real.main(words.split())
        assert "lack what to compare with" in capsys.readouterr().err
    said = {"truth_batch_size": None, "batch_size": [2, 4], "against": ["hf_generate", "plain"], "hf": None}
    theirs = "Hugging Face's greedy generate of the original"
    for given, wanted in (
        ({}, f"{theirs}, decoded 2 at a time"),
        ({"against": ["plain"]}, "the original one a pass by our code, decoded 2 at a time"),
        ({"hf": 3}, f"{theirs}, decoded 2 at a time (of the first 3 of each kind; else of the original one a pass"),
        ({"against": [], "truth_batch_size": 8}, f"{theirs}, decoded 8 at a time, before all else"),
    ):
        assert real._what_is_right(SimpleNamespace(**said | given)).startswith(wanted)


def test_a_request_that_fails_is_not_taken_for_an_answer():
    with pytest.raises(ZeroDivisionError):
        engine.asked(lambda i: 1 / (i - 2), requests=5, clients=2)
    # So many at once, each of which waits for the others.
    together = Barrier(3, timeout=30)
    engine.asked(lambda i: together.wait(), requests=6, clients=3)
    asked = []
    assert engine.asked(asked.append, requests=5, clients=2) > 0
    assert sorted(asked) == list(range(5))


def test_a_part_alone(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "CONFADAPT", (0.5,))
    monkeypatch.setattr(decode, "VERIFIED", (0.3,))
    monkeypatch.setattr(decode, "MAX_NEW_TOKENS", 8)
    options = "--only accuracy --problems 2 --validation 2 --name part"
    decode.main([*options.split(), "--checkpoint", str(checkpoint), "--results", str(tmp_path)])
    record = json.loads((tmp_path / "part.json").read_text())
    assert set(record) == {"environment", "chosen", "accuracy"}
    capsys.readouterr()


@pytest.mark.parametrize(
    "stem",
    [
        *("decode_attention", "distill", "gated_lora", "linear", "newcomers", "readout", "span_attention"),
        "token_by_token",
        # Parts of them run in the quick tests of `times` (test_bench_goals.py) and `Course` below.
        *(pytest.param(stem, marks=pytest.mark.slow) for stem in ("compiled", "throughput")),
    ],
)
def test_dry_run(stem):
    """Every table of a benchmark at tiny shapes: no typo may wait for a GPU."""
    tables = list(import_module(f"mtpkern.bench.{stem}").measure(torch.device("cpu"), True))
    assert tables
    for table in tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert len(table.records) == len(table.rows)
        json.dumps([asdict(table)])


@pytest.mark.parametrize("masks", [0, 5])
def test_acceptance_is_imposed_place_by_place(masks):
    """Right in so many places of a span and then never: a pass brings as many tokens, and the certain one."""
    torch.manual_seed(0)
    model = models.build("Qwen3-4B", torch.device("cpu"))
    course = throughput.Course(model, 2, 24, 8, Verified(4, masks=masks))
    course.decoder.by_load = False
    for right in range(4):
        # The first pass has nothing to confirm.
        assert course.run([1.0] * right + [0.0])[1] == (1 + 7 * (1 + right)) / 8
    assert course.run([0.0, 1.0])[1] == 1
    if not masks:
        assert 1 < course.run([0.7])[1] < (1 + 7 * 4) / 8
        assert throughput.Course(model, 2, 24, 8, Static(1)).run([1.0])[1] == 1


def test_a_mask_that_is_to_be_wrong_is_wrong_wherever_it_stands():
    course = throughput.Course(models.build("Qwen3-4B", torch.device("cpu")), 1, 24, 8, Verified(4))
    rows = course.decoder.rows
    rows.token.fill_(models.MASK)
    for first in range(64):  # every token of the vocabulary
        rows.position.copy_(torch.arange(len(rows.seq)) + first)
        course.chance.fill_(1)
        right, _ = course.readout(torch.zeros(len(rows.seq), 64), models.MASK)
        course.chance.zero_()
        wrong, _ = course.readout(torch.zeros(len(rows.seq), 64), models.MASK)
        assert (right != wrong).all()


def test_what_does_not_fit_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(throughput, "available_memory", lambda device: 1 << 20)
    monkeypatch.setattr(throughput, "climb", lambda course: {})
    monkeypatch.setattr(throughput, "Course", lambda *args: SimpleNamespace(run=lambda chances: (0.5, 2.0)))
    tables = list(throughput.measure(torch.device("cpu"), True, [1], [24, 1 << 15, 7], ["never", "problems"]))
    # As each row is there.
    assert [len(table.rows) for table in tables] == [1, 2, 2, 2]
    assert [record["right"] for record in tables[-1].records] == ["never", "problems"]
    long, short = tables[-1].skipped
    assert long.startswith("batch 1, context 32768: keys and values take ")
    assert short == "batch 1, context 7: a text begins with 8 tokens"


def test_options_of_throughput(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(throughput, "measure", lambda *args, **options: asked.append(options) or iter(()))
    throughput.main(["--device", "cpu", "--batches", "1", "64", "--right", "problems"])
    assert asked == [
        {"model": "Qwen3-4B", "batches": [1, 64], "contexts": None, "most_tokens": None, "right": ["problems"]}
    ]
    for wrong in ("--batches 0", "--most-tokens -1", "--model other", "--right 0.7", "--right often"):
        with pytest.raises(SystemExit):
            throughput.main(["--device", "cpu", *wrong.split()])
    # What no model was measured to do is not imposed.
    assert "invalid choice: 'often'" in capsys.readouterr().err
