"""What a compiled kernel may take: the GPUs that mtpkern.bench.aot compiles for, and the budgets there."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, its processors and the bytes of shared memory that a program may take."""

    backend: str
    arch: int | str
    warp_size: int
    processors: int
    shared_memory: int

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel may start before the one ahead of it ends: from Hopper on (kernels/form.py)."""
        return self.backend == "cuda" and int(self.arch) >= 90


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
    atomics: bool  # but a count behind a barrier behind all stores
    source: str  # a digest of what it was compiled from: source, constants, options, version of Triton
    early: str = ""  # a launch that may start before the kernel ahead has ended "waits" for that, or "races"
    narrow: int = 0  # reads of two bytes, and copies of less than sixteen
    seconds: float = 0.0


# Bytes a thread that may be spilled, on Triton 3.6, on 3.7 and on 3.9, by kernel, target and the beginning of the case;
# elsewhere none. From equal tiles the versions' compilers come to different code, by tens of bytes either way.
VERSIONS = (3, 7), (3, 9)
_SPILL = """
# kernel sm_80       sm_89       sm_90       sm_100      gfx942      case
# One launch a step, of one program; many sequences at once leave few registers a thread.
advance  200/0/24    184/0/152   160/0/192   144/0/200   .           advance B128 k8 verified
advance  120/104/88  16/32/0     16/24/0     16/32/0     .           advance B1024 k16 verified
advance  8/0/0       .           0/8/0       .           .           advance B1 k4 verified, masks
advance  24/0/0      .           .           8/0/0       .           advance B1 k12 verified, 22 masks
advance  .           8/0/8       0/0/8       0/0/8       .           advance B16 k8 verified
advance  0/8/0       0/8/8       0/8/8       0/8/8       .           advance B16 k8 verified, masks
advance  .           8/0/0       .           .           .           advance B16 k8 unverified
advance  .           .           0/0/8       .           .           advance B1 k8 unverified
# Two numbers put away before its loop and fetched behind it.
attend   .           .           8/8/0       .           .           decode_attention bf16 D128 k16
# What one version's compiler alone puts on a stack.
attend   .           .           0/0/16      8/0/0       .           decode_attention bf16 D128 k12
attend   .           .           .           8/0/0       .           decode_attention bf16 D256 k8
attend   .           .           .           8/0/0       .           decode_attention fp16 D256 k8
attend   24/0/0      40/0/0      .           .           .           decode_attention bf16 D256 k16
# Ampere's and Ada's products take both factors from registers, Hopper's from shared memory: the tiles are Hopper's,
# whose 64 keys wgmma wants. In dQ before and behind its loops but for 9 of 540 instructions. On sm_100 its sums lie in
# tensor memory and a thread is given 128 registers: 3.6 keeps 14 of its numbers elsewhere.
forward  16/16/88    40/40/48    .           .           .           span_attention bf16 D80
forward  16/16/88    40/40/48    .           .           .           span_attention bf16 D96
forward  120/56/96   72/72/72    .           .           .           span_attention bf16 D128
forward  120/56/96   72/72/72    .           .           .           span_attention fp16 D128
dq       64/48/40    .           16/8/0      56/0/0      .           span_attention bf16 D80
dq       64/48/40    .           16/8/0      56/0/0      .           span_attention bf16 D96
dq       88/80/72    .           .           56/0/0      .           span_attention bf16 D128
dq       88/80/72    .           .           56/0/0      .           span_attention fp16 D128
dkdv     24/16/16    16/16/16    .           .           .           span_attention bf16 D80
dkdv     24/16/16    16/16/16    .           .           .           span_attention bf16 D96
dkdv     40/16/16    24/0/0      .           .           .           span_attention bf16 D128
dkdv     40/16/16    24/0/0      .           .           .           span_attention fp16 D128
forward  .           .           .           8/8/0       .           span_attention bf16 D64
forward  32/0/0      40/0/0      0/0/144     .           .           span_attention bf16 D256
# The slope of the soft cap takes registers: without a cap 8, and 160 in dK and dV. Fewer stages or more rows a tile
# spill four times as much.
dq       .           .           16/16/208   .           .           span_attention bf16 D256
dkdv     8/8/8       .           216/168/248 .           92/16/0     span_attention bf16 D256
dq       .           .           56/48/232   24/0/0      .           span_attention bf16 D256 softcap
dkdv     32/24/24    16/8/8      232/200/264 .           148/0/0     span_attention bf16 D256 softcap
# Exact products without tensor cores hold a row and a column of 256 in registers, whatever the tile: half the warps
# or twice the rows spill ten times that.
forward  .           .           .           8/0/0       .           span_attention fp32 D64
dkdv     0/0/8       .           .           .           .           span_attention fp32 D64
dq       320/280/208 272/240/184 280/280/240 288/328/248 .           span_attention fp32 D256
# Of 3.9's compiler alone.
shrink   .           .           0/0/8       .           .           gated_lora bf16 r12, odd widths
expand   .           0/0/8       .           .           .           gated_lora bf16 r32, 8,192 rows
"""
SPILL: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    (case, f"_{kernel}_kernel"): {
        target: tuple(map(int, cell.split("/"))) for target, cell in zip(TARGETS, cells) if cell != "."
    }
    for kernel, *cells, case in (
        line.split(maxsplit=1 + len(TARGETS)) for line in _SPILL.strip().splitlines() if not line.startswith("#")
    )
}


def of_this_version(budget: tuple[int, ...]) -> int:
    """A budget of SPILL for the installed Triton."""
    installed = tuple(map(int, version("triton").split(".")[:2]))
    return budget[sum(installed >= since for since in VERSIONS)]


def over_budget(one: Compiled) -> list[str]:
    """What a kernel takes that it must not: spill, shared memory, slow products, atomics. Empty is good."""
    budgets = {
        case: spill[one.target]
        for (case, kernel), spill in SPILL.items()
        if one.case.startswith(case) and one.kernel == kernel and one.target in spill
    }
    # Of several the one that says most of the case.
    allowed = of_this_version(budgets[max(budgets, key=len)]) if budgets else 0
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
    # Without a barrier the block that counts itself last may merge what is not stored yet, a race that no interpreter
    # sees. Sums by atomics would differ from run to run.
    if one.atomics:
        faults.append("has atomics")
    # Keys and values come one element at a time, and none ahead of its product, where the compiler does not know that
    # they are aligned. Sinks are a few.
    if one.kernel == "_attend_kernel" and one.narrow > 8:
        faults.append(f"has {one.narrow} narrow reads of keys and values")
    # No interpreter sees this race either.
    if one.early == "races":
        faults.append("may start early and does not wait for the kernel ahead before all else")
    return faults
