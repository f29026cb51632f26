"""Benchmarks: one file an op, whole decoding in decode.py; nobody imports this package."""
