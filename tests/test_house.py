"""The rules of the house: which way imports point, what an import costs, what a wrong installation says."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mtpkern
from support.processes import forks_of

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "mtpkern.kernels": ROOT / "kernels",
    "mtpkern": ROOT / "mtpkern",
    "mtpkern.train": ROOT / "train",
    "mtpkern.bench": ROOT / "bench",
}
# What each room may import of the house: itself and what stands to its left.
ALLOWED = {
    "mtpkern.kernels": {"mtpkern.kernels"},
    "mtpkern": {"mtpkern.kernels", "mtpkern"},
    "mtpkern.train": {"mtpkern.kernels", "mtpkern", "mtpkern.train"},
    "mtpkern.bench": set(ROOMS),
}
MODULES = {
    room: sorted(room if path.stem == "__init__" else f"{room}.{path.stem}" for path in folder.glob("*.py"))
    for room, folder in ROOMS.items()
}


def imported_names(source: str, package: str) -> set[str]:
    """Every module that the source imports anywhere, `from a import b` as both a and a.b, relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, node.module] if node.module else parents)
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    if name.split(".")[0] != "mtpkern":
        return None
    return next((room for room in ROOMS if room != "mtpkern" and f"{name}.".startswith(f"{room}.")), "mtpkern")


def wrong_imports(source: str, room: str) -> set[str]:
    """The imports of a file in the room that point the wrong way, use a bare folder name, or bring triton along."""
    wrong = set()
    for name in imported_names(source, room):
        head, target = name.split(".")[0], room_of(name)
        # `from mtpkern import kernels` names the parent as well, which every submodule import executes anyway.
        parent_only = name == "mtpkern" and room == "mtpkern.kernels"
        if (
            head in {"kernels", "train", "bench"}
            or (head == "triton" and room not in {"mtpkern.kernels", "mtpkern.bench"})
            or (target is not None and target not in ALLOWED[room] and not parent_only)
        ):
            wrong.add(name)
    return wrong


def run_python(code: str, *, cwd: Path = ROOT, pythonpath: Path | None = None, isolated: bool = False):
    """Run the code in a fresh interpreter; `isolated` leaves site-packages out, `pythonpath` goes in front."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    flags = ["-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def with_torch():
    """`with_torch(code)`: how a program ends that finds torch imported and nothing else, and what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with forks_of("torch", cwd=ROOT, environment=environment) as run:
        heads = {"triton", "transformers", "accelerate", "datasets", "peft", "mtpkern"}
        assert run(f"import sys; print({heads} & set(sys.modules))") == (0, "set()\n")
        yield run


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room):
    wrong = {path.name: wrong_imports(path.read_text(), room) for path in ROOMS[room].glob("*.py")}
    assert not {name: found for name, found in wrong.items() if found}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """What is left once modules that import none of those left, or that none of those left imports, are taken away."""
    left = dict(imports)
    while True:
        used = {name for names in left.values() for name in names}
        free = {name for name, names in left.items() if not names & set(left) or name not in used}
        if not free:
            return sorted([name, *sorted(names & set(left))] for name, names in left.items())
        left = {name: names for name, names in left.items() if name not in free}


def run_at_import(source: str) -> str:
    """The source without its functions and what only type checkers read."""

    class Bare(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            return ast.Pass()

        def visit_If(self, node: ast.If) -> ast.AST:
            return ast.Pass() if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return ast.unparse(Bare().visit(ast.parse(source)))


def test_no_modules_import_one_another():
    files = {
        room if path.stem == "__init__" else f"{room}.{path.stem}": path
        for room, folder in ROOMS.items()
        for path in folder.glob("*.py")
    }
    imports = {
        name: (imported_names(run_at_import(path.read_text()), name) & set(files)) - set(ROOMS)
        for name, path in files.items()
    }
    assert not circles(imports)


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"], ["c", "b"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("mtpkern.kernels", "from mtpkern.generation import generate"),
        ("mtpkern.kernels", "def f():\n    from mtpkern import strategies"),
        ("mtpkern.kernels", "from ..attention import NAME"),
        ("mtpkern", "import mtpkern.train.arithmetic"),
        ("mtpkern", "from mtpkern import bench"),
        ("mtpkern.train", "from mtpkern.bench.timing import clock"),
        ("mtpkern.train", "from ..bench import timing"),
        ("mtpkern", "import kernels.readout"),
        ("mtpkern.bench", "from train import layout"),
        ("mtpkern", "import triton.language as tl"),
    ],
)
def test_arrows_catch_a_planted_import(room, source):
    assert wrong_imports(source, room)


