"""What the compiler makes of every kernel of ours, for GPUs that need not be there.

    python -m mtpkern.bench.aot                                     every case for every target
    python -m mtpkern.bench.aot --targets sm_90 --cases readout     some of them
    python -m mtpkern.bench.aot --write                             and keep the table in bench/results/

The launchers run as they do in use, but on CPU tensors: Triton compiles what they launch, with their own tile sizes
and specialised on their own arguments, and nothing is launched. Registers, spill and shared memory are what ptxas and
the AMD compiler report. Every kernel has a budget (see `over_budget`); the exit status is 1 where one is exceeded. The
last line of the output is JSON. Triton keeps what it compiled, so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product, starmap
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from mtpkern.bench.harness import environment
from mtpkern.bench.report import Table, write
from mtpkern.kernels import decode_attention, span_attention
from mtpkern.kernels.advance import Rows, Sequences, advance_triton
from mtpkern.kernels.decode_attention import decode_attention_triton
from mtpkern.kernels.distill import Head, distill_loss_triton, head_readout_triton
from mtpkern.kernels.gated_lora import gated_lora_triton
from mtpkern.kernels.kv_write import kv_write_triton
from mtpkern.kernels.readout import readout_triton
from mtpkern.kernels.span_attention import span_attention_triton


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
    rows: int  # of its tile of matrix products; 0 without products
    bits: int  # of what they multiply
    num_warps: int
    num_stages: int
    registers: int
    spill: int
    shared_memory: int
    matrix: str  # the instruction of its matrix products: wgmma, tcgen05, mma.sync, mfma, or none
    atomics: bool
    code: str  # equal where the machine code is
    seconds: float


def decode_attention_case(dtype: torch.dtype, D: int, rows: int, **options: Any) -> None:
    """Decode attention of `rows` rows a sequence at the heads of Qwen3-4B and Llama-3.1-8B: 32 over 8."""
    B, Hq, Hkv, C = 2, 32, 8, 1024
    query = torch.empty(1, Hq, B * rows, D, dtype=dtype)[0].transpose(0, 1)
    cache = torch.empty(B, Hkv, C + 1, D, dtype=dtype)
    index = torch.zeros(B * rows, dtype=torch.int64)
    start = torch.zeros(B + 1, dtype=torch.int64)
    decode_attention_triton(query, cache, cache, index, index, start, max_rows=rows, scale=D**-0.5, **options)


def advance_case(B: int, k: int, verify: bool) -> None:
    """`advance` for B sequences with all rows that they can use."""
    R = B * (2 * k - 1)
    sequences = Sequences.allocate(B, 256, 128, torch.device("cpu"))
    rows = Rows.allocate(R, B, torch.device("cpu"))
    token = torch.zeros(R, dtype=torch.int64)
    threshold, stop_ids = torch.tensor(0.5), torch.tensor([2, 3])
    advance_triton(sequences, rows, token, torch.zeros(R), threshold, stop_ids, k=k, verify=verify, mask_token_id=1)


def readout_case(dtype: torch.dtype, V: int) -> None:
    """The readout of two rows."""
    readout_triton(torch.empty(2, V, dtype=dtype), V - 1)


def kv_write_case(dtype: torch.dtype, D: int) -> None:
    """The write of 15 rows as a model hands them over: [1, Hkv, R, D], transposed."""
    new = torch.empty(8, 15, D, dtype=dtype).transpose(0, 1)
    cache = torch.empty(1, 8, 257, D, dtype=dtype)
    index = torch.zeros(15, dtype=torch.int64)
    kv_write_triton(cache, cache, new, new, index, index)


def gated_lora_case(
    dtype: torch.dtype,
    adapter: torch.dtype,
    r: int,
    rows: int = 15,
    H: int = 2560,
    widths: tuple[int, ...] = (4096, 1024),
) -> None:
    """The adapter of two siblings; more of them add code, but no registers."""
    a = torch.empty(len(widths) * r, H, dtype=adapter)
    outs, bs = [torch.empty(rows, N, dtype=dtype) for N in widths], [torch.empty(N, r, dtype=adapter) for N in widths]
    gate = torch.empty(rows, dtype=torch.bool)
    gated_lora_triton(outs, torch.empty(rows, H, dtype=dtype), gate, a, bs, [2.0] * len(widths))


def span_attention_case(dtype: torch.dtype, D: int, *, sinks: bool = False, **options: Any) -> None:
    """Span attention of one sequence, 32 heads over 8, forward and backward."""
    T = 160
    query, key = (torch.empty(1, T, H, D, dtype=dtype).transpose(1, 2).requires_grad_() for H in (32, 8))
    rule = [torch.zeros(1, T, dtype=torch.int32)] * 3
    if sinks:
        options["sinks"] = torch.zeros(32, dtype=dtype)
    span_attention_triton(query, key, key, *rule, scale=D**-0.5, **options).sum().backward()


def distill_case(dtype: torch.dtype, V: int, **options: Any) -> None:
    """The head's readout, its hard loss and its soft loss, with gradients."""
    hidden = torch.zeros(16, 16, dtype=dtype).requires_grad_()
    head = Head(torch.zeros(V, 16, dtype=dtype), banned=V - 1, **options)
    head_readout_triton(hidden, head)
    distill_loss_triton(hidden, head, target=torch.zeros(16, dtype=torch.int64))
    distill_loss_triton(hidden, head, teacher=(hidden.detach(), head))


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DIMS = (64, 80, 96, 128, 256)

