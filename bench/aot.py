"""What the compiler makes of every kernel of decoding, for GPUs that need not be there.

    python -m mtpkern.bench.aot                                     every case for every target
    python -m mtpkern.bench.aot --targets sm_90 --cases readout     some of them
    python -m mtpkern.bench.aot --write                             and keep the table in bench/results/

The launchers run as they do in decoding, but on CPU tensors: Triton compiles what they launch, with their own tile
sizes and specialised on their own arguments, and nothing is launched. Registers, spill and shared memory are what
ptxas and the AMD compiler report. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from mtpkern.bench.harness import environment
from mtpkern.bench.report import Table, write
from mtpkern.kernels import decode_attention
from mtpkern.kernels.advance import Rows, Sequences, advance_triton
from mtpkern.kernels.decode_attention import decode_attention_triton
from mtpkern.kernels.kv_write import kv_write_triton
from mtpkern.kernels.readout import readout_triton


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, its processors and the bytes of shared memory that a program may take."""

    backend: str
    arch: int | str
    warp_size: int
    processors: int
    shared_memory: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108, 163 << 10),  # A100
    "sm_89": Target("cuda", 89, 32, 128, 99 << 10),  # RTX 4090, and what sm_86 and sm_120 have for shared memory
    "sm_90": Target("cuda", 90, 32, 132, 227 << 10),  # H100, H200
    "sm_100": Target("cuda", 100, 32, 148, 227 << 10),  # B200
    "gfx942": Target("hip", "gfx942", 64, 304, 64 << 10),  # MI300X
}


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for a target: registers a thread, spilled bytes a thread, shared memory in bytes."""

    case: str
    target: str
    kernel: str
    num_warps: int
    registers: int
    spill: int
    shared_memory: int
    matrix: str  # the instruction of its matrix products: wgmma, tcgen05, mma.sync, mfma, or none
    atomics: bool
    seconds: float


def attention_case(dtype: torch.dtype, D: int, rows: int, **options: Any) -> None:
    """Launch decode attention of `rows` rows a sequence at the heads of Qwen3-4B and Llama-3.1-8B: 32 over 8."""
    B, Hq, Hkv, C = 2, 32, 8, 1024
    query = torch.empty(1, Hq, B * rows, D, dtype=dtype)[0].transpose(0, 1)
    cache = torch.empty(B, Hkv, C + 1, D, dtype=dtype)
    index = torch.zeros(B * rows, dtype=torch.int64)
    start = torch.zeros(B + 1, dtype=torch.int64)
    decode_attention_triton(query, cache, cache, index, index, start, max_rows=rows, scale=D**-0.5, **options)


def advance_case(B: int, k: int, verify: bool) -> None:
    """Launch `advance` for B sequences with all rows that they can use."""
    R = B * (2 * k - 1)
    sequences = Sequences.allocate(B, 256, 128, torch.device("cpu"))
    rows = Rows.allocate(R, B, torch.device("cpu"))
    token = torch.zeros(R, dtype=torch.int64)
    threshold, stop_ids = torch.tensor(0.5), torch.tensor([2, 3])
    advance_triton(sequences, rows, token, torch.zeros(R), threshold, stop_ids, k=k, verify=verify, mask_token_id=1)


def readout_case(dtype: torch.dtype, V: int) -> None:
    """Launch the readout of two rows."""
    readout_triton(torch.empty(2, V, dtype=dtype), V - 1)


def kv_write_case(D: int) -> None:
    """Launch the write of 15 rows as a model hands them over: [1, Hkv, R, D], transposed."""
    new = torch.empty(8, 15, D, dtype=torch.bfloat16).transpose(0, 1)
    cache = torch.empty(1, 8, 257, D, dtype=torch.bfloat16)
    index = torch.zeros(15, dtype=torch.int64)
    kv_write_triton(cache, cache, new, new, index, index)


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# With 4 query heads a KV head, k = 1, 4, 8 and 16 fill tiles of 16, 32, 64 and 128 rows.
CASES: dict[str, Callable[[], object]] = {
    **{
        f"attention {name} D{D} k{k}": partial(attention_case, dtype, D, 2 * k - 1)
        for name, dtype in _DTYPES.items()
        for D in (64, 80, 96, 128, 256)
        for k in (1, 4, 8, 16)
    },
    "attention bf16 D128 one split": partial(attention_case, torch.bfloat16, 128, 15, splits=1),
    "attention bf16 D128 batch-invariant": partial(attention_case, torch.bfloat16, 128, 15, batch_invariant=True),
    "attention bf16 D128 window, softcap, sinks": partial(
        attention_case, torch.bfloat16, 128, 15, window=512, softcap=50.0, sinks=torch.zeros(32)
    ),
    **{
        f"advance B{B} k{k} {'verified' if verify else 'unverified'}": partial(advance_case, B, k, verify)
        for B, k in ((1, 8), (16, 8), (128, 8), (1024, 16))
        for verify in (True, False)
    },
    **{
        f"readout {name} V{V}": partial(readout_case, dtype, V)
        for name, dtype in _DTYPES.items()
        for V in (151_936, 128_257)  # the second is odd: Llama-3.1 and one mask token
    },
    **{f"kv_write D{D}": partial(kv_write_case, D) for D in (80, 128)},
}


@contextmanager
def _compiling(target: Target) -> Iterator[list[tuple[str, Any, float]]]:
    """Inside, a launch compiles for the target and is noted as (kernel, what was compiled, seconds)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    noted: list[tuple[str, Any, float]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        noted.append((self.fn.__name__, kernel, time.perf_counter() - start))
        return kernel

    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget(target.backend, target.arch, target.warp_size),
        get_current_device=lambda: target,  # kernels are kept by device
        get_current_stream=lambda device: 0,
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        stack.enter_context(patch.object(driver, "_active", stand_in))
        facts = (target.processors, target.shared_memory)
        stack.enter_context(patch.object(decode_attention, "_machine", lambda device: facts))
        stack.enter_context(patch.object(torch.version, "hip", "7.0" if target.backend == "hip" else None))
        yield noted


def compile_case(case: str, target: str) -> list[Compiled]:
    """The kernels that a case launches, compiled for a target; `compile_case("readout bf16", "sm_90")` has two."""
    with _compiling(TARGETS[target]) as noted:
        CASES[case]()
    return [
        Compiled(case, target, name, kernel.metadata.num_warps, *_resources(kernel), round(seconds, 1))
        for name, kernel, seconds in noted
    ]


def _resources(kernel: Any) -> tuple[int, int, int, str, bool]:
    """Registers, spilled bytes, shared memory, matrix instruction, and whether there are atomics."""
    if "cubin" in kernel.asm:
        import triton

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            report = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        text, registers, spill = kernel.asm["ptx"], r"REG:(\d+)", r"STACK:(\d+)"
        names = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
    else:
        text = report = kernel.asm["amdgcn"]
        registers, spill = r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)"
        names = {"mfma": "v_mfma"}
    matrix = next((name for name, instruction in names.items() if instruction in text), "none")
    counts = [int(re.findall(pattern, report)[-1]) for pattern in (registers, spill)]
    atomics = re.search(r"^\s*(atom|red)\.|_atomic_", text, re.MULTILINE) is not None
    return counts[0], counts[1], kernel.metadata.shared, matrix, atomics