def test_a_tensor_of_floats_says_its_type():
    """torch.set_default_dtype is the caller's: neither thresholds and biases nor draws may hang on it."""
    made = {"zeros", "ones", "empty", "full", "rand", "randn", "linspace", "eye"}
    for path in (path for room in ("kernels", "mtpkern", "train") for path in (ROOT / room).glob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            head, _, name = ast.unparse(call.func).rpartition(".")
            if head == "torch" and name in made:
                assert {"dtype", "out"} & {x.arg for x in call.keywords}, f"{path.name}:{call.lineno} torch.{name}"


def test_tests_import_no_bare_folder():
    heads = {
        name.split(".")[0] for path in (ROOT / "tests").rglob("*.py") for name in imported_names(path.read_text(), "")
    }
    assert not heads & {"kernels", "train", "bench"}


def test_files_map_to_modules():
    """Every file of the four folders is the module that its place says, and nothing is found under a bare name."""
    checks = "\n".join(
        f"assert Path(find_spec({module!r}).origin) == Path({str(ROOMS[room] / file)!r}), {module!r}"
        for room, modules in MODULES.items()
        for module in modules
        for file in ["__init__.py" if module == room else f"{module.rsplit('.', 1)[1]}.py"]
    )
    result = run_python(f"from importlib.util import find_spec\nfrom pathlib import Path\n{checks}", cwd=ROOT / "tests")
    assert result.returncode == 0, result.stderr


def test_programs_end_without_a_traceback():
    """Every module that is run by name ends with `exit_status`, which says what an interrupt or a closed pipe is."""
    programs = {
        path: path.read_text().partition('\nif __name__ == "__main__":')[2]
        for room in ("mtpkern", "mtpkern.train", "mtpkern.bench")
        for path in ROOMS[room].glob("*.py")
    }
    ends = {path.name: end for path, end in programs.items() if end}
    assert len(ends) > 15
    own = {"cli.py", "__main__.py", "gpu.py"}  # mtpkern.cli.main does, and bench/gpu.py begins without the package
    # Benchmarks by mtpkern.bench.report.program.
    calls = "sys.exit(exit_status(", "    program("
    assert calls[0] in (ROOMS["mtpkern.bench"] / "report.py").read_text()
    assert not [name for name, end in ends.items() if name not in own and not any(call in end for call in calls)]


@pytest.mark.parametrize(
    ("start", "called"),
    [
        (lambda: runpy.run_module("mtpkern.train.checkpoint", run_name="__main__"), "torch.set_num_threads"),
        (lambda: runpy.run_path(str(ROOT / "bench/gpu.py"), run_name="__main__"), "tempfile.mkdtemp"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_an_interrupted_program(start, called, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(called, interrupt)
    with pytest.raises(SystemExit) as end:
        start()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_no_test_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert not {path.name: n for path, n in lengths.items() if n > 450}


def test_every_kernel_has_its_test():
    stems = {path.stem for path in ROOMS["mtpkern.kernels"].glob("*.py")} - {"__init__"}
    assert not [stem for stem in sorted(stems) if not (ROOT / "tests" / f"test_{stem}.py").exists()]


def test_import_is_light():
    result = run_python(
        "import sys, mtpkern; print(*sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr or result.stdout


@pytest.mark.slow("house::test_import_is_light")
def test_import_takes_no_longer_than_torch():
    code = "import time; start = time.perf_counter(); import {0}; print(time.perf_counter() - start)"
    ours = min(float(run_python(code.format("mtpkern")).stdout) for _ in range(2))
    assert ours < float(run_python(code.format("torch")).stdout)


def test_every_import_without_triton(with_torch):
    """As on macOS and Windows: in a fresh process, every public name is found, and then every module imported."""
    names = [name for modules in MODULES.values() for name in modules if not name.endswith("__main__")]
    # Whose extras are no part of the tests' environment.
    of_extras = {"mtpkern.lm_harness": "lm_eval", "mtpkern.handlers": "fastapi"}
    code = """
import importlib, importlib.util, sys
sys.modules["triton"] = None
import mtpkern
assert dir(mtpkern) == sorted(mtpkern.__all__)
for name in mtpkern.__all__:
    value = getattr(mtpkern, name)
    assert name.startswith("__") or value.__doc__, name
try:
    mtpkern.generat
except AttributeError as error:
    assert "generate" in str(error)
else:
    raise AssertionError("an unknown name was found")
"""
    imports = (
        f"importlib.util.find_spec({of_extras.get(name, 'torch')!r}) and importlib.import_module({name!r})"
        for name in names
    )
    status, said = with_torch(code + "\n".join(imports))
    assert status == 0, said


def test_no_module_is_named_like_a_public_name():
    public = {name for name in mtpkern.__all__ if name != "reference"}  # the one module that is itself public
    assert not public & {path.stem for path in ROOMS["mtpkern"].glob("*.py")}


@pytest.fixture
def clone(tmp_path):
    """The repository's code as a clone that was never installed."""
    for folder in ROOMS.values():
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    return tmp_path


@pytest.mark.parametrize("code", ["import mtpkern; mtpkern.generate", "import mtpkern.kernels.readout"])
def test_uninstalled_clone_says_what_to_run(clone, code):
    result = run_python(code, cwd=clone, isolated=True)
    assert result.returncode == 1
    assert "pip install -e ." in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("room", ["train", "bench"])
def test_a_clone_that_is_taken_for_the_package_says_so(clone, tmp_path_factory, room):
    """In the folder that holds a clone of that name Python finds it before what setuptools has installed."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "mtpkern").symlink_to(clone)
    result = run_python(f"import mtpkern.{room}", cwd=folder, isolated=True)
    assert result.returncode == 1
    assert f"{folder / 'mtpkern'} is a clone, which Python takes for the package" in result.stderr


def plant_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "5.16.1"])
def test_old_transformers_says_what_to_upgrade(tmp_path, version):
    plant_distribution(tmp_path, "transformers", version)
    last = run_python("import mtpkern", pythonpath=tmp_path).stderr.strip().splitlines()[-1]
    assert version in last
    assert "pip install --upgrade 'transformers>=5.17'" in last


@pytest.mark.parametrize("version", ["5.17.0", "5.18.0.dev0", "6.0.0"])
def test_new_transformers_is_accepted(tmp_path, version):
    plant_distribution(tmp_path, "transformers", version)
    assert run_python("import mtpkern", pythonpath=tmp_path).returncode == 0


def test_missing_transformers_says_what_to_install(clone):
    (clone / "kernels").rename(clone / "mtpkern" / "kernels")
    last = run_python("import mtpkern", cwd=clone, isolated=True).stderr.strip().splitlines()[-1]
    assert "pip install 'transformers>=5.17'" in last


@pytest.mark.parametrize("missing", ["accelerate", pytest.param("peft", marks=pytest.mark.slow)])
def test_missing_extra_says_what_to_install(missing, with_torch):
    code = (
        f"import importlib, sys\nsys.modules[{missing!r}] = None\n"
        + """
for module in ("trainer", "command"):
    try:
        importlib.import_module(f"mtpkern.train.{module}")
    except ImportError as error:
        print(error)
"""
    )
    said = with_torch(code)[1].splitlines()
    assert len(said) == 2
    for line in said:
        assert missing in line
        assert "pip install 'mtpkern[train]'" in line


@pytest.mark.slow("house::test_every_import_without_triton")
def test_what_a_machine_with_torch_and_transformers_alone_is_to_measure(with_torch):
    code = "import sys; sys.modules |= dict.fromkeys(['accelerate', 'datasets', 'peft'])"
    modules = "mtpkern.train.objective, mtpkern.bench.span_attention, mtpkern.bench.train_step"
    status, said = with_torch(f"{code}; import {modules}")
    assert status == 0, said


def test_wheel_holds_the_four_rooms(tmp_path):
    """Build the wheel from a copy of the tree: every module and every asset is in it, nothing under a bare name."""
    source = tmp_path / "source"
    source.mkdir()
    for folder in ROOMS.values():
        shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('..')"]
    result = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"mtpkern/py.typed"}
    for room, folder in ROOMS.items():
        expected |= {f"{room.replace('.', '/')}/{path.name}" for path in folder.glob("*.py")}
    assets = ROOMS["mtpkern"] / "assets"
    expected |= {f"mtpkern/assets/{path.relative_to(assets)}" for path in assets.rglob("*") if path.is_file()}
    expected |= {f"mtpkern/train/configs/{path.name}" for path in (ROOMS["mtpkern.train"] / "configs").glob("*.yaml")}
    assert held == expected


def test_the_readers_map_names_what_there_is() -> None:
    """Every file of the map exists, and every name that stands behind one is defined in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## A reader's map")[1]
    named = re.findall(r"`([\w/]+\.py)`(?:: ((?:`\w+`(?:, | and )?)+))?", text)
    assert len(named) > 30
    for path, names in named:
        defined = {getattr(node, "name", None) for node in ast.parse((ROOT / path).read_text()).body}
        missing = set(re.findall(r"`(\w+)`", names)) - defined
        assert not missing, (path, missing)


def test_the_log_begins_with_what_was_decided() -> None:
    """A row for each decision, which leads to a section with that title and date."""
    text = (ROOT / "docs" / "log.md").read_text()
    sections = {title: date for date, title in re.findall(r"^## (\d{4}-\d\d-\d\d) (.+)$", text, re.MULTILINE)}
    table = re.findall(r"^\| (.+) \| (\d\d-\d\d(?:, \d\d-\d\d)?) \| (.+) \|$", text.split("\n## 2026")[0], re.MULTILINE)
    assert len(table) > 15
    for _, dates, titles in table:
        assert [sections[title][5:] for title in titles.split("; ")] == dates.split(", ") * (
            titles.count("; ") + 1 if ", " not in dates else 1
        )
