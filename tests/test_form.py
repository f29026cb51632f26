"""Which form of an op a tensor takes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mtpkern.kernels.form import go_without_kernels, has_kernels, takes_kernel


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
