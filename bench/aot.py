"""What the compiler makes of every kernel of ours, for GPUs that need not be there.

    python -m mtpkern.bench.aot                                             every case for every target
    python -m mtpkern.bench.aot --targets sm_90 --cases readout --verbose   some of them, a line a kernel
    python -m mtpkern.bench.aot --write                                     and keep the table in bench/results/

The launchers run as they do in use, but on CPU tensors: Triton compiles what they launch, with their own tile sizes
and specialised on their own arguments, and nothing is launched. Registers, spill and shared memory are what ptxas and
the AMD compiler report. Every kernel has a budget (bench/aot_budgets.py), by version of Triton where they differ; what
exceeds one, or may start early without waiting, is printed, and the exit status is 1. Triton keeps what it compiled, so
a second run takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from itertools import product, starmap
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from mtpkern.bench.aot_budgets import TARGETS, Compiled, over_budget
from mtpkern.bench.aot_cases import CASES
from mtpkern.bench.report import RESULTS, Table, environment, write
from mtpkern.cli import positive
from mtpkern.kernels import decode_attention, form, span_attention
from mtpkern.output import exit_status

# The rows of a kernel's matrix products, by the name of its launch option.
_MATRIX_ROWS = {"_shrink_kernel": "BLOCK_R", "_expand_kernel": "BLOCK_R", "_linear_kernel": "BLOCK_N"}
_MATRIX_ROWS |= {"_attend_kernel": "BLOCK_M", "_forward_kernel": "ROWS", "_dq_kernel": "ROWS", "_dkdv_kernel": "KEYS"}


@contextmanager
def compiling(target: str, known: Mapping[str, Compiled] = MappingProxyType({})) -> Iterator[list[Compiled]]:
    """Inside, a launch compiles for the target instead of running, and is noted in the list that this yields.

    What is known by its `source` is noted without being compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction, driver

    facts = TARGETS[target]
    noted: list[Compiled] = []
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def compile_what_is_new(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        built_with = {name: x for name, x in vars(options).items() if name != "extern_libs"}  # where they lie on disk
        source = ASTSource(self, signature, constants, attrs).hash()
        what = source, target, sorted(built_with.items()), version("triton")
        source = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
        if source in known:
            return known[source]
        kernel = do_compile(self, key, signature, device, constants, options, attrs, warmup)
        if kernel is not None:
            kernel.source = source
        return kernel

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if isinstance(kernel, Compiled):
            noted.append(kernel)
        elif kernel is not None:
            name = self.fn.__name__
            rows = options.get(_MATRIX_ROWS.get(name, ""), 0)
            first = args[0][0] if isinstance(args[0], tuple) else args[0]
            bits = 8 * first.element_size() if rows else 0
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
            (JITFunction, "_do_compile", compile_what_is_new),
            # Triton digests it too: a line more above a kernel would make it another.
            (JITFunction, "starting_line_number", property(lambda self: 1, lambda self, line: None)),
            (driver, "_active", stand_in),
            (decode_attention, "_machine", lambda device: (facts.processors, facts.shared_memory)),
            (span_attention, "_shared_memory", lambda device: facts.shared_memory),
            (form, "_has_pdl", lambda device: facts.has_pdl),
            (torch.version, "hip", "7.0" if facts.backend == "hip" else None),
        ):
            stack.enter_context(patch.object(place, name, value, create=name == "starting_line_number"))
        yield noted


def compile_case(case: str, target: str, changed: bool = False) -> list[Compiled]:
    """The kernels that a case launches, compiled: `compile_case("kv_write fp32 D128", "sm_90")[0].registers`.

    changed takes those that are as they were from the table in bench/results.
    """
    with compiling(target, committed() if changed else {}) as noted:
        CASES[case]()
    return [replace(one, case=case) for one in noted]


@cache
def committed() -> dict[str, Compiled]:
    """What the table in bench/results holds, by source; nothing of another version of Triton."""
    record = json.loads((RESULTS / "aot.json").read_text(encoding="utf-8"))
    if record["environment"]["triton"] != version("triton"):
        return {}
    return {one["source"]: Compiled(**one) for one in record["kernels"]}


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
    meta = kernel.metadata
    used, spilled = (int(re.findall(pattern, report)[-1]) for pattern in (registers, spill))
    sizes = meta.num_warps, meta.num_stages, used, spilled, meta.shared
    matrix = next((name for name, instruction in names.items() if instruction in text), "none")
    early = _early(text) if getattr(meta, "launch_pdl", False) else ""
    facts = matrix, _unordered(text), kernel.source, early
    return Compiled("", target, name, rows, bits, *sizes, *facts, narrow=_narrow(text), seconds=seconds)


def _unordered(text: str) -> bool:
    """Whether there are atomics but a count behind a barrier behind the stores: all threads' come before it."""
    stores = r"st\.global|global_store|buffer_store"
    barrier, atomic = r"bar(?:rier)?\.sync|s_barrier", r"atom\.|red\.|\S*_atomic_"
    what = rf"^\s*(?:@\S+\s+)?(?:(?P<store>{stores})|(?P<barrier>{barrier})|(?P<atomic>{atomic}))"
    stored = True
    for found in re.finditer(what, text, re.MULTILINE):
        if found["atomic"] and stored:
            return True
        stored = not found["barrier"]
    return False


def _narrow(text: str) -> int:
    """Reads of two bytes, and asynchronous copies of less than sixteen: what PTX has where alignment is not known."""
    read = r"ld\.global(?:\.(?!v\d)[\w:]+)*\.[bfus]16\s"
    return len(re.findall(rf"{read}|cp\.async\.c[ag]\S*\s+[^;]*, (?:0x)?[48],", text))


