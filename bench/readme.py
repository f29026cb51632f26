"""Tables of results in README, docs and cards, made from bench/results: `python -m mtpkern.bench.readme`, or --check.

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; NAME is a function of `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtpkern import ASSETS
from mtpkern.bench.report import RESULTS
from mtpkern.bench_plots import masks_right
from mtpkern.evidence import ORIGINAL
from mtpkern.output import exit_status

README = Path(__file__).resolve().parents[1] / "README.md"
DOCS = README.parent / "docs"
FIGURES, PERFORMANCE, QUALITY = DOCS / "figures" / "README.md", DOCS / "performance.md", DOCS / "quality.md"
CARDS = (ASSETS / "README.md", ASSETS / "smollm2" / "README.md")
COMMAND = "python -m mtpkern.bench.readme"
Rows = list[tuple[str, ...]]


def decode_table(results: Mapping[str, Any]) -> Rows:
    """The shipped checkpoint, one prompt at a time, at the thresholds that were chosen on other problems."""
    rows: Rows = [("decoding", "accuracy", "tokens per pass", "wall-clock ratio")]
    ways = [("hf_generate", "`model.generate`")]
    for kind in ("ConfAdapt", "Verified"):
        k, threshold = (results["chosen"][kind.lower()][name] for name in ("k", "threshold"))
        ways.append((f"{kind}({k}, {threshold})", f"`{kind}(k={k}, threshold={threshold})`"))
    for name, label in ways:
        figures = results["accuracy"][name]
        plain = name == "hf_generate"
        same = not plain and figures["identical_to_hf_greedy"] == figures["problems"]
        accuracy = f"{figures['accuracy']:.1%}".replace("%", " %") + (", the same tokens" if same else "")
        tokens, ratio = figures["tokens_per_pass"], results["speed_batch_1"][name]["ratio"]["median"]
        rows.append((label, accuracy, "1" if plain else f"{tokens:.2f}", "1" if plain else f"{ratio:.1f}"))
    return rows


def real_table(results: Mapping[str, Any]) -> Rows:
    """SmolLM2 with its adapter; seconds are sums over all prompts."""
    names = {"gsm_symbolic": "problems of unseen templates", "general": "general instructions on unseen subjects"}
    rows: Rows = [("held-out prompts, float32, a CPU", "at a time", "identical to HF greedy", "tokens a pass")]
    timed = all("hf_generate" in row["tallies"] for row in results["rows"])
    for row in results["rows"]:
        ours, theirs = row["tallies"]["ours"], row["tallies"].get("hf_generate")
        same = f"{ours['right']} of {ours['problems']}"
        rows.append((names[row["prompts"]], str(row["batch_size"]), same, f"{ours['tokens'] / ours['passes']:.2f}"))
        if timed:
            rows[-1] += (f"{(ours['tokens'] / ours['seconds']) / (theirs['tokens'] / theirs['seconds']):.2f}",)
    rows[0] += ("wall-clock against HF `generate`",) if timed else ()
    return rows


def throughput_table(results: Mapping[str, Any]) -> Rows:
    """Tokens a second of each sequence and of all, by how often a mask is right and by sequences side by side."""
    rows: Rows = [("sequences", "masks right", "tokens a pass", "tokens/s of each", "tokens/s in all", "× one a pass")]
    for one in results["tables"][0]["records"]:
        rate = one["tokens_a_second"]
        right, tokens, each = masks_right(one), f"{one['tokens_a_pass']:.2f}", f"{rate / one['B']:.0f}"
        rows.append((str(one["B"]), right, tokens, each, f"{rate:.0f}", f"{one['ratio']:.2f}"))
    return rows


def concurrency_table(results: Mapping[str, Any]) -> Rows:
    """A row a context and batch: for each way masks are right, tokens a pass and the ratio to one token a pass."""
    records = results["tables"][0]["records"]
    ways = list(dict.fromkeys(masks_right(one) for one in records))
    rows: Rows = [("context", "sequences", *(f"masks right: {way}" for way in ways))]
    found: dict[tuple[int, int], dict[str, str]] = {}
    for one in records:
        said = f"{one['ratio']:.2f} at {one['tokens_a_pass']:.2f}"
        found.setdefault((one["context"], one["B"]), {})[masks_right(one)] = said
    rows += [(f"{context:,}", str(B), *(cells.get(way, "") for way in ways)) for (context, B), cells in found.items()]
    return rows


def shipped_table(results: Mapping[str, Any]) -> Rows:
    """The shipped checkpoint in every way of docs/figures."""
    rows: Rows = [("way", "right", "tokens a pass", "Eff. k", "speed")]
    for way, f in results["figures"].items():
        right = f"{f['accuracy']:.1%} ± {f['standard_error']:.1%}".replace("%", " %")
        rows.append((way, right, f"{f['tokens_per_pass']:.2f}", f"{f['effective_k']:.2f}", f"{f['wall_clock']:.2f}"))
    return rows


def real_eval_table(results: Mapping[str, Any]) -> Rows:
    """SmolLM2 with its adapter in every way: right answers, and how far they are the original's."""
    header = ("way", "right", "identical to the original", "agreeing prefix, tokens", "original's NLL", "tokens a pass")
    rows: Rows = [header]
    for way, f in results["figures"].items():
        right = f"{100 * f['accuracy']:.1f} ± {100 * f['standard_error']:.1f} %"
        near = ("", "")
        if way != ORIGINAL:
            near = f"{100 * f['identical_to_original']:.1f} %", f"{f['agreeing_prefix_original']:.1f}"
        rows.append((way, right, *near, f"{f['nll_original']:.3f}", f"{f['tokens_per_pass']:.2f}"))
    return rows


