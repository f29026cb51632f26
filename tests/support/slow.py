"""Parameters of which `make test` takes a few and `make test-slow` the others."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch


def slow_but(values: Iterable[Any], *quick: Any, interpreted: bool = False) -> list[Any]:
    """The values in their order, all but the quick ones marked slow.

    interpreted: slow in Triton's interpreter alone. On a GPU none is, where what is slow runs by itself at the end.

    pytest.mark.parametrize("architecture", slow_but(ARCHITECTURES, "llama"))
    """
    values = list(values)
    assert quick, "what is slow has a quick test beside it"
    assert all(value in values for value in quick), f"{quick} are not all among {values}"
    if interpreted and torch.cuda.is_available():
        return values

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]
