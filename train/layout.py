"""Layout: where the spans of a training sequence stand, as pure functions of lengths, seed and step.

A sequence of N tokens carries M spans. The span with a prefix of i tokens predicts the K tokens behind it, at the
prefix' last row and at K-1 mask rows, which repeat the positions i .. i+K-2 of the tokens behind the prefix
(replication). Rows are laid out as [tokens][masks of span 1][masks of span 2]..., for mtpkern.kernels.span_mask:

    row                     position    prefix_end   span_start
    token t                 t           t + 1        t + 1
    mask j of span at i     i + j       i            the span's first row
    padding                 0           0            its own index + 1

Where a span is bidirectional, its prefix' last row sees its masks too. That row is laid out once more, at the head of
the span, and makes the span's first prediction; the token's own row sees tokens only, as everywhere:

    copy of token i - 1     i - 1       i - 1        its own index
    mask j of span at i     i + j       i - 1        the copy's index

With stride spacing a sequence of N rows falls into M regions of N/M rows, whatever k is: each holds the k-1 masks of
one span, so that N/M - (k-1) tokens lie between spans. A span that reaches past the last token (EOS) is padded out with
EOS; in a stride it is the last of its sample, while every random prefix is a problem of its own.

Source   arXiv 2602.06019, section on training and the figures of the mask-replicated layout
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mtpkern.kernels.span_mask import Rule, draw_mask
from mtpkern.output import exit_status
from mtpkern.train.arguments import refuse

Spacing = Literal["stride", "random"]
OffsetScope = Literal["sequence", "rank"]


@dataclass(frozen=True)
class Layout:
    """The rows of a batch of B sequences of N tokens with M spans of K predictions; T = N + span rows.

    A span has K - 1 rows of masks behind the tokens; a bidirectional one begins with a copy of its prefix' last row.

    position, prefix_end, span_start   [B, T] int32, see mtpkern.kernels.span_mask
    span_end                           [B, T] int32 where the rows of a span see one another in both directions
    bidirectional                      whether spans begin with such a copy, which stays where span_end is left out
    row                                [B, M, K] int64: the row that makes prediction j of span m
    prefix                             [B, M] int64: tokens before each span, 0 where there is no span
    end                                [B, M] int64: the index behind the last token, EOS, of each span's text
    lengths                            [B] int64: tokens of each sequence, EOS included
    """

    position: Tensor
    prefix_end: Tensor
    span_start: Tensor
    row: Tensor
    prefix: Tensor
    end: Tensor
    lengths: Tensor
    span_end: Tensor | None = None
    bidirectional: bool = False

    @property
    def rule(self) -> Rule:
        """What span_mask and span_attention take."""
        return Rule(self.position, self.prefix_end, self.span_start, self.span_end)

    @property
    def valid(self) -> Tensor:
        """[B, M, K] bool: False for the predictions of spans that do not exist."""
        return (self.prefix > 0).unsqueeze(-1).expand_as(self.row)

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on a device."""
        moved: dict[str, Any] = {name: send(x, device) for name, x in tensors_of(self).items()}
        return replace(self, **moved)

    def causal(self) -> Layout:
        """The same layout, of which every row sees its span up to itself: what a next-token model reads."""
        return replace(self, span_end=None)

    def fill(self, tokens: Tensor, masks: Tensor | int) -> Tensor:
        """Input ids [B, T]: `tokens` [B, N], then in the mask rows one id, or `masks` [B, M, K-1]."""
        batch, spans, k = self.row.shape
        width = k - 1 + self.bidirectional
        ids = tokens.new_full((batch, self.position.shape[1] - tokens.shape[1]), masks if isinstance(masks, int) else 0)
        rows = ids[:, : spans * width].view(batch, spans, width)
        if self.bidirectional:
            rows[..., 0] = tokens.gather(1, (self.prefix - 1).clamp(min=0))
        rows[..., int(self.bidirectional) :] = masks
        return torch.cat([tokens, ids], dim=1)


def tensors_of(parts: Any) -> dict[str, Tensor]:
    """Those of an object's fields that are tensors, by name: `tensors_of(layout)["row"]`."""
    return {name: x for name, x in vars(parts).items() if isinstance(x, Tensor)}