# With 4 query heads a KV head, k = 1, 4, 8 and 16 fill tiles of 16, 32, 64 and 128 rows in the narrow types. Tiles go
# by the padded head dimension and the bytes of an element, so that not every pair has to be there.
_SHAPES = {
    "bf16": [*product((64, 128, 256), (1, 4, 8, 16)), (80, 8), (96, 8)],
    "fp16": [(128, 8), (256, 8)],
    "fp32": [(64, 1), *product(_DIMS, (8,))],
}
CASES: dict[str, Callable[[], object]] = {
    **{
        f"decode_attention {name} D{D} k{k}": partial(decode_attention_case, _DTYPES[name], D, 2 * k - 1)
        for name, shapes in _SHAPES.items()
        for D, k in shapes
    },
    "decode_attention bf16 D128 k8 one split": partial(decode_attention_case, torch.bfloat16, 128, 15, splits=1),
    "decode_attention bf16 D128 k8 batch-invariant": partial(
        decode_attention_case, torch.bfloat16, 128, 15, batch_invariant=True
    ),
    "decode_attention bf16 D64 k8 window, sinks": partial(
        decode_attention_case, torch.bfloat16, 64, 15, window=128, sinks=torch.zeros(32, dtype=torch.bfloat16)
    ),
    "decode_attention bf16 D256 k8 window, softcap": partial(
        decode_attention_case, torch.bfloat16, 256, 15, window=512, softcap=50.0
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
    **{f"kv_write bf16 D{D}": partial(kv_write_case, torch.bfloat16, D) for D in _DIMS},
    "kv_write fp32 D128": partial(kv_write_case, torch.float32, 128),
    **{f"gated_lora {name} r32": partial(gated_lora_case, dtype, dtype, 32) for name, dtype in _DTYPES.items()},
    "gated_lora bf16, adapter fp32": partial(gated_lora_case, torch.bfloat16, torch.float32, 32),
    "gated_lora bf16 r12, odd widths": partial(
        gated_lora_case, torch.bfloat16, torch.bfloat16, 12, 15, 2561, (1001, 7)
    ),
    "gated_lora bf16 r32, 8,192 rows": partial(gated_lora_case, torch.bfloat16, torch.bfloat16, 32, 8192, 14_336),
    **{
        f"span_attention {name} D{D}": partial(span_attention_case, dtype, D)
        for name, dtype in _DTYPES.items()
        for D in {"bf16": _DIMS, "fp16": (128,), "fp32": (64, 128, 256)}[name]
    },
    "span_attention bf16 D64 sinks": partial(span_attention_case, torch.bfloat16, 64, sinks=True),
    "span_attention bf16 D256 softcap": partial(span_attention_case, torch.bfloat16, 256, softcap=50.0),
    **{f"distill {name} V144": partial(distill_case, dtype, 144) for name, dtype in _DTYPES.items()},
    "distill bf16 V129": partial(distill_case, torch.bfloat16, 129),  # odd, as above
    "distill bf16 V144 softcap": partial(distill_case, torch.bfloat16, 144, softcap=30.0),
}

# The rows of a kernel's matrix products, by the name of its launch option.
_MATRIX_ROWS = {
    "_shrink_kernel": "BLOCK_R",
    "_expand_kernel": "BLOCK_R",
    "_attend_kernel": "BLOCK_M",
    "_forward_kernel": "ROWS",
    "_dq_kernel": "ROWS",
    "_dkdv_kernel": "KEYS",
}

# Bytes a thread that may be spilled, by the beginning of the case, the kernel and the target; elsewhere none.
SPILL: dict[tuple[str, str], dict[str, int]] = {
    # Beside 46 registers: a stack, not a want of registers. One launch a step.
    ("advance", "_advance_kernel"): {"sm_80": 16, "sm_89": 16},
    **{
        (f"span_attention {case}", kernel): {"sm_80": spill, "sm_89": spill}
        for case, forward in (("bf16 D80", 24), ("bf16 D96", 24), ("bf16 D128", 64), ("fp16 D128", 64))
        for kernel, spill in (("_forward_kernel", forward), ("_dkdv_kernel", 16))
    },
    # Before and behind its loops but for 9 of 540 instructions on sm_80; 64 keys a tile, which wgmma wants, pay for it.
    **{
        (f"span_attention {case}", "_dq_kernel"): {"sm_80": spill, "sm_90": hopper}
        for case, spill, hopper in (
            ("bf16 D80", 56, 16),
            ("bf16 D96", 56, 16),
            ("bf16 D128", 88, 0),
            ("fp16 D128", 88, 0),
        )
    },
    # Where nothing is aligned, each element has an address of its own.
    ("gated_lora bf16 r12, odd widths", "_expand_kernel"): {"sm_90": 16, "sm_100": 24},
    ("span_attention bf16 D64", "_forward_kernel"): {"sm_100": 8},
    # With a soft cap; without one 8 and 160.
    ("span_attention bf16 D256", "_dq_kernel"): {"sm_90": 48},
    ("span_attention bf16 D256", "_dkdv_kernel"): {"sm_80": 24, "sm_89": 24, "sm_90": 200},
    ("span_attention fp32 D64", "_dkdv_kernel"): {"gfx942": 8},
    ("span_attention fp32 D256", "_dq_kernel"): {
        "sm_80": 272,
        "sm_89": 272,
        "sm_90": 256,
        "sm_100": 288,
        "gfx942": 160,
    },
    ("span_attention fp32 D256", "_dkdv_kernel"): {"gfx942": 484},
}


def over_budget(one: Compiled) -> list[str]:
    """What a kernel takes that it must not: spill, shared memory, slow products, atomics. Empty is good."""
    allowed = max(
        (
            spill.get(one.target, 0)
            for (case, kernel), spill in SPILL.items()
            if one.case.startswith(case) and one.kernel == kernel
        ),
        default=0,
    )
    faults = []
    if one.spill > allowed:
        faults.append(f"spills {one.spill} bytes a thread, allowed are {allowed}")
    if one.shared_memory > TARGETS[one.target].shared_memory:
        faults.append(f"takes {one.shared_memory} bytes of shared memory of {TARGETS[one.target].shared_memory}")
    # wgmma takes 64 rows; where 64 rows stand ready, the slower instruction would leave half of Hopper idle.
    if one.target == "sm_90" and one.rows >= 64 and one.bits == 16 and one.matrix != "wgmma":
        faults.append(f"multiplies {one.rows} rows by {one.matrix}, not wgmma")
    # Float32 may be multiplied without them, exactly.
    if one.matrix == "none" and one.rows and one.bits == 16:
        faults.append("has products without matrix instructions")
    # Merging in the block that finishes last would need one, and is a race that no interpreter sees. Sums by atomics
    # would differ from run to run.
    if one.atomics:
        faults.append("has atomics")
    return faults


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Inside, a launch compiles for the target instead of running, and is noted in the list that this yields."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    facts = TARGETS[target]
    noted: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None:
            name = self.fn.__name__
            rows = options.get(_MATRIX_ROWS.get(name, ""), 0)
            bits = 8 * args[0].element_size() if rows else 0
            noted.append(_noted(target, name, rows, bits, kernel, round(time.perf_counter() - start, 1)))
        return kernel

    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget(facts.backend, facts.arch, facts.warp_size),
        get_current_device=lambda: target,  # kernels are kept by device
        get_current_stream=lambda device: 0,
    )
    with ExitStack() as stack:
        for place, name, value in (
            (JITFunction, "run", compile_only),
            (driver, "_active", stand_in),
            (decode_attention, "_machine", lambda device: (facts.processors, facts.shared_memory)),
            (span_attention, "_shared_memory", lambda device: facts.shared_memory),
            (torch.version, "hip", "7.0" if facts.backend == "hip" else None),
        ):
            stack.enter_context(patch.object(place, name, value))
        yield noted


