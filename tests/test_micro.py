"""The ops of a decode step for pytest-benchmark: `pytest tests/test_micro.py --benchmark-autosave` and so on.

At the heads and vocabulary of Qwen3-4B on a GPU, with 15 rows behind 4,096 tokens; tiny on a CPU. These times hold the
launch from Python; what a call takes inside a captured graph, `make gpu` measures.
"""

import pytest
import torch

from mtpkern.bench.decode_attention import Case, Shape
from mtpkern.bench.gated_lora import RANK
from mtpkern.bench.gated_lora import Case as AdapterCase
from mtpkern.bench.models import products
from mtpkern.bench.readout import Taken
from mtpkern.compare import synchronize
from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.kv_write import kv_write

pytest.importorskip("pytest_benchmark")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def attention():
    case = Case(Shape(1, 4096, 15) if CUDA else Shape(1, 40, 15, Hq=4, Hkv=2, D=16), DEVICE)
    return case.attend(decode_attention)


def write():
    caches = torch.zeros(2, 1, 8, 4097 if CUDA else 33, 128, device=DEVICE, dtype=torch.bfloat16)
    key = torch.randn(8, 15, 128, device=DEVICE, dtype=torch.bfloat16).transpose(0, 1)
    place = torch.zeros(15, dtype=torch.int64, device=DEVICE), torch.arange(15, device=DEVICE)
    return lambda i: kv_write(*caches, key, key, *place)


def adapter():
    hidden, widths = products("Qwen3-4B", tiny=not CUDA)[0]["q, k, v"]
    return AdapterCase(15, hidden, widths, RANK, DEVICE).ours


def taken():
    return Taken(1, 151_936 if CUDA else 1000, DEVICE, ours=True)


@pytest.mark.parametrize(
    "make",
    [attention, write, adapter, lambda: taken().readout_, lambda: taken().advance_],
    ids=["decode_attention", "kv_write", "gated_lora", "readout", "advance"],
)
def test_op(benchmark, make):
    action = make()

    def call():
        action(0)
        synchronize(DEVICE)

    benchmark.pedantic(call, rounds=200 if CUDA else 2, warmup_rounds=5 if CUDA else 1)
