"""What samples say: accuracy, paired differences, tokens a pass, acceptance, time, nearness to an original.

A sample is one prompt decoded in several ways, as a line of an evaluation's samples.jsonl holds it:

    {"row": 0, "batch": 0, "ways": {name: {"tokens", "blocks", "finished", "seconds", "text", "right", "nll"}}}

    right    whether the answer is, or a score from 0 to 1; None where the data has no expected answers
    nll      nats of all its tokens under the original model, None where there is none
    seconds  the batch's time over its prompts

ORIGINAL is the way of the original model, one token a pass; every other way is one of the model that is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from mtpkern.compare import Completion, Tally

ORIGINAL = "original"
PLAIN = "static_1"

Sample = Mapping[str, Any]


def figures(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """The figures of every way of the samples, by name; a figure that the samples do not hold is left out.

    accuracy, standard_error           of right answers, binomial; of scores between 0 and 1 their mean's
    difference_to_plain, ..._original  mean and standard error of the paired differences in right answers
    tokens_per_pass, effective_k       pooled, and the paper's, ± effective_k_deviation (mtpkern.compare.sample_k)
    acceptance                         by position, see `acceptance`
    tokens_per_second, wall_clock      the latter over one token a pass in the same turns: pooled, median of batches
    identical_to_plain, ..._original   share of prompts answered in the same tokens
    agreeing_prefix_original           tokens of the answer before the first that is another, mean over prompts
    nll_original                       nats a token under the original model, pooled
    finished                           share that ended before the limit

        figures(samples)["verified"]["tokens_per_pass"]
    """
    names = list(samples[0]["ways"])
    return {name: _figures(samples, name) for name in names}


def _figures(samples: Sequence[Sample], name: str) -> dict[str, Any]:
    mine = [sample["ways"][name] for sample in samples]
    tally = Tally()
    completions = [Completion(way["tokens"], way["blocks"]) for way in mine]
    tally.add(completions, sum(bool(way["right"]) for way in mine), sum(way["seconds"] for way in mine))
    k, deviation = tally.effective_k
    found: dict[str, Any] = {"problems": tally.problems, "finished": mean(way["finished"] for way in mine)}
    scores = [way["right"] for way in mine]
    if None not in scores:
        binary = all(score in (0, 1) for score in scores)
        error = tally.standard_error if binary else paired(scores)[1]
        found |= {"accuracy": mean(scores), "standard_error": error}
    found |= {
        "tokens": tally.tokens,
        "passes": tally.passes,
        "tokens_per_pass": tally.tokens_per_pass,
        "effective_k": k,
        "effective_k_deviation": deviation,
        "acceptance": acceptance(way["blocks"] for way in mine),
        "tokens_per_second": tally.tokens_per_second,
    }
    if name != ORIGINAL:
        found["wall_clock"], found["wall_clock_median"] = _wall_clock(samples, name)
    for other in (PLAIN, ORIGINAL):
        if other == name or other not in samples[0]["ways"] or (name, other) == (ORIGINAL, PLAIN):
            continue
        theirs = [sample["ways"][other] for sample in samples]
        suffix = "plain" if other == PLAIN else "original"
        found[f"identical_to_{suffix}"] = mean(a["tokens"] == b["tokens"] for a, b in zip(mine, theirs))
        if other == ORIGINAL:
            found["agreeing_prefix_original"] = mean(_agreeing(a["tokens"], b["tokens"]) for a, b in zip(mine, theirs))
        if None not in scores and all(way["right"] is not None for way in theirs):
            found[f"difference_to_{suffix}"] = paired([a["right"] - b["right"] for a, b in zip(mine, theirs)])
    scored = [way for way in mine if way["nll"] is not None]
    if scored:
        found["nll_original"] = sum(way["nll"] for way in scored) / sum(len(way["tokens"]) for way in scored)
    return found


def _agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences of pairs, and its standard error (0 of one pair).

    paired([1, 0, 0, -1])  # (0.0, 0.408...)
    """
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return mean(differences), error


