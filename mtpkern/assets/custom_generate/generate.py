"""Runs where transformers is told to trust this checkpoint's code: several tokens a pass."""

import mtpkern


def generate(*args, model, **kwargs):
    """`mtpkern.generate` in the place of `model.generate`."""
    return mtpkern.generate(model, *args, **kwargs)
