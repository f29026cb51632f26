"""How many rows of logits live at once, and whether a product is kept."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mtpkern.kernels import head
from mtpkern.kernels.distill import PARTIAL
from mtpkern.kernels.head import Head, Rows

R, V = 37, 19


def test_chunks_keep_a_matrix_product_busy_within_half_a_gigabyte():
    """At V = 152k in 2 bytes; beside the logits a narrow part of d weight, and 64 MiB for the products themselves."""
    chunk = partial(head.chunk_rows, dtype=torch.bfloat16, device=torch.device("cpu"), triton=True)
    hard, soft = (chunk(2560, V) for V in (152_000, 2 * 152_000))
    assert hard >= 1024
    assert soft >= 512
    assert hard * 152_000 * 2 + PARTIAL + (64 << 20) <= 512 << 20
    assert soft * 304_000 * 2 + PARTIAL + (64 << 20) <= 512 << 20
    # Equal parts, not one of 1,264 rows and a rest of 32.
    assert chunk(1296, 152_000) == 656


@pytest.mark.parametrize("gib", [8, 79, 139])
def test_a_large_gpu_holds_the_logits_of_the_papers_batch_at_once(monkeypatch, gib):
    """Qwen3's vocabulary in 2 bytes, for student and teacher; a smaller one has LOGITS."""
    facts = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    device = torch.device("cuda", 0)
    soft = head.chunk_rows(2560, 2 * 151_936, torch.bfloat16, device, triton=True)
    assert soft == (640 if gib == 8 else 2560)
    assert head.room(device) <= max(head.LOGITS, facts.total_memory / 40)


def test_a_product_is_kept_within_the_bound_of_logits(monkeypatch):
    hidden, weight = torch.zeros(R, 6), torch.zeros(V, 6)
    for over, products in ((0, 1), (1, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(head, "LOGITS", products * R * V * 4 - over)
        assert (Rows.sharing(hidden, Head(weight), products).product is None) == bool(over)
