"""Objective: online self-distillation of multi-token prediction, one student pass and one teacher pass.

    student pass   tokens, then mask tokens in the spans        -> hidden of every span row, argmax span y'_1 .. y'_K
    teacher pass   the same layout, y'_1 .. y'_{K-1} for masks  -> row j scores what follows x_1..x_i, y'_1..y'_{j-1}
    loss           cross-entropy of student row j against the teacher's row j: its argmax ("hard"), its softmax
                   ("soft"), or against the data's own token without any teacher pass ("gt")

Rows behind an EOS of the student's own span are dropped: the teacher's scores of a text that has ended mean nothing.

Source   arXiv 2602.06019, section on the online self-distillation objective
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtpkern.attention import attention_context, routed
from mtpkern.kernels.distill import distill_loss, head_readout
from mtpkern.kernels.head import Head, Rows
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.span_attention import span_attention
from mtpkern.train.arguments import require_one_of
from mtpkern.train.layout import Layout
from mtpkern.train.prefix import hidden_states, shared_mask
from mtpkern.train.spans import KeptSpans

Target = Literal["hard", "soft", "gt"]
Support = Literal["all", "until_fail"]


@dataclass
class SpanContext:
    """What the attention layers of a training pass need: the layout, and the masks that all layers share."""

    layout: Layout
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    without_dropout: ClassVar[bool] = True

    def prepare(self, window: int | None) -> None:
        """Build the masks without and with the model's window.

        Before the layers run: torch.compile forbids side effects where activations are computed again.
        """
        for each in (None, window):
            shared_mask(self.masks, self.layout.rule, each)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Span attention of one layer: [B, T, Hq, D] (mtpkern.attention.AttentionContext)."""
        return span_attention(query, key, value, self.layout.rule, scoring, mask=self.masks.get(scoring.window))


@dataclass(frozen=True)
class Objective:
    """What a student learns, and which rows of its spans count.

    eos_token_ids  [E] int64: a span ends with the first that the student itself says
    target         the teacher's argmax ("hard") or softmax ("soft"), or "gt", the data's own tokens
    loss_support   "all" rows of a span, or "until_fail": those up to and including the first that misses its target
    eos_padding    False drops the predictions behind the text's end, which else are EOS padding

    Raises ValueError for an unknown target or support.

        Objective(torch.tensor([tokenizer.eos_token_id]), target="gt", loss_support="until_fail")
    """

    eos_token_ids: Tensor
    target: Target = "hard"
    loss_support: Support = "all"
    eos_padding: bool = True

    def __post_init__(self) -> None:
        require_one_of("target", self.target, get_args(Target))
        require_one_of("loss_support", self.loss_support, get_args(Support))

    def valid(self, layout: Layout) -> Tensor:
        """[B, M, K] bool: the predictions of a layout that may count."""
        return layout.valid if self.eos_padding else layout.valid & within_text(layout)

    def before_end(self, token: Tensor) -> Tensor:
        """[..., K] bool: the rows of a span up to and including its first EOS."""
        return until_fail(~torch.isin(token, self.eos_token_ids))

    def rows(self, hidden: Tensor, head: Head, *, of_teacher: bool = False) -> Rows:
        """The rows of spans, with room for a product that the loss needs: the student's, for "soft" the teacher's."""
        if of_teacher and self.target != "soft":
            return Rows(hidden, head)
        return Rows.sharing(hidden, head, products=1 if self.target == "gt" else 2)

    def loss(self, rows: Rows, label: Tensor, wanted: Rows | None, agree: Tensor, keep: Tensor) -> Tensor:
        """Scalar loss of the rows of spans: label, agree, keep [..., K]; wanted: the teacher's, for "soft"."""
        support = keep & until_fail(agree) if self.loss_support == "until_fail" else keep
        weight = support.flatten().float()
        if self.target == "soft":
            return distill_loss(*rows, teacher=wanted, row_weight=weight)
        return distill_loss(*rows, target=label.flatten(), row_weight=weight)


