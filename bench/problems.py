"""Write the held-out problems that the demo and the benchmarks share.

`python -m mtpkern.bench.problems` makes mtpkern/assets/problems.jsonl: the first 1,000 problems of the test split, one
JSON object a line with prompt and result. They are an asset because the demo does not reach for the generator.
"""

from __future__ import annotations

import json
import sys
from itertools import islice

from mtpkern.compare import Problem
from mtpkern.demo import ASSETS
from mtpkern.output import exit_status
from mtpkern.train import arithmetic

HELD_OUT = 1000


def problems(split: arithmetic.Split, n: int, *, seed: int = 0) -> list[Problem]:
    """The first n problems of a split as the model is given them: `problems("validation", 200)[0].prompt`."""
    return [Problem(arithmetic.prompt(p), p.result) for p in islice(arithmetic.problems(split, seed=seed), n)]


def main() -> None:
    """Write the asset."""
    lines = [json.dumps({"prompt": p.prompt, "result": p.result}) for p in problems("test", HELD_OUT)]
    (ASSETS / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_status(main))
