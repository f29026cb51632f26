"""Options: how a call of `generate` or `generate_batch` decodes, read and checked in one place for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from mtpkern.arguments import require_bool
from mtpkern.fields import whole_number
from mtpkern.graph import wants_graph
from mtpkern.layers import wants_compile
from mtpkern.load import default_masks
from mtpkern.model import mask_token_for, recorded_settings, require_decodable
from mtpkern.parallel import is_parallel
from mtpkern.strategies import Strategy, Verified


def strategy_for(model: PreTrainedModel, strategy: Strategy | None = None) -> Strategy:
    """The strategy, Verified unless given, with the model's k where it has none of its own: `strategy_for(model).k`."""
    return (strategy or Verified()).for_model(recorded_settings(model).get("k_max"))


def _left_open(strategy: Strategy | None, name: str) -> bool:
    """Whether a call's strategy, before it was fitted to the model, says nothing of this."""
    return strategy is None or vars(strategy).get(name, 0) is None


class Options:
    """What a call says of these, as `generate` explains them; raises what is wrong with them, by name."""

    NAMES = (
        *("strategy", "mask_token_id", "rows", "use_graph", "compile"),
        *("batch_invariant", "prefill_chunk", "wait", "check_model"),
    )

    def __init__(self, model: PreTrainedModel, given: Mapping[str, Any]) -> None:
        strategy, rows = given["strategy"], given["rows"]
        if not isinstance(strategy, Strategy | None):
            raise TypeError(f"strategy must be mtpkern.Static, ConfAdapt or Verified, got {strategy!r}")
        for name in ("batch_invariant", "wait", "check_model", "use_graph", "compile"):
            if given[name] is not None or name not in ("use_graph", "compile"):
                require_bool(name, given[name])
        require_decodable(model)
        self.wait: bool = given["wait"]
        self.prefill_chunk = whole_number("prefill_chunk", given["prefill_chunk"], least=1)
        self.strategy = strategy_for(model, strategy)
        self.mask_token_id = mask_token_for(model, self.strategy.k, given["mask_token_id"])
        self._device = model.device
        # Ranks of a split model have times of their own, which may decide nothing.
        parallel = is_parallel(model)
        use_graph = False if parallel and given["use_graph"] is None else given["use_graph"]
        self._graph = wants_graph(use_graph, model.device)
        self._compile: bool | None = given["compile"]
        by_load = rows is None and (strategy is None or not strategy.k) and self.strategy.verify and not parallel
        by_load &= not given["batch_invariant"]  # what a sequence brings would follow the others
        self._others = {
            "mask_token_id": self.mask_token_id,
            "check_model": given["check_model"],
            "rows": None if rows is None else whole_number("rows", rows, least=1),
            "by_load": by_load,
            "threshold_by_load": by_load and model.device.type == "cpu" and _left_open(strategy, "threshold"),
            "batch_invariant": given["batch_invariant"],
        }
        self._masks_by_load = by_load and _left_open(strategy, "masks")

    def strategy_of(self, batch: int) -> Strategy:
        """The strategy for so many sequences side by side, with masks behind drafts where that is left to the load."""
        if not (self._masks_by_load and isinstance(self.strategy, Verified)):
            return self.strategy
        return replace(self.strategy, masks=default_masks(self.strategy.k, batch, self._device))

    def of_decoder(self, *, on_host: bool = False) -> dict[str, Any]:
        """What the decoder is to be; on_host: a step waits for the host, so that it cannot be captured."""
        use_graph = self._graph and not on_host
        return {**self._others, "use_graph": use_graph, "compile": wants_compile(self._compile, use_graph)}
