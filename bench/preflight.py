"""Pre-flight: what a new GPU has to show before its minutes are spent, most of it in about 100 seconds.

    python -m mtpkern.bench.preflight --results preflight.jsonl

    machine     versions; peaks of copy and product, which bench/gpu.py hands on to the benchmarks
    compiled    every kernel family compiled for this GPU, side by side; Triton keeps it for what follows
    kernels     each kernel once at head width 128 in bf16, against its torch form
    checkpoint  the shipped model generates what it does on a CPU: with a graph and without, batch 1 and 3, unwarned;
                and once more by a call that leaves everything at its default
    passes      Qwen3-4B with random weights, batch 1: a pass, its share of the peak, and its body by rows; its graph,
                kernels by name
    layers      the same passes with each decoder layer compiled, attention kept out

Each step ends with a line of JSON, printed and written at once. A step that fails says so and the next one runs; but
where a kernel is wrong all ends there, with the exit status 3: no time of a wrong result is worth having. On a CPU
everything runs with tiny shapes, to rehearse.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpkern.attention import attention_context
from mtpkern.bench import decode_attention, distill, gated_lora, readout, span_attention, step
from mtpkern.bench.models import build, compiling
from mtpkern.bench.report import environment
from mtpkern.bench.timing import Action, difference, free, kernels_by_name, launches, peak, reason, share_of_peak, timed
from mtpkern.compare import encode, read_problems
from mtpkern.demo import ASSETS, load
from mtpkern.generation import generate
from mtpkern.kernels.distill import head_readout
from mtpkern.kernels.head import Head
from mtpkern.kernels.kv_write import kv_write as write
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.state import Sequences
from mtpkern.loading import device_of
from mtpkern.options import strategy_for
from mtpkern.output import exit_status
from mtpkern.strategies import Static, Verified

WRONG = 3
STEPS = ("machine", "compiled", "kernels", "checkpoint", "passes", "layers")
# Beginnings of the names of ahead-of-time cases; a rehearsal takes the last alone.
FAMILIES = (
    *("decode_attention bf16 D128", "span_attention bf16 D128", "distill bf16 V144"),
    *("gated_lora bf16 r32", "gated_expand bf16 r32"),
    *("advance B1 ", "advance B16 ", "readout bf16", "kv_write bf16 D128"),
)
PROCESSES = 12
ATTENTION_REFERENCE, KV_WRITE_REFERENCE = decode_attention.decode_attention.reference, write.reference
MODEL = "Qwen3-4B"
# Of one text, from the most: the first pass makes the caches of all.
ROWS, ROWS_COMPILED = (384, 256, 192, 128, 64, 24, 16, 1), (128, 16, 1)

Facts = dict[str, Any]


class WrongKernelError(Exception):
    """A kernel whose result is not what its torch form computes."""


def machine(device: torch.device) -> Facts:
    """Hardware and versions, and what the device can do at most."""
    return {**environment(device), "peak": asdict(peak(device))}


def target(device: torch.device) -> str:
    """The GPU as ahead-of-time compilation names it: "sm_90"; that one too for a CPU."""
    if device.type == "cuda" and torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return f"sm_{major}{minor}"


def compiled(device: torch.device) -> Facts:
    """Every family by `mtpkern.bench.aot` in a process of its own, which knows nothing of the device."""
    cases = FAMILIES if device.type == "cuda" else FAMILIES[-1:]
    command = [sys.executable, "-m", "mtpkern.bench.aot", "--targets", target(device), "--cases", *cases]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    jobs = str(min(PROCESSES, os.cpu_count() or 1))
    done = subprocess.run([*command, "--jobs", jobs], env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: over budget, which costs speed and nothing else
        raise RuntimeError(f"ahead-of-time compilation ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return {"target": target(device), "said": done.stdout.strip().splitlines()[-1]}


def _require(what: str, found: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 2e-2) -> None:
    """Raise WrongKernelError where an output is off by more than the tolerance, of its greatest magnitude."""
    wrong = difference(list(found), list(right), tolerance)
    if wrong:
        raise WrongKernelError(f"{what}: {wrong}")


def check_decode_attention(device: torch.device) -> None:
    """Split by the rule, in other ways, and batch-invariant; and what it writes, to the bit."""
    small = device.type == "cpu"
    shape = decode_attention.Shape(2, 40, 3, 4, 2, 16) if small else decode_attention.Shape(2, 1500, 23)
    case = decode_attention.Case(shape, device)
    q, key, value, k, v = (x[0].float() for x in (case.q, case.key, case.value, case.k, case.v))
    rows = PackedRows(case.seq, case.slot, case.start, shape.W)
    right = ATTENTION_REFERENCE(q, key, value, k, v, rows, Scoring(shape.D**-0.5))
    caches, here = (case.k[0], case.v[0]), (slice(None), slice(None), slice(shape.L - shape.W, shape.L))
    written = [x[here].clone() for x in caches]
    ways = {"": case.attend(decode_attention.decode_attention)}
    ways[", batch-invariant"] = case.attend(decode_attention.decode_attention, batch_invariant=True)
    for n in () if small else (1, 3):
        ways[f", {n} splits"] = case.attend(decode_attention.decode_attention_triton, splits=n)
    for name, attend in ways.items():
        for x in caches:
            x[here] = torch.nan
        _require(f"decode_attention{name}", [attend(0)], [right])  # type: ignore[list-item]
        _require(f"decode_attention{name}, its caches", [x[here] for x in caches], written, 0.0)


def check_kv_write(device: torch.device) -> None:
    """To the bit."""
    key, value = torch.randn(2, 15, 8, 128, device=device, dtype=torch.bfloat16)
    found, right = (key.new_zeros(2, 1, 8, 65, 128) for _ in range(2))
    place = torch.zeros(15, dtype=torch.int64, device=device), torch.arange(49, 64, device=device)
    write(found[0], found[1], key, value, *place)
    KV_WRITE_REFERENCE(right[0], right[1], key, value, *place)
    _require("kv_write", [found], [right], 0.0)


def check_readout(device: torch.device) -> None:
    """Readout and advance together over five passes: tokens and plans to the bit.

    In float32, where no two logits are the same: of those torch's argmax takes whichever it finds.
    """
    V = 1000 if device.type == "cpu" else readout.V
    ours, torchs = (readout.Taken(3, V, device, ours=ours, dtype=torch.float32) for ours in (True, False))
    _require("readout", ours.readout_(0)[:1], torchs.readout_(0)[:1], 0.0)
    _require("readout, confidence", ours.readout_(0)[1:], torchs.readout_(0)[1:], 1e-3)
    for i in range(5):
        found, right = ((*form.both(i), *_state(form.sequences)) for form in (ours, torchs))
        _require(f"advance, pass {i + 1}", found, right, 0.0)


def _state(sequences: Sequences) -> list[Tensor]:
    """What holds something: the last slot of the tokens takes what is to be thrown away."""
    return [x[:, :-1] if name == "tokens" else x for name, x in vars(sequences).items()]


def check_span_attention(device: torch.device) -> None:
    """Output and gradients."""
    small = device.type == "cpu"
    shape = span_attention.TINY[0] if small else span_attention.Shape(2, 256)
    layout = shape.layout().to(device)
    dtype = torch.float32 if small else torch.bfloat16
    inputs = span_attention.Inputs.draw(shape, layout.position.shape[1], dtype, device)
    way = span_attention.Way(span_attention.with_ours(layout), [inputs])
    wrong = span_attention.disagreement(way.sample(), span_attention.truth(layout, inputs))
    if wrong:
        raise WrongKernelError(f"span_attention: {wrong}")


def check_distill(device: torch.device) -> None:
    """The loss and its gradients with hard and soft targets, and the readout of the head."""
    small = device.type == "cpu"
    shape = (24, 50, 16) if small else (256, distill.VOCABULARY, 1024)
    for soft in (False, True):
        case = distill.Case(*shape, soft, trained=True)
        inputs = distill.Inputs.draw(case, torch.float32 if small else torch.bfloat16, device)
        right = distill.step(partial(distill.all_logits, dtype=torch.float32), inputs)
        _require(f"distill_loss, {'soft' if soft else 'hard'}", distill.step(distill.ours, inputs), right)
    head, hidden = Head(inputs.weight.detach()), inputs.hidden.detach()
    z = head.logits(hidden)
    token, confidence, _ = head_readout(hidden, head)
    # Of equal logits a product in another order may prefer another.
    _require("head_readout", [z.gather(-1, token[:, None])[:, 0]], [z.amax(-1)], 1e-2)
    _require("head_readout, confidence", [confidence], [z.softmax(-1).amax(-1)], 2e-2)


def check_gated_lora(device: torch.device) -> None:
    """In one launch and in two, behind products of few rows and others; ungated rows are the product's to the bit."""
    hidden, widths, rank = (32, (16, 8), 4) if device.type == "cpu" else (2560, (4096, 1024, 1024), gated_lora.RANK)
    for rows in (15, 60):
        case = gated_lora.Case(rows, hidden, widths, rank, device)
        base, x = case.base(0), case.x.float()
        low = torch.where(case.gate[:, None], gated_lora.SCALE * x @ torch.cat(case.as_[0]).float().T, 0.0)
        right = [base.float() + low @ torch.block_diag(*case.bs[0]).float().T]
        for name, way in {"gated_expand": case.ours, "gated_lora": case.two}.items():
            found = way(0)
            _require(f"{name}, {rows} rows", [found], right)
            if way == case.two:
                _require(f"{name}, {rows} rows, ungated", [found[~case.gate]], [base[~case.gate]], 0.0)