@dataclass(frozen=True)
class MTPLoss:
    """Sums over the rows of a batch, to be divided by counts over all micro-batches and ranks.

    span             scalar loss, summed over the span rows in the loss's support
    prefix, anchor   scalar losses, summed over the text's prefix rows and over its anchor rows
    agree, rows      [K] float: rows whose argmax is the target, and rows that count, by position in the span
    agreeing_prefix  scalar: agreeing rows before the first that does not, summed over spans
    spans            scalar: spans that exist
    confidence       [K] float: sums of the student's top probability
    entropy          [K] float: sums of the entropy of the student's row, in nats
    """

    span: Tensor
    prefix: Tensor
    anchor: Tensor
    agree: Tensor
    rows: Tensor
    agreeing_prefix: Tensor
    spans: Tensor
    confidence: Tensor
    entropy: Tensor


def head_of(model: PreTrainedModel, mask_token_id: int | None) -> Head:
    """The model's head as plain tensors, its mask token banned; scale, cap as Cohere, Granite and Gemma name them."""
    module = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, getattr(module, "bias", None), logit_scale=scale, softcap=softcap, banned=mask_token_id)


def stop_tokens_of(model: PreTrainedModel) -> list[int]:
    """The tokens at which the model's own generation stops."""
    stops = model.generation_config.eos_token_id if model.generation_config else None
    stops = model.config.eos_token_id if stops is None else stops
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def backbone(model: PreTrainedModel, input_ids: Tensor, context: SpanContext) -> Tensor:
    """Final hidden states [B, T, H] of the rows of a layout; the model's attention must be switched to the context."""
    # Qwen2Moe says 0 where no layer has one.
    context.prepare(getattr(model.config.get_text_config(decoder=True), "sliding_window", None) or None)
    return hidden_states(model, input_ids, context.layout.position, context)