def compile_case(case: str, target: str) -> list[Compiled]:
    """The kernels that a case launches, compiled: `compile_case("kv_write fp32 D128", "sm_90")[0].registers`."""
    with compiling(target) as noted:
        CASES[case]()
    return [replace(one, case=case) for one in noted]


def _noted(target: str, name: str, rows: int, bits: int, kernel: Any, seconds: float) -> Compiled:
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
    return Compiled(
        "",
        target,
        name,
        rows,
        bits,
        kernel.metadata.num_warps,
        kernel.metadata.num_stages,
        int(re.findall(registers, report)[-1]),
        int(re.findall(spill, report)[-1]),
        kernel.metadata.shared,
        next((name for name, instruction in names.items() if instruction in text), "none"),
        re.search(r"(?:^|\s)(?:atom|red)\.\w|_atomic_", text) is not None,
        kernel.hash,
        seconds,
    )


def compile_all(cases: Sequence[str], targets: Sequence[str], jobs: int = 1) -> Iterator[list[Compiled]]:
    """Each case for each target, in this order, `jobs` at a time."""
    pairs = list(product(cases, targets))
    if jobs == 1:
        yield from starmap(compile_case, pairs)
        return
    # Forked, so that torch and Triton are imported once; nothing here has started a thread.
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        yield from pool.map(compile_case, *zip(*pairs))


