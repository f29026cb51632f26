"""The state of a decoding step: what is allocated, and parts of it in the same memory."""

import pytest
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


@pytest.mark.parametrize("rows", [1, 12, 23, 45])
def test_every_field_begins_where_whole_vectors_do(rows: int) -> None:
    """Of any number of rows: for others the kernels would be compiled once more, where a service meets them first."""
    fields = vars(Rows.allocate(rows, 3, CPU, k=4)).values()
    assert [x.data_ptr() % 16 for x in fields] == [0] * 8
    assert [len(x) for x in fields] == [rows] * 6 + [4, 3]
    assert all(x.is_contiguous() for x in fields)


def test_the_first_rows_are_the_same_memory() -> None:
    rows = Rows.allocate(12, 3, CPU, k=4)
    assert rows.first(12) is rows
    few = rows.first(5)
    assert all(x.shape == (5,) for x in (few.seq, few.position, few.slot, few.token, few.prefix_end, few.span_start))
    assert few.start is rows.start
    few.token.fill_(7)
    assert rows.token.tolist() == [7] * 5 + [0] * 7
