"""custom_generate: the file in a checkpoint by which transformers' own `model.generate` decodes several tokens a pass.

transformers runs it where a caller trusts the checkpoint's code, and nowhere else:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs)

Who trusts none passes no code along: `model.generate = partial(mtpkern.generate, model)` does the same.
"""

from __future__ import annotations

from pathlib import Path

_CODE = '''\
"""Runs where transformers is told to trust this checkpoint's code: several tokens a pass."""

from typing import Any

import mtpkern


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """`mtpkern.generate` in the place of `model.generate`."""
    return mtpkern.generate(model, *args, **kwargs)
'''


def write_custom_generate(folder: str | Path) -> None:
    """Write `custom_generate/generate.py` into a checkpoint's folder, in place of one that is there.

    write_custom_generate("runs/mine")
    """
    file = Path(folder) / "custom_generate" / "generate.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_CODE, encoding="utf-8")
