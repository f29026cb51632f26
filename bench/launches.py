"""Launches of a decoder layer in a captured pass, counted on a CPU in what torch.compile makes of the layer.

`python -m mtpkern.bench.launches` runs tiny models whose layers are compiled as those of a captured pass are, attention
kept out (mtpkern.layers) and siblings one product (mtpkern.products), under torch's profiler, and writes
bench/results/launches.{md,json}. Needs a C++ compiler, and no GPU: Inductor's code for a CPU has a kernel for each
group of operations that it fuses, and calls torch for products. Its Triton code may fuse otherwise.

Ours are counted by hand: attention, which writes the caches too, is one launch, and one more merges its splits. Where
our kernel multiplies, a product is one launch as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mtpkern.attention import attention_context
from mtpkern.bench.models import TINY
from mtpkern.bench.report import Goal, Table, program
from mtpkern.layers import CompiledLayers
from mtpkern.products import Products

# Of each kind its settings, and how many launches a layer may have.
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen3": ("qwen3", {}, 17),
    "Llama": ("llama", {}, 14),
    "Gemma 3": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 20),
}
# Of the one text that is decoded with k = 8, masks of which stand behind its drafts.
ROWS = 15
FUSED, PRODUCT, OURS, OTHER = "fused", "product", "ours", "other"
LAYER, ATTENTION = "a decoder layer", "attention"
# Attention itself, and the merge of its splits.
OF_ATTENTION = 2
# What launches nothing, unless it has to copy.
_FREE = {
    *("empty", "empty_like", "empty_strided", "as_strided", "view", "reshape", "expand", "slice", "select", "split"),
    *("split_with_sizes", "unbind", "unsqueeze", "squeeze", "transpose", "t", "permute", "detach", "alias", "to"),
    *("contiguous", "resolve_conj", "_unsafe_view", "_reshape_alias", "lift_fresh", "chunk", "narrow", "result_type"),
}


class Attention:
    """Stands for ours: outputs as the kernel of a device leaves them, under a name of its own."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: object) -> Tensor:
        """Query [B, Hq, T, D] -> itself as [B, T, Hq, D]."""
        with record_function(ATTENTION):
            return query.transpose(1, 2).contiguous()


def model_of(kind: str) -> PreTrainedModel:
    """A tiny model of this kind, in bf16: `model_of("Qwen3")`."""
    name, settings, _ = KINDS[kind]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **TINY, **settings), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.eval()


@torch.inference_mode()
def of_layers(model: PreTrainedModel, few_rows: int = 0) -> list[Counter[str]]:
    """What each decoder layer launches in a pass of `ROWS` rows, by FUSED, PRODUCT, OURS and OTHER.

    few_rows: up to how many rows products are our kernel's

        of_layers(model_of("Llama"))[0]  # Counter({"fused": 5, "product": 4, "ours": 2})
    """
    ids = torch.arange(ROWS)[None]
    products, compiled = Products(few_rows=few_rows), CompiledLayers(model)
    with products.sought(model):
        model(ids)
    compiled.calls = [(layer, _named(call)) for layer, call in compiled.calls]
    # Kernels tell the profiler their names. One thread, as pools of processes outlive what they were made for.
    seen = config.patch({"cpp.enable_kernel_profile": True, "compile_threads": 1})
    with seen, attention_context(model, Attention()) as route, compiled(), products():
        run = partial(model, input_ids=ids, position_ids=ids, use_cache=False, **route)
        run()  # compiles
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            run()
    return [launched(event) for event in profiled.events() if event.name == LAYER]


def _named(call: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(LAYER):
            return call(*args, **kwargs)

    return named


def launched(event: Any) -> Counter[str]:
    """What ran in an event of the profiler: kernels, operations of ours, and the innermost of torch's."""
    if event.name == ATTENTION:
        return Counter({OURS: OF_ATTENTION})
    if event.name.startswith("mtpkern::"):
        return Counter({OURS: 1})
    inner = sum(map(launched, event.cpu_children), Counter[str]())
    if inner:
        return inner
    if "cpp_fused" in event.name:
        return Counter({FUSED: 1})
    if event.name in ("aten::mm", "aten::addmm"):
        return Counter({PRODUCT: 1})
    operation = event.name.partition("::")[2]
    return Counter({OTHER: 1} if operation and operation not in _FREE else {})


def count_launches(device: torch.device, quick: bool) -> Iterator[Table]:
    """A row for each kind of model; unless quick, one with our kernel's products besides."""
    note = (
        f"Tiny models in bf16, {ROWS} rows, the layer with the most launches; kernels and products of Inductor's code "
        "for a CPU, attention kept out, siblings as one product. Its Triton code may fuse otherwise. Ours: attention "
        "and its merge, which is left out where there is one split, and products of few rows. Others: operations "
        "that run uncompiled."
    )
    header = ("layer", "fused", "products", "ours", "others", "launches", "at most")
    table = Table("Launches of a layer", note, header)
    for kind, (_, _, most) in KINDS.items():
        for few_rows in (0,) if quick else (0, ROWS):
            with patch("mtpkern.products.LEAST_WEIGHT", 0):
                counts = max(of_layers(model_of(kind), few_rows), key=Counter.total)
            name = f"{kind}, our products" if few_rows else kind
            by_kind = {what: counts[what] for what in (FUSED, PRODUCT, OURS, OTHER)}
            row = name, *map(str, by_kind.values()), str(counts.total()), str(most)
            goal = Goal(f"{name}: launches of a layer", most, counts.total(), "launches", at_most=True)
            table = table.plus(row, {"layer": name, **by_kind, "launches": counts.total()}, goal)
            yield table


if __name__ == "__main__":
    program("launches", "Launches of a decoder layer", count_launches, device="cpu", on_cpu=lambda args: True)
