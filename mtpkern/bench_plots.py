"""Figures of benchmarks' results, for `mtpkern plot`: of mtpkern.bench.throughput and mtpkern.bench.real.

throughput.png  tokens a second in all against those of each sequence, a panel a context, a line a way masks are right
real.png        how many tokens a pass each held-out prompt brought
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtpkern.training_plots import drawn


def masks_right(one: Mapping[str, Any]) -> str:
    """How often masks of a record were right, as it is told: by a name, or of older results by the chance of each."""
    return str(one["right"]) if "right" in one else f"{one['chance']:.0%}"


def throughput(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a record, and one for plain decoding; a pass's time is what a user waits for its tokens."""
    rows = []
    for table in results.get("tables", ()):
        for one in table["records"]:
            if not {"B", "chance", "tokens_a_second", "ratio", "tokens_a_pass"} <= one.keys():
                continue
            B, rate = one["B"], one["tokens_a_second"]
            asked = {"batch": B, "context": one.get("context", ""), "masks_right": masks_right(one)}
            # In the same turns, one token a pass besides.
            both = ("Verified", one["tokens_a_pass"], rate), ("one a pass", 1.0, rate / one["ratio"])
            for of, passed, second in both:
                speed = {"tokens_a_second": second, "tokens_a_second_each": second / B}
                rows.append({**asked, "of": of, "tokens_a_pass": passed, **speed})
    return rows


def draw_throughput(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Throughput against what each sequence gets, batch by batch: a panel a context."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    labels, size = ["tokens a second in all", *[""] * (len(contexts) - 1)], (max(7, 4.2 * len(contexts)), 4.5)
    with drawn(path, "tokens a second of each sequence", *labels, size=size) as panels:
        for axes, context in zip(panels, contexts):
            axes.set_title(f"context of {context} tokens" if context else "", fontsize="small")
            rights = list(dict.fromkeys(row["masks_right"] for row in rows if row["context"] == context))
            for of, right in [("one a pass", rights[0]), *(("Verified", right) for right in rights)]:
                line = (of, context, right)
                mine = [row for row in rows if (row["of"], row["context"], row["masks_right"]) == line]
                mine.sort(key=lambda row: row["batch"])
                each, total = [row["tokens_a_second_each"] for row in mine], [row["tokens_a_second"] for row in mine]
                axes.plot(each, total, marker="o", label=of if of == "one a pass" else f"{of}, masks right: {right}")
                for row, x, y in zip(mine, each, total):
                    axes.annotate(f" {row['batch']}", (x, y), fontsize="x-small")
            axes.set_yscale("log")
        panels[0].legend(fontsize="small", title="numbers: sequences side by side", title_fontsize="x-small")


def real(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a held-out prompt: its mean k."""
    return [
        {"prompts": row["prompts"], "batch_size": row["batch_size"], "prompt": i, "mean_k": k}
        for row in results.get("rows", ())
        for i, k in enumerate(row["tallies"]["ours"]["sample_ks"])
    ]


def draw_real(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A histogram for each kind of prompts."""
    kinds = dict.fromkeys(row["prompts"] for row in rows)
    means = [[row["mean_k"] for row in rows if row["prompts"] == kind] for kind in kinds]
    with drawn(path, "tokens a pass, mean of a prompt", "prompts") as (axes,):
        axes.hist(means, bins=20, label=list(kinds))
        axes.legend()
