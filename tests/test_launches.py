"""What a decoder layer launches in a captured pass: few fused kernels, a product for all siblings, our attention."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder, exc

from mtpkern import layers
from mtpkern.bench import launches
from mtpkern.bench.launches import FUSED, KINDS, OTHER, OURS, PRODUCT, model_of, of_layers
from mtpkern.kernels import decode_attention as attention
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring
from mtpkern.products import Products
from support.attended import make_case

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(scope="module")
def inductor() -> None:
    """Its code for a CPU, whose kernels the profiler sees."""
    if sys.platform != "linux":
        pytest.skip("Inductor's kernels for a CPU tell the profiler their names on Linux alone")
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler, which Inductor needs for a CPU")


@pytest.mark.slow("launches::test_what_is_not_fused_counts")
@pytest.mark.parametrize("kind", KINDS)
def test_launches_of_a_compiled_layer(kind: str, inductor: None) -> None:
    """At most what the project allows itself, and no more than when the table was made."""
    page = Path(launches.__file__).parent / "results" / "launches.json"
    (before,) = (row for row in json.loads(page.read_text())["tables"][0]["records"] if row["layer"] == kind)
    for layer in of_layers(model_of(kind)):
        assert layer.total() <= KINDS[kind][2]
        assert layer.total() <= before["launches"]
        # q, k and v; o; gate and up; down. Nothing runs uncompiled.
        assert (layer[PRODUCT], layer[OURS], layer[OTHER]) == (4, launches.OF_ATTENTION, 0)


@pytest.mark.slow("launches::test_what_is_not_fused_counts")
def test_a_layer_that_falls_apart_is_seen(inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two behind its activation, siblings apart."""
    model = model_of("Llama")
    whole = of_layers(model)[0]
    monkeypatch.setattr(launches, "Products", lambda **_: Products(wanted=False))
    for layer in model.model.layers:
        own = layer.mlp.act_fn.forward
        layer.mlp.act_fn.forward = lambda x, own=own: (torch._dynamo.graph_break(), own(x))[1]
    torch._dynamo.reset()
    broken = of_layers(model)[0]
    assert broken[FUSED] > whole[FUSED]
    assert broken[PRODUCT] == 7
    assert broken.total() > KINDS["Llama"][2]


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_not_fused_counts(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation by itself, where nothing is compiled but traced."""
    monkeypatch.setattr(layers, "BACKEND", "eager")
    monkeypatch.setattr(launches, "Products", lambda **_: Products(wanted=wanted))
    one, other = of_layers(model_of("Qwen3"))
    assert one == other
    assert (one[FUSED], one[PRODUCT], one[OURS]) == (0, 4 if wanted else 7, launches.OF_ATTENTION)
    assert one[OTHER] > 40


@pytest.mark.parametrize("splits", [1, 5])
def test_attention_is_two_launches_at_most(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches written, splits merged; the numbers are others' tests."""
    pytest.importorskip("triton")
    made: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: made.append(self.name)

    for name in ("_attend_kernel", "_merge_kernel"):
        monkeypatch.setattr(attention, name, Kernel(name))
    case = make_case([[3, 4, 5]], dim=16)
    rows = PackedRows(case.seq, case.slot, case.start, case.max_rows)
    tensors = case.query, *case.new(), case.k_cache, case.v_cache
    attention.decode_attention_triton(*tensors, rows, Scoring(0.25), splits=splits)
    assert made == ["_attend_kernel", "_merge_kernel"][: 1 if splits == 1 else 2]
    assert len(made) <= launches.OF_ATTENTION
