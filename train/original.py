"""What training does to plain decoding, one token a pass: greedy next tokens of held-out answers, before and now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.kernels.distill import head_readout
from mtpkern.model import evaluating
from mtpkern.train.layout import answer_ends
from mtpkern.train.objective import head_of


class Original:
    """The next tokens that a model predicts before it is trained: their ids alone are kept, four bytes each.

    model          as training starts from it
    batches        of `MTPCollator`
    mask_token_id  never predicted; None where it is no row of the head
    max_length     longer texts are cut off

    Texts are told by what is in them: their order and the size of a batch may change.

        original = Original(model, batches, mask_token_id=mask)
        agree, rows = original.agreement(trained, batches).tolist()  # the trained model's tokens that are the same
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any],
        *,
        mask_token_id: int | None,
        max_length: int | None = None,
    ) -> None:
        self.mask_token_id, self.max_length = mask_token_id, max_length
        self.tokens = dict(self._predicted(model, batches))

    def agreement(self, model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> Tensor:
        """Greedy tokens that are the original's, and all [2] float64, of the texts that are known."""
        agree = rows = 0
        for text, now in self._predicted(model, batches):
            if text in self.tokens:
                agree += int((self.tokens[text] == now).sum())
                rows += len(now)
        return torch.tensor([agree, rows], dtype=torch.float64)

    @torch.no_grad()
    def _predicted(self, model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> Iterator[tuple[bytes, Tensor]]:
        """For every text a digest of it and [answer tokens] int32."""
        with evaluating(model):
            for batch in batches:
                ids = batch["input_ids"][:, : self.max_length]
                lengths = torch.as_tensor(batch["lengths"], device="cpu").clamp(max=ids.shape[1])
                prompts = torch.as_tensor(batch["prompt_lengths"], device="cpu")
                answers = answer_ends(lengths, prompts, batch["earlier_answers"], num_tokens=ids.shape[1]) > 0
                # Nothing predicts the first token. Padding stands behind the text, where causal rows do not look.
                answers[:, 0] = False
                batch_index, token_index = answers.nonzero(as_tuple=True)
                hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
                hidden = hidden[batch_index.to(hidden.device), (token_index - 1).to(hidden.device)]
                head = head_of(model, self.mask_token_id)
                token = head_readout(hidden.to(head.weight.dtype), head).token.int().cpu()
                for text, n, answer, found in zip(ids.cpu(), lengths, answers, token.split(answers.sum(1).tolist())):
                    digest = blake2b(text[:n].numpy().tobytes() + answer[:n].numpy().tobytes(), digest_size=16)
                    yield digest.digest(), found
