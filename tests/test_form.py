"""Which form of an op a tensor takes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mtpkern.kernels import form
from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.form import go_without_kernels, has_kernels, pdl_options, takes_kernel
from mtpkern.kernels.gated_lora import gated_lora
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.readout import readout
from mtpkern.kernels.scoring import Scoring


def test_a_device_whose_kernel_failed_takes_the_torch_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtpkern.kernels.form._without_kernels", set())
    first, second = (cast(Any, SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))) for index in range(2))
    assert takes_kernel(first)
    assert takes_kernel(second)
    go_without_kernels(first.device)
    assert not takes_kernel(first)
    assert not has_kernels(first.device)
    assert takes_kernel(second)
    assert not takes_kernel(torch.zeros(1))


@pytest.mark.parametrize(
    ("device", "hip", "capability", "interpreted", "early"),
    [
        ("cuda", None, (9, 0), "0", True),
        ("cuda", None, (10, 0), "0", True),
        ("cuda", None, (12, 0), "0", False),
        ("cuda", None, (8, 9), "0", False),
        ("cuda", None, (9, 0), "1", False),
        ("cuda", "7.0", (9, 4), "0", False),  # as ROCm counts
        ("cpu", None, (9, 0), "0", False),
    ],
)
def test_kernels_start_early_where_the_gpu_can(
    device: str,
    hip: str | None,
    capability: tuple[int, int],
    interpreted: str,
    early: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    form._has_pdl.cache_clear()
    try:
        # Other compilers than NVIDIA's know no such option.
        on, off = {"PDL": True, "launch_pdl": True}, {"PDL": False}
        assert pdl_options(torch.device(device)) == (on if early else off)
        monkeypatch.setattr(form, "PDL", False)
        assert pdl_options(torch.device(device)) == off
    finally:
        form._has_pdl.cache_clear()


def test_a_build_without_onednn_is_asked_for_none_of_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert form.has_products.__wrapped__(dtype) is None


@pytest.mark.parametrize(
    ("machine", "has", "known"),
    [("x86_64", False, False), ("AMD64", False, False), ("x86_64", True, True), ("aarch64", False, None)],
)
def test_x86_alone_is_asked_for_its_products(
    machine: str, has: bool, known: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either answer, on every processor."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(form, "machine", lambda: machine)
    for dtype, name in names.items():
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{name: lambda: has}))
        assert form.has_products.__wrapped__(dtype) is known
        assert form.has_products.__wrapped__(torch.float32) is None


@pytest.mark.parametrize("bfloat16", [False, True])
def test_with_avx_512_alone_products_of_bfloat16_are_there_in_name(
    bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(form, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    assert form.has_products.__wrapped__(torch.bfloat16) is bfloat16


@pytest.mark.gpu
def test_what_starts_early_reads_nothing_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and ours in turns, each reading what the one before has written, many layers in a graph: to the bit."""
    B, L, W, H, D = 4, 700, 15, 8, 64
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) * shape[-1] ** -0.5

    texts, x, gate = drawn(10, B * W, H * D), drawn(B * W, H * D), torch.arange(B * W, device="cuda") % W >= 8
    weights, a, b = drawn(8, H * D, H * D), drawn(32, H * D), drawn(H * D, 32)
    filled = drawn(2, B, H, L + 1, D)
    o_r, start = torch.arange(B * W, device="cuda"), torch.arange(B + 1, device="cuda") * W
    rows = PackedRows(o_r // W, L - W + o_r % W, start, W)

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        y, (k, v), found = x, filled.clone(), []
        for i in range(24):
            z = y @ weights[i % 8]
            gated_lora([z], y, gate, [a], [b], 1.0)
            heads = z.view(B * W, H, D)
            y = decode_attention(heads, heads, heads, k, v, rows, Scoring(D**-0.5)).flatten(1)
            found += readout(y, 0)
        return [y, k, v, *found]

    results: list[list[torch.Tensor]] = []
    for early in (False, True):
        monkeypatch.setattr(form, "PDL", early)
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        results.append([])
        for text in texts:  # another one each time, or what is stale would be right
            x.copy_(text)
            graph.replay()
            results[-1] += [part.clone() for part in out]
    right, found = results
    for one, other in zip(right, found):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
