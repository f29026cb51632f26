"""Runs where transformers is told to trust this checkpoint's code: several tokens a pass."""

from typing import Any

import mtpkern


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """`mtpkern.generate` in the place of `model.generate`."""
    return mtpkern.generate(model, *args, **kwargs)
