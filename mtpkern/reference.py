"""Slow, obviously right decoding: one sequence, no cache, one full forward a pass. Everything is compared with it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.model import recorded_settings, told_positions
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

    New tokens end with the first of `eos_token_id`, or after max_new_tokens. `rows`, from k up (verified: from 1),
    is the row budget of a pass behind the first: the tokens kept by the last pass are fed again, and masks take what is
    left, at most k - 1 behind the last, then what the strategy wants behind others.

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
    sure: list[float] = []  # how sure each draft is
    blocks: list[int] = []

    def predict(tokens: list[int]) -> tuple[list[int], list[float]]:
        """The most probable token behind each of `tokens`, and its probability."""
        text = torch.tensor([tokens], device=model.device)
        logits = model(text, use_cache=False, **told_positions(model, text)).logits[0].clone()
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
        # Masks behind each draft, and at [0] behind the last certain token.
        masks = [k - 1]
        if blocks:
            # No mask for a token beyond the limit, and none beyond the budget.
            masks = [max(0, min(k - 1, max_new_tokens - len(certain) - i - 1)) for i in range(len(drafts) + 1)]
            fed_again = 1 + len(drafts) if strategy.verify else blocks[-1]
            if drafts and drafts[-1] in stops:
                masks[-1] = 0
            spare = k + strategy.masks if rows is None else rows - fed_again
            masks[-1] = min(masks[-1], spare)
            spare = min(strategy.masks, spare - masks[-1])
            for i in likeliest_ends(sure):
                masks[i] = min(masks[i], spare)
                spare -= masks[i]
        before = prompt + certain
        token, confidence = predict(before + drafts + [mask_token_id] * masks[-1])
        token, confidence = token[len(before) - 1 :], confidence[len(before) - 1 :]
        # token[i] is what follows certain + drafts[:i] for i <= len(drafts), and what the masks propose behind that.
        confirmed = 0
        while confirmed < len(drafts) and token[confirmed] == drafts[confirmed]:
            confirmed += 1
        if confirmed < len(drafts):
            # What comes behind the draft that was refuted is void; the masks behind the one before it count.
            if masks[confirmed]:
                token, confidence = predict(before + drafts[:confirmed] + [mask_token_id] * masks[confirmed])
                token, confidence = token[len(before) - 1 :], confidence[len(before) - 1 :]
            token = token[: confirmed + 1 + masks[confirmed]]
        proposals = range(confirmed, len(token))
        kept = [token[proposals[0]]]
        if strategy.verify or confidence[proposals[0]] > threshold:
            for i in proposals[1:]:
                if confidence[i] <= threshold:
                    break
                kept.append(token[i])
        if strategy.verify:
            going_on = emit(drafts[:confirmed] + kept[:1])
            drafts = kept[1:][: max_new_tokens - len(certain)]
            # What stands behind a stop token is never emitted.
            drafts = drafts[: next((i + 1 for i, token in enumerate(drafts) if token in stops), None)]
            drafts = drafts if rows is None else drafts[: rows - 1]
            sure = confidence[confirmed + 1 :][: len(drafts)]
        else:
            going_on = emit(kept)
        if not going_on:
            return certain, blocks


def likeliest_ends(sure: list[float]) -> list[int]:
    """How many drafts are confirmed before one is refuted: 0 to len(sure) - 1, the most probable first.

    likeliest_ends([0.9, 0.5, 0.5])  # [1, 2, 0]: chances of 0.1, 0.45 and 0.225
    """
    reached, chance = 1.0, []
    for c in sure:
        chance.append(reached * (1 - c))
        reached *= c
    return sorted(range(len(sure)), key=lambda i: -chance[i])
