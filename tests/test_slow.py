"""What `make test` leaves out has a quicker test of the same code beside it."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def marks_slow(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Attribute) and part.attr == "slow" for part in ast.walk(node))


def slow_without_quick(files: dict[str, ast.Module]) -> list[str]:
    """What is marked slow with no quicker test of the same beside it, of files by the name behind `test_`.

    A whole test names that other one, `@pytest.mark.slow("file::test_name")`; a set of parameters has the others of
    its own test, which then has to have some.
    """
    tests = {
        f"{stem}::{node.name}": node
        for stem, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    slow = {
        name: beside
        for name, node in tests.items()
        for mark in map(ast.unparse, node.decorator_list)
        if (beside := re.fullmatch(r"pytest\.mark\.slow(?:\('(.*)'\))?", mark))
    }
    wrong = [name for name, beside in slow.items() if beside[1] not in tests.keys() - slow.keys()]
    for name in tests.keys() - slow.keys():
        for decorator in filter(marks_slow, tests[name].decorator_list):
            wrong += [name] * all(map(marks_slow, getattr(decorator.args[1], "elts", [])))
    return wrong


def test_what_is_slow_has_a_quick_test_beside_it():
    paths = sorted(TESTS.glob("test_*.py"))
    marked = {path.stem.removeprefix("test_"): text for path in paths if "mark.slow" in (text := path.read_text())}
    named = {name for text in marked.values() for name in re.findall(r"mark\.slow\(\"(\w+)::", text)}
    paths = [TESTS / f"test_{name}.py" for name in marked.keys() | named]
    files = {path.stem.removeprefix("test_"): ast.parse(path.read_text()) for path in paths if path.exists()}
    assert len(files) > 10
    assert not slow_without_quick(files)


@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.slow\ndef test_a(): pass\ndef test_b(): pass",
        "@pytest.mark.slow('x::test_c')\ndef test_a(): pass\ndef test_b(): pass",
        "@pytest.mark.slow('x::test_b')\ndef test_a(): pass\n@pytest.mark.slow('x::test_a')\ndef test_b(): pass",
        "@pytest.mark.parametrize('a', [pytest.param(1, marks=pytest.mark.slow)])\ndef test_a(): pass",
    ],
)
def test_a_slow_test_alone_is_found(source):
    assert slow_without_quick({"x": ast.parse(source)})
