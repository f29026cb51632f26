"""Goals of the benchmarks of kernels and steps, on a device that is not there."""

import json
import weakref
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.bench import (
    assisted,
    call,
    compiled,
    decode_attention,
    distill,
    gated_step,
    models,
    preflight,
    readout,
    real,
    span_attention,
    step,
    throughput,
    timing,
    token_by_token,
    train_step,
)
from mtpkern.bench.report import Goal, Table, percent, run, write
from mtpkern.bench.timing import Peak, Spread
from mtpkern.cache import KVCache
from mtpkern.kernels.span_mask import span_mask
from support.benches import H200, goals

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flat(x):
    return Spread(x, x, x)


@pytest.fixture
def no_device(monkeypatch):
    """The grids of a GPU without one: what is timed is made up by the test."""
    for module in (decode_attention, readout):
        monkeypatch.setattr(module, "free", lambda device: None)
        monkeypatch.setattr(module, "peak", lambda device: H200)
    monkeypatch.setattr(readout, "launches", lambda action, device: 3)


@pytest.mark.parametrize("quick", [True, False])
def test_goals_of_decode_attention(no_device, monkeypatch, quick):
    def times(shape, device, *, flex):
        spread = flat(shape.bytes / 4e12 * 1e6 / (0.9 if shape.W < 8 else 0.85) + (1 if shape.L <= 4096 else 0))
        ways = {decode_attention.OURS: spread, decode_attention.UNSPLIT: flat(spread.median * 6)}
        return ways, ["flash-attn: not there"]

    monkeypatch.setattr(decode_attention, "times", times)
    tables = list(decode_attention.measure(CUDA, quick))
    # A table a row, each with all rows so far.
    captions = [table.caption for table in tables]
    assert len(set(captions)) == (1 if quick else 2)
    assert [len(table.rows) for table in tables[: captions.count(captions[0])]] == list(
        range(1, captions.count(captions[0]) + 1)
    )
    whole = tables[captions.count(captions[0]) - 1]
    found = goals(tables)
    assert len(found) == 4
    share, met = found["decode attention, B·L ≥ 64k, k ≤ 8: least share of bandwidth"]
    assert 80 < share <= 85
    assert not met
    slowest, met = found["decode attention, B = 1, L ≤ 4k: slowest"]
    assert slowest == pytest.approx(4096 * 4096 / 4e12 * 1e6 / 0.85 + 1)
    assert met
    assert found["decode attention over one split, L ≥ 16k, B ≤ 4: least"] == (pytest.approx(6), True)
    cost, met = found["decode attention, 15 rows over 1 row: greatest"]
    assert cost == pytest.approx(0.9 / 0.85, rel=1e-2)
    assert met
    assert whole.skipped == [f"flash-attn: not there ({len(whole.rows)} of {len(whole.rows)} shapes)"]


def test_goals_of_readout(no_device, monkeypatch):
    def times(R, vocabulary, device):
        assert vocabulary == readout.V
        return {readout.OURS: flat(2 * R * vocabulary / 4e12 * 1e6 / 0.9), readout.TORCH: flat(1000)}

    class NoDevice:
        def __init__(self, batch, vocabulary, device, *, ours):
            self.logits = [None]
            self.advance_ = self.both = None

    monkeypatch.setattr(readout, "_readout_times", times)
    monkeypatch.setattr(readout, "_keep_top_times", times)
    monkeypatch.setattr(readout, "Taken", NoDevice)
    monkeypatch.setattr(readout, "race", lambda *_, **__: ({readout.OURS: flat(9), readout.TORCH: flat(63)}, []))
    found = goals(readout.measure(CUDA, quick=False))
    assert found["readout of 16 rows, V 152k"] == (pytest.approx(32 * readout.V / 4e6 / 0.9), True)
    assert found["readout of 128 rows: share of bandwidth"] == (pytest.approx(90), True)
    assert found["readout + advance, 15 rows, V 152k"] == (9, True)
    assert found["readout + advance over separate torch operations"] == (7, False)
    assert goals(readout.measure(CUDA, quick=True)).keys() == found.keys()


def test_the_floor_of_a_pass():
    """Llama-3.1-8B: 8,030,261,248 parameters, 131,072 bytes of keys and values a token."""
    with torch.device("meta"):
        _, settings = models.SHAPES["Llama-3.1-8B"]
        model = LlamaForCausalLM(LlamaConfig(**settings)).bfloat16()
    assert step.weights(model) == 8_030_261_248 - 128_256 * 4096
    bytes = 2 * step.weights(model) + 131_072 * 16 * 2048
    machine = Peak(1e12, 1e18, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "peak", lambda device: machine)
        assert step.floor(model, step.Point(16, 2048, 8, 128)) == pytest.approx(bytes / 1e12 * 1e6)