def pinned(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor where a copy to the device runs by itself: in pinned memory, if it has to go from a CPU to a GPU."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        # Contiguous first: an expanded tensor cannot be filled in pinned memory.
        x = x.contiguous().pin_memory()
    return x


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, without waiting for what is queued there."""
    return pinned(x, device).to(device, non_blocking=True)


def build_layout(
    prefix: Tensor,
    lengths: Tensor,
    k: int,
    *,
    num_tokens: int,
    end: Tensor | None = None,
    mask_rows: int | None = None,
    bidirectional: bool = False,
) -> Layout:
    """Lay out spans behind given prefixes.

    prefix         [B, M] prefix lengths in tokens, 1 <= prefix < length; 0 for a span that does not exist
    lengths        [B] tokens of each sequence, EOS included
    k              predictions of a span, at least 1
    num_tokens     N, the padded number of tokens
    end            [B, M] index behind the last token of each span's text; the sequence's length where None
    mask_rows      reserved for spans, M * (k - 1) unless given: with M * (k_max - 1) the shape does not depend on k
    bidirectional  the masks of a span and its prefix' last row see one another in both directions; one row a span more

    Raises ValueError for impossible sizes. Source: arXiv 2602.06019, the figures of the layout.

        build_layout(torch.tensor([[4, 8, 12]]), torch.tensor([12]), 3, num_tokens=12).position.shape  # [1, 18]
    """
    spans = prefix.shape[1]
    # Rows of a span behind the tokens: its masks, and where they are seen from it a copy of its prefix' last row.
    copies = int(bidirectional)
    width = k - 1 + copies
    used = spans * width
    mask_rows = used if mask_rows is None else mask_rows
    rows, longest = "M * k" if bidirectional else "M * (k - 1)", int(lengths.max())
    refuse(
        k < 1 or mask_rows < used,
        f"k must be at least 1 and mask_rows at least {rows} = {used}; got {k} and {mask_rows}",
    )
    refuse(longest > num_tokens, f"num_tokens must be at least the longest length {longest}; got {num_tokens}")
    exists = (prefix > 0).unsqueeze(-1)
    step = torch.arange(width)
    first = num_tokens + torch.arange(spans) * width
    # Predictions of a span: its prefix' last row, or the copy of it, then its masks.
    row = (first[:, None] + step).expand(len(prefix), -1, -1)
    if not bidirectional:
        row = torch.cat([(prefix - 1).clamp(min=0).unsqueeze(-1), row], dim=-1)

    token = torch.arange(num_tokens).expand(len(prefix), -1)
    real = token < lengths[:, None]
    seen = prefix.unsqueeze(-1) - copies
    mask_position = (seen + step).masked_fill(~exists, 0)
    mask_end = seen.masked_fill(~exists, 0).expand_as(mask_position)
    own = torch.where(exists, first[:, None].expand_as(mask_position), row[..., k - width :] + 1)
    stop = torch.where(exists, first[:, None] + width, own)
    spare = torch.zeros(len(prefix), mask_rows - used, dtype=torch.int64)
    spare_row = num_tokens + used + torch.arange(mask_rows - used).expand_as(spare)

    def rows_of(tokens: Tensor, masks: Tensor, spares: Tensor) -> Tensor:
        return torch.cat([tokens, masks.flatten(1), spares], dim=1).int()

    return Layout(
        position=rows_of(token * real, mask_position, spare),
        prefix_end=rows_of((token + 1) * real, mask_end, spare),
        span_start=rows_of(token + 1, own, spare_row + 1),
        span_end=rows_of(token + 1, stop, spare_row + 1) if bidirectional else None,
        bidirectional=bidirectional,
        row=row,
        prefix=prefix,
        # Where there is no span too, `end - 1` is an index.
        end=lengths[:, None].expand_as(prefix) if end is None else torch.where(prefix > 0, end, lengths[:, None]),
        lengths=lengths,
    )


def pack(layout: Layout, *texts: Tensor) -> tuple[Layout, list[Tensor]]:
    """A batch in one row, without padding: the tokens of all its sequences, then the masks of all.

    layout   of B sequences; each becomes a document that sees itself only, its positions counted from 0
    texts    [B, N] each, tokens first, and what goes with them; they come back as [1, sum of lengths]

    Every prediction is what it was: document starts follow from the three integers (mtpkern.kernels.span_mask). For
    the kernel, whose time is that of the visible pairs; the torch form computes all pairs of the long row.

        packed, (tokens, answer) = pack(layout, tokens, answer)
    """
    lengths, N = layout.lengths, texts[0].shape[1]
    batch, spans, k = layout.row.shape
    width = k - 1 + layout.bidirectional
    used = spans * width
    first = (lengths.cumsum(0) - lengths)[:, None]
    total = int(lengths.sum())
    # How far the masks of each sequence move.
    shift = total - N + torch.arange(batch, device=lengths.device)[:, None] * used
    real = torch.arange(N, device=lengths.device) < lengths[:, None]

    def join(x: Tensor, of_tokens: Tensor | int, of_masks: Tensor | int) -> Tensor:
        tokens, masks = x[:, :N] + of_tokens, x[:, N : N + used] + of_masks
        return torch.cat([tokens[real], masks.flatten()])[None].to(x.dtype)

    exists = layout.prefix > 0
    row = layout.row + torch.where(layout.row < N, first[..., None], shift[..., None])
    packed = Layout(
        position=join(layout.position, 0, 0),
        prefix_end=join(layout.prefix_end, first, first * exists.repeat_interleave(width, dim=1)),
        span_start=join(layout.span_start, first, shift),
        span_end=None if layout.span_end is None else join(layout.span_end, first, shift),
        bidirectional=layout.bidirectional,
        row=row.flatten(0, 1)[None],
        prefix=((layout.prefix + first) * exists).flatten()[None],
        end=(layout.end + first).flatten()[None],
        lengths=lengths.sum(0, keepdim=True),
    )
    # Looked for here and not by the mask itself, which would make a device say how many there are.
    index = real.flatten().nonzero().squeeze(1)
    return packed, [x.flatten()[send(index, x.device)][None] for x in texts]


def tokens_apart(num_rows: int, num_spans: int, k: int) -> int:
    """Tokens between neighbouring spans of the paper's stride: of a region's N/M rows all but its span's masks.

    num_rows   N, the spans' masks among them; M regions share them evenly, whatever k is, at least a token each

        tokens_apart(160, 5, 16)  # 17
    """
    return max(1, num_rows // num_spans - (k - 1))


def stride_prefixes(num_rows: int, num_spans: int, k: int, *, offset: int = 0) -> list[int]:
    """Prefix lengths of one span a region: with offset 0 each stands behind all the tokens of its region.

    num_rows   N, the spans' masks among them, as `tokens_apart` takes it
    offset     in tokens, from 1 - tokens_apart(...) to 0

        stride_prefixes(18, 3, 3)             # [4, 8, 12]: 18 rows, of which 12 are tokens
        stride_prefixes(18, 3, 3, offset=-2)  # [2, 6, 10]
    """
    apart = tokens_apart(num_rows, num_spans, k)
    return [(m + 1) * apart + offset for m in range(num_spans)]


def _generator(*parts: int) -> torch.Generator:
    """A CPU generator whose state is a pure function of the parts, not of any global random state."""
    state = 0
    for part in parts:
        # The multiplier of a 64-bit linear congruential generator; one round a part keeps (1, 2) and (2, 1) apart.
        state = (state * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)


def draw_k(k_min: int, k_max: int, *, seed: int, step: int, rank: int | None = None) -> int:
    """k of a training step, uniform on k_min .. k_max; the same for all ranks, or drawn for one of them.

    Raises ValueError unless 1 <= k_min <= k_max. Source: arXiv 2602.06019, training details.
    """
    refuse(not 1 <= k_min <= k_max, f"1 <= k_min <= k_max must hold; got k_min={k_min}, k_max={k_max}")
    parts = (seed, step) if rank is None else (seed, step, rank)
    return int(torch.randint(k_min, k_max + 1, (), generator=_generator(*parts)))


def draw_prefixes(
    lengths: Tensor,
    prompt_lengths: Tensor,
    k: int,
    num_spans: int | Tensor,
    *,
    spacing: Spacing = "stride",
    apart: int | None = None,
    offset: int | None = None,
    offset_scope: OffsetScope = "sequence",
    seed: int,
    step: int,
    micro_step: int = 0,
    rank: int = 0,
) -> Tensor:
    """Draw the prefixes of a batch: [B, M] int64, ascending where they exist, 0 where one does not.

    lengths, prompt_lengths   [B] tokens, EOS included; a prefix lies in [prompt_length, length - 1], at least 1: at
                              least one token is left to predict
    num_spans                 of every text, or [B] of each; M is the largest
    spacing                   "stride": a grid at a random offset, and no span behind the first that reaches the last
                              token; "random": positions drawn without replacement
    apart                     tokens between the spans of a stride (`tokens_apart`); unless given, as many regions as
                              the text has spans share its range evenly, so that none of them is lost
    offset                    of the first span of a stride, in tokens behind the range's start, modulo the grid's
                              period; drawn where None, so that every place is as likely as any other
    offset_scope              who shares a drawn offset: a "sequence" has its own, or all sequences of a "rank" in all
                              micro-batches of a step have one

    A pure function of its arguments. Raises ValueError for an unknown spacing. Source: arXiv 2602.06019.
    """
    refuse(spacing not in ("stride", "random"), f"spacing must be 'stride' or 'random'; got {spacing!r}")
    together = offset_scope == "rank" and spacing == "stride"
    generator = _generator(seed, step, 0 if together else micro_step, rank, 1)
    low = prompt_lengths.clamp(min=1)
    room = (lengths - low).clamp(min=0)
    count = torch.as_tensor(num_spans).expand_as(room)
    most = int(count.max())
    span = torch.arange(most)
    if spacing == "stride":
        # Of a region in parts of a token, `count` of them, so that every place is as likely as any other.
        region = torch.maximum(room, count) if apart is None else apart * count
        # A range that is shorter than a region has one span all the same.
        period = torch.minimum(region, (room * count).clamp(min=1))
        if offset is not None:
            first = offset * count % period
        elif together:
            first = (torch.rand((), generator=generator, dtype=torch.float32) * region).long() % period
        else:
            first = (torch.rand(len(lengths), generator=generator, dtype=torch.float32) * period).long()
        prefix = low[:, None] + (first[:, None] + span * region[:, None]) // count[:, None]
        exists = (prefix < lengths[:, None]) & (span < count[:, None])
    else:
        width = int(room.max()) if len(room) else 0
        key = torch.rand(len(lengths), width, generator=generator, dtype=torch.float32)
        key = key.masked_fill(torch.arange(width) >= room[:, None], 2.0)
        drawn = key.argsort(dim=1)[:, :most]
        prefix = torch.zeros(len(lengths), most, dtype=torch.int64)
        prefix[:, : drawn.shape[1]] = low[:, None] + drawn
        exists = span < torch.minimum(room, count)[:, None]
    # Ascending, the missing ones last.
    end = torch.iinfo(torch.int64).max
    prefix = prefix.masked_fill(~exists, end).sort(dim=1).values
    missing = prefix == end
    if spacing == "stride":
        # Regions may be narrower than k.
        missing[:, 1:] |= prefix[:, :-1] >= lengths[:, None] - k
    return prefix.masked_fill(missing, 0)


def answer_ends(
    lengths: Tensor, prompt_lengths: Tensor, earlier: Sequence[Sequence[tuple[int, int]]], *, num_tokens: int
) -> Tensor:
    """[B, N] int64: for every token of an answer the index behind that answer's last, 0 for all other tokens.

    lengths, prompt_lengths   [B] tokens; what stands behind the prompt is the last answer
    earlier                   (start, end) of further answers of each sequence, in front of its prompt's end

        answer_ends(torch.tensor([6]), torch.tensor([4]), [[(1, 3)]], num_tokens=7)  # [[0, 3, 3, 0, 6, 6, 0]]
    """
    index = torch.arange(num_tokens)
    last = (index >= prompt_lengths[:, None]) & (index < lengths[:, None])
    ends = lengths[:, None] * last
    for row, length, ranges in zip(ends, lengths.tolist(), earlier):
        for start, end in ranges:
            row[start : min(end, length)] = min(end, length)
    return ends


def draw_within(among: Tensor, k: int, num_spans: int | Tensor, **options: Any) -> Tensor:
    """`draw_prefixes` for texts of which any tokens may count: [B, M] int64.

    among     [B, N] bool: the tokens that a span may predict first, counted through as if they stood in a row; the
              very first token of a sequence is never one, since a prefix has at least one token
    options   of `draw_prefixes`
    """
    among = among.clone()
    among[:, :1] = False
    count = among.sum(1)
    nth = draw_prefixes(count + 1, torch.ones_like(count), k, num_spans, **options)
    # The n-th token that counts, counted from 1.
    index = (~among).int().argsort(dim=1, stable=True)
    return index.gather(1, (nth - 1).clamp(min=0)).masked_fill(nth == 0, 0)


def main() -> None:
    """Draw the four examples of the paper's figures."""
    for rows, spans, k, offset in ((18, 3, 3, 0), (18, 3, 3, -2), (12, 2, 3, 0), (12, 2, 5, 0)):
        prefixes, num_tokens = stride_prefixes(rows, spans, k, offset=offset), rows - spans * (k - 1)
        layout = build_layout(torch.tensor([prefixes]), torch.tensor([num_tokens]), k, num_tokens=num_tokens)
        title = f"{rows} rows, k = {k}, {spans} regions of {rows // spans} rows, offset {offset}"
        print(title, draw_mask(layout.position[0], layout.prefix_end[0], layout.span_start[0]), sep="\n", end="\n\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