def _early(ptx: str) -> str:
    """Whether a kernel waits for the one ahead of it before it touches memory, branches or lets the next one start."""
    wait, *others = (
        re.search(rf"^\s*(?:@\S+\s+)?(?:{what})\b", ptx[ptx.index(".entry") :], re.MULTILINE)
        for what in ("griddepcontrol.wait", "griddepcontrol.launch_dependents", r"\S+\.global\S*", "bra|ret")
    )
    first = wait is not None and all(other is None or wait.start() < other.start() for other in others)
    return "waits" if first else "races"


def compile_all(
    cases: Sequence[str], targets: Sequence[str], jobs: int = 1, changed: bool = False
) -> Iterator[list[Compiled]]:
    """Each case for each target, in this order, `jobs` at a time; see compile_case."""
    pairs = list(product(cases, targets, [changed]))
    if jobs == 1:
        yield from starmap(compile_case, pairs)
        return
    # Forked, so that torch and Triton are imported once; nothing here has started a thread. An interrupt ends the
    # others at once, without a traceback each.
    end, by = signal.signal, (signal.SIGINT, signal.SIG_DFL)
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("fork"), initializer=end, initargs=by)
    try:
        for future in [pool.submit(compile_case, *pair) for pair in pairs]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def distinct(compiled: Iterable[Compiled]) -> list[Compiled]:
    """Without those that an earlier case has for the same target already."""
    first: dict[str, Compiled] = {}
    for one in compiled:
        first.setdefault(one.source, one)
    return list(first.values())


def tables(compiled: Sequence[Compiled], targets: Sequence[str]) -> list[Table]:
    """A table for each op: a row for each case and kernel, a column for each target."""
    rows: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for one in compiled:
        op, _, rest = one.case.partition(" ")
        row = rest, one.kernel.strip("_").removesuffix("_kernel")
        cells = rows.setdefault(op, {}).setdefault(row, dict.fromkeys(targets, ""))
        cells[one.target] = (
            f"{one.registers}/{one.spill}/{one.shared_memory / 1024:.0f}"
            + f" {one.matrix}" * (one.matrix != "none")
            + " **over**" * bool(over_budget(one))
        )
    note = (
        "Registers a thread / spilled bytes a thread / KiB of shared memory, instruction of matrix products; nothing "
        "where an earlier row has the same kernel."
    )
    lines = {op: [[*row, *cells.values()] for row, cells in kept.items()] for op, kept in rows.items()}
    return [Table(op, note, ("case", "kernel", *targets), kept) for op, kept in lines.items()]


def fault_line(one: Compiled, fault: str) -> str:
    """Which kernel, for which GPU, in which form, and by how much."""
    form = f"{one.num_warps} warps, {one.num_stages} stages" + f", tile of {one.rows} rows" * bool(one.rows)
    used = f"{one.registers} registers, {one.spill} bytes spilled, {one.shared_memory} bytes of shared memory"
    return f"{one.case}, {one.kernel}, {one.target}: {fault} [{form}; {used}]"


def main() -> int:
    """Compile, print what is over budget as it comes, then one line; 1 where a kernel exceeds its budget."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.aot", description="What the compiler reports.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", default=[""], metavar="NAME", help="beginnings of the names of cases")
    parser.add_argument(
        "--jobs", type=positive, default=len(os.sched_getaffinity(0)), help="processes (default: the cores)"
    )
    parser.add_argument("--changed", action="store_true", help="compile only what the table in bench/results has not")
    parser.add_argument("--write", action="store_true", help="write that table: bench/results/aot.md and aot.json")
    parser.add_argument("--verbose", action="store_true", help="print a line for every kernel")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.startswith(tuple(arguments.cases))]
    unknown = [start for start in arguments.cases if not any(case.startswith(start) for case in CASES)]
    if unknown:
        parser.error(f"no case begins with {' or '.join(unknown)}; there are: {', '.join(CASES)}")
    everything = len(cases) == len(CASES) and set(arguments.targets) == set(TARGETS)
    if arguments.write and not everything:
        parser.error("--write keeps the table of every case and target; leave out --cases and --targets, or --write")

    start = time.perf_counter()
    compiled: list[Compiled] = []
    exceeded = 0
    for kernels in compile_all(cases, arguments.targets, arguments.jobs, arguments.changed):
        for one in kernels:
            compiled.append(one)
            if arguments.verbose:
                numbers = (one.num_warps, one.num_stages, one.registers, one.spill, one.shared_memory)
                print(one.case, one.target, one.kernel, *numbers, one.matrix, f"{one.seconds} s", sep=" | ", flush=True)
            for fault in over_budget(one):
                exceeded += 1
                print(fault_line(one, fault), flush=True)
    different = distinct(compiled)
    if arguments.write:
        facts = environment(torch.device("cpu"))
        # What differs from run to run stays out.
        data = {"kernels": [{x: y for x, y in asdict(one).items() if x != "seconds"} for one in different]}
        print("wrote", write("aot", "Ahead-of-time compilation", facts, tables(different, arguments.targets), data))
    what = f"{len(different)} kernels of {len(cases)} cases for {', '.join(arguments.targets)}"
    verdict = f"{exceeded} over budget" if exceeded else "all within budget"
    print(f"{what}, triton {version('triton')}: {verdict}, {time.perf_counter() - start:.0f} s")
    # A table of another version of Triton says nothing here.
    known = committed() if arguments.changed and not arguments.write else {}
    missing = len({one.source for one in different} - set(known)) if known else 0
    left = len(known) - (len(different) - missing) if known and everything else 0
    if missing or left:
        mend = "make aot AOT_ARGS='--changed --write'"
        print(f"bench/results/aot.md lacks {missing} of these and has {left} others: {mend}")
    return int(bool(exceeded or missing or left))


if __name__ == "__main__":
    sys.exit(exit_status(main))
