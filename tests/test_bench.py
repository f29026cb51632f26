"""The decoding benchmark: it runs whole on a tiny model, and its arithmetic is right."""

import json
import weakref
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpkern.bench import compiled, decode, decode_attention, kv_write, readout, report, step, throughput, timing
from mtpkern.bench.harness import Spread, environment, interleaved
from mtpkern.bench.problems import problems
from mtpkern.bench.report import Goal, Table, run, write
from mtpkern.bench.timing import Peak, copies, kernels_by_name, peak, race, timed
from mtpkern.cache import KVCache
from mtpkern.compare import HF_GENERATE, Completion, Tally, rotated, sample_k
from mtpkern.strategies import ConfAdapt, Static, Verified


@pytest.fixture(scope="module")
def checkpoint(solver):
    folder = solver(3)
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


def test_environment_names_what_is_needed_to_repeat():
    facts = environment(torch.device("cpu"))
    assert {"hardware", "threads", "torch", "transformers", "commit", "command", "date"} <= facts.keys()
    assert all(facts.values())


def test_the_command_line_of_a_benchmark(tmp_path, capsys):
    asked = []

    def measure(device, quick):
        asked.append((device.type, quick))
        goals = [Goal("speed", 2, 1.5, "×"), Goal("time", 10, 9, "µs", at_most=True)]
        yield Table(
            "A", "Note.", ("n", "µs"), [("1", "2")], [{"n": 1, "us": Spread(2, 1, 3)}], goals, ["that: is not there"]
        )
        # What was measured is on paper before the next table starts, which may never end.
        assert (tmp_path / "x.md").exists()
        yield Table("B", "Note.", ("n",), [("1",)])

    run("x", "Title", measure, ["--device", "cpu", "--quick", "--results", str(tmp_path)])
    assert asked == [("cpu", True)]
    page = (tmp_path / "x.md").read_text()
    assert "DRY RUN" in page.splitlines()[0]
    assert "| speed | ≥ 2 × | 1.5 × | NO |" in page
    assert "| time | ≤ 10 µs | 9 µs | yes |" in page
    assert "Skipped: that: is not there" in page
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["dry_run"]
    first, second = record["tables"]
    assert first["records"] == [{"n": 1, "us": {"median": 2, "low": 1, "high": 3}}]
    assert first["goals"][0] == {"what": "speed", "target": 2, "measured": 1.5, "unit": "×", "at_most": False}
    assert second["caption"] == "B"
    capsys.readouterr()


