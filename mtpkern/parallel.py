"""Tensor parallel: one model over several processes, each of which runs the same passes.

transformers splits a model by its `tp_plan`; every rank calls `generate` with the same prompts and holds its share of
the heads. A pass is then a collective operation, so that all ranks must make the same passes with the same rows: what
they know from a clock of their own may decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import MaxTimeCriteria


def is_parallel(model: PreTrainedModel) -> bool:
    """Whether the model is split over several processes: `is_parallel(model)`."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def require_same_on_all(model: PreTrainedModel, max_time: Any, criteria: Iterable[Any]) -> None:
    """Raise ValueError for what would end a run at another pass on one rank than on the others."""
    if is_parallel(model) and (max_time is not None or any(isinstance(x, MaxTimeCriteria) for x in criteria)):
        raise ValueError(
            f"mtpkern does not support max_time for a {type(model).__name__} that is split over several processes: "
            "their clocks would stop them at different passes; leave it out, or stop by max_new_tokens"
        )


def agree(model: PreTrainedModel, x: Tensor) -> None:
    """Give x the values that it has on the first of the ranks that hold the model, in place."""
    if is_parallel(model):
        mesh = model._device_mesh
        group = (mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh).get_group()
        torch.distributed.broadcast(x, group=group, group_src=0)