def acceptance(samples: Iterable[Sequence[int]]) -> list[float]:
    """How often a pass that emitted j - 1 tokens emitted a j-th, for j = 1, 2, ... up to the largest pass.

    samples: the blocks of each. The first pass of a sample, the prefill, predicts one token and is left out; of the
    last, which a stop token or the limit cuts, counts what it emitted, and not that it emitted no more.

        acceptance([[1, 3, 1, 2]])  # [1.0, 0.666..., 1.0]: two of three had a 2nd token; the last was cut there
    """
    counts = list(samples)
    k = max((max(blocks[1:], default=0) for blocks in counts), default=0)
    kept, met = [0] * k, [0] * k
    for blocks in counts:
        for i, n in enumerate(blocks[1:], 1):
            for j in range(n):
                kept[j] += 1
                met[j] += 1
            if n < k and i < len(blocks) - 1:
                met[n] += 1
    return [a / b for a, b in zip(kept, met)]


def _wall_clock(samples: Sequence[Sample], name: str) -> tuple[float, float]:
    """Tokens per second over those of one token a pass: of all batches together, and the median of each one's."""
    batches: dict[int, list[Sample]] = {}
    for sample in samples:
        batches.setdefault(sample["batch"], []).append(sample)
    ratios = [_rate(batch, name) / _rate(batch, PLAIN) for batch in batches.values()]
    return _rate(samples, name) / _rate(samples, PLAIN), median(ratios)


def _rate(samples: Sequence[Sample], name: str) -> float:
    """Tokens per second of a way."""
    mine = [sample["ways"][name] for sample in samples]
    return sum(len(way["tokens"]) for way in mine) / sum(way["seconds"] for way in mine)


_COLUMNS = {
    "accuracy": ("right", lambda f: f"{f['accuracy']:.2%} ± {f['standard_error']:.2%}"),
    "difference_to_plain": ("− one a pass", lambda f: _points(f["difference_to_plain"])),
    "difference_to_original": ("− original", lambda f: _points(f["difference_to_original"])),
    "tokens_per_pass": ("tokens a pass", lambda f: f"{f['tokens_per_pass']:.2f}"),
    "effective_k": ("Eff. k", lambda f: f"{f['effective_k']:.2f} ± {f['effective_k_deviation']:.2f}"),
    "wall_clock": ("× one a pass", lambda f: f"{f['wall_clock']:.2f} ({f['wall_clock_median']:.2f})"),
    "identical_to_plain": ("identical to one a pass", lambda f: f"{f['identical_to_plain']:.1%}"),
    "identical_to_original": ("to the original's", lambda f: f"{f['identical_to_original']:.1%}"),
    "agreeing_prefix_original": ("agreeing prefix", lambda f: f"{f['agreeing_prefix_original']:.1f}"),
    "nll_original": ("original's NLL", lambda f: f"{f['nll_original']:.4f}"),
    "finished": ("finished", lambda f: f"{f['finished']:.0%}"),
}


def _points(difference: Sequence[float]) -> str:
    return f"{100 * difference[0]:+.2f} ± {100 * difference[1]:.2f}"


def markdown(found: Mapping[str, Mapping[str, Any]], title: str, facts: Mapping[str, str]) -> str:
    """The figures as a page: what made them, a row a way, and below it acceptance by position.

    markdown(figures(samples), "mine on problems.jsonl", {"hardware": "..."})
    """
    columns = [name for name in _COLUMNS if any(name in f for f in found.values())]
    rows = [[way, *(_COLUMNS[c][1](f) if c in f else "" for c in columns)] for way, f in found.items()]
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += _grid(["way", *(_COLUMNS[c][0] for c in columns)], rows)
    lines += [
        "",
        "± is a standard error, behind Eff. k a standard deviation; differences are paired, in points. Tokens a pass = "
        "tokens emitted / passes, the prefill counted; Eff. k = mean over prompts of each one's mean k, its last pass "
        "left out. × one a pass: tokens per second over those of static:1 by the same code in the same turns, in "
        "brackets the median of batches. NLL in nats a token.",
    ]
    several = {way: f["acceptance"] for way, f in found.items() if len(f["acceptance"]) > 1}
    if several:
        k = max(map(len, several.values()))
        lines += ["", "## Acceptance by position, where the positions before were accepted", ""]
        body = [[way, *(f"{a:.3f}" for a in values), *[""] * (k - len(values))] for way, values in several.items()]
        lines += _grid(["way", *map(str, range(1, k + 1))], body)
    return "\n".join(lines) + "\n"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
