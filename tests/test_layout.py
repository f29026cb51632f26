"""The paper's figure examples, and the properties that every drawn layout must have."""

import pytest
import torch

from mtpkern.kernels.span_mask import span_mask
from mtpkern.train.layout import (
    answer_ends,
    build_layout,
    draw_k,
    draw_prefixes,
    draw_within,
    main,
    pack,
    stride_prefixes,
    tokens_apart,
)


@pytest.mark.parametrize(
    ("prefixes", "k", "num_tokens", "rows", "positions"),
    [
        # 18 rows, three spans, first prefix of 4: offsets 0 and -2.
        ([4, 8, 12], 3, 12, 18, [4, 5, 8, 9, 12, 13]),
        ([2, 6, 10], 3, 12, 18, [2, 3, 6, 7, 10, 11]),
        # 12 rows: two regions of 6, first prefix of 4 at k = 3, of 2 at k = 5.
        ([4, 8], 3, 8, 12, [4, 5, 8, 9]),
        ([2, 4], 5, 4, 12, [2, 3, 4, 5, 4, 5, 6, 7]),
    ],
)
def test_figures(prefixes, k, num_tokens, rows, positions):
    offset = -2 if prefixes[0] == 2 and k == 3 else 0
    assert stride_prefixes(rows, len(prefixes), k, offset=offset) == prefixes
    layout = build_layout(torch.tensor([prefixes]), torch.tensor([num_tokens]), k, num_tokens=num_tokens)
    assert layout.position.shape == (1, rows)
    assert layout.position[0].tolist() == [*range(num_tokens), *positions]
    mask = span_mask(layout.position, layout.prefix_end, layout.span_start)[0]
    for m, prefix in enumerate(prefixes):
        assert layout.row[0, m, 0] == prefix - 1
        own = [num_tokens + m * (k - 1) + j for j in range(k - 1)]
        assert layout.row[0, m, 1:].tolist() == own
        for j, row in enumerate(own):
            assert mask[row].nonzero().flatten().tolist() == [*range(prefix), *own[: j + 1]]
    for token in range(num_tokens):
        assert mask[token].nonzero().flatten().tolist() == list(range(token + 1))


@pytest.mark.parametrize(
    ("k", "prefixes", "num_tokens"),
    [
        (2, [21, 52, 83, 114, 145], 155),
        (8, [15, 40, 65, 90, 115], 125),
        (16, [7, 24, 41, 58, 75], 85),
    ],
)
def test_the_papers_run(k, prefixes, num_tokens):
    """N = 160, M = 5, as the authors' code lays them out: 32 rows a region at every k; here at offset -10."""
    assert stride_prefixes(160, 5, k, offset=-10) == prefixes
    assert num_tokens == 160 - 5 * (k - 1)
    apart = tokens_apart(160, 5, k)
    assert apart == 32 - (k - 1)
    # The same places drawn, where the offset is counted from the first place that a prefix may have.
    lengths, options = torch.tensor([num_tokens]), {"apart": apart, "seed": 0, "step": 0}
    assert draw_prefixes(lengths, 0 * lengths, k, 5, offset=prefixes[0] - 1, **options)[0].tolist() == prefixes
    layout = build_layout(torch.tensor([prefixes]), lengths, k, num_tokens=num_tokens)
    assert layout.position.shape == (1, 160)
    masks = layout.position[0, num_tokens:].view(5, k - 1)
    assert masks.tolist() == [list(range(i, i + k - 1)) for i in prefixes]
    drawn = [draw_prefixes(lengths, 0 * lengths, k, 5, **options | {"step": s})[0].tolist() for s in range(400)]
    assert {row[0] for row in drawn} == set(range(1, apart + 1))
    for row in drawn:
        # At offset 0 the last of them stands behind the whole text, which leaves nothing to predict.
        assert row == [i if i < num_tokens else 0 for i in range(row[0], row[0] + 5 * apart, apart)]


def test_a_bidirectional_span_begins_with_its_prefix_last_row():
    """The first prediction is made in sight of the masks; the token's own row, which others read, sees tokens only."""
    layout = build_layout(torch.tensor([[1, 3, 0]]), torch.tensor([4]), 3, num_tokens=4, bidirectional=True)
    assert layout.row[0, :2].tolist() == [[4, 5, 6], [7, 8, 9]]
    assert layout.position[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 2, 3, 4, 0, 0, 0]
    mask = span_mask(*layout.rule)[0]
    seen = [row.nonzero().flatten().tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], *[[4, 5, 6]] * 3, *[[0, 1, 7, 8, 9]] * 3, [], [], []]
    # The teacher reads the copy and the span behind it as text.
    seen = [row.nonzero().flatten().tolist() for row in span_mask(*layout.causal().rule)[0, 7:10]]
    assert seen == [[0, 1, 7], [0, 1, 7, 8], [0, 1, 7, 8, 9]]
    # A window counts positions.
    seen = [row.nonzero().flatten().tolist() for row in span_mask(*layout.causal().rule, window=2)[0, 7:10]]
    assert seen == [[1, 7], [7, 8], [8, 9]]
    tokens = torch.tensor([[10, 11, 12, 13]])
    assert layout.fill(tokens, 99).tolist() == [[10, 11, 12, 13, 10, 99, 99, 12, 99, 99, 10, 99, 99]]
    spans = torch.tensor([[[21, 22], [31, 32], [0, 0]]])
    assert layout.causal().fill(tokens, spans)[0, 4:10].tolist() == [10, 21, 22, 12, 31, 32]