CHECKS: dict[str, Callable[[torch.device], None]] = {"kv_write": check_kv_write, "readout and advance": check_readout}
CHECKS |= {"decode_attention": check_decode_attention, "span_attention": check_span_attention, "distill": check_distill}
CHECKS["gated_lora"] = check_gated_lora


def kernels(device: torch.device) -> Facts:
    """Seconds of each check, compilation included."""
    torch.manual_seed(0)
    seconds = {}
    for name, check in CHECKS.items():
        start = time.perf_counter()
        check(device)
        seconds[name] = round(time.perf_counter() - start, 2)
    return {"right": seconds}


def checkpoint(device: torch.device) -> Facts:
    """Tokens of the shipped model against those of a CPU, and what was warned of."""
    model, tokenizer = load(ASSETS)
    prompts = [problem.prompt for problem in read_problems(ASSETS / "problems.jsonl", 3)]
    strategy = strategy_for(model, Verified())

    def tokens(use_graph: bool) -> list[Tensor]:
        asked: dict[str, Any] = {"strategy": strategy, "max_new_tokens": 24, "use_graph": use_graph, "compile": False}
        batches: Iterator[Any] = (encode(tokenizer, prompts[:n], model.device) for n in (1, 3))
        return [generate(model, **asked, **batch).cpu() for batch in batches]

    def bare() -> Tensor:
        return generate(model, **encode(tokenizer, prompts[:1], model.device)).cpu()  # type: ignore[union-attr, arg-type]

    right, right_bare = tokens(False), bare()
    model.to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Advice to whoever names no length.
        warnings.filterwarnings("ignore", "Using the model-agnostic default")
        ways = {"without a graph": False} if device.type == "cpu" else {"graph": True, "without a graph": False}
        for name, use_graph in ways.items():
            for batch, found, expected in zip((1, 3), tokens(use_graph), right, strict=True):
                if not torch.equal(found, expected):
                    raise WrongKernelError(f"the shipped checkpoint at batch {batch}, {name}: not the CPU's tokens")
        if not torch.equal(bare(), right_bare):
            raise WrongKernelError("the shipped checkpoint at batch 1, by every default: not the CPU's tokens")
    return {"equal": [*ways, "every default"], "warnings": sorted({str(w.message)[:300] for w in caught})}


