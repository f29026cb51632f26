"""Copies from the host that nobody waits for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(x: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, from pinned memory, so that the host need not wait for what is queued there.

    on_device(np.zeros(3), torch.device("cuda"))
    """
    here = torch.from_numpy(x)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