def test_fill_puts_the_span_tokens_behind_their_prefix():
    layout = build_layout(torch.tensor([[1, 3]]), torch.tensor([4]), 3, num_tokens=5, mask_rows=6)
    tokens = torch.tensor([[10, 11, 12, 13, 0]])
    assert layout.fill(tokens, 99).tolist() == [[10, 11, 12, 13, 0, 99, 99, 99, 99, 99, 99]]
    spans = torch.tensor([[[21, 22], [31, 32]]])
    assert layout.fill(tokens, spans).tolist() == [[10, 11, 12, 13, 0, 21, 22, 31, 32, 0, 0]]


def test_static_shape_only_adds_padding():
    prefix, lengths = torch.tensor([[2, 4]]), torch.tensor([6])
    tight = build_layout(prefix, lengths, 3, num_tokens=6)
    wide = build_layout(prefix, lengths, 3, num_tokens=6, mask_rows=14)
    for name in ("position", "prefix_end", "span_start"):
        assert torch.equal(getattr(tight, name), getattr(wide, name)[:, :10])
    assert torch.equal(tight.row, wide.row)
    assert not span_mask(wide.position, wide.prefix_end, wide.span_start)[0, 10:].any()


LENGTHS, PROMPTS = torch.tensor([40, 25, 12, 9]), torch.tensor([10, 3, 11, 9])


@pytest.mark.parametrize("options", [{"spacing": "random"}, {"apart": 6}, {"apart": 6, "offset_scope": "rank"}])
def test_drawn_prefixes(options):
    k, seen = 4, set()
    for step in range(60):
        prefix = draw_prefixes(LENGTHS, PROMPTS, k, 5, **options, seed=1, step=step)
        assert prefix.shape == (4, 5)
        for row, length, prompt in zip(prefix.tolist(), LENGTHS.tolist(), PROMPTS.tolist()):
            drawn = [i for i in row if i]
            assert row == sorted(drawn) + [0] * (5 - len(drawn))
            assert len(set(drawn)) == len(drawn)
            assert all(prompt <= i < length for i in drawn)
            seen.update(drawn if length == 40 else ())
        assert not prefix[3].any()  # its prompt is all there is
    assert seen == set(range(10, 40))


def test_stride_keeps_its_period():
    """Every text has its own offset; one that is shorter than the period has one span all the same."""
    lengths, prompts = torch.tensor([40, 40, 14]), torch.tensor([10, 10, 9])
    starts = []
    for step in range(60):
        prefix = draw_prefixes(lengths, prompts, 4, 4, apart=8, seed=0, step=step)
        starts.append(prefix[:, 0].tolist())
        for row in prefix[:2].tolist():
            assert row == [i if i < 40 else 0 for i in range(row[0], row[0] + 32, 8)]
        assert prefix[2, 1:].tolist() == [0, 0, 0]
    first, second, short = zip(*starts)
    assert set(first) == set(second) == set(range(10, 18))
    assert first != second
    assert set(short) == set(range(9, 14))


def test_an_offset_for_all_texts_of_a_rank():
    """One a step, the same in all micro-batches, another on every rank."""

    def draw(**change):
        options = {"apart": 8, "offset_scope": "rank", "seed": 0, "step": 0, "rank": 0}
        return draw_prefixes(LENGTHS[:1].repeat(6), PROMPTS[:1].repeat(6), 4, 4, **options | change)

    offsets = [draw(step=step, rank=rank)[:, 0] - 10 for step in range(40) for rank in (0, 1)]
    assert all(len(set(x.tolist())) == 1 for x in offsets)
    ranks = [int(x[0]) for x in offsets[::2]], [int(x[0]) for x in offsets[1::2]]
    assert set(ranks[0]) == set(ranks[1]) == set(range(8))
    assert ranks[0] != ranks[1]
    assert torch.equal(draw(micro_step=3), draw())


def test_no_span_behind_the_first_that_reaches_the_end():
    """In a range of 9, spans of 4 predictions a period of 2 apart; an offset is taken modulo the period."""
    lengths, prompts = torch.tensor([12]), torch.tensor([3])
    options = {"apart": 2, "seed": 0, "step": 0}
    drawn = [draw_prefixes(lengths, prompts, 4, 6, offset=offset, **options)[0].tolist() for offset in range(3)]
    assert drawn == [[3, 5, 7, 9, 0, 0], [4, 6, 8, 0, 0, 0], [3, 5, 7, 9, 0, 0]]


