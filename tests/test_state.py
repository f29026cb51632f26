"""The state of a decoding step: what is allocated, and parts of it in the same memory."""

import torch

from mtpkern.kernels.state import Rows, Sequences, Terms

CPU = torch.device("cpu")


def test_shapes() -> None:
    sequences = Sequences.allocate(3, 40, 20, CPU)
    assert sequences.tokens.shape == (3, 41)
    assert sequences.blocks.shape == (3, 21)
    others = [x for name, x in vars(sequences).items() if name not in ("tokens", "blocks")]
    assert all(x.shape == (3,) and x.dtype == torch.int64 and not x.any() for x in others)
    rows = Rows.allocate(12, 3, CPU, k=4)
    assert rows.start.shape == (4,)
    assert rows.behind.shape == (3, 4)
    terms = Terms.allocate(8, 3, CPU)
    assert terms.stop_ids.tolist() == [[-1] * 8] * 3
    assert terms.price.dtype == torch.float64
    assert not terms.price


def test_a_prefill_reads_k_rows_of_each() -> None:
    rows = Rows.allocate(12, 3, CPU, k=4)
    rows.expect_prefill(4)
    assert rows.start.tolist() == [0, 4, 8, 12]
    assert rows.behind.tolist() == [[3, 0, 0, 0]] * 3


def test_the_first_rows_are_the_same_memory() -> None:
    rows = Rows.allocate(12, 3, CPU, k=4)
    assert rows.first(12) is rows
    few = rows.first(5)
    assert all(x.shape == (5,) for x in (few.seq, few.position, few.slot, few.token, few.prefix_end, few.span_start))
    assert few.start is rows.start
    few.token.fill_(7)
    assert rows.token.tolist() == [7] * 5 + [0] * 7
