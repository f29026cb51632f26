"""What the package may be installed with: its bounds, and the sets that the tests run with."""

import re
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

import mtpkern

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, Requirement]:
    """What a file of constraints asks for, by package."""
    text = (ROOT / name).read_text()
    return {x.name: x for x in map(Requirement, re.findall(r"(?m)^[^#\n]+?(?=\s*(?:#|$))", text))}


def test_bounds_and_pins_agree():
    """The version check says what pyproject.toml says; every pin satisfies what pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in project["dependencies"]]
    asked += [Requirement(text) for extra in ("train", "test") for text in project["optional-dependencies"][extra]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, lines)}
    for requirement in asked:
        if requirement.name == "mtpkern":
            continue
        (pin,) = pins[requirement.name.lower()]
        assert pin.operator == "=="
        assert pin.version in requirement.specifier, f"{requirement.name}: {pin} is not {requirement.specifier}"
    bound = next(str(requirement.specifier) for requirement in asked if requirement.name == "transformers")
    assert bound == f">={mtpkern._OLDEST_TRANSFORMERS}"


def test_the_oldest_set_is_what_is_promised():
    """`make test-oldest` pins the lower bounds of pyproject.toml, and differs from the tested set where it says so."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = pinned("constraints-oldest.txt")
    tested = (ROOT / "constraints.txt").read_text()
    for name in oldest:
        assert f"\n{name}==" in tested, f"{name} is spelled otherwise in constraints.txt, and would stay in"
    for bound in map(Requirement, project["dependencies"]):
        if bound.name != "rich":
            (least,) = bound.specifier
            assert least.operator == ">="
            assert str(oldest[bound.name].specifier) in (f"=={least.version}", f"=={least.version}.0")


def test_the_newest_set_is_newer():
    """`make test-newest` differs from the tested set by later versions, within the bounds of pyproject.toml."""
    tested, newest = map(pinned, ("constraints.txt", "constraints-newest.txt"))
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, pin in newest.items():
        (later,), (earlier,) = pin.specifier, tested[name].specifier
        assert Version(later.version) > Version(earlier.version), name
        assert all(later.version in x.specifier for x in map(Requirement, bounds) if x.name == name)
