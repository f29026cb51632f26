"""Scoring: how a layer's queries score the keys that they see, which both attentions here take as one argument.

    s_rj = softcap(scale * q_r . k_j)    softcap(x) = c tanh(x / c), or x
    p_rj = exp(s_rj) / (sum_j exp(s_rj) + exp(sink))    over the keys j within the window

Source   windows and caps as in Gemma 2, sinks as in gpt-oss
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """A layer's factor on the dot products, usually D ** -0.5, and what few models have besides.

    window    a row sees the keys of so many positions, its own the last, so 1 at least; all where None
    softcap   bound c of the scores
    sinks     [Hq]: one more score a query head, that takes probability and brings no value

    Raises ValueError for a window in which a row would not even see itself.

        Scoring(128**-0.5, window=512, softcap=50.0)
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        require_window(self.window)


def require_window(window: int | None) -> None:
    """Raises ValueError for a window in which a row does not even see itself."""
    if window is not None and window < 1:
        raise ValueError(
            f"an attention window must be 1 at least, or None for all keys; got {window}, in which no row sees "
            "anything: set the model's config.sliding_window to None, or to what it was trained with"
        )