def test_a_dry_run_is_not_written_by_default(monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a dry run was written")

    monkeypatch.setattr(report, "write", refuse)
    run("x", "Title", lambda device, quick: [Table("A", "", ("n",), [])], ["--device", "cpu"])
    assert "## A" in capsys.readouterr().out


def test_goals_are_met_at_the_target_and_never_by_nan():
    assert Goal("", 2, 2.0, "×").met
    assert Goal("", 2, 2.0, "×", at_most=True).met
    assert not Goal("", 2, float("nan"), "×").met
    assert not Goal("", 2, float("nan"), "×", at_most=True).met


def test_a_race_leaves_out_what_fails_and_what_differs():
    x = torch.arange(4.0)

    def broken(i):
        raise NotImplementedError("no such card\nand more")

    times, skipped = race(
        {"ours": lambda i: x, "also": lambda i: x + 0.01},
        {
            "same": lambda i: (x,),
            "broken": broken,
            "other": lambda i: x + 1,
            "shape": lambda i: x[:3],
            "nan": lambda i: x * torch.nan,
        },
        torch.device("cpu"),
    )
    assert set(times) == {"ours", "also", "same"}
    assert skipped[0] == "broken: NotImplementedError: no such card"
    assert [line.split(":")[0] for line in skipped] == ["broken", "other", "shape", "nan"]


@pytest.mark.parametrize("form", [lambda i: torch.zeros(2), lambda i: torch.zeros(3), lambda i: 1 / 0])
def test_ours_may_not_fail_a_race(form):
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        race({"ours": lambda i: torch.ones(2), "also ours": form}, {}, torch.device("cpu"))


class FakeCuda:
    """What `timing` calls of torch.cuda, on a clock that the actions move on. A graph notes the calls it captures."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.capturing = None
        self.streams = [object()]
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def __init__(self, keep_graph=False):
                self.seconds = 0.0

            def replay(self):
                cuda.now += self.seconds

        class Stream:
            device, device_index = "cpu", 0

            def wait_stream(self, other):
                assert cuda.capturing is None

        @contextmanager
        def graph(of, **_):
            cuda.capturing = of
            cuda.streams.append("capture")
            try:
                yield
            finally:
                cuda.capturing = None
            cuda.streams.pop()  # not where it failed

        @contextmanager
        def stream(new):
            depth = len(cuda.streams)
            cuda.streams.append(new)
            try:
                yield
            finally:
                del cuda.streams[depth:]

        for name, value in {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "stream": stream,
            "current_stream": lambda device: Stream(),
            "_sleep": lambda cycles: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
        monkeypatch.setattr("mtpkern.graph._side_stream", lambda device: Stream())

    def action(self, seconds, seen, fails=""):
        """An action that takes the device so long, and notes its arguments; it fails in a capture if told so."""

        def call(i):
            if self.capturing is None:
                self.now += seconds
            elif fails:
                raise RuntimeError(fails)
            else:
                self.capturing.seconds += seconds
                seen.append(i)
            return torch.ones(1)

        return call


def test_times_of_calls_in_graphs(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    short, long, resets = [], [], []
    actions = {"short": cuda.action(2e-6, short), "long": cuda.action(3e-3, long)}
    times = timed(actions, torch.device("cuda"), rounds=4, calls=5, reset=lambda: resets.append(cuda.capturing))
    assert times["short"].median == pytest.approx(2)
    assert times["long"].median == pytest.approx(3000)
    # As many as the copies of the inputs at least, in order; more where a call is short.
    assert long == list(range(5))
    assert short == list(range(64))
    assert resets == [None] * 10  # one round to warm up


def test_a_capture_that_fails_is_left_behind(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    ours = {"ours": cuda.action(1e-3, [])}
    theirs = {"theirs": cuda.action(1e-3, [], fails="not allowed in a capture"), "good": cuda.action(2e-3, [])}
    times, skipped = race(ours, theirs, torch.device("cuda"))
    assert skipped == ["theirs: RuntimeError: not allowed in a capture"]
    assert times["good"].median == pytest.approx(2000)
    assert len(cuda.streams) == 1
    with pytest.raises(RuntimeError, match="not allowed"):
        race({"ours": theirs["theirs"]}, {}, torch.device("cuda"))


def test_copies_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "_cache_size", lambda device: 60 << 20)
    cuda = torch.device("cuda")
    assert copies(1 << 30, cuda) == 1
    assert copies(80 << 20, cuda) * (80 << 20) >= 4 * (60 << 20)
    assert copies(100, cuda) == 64
    assert copies(100, torch.device("cpu")) == 1


def test_floor_is_the_larger_of_the_two():
    machine = Peak(bandwidth=1e12, flops=1e14, source="")
    assert machine.floor(bytes=2e6, flops=1e8) == pytest.approx(2)
    assert machine.floor(bytes=2e6, flops=1e9) == pytest.approx(10)


def test_a_peak_that_was_told_is_not_measured_again(monkeypatch):
    monkeypatch.setenv("MTPKERN_PEAK", json.dumps(asdict(H200)))
    peak.cache_clear()
    try:
        assert peak(torch.device("cpu")) == H200
    finally:
        peak.cache_clear()


def test_what_a_call_runs_by_name():
    found = kernels_by_name(lambda i: torch.ones(4, 4) @ torch.ones(4, 4), torch.device("cpu"))
    times = [us for _, _, us in found]
    assert times == sorted(times, reverse=True)
    assert ("aten::ones", 2) in [(name, count) for name, count, _ in found]


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
    result = decode.Figures(bench.tokenizer, held, mixed, greedy)
    assert result.identical == 1
    assert result.blocks == {3: 1, 2: 2, 1: 1}
    assert result.record()["tokens_per_pass"] == 2
    assert result.record()["effective_k"] == pytest.approx((3 + 2 + 2) / 3)


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
    assert set(record) == {"environment", "step"}
    capsys.readouterr()


CUDA = torch.device("cuda")
H200 = Peak(4e12, 800e12, "made up")


def flat(x):
    return Spread(x, x, x)


@pytest.fixture
def no_device(monkeypatch):
    """The grids of a GPU without one: what is timed is made up by the test."""
    for module in (decode_attention, kv_write, readout, step):
        monkeypatch.setattr(module, "free", lambda device: None)
    for module in (decode_attention, readout, step):
        monkeypatch.setattr(module, "peak", lambda device: H200)
    monkeypatch.setattr(readout, "launches", lambda action, device: 3)


def goals(tables):
    return {goal.what: (goal.measured, goal.met) for table in tables for goal in table.goals}


@pytest.mark.parametrize("quick", [True, False])
def test_goals_of_decode_attention(no_device, monkeypatch, quick):
    def times(shape, device, *, flex, splits):
        spread = flat(shape.bytes / 4e12 * 1e6 / (0.9 if shape.W < 8 else 0.85) + (1 if shape.L <= 4096 else 0))
        ways = {decode_attention.OURS: spread, decode_attention.UNSPLIT: flat(spread.median * 6)}
        return ways, ["flash-attn: not there"]

    monkeypatch.setattr(decode_attention, "times", times)
    monkeypatch.setattr(decode_attention, "form_tables", lambda device: [])
    tables = list(decode_attention.measure(CUDA, quick))
    # A table a row, each with all rows so far.
    captions = [table.caption for table in tables]
    assert len(set(captions)) == (1 if quick else 2)
    assert [len(table.rows) for table in tables[: captions.count(captions[0])]] == list(
        range(1, captions.count(captions[0]) + 1)
    )
    whole = tables[captions.count(captions[0]) - 1]
    assert ("33 splits" in whole.header) == quick
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
    monkeypatch.setattr(readout, "Taken", NoDevice)
    monkeypatch.setattr(readout, "race", lambda *_, **__: ({readout.OURS: flat(9), readout.TORCH: flat(63)}, []))
    ways = readout.PRODUCT, readout.OURS, readout.NO_PDL
    monkeypatch.setattr(readout, "_behind_product_times", lambda *_: dict(zip(ways, map(flat, (5, 8, 12)))))
    found = goals(readout.measure(CUDA, quick=False))
    assert found["readout of 16 rows, V 152k"] == (pytest.approx(32 * readout.V / 4e6 / 0.9), True)
    assert found["readout of 128 rows: share of bandwidth"] == (pytest.approx(90), True)
    assert found["readout + advance, 15 rows, V 152k"] == (9, True)
    assert found["readout + advance over separate torch operations"] == (7, False)
    assert goals(readout.measure(CUDA, quick=True)).keys() == found.keys()


def test_goals_of_kv_write(no_device, monkeypatch):
    ways = {kv_write.OURS: 2, kv_write.TORCH: 9, kv_write.ROTARY: 8, kv_write.NORM: 8, kv_write.ALL: 18}
    times = {way: flat(x) for way, x in ways.items()}
    monkeypatch.setattr(kv_write, "times", lambda *_: (times, ["compiled: no"]))
    *_, table = kv_write.measure(CUDA, quick=True)
    assert goals([table]) == {"KV write of 15 rows": (2, True)}
    assert table.records[0]["at_most_saved_us_a_pass"] == 16 * 36
    assert table.skipped == ["compiled: no"]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", step.CONFIGS)
def test_goals_of_the_step(no_device, monkeypatch, name, quick):
    model = step.build(name, torch.device("cpu"))
    monkeypatch.setattr(
        step, "points", partial(lambda points, name, device, quick: points(name, CUDA, quick), step.points)
    )

    def times(model, group):
        found = {f"{at} whole": flat(step.floor(model, at) / 0.8 + at.R) for at in group}
        return found | {f"{at} body": flat(step.floor(model, at) / 0.8) for at in group}, 0.0, (700, 600)

    monkeypatch.setattr(step, "_pass_times", times)
    monkeypatch.setattr(
        step, "_tokens_times", lambda model, B, L, budgets: {"plain": flat(100), **{str(R): flat(R) for R in budgets}}
    )
    *_, table = step.pass_tables(name, model, quick)
    assert "Of 700 launches at batch 16, 100 are beside the body, in 2 layers." in table.note
    found = goals([table])
    assert found[f"{name}: host syncs in a step"] == (0, True)
    share = f"{name}, batch 1, 2k context, 15 rows: share of the floor"
    assert (share in found) == (name != "Qwen3-0.6B")
    assert (f"{name}, batch 1, 2k context: 15 rows over 1" in found) == (name == "Qwen3-4B")
    if name == "Llama-3.1-8B":
        monkeypatch.setattr(type(model), "device", CUDA)
        found = goals(step.tokens_tables(name, model, quick))
        assert list(found.values()) == [(pytest.approx(3 * 100 / 128), True)]


def test_the_floor_of_a_pass():
    """Llama-3.1-8B: 8,030,261,248 parameters, 131,072 bytes of keys and values a token."""
    with torch.device("meta"):
        _, settings = step.CONFIGS["Llama-3.1-8B"]
        model = LlamaForCausalLM(LlamaConfig(**settings))
    assert step.weights(model) == 8_030_261_248 - 128_256 * 4096
    bytes = 2 * step.weights(model) + 131_072 * 16 * 2048
    machine = Peak(1e12, 1e18, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "peak", lambda device: machine)
        assert step.floor(model, step.Point(16, 2048, 8, 128)) == pytest.approx(bytes / 1e12 * 1e6)


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
    model = step.build("Llama-3.1-8B", cpu)
    config = model.config
    token = 2 * 4 * config.num_hidden_layers // 2 * config.num_key_value_heads * config.head_dim

    def one(B, L):
        return B * (L + step.PASSES * 16 + 1) * token

    list(step.pass_tables("Llama-3.1-8B", model, quick=False))
    assert max(most_kv) == max(one(1, 32), one(2, 24))
    most_kv[:] = [0]
    list(step.tokens_tables("Llama-3.1-8B", model, quick=False))
    assert max(most_kv) == one(2, 24)
    most_kv[:] = [0]
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
    with pytest.raises(TypeError, match="cannot write"):
        write("x", "Title", {}, [], {"object": object()}, tmp_path)
    assert json.loads((tmp_path / "x.json").read_text())["tables"] == [table]


@pytest.mark.parametrize(
    "stem", ["compiled", "decode_attention", "gated_lora", "kv_write", "linear", "readout", "step", "throughput"]
)
def test_dry_run(stem):
    """Every table of a benchmark at tiny shapes: no typo may wait for a GPU."""
    tables = list(import_module(f"mtpkern.bench.{stem}").measure(torch.device("cpu"), True))
    assert tables
    for table in tables:
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows)
        assert len(table.records) == len(table.rows)
        json.dumps([asdict(table)])


@pytest.mark.parametrize("masks", [0, 5])
def test_acceptance_is_imposed_place_by_place(masks):
    """Right in so many places of a span and then never: a pass brings as many tokens, and the certain one."""
    torch.manual_seed(0)
    model = step.build("Qwen3-4B", torch.device("cpu"))
    course = throughput.Course(model, 2, 24, 8, Verified(4, masks=masks))
    course.decoder.by_load = False
    for right in range(4):
        # The first pass has nothing to confirm.
        assert course.run([1.0] * right + [0.0])[1] == (1 + 7 * (1 + right)) / 8
    assert course.run([0.0, 1.0])[1] == 1
    if not masks:
        assert 1 < course.run([0.7])[1] < (1 + 7 * 4) / 8
        assert throughput.Course(model, 2, 24, 8, Static(1)).run([1.0])[1] == 1


def test_what_does_not_fit_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(throughput, "available_memory", lambda device: 1 << 20)
    monkeypatch.setattr(throughput, "climb", lambda course: {})
    monkeypatch.setattr(throughput, "Course", lambda *args: SimpleNamespace(run=lambda chances: (0.5, 2.0)))
    tables = list(throughput.measure(torch.device("cpu"), True, [1], [24, 1 << 15], ["never", "problems"]))
    # As each row is there.
    assert [len(table.rows) for table in tables] == [1, 2, 2]
    assert [record["right"] for record in tables[-1].records] == ["never", "problems"]
    (line,) = tables[-1].skipped
    assert line.startswith("batch 1, context 32768: keys and values take ")


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
