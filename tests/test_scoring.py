"""One object tells both attentions how a layer scores."""

import pytest
import torch

from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention
from mtpkern.kernels.span_mask import Rule


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_in_which_nothing_is_seen_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"must be 1 at least, or None for all keys; got {window}.*sliding_window to"):
        Scoring(0.5, window=window)
    assert Scoring(0.5, window=1).window == 1


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.5),
        Scoring(0.3, window=3),
        Scoring(0.5, softcap=0.7),
        Scoring(0.5, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)),
        Scoring(0.4, 2, 1.5, torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)),
    ],
    ids=str,
)
def test_decoding_scores_as_training_does(scoring: Scoring) -> None:
    """The last three tokens of a text of seven: packed rows over a cache, and rows of a causal layout."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 7, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    row = torch.arange(7)[None]
    trained = span_attention(q, k, v, Rule(row, row + 1, row + 1), scoring)[0, 4:]

    k_cache, v_cache = torch.zeros(2, 1, 2, 8, 8, dtype=torch.float64)
    k_cache[:, :, :4], v_cache[:, :, :4] = k[:, :, :4], v[:, :, :4]
    rows = PackedRows(torch.zeros(3, dtype=torch.int64), torch.arange(4, 7), torch.tensor([0, 3]), 3)
    new = (x[0, :, 4:].transpose(0, 1) for x in (q, k, v))
    torch.testing.assert_close(decode_attention(*new, k_cache, v_cache, rows, scoring), trained, rtol=1e-12, atol=1e-12)
