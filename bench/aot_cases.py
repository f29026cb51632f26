"""What mtpkern.bench.aot compiles: every kernel's launcher, called as models call it.

CASES["kv_write bf16 D128"]()
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from mtpkern.kernels.advance import advance_triton
from mtpkern.kernels.decode_attention import decode_attention_triton
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.kernels.gated_lora import gated_expand_triton, gated_lora_triton
from mtpkern.kernels.head import Head
from mtpkern.kernels.keep_top import keep_top_k_triton, keep_top_p_triton
from mtpkern.kernels.kv_write import kv_write_triton
from mtpkern.kernels.linear import few_rows_linear_triton, new_counters
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.readout import readout_triton
from mtpkern.kernels.sample import sample_triton
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention_triton
from mtpkern.kernels.span_mask import Rule
from mtpkern.kernels.state import Rows, Sequences, Terms


def decode_attention_case(
    dtype: torch.dtype, D: int, rows: int, masks: int = 0, how: dict[str, Any] | None = None, **scoring: Any
) -> None:
    """Decode attention of `rows` rows a sequence at the heads of Qwen3-4B and Llama-3.1-8B: 32 over 8.

    masks: how many of them stand behind drafts; how: options of the launcher; scoring: fields of Scoring.
    """
    B, Hq, Hkv, C = 2, 32, 8, 1024
    query, new = (torch.empty(1, H, B * rows, D, dtype=dtype)[0].transpose(0, 1) for H in (Hq, Hkv))
    cache = torch.empty(B, Hkv, C + 1, D, dtype=dtype)
    index = torch.zeros(B * rows, dtype=torch.int64)
    start = torch.zeros(B + 1, dtype=torch.int64)
    packed = PackedRows(index, index, start, rows, *((index, index, masks) if masks else ()))
    decode_attention_triton(query, new, new, cache, cache, packed, Scoring(D**-0.5, **scoring), **(how or {}))


def advance_case(B: int, k: int, verify: bool, masks: int = 0) -> None:
    """`advance` for B sequences with all rows that they can use."""
    R = B * (2 * k - 1 + masks)
    sequences = Sequences.allocate(B, 256, 128, torch.device("cpu"))
    rows = Rows.allocate(R, B, torch.device("cpu"), k)
    token = torch.zeros(R, dtype=torch.int64)
    terms = Terms.allocate(2, B, torch.device("cpu"), budget=R)
    advance_triton(sequences, rows, terms, token, torch.zeros(R), k=k, verify=verify, mask_token_id=1, masks=masks)


def readout_case(dtype: torch.dtype, V: int) -> None:
    """The readout of two rows."""
    readout_triton(torch.empty(2, V, dtype=dtype), V - 1)


def sample_case(dtype: torch.dtype, V: int) -> None:
    """A token each of two rows."""
    place = torch.zeros(2, dtype=torch.int64)
    sample_triton(torch.empty(2, V, dtype=dtype), place[:1], place, place, torch.zeros(1).expand(2), V - 1)


def keep_top_case(dtype: torch.dtype, V: int) -> None:
    """Top-k and top-p of two rows."""
    for op in (keep_top_k_triton, keep_top_p_triton):
        op(torch.empty(2, V, dtype=dtype), torch.zeros(2))


def kv_write_case(dtype: torch.dtype, D: int) -> None:
    """The write of 15 rows as a model hands them over: [1, Hkv, R, D], transposed."""
    new = torch.empty(8, 15, D, dtype=dtype).transpose(0, 1)
    cache = torch.empty(1, 8, 257, D, dtype=dtype)
    index = torch.zeros(15, dtype=torch.int64)
    kv_write_triton(cache, cache, new, new, index, index)


def gated_lora_case(
    dtype: torch.dtype,
    adapter: torch.dtype,
    r: int,
    rows: int = 15,
    H: int = 2560,
    widths: tuple[int, ...] = (4096, 1024),
) -> None:
    """The adapter of two siblings; more of them add code, but no registers."""
    outs = [torch.empty(rows, N, dtype=dtype) for N in widths]
    as_, bs = [torch.empty(r, H, dtype=adapter) for _ in widths], [torch.empty(N, r, dtype=adapter) for N in widths]
    gate = torch.empty(rows, dtype=torch.bool)
    gated_lora_triton(outs, torch.empty(rows, H, dtype=dtype), gate, as_, bs, [2.0] * len(widths))


def gated_expand_case(
    dtype: torch.dtype, adapter: torch.dtype, r: int, rows: int = 15, widths: tuple[int, ...] = (4096, 1024)
) -> None:
    """Its second half, where the base's product has brought the first: outputs and lows are columns of one tensor."""
    joint = torch.empty(rows, sum(widths) + r * len(widths), dtype=dtype)
    views = joint.split([*widths, *[r] * len(widths)], dim=1)
    bs, gate = [torch.empty(N, r, dtype=adapter) for N in widths], torch.empty(rows, dtype=torch.bool)
    gated_expand_triton(views[: len(widths)], views[len(widths) :], gate, bs, [2.0] * len(widths))


