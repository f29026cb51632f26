"""Span attention and the fused head compiled ahead of time for four targets, and what they may cost.

The launchers themselves run, on CPU tensors and under a driver that knows a target but has no device: each launch
compiles exactly the kernel that it would start, and starts nothing. `python tests/test_aot_span.py` prints the table
of every target and head dimension.
"""

# mypy: disable-error-code="no-untyped-def"

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# What Triton calls each, and the shared memory of a program in bytes.
TARGETS = {
    "sm_80": (("cuda", 80, 32), 166912),
    "sm_90": (("cuda", 90, 32), 232448),
    "sm_100": (("cuda", 100, 32), 232448),
    "gfx942": (("hip", "gfx942", 64), 65536),
}
DIMS = (64, 96, 128, 256)
# Bytes a thread may spill, by target: forward, dq, dk and dv at D = 128. On sm_90 the machine code of unmasked tiles
# reads what is spilled, 13 words at most, and writes none of it: constants of the loop, never its sums.
KERNELS = ("_forward_kernel", "_dq_kernel", "_dkdv_kernel")
SPILL = {"sm_80": (64, 88, 48), "sm_90": (0, 24, 104), "sm_100": (0, 0, 0), "gfx942": (0, 0, 0)}


def use_target(target):
    """Have Triton compile for a target whose device is nowhere."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget(*TARGETS[target][0])

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    triton.runtime.driver.set_active(Driver())


def compile_all(target, dims):
    """Compile the kernels for a target and yield a row of the table for each."""
    import triton
    from triton.runtime.jit import JITFunction

    from mtpkern.kernels import span_attention as attention
    from mtpkern.kernels.distill import Head, distill_loss_triton, head_readout_triton

    use_target(target)
    attention._shared_memory = lambda device: TARGETS[target][1]
    torch.version.hip = "6" if target.startswith("gfx") else None
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def drain(**case):
        while compiled:
            name, kernel = compiled.pop(0)
            yield {"target": target, **case, "kernel": name, "shared": kernel.metadata.shared, **costs(kernel, tools)}

    for dim in dims:
        q, k = (torch.empty(1, 160, h, dim, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in (8, 2))
        rule = [torch.zeros(1, 160, dtype=torch.int32)] * 3
        attention.span_attention_triton(q, k, k, *rule, scale=0.1).sum().backward()
        yield from drain(D=dim)
    hidden = torch.empty(32, 16, dtype=torch.bfloat16).requires_grad_()
    head = Head(torch.empty(129, 16, dtype=torch.bfloat16), banned=128)
    head_readout_triton(hidden, head)
    distill_loss_triton(hidden, head, target=torch.zeros(32, dtype=torch.int64))
    distill_loss_triton(hidden, head, teacher=(hidden.detach(), head))
    yield from drain()


def costs(kernel, tools):
    """Registers and spilled bytes of a thread, matrix instructions, atomics."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        matrix, atomics = text.count("v_mfma"), len(re.findall(r"_atomic_", text))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, spilled = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        text = kernel.asm["ptx"]
        matrix = len(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", text))
        atomics = len(re.findall(r"\b(?:atom|red)\.global", text))
    return {"registers": registers, "spilled": spilled, "matrix": matrix, "atomics": atomics}


def count_variants():
    """Compiled variants of each kernel over 50 shapes: lengths, batch sizes, offsets, k, windows, one model."""
    from triton.runtime.jit import JITFunction

    from mtpkern.kernels import span_attention as attention

    use_target("sm_90")
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: run(self, *args, grid=grid, warmup=True, **options)
    # The key of the cache of compiled kernels decides; what it would hold need not be built.
    JITFunction._do_compile = lambda self, key, signature, device, *rest: self.device_caches[device][0].setdefault(
        key, self
    )
    for i in range(50):
        batch, rows = 1 + i % 4, (1 if i == 0 else 16 * i if i % 3 else 37 * i + 1)
        q, k = (torch.empty(batch, rows, h, 64, dtype=torch.bfloat16).transpose(1, 2) for h in (8, 2))
        q.requires_grad_()
        rule = [torch.zeros(batch, rows, dtype=torch.int32)] * 3
        window = None if i % 2 else 1 + 5 * i
        attention.span_attention_triton(q, k, k, *rule, scale=0.1, window=window).sum().backward()
    kernels = (f for f in vars(attention).values() if isinstance(f, JITFunction))
    return {f.__name__: len(f.device_caches[0][0]) for f in kernels if 0 in f.device_caches}


def elsewhere(*arguments):
    """This file as a program, because here Triton interprets: the JSON lines that it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_budgets(target):
    pytest.importorskip("triton")
    rows = elsewhere(target, "128")
    assert [row["kernel"] for row in rows if "D" in row] == [
        "_forward_kernel",
        "_dq_kernel",
        "_row_tiles_kernel",
        "_dkdv_kernel",
    ]
    for row in rows:
        assert row["shared"] <= TARGETS[target][1], row
        assert row["atomics"] == 0, row
        assert (row["matrix"] > 0) == (row["kernel"] in KERNELS), row
        allowed = dict(zip(KERNELS, SPILL[target]))
        assert row["spilled"] <= allowed.get(row["kernel"], 0), row


def test_lengths_and_windows_compile_nothing_new():
    pytest.importorskip("triton")
    (variants,) = elsewhere("variants")
    assert set(variants) >= set(KERNELS)
    # One, and those whose row strides Triton tells apart: none, as a head dimension of 64 divides them all by 16.
    assert all(n == 1 for n in variants.values()), variants


if __name__ == "__main__":
    if sys.argv[1:] == ["variants"]:
        print(json.dumps(count_variants()))
    elif len(sys.argv) > 1:
        for row in compile_all(sys.argv[1], [int(dim) for dim in sys.argv[2:]]):
            print(json.dumps(row), flush=True)
    else:
        for target in TARGETS:
            for row in elsewhere(target, *map(str, DIMS)):
                print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
