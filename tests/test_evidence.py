"""Figures of samples, beside sums by hand."""

import pytest

from mtpkern.evidence import acceptance, figures, markdown, paired


def way(tokens, blocks, seconds=1.0, right=True, nll=None):
    return {
        "tokens": tokens,
        "blocks": blocks,
        "finished": True,
        "seconds": seconds,
        "text": "",
        "right": right,
        "nll": nll,
    }


SAMPLES = [
    {
        "row": 0,
        "batch": 0,
        "ways": {
            "static_1": way([1, 2, 3, 4], [1, 1, 1, 1], 4.0, True, 2.0),
            "fast": way([1, 2, 3, 4], [1, 3], 1.0, True, 2.0),
            "original": way([1, 2, 3, 4], [1, 1, 1, 1], 4.0, True, 2.0),
        },
    },
    {
        "row": 1,
        "batch": 1,
        "ways": {
            "static_1": way([1, 2], [1, 1], 4.0, True, 1.0),
            "fast": way([1, 9, 9, 9], [1, 2, 1], 2.0, False, 10.0),
            "original": way([1, 5, 6], [1, 1, 1], 3.0, True, 0.5),
        },
    },
]


def test_figures_by_hand():
    found = figures(SAMPLES)
    fast = found["fast"]
    assert fast["accuracy"] == 0.5
    assert fast["standard_error"] == pytest.approx((0.25 / 2) ** 0.5)
    assert fast["difference_to_plain"] == pytest.approx((-0.5, 0.5))
    assert found["static_1"]["difference_to_original"] == (0, 0)
    assert fast["tokens_per_pass"] == 8 / 5
    assert fast["effective_k"] == (1 + 1.5) / 2
    # 8 tokens in 3 seconds over 6 in 8; of single batches 4 / 1 over 4 / 4, and 4 / 2 over 2 / 4.
    assert fast["wall_clock"] == pytest.approx((8 / 3) / (6 / 8))
    assert fast["wall_clock_median"] == pytest.approx(4.0)
    assert fast["identical_to_plain"] == fast["identical_to_original"] == 0.5
    assert fast["agreeing_prefix_original"] == (4 + 1) / 2
    assert fast["nll_original"] == 12 / 8
    assert "wall_clock" not in found["original"]
    assert "identical_to_plain" not in found["original"]


def test_without_answers_and_original():
    bare = [
        {
            "row": 0,
            "batch": 0,
            "ways": {n: {**w, "right": None, "nll": None} for n, w in s["ways"].items() if n != "original"},
        }
        for s in SAMPLES
    ]
    found = figures(bare)
    assert not {"accuracy", "difference_to_plain", "nll_original", "identical_to_original"} & set(found["fast"])
    assert found["fast"]["identical_to_plain"] == 0.5
    page = markdown(found, "t", {})
    assert "| right |" not in page
    assert "| fast | 1.60 |" in page


def test_scores_between_0_and_1_vary_as_they_do():
    """And not as right and wrong answers of this mean, which vary the most."""
    samples = [{"row": i, "batch": 0, "ways": {"original": way([1], [1], right=x)}} for i, x in enumerate((1, 0.5, 0))]
    found = figures(samples)["original"]
    assert (found["accuracy"], found["standard_error"]) == pytest.approx((0.5, 0.5 / 3**0.5))


def test_acceptance_counts_the_cut_pass_only_as_far_as_it_goes():
    assert acceptance([[1, 3, 1, 2]]) == pytest.approx([1, 2 / 3, 1])
    assert acceptance([[1, 3, 2, 1]]) == pytest.approx([1, 1, 1 / 2])
    assert acceptance([[1], [1, 1, 1]]) == [1]
    assert acceptance([[1]]) == []
    # Only the refusal that was seen counts: the last pass of one token is no refusal of a second.
    assert acceptance([[1, 2, 1], [1, 1, 2]]) == pytest.approx([1, 2 / 3])
    assert acceptance([[1, 2, 1], [1, 2, 2]]) == [1, 1]


def test_paired_differences():
    assert paired([0, 0, 0]) == (0, 0)
    assert paired([1, 0, 0, -1]) == pytest.approx((0, (2 / 3) ** 0.5 / 2))
    assert paired([1]) == (1, 0)


def test_the_page_names_all_ways_and_where_they_come_from():
    page = markdown(figures(SAMPLES), "mine on rows.jsonl", {"commit": "abc"})
    assert page.startswith("# mine on rows.jsonl\n\n- commit: abc\n")
    assert "| fast | 50.00% ± 35.36% | -50.00 ± 50.00 | -50.00 ± 50.00 | 1.60 | 1.25 ± 0.35 | 3.56 (4.00) |" in page
    assert "## Acceptance by position" in page
    assert "\n| fast | 1.000 |" in page
    assert "\n| static_1 | 1.000 |" not in page, "which has no second position"