def _stand(model: Any, R: int, most: int, share: step.Stand | None, *, compile: bool) -> step.Stand:
    """Of one text, in the middle of it, with room for passes of `most` rows; rows are made many by a large k."""
    at = step.Point(1, _context(model), R // 2 + 1, R)
    room = step.PASSES * (most // 2 + 1)
    return step.Stand(model, at, Static(at.k), share=share, room=room, compile=compile)


def _context(model: Any) -> int:
    return 24 if model.device.type == "cpu" else 2048


def _share(model: Any, R: int, us: float) -> float | None:
    """Of the peak that bounds a pass of R rows, rounded; None on a CPU."""
    share = share_of_peak(model.device, us, **step.work(model, step.Point(1, _context(model), 1, R)))
    return None if share is None else round(share, 3)


def rows_table(model: Any, rows: Sequence[int], *, compile: bool) -> tuple[Facts, Action]:
    """Microseconds of a pass by its rows with their share of the peak, and of its body unless compiled.

    And the last pass but one itself.
    """
    stands: list[step.Stand] = []
    spent: dict[str, dict[int, float]] = {}
    shares: dict[int, float | None] = {}
    for R in rows:
        stand = _stand(model, R, rows[0], stands[0] if stands else None, compile=compile)
        stands.append(stand)
        actions: dict[str, Action] = {"us_by_rows": stand.step, **({} if compile else {"body_us_by_rows": stand.body})}
        with attention_context(model, step.Body()):
            found = timed(actions, model.device, rounds=10, reset=partial(step.reset, [stand]))
        for name, spread in found.items():
            spent.setdefault(name, {})[R] = round(spread.median, 1)
        shares[R] = _share(model, R, found["us_by_rows"].median)
    step.reset(stands[-2:-1])
    floor = round(step.floor(model, step.Point(1, _context(model), 1, 1)), 1)
    return {"model": MODEL, "floor_us": floor, **spent, "share_by_rows": shares}, stands[-2].step


def _profiled(model: Any, action: Action, R: int) -> Facts:
    """Nodes of the graph of a pass of R rows, its longest kernels, and all of them against the peak."""
    with attention_context(model, step.Body()):
        nodes, kernels = launches(action, model.device), kernels_by_name(action, model.device)
    us = round(sum(us for *_, us in kernels), 1)
    return {"nodes": nodes, "kernels_us": us, "kernels_share": _share(model, R, us), "kernels": kernels[:15]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 0, 1 where one failed, 3 where a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.preflight", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="which (default: all)")
    parser.add_argument("--results", type=Path, help="a file for the lines of JSON")
    args = parser.parse_args(argv)
    device = device_of(args.device)
    rows, fewer = ((9, 4, 1), (4, 1)) if device.type == "cpu" else (ROWS, ROWS_COMPILED)

    @cache
    def model() -> Any:
        torch.manual_seed(0)
        return build(MODEL, device)

    def profiled(rows: Sequence[int], compile: bool) -> Facts:
        facts, action = rows_table(model(), rows, compile=compile)
        return {**facts, **_profiled(model(), action, rows[-2])}

    def layers() -> Facts:
        free(device)
        with compiling(device), warnings.catch_warnings():
            # Layers that run uncompiled would be measured as compiled.
            warnings.filterwarnings("error", "torch.compile could not compile", RuntimeWarning)
            return profiled(fewer, compile=True)

    makes: list[Callable[[], Facts]] = [partial(make, device) for make in (machine, compiled, kernels, checkpoint)]
    makes += [partial(profiled, rows, compile=False), layers]
    status = 0
    for name, make in zip(STEPS, makes, strict=True):
        if name not in args.steps or status == WRONG:
            continue
        start = time.perf_counter()
        try:
            facts = make()
        except WrongKernelError as error:
            status, facts = WRONG, {"wrong": str(error)}
        except Exception as error:  # what fails here may still be measured elsewhere
            status, facts = 1, {"failed": reason(error)}
        seconds = round(time.perf_counter() - start, 1)
        line = json.dumps({"step": name, "seconds": seconds, **facts})
        print(line, flush=True)
        if args.results:
            with args.results.open("a", encoding="utf-8") as out:
                out.write(line + "\n")
    return status


if __name__ == "__main__":
    sys.exit(exit_status(main))
