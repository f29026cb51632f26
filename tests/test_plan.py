"""Plan: what `advance` ends with, and what a sequence that is put in gets. Its rules are held by test_advance.py."""

import pytest
import torch

from mtpkern.kernels.plan import plan
from mtpkern.kernels.state import RUNNING, STOPPED, Rows, Sequences, Terms

MASK, CPU = 99, torch.device("cpu")


def planned(*, verify: bool, masks: int = 0, rows: int = 10, **more: object) -> tuple[Sequences, Rows]:
    """Three sequences of 4, 6 and 5 tokens, k = 3: one with a prompt alone, one with two drafts, one at rest."""
    sequences = Sequences.allocate(3, 12, 12, CPU)
    sequences.tokens[:] = torch.arange(13)
    sequences.length[:] = torch.tensor([4, 6, 5])
    sequences.pending[:] = torch.tensor([1, 3, 0])
    sequences.status[:] = torch.tensor([RUNNING, RUNNING, STOPPED])
    sequences.limit.fill_(12)
    table = Rows.allocate(rows, 3, CPU, k=3)
    plan(sequences, table, Terms.allocate(1, 3, CPU), k=3, verify=verify, mask_token_id=MASK, masks=masks, **more)
    return sequences, table


@pytest.mark.parametrize("verify", [False, True])
def test_each_running_sequence_brings_its_tokens_and_masks(verify):
    _, rows = planned(verify=verify)
    assert rows.start.tolist() == [0, 3, 8, 8]
    assert rows.token.tolist() == [3, MASK, MASK, 3, 4, 5, MASK, MASK, 0, 0]
    assert rows.position.tolist() == [3, 4, 5, 3, 4, 5, 6, 7, 0, 0]
    assert rows.slot.tolist() == [3, 4, 5, 3, 4, 5, 6, 7, 12, 12]


def test_drafts_without_rows_are_dropped():
    sequences, rows = planned(verify=True, rows=3)
    assert sequences.pending.tolist() == [1, 2, 0]
    assert sequences.length.tolist() == [4, 5, 5]
    assert rows.token.tolist() == [3, 3, 4]


def test_drafts_that_are_not_known_count_as_sure():
    """Masks go behind the draft that may be refuted, and behind none where all are taken for sure."""
    unsure = torch.tensor([[1.0, 1.0], [1.0, 0.5], [1.0, 1.0]])
    known, unknown, same = (
        planned(verify=True, masks=2, rows=9, **more)[1].behind.tolist()
        for more in ({"sure": unsure}, {}, {"sure": torch.ones(3, 2)})
    )
    assert unknown == same
    assert known != unknown
    assert known[1][1] > 0