def main() -> None:
    """Compile, print a line a kernel as it comes, then all of it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.aot", description="What the compiler reports.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", default=[""], metavar="NAME", help="beginnings of the names of cases")
    parser.add_argument("--write", action="store_true", help="write bench/results/aot.md and aot.json")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.startswith(tuple(arguments.cases))]
    if not cases:
        parser.error(f"no case begins with {' or '.join(arguments.cases)}; there are: {', '.join(CASES)}")

    header = ("case", "target", "kernel", "warps", "registers", "spill", "shared", "matrix")
    compiled: list[Compiled] = []
    for case in cases:
        for target in arguments.targets:
            for one in compile_case(case, target):
                compiled.append(one)
                print(*_line(one), sep=" | ", flush=True)
    if arguments.write:
        table = Table(
            "Kernels of decoding",
            "Registers a thread, spilled bytes a thread, shared memory in bytes a program.",
            header,
            [_line(one) for one in compiled],
        )
        data = {"kernels": [asdict(one) for one in compiled]}
        write("aot", "Ahead-of-time compilation", environment(torch.device("cpu")), [table], data)
    print(json.dumps([asdict(one) for one in compiled]))


def _line(one: Compiled) -> list[str]:
    numbers = (one.num_warps, one.registers, one.spill, one.shared_memory)
    return [one.case, one.target, one.kernel.strip("_"), *map(str, numbers), one.matrix]


if __name__ == "__main__":
    main()