def linear_case(dtype: torch.dtype, rows: int, N: int, K: int, bias: bool = False) -> None:
    """A linear layer with few rows."""
    weight, counters = torch.empty(N, K, dtype=dtype), new_counters(torch.device("cpu"))
    few_rows_linear_triton(torch.empty(rows, K, dtype=dtype), weight, weight[:, 0].clone() if bias else None, counters)


def span_attention_case(dtype: torch.dtype, D: int, *, sinks: bool = False, **options: Any) -> None:
    """Span attention of one sequence, 32 heads over 8, forward and backward."""
    T = 160
    query, key = (torch.empty(1, T, H, D, dtype=dtype).transpose(1, 2).requires_grad_() for H in (32, 8))
    rule = Rule(*[torch.zeros(1, T, dtype=torch.int32)] * 3)
    if sinks:
        options["sinks"] = torch.zeros(32, dtype=dtype)
    span_attention_triton(query, key, key, rule, Scoring(D**-0.5, **options)).sum().backward()


def distill_case(dtype: torch.dtype, V: int, **options: Any) -> None:
    """The head's readout, its hard loss and its soft loss, with gradients."""
    hidden = torch.zeros(16, 16, dtype=dtype).requires_grad_()
    head = Head(torch.zeros(V, 16, dtype=dtype), banned=V - 1, **options)
    head_readout(hidden, head, triton=True)
    distill_loss(hidden, head, target=torch.zeros(16, dtype=torch.int64), triton=True)
    distill_loss(hidden, head, teacher=(hidden.detach(), head), triton=True)


bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
_DTYPES = {"bf16": bf16, "fp16": fp16, "fp32": fp32}
_DIMS = (64, 80, 96, 128, 256)
_VOCABULARIES = (151_936, 128_257)  # the second is odd: Llama-3.1 and one mask token

