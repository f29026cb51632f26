"""Slow, obviously right decoding: one sequence, no cache, one full forward a pass. Everything is compared with it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.model import recorded_settings
from mtpkern.strategies import Strategy


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    strategy: Strategy,
    *,
    mask_token_id: int,
    max_new_tokens: int,
    eos_token_id: int | Collection[int] | None = None,
    rows: int | None = None,
) -> tuple[list[int], list[int]]:
    """Decode one prompt [T] int64; returns the new tokens and how many each pass emitted.

    New tokens end with the first of `eos_token_id`, or after max_new_tokens. `rows`, from k up, is the row budget of a
    pass behind the first: the tokens kept by the last pass are fed again, and masks take what is left, at most k - 1.

        tokens, blocks = decode(model, ids, ConfAdapt(k=4), mask_token_id=5, max_new_tokens=32, eos_token_id=2)
        assert sum(blocks) == len(tokens)
    """
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    if not strategy.k:
        strategy = strategy.for_model(recorded_settings(model).get("k_max"))
    k, threshold = strategy.k, strategy.threshold
    prompt = input_ids.tolist()
    certain: list[int] = []  # emitted
    drafts: list[int] = []  # proposed behind `certain`, not yet confirmed; stays empty unless the strategy verifies
    blocks: list[int] = []

    def predict(tokens: list[int]) -> tuple[list[int], list[float]]:
        """The most probable token behind each of `tokens`, and its probability."""
        logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].clone()
        logits[:, mask_token_id] = -torch.inf
        probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return logits.argmax(-1).tolist(), probability.max(-1).values.tolist()

    def emit(tokens: list[int]) -> bool:
        """Append tokens up to the limit or the first stop token; says whether decoding goes on."""
        blocks.append(0)
        for token in tokens:
            certain.append(token)
            blocks[-1] += 1
            if token in stops or len(certain) == max_new_tokens:
                return False
        return True

    while True:
        masks = k - 1
        if blocks:
            # No mask for a token beyond the limit, and none beyond the budget.
            masks = max(0, min(masks, max_new_tokens - len(certain) - len(drafts) - 1))
            fed_again = 1 + len(drafts) if strategy.verify else blocks[-1]
            masks = masks if rows is None else min(masks, rows - fed_again)
        before = prompt + certain
        token, confidence = predict(before + drafts + [mask_token_id] * masks)
        token, confidence = token[len(before) - 1 :], confidence[len(before) - 1 :]
        # token[i] is what follows certain + drafts[:i] for i <= len(drafts), and what the masks propose behind that.
        confirmed = 0
        while confirmed < len(drafts) and token[confirmed] == drafts[confirmed]:
            confirmed += 1
        proposals = range(len(drafts), len(token)) if confirmed == len(drafts) else range(confirmed, confirmed + 1)
        kept = [token[proposals[0]]]
        if strategy.verify or confidence[proposals[0]] > threshold:
            for i in proposals[1:]:
                if confidence[i] <= threshold:
                    break
                kept.append(token[i])
        if strategy.verify:
            going_on = emit(drafts[:confirmed] + kept[:1])
            drafts = kept[1:][: max_new_tokens - len(certain)]
        else:
            going_on = emit(kept)
        if not going_on:
            return certain, blocks
