"""Budgets of the kernels of decoding: what the compiler reports for GPUs that need not be here."""

import functools
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")

SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# A tile of 64 rows is what 15 rows of 4 heads fill; 16 and 32 rows are k = 1 and 4, 128 rows k = 16.
EVERYWHERE = ("attention bf16 D128 k8", "advance B16 k8 verified", "readout bf16 V151936", "kv_write D128")
ON_SM_90 = ("attention bf16 D128 k1", "attention bf16 D128 k16", "attention bf16 D64 k8", "attention bf16 D256 k8")

# Float32 is there for tests and small models: it has to fit, and may spill.
FLOAT32 = ("attention fp32 D128 k8", "attention fp32 D256 k16")


def without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=570)
    assert result.returncode == 0, result.stderr
    return result


@functools.cache
def compiled(target: str, *cases: str) -> list[dict[str, object]]:
    result = without_interpreter("-m", "mtpkern.bench.aot", "--targets", target, "--cases", *cases)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_budgets(target: str) -> None:
    kernels = compiled(target, *EVERYWHERE, *(ON_SM_90 if target == "sm_90" else ()))
    assert {one["kernel"] for one in kernels} == {
        "_attend_kernel",
        "_advance_kernel",
        "_kv_write_kernel",
        "_chunk_kernel",
        "_merge_kernel",
    }
    for one in kernels:
        # Bytes a thread. The attention's loop has none; eight bytes of stack in a kernel that runs once cost nothing.
        assert one["spill"] <= (0 if one["kernel"] == "_attend_kernel" else 16), one
        assert one["shared_memory"] <= SHARED_MEMORY[target], one
        # Merging in the block that finishes last would need one, and is a race that no interpreter sees.
        assert not one["atomics"], one


@pytest.mark.parametrize("target", ["sm_89", "sm_90"])
def test_float32_fits(target: str) -> None:
    for one in compiled(target, *FLOAT32):
        assert one["spill"] <= 1024, one
        assert one["shared_memory"] <= SHARED_MEMORY[target], one


def test_matrix_instructions_of_hopper() -> None:
    """wgmma takes 64 rows, and its tiles are where the arithmetic is; smaller ones take mma.sync."""
    instructions = {
        one["case"]: one["matrix"]
        for one in compiled("sm_90", *EVERYWHERE, *ON_SM_90)
        if one["kernel"] == "_attend_kernel"
    }
    assert instructions.pop("attention bf16 D128 k1") == "mma.sync"
    assert set(instructions.values()) == {"wgmma"}


def test_variants_do_not_grow_with_shapes() -> None:
    """50 shapes of batch, rows, capacity and vocabulary compile few variants: none may compile within a decode."""
    code = """
from unittest.mock import patch
import torch
from triton.runtime import JITFunction
from mtpkern.bench import aot
from mtpkern.kernels.decode_attention import decode_attention_triton
from mtpkern.kernels.readout import readout_triton

keys = set()
def note(self, key, signature, device, constexprs, options, attrs, warmup):
    keys.add((self.fn.__name__, key))

with aot._compiling(aot.TARGETS["sm_90"]), patch.object(JITFunction, "_do_compile", note):
    for i in range(50):
        B, C, rows = 1 + i % 7, 100 + 13 * i, 15
        cache = torch.empty(B, 2, C + 1, 64)
        index, start = torch.zeros(B * rows - i % 5, dtype=torch.int64), torch.zeros(B + 1, dtype=torch.int64)
        decode_attention_triton(
            torch.empty(len(index), 8, 64), cache, cache, index, index, start,
            max_rows=rows, scale=0.125 + i, splits=2 + i % 9, window=5 + i, softcap=20.0 + i,
        )
        readout_triton(torch.empty(1 + i, 4096), 7 + i)
print(*sorted(name for name, _ in keys))
"""
    names = without_interpreter("-c", code).stdout.split()
    assert len(names) <= 8, names