# With 4 query heads a KV head, k = 1, 4, 8 and 16 fill tiles of 16, 32, 64 and twice 64 rows in the narrow types (128
# at D 256). Tiles go by the padded head dimension and the bytes of an element, so that not every pair has to be there.
_SHAPES = {
    "bf16": [*product((64, 128, 256), (1, 4, 8, 16)), (80, 8), (96, 8)],
    "fp16": [(128, 8), (256, 8)],
    "fp32": [(64, 1), *product(_DIMS, (8,))],
}
_attend, _linear, _adapter, _span = decode_attention_case, linear_case, gated_lora_case, span_attention_case
_expand = gated_expand_case
CASES: dict[str, Callable[[], object]] = {
    # First, for on AMD's GPUs decode attention launches these as well.
    **{f"kv_write bf16 D{D}": partial(kv_write_case, bf16, D) for D in _DIMS},
    "kv_write fp32 D128": partial(kv_write_case, fp32, 128),
    **{
        f"decode_attention {name} D{D} k{k}": partial(_attend, _DTYPES[name], D, 2 * k - 1)
        for name, shapes in _SHAPES.items()
        for D, k in shapes
    },
    "decode_attention bf16 D128 k8 one split": partial(_attend, bf16, 128, 15, how={"splits": 1}),
    "decode_attention bf16 D128 k8 batch-invariant": partial(_attend, bf16, 128, 15, how={"batch_invariant": True}),
    "decode_attention bf16 D64 k8 window, sinks": partial(
        _attend, bf16, 64, 15, window=128, sinks=torch.zeros(32, dtype=bf16)
    ),
    "decode_attention bf16 D256 k8 window, softcap": partial(_attend, bf16, 256, 15, window=512, softcap=50.0),
    **{
        f"advance B{B} k{k} {'verified' if verify else 'unverified'}": partial(advance_case, B, k, verify)
        for B, k in ((1, 8), (16, 8), (128, 8), (1024, 16))
        for verify in (True, False)
    },
    **{f"advance B{B} k{k} verified, masks": partial(advance_case, B, k, True, 9) for B, k in ((1, 4), (16, 8))},
    # As many as there are by default, where rows go by load.
    **{
        f"advance B{B} k{k} verified, {masks} masks": partial(advance_case, B, k, True, masks)
        for B, k, masks in ((1, 12, 22), (8, 7, 11))
    },
    "decode_attention bf16 D128 k12, 22 masks": partial(_attend, bf16, 128, 45, 22),
    "decode_attention bf16 D128 k4 masks": partial(_attend, bf16, 128, 16, 9),
    "decode_attention bf16 D256 k4 masks, window": partial(_attend, bf16, 256, 16, 9, window=512),
    "decode_attention fp32 D64 k4 masks, sinks": partial(_attend, fp32, 64, 16, 9, sinks=torch.zeros(32)),
    **{
        f"{op} {name} V{V}": partial(case, dtype, V)
        for op, case in (("readout", readout_case), ("sample", sample_case))
        for name, dtype in _DTYPES.items()
        for V in _VOCABULARIES
    },
    **{f"keep_top fp32 V{V}": partial(keep_top_case, fp32, V) for V in _VOCABULARIES},
    **{f"gated_lora {name} r32": partial(_adapter, dtype, dtype, 32) for name, dtype in _DTYPES.items()},
    "gated_lora bf16, adapter fp32": partial(_adapter, bf16, fp32, 32),
    "gated_lora bf16 r12, odd widths": partial(_adapter, bf16, bf16, 12, 15, 2561, (1001, 7)),
    "gated_lora bf16 r32, 8,192 rows": partial(_adapter, bf16, bf16, 32, 8192, 14_336),
    **{f"gated_expand {name} r32": partial(_expand, dtype, dtype, 32) for name, dtype in _DTYPES.items()},
    "gated_expand bf16, adapter fp32": partial(_expand, bf16, fp32, 32),
    "gated_expand bf16 r12, odd widths": partial(_expand, bf16, bf16, 12, 15, (1001, 7)),
    # One and several parts of K, each with as many rows as there are forms.
    **{
        f"linear bf16 {N}x{K}, {rows} rows": partial(_linear, bf16, rows, N, K)
        for N, K in ((19_456, 2560), (2560, 9728))
        for rows in (16, 32)
    },
    "linear fp16 2560x4096, 16 rows": partial(_linear, fp16, 16, 2560, 4096),
    "linear bf16 1000x144, bias, 7 rows": partial(_linear, bf16, 7, 1000, 144, bias=True),
    "linear bf16 1000x592, bias, 7 rows": partial(_linear, bf16, 7, 1000, 592, bias=True),
    **{
        f"span_attention {name} D{D}": partial(_span, _DTYPES[name], D)
        for name, dims in {"bf16": _DIMS, "fp16": (128,), "fp32": (64, 128, 256)}.items()
        for D in dims
    },
    "span_attention bf16 D64 sinks": partial(_span, bf16, 64, sinks=True),
    "span_attention bf16 D256 softcap": partial(_span, bf16, 256, softcap=50.0),
    **{f"distill {name} V144": partial(distill_case, dtype, 144) for name, dtype in _DTYPES.items()},
    "distill bf16 V129": partial(distill_case, bf16, 129),  # odd, as above
    "distill bf16 V144 softcap": partial(distill_case, bf16, 144, softcap=30.0),
}
