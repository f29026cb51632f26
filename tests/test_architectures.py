"""Every supported architecture, unmodified: each strategy equals the slow reference, lossless ones greedy decoding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
import mtpkern.cache
import mtpkern.decoder
import mtpkern.model
import mtpkern.products
from mtpkern import ConfAdapt, Static, Verified, reference
from mtpkern.strategies import Strategy
from support.models import ARCHITECTURES
from support.slow import slow_but

NEW = 12

# Strategy and prompt lengths: all k from 1 to 5, all batch sizes from 1 to 4, thresholds from "keep all" to "keep one",
# without masks behind drafts and with them.
CASES: list[tuple[Strategy, tuple[int, ...]]] = [
    (Static(1), (9, 4)),
    (Static(3), (6, 11, 3)),
    (ConfAdapt(k=4, threshold=0.3), (9, 4, 12, 7)),
    (ConfAdapt(k=5, threshold=0.0), (10,)),
    (ConfAdapt(k=2, threshold=0.9), (5, 8)),
    (Verified(k=5, threshold=0.0), (9, 4, 12, 7)),
    (Verified(k=4, threshold=0.0, masks=5), (6, 11, 8)),
]

# What an architecture can make a difference to: rows that are masks, and drafts with masks behind them.
MOST = [case for case in CASES if case[0].k == 4]


def test_what_is_tested_is_what_generate_trusts() -> None:
    assert set(ARCHITECTURES) == mtpkern.model.TESTED


def slow(model: Any, ids: Tensor, real: Tensor, strategy: Strategy, rows: int | None = None) -> list[tuple[Any, Any]]:
    """Tokens and blocks of each prompt, one by one, by the reference."""
    mask = model.config.mtpkern["mask_token_id"]
    return [
        reference.decode(model, row[keep.bool()], strategy, mask_token_id=mask, max_new_tokens=NEW, rows=rows)
        for row, keep in zip(ids, real)
    ]


def fast(model: Any, ids: Tensor, real: Tensor, strategy: Strategy, rows: int | None = None) -> list[tuple[Any, Any]]:
    """The same, all prompts at once, by `generate`; all masks for everybody unless `rows` says otherwise."""
    output = mtpkern.generate(
        model,
        ids,
        attention_mask=real,
        strategy=strategy,
        rows=rows or len(ids) * (2 * strategy.k - 1 + strategy.masks),
        max_new_tokens=NEW,
        return_dict_in_generate=True,
    )
    return list(zip(output.sequences[:, ids.shape[1] :].tolist(), output.blocks))


def greedy(model: Any, ids: Tensor, real: Tensor) -> list[list[int]]:
    """What transformers' own greedy decoding emits, kept from the mask token as ours is."""
    mask = model.config.mtpkern["mask_token_id"]
    output = model.generate(
        ids, attention_mask=real, max_new_tokens=NEW, do_sample=False, use_cache=True, suppress_tokens=[mask]
    )
    return output[:, ids.shape[1] :].tolist()


