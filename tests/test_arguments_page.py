"""docs/arguments.md says what happens: every field of the installed GenerationConfig, every argument of generate."""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import MinLengthLogitsProcessor

from mtpkern.arguments import read_arguments

PAGE = (Path(__file__).resolve().parents[1] / "docs/arguments.md").read_text()
PROBES = (False, True, 0, 1, 7, 0.5, "x", [], [3], {}, ["x"])
FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))
DEFAULTS = GenerationConfig._get_default_generation_params()
IDS = torch.ones(1, 3, dtype=torch.long)


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of a table's rows by the name in the first."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


TABLE = rows("Fields of GenerationConfig")
ARGUMENTS = rows("Arguments of generate that are no fields")


def named_values(cell: str) -> list[Any]:
    return [ast.literal_eval(value) for value in re.findall(r"`([^`]+)`", cell)]


def accepted(name: str, value: Any) -> bool:
    try:
        read_arguments(GenerationConfig(), IDS, {name: value, "tokenizer": None})
    except (ValueError, TypeError):
        return False
    return True


def honoured(name: str, value: Any, **beside: Any) -> Any:
    """What is handed on of a value, or the error."""
    beside |= {"do_sample": True} if name == "num_return_sequences" else {}
    try:
        settings = read_arguments(GenerationConfig(), IDS, beside | {name: value})[1]
        return value if name == "stop_strings" and not value else settings.get(name, DEFAULTS.get(name))
    except (ValueError, TypeError) as error:
        return error


def left_out(name: str, value: Any) -> str:
    """What becomes of a file's wish."""
    file = GenerationConfig()
    setattr(file, name, value)
    _, _, left = read_arguments(file, IDS, {})
    return "left out, with a warning" if name in left else "left out"


def counts_in_a_call_that_samples(name: str, value: Any) -> bool:
    """Whether a file's wish is handed on where the call says do_sample=True."""
    file = GenerationConfig()
    setattr(file, name, value)
    return name != "do_sample" and read_arguments(file, IDS, {"do_sample": True})[1].get(name) == value


@pytest.fixture(autouse=True)
def files_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a file may hold any value alone; that it must be one which transformers takes is another rule."""
    monkeypatch.setattr("mtpkern.arguments._require_valid", lambda file: None)


def check(name: str, row: list[str]) -> None:
    """Raise AssertionError where a row says something else than what happens."""
    call, file, why = row
    assert why
    values = [*PROBES, *named_values(call)] + ([DEFAULTS[name]] if DEFAULTS.get(name) is not None else [])
    if call == "honoured with do_sample=True, else inert":
        assert file == call
        assert all(accepted(name, value) for value in values)
        for value in values:
            outcome = honoured(name, value, do_sample=True)
            assert str(outcome).startswith(name) if isinstance(outcome, Exception) else outcome == value
        return
    if call == "honoured":
        # Its value reaches transformers, or us; a wrong one is an error that names it, and not as unsupported.
        assert (
            file.startswith("honoured") or name in ("do_sample", "num_return_sequences") or name.startswith("output_")
        )
        for value in values:
            outcome = honoured(name, value)
            nothing = value in ([], {}) and outcome is None
            assert str(outcome).startswith(name) if isinstance(outcome, Exception) else nothing or outcome == value
            asks = value is not False and not nothing and value != DEFAULTS.get(name) and value != 0
            if (
                not file.startswith("honoured with `tok")
                and file != "honoured"
                and asks
                and not isinstance(outcome, Exception)
            ):
                assert file.endswith(left_out(name, value))
                assert counts_in_a_call_that_samples(name, value) == (file.startswith("honoured with do_sample=True"))
        return
    if call == "inert":
        assert file == "inert"
        assert all(accepted(name, value) for value in values)
        # Nor in a call that samples.
        assert name not in read_arguments(GenerationConfig(), IDS, {name: 0.5, "do_sample": True})[1]
        return
    kind, _, but = call.partition(" but for ")
    assert kind == "refused"
    assert bool(named_values(but)) == bool(but)
    takes = {repr(value): accepted(name, value) for value in values}
    assert takes == {repr(value): value in named_values(but) for value in values}
    assert {left_out(name, value) for value in values if not takes[repr(value)]} == {file}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.filterwarnings("ignore")
def test_every_field_has_a_row_that_says_what_happens(name: str) -> None:
    assert name in TABLE, f"docs/arguments.md has no row for {name}"
    check(name, TABLE[name])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("temperature", ["honoured", "honoured", "x"]),
        ("temperature", ["inert", "inert", "x"]),
        ("repetition_penalty", ["honoured", "left out, with a warning", "x"]),
        ("repetition_penalty", ["honoured", "honoured with do_sample=True, else left out", "x"]),
        ("output_scores", ["honoured", "left out, with a warning", "x"]),
        ("num_return_sequences", ["honoured", "left out", "x"]),
        ("temperature", ["refused but for `1.0`", "left out", "x"]),
        ("num_beams", ["inert", "inert", "x"]),
        ("num_beams", ["refused", "left out, with a warning", "x"]),
        ("num_beams", ["refused but for `1`, `2`", "left out, with a warning", "x"]),
        ("num_beams", ["refused but for `1`", "left out", "x"]),
        ("max_time", ["inert", "inert", "x"]),
        ("use_cache", ["refused but for `True`", "left out, with a warning", "x"]),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_row_that_says_something_else_is_seen(name: str, row: list[str]) -> None:
    check(name, TABLE[name])
    with pytest.raises(AssertionError):
        check(name, row)


def test_every_argument_has_a_row_that_says_what_happens() -> None:
    of_generate = inspect.signature(GenerationMixin.generate).parameters
    assert of_generate.keys() - {"self", "kwargs"} <= ARGUMENTS.keys()
    honoured: dict[str, Any] = {
        "inputs": IDS,
        "attention_mask": torch.ones_like(IDS),
        "generation_config": GenerationConfig(),
        "stopping_criteria": [lambda ids, scores: False],
        "tokenizer": SimpleNamespace(),
        "logits_processor": [MinLengthLogitsProcessor(5, 3)],
        "streamer": None,  # is taken before: tests/test_streamers.py
    }
    for name, (says, why) in ARGUMENTS.items():
        assert why
        value = honoured.get(name, object())
        ids = None if name == "inputs" else IDS
        if says in ("honoured", "inert"):
            assert (says == "honoured") == (name in honoured)
            read_arguments(GenerationConfig(), ids, {name: value})
            continue
        assert says.startswith("refused")
        with pytest.raises(ValueError, match=f"does not support {name}"):
            read_arguments(GenerationConfig(), ids, {name: value})
        for neutral in [None, *named_values(says)]:
            read_arguments(GenerationConfig(), ids, {name: neutral})


def test_the_page_names_every_reason_to_end() -> None:
    from mtpkern.watch import _PRECEDENCE

    ends = PAGE.partition("`finish_reasons` tells")[2].partition("\n")[0]
    assert set(re.findall(r'"(\w+)"', ends)) == set(_PRECEDENCE) - {"fault"}