def distinct(compiled: Iterable[Compiled]) -> list[Compiled]:
    """Without those whose machine code an earlier case has for the same target already."""
    first: dict[tuple[str, str], Compiled] = {}
    for one in compiled:
        first.setdefault((one.target, one.code), one)
    return list(first.values())


def tables(compiled: Sequence[Compiled], targets: Sequence[str]) -> list[Table]:
    """A table for each op: a row for each case and kernel, a column for each target."""
    rows: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for one in compiled:
        op, _, rest = one.case.partition(" ")
        cells = rows.setdefault(op, {}).setdefault((rest, one.kernel.strip("_").removesuffix("_kernel")), {})
        cells[one.target] = (
            f"{one.registers}/{one.spill}/{one.shared_memory / 1024:.0f}"
            + f" {one.matrix}" * (one.matrix != "none")
            + " **over**" * bool(over_budget(one))
        )
    return [
        Table(
            op,
            "Registers a thread / spilled bytes a thread / KiB of shared memory, instruction of matrix products; "
            "nothing where an earlier row has the same machine code.",
            ("case", "kernel", *targets),
            [[*case, *(cells.get(target, "") for target in targets)] for case, cells in table.items()],
        )
        for op, table in rows.items()
    ]


def _lasting(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name not in ("code", "seconds")}


def main() -> int:
    """Compile, print a line a kernel as it comes, then all of it as JSON; 1 where a kernel exceeds its budget."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.aot", description="What the compiler reports.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", default=[""], metavar="NAME", help="beginnings of the names of cases")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores)")
    parser.add_argument("--write", action="store_true", help="write bench/results/aot.md and aot.json")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.startswith(tuple(arguments.cases))]
    if not cases:
        parser.error(f"no case begins with {' or '.join(arguments.cases)}; there are: {', '.join(CASES)}")

    compiled: list[Compiled] = []
    for kernels in compile_all(cases, arguments.targets, arguments.jobs):
        for one in kernels:
            compiled.append(one)
            numbers = (one.num_warps, one.num_stages, one.registers, one.spill, one.shared_memory)
            print(one.case, one.target, one.kernel, *numbers, one.matrix, *over_budget(one), sep=" | ", flush=True)
    compiled = distinct(compiled)
    if arguments.write:
        facts = environment(torch.device("cpu")) | {"triton": version("triton")}
        # What differs from run to run stays out.
        data = {"kernels": [asdict(one, dict_factory=_lasting) for one in compiled]}
        write("aot", "Ahead-of-time compilation", facts, tables(compiled, arguments.targets), data)
    print(json.dumps([asdict(one) for one in compiled]))
    return int(any(map(over_budget, compiled)))


if __name__ == "__main__":
    sys.exit(main())
