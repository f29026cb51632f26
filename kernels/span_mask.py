"""Span mask: the one rule that says which keys a row sees.

Rows and keys of a sequence are laid out as [tokens][span 1][span 2]...: first the real tokens in order, then the
mask tokens, span by span, spans sorted by their prefix. Three integers a row say everything:

    position     the row's place in the text, for RoPE; spans repeat the positions of the tokens behind their prefix
    prefix_end   it sees the real tokens with index < prefix_end
    span_start   it sees its own span, from index span_start up to itself; r + 1 (an empty range) for a real token

    visible(r, j) = lower_r <= j < prefix_end_r   or   span_start_r <= j <= r and j > r - window
    lower_r       = prefix_start_r + max(0, position_r - window + 1)
    prefix_start_r = prefix_end_r - position_r + (r - span_start_r)

`prefix_start` is where the row's document begins when several are packed into one sequence. It needs no fourth
integer: r - span_start counts the row's steps behind its prefix (-1 for the prefix' last token itself), so the prefix
has position - (r - span_start) tokens and ends at prefix_end. A row of padding has prefix_end = 0 and span_start > r:
it sees nothing.

Shapes   position, prefix_end, span_start [..., T] int32;  mask [..., T, T] bool
Source   arXiv 2602.06019, the figures of the mask-replicated layout
"""
