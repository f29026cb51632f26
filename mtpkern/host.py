"""Between host and device: what is read comes all at once, because each reading waits for what the device has still to
do; for what is brought there nobody waits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU; those of one device come in one copy, for which the host waits once.

    status, length = on_host(sequences.status, sequences.length)
    """
    found = list(tensors)
    for device in {x.device for x in tensors if x.device.type != "cpu"}:
        here = [i for i, x in enumerate(tensors) if x.device == device]
        # As bytes, so that numbers of any type travel together as they are.
        copy = torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in here]).cpu()
        for i, part in zip(here, copy.split([tensors[i].nbytes for i in here])):
            # Cloned, because numbers of 8 bytes may begin at those alone that 8 divides.
            found[i] = part.clone().view(tensors[i].dtype).view(tensors[i].shape)
    return found


def on_device(x: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, from pinned memory, so that the host need not wait for what is queued there.

    on_device(np.zeros(3), torch.device("cuda"))
    """
    here = torch.from_numpy(x)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