@contextmanager
def forward_as(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let model(...) run `forward`, inside the hooks of DDP and FSDP: there the head can be read as a whole weight."""
    attributes = vars(model)  # one of the instance hides the method
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward")
        attributes.update({} if before is None else {"forward": before})


def gather_rows(hidden: Tensor, row: Tensor) -> Tensor:
    """Rows [B, ...] of hidden states [B, T, H], such as those of spans [B, M, K]: [rows of the batch, H]."""
    index = row.flatten(1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).flatten(0, 1)


def by_position(agree: Tensor, keep: Tensor, confidence: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """The sums [K] of MTPLoss over spans [B, M, K], by name."""
    rows = {"agree": agree, "rows": keep, "confidence": confidence * keep, "entropy": entropy * keep}
    return {name: x.float().sum((0, 1)) for name, x in rows.items()}


def within_text(layout: Layout) -> Tensor:
    """[B, M, K] bool: predictions of tokens that the text has, its EOS included."""
    index = layout.prefix.unsqueeze(-1) + torch.arange(layout.row.shape[-1], device=layout.prefix.device)
    return index < layout.end.unsqueeze(-1)


def data_targets(tokens: Tensor, layout: Layout, eos_token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The data's own tokens [B, M, K] for every span, and which of them are known [B, M, K].

    Behind EOS they are EOS; behind the end of a text that was cut off before its EOS they are not known.
    """
    index = layout.prefix.unsqueeze(-1) + torch.arange(layout.row.shape[-1], device=tokens.device)
    last = layout.end.unsqueeze(-1) - 1
    label = tokens.gather(1, torch.minimum(index, last).flatten(1)).view_as(index)
    ended = torch.isin(tokens.gather(1, last.flatten(1)), eos_token_ids).unsqueeze(-1)
    return label, layout.valid & ((index <= last) | ended)


def until_fail(agree: Tensor) -> Tensor:
    """[..., K] bool: the rows of a span up to and including its first that does not agree.

    What stands behind it is a continuation that decoding would drop. Source: accept-until-fail, arXiv 2607.01893.

        until_fail(torch.tensor([True, True, False, True]))  # [True, True, True, False]
    """
    failed = (~agree).int()
    return failed.cumsum(-1) == failed


def mtp_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokens: Tensor,
    context: SpanContext,
    objective: Objective,
    *,
    mask_token_id: int,
    prefix_rows: Tensor | None = None,
    anchor_rows: Tensor | None = None,
    as_teacher: Callable[[], AbstractContextManager] | None = None,
    kept: KeptSpans | None = None,
) -> MTPLoss:
    """The loss sums of one batch; the caller has switched the student's attention to `context` and keeps it so.

    tokens         [B, N] int64, right-padded
    context        the layout of the batch
    objective      whose targets "hard" and "soft" need a teacher
    prefix_rows    [n] int64: rows of the texts [B * N] that also get a next-token loss on the data; none where None
    anchor_rows    [n] int64: rows of the texts that are held to the teacher's distribution, KL(teacher || student), so
                   that ordinary prediction stays what it was; none where None; needs a teacher, for target "gt" too
    as_teacher     where teacher and student are one model: a context that turns the student's adapters off
    kept           takes single spans with the teacher's loss on them, where a teacher reads them

    Each of the three losses holds its own gradient of a trained head, [V, H], until backward. Raises ValueError for a
    missing teacher. Source: arXiv 2602.06019, equations of the hard and soft teacher.

        with attention_context(model, context):
            sums = mtp_loss(model, teacher, tokens, context, Objective(eos), mask_token_id=id)
            (sums.span / sums.rows.sum()).backward()
    """
    target = objective.target
    if teacher is None and target != "gt":
        raise ValueError(f"target {target!r} needs a teacher; pass the frozen original model, or use target 'gt'")
    if teacher is None and anchor_rows is not None:
        raise ValueError("anchor_rows need a teacher; pass the frozen original model, or leave them out")
    layout = context.layout
    states = backbone(student, layout.fill(tokens, mask_token_id), context)
    # Behind the backbone: where weights are sharded, its last norm has gathered the head's.
    head = head_of(student, mask_token_id).narrowed(states)
    rows = objective.rows(gather_rows(states, layout.row), head)
    token, confidence, entropy = (x.view(layout.row.shape) for x in head_readout(*rows))
    valid, of_teacher, teacher_head = objective.valid(layout), None, head

    if target != "gt" or anchor_rows is not None:
        assert teacher is not None
        # The teacher reads the span as text, one token after the other, also where the student's masks see both ways.
        scoring = context if layout.span_end is None else SpanContext(layout.causal())
        said = layout.fill(tokens, token[..., :-1])
        # A model that is its own teacher is held already.
        switch = attention_context if as_teacher is None else routed
        # A call of the whole model, whose weights may be sharded.
        whole = forward_as(teacher, lambda: backbone(teacher, said, scoring))
        with torch.no_grad(), switch(teacher, scoring), (as_teacher or nullcontext)(), whole:
            scored = teacher()
            # In here, where adapters are off: they may have put another in the head's place.
            its_head = head_of(teacher, mask_token_id)
        if its_head.weight is not head.weight:
            teacher_head = its_head.narrowed(scored)
    if target == "gt":
        label, keep = data_targets(tokens, layout, objective.eos_token_ids)
        keep &= valid
    else:
        keep = valid & objective.before_end(token)
        of_teacher = objective.rows(gather_rows(scored, layout.row), teacher_head, of_teacher=True)
        label = head_readout(*of_teacher).token.view_as(token)
        if kept is not None:
            kept.take(token, confidence, keep, *of_teacher[:2])
    agree = (token == label) & keep
    loss = objective.loss(rows, label, of_teacher, agree, keep)
    del rows, of_teacher  # and their products

    prefix_loss, anchor_loss = loss.new_zeros(()), loss.new_zeros(())
    if prefix_rows is not None:
        # Row t predicts token t + 1; the last row has none and is never among them.
        following = tokens.roll(-1, dims=1).flatten()[prefix_rows]
        prefix_loss = distill_loss(_text_rows(states, tokens, prefix_rows), head, target=following)
    if anchor_rows is not None:
        text, of_text = (_text_rows(x, tokens, anchor_rows) for x in (states, scored))
        anchor_loss = distill_loss(text, head, teacher=(of_text, teacher_head))

    return MTPLoss(
        span=loss,
        prefix=prefix_loss,
        anchor=anchor_loss,
        agreeing_prefix=agree.float().cumprod(-1).sum(),
        spans=layout.valid[..., 0].float().sum(),
        **by_position(agree, keep, confidence, entropy),
    )


def _text_rows(states: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Of hidden states [B, T, H] those [n, H] of some rows of the texts [B * N]."""
    return states[:, : tokens.shape[1]].flatten(0, 1).index_select(0, rows)
