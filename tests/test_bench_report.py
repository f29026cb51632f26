"""What all benchmarks share: turns, races, clocks, goals and reports."""

import json
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch

from mtpkern.bench import report, timing
from mtpkern.bench.report import Goal, Table, environment, run, write
from mtpkern.bench.timing import Peak, Spread, copies, interleaved, kernels_by_name, peak, race, timed
from mtpkern.compare import rotated
from support.benches import H200


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
