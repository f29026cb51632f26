"""The workflows of .github: they parse, and what they run is in the repository."""

import os
import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github/workflows"


def faults(text: str) -> list[str]:
    """What is wrong with a workflow."""
    flow = yaml.safe_load(text)
    # YAML 1.1 reads the word "on" as true.
    triggers = flow.get("on", flow.get(True))
    found = [f"no {key}" for key in ("name", "permissions", "jobs") if key not in flow]
    found += [] if triggers else ["no trigger"]
    for name, job in flow.get("jobs", {}).items():
        found += [f"{name}: no {key}" for key in ("runs-on", "timeout-minutes", "steps") if key not in job]
        steps = job.get("steps", [])
        if not steps or not str(steps[0].get("uses", "")).startswith("actions/checkout@"):
            found.append(f"{name}: the first step has to check out")
        for step in steps:
            if ("uses" in step) == ("run" in step):
                found.append(f"{name}: a step has one of uses and run: {step}")
            elif "uses" in step:
                found += [] if re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) else [f"{name}: {step['uses']}"]
            else:
                found += command_faults(step["run"])
    return found


def command_faults(line: str) -> list[str]:
    words = line.split()
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", words[1]], cwd=ROOT, capture_output=True, text=True)
        return [] if done.returncode == 0 else [done.stderr]
    if words[0].startswith("."):
        return [] if os.access(ROOT / words[0], os.X_OK) else [f"{words[0]} cannot be run"]
    return [] if words[:3] == ["python", "-m", "venv"] else [f"unknown command {line}"]


@pytest.mark.parametrize("name", ["ci.yml", "gpu.yml", "newest.yml"])
def test_a_workflow_runs_what_exists(name):
    assert not faults((FOLDER / name).read_text())
    assert "docker" not in (FOLDER / name).read_text()


def test_what_each_is_for():
    assert "- run: .ci/run\n" in (FOLDER / "ci.yml").read_text()
    gpu = yaml.safe_load((FOLDER / "gpu.yml").read_text())
    assert gpu["jobs"]["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    # Somebody else's pull request does not run on one's own machine.
    assert set(gpu.get("on", gpu.get(True))) == {"workflow_dispatch", "schedule"}
    offered = (ROOT / "bench/gpu.py").read_text()
    assert '"--results"' in offered


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("make gpu", "make gpus"),
        ("actions/checkout@v4", "actions/checkout"),
        ("timeout-minutes", "timeout"),
        ("jobs:", "job:"),
    ],
)
def test_a_planted_fault_is_found(old, new):
    text = (FOLDER / "gpu.yml").read_text()
    assert old in text
    assert faults(text.replace(old, new))


def test_the_gpu_workflow_runs_the_kernels_tests():
    """`make gpu` is bench/gpu.py, which begins with the files whose tests need a GPU: those of every Triton kernel."""
    from mtpkern.bench import gpu

    done = subprocess.run(["make", "--dry-run", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "bench/gpu.py" in done.stdout
    tests = "".join(Path(file).read_text() for file in gpu.test_files())
    kernels = [path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()]
    assert len(kernels) > 5
    assert not [stem for stem in kernels if not re.search(rf"\bmtpkern\.kernels\b.*\b{stem}\b", tests)]
