"""Training of a gated adapter: the prefix once and without gradient, then the mask rows alone behind it.

    prefix pass    the tokens, adapters off           -> keys and values of every layer, hidden states; no gradient;
                   for texts of which they are not kept (mtpkern.train.prefix)
    mask pass      the mask rows, all of them adapted -> each sees the prefix' keys up to its own, and its own span
    scoring pass   y'_1 .. y'_{K-1} in the masks' places, adapters off, no gradient; for "hard" and "soft" only

Nothing that the adapter changes reaches the prefix: its keys and values are constants which student and teacher share.
Row 1 of a span is the base's own prediction: it has no loss and no place in the means, but an agreeing prefix counts
it. On the base's own greedy text the teacher's argmax is the data as long as the rows before were right, so "gt" with
"until_fail" needs no scoring pass and learns the same.

Source   gated LoRA: arXiv 2507.11851; adapters on mask rows behind a shared prefix: arXiv 2604.11035
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtpkern.adapter import gate_of
from mtpkern.kernels.distill import head_readout
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention
from mtpkern.model import at_rest
from mtpkern.train.layout import Layout
from mtpkern.train.objective import MTPLoss, Objective, by_position, data_targets, gather_rows, head_of
from mtpkern.train.prefix import Layers, Packing, Prefixes, Text, hidden_states, shared_mask, texts_of
from mtpkern.train.spans import KeptSpans


@dataclass
class BehindPrefixContext:
    """Attention of the rows behind the tokens: each sees the prefix' keys up to its own prefix' end, and its own span.

    layout   of the batch
    texts    of the batch, or their packing; read from the layout, which then lies on the host, unless given
    layers   the prefix' keys and values by layer [B, Hkv, N, D]; constants
    """

    layout: Layout
    texts: list[Text] | Packing | None = None
    layers: Layers = field(default_factory=dict)
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    without_dropout: ClassVar[bool] = True

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Span attention of the last rows of one layer: [B, T - N, Hq, D] (mtpkern.attention.AttentionContext)."""
        before = self.layers[layer]
        key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        mask = shared_mask(self.masks, self.layout.rule, scoring.window, before[0].shape[2])
        return span_attention(query, key, value, self.layout.rule, scoring, mask=mask)


def gated_loss(
    model: PreTrainedModel,
    tokens: Tensor,
    context: BehindPrefixContext,
    objective: Objective,
    *,
    prefixes: Prefixes | None = None,
    kept: KeptSpans | None = None,
    random: Collection[nn.Module] = (),
) -> MTPLoss:
    """The loss sums of one batch, of the adapters and the mask token's row; the gate is open for training around it.

    model      carries a gated adapter (`mtpkern.train.lora.add_gated_lora`); its weights are frozen
    tokens     [B, N] int64, right-padded
    context    of the batch's layout, at least two predictions a span; the prefix' keys are put into it. The caller
               keeps it and the gate open around backward
    kept       takes single spans, without their row 1, with the base's loss on them; against "gt" for one more pass
    prefixes   what is kept of texts from step to step, with states for "hard" and "soft"; nothing where None
    random     the model's parts that drop at random (`random_in_training`): they rest while the base reads

    Rows and agreement of the result leave out row 1 of the spans, which is the base's own. Raises ValueError for a
    model without a gate. Source: arXiv 2507.11851.

        context = BehindPrefixContext(layout)
        with attention_context(model, context), gate_of(model).open_for_training():
            sums = gated_loss(model, tokens, context, Objective(eos, "gt", "until_fail"))
            (sums.span / sums.rows.sum()).backward()
    """
    gate = gate_of(model)
    if gate is None:
        raise ValueError(f"{type(model).__name__} carries no gated adapter; give it one with add_gated_lora")
    layout, N = context.layout, tokens.shape[1]
    k = layout.row.shape[-1]
    if k < 2:
        raise ValueError(f"a span must have at least two predictions, of which the first is the base's own; got {k}")
    if prefixes is None:
        prefixes = Prefixes(states=objective.target != "gt")
    texts = texts_of(layout, N) if context.texts is None else context.texts

    @contextmanager
    def base() -> Iterator[None]:
        with gate.closed(), at_rest(random), torch.no_grad():
            yield

    with base():
        context.layers, text = prefixes.of(model, tokens, texts)

    ids = tokens.new_full((len(tokens), layout.position.shape[1] - N), gate.mask_token_id)
    positions = layout.position[:, N:]
    states = hidden_states(model, ids, positions, context)
    head = head_of(model, None).narrowed(states)
    places = (layout.row[..., 1:] - N).flatten(1)
    rows = objective.rows(gather_rows(states, places), head)
    token, confidence, entropy = (x.view(layout.row[..., 1:].shape) for x in head_readout(*rows))
    valid = objective.valid(layout)

    def read(first: Tensor) -> tuple[Tensor, Tensor]:
        """The base's states on the student's spans behind first tokens [B, M], and which rows stand before an end."""
        said = torch.cat([first.unsqueeze(-1), token], dim=-1)
        fed = layout.fill(tokens, said[..., :-1])[:, N:]
        return gather_rows(hidden_states(model, fed, positions, context), places), objective.before_end(said)[..., 1:]

    of_teacher = None
    if objective.target == "gt":
        label, keep = data_targets(tokens, layout, objective.eos_token_ids)
        first, label, keep = label[..., 0], label[..., 1:], (keep & valid)[..., 1:]
        if kept is not None and not kept.full:
            # Learning needs no teacher here; the base is at hand, and reads what is kept.
            with base():
                seen, before_end = read(first)
                kept.take(token, confidence, keep & before_end, seen, head)
    else:
        assert text is not None
        with base():
            own = head_readout(gather_rows(text, layout.row[..., 0]), head).token.view(layout.prefix.shape)
            wanted, before_end = read(own)
            of_teacher = objective.rows(wanted, head, of_teacher=True)
            label = head_readout(*of_teacher).token.view_as(token)
        keep = valid[..., 1:] & before_end
        if kept is not None:
            kept.take(token, confidence, keep, wanted, head)
    agree = (token == label) & keep
    loss = objective.loss(rows, label, of_teacher, agree, keep)
    exists, zero = layout.valid[..., 0], loss.new_zeros(())
    return MTPLoss(
        span=loss,
        prefix=zero,
        anchor=zero,
        agreeing_prefix=((1 + agree.float().cumprod(-1).sum(-1)) * exists).sum(),
        spans=exists.float().sum(),
        **{name: F.pad(x, (1, 0)) for name, x in by_position(agree, keep, confidence, entropy).items()},
    )
