"""bench/gpu.py, all that a GPU's minutes are spent on, and its pre-flight: processes, plan, pages; on a CPU."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mtpkern.bench import gpu, preflight
from mtpkern.bench.report import Goal, Table, write
from mtpkern.kernels.advance import advance_triton
from mtpkern.kernels.readout import readout, readout_triton

ROOT = Path(gpu.__file__).resolve().parents[1]


def test_a_process_that_stays_is_cut_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    parent = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); print(p.pid, flush=True)"
    )
    limit, said = 0.5, []
    while not said:  # a busy machine may need longer to start it
        limit *= 2
        command = [sys.executable, "-c", f"{parent}; {child}", child]
        outcome = gpu.supervise("it", command, limit, cwd=tmp_path, log=tmp_path / "log")
        said = outcome.said
    assert outcome.status == "cut"
    assert not outcome.well
    assert wait_for_death(int(said[-1]))


def wait_for_death(pid):
    for _ in range(100):  # until init has reaped it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_how_a_process_ended(tmp_path):
    def ended(code):
        return gpu.supervise("x", [sys.executable, "-c", code], 60, cwd=tmp_path, log=tmp_path / "log", WORD="yes")

    assert ended("import os; print(os.environ['WORD'])").line.startswith("x: done, ")
    failed = ended("raise RuntimeError('illegal access')")
    assert failed.status == "failed with 1"
    assert failed.line.endswith("RuntimeError: illegal access")
    assert not failed.well
    assert ended("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").status == "failed with -11"
    assert gpu.Outcome(f"x, {gpu.WHOLE}", "cut", 1).well
    assert not gpu.Outcome(gpu.TESTS, "cut", 1).well


def test_what_was_measured_stays(tmp_path):
    """A whole grid that was cut takes nothing from the short one; of a goal it has the last word."""

    def part(folder, *tables):
        write("readout", "", {"torch": "2", "quick": "x"}, [], {"tables": [asdict(t) for t in tables]}, folder)

    def table(caption, text, goals=()):
        return Table(caption, "", ("n",), [(text,)], goals=goals)

    results = gpu.Results([tmp_path], "Title")
    results.outcomes.append(gpu.Outcome("step, short grid", "failed with 1", 2, ["Error: boom"]))
    part(tmp_path / "short", table("A", "short A", [Goal("time", 2, 1, "µs", at_most=True)]), table("B", "short B"))
    part(tmp_path / "whole", table("A", "whole A", [Goal("time", 2, 3, "µs", at_most=True), Goal("speed", 2, 3, "×")]))
    results.take("readout", tmp_path / "short", gpu.SHORT)
    results.take("readout", tmp_path / "whole", gpu.WHOLE)
    results.take("step", tmp_path / "nothing", gpu.SHORT)
    page = results.write()
    assert all(word in page for word in ("short A", "short B", "## A, whole grid", "whole A", "1 of 2 met"))
    assert page.index("## A") < page.index("Error: boom") < page.index("## Goals")
    assert page.rstrip().endswith("| time | ≤ 2 µs | 3 µs | NO |\n| speed | ≥ 2 × | 3 × | yes |")
    assert "quick" not in json.loads((tmp_path / "gpu.json").read_text())["environment"]


def test_files_with_tests_for_a_gpu():
    files = {Path(file).stem for file in gpu.test_files()}
    assert files >= {"test_gpu_graph", "test_advance", "test_no_sync", "test_triton_decode", "test_triton_distill"}
    assert files >= {"test_triton_span", "test_gpu_training", "test_kv_write", "test_readout", "test_decode_attention"}
    assert not files & {"test_trainer", "test_evaluate", "test_resume", "test_cli_train"}  # not without peft


def test_every_benchmark_of_an_op_or_step_is_a_part():
    measured = {p.stem for p in Path(gpu.__file__).parent.glob("*.py") if "def measure(" in p.read_text()}
    assert gpu.WHOLE_LIMITS.keys() == measured
    assert gpu.SHORT_LIMITS.keys() <= measured


def test_a_first_call_ends_within_nine_minutes():
    """All limits of what it must not be without, and what the last of them may take to end."""
    limits = [gpu.PREFLIGHT_LIMIT, gpu.TESTS_LIMIT, *gpu.SHORT_LIMITS.values()]
    assert sum(limits) + gpu.GRACE <= 540
    # What the pre-flight took on a GPU, and a bare call of generate besides, which compiles the layers.
    spent = dict.fromkeys(preflight.STEPS, 0.0)
    for file in (gpu.RESULTS / "h200").glob("preflight*.jsonl"):
        for name, step in steps_of(file).items():
            spent[name] = max(step["seconds"], spent.get(name, 0.0))
    assert sum(spent[name] for name in preflight.STEPS) + 10 <= gpu.PREFLIGHT_LIMIT
    # First what the project is measured by; then what takes long to compile, which was last once and got nothing.
    assert list(gpu.SHORT_LIMITS)[:2] == ["throughput", "compiled"]
    # What may be cut while others' code is compiled takes nothing from what stands before it.
    assert list(gpu.SHORT_LIMITS)[-1] == "token_by_token"


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What runs on a GPU that is not there, in order; each takes all that it may and ends as `ends` says by name."""
    seen, ends, clock = [], {}, [0.0]

    def supervise(what, command, limit, *, cwd, log, **environment):
        seen.append((what, limit, command, environment))
        clock[0] += limit
        end = ends.get(what, lambda command: "done")
        return gpu.Outcome(what, end(command), limit)

    monkeypatch.setattr(gpu, "supervise", supervise)
    monkeypatch.setattr(gpu, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return seen, ends


def test_the_plan_of_a_first_call(calls, tmp_path):
    """Its order, what gets what is left, and what the pre-flight tells the others."""
    seen, ends = calls
    told = {"bandwidth": 2.0, "flops": 3.0, "source": "measured"}

    def fly(command):
        lines = [json.dumps({"step": "machine", "peak": told}), json.dumps({"step": "compiled"}), '{"step": "ker']
        Path(command[command.index("--results") + 1]).write_text("\n".join(lines))
        return "cut"

    ends[gpu.PREFLIGHT] = fly
    # A minute more than a first call has, for what takes what is left.
    arguments = ["--device", "cuda", "--minutes", "10", "--results", str(tmp_path / "here")]
    assert gpu.main(arguments) == 1  # the pre-flight was cut
    short = [f"{name}, {gpu.SHORT}" for name in gpu.SHORT_LIMITS]
    assert [what for what, *_ in seen][: 2 + len(short)] == [gpu.PREFLIGHT, gpu.TESTS, *short]
    assert seen[2 + len(short)][0] == f"span_attention, {gpu.WHOLE}"
    assert sum(limit for _, limit, *_ in seen) + gpu.GRACE <= 600
    for what, _, command, environment in seen[1:]:
        assert json.loads(environment["MTPKERN_PEAK"]) == told
        assert ("--quick" in command) == what.endswith(gpu.SHORT)
    for folder in ("here", "kept"):
        files = [path.name for path in (tmp_path / folder).iterdir()]
        assert {"gpu.md", "gpu.json", "gpu-preflight.jsonl"} <= set(files)
        assert len(files) <= 8


def test_a_line_of_the_preflight_that_was_cut_tells_nothing(tmp_path):
    told = tmp_path / "told.jsonl"
    told.write_text('{"step": "machine", "failed": "no"}\n{"step": "compi')
    assert gpu.known_peak(told) == {}


def test_a_wrong_kernel_stops_what_is_timed(calls, tmp_path):
    """The tests still run: they say more of what is wrong. What else fails in the pre-flight stops nothing."""
    seen, ends = calls
    ends[gpu.PREFLIGHT] = lambda command: f"failed with {preflight.WRONG}"
    assert gpu.WRONG == preflight.WRONG
    assert gpu.main(["--device", "cuda"]) == 1
    assert [what for what, *_ in seen] == [gpu.PREFLIGHT, gpu.TESTS]
    seen.clear()
    ends[gpu.PREFLIGHT] = lambda command: "failed with 1"
    assert gpu.main(["--device", "cuda", "--parts", "readout"]) == 1
    assert [what for what, *_ in seen][1:] == [gpu.TESTS, f"readout, {gpu.SHORT}", f"readout, {gpu.WHOLE}", gpu.SLOW]


def test_tests_share_the_gpu_among_eight(calls, monkeypatch):
    seen, _ = calls
    pytest.importorskip("xdist")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    gpu.run_tests(gpu.TESTS, 9, cwd=Path(), log=Path("log"), failures=Path("failures"))
    (_, _, command, _) = seen[0]
    assert command[command.index("-n") + 1] == "8"


def test_a_clone_is_laid_out_as_the_package(tmp_path):
    """And what it is laid out as is found before what is installed."""
    clone = tmp_path / "clone"
    for folder in ("mtpkern", "kernels", "train", "bench"):
        (clone / folder).mkdir(parents=True)
        for name in ("__init__.py", "named.py"):
            (clone / folder / name).write_text(f"WHERE = {folder!r}\n")
    linked = gpu.link(tmp_path / "linked", clone)
    code = "import mtpkern.named, mtpkern.kernels.named, mtpkern.train.named, mtpkern.bench.named as bench;"
    code += "print(mtpkern.named.WHERE, mtpkern.kernels.named.WHERE, mtpkern.train.named.WHERE, bench.WHERE)"
    environment = os.environ | {"PYTHONPATH": str(linked)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mtpkern", "kernels", "train", "bench"]


@pytest.mark.slow("bench_gpu::test_a_clone_is_laid_out_as_the_package")
def test_by_python_alone_from_a_clone_that_nobody_installed(tmp_path):
    """`python bench/gpu.py`, no make and no PYTHONPATH: what runs is the clone, also where another is installed."""
    clone = tmp_path / "clone"
    for folder in ("mtpkern", "kernels", "train", "bench"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    marked = clone / "bench" / "gated_lora.py"
    marked.write_text(marked.read_text().replace('"Gated LoRA"', '"Gated LoRA of the clone"'))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--no-tests", "--parts", "gated_lora"]
    done = subprocess.run(
        [*command, "--results", "../results"], cwd=clone, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "written: ../results/gpu.md" in done.stdout
    record = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert [(run["what"], run["status"]) for run in record["runs"]] == [(f"gated_lora, {gpu.WHOLE}", "done")]
    page = (tmp_path / "results" / "gpu.md").read_text()
    assert "DRY RUN" in page.splitlines()[0]
    assert "## Gated LoRA of the clone, whole grid" in page


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "sees no GPU" in capsys.readouterr().out


def steps_of(path):
    return {record["step"]: record for record in map(json.loads, path.read_text().splitlines())}


@pytest.mark.slow("bench_gpu::test_preflight_takes_no_uncompiled_layers_for_compiled")
def test_preflight_rehearsed(tmp_path, monkeypatch, capsys):
    """All but the compilation, whose command is only looked at: tests/test_aot.py compiles."""
    ran = []

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 1, "over budget\n1 kernels of 1 cases", "")

    with monkeypatch.context() as patch:
        patch.setattr(preflight.subprocess, "run", run)
        facts = preflight.compiled(torch.device("cpu"))
    assert facts == {"target": "sm_90", "said": "1 kernels of 1 cases"}
    assert ran[0][1:4] == ["-m", "mtpkern.bench.aot", "--targets"]

    def compiled(device):
        return facts

    monkeypatch.setattr(preflight, "compiled", compiled)
    file = tmp_path / "told.jsonl"
    assert preflight.main(["--device", "cpu", "--results", str(file)]) == 0
    found = steps_of(file)
    assert list(found) == ["machine", "compiled", "kernels", "checkpoint", "passes", "layers"]
    assert capsys.readouterr().out == file.read_text()
    assert found["machine"]["peak"]["bandwidth"] > 0
    assert found["kernels"]["right"].keys() == preflight.CHECKS.keys()
    assert found["checkpoint"]["equal"] == ["without a graph", "every default"]
    assert found["checkpoint"]["warnings"] == []
    assert found["passes"]["us_by_rows"].keys() == found["passes"]["body_us_by_rows"].keys() == {"9", "4", "1"}
    assert found["layers"]["us_by_rows"].keys() == {"4", "1"}
    assert 0 < len(found["passes"]["kernels"]) <= 15


def test_preflight_takes_right_kernels_for_right(interpreter, monkeypatch):
    """On a CPU both sides are the torch form, so that what a check asks beyond what a kernel promises does not show."""
    monkeypatch.setattr("mtpkern.bench.readout.readout", readout_triton)
    monkeypatch.setattr("mtpkern.bench.readout.advance", advance_triton)
    preflight.check_readout(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def test_preflight_names_aot_cases():
    from mtpkern.bench.aot import CASES, TARGETS

    assert all(any(case.startswith(family) for case in CASES) for family in preflight.FAMILIES)
    assert preflight.target(torch.device("cpu")) in TARGETS


WRONG_KERNELS = {
    "kv_write": ("write", lambda k_cache, v_cache, *rest: k_cache.add_(1)),
    "readout": ("readout.readout", lambda logits, mask: tuple(x + 1 for x in readout.reference(logits, mask))),
    "advance": ("readout.advance", lambda sequences, rows, *rest, **options: sequences.length.add_(1)),
    "decode_attention": ("decode_attention.decode_attention", lambda query, *rest, **options: query),
    "span_attention": (
        "span_attention.span_attention",
        lambda q, k, v, rule, scoring: (q + 0 * (k + v).sum()).transpose(1, 2),
    ),
    "distill_loss": ("distill.distill_loss", lambda hidden, head, **options: (hidden @ head.weight.t()).sum()),
    "head_readout": (
        "head_readout",
        lambda hidden, head: (torch.zeros(len(hidden)).long(), torch.ones(len(hidden)), None),
    ),
}


@pytest.mark.parametrize("kernel", WRONG_KERNELS)
def test_preflight_stops_where_a_kernel_is_wrong(tmp_path, monkeypatch, kernel):
    """And where the shipped checkpoint writes something else; a step that merely fails stops nothing."""

    def fail(device):
        raise ZeroDivisionError

    monkeypatch.setattr(preflight, "machine", fail)
    monkeypatch.setattr(preflight, "compiled", lambda device: {})
    name, wrong = WRONG_KERNELS[kernel]
    monkeypatch.setattr(f"mtpkern.bench.preflight.{name}", wrong)
    file = tmp_path / "told.jsonl"
    assert preflight.main(["--device", "cpu", "--results", str(file)]) == preflight.WRONG
    first, *_, last = map(json.loads, file.read_text().splitlines())
    assert first["failed"].startswith("ZeroDivisionError")
    assert last["step"] == "kernels"
    assert last["wrong"].startswith(kernel)


@pytest.mark.parametrize(("wrong", "named"), [(5, "batch 3, without a graph"), (6, "batch 1, by every default")])
def test_preflight_stops_where_the_checkpoint_says_something_else(monkeypatch, wrong, named):
    real = preflight.generate
    calls = []

    def generate(*args, **options):
        calls.append(options)
        return real(*args, **options) + (len(calls) == wrong)

    monkeypatch.setattr(preflight, "generate", generate)
    with pytest.raises(preflight.WrongKernelError, match=named):
        preflight.checkpoint(torch.device("cpu"))
    # Nothing but the prompt and its mask.
    assert calls[2].keys() == {"input_ids", "attention_mask"}


def test_preflight_takes_no_uncompiled_layers_for_compiled(tmp_path, monkeypatch):
    real = preflight.rows_table

    def fail(module, inputs):
        raise NotImplementedError

    def rows_table(*args, **options):
        with patch("mtpkern.layers.BACKEND", fail):
            return real(*args, **options)

    monkeypatch.setattr(preflight, "rows_table", rows_table)
    for name in ("machine", "compiled", "kernels", "checkpoint", "_profiled"):
        monkeypatch.setattr(preflight, name, lambda *_: {})
    file = tmp_path / "told.jsonl"
    assert preflight.main(["--device", "cpu", "--results", str(file)]) == 1
    *_, passes, layers = map(json.loads, file.read_text().splitlines())
    assert passes["us_by_rows"]
    assert "could not compile" in layers["failed"]
