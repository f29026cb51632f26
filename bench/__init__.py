"""Benchmarks: one file an op, whole decoding in decode.py; nobody imports this package."""

import mtpkern.train  # noqa: F401  # says so where Python has taken the folder of a clone for the package
