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
)


@pytest.mark.parametrize(
    ("prefixes", "k", "num_tokens", "rows", "positions"),
    [
        # 18 rows, three spans, first prefix of 4: offsets 0 and -2.
        (stride_prefixes(3, 3, counting="paper"), 3, 12, 18, [4, 5, 8, 9, 12, 13]),
        (stride_prefixes(3, 3, offset=-2, counting="paper"), 3, 12, 18, [2, 3, 6, 7, 10, 11]),
        # 12 rows, one span.
        ([4], 3, 10, 12, [4, 5]),
        ([2], 5, 8, 12, [2, 3, 4, 5]),
    ],
)
def test_figures(prefixes, k, num_tokens, rows, positions):
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


@pytest.mark.parametrize("spacing", ["stride", "random"])
@pytest.mark.parametrize("counting", ["tokens", "paper"])
def test_drawn_prefixes(spacing, counting):
    k, seen = 4, set()
    for step in range(60):
        prefix = draw_prefixes(LENGTHS, PROMPTS, k, 5, spacing=spacing, counting=counting, seed=1, step=step)
        assert prefix.shape == (4, 5)
        for row, length, prompt in zip(prefix.tolist(), LENGTHS.tolist(), PROMPTS.tolist()):
            drawn = [i for i in row if i]
            assert row == sorted(drawn) + [0] * (5 - len(drawn))
            assert len(set(drawn)) == len(drawn)
            assert all(prompt <= i < length for i in drawn)
            seen.update(drawn if length == 40 else ())
        assert not prefix[3].any()  # its prompt is all there is
    assert seen == set(range(10, 40))


@pytest.mark.parametrize(("counting", "period"), [("tokens", 8), ("paper", 5)])
def test_stride_keeps_its_period(counting, period):
    """Three spans rolled around a range of 30 positions: two gaps are the period, the third is what it leaves over."""
    starts = set()
    for step in range(40):
        prefix = draw_prefixes(LENGTHS[:1], PROMPTS[:1], 4, 3, counting=counting, seed=0, step=step)[0].tolist()
        gaps = sorted((b - a) % 30 for a, b in zip(prefix, [*prefix[1:], prefix[0]]))
        assert gaps == [period, period, 30 - 2 * period]
        starts.add(prefix[0])
    assert len(starts) > 5


def test_no_span_behind_the_first_that_reaches_the_end():
    """A range of 9 holds two spans a period of 8 apart; rolled, they stand side by side."""
    lengths, prompts = torch.tensor([12]), torch.tensor([3])
    drawn = [draw_prefixes(lengths, prompts, 4, 2, offset=offset, seed=0, step=0)[0].tolist() for offset in range(9)]
    assert drawn == [[3, 11], [3, 4], [4, 5], [5, 6], [6, 7], [7, 8], [8, 0], [9, 0], [10, 0]]


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
    prefix = draw_prefixes(lengths, prompts, 3, 4, offset=1, seed=0, step=0)
    assert prefix.tolist() == [[5, 11, 17, 23], [3, 9, 15, 21]]


@pytest.mark.parametrize("options", [{"spacing": "random"}, {}, {"offset": 2}, {"counting": "paper"}])
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
