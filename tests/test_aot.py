"""Budgets of every kernel: what the compiler reports for GPUs that need not be here. `make aot` holds all cases."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec

import pytest

from mtpkern.bench import aot, aot_budgets
from mtpkern.bench.report import RESULTS
from support.processes import forks_of

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")

# One case of every kernel. A tile of 64 rows is what 15 rows of 4 heads fill.
KERNELS = {
    "decode_attention bf16 D128 k8 one split": ["_attend_kernel"],
    "decode_attention bf16 D128 k8 batch-invariant": ["_attend_kernel", "_merge_kernel"],
    "advance B16 k8 verified": ["_advance_kernel"],
    "readout bf16 V151936": ["_chunk_kernel", "_merge_kernel"],
    "kv_write bf16 D128": ["_kv_write_kernel"],
    "gated_lora bf16 r32": ["_shrink_kernel", "_expand_kernel"],
    "gated_expand bf16 r32": ["_expand_kernel"],
    "linear bf16 2560x9728, 16 rows": ["_linear_kernel"],
    "span_attention bf16 D128": ["_forward_kernel", "_dq_kernel", "_row_tiles_kernel", "_dkdv_kernel"],
    "distill bf16 V144": ["_readout_kernel", "_loss_kernel", "_loss_kernel"],
}
# Of those that follow, whose tiles have 16 or 32 rows.
TOO_FEW_FOR_WGMMA = ("decode_attention bf16 D128 k1", "gated_lora bf16 r32", "gated_expand bf16 r32")
# Where tiles differ from the others', and what compiled nowhere before it stood here.
MORE = {
    "sm_80": ["decode_attention fp32 D256 k8"],
    "sm_90": ["decode_attention bf16 D128 k1", "decode_attention bf16 D256 k16", "distill bf16 V144 softcap"],
}


Run = Callable[..., str]


@pytest.fixture(scope="module")
def without_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`without_interpreter(code, *arguments)`: what a program prints where Triton compiles, whatever was compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    environment["PYTHONWARNINGS"] = "ignore"  # Triton 3.9's that products and sums may go apart in a later one
    with forks_of("mtpkern.bench.aot", environment=environment) as run:

        def printed(code: str, *arguments: str) -> str:
            status, text = run(code, *arguments)
            assert status == 0, text[-4000:]
            return text

        yield printed


COMPILE = """
import json, sys
from dataclasses import asdict
from mtpkern.bench.aot import compile_all
target, *cases = sys.argv[1:]
print(json.dumps([[asdict(one) for one in kernels] for kernels in compile_all(cases, [target])]))
"""


@pytest.mark.slow("aot::test_the_command_says_what_is_over_budget_and_writes_nothing_unasked")
@pytest.mark.parametrize("target", aot_budgets.TARGETS)
def test_budgets(target: str, without_interpreter: Run) -> None:
    cases = [*KERNELS, *MORE.get(target, ())]
    if target in ("sm_89", "sm_100"):  # the most expensive one, and tiled as elsewhere
        cases.remove("span_attention bf16 D128")
    compiled = {
        case: [aot_budgets.Compiled(**one) for one in kernels]
        for case, kernels in zip(cases, json.loads(without_interpreter(COMPILE, target, *cases)))
    }
    for case, kernels in compiled.items():
        if case in KERNELS:
            before = ["_kv_write_kernel"] if target == "gfx942" and case.startswith("decode_attention") else []
            assert [one.kernel for one in kernels] == before + KERNELS[case]
        for one in kernels:
            assert not aot_budgets.over_budget(one), one
            assert one.registers > 0
            step = not one.case.startswith(("span_attention", "distill"))
            assert one.early == ("waits" if step and target in ("sm_90", "sm_100") else ""), one
    if target == "sm_90":
        products = {one.case: one.matrix for kernels in compiled.values() for one in kernels if one.rows}
        # 16 and 32 rows are too few for wgmma.
        assert {products.pop(few) for few in TOO_FEW_FOR_WGMMA} == {"mma.sync"}
        assert set(products.values()) == {"wgmma"}


def test_narrow_reads_are_counted() -> None:
    """As PTX has them; neither vectors nor copies of sixteen bytes."""
    wide = """
    ld.global.b64 { %rd1 }, [ %rd2 + 0 ];
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
    ld.global.v8.b16 { %rs1, %rs2 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
    """
    narrow = """
    @%p2 ld.global.b16 { %rs1 }, [ %rd5 + 2 ];
    ld.global.L1::evict_first.b16 { %rs2 }, [ %rd5 + 4 ];
    cp.async.ca.shared.global [ %r7 + 0 ], [ %rd6 + 0 ], 0x4, %r8;
    cp.async.ca.shared.global [ %r7 + 8 ], [ %rd6 + 8 ], 8, %r8;
    """
    assert aot._narrow(wide) == 0
    assert aot._narrow(wide + narrow) == 4


def test_a_budget_that_is_exceeded_is_named() -> None:
    good = aot_budgets.Compiled(
        case="readout bf16 V151936",
        target="sm_90",
        kernel="_chunk_kernel",
        rows=0,
        bits=0,
        num_warps=4,
        num_stages=3,
        registers=80,
        spill=0,
        shared_memory=16,
        matrix="none",
        atomics=False,
        source="",
    )
    assert not aot_budgets.over_budget(good)
    assert not aot_budgets.over_budget(replace(good, early="waits"))
    product = replace(good, rows=64, bits=16, matrix="wgmma")
    assert not aot_budgets.over_budget(product)
    assert not aot_budgets.over_budget(replace(product, bits=32, matrix="mma.sync"))
    for bad, word in (
        (replace(good, spill=8), "spills 8"),
        (replace(good, shared_memory=(227 << 10) + 1), "shared memory"),
        (replace(good, target="gfx942", shared_memory=(64 << 10) + 1), "shared memory"),
        (replace(product, matrix="mma.sync"), "not wgmma"),
        (replace(product, target="sm_80", matrix="none"), "without matrix instructions"),
        (replace(good, atomics=True), "atomics"),
        (replace(good, early="races"), "may start early"),
        (replace(good, kernel="_attend_kernel", narrow=9), "narrow reads"),
    ):
        assert sum(word in fault for fault in aot_budgets.over_budget(bad)) == 1, bad
    for (case, kernel), spill in aot_budgets.SPILL.items():
        for target, allowed in ((target, aot_budgets.of_this_version(budget)) for target, budget in spill.items()):
            one = replace(good, case=case, kernel=kernel, target=target, spill=allowed)
            assert not aot_budgets.over_budget(one)
            assert aot_budgets.over_budget(replace(one, spill=allowed + 1))
    # A budget for a case that is no more would hold nothing.
    assert all(any(name.startswith(case) for name in aot.CASES) for case, _ in aot_budgets.SPILL)


COMMAND = """
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from mtpkern.bench import aot, aot_budgets
from mtpkern.kernels.kv_write import _kv_write_kernel

good = aot_budgets.TARGETS["sm_90"]
aot.write = None  # a call that nobody asked for would fail

def run(*arguments, room=good.shared_memory):
    print(f"--- {arguments[6:]} {room}")
    aot_budgets.TARGETS["sm_90"] = replace(good, shared_memory=room)
    sys.argv = ["aot", *arguments]
    print(aot.main())

what = "--cases", "kv_write bf16 D64", "--targets", "sm_90", "--jobs", "1"
run(*what)
run(*what, room=-1)
before = aot.compile_case("kv_write bf16 D64", "sm_90")
_kv_write_kernel.device_caches.clear()
aot._noted = None  # from here on nothing is compiled
aot.committed = lambda: {one.source: replace(one, spill=24) for one in before}
run(*what, "--changed")
aot.committed = lambda: {one.source: one for one in before}
run(*what, "--changed")
"""

LACKING = """
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from mtpkern.bench import aot, aot_budgets

(one,) = aot.compile_case("kv_write bf16 D64", "sm_90")
aot.committed = lambda: {"other": replace(one, source="other")}
sys.argv = ["aot", "--cases", "kv_write bf16 D64", "--targets", "sm_90", "--jobs", "1", "--changed"]
print(aot.main())
"""


def test_the_command_says_what_is_over_budget_and_writes_nothing_unasked(without_interpreter: Run) -> None:
    runs = [text.splitlines()[1:] for text in without_interpreter(COMMAND).split("--- ")[1:]]
    good, planted, known_to_spill, known = runs
    for lines in (good, known):
        assert len(lines) == 2, lines
        assert lines[0].startswith("1 kernels of 1 cases for sm_90, triton ")
        assert ": all within budget" in lines[0]
        assert lines[1] == "0"
    for lines, fault in ((planted, "takes 0 bytes of shared memory of -1"), (known_to_spill, "spills 24 bytes")):
        assert len(lines) == 3, lines
        assert lines[0].startswith(f"kv_write bf16 D64, _kv_write_kernel, sm_90: {fault}")
        assert all(word in lines[0] for word in ("4 warps", "registers", "bytes spilled", "of shared memory"))
        assert ": 1 over budget" in lines[1]
        assert lines[2] == "1"


def test_a_kernel_that_the_table_lacks_is_compiled_and_named(without_interpreter: Run) -> None:
    summary, lacking, status = without_interpreter(LACKING).splitlines()
    assert ": all within budget" in summary
    assert lacking.startswith("bench/results/aot.md lacks 1 of these and has 0 others: make aot")
    assert status == "1"


def test_a_case_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Also beside one that there is."""
    monkeypatch.setattr(sys, "argv", ["aot", "--cases", "readout", "raedout"])
    with pytest.raises(SystemExit):
        aot.main()
    assert "no case begins with raedout; there are: kv_write" in capsys.readouterr().err


def test_a_part_is_not_written_over_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", "--write", "--targets", "sm_90"])
    with pytest.raises(SystemExit) as exit:
        aot.main()
    assert exit.value.code == 2
    assert "--write keeps the table of every case and target" in capsys.readouterr().err


def test_the_committed_table_agrees_with_the_budgets() -> None:
    """That it is of today's kernels, `make aot AOT_ARGS=--changed` holds, which compiles what the table lacks."""
    record = json.loads((RESULTS / "aot.json").read_text(encoding="utf-8"))
    compiled = [aot_budgets.Compiled(**one) for one in record["kernels"]]
    page = (RESULTS / "aot.md").read_text(encoding="utf-8")
    assert f"- triton: {record['environment']['triton']}" in page
    assert {one.case for one in compiled} <= set(aot.CASES)
    for case, kernels in KERNELS.items():
        op = case.split()[0]
        for target in aot_budgets.TARGETS:
            named = {one.kernel for one in compiled if one.case.split()[0] == op and one.target == target}
            assert named >= set(kernels), (op, target)
    # Another version's budgets would mark other cells.
    if record["environment"]["triton"] == version("triton"):
        for table in aot.tables(compiled, list(aot_budgets.TARGETS)):
            assert table.markdown() in page
        assert not [fault for one in compiled for fault in aot_budgets.over_budget(one)]
        for (case, kernel), spill in aot_budgets.SPILL.items():
            for target, budget in spill.items():
                found = [
                    one.spill
                    for one in compiled
                    if one.case.startswith(case) and one.kernel == kernel and one.target == target
                ]
                # A case whose kernel is that of an earlier one is not in the table.
                assert not found or max(found) >= aot_budgets.of_this_version(budget), (case, kernel, target)


PLANTED = """
import sys, tempfile, importlib.util, pathlib
import torch
from mtpkern.bench import aot, aot_budgets
source = '''
import triton, triton.language as tl
@triton.jit
def _merge_kernel(x_ptr, count_ptr, y_ptr, N: tl.constexpr, BARRIER: tl.constexpr):
    o = tl.arange(0, 128)
    tl.store(y_ptr + o, tl.load(x_ptr + o))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1) == N - 1:
        tl.store(y_ptr, tl.sum(tl.load(y_ptr + o), 0))
@triton.jit
def early(x_ptr, y_ptr, FORM: tl.constexpr):
    o = tl.arange(0, 128)
    if FORM == "a program that returns":
        if tl.program_id(0) == 1:
            return
    if FORM == "a load":
        x = tl.load(x_ptr + o)
    if FORM == "a trigger":
        tl.extra.cuda.gdc_launch_dependents()
    if FORM != "no wait":
        tl.extra.cuda.gdc_wait()
    if FORM != "a load":
        x = tl.load(x_ptr + o)
    tl.store(y_ptr + o, x)
'''
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "planted.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    for target in ("sm_90", "gfx942"):
        with aot.compiling(target) as noted:
            for barrier in (False, True):
                x, count = torch.ones(128), torch.zeros(1, dtype=torch.int32)
                planted._merge_kernel[(4,)](x, count, torch.ones(128), N=4, BARRIER=barrier)
        print(*map(aot_budgets.over_budget, noted))
    with aot.compiling("sm_90") as noted:
        for form in ("the wait first", "no wait", "a load", "a trigger", "a program that returns"):
            planted.early[(4,)](torch.ones(128), torch.ones(128), FORM=form, launch_pdl=True)
    print([one.early for one in noted])
"""


def test_races_that_no_interpreter_sees_are_found(without_interpreter: Run) -> None:
    """A last block that merges needs a counter, and that an atomic: none of ours may have one without a barrier before
    it. And what starts early has to wait before all else, in every program.
    """
    *merged, early = without_interpreter(PLANTED).splitlines()
    # Triton 3.9 puts a barrier before every atomic by itself.
    has_own = tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
    assert merged == ["[] []" if has_own else "['has atomics'] []"] * 2
    assert early == str(["waits", "races", "races", "races", "races"])


VARIANTS = """
from unittest.mock import patch
import torch
from triton.runtime import JITFunction
from mtpkern.bench import aot, aot_budgets
from mtpkern.kernels.decode_attention import decode_attention_triton
from mtpkern.kernels.readout import readout_triton
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention_triton
from mtpkern.kernels.span_mask import Rule

keys = set()
def note(self, key, signature, device, constexprs, options, attrs, warmup):
    keys.add((self.fn.__name__, key))

with aot.compiling("sm_90"), patch.object(JITFunction, "_do_compile", note):
    for i in range(50):
        B, C, rows = 1 + i % 7, 100 + 13 * i, 15
        cache = torch.empty(B, 2, C + 1, 64)
        index, start = torch.zeros(B * rows - i % 5, dtype=torch.int64), torch.zeros(B + 1, dtype=torch.int64)
        decode_attention_triton(
            *(torch.empty(len(index), heads, 64) for heads in (8, 2, 2)), cache, cache,
            PackedRows(index, index, start, rows), Scoring(0.125 + i, 5 + i, 20.0 + i), splits=2 + i % 9,
        )
        readout_triton(torch.empty(1 + i, 4096), 7 + i)
    for i in range(50):
        B, T = 1 + i % 4, (1 if i == 0 else 16 * i if i % 3 else 37 * i + 1)
        q, k = (torch.empty(B, T, h, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in (8, 2))
        rule = Rule(*[torch.zeros(B, T, dtype=torch.int32)] * 3)
        span_attention_triton(q, k, k, rule, Scoring(0.1, None if i % 2 else 1 + 5 * i)).sum().backward()
print(*sorted(name for name, _ in keys))
"""


def test_variants_do_not_grow_with_shapes(without_interpreter: Run) -> None:
    """50 shapes of batch, rows, capacity and vocabulary compile few variants: none may compile within a decode."""
    names = without_interpreter(VARIANTS).split()
    spans = ("_forward_kernel", "_dq_kernel", "_dkdv_kernel")
    # One each: row strides are multiples of the head dimension, so that all shapes are equally aligned.
    assert [names.count(name) for name in spans] == [1, 1, 1]
    assert len(names) - len(spans) - names.count("_row_tiles_kernel") <= 8, names


WIDE = """
import re
from mtpkern.bench import aot, aot_budgets

texts = []
noted = aot._noted

def note(target, name, rows, bits, kernel, seconds):
    texts.append(kernel.asm["ptx"])
    return noted(target, name, rows, bits, kernel, seconds)

aot._noted = note
aot.compile_case("distill bf16 V129", "sm_90")
print([len(re.findall(r"(?:ld|st)[.]global[.]b16", text)) for text in texts])
"""


@pytest.mark.slow("aot::test_variants_do_not_grow_with_shapes")
def test_an_odd_vocabulary_is_read_16_bytes_at_a_time(without_interpreter: Run) -> None:
    """Llama's with a mask token is odd. Only a row's weight and its target's logit are 2 bytes wide."""
    assert json.loads(without_interpreter(WIDE)) == [0, 2, 1]