@pytest.mark.parametrize("quick", [True, False])
def test_compiled_calls_stand_beside_the_static_cache_of_others(quick):
    """At once, in the short grid too; the rest is for a whole grid."""
    first, table = token_by_token.measure(CPU, quick)
    assert [row[0] for row in first.rows] == [token_by_token.COMPILED]
    all_ = [token_by_token.COMPILED, token_by_token.STATIC, token_by_token.OURS, token_by_token.THEIRS]
    assert [row[0] for row in table.rows] == (all_[:2] if quick else all_)
    assert not table.skipped


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A CPU that has a peak: 1 MB/s and a TFLOP/s, so that shares are megabytes over seconds."""
    machine = Peak(1e6, 1e12, "made up")

    def share_of_peak(device, us, **work):
        return machine.floor(**work) / us

    for module in (assisted, call, preflight, throughput, train_step):
        monkeypatch.setattr(module, "share_of_peak", share_of_peak)


def test_there_is_no_share_of_a_peak_on_a_cpu(monkeypatch):
    monkeypatch.setattr(timing, "peak", lambda device: H200)
    assert timing.share_of_peak(CPU, 1.0, bytes=1.0) is None
    assert timing.share_of_peak(CUDA, 4.0, bytes=4e6, flops=1e6) == pytest.approx(0.25)
    assert timing.share_of_peak(CUDA, 4.0, bytes=4e6, flops=2.4e9) == pytest.approx(0.75)
    assert (percent(None), percent(0.254)) == ("–", "25 %")


def shares(tables, column, name):
    """What the last table shows in a column, and what its records have."""
    *_, table = tables
    where = table.header.index(column)
    return [row[where] for row in table.rows], [record[name] for record in table.records]


def test_share_of_bandwidth_of_calls(as_on_a_gpu):
    shown, found = shares(call.measure(CPU, quick=True), "bandwidth", "bandwidth")
    assert shown == [percent(x) for x in found]
    # 0.8 million parameters in float32, eight times at least, in milliseconds.
    assert all(share > 100 for share in found)
    (_, lookup, assistant, _, _), found = shares(assisted.measure(CPU, quick=True), "bandwidth", "bandwidth")
    assert (lookup, assistant) == ("–", "–")
    assert [x is None for x in found] == [False, True, True, False, False]


def test_share_of_bandwidth_of_whole_runs(as_on_a_gpu, monkeypatch):
    """A pass of a millisecond reads the weights, and as many tokens as stand there in the middle of the run."""
    passes = throughput.FEWER
    fake = SimpleNamespace(run=lambda chances: (passes * 1e-3, 2.0))
    monkeypatch.setattr(throughput, "Course", lambda *args: fake)
    monkeypatch.setattr(throughput, "climb", lambda course: {})
    model = models.build("Qwen3-4B", CPU)
    monkeypatch.setattr(throughput, "model_of", lambda *_: model)
    shown, (found,) = shares(
        throughput.measure(CPU, True, [3], [24], ["never"]), "bandwidth, one token: ours", "bandwidth"
    )
    for way, tokens in (("plain", 24 + passes // 2), ("ours", 24 + passes)):
        assert found[way] == pytest.approx(step.bytes_read(model, 3, tokens) / 1e3)
    assert shown == [f"{percent(found['plain'])}: {percent(found['ours'])}"]


def test_share_of_the_matrix_peak_of_a_training_step(as_on_a_gpu):
    """8 times the parameters for each row, the head for span rows only, and attention."""
    trainee = train_step.Trainee(CPU, torch.float32)
    batch = train_step.TINY_BATCHES[0]
    layout = batch.layout()
    head = 64 * 32
    parameters = sum(p.numel() for p in trainee.student.parameters()) - head
    pairs = span_mask(layout.position, layout.prefix_end, layout.span_start).sum().item()
    want = 8 * (parameters * layout.position.numel() + head * layout.row.numel()) + 4.5 * 4 * 2 * 4 * 8 * pairs
    assert trainee.flops(layout) == want
    shown, found = shares(train_step.measure_batch(trainee, batch, 1), "of peak", "share")
    assert shown == [percent(x) for x in found]
    assert all(x > 0 for x in found)


def test_share_of_the_peak_in_the_preflight(as_on_a_gpu):
    model = models.build("Qwen3-4B", CPU)
    facts, action = preflight.rows_table(model, (9, 4, 1), compile=False)
    least = {R: step.work(model, step.Point(1, 24, 1, R))["bytes"] for R in (9, 4, 1)}
    assert facts["share_by_rows"] == {
        R: pytest.approx(least[R] / us, abs=2e-3 * least[R] / us) for R, us in facts["us_by_rows"].items()
    }
    profile = preflight._profiled(model, action, 4)
    assert profile["kernels_us"] >= sum(us for *_, us in profile["kernels"]) - 0.1
    assert profile["kernels_share"] > 0


@pytest.fixture
def most_kv(monkeypatch):
    """The most bytes of keys and values that have existed at once, as a list that grows."""
    alive, most = {}, [0]
    fill = KVCache.fill

    def filled(cache, layer, *args):
        fill(cache, layer, *args)
        for x in cache.layers[layer]:
            if id(x) not in alive:
                alive[id(x)] = x.nbytes
                weakref.finalize(x, alive.pop, id(x))
        most.append(sum(alive.values()))

    monkeypatch.setattr(KVCache, "fill", filled)
    return most


def test_stands_of_a_batch_have_one_set_of_caches(most_kv):
    """At 16 texts of 16k tokens two sets would not fit beside the weights, not even while a second stand is built."""
    cpu = torch.device("cpu")
    model = models.build("Llama-3.1-8B", cpu)
    config = model.config
    token = 2 * 4 * config.num_hidden_layers // 2 * config.num_key_value_heads * config.head_dim

    def one(B, L):
        return B * (L + step.PASSES * 16 + 1) * token

    with patch("mtpkern.layers.BACKEND", "eager"):
        list(compiled.pass_tables("Llama-3.1-8B", model, [step.Point(1, 24, 2, 3), step.Point(2, 24, 2, 5)]))
    assert max(most_kv) == one(2, 24)


def test_rows_are_printed_as_they_come(capsys):
    """Whoever is killed in the middle of a table has said what it knew."""
    printed = []

    def measure(device, quick):
        for n in (1, 2):
            yield Table("A", "Note.", ("n",), [(str(i),) for i in range(n)], goals=[Goal("g", 1, n, "x")])
            printed.append(capsys.readouterr().out)
        yield Table("A", "Note.", ("n",), [("7",), ("8",)])  # other rows than before: all of it again
        printed.append(capsys.readouterr().out)
        yield Table("B", "", ("n",), [("3",)])

    run("x", "Title", measure, ["--device", "cpu"])
    assert printed[0].endswith("## A\n\nNote.\n\n| n |\n| --- |\n| 0 |\n")
    assert printed[1:] == ["| 1 |\n", "| n |\n| --- |\n| 7 |\n| 8 |\n"]


MEASURES = {
    "assisted": lambda: assisted.measure(CPU, quick=True),
    "call": lambda: call.measure(CPU, quick=True),
    "distill": lambda: distill.measure(CPU, quick=True),
    "gated_step": lambda: gated_step.take_steps(CPU, False, tiny=True, rounds=2),
    "real": lambda: real.untaught(models.build("Qwen3-4B", CPU), [("a", [3, 4, 5]), ("b", [6, 7])], [1], 2, 4),
    "span_attention": lambda: span_attention.measure(CPU, quick=True),
    "token_by_token": lambda: token_by_token.measure(CPU, quick=True),
    "train_step": lambda: train_step.measure(CPU, quick=True),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_benchmark_that_is_cut_behind_its_first_row_keeps_it(name, tmp_path, monkeypatch):
    """Each writes its first table before that is whole."""
    monkeypatch.setattr(gated_step, "_peaks_of", gated_step.peaks)
    tables = MEASURES[name]()

    def measure(device, quick):
        yield next(tables)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, "Title", measure, ["--device", "cpu", "--results", str(tmp_path)])
    (table,) = json.loads((tmp_path / f"{name}.json").read_text())["tables"]
    assert len(table["rows"]) == len(table["records"]) > 0
    assert next(tables).caption == table["caption"]


def test_a_run_that_is_cut_keeps_its_rows(tmp_path, capsys):
    """Also of a table that is not whole; and half a file is never there."""

    def measure(device, quick):
        yield Table("A", "", ("n",), [("1",)])
        yield Table("A", "", ("n",), [("1",), ("2",)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("x", "Title", measure, ["--device", "cpu", "--results", str(tmp_path)])
    (table,) = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert table["rows"] == [["1"], ["2"]]
    printed = capsys.readouterr().out
    assert printed.count("## A") == 1
    assert printed.count("| 1 |") == printed.count("| 2 |") == 1
    with pytest.raises(TypeError, match="dataclass instances"):
        write("x", "Title", {}, [], {"object": object()}, tmp_path)
    assert json.loads((tmp_path / "x.json").read_text())["tables"] == [table]