def test_without_a_prompt_spans_stand_anywhere():
    everywhere = [draw_prefixes(LENGTHS, 0 * PROMPTS, 4, 5, spacing="random", seed=0, step=s) for s in range(30)]
    low = torch.stack(everywhere)[:, 0]
    assert int(low[low > 0].min()) < 10


def test_pure_functions_of_their_arguments():
    def draw(**change):
        arguments = {"seed": 3, "step": 5, "micro_step": 1, "rank": 2} | change
        return draw_prefixes(LENGTHS, PROMPTS, 4, 5, spacing="random", **arguments)

    want = draw()
    torch.manual_seed(99)
    torch.rand(10)
    state = torch.get_rng_state()
    assert torch.equal(draw(), want)
    assert torch.equal(torch.get_rng_state(), state)
    for change in ({"seed": 4}, {"step": 6}, {"micro_step": 2}, {"rank": 1}, {"micro_step": 2, "rank": 1}):
        assert not torch.equal(draw(**change), want), change


def test_k_is_uniform_and_repeats():
    ks = [draw_k(2, 8, seed=0, step=s) for s in range(700)]
    assert ks == [draw_k(2, 8, seed=0, step=s) for s in range(700)]
    assert set(ks) == set(range(2, 9))
    assert all(60 < ks.count(k) < 145 for k in range(2, 9))


def test_errors():
    prefix, lengths = torch.tensor([[2]]), torch.tensor([6])
    with pytest.raises(ValueError, match="k must be"):
        build_layout(prefix, lengths, 0, num_tokens=6)
    with pytest.raises(ValueError, match="mask_rows"):
        build_layout(prefix, lengths, 4, num_tokens=6, mask_rows=2)
    with pytest.raises(ValueError, match="num_tokens"):
        build_layout(prefix, lengths, 4, num_tokens=5)
    with pytest.raises(ValueError, match="k_min"):
        draw_k(3, 2, seed=0, step=0)
    with pytest.raises(ValueError, match="spacing"):
        draw_prefixes(lengths, lengths, 4, 5, spacing="dense", seed=0, step=0)


def test_drawing_runs(capsys):
    main()
    assert capsys.readouterr().out.count("position") == 4


def test_k_of_one_rank_and_a_fixed_offset():
    draws = [[draw_k(2, 16, seed=0, step=step, rank=rank) for step in range(20)] for rank in (0, 1)]
    assert draws[0] != draws[1]
    assert draws[0] == [draw_k(2, 16, seed=0, step=step, rank=0) for step in range(20)]
    lengths, prompts = torch.tensor([30, 22]), torch.tensor([4, 2])
    prefix = draw_prefixes(lengths, prompts, 3, 4, apart=6, offset=1, seed=0, step=0)
    assert prefix.tolist() == [[5, 11, 17, 23], [3, 9, 15, 21]]


@pytest.mark.parametrize("options", [{"spacing": "random"}, {"apart": 7}, {"apart": 7, "offset": 2}])
def test_several_answers_are_drawn_from_like_one(options):
    """One answer gives the spans that it always gave; of several, all tokens are met, and none of the prompts'."""
    met = set()
    several = answer_ends(LENGTHS, PROMPTS, [[(2, 5), (7, 9)], [], [], []], num_tokens=41)
    assert several[0].tolist() == [0, 0, 5, 5, 5, 0, 0, 9, 9, 0, *[40] * 30, 0]
    for step in range(80):
        common = options | {"seed": 1, "step": step}
        one = draw_within(answer_ends(LENGTHS, PROMPTS, [], num_tokens=41) > 0, 4, 5, **common)
        assert torch.equal(one, draw_prefixes(LENGTHS, PROMPTS, 4, 5, **common))
        prefix = draw_within(several > 0, 4, 5, **common)
        # Random keys are drawn for the whole batch, as wide as its widest answers.
        assert torch.equal(prefix[1:], one[1:]) or options == {"spacing": "random"}
        met.update(prefix[0].tolist())
    assert met - {0} <= {2, 3, 4, 7, 8, *range(10, 40)}
    assert "offset" in options or met >= {2, 3, 4, 7, 8, *range(10, 40)}


def test_a_first_token_is_never_predicted_first():
    ends = answer_ends(torch.tensor([3]), torch.tensor([0]), [], num_tokens=3)
    assert draw_within(ends > 0, 2, 3, spacing="random", seed=0, step=0).tolist() == [[1, 2, 0]]


def test_packing_asks_for_no_value_of_the_texts():
    """They lie on a GPU by then, for whose values the host would have to wait; meta tensors have none."""
    layout = build_layout(torch.tensor([[2, 4], [3, 0]]), torch.tensor([6, 5]), 3, num_tokens=7)
    _, (texts,) = pack(layout, torch.empty(2, 7, dtype=torch.int64, device="meta"))
    assert texts.shape == (1, 11)