# What an architecture may break, test_siblings_as_one_product sees in each of them.
@pytest.mark.parametrize("architecture", slow_but(ARCHITECTURES, "llama", "gemma3_text", "qwen3_moe", "deepseek_v3"))
def test_every_strategy_equals_the_reference_and_greedy_decoding(architecture: str, tiny: Any) -> None:
    model = tiny.model(architecture, **ARCHITECTURES[architecture])
    seen: set[int] = set()
    longest_draft = 0
    for strategy, lengths in CASES if architecture in ("llama", "gpt_oss") else MOST:
        ids, real = tiny.prompts(*lengths)
        expected = slow(model, ids, real, strategy)
        assert fast(model, ids, real, strategy) == expected, strategy
        if strategy.verify or strategy.k == 1:
            assert [tokens for tokens, _ in expected] == greedy(model, ids, real), strategy
        if strategy.verify:
            # The budget decides who gets how many masks, never the text.
            smallest = fast(model, ids, real, strategy, rows=len(lengths) * strategy.k)
            assert [tokens for tokens, _ in smallest] == [tokens for tokens, _ in expected], strategy
            longest_draft = max(longest_draft, *(size for _, blocks in expected for size in blocks))
        seen.update(token for tokens, _ in expected for token in tokens)
    # Otherwise the comparisons above could not have failed: nothing accepted, or an echo.
    assert longest_draft > 1
    assert len(seen) > 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_siblings_as_one_product(architecture: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer makes of its part of a greater output is what it makes of its own (mtpkern.products)."""
    monkeypatch.setattr(mtpkern.decoder, "wants_one_product", lambda captured: True)
    model = tiny.model(architecture, **ARCHITECTURES[architecture])
    strategy = ConfAdapt(k=4, threshold=0.3)
    ids, real = tiny.prompts(9, 4)
    assert fast(model, ids, real, strategy) == slow(model, ids, real, strategy)
    # Where attention has one matrix for all and an MLP none of the kind there is nothing to join.
    joined = mtpkern.products._joined.get(model, [])
    assert bool(joined) == (architecture not in {"phi3", "gpt_neox"})


@pytest.mark.parametrize("architecture", slow_but(["llama", "mistral", "gemma2", "gpt_oss"], "llama"))
@pytest.mark.parametrize(
    "strategy", [Static(3), ConfAdapt(k=5, threshold=0.2), Verified(k=4, threshold=0.2, masks=3)], ids=str
)
def test_smallest_budget_of_one_sequence_equals_the_reference_with_that_budget(
    architecture: str, strategy: Strategy, tiny: Any
) -> None:
    model = tiny.model(architecture, **ARCHITECTURES[architecture])
    longest = 0
    for length, rows in ((8, strategy.k), (5, strategy.k), (9, strategy.k + 1)):
        ids, real = tiny.prompts(length)
        expected = slow(model, ids, real, strategy, rows)
        assert fast(model, ids, real, strategy, rows) == expected
        longest = max(longest, *expected[0][1][1:])
    assert longest > 1


def _ignored(monkeypatch: pytest.MonkeyPatch, **unset: None) -> None:
    attend = mtpkern.cache.decode_attention

    def patched(*args: Any, **kw: Any) -> Any:
        return attend(*args[:-1], replace(args[-1], **unset), **kw)

    monkeypatch.setattr(mtpkern.cache, "decode_attention", patched)


def _window_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    _ignored(monkeypatch, window=None)


def _softcap_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    _ignored(monkeypatch, softcap=None)


def _sinks_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    _ignored(monkeypatch, sinks=None)


def _later_mask_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mtpkern.cache.decode_attention

    def patched(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kw: Any) -> Any:
        attend(query, key, value, *rest, **kw)
        # Once more, each row a slot further, with what stands there.
        k_cache, v_cache, rows, scoring = rest
        behind = torch.where(rows.slot < k_cache.shape[2] - 1, rows.slot + 1, rows.slot)
        there = k_cache[rows.seq, :, behind], v_cache[rows.seq, :, behind]
        return attend(query, *there, k_cache, v_cache, replace(rows, slot=behind, memo={}), scoring, **kw)

    monkeypatch.setattr(mtpkern.cache, "decode_attention", patched)


def _stale_mask_keys_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes a slot first keeps it, so the keys of a mask stay when its token has been accepted."""
    attend = mtpkern.cache.decode_attention

    def patched(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kw: Any) -> Any:
        k_cache, v_cache, rows, _ = rest
        old_k, old_v = k_cache[rows.seq, :, rows.slot], v_cache[rows.seq, :, rows.slot]
        free = (old_k == 0).all(-1, keepdim=True)
        return attend(query, torch.where(free, key, old_k), torch.where(free, value, old_v), *rest, **kw)

    monkeypatch.setattr(mtpkern.cache, "decode_attention", patched)


def _planned(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Tensor], None]) -> None:
    advance = mtpkern.decoder.advance

    def patched(sequences: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
        advance(sequences, rows, *args, **kwargs)
        change(rows, rows.slot < sequences.tokens.shape[1] - 1)

    monkeypatch.setattr(mtpkern.decoder, "advance", patched)


def _slot_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _planned(monkeypatch, lambda rows, in_use: rows.slot.add_(in_use.long()))


def _position_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _planned(monkeypatch, lambda rows, in_use: rows.position.add_(in_use.long()))


def _neighbours_keys_read(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mtpkern.cache.decode_attention

    def patched(query: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *a: Any, **kw: Any) -> Any:
        attend(query, k, v, k_cache, v_cache, *a, **kw)
        return attend(query, k, v, k_cache.roll(1, dims=0), v_cache.roll(1, dims=0), *a, **kw)

    monkeypatch.setattr(mtpkern.cache, "decode_attention", patched)


@pytest.mark.parametrize(
    ("architecture", "plant"),
    [
        ("qwen3", _window_ignored),
        ("mistral", _window_ignored),
        ("gemma2", _softcap_ignored),
        ("gpt_oss", _sinks_ignored),
        ("llama", _stale_mask_keys_kept),
        ("llama", _slot_off_by_one),
        ("llama", _position_off_by_one),
        ("llama", _later_mask_seen),
        ("llama", _neighbours_keys_read),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__.strip("_"),
)
def test_a_planted_bug_is_found(
    architecture: str, plant: Callable[[pytest.MonkeyPatch], None], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(architecture, **ARCHITECTURES[architecture])
    ids, real = tiny.prompts(9, 4, 12)
    strategy = ConfAdapt(k=4, threshold=0.2)
    expected = slow(model, ids, real, strategy)
    assert fast(model, ids, real, strategy) == expected
    plant(monkeypatch)
    assert fast(model, ids, real, strategy) != expected


@pytest.mark.parametrize("plant", [_stale_mask_keys_kept, _later_mask_seen], ids=lambda f: f.__name__.strip("_"))
def test_verified_decoding_needs_true_keys_to_stay_greedy(
    plant: Callable[[pytest.MonkeyPatch], None], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    ids, real = tiny.prompts(9, 4, 12, 7)
    expected = greedy(model, ids, real)
    assert [tokens for tokens, _ in fast(model, ids, real, Verified(k=4, threshold=0.0))] == expected
    plant(monkeypatch)
    assert [tokens for tokens, _ in fast(model, ids, real, Verified(k=4, threshold=0.0))] != expected


def _changed_for_masks(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Tell attention another prefix_end and span_start of the masks behind drafts."""
    attend = mtpkern.cache.decode_attention

    def patched(*args: Any, **kw: Any) -> Any:
        *tensors, rows, scoring = args
        if rows.scratch:
            rule = rows.prefix_end, rows.span_start
            changed = zip(change(rows.slot, *rule), rule)
            prefix_end, span_start = (torch.where(rows.slot < rows.scratch, x, y) for x, y in changed)
            rows = replace(rows, prefix_end=prefix_end, span_start=span_start)
        return attend(*tensors, rows, scoring, **kw)

    monkeypatch.setattr(mtpkern.cache, "decode_attention", patched)


def _next_draft_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _changed_for_masks(monkeypatch, lambda slot, prefix, span: (prefix + 1, span))


def _own_draft_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _changed_for_masks(monkeypatch, lambda slot, prefix, span: (prefix - 1, span))


def _other_groups_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _changed_for_masks(monkeypatch, lambda slot, prefix, span: (prefix, torch.zeros_like(span)))


def _own_group_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _changed_for_masks(monkeypatch, lambda slot, prefix, span: (prefix, slot))


def _positions_behind_the_last_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    _planned(monkeypatch, lambda rows, in_use: rows.position.add_((rows.slot < 9).long()))


@pytest.mark.parametrize(
    ("architecture", "plant"),
    slow_but(
        [
            *(("llama", _next_draft_seen), ("llama", _own_draft_not_seen), ("llama", _other_groups_seen)),
            *(("llama", _own_group_not_seen), ("llama", _positions_behind_the_last_draft)),
            ("mistral", _next_draft_seen),
        ],
        *(("llama", _next_draft_seen), ("llama", _positions_behind_the_last_draft)),
    ),
    ids=lambda x: x if isinstance(x, str) else x.__name__.strip("_"),
)
def test_a_planted_bug_behind_drafts_is_found(
    architecture: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It costs proposals, or brings what no mask of the kind could know; the text stays greedy all the same."""
    model = tiny.model(architecture, **ARCHITECTURES[architecture])
    ids, real = tiny.prompts(9, 4, 12, 7)
    strategy = Verified(k=4, threshold=0.0, masks=9)
    expected = slow(model, ids, real, strategy)
    assert fast(model, ids, real, strategy) == expected
    plant(monkeypatch)
    found = fast(model, ids, real, strategy)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert found != expected
