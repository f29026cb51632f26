"""The decoding benchmark: it runs whole on a tiny model, and its arithmetic is right."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mtpkern
from mtpkern.bench import decode
from mtpkern.bench.harness import Spread, environment, interleaved
from mtpkern.bench.problems import problems
from mtpkern.bench.report import Table, write
from mtpkern.compare import HF_GENERATE, Completion, Tally, rotated
from mtpkern.strategies import ConfAdapt, Static, Verified
from mtpkern.train.arithmetic import build_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    mtpkern.add_mask_token(model, tokenizer)
    model.config.mtpkern = {**model.config.mtpkern, "k_max": 3}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [json.dumps(vars(p)) for p in problems("test", 8)]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread(2.0, 1.0, 3.0).text(1) == "2.0 (1.0–3.0)"


def test_every_way_goes_first_in_its_turn():
    names = ["a", "b", "c"]
    assert [rotated(names, i)[0] for i in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotated(names, i)) == names for i in range(4))
    order = []
    times = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 4, torch.device("cpu"), warm_up=2
    )
    assert "".join(order) == "abba" * 3
    assert all(0 <= t.low <= t.median <= t.high for t in times.values())


def test_tally():
    tally = Tally()
    tally.add([Completion([1, 2, 3], [2, 1]), Completion([1], [1])], right=1, seconds=0.5)
    tally.add([Completion([1, 2], [1, 1]), Completion([1, 2], [2])], right=2, seconds=1.5)
    assert (tally.problems, tally.right, tally.tokens, tally.passes) == (4, 3, 8, 6)
    assert tally.accuracy == 0.75
    assert tally.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert tally.tokens_per_pass == pytest.approx(8 / 6)
    assert tally.tokens_per_second == 4


def test_environment_names_what_is_needed_to_repeat():
    facts = environment(torch.device("cpu"))
    assert {"hardware", "threads", "torch", "transformers", "commit", "command", "date"} <= facts.keys()
    assert all(facts.values())


def test_report(tmp_path):
    table = Table("Speed", "In ms.", ("way", "ms"), [("a", "1"), ("b", "2")])
    page = write("x", "Title", {"torch": "2"}, [table], {"a": Spread(1, 1, 1)}, tmp_path)
    assert page.read_text().splitlines()[-4:] == ["| way | ms |", "| --- | ---: |", "| a | 1 |", "| b | 2 |"]
    record = json.loads((tmp_path / "x.json").read_text())
    assert record == {"environment": {"torch": "2"}, "a": {"median": 1, "low": 1, "high": 1}}


def figures(accuracy, tokens_per_pass):
    """As `Bench.count` returns them, from the two numbers that the choice looks at."""

    class Stub:
        tally = Tally(problems=100, right=accuracy, tokens=round(tokens_per_pass * 100), passes=100)

    return Stub()


def test_choice_keeps_the_accuracy(checkpoint, monkeypatch):
    bench = decode.Bench(checkpoint, torch.device("cpu"), k=4)

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
    assert bench.choose([]) == (ConfAdapt(4, 0.8), Verified(4, 0.4))


def test_identity_is_counted_by_tokens(checkpoint):
    bench = decode.Bench(checkpoint, torch.device("cpu"), None)
    assert bench.k == 3
    held = problems("test", 3)
    greedy = [Completion([1, 2, 3], [1, 1, 1])] * 3
    mixed = [Completion([1, 2, 3], [3]), Completion([1, 2], [2]), Completion([1, 2, 4], [2, 1])]
    result = decode.Figures(bench.tokenizer, held, mixed, greedy)
    assert result.identical == 1
    assert result.blocks == {3: 1, 2: 2, 1: 1}
    assert result.record()["tokens_per_pass"] == 2


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
    assert accuracy["Static(1)"]["tokens_per_pass"] == accuracy[HF_GENERATE]["tokens_per_pass"] == 1
    for batch in (1, 8):
        assert record[f"speed_batch_{batch}"][HF_GENERATE]["ratio"]["median"] == 1
    step = record["step"]["batch 8"]
    assert set(step) == {"whole", "forward", "readout", "body", "one_token"}
    assert all(s["median"] > 0 for s in step.values())
    page = (tmp_path / "tiny.md").read_text()
    assert page in capsys.readouterr().out
    for caption in ("Accuracy and tokens per pass", "Wall-clock time, batch 1", "Where a step's time goes"):
        assert f"## {caption}" in page


def test_a_part_alone(checkpoint, tmp_path, capsys):
    options = ["--only", "step", "--problems", "8", "--rounds", "1", "--name", "part"]
    decode.main([*options, "--checkpoint", str(checkpoint), "--results", str(tmp_path)])
    record = json.loads((tmp_path / "part.json").read_text())
    assert set(record) == {"environment", "k", "step"}
    capsys.readouterr()