def acceptance_table(results: Mapping[str, Any]) -> Rows:
    """By position, of the ways of docs/figures that do not keep all."""
    kept = {way: f["acceptance"] for way, f in results["figures"].items() if not way.startswith("static")}
    most = max(map(len, kept.values()))
    rows: Rows = [("way", *map(str, range(2, most + 1)))]
    return rows + [(way, *(f"{x:.2f}" for x in a[1:]), *[""] * (most - len(a))) for way, a in kept.items()]


TABLES: dict[str, Callable[[Mapping[str, Any]], Rows]] = {"decode": decode_table, "throughput": throughput_table}
TABLES |= {"real": real_table, "real_by_load": real_table, "concurrency": concurrency_table}
TABLES |= {"shipped": shipped_table, "acceptance": acceptance_table, "real_eval": real_eval_table}
# Those that do not bear the table's name.
_FILES = {"throughput": "h200/throughput.json", "concurrency": "cpu/throughput.json"}
_FILES |= {"real": "masks36/real.json", "real_by_load": "avx512/float32/real_by_load.json"}
_FILES |= dict.fromkeys(("shipped", "acceptance"), "../../docs/figures/results.json")


def rewritten(text: str, folder: Path = RESULTS) -> str:
    """The text with every table between markers as the results in the folder have it. ValueError for an unknown name.

    rewritten(README.read_text())
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"README asks for results {name!r}; there are {', '.join(TABLES)}")
        rows = TABLES[name](json.loads((folder / _FILES.get(name, f"{name}.json")).read_text(encoding="utf-8")))
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        body = "\n".join(lines)
        return f"<!-- results: {name} -->\n{body}\n<!-- end of results -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end of results -->", table, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or with --check say by the exit status whether they are those of the results."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    args = parser.parse_args(argv)
    for page in (README, FIGURES, PERFORMANCE, QUALITY, *CARDS):  # several are named README.md
        before = page.read_text(encoding="utf-8")
        after = rewritten(before)
        if not args.check:
            page.write_text(after, encoding="utf-8")
        elif before != after:
            where = page.relative_to(README.parent)
            print(f"the tables of {where} are not those of bench/results; run: {COMMAND}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
