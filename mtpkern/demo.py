"""The demo: the shipped checkpoint writes answers several tokens at a time, beside itself at one token a time.

Three held-out problems as coloured blocks, then a table over ways of decoding, timed interleaved in this process.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpkern import ASSETS, show
from mtpkern.compare import HF_GENERATE, Completion, Problem, Tally, compare, count_right, encode, read_problems, timed
from mtpkern.loading import load as load_named
from mtpkern.model import recorded_settings
from mtpkern.output import printable, whole_file
from mtpkern.strategies import ConfAdapt, Static, Strategy, Verified

PICTURES = 3
BATCH = 8
MAX_NEW_TOKENS = 128


def ways(k_max: int) -> dict[str, Strategy | None]:
    """The rows of the table, by the name that the JSON line gives them; k is at most `k_max`, ConfAdapt's at most 8."""
    k = min(8, k_max)
    return {
        HF_GENERATE: None,
        "static_1": Static(1),
        "confadapt_0.99": ConfAdapt(k, 0.99),
        "confadapt_0.9": ConfAdapt(k, 0.9),
        "confadapt_0.6": ConfAdapt(k, 0.6),
        "verified": Verified().for_model(k_max),
    }


def load(folder: Path, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, on the CPU) and tokenizer of a folder; FileNotFoundError where none is, else as `load_named`."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"no checkpoint in {folder}: expected config.json there; make one with: make checkpoint"
        )
    return load_named(str(folder), "float32", torch.device("cpu"), base=base)


def demo(
    problems: int = 64,
    *,
    html: Path | None = None,
    folder: Path = ASSETS,
    base: str | None = None,
    as_json: bool = False,
) -> None:
    """Run the demo and print it.

    problems: how many held-out problems the table counts; html: where to write the picture as a page; folder: a
    checkpoint, or gated adapter upon `base`, with its problems.jsonl; as_json: print the figures as one JSON object and
    nothing else. Colours follow the terminal and NO_COLOR; progress goes to stderr.

        demo(16)
    """
    if problems < 1:
        raise ValueError(f"problems must be at least 1; got {problems}")
    # Opened first: a place that cannot be written is known before anything runs.
    with nullcontext() if html is None else whole_file(html) as page:
        result = _run(problems, folder, base, page, Console(highlight=False, quiet=as_json))
    if as_json:
        print(json.dumps(result), flush=True)
    elif html is not None:
        print(f"\nwritten: {printable(str(html))}")


def _run(problems: int, folder: Path, base: str | None, page: TextIO | None, console: Console) -> dict[str, object]:
    """The demo up to its summary, which is returned."""
    with show.progress("loading the checkpoint", 1) as advance:
        model, tokenizer = load(folder, base)
        held_out = read_problems(folder / "problems.jsonl", problems)
        advance(1)
    k_max = recorded_settings(model).get("k_max")
    if k_max is None:
        raise ValueError(
            f"{folder} records no k_max: expected a checkpoint that mtpkern train has made, or the shipped"
        )
    rows = ways(k_max)

    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, trained on word problems. "
    legend = "Each | ends one forward pass; first several tokens a pass, then one.\n"
    if show.coloured(console):
        legend = "Each colour is one forward pass; left several tokens a pass, right one.\n"
    console.print(Text.assemble((size, "bold"), legend))
    pictures = []
    for problem in held_out[:PICTURES]:
        pair = _pair(model, tokenizer, problem, rows["verified"])
        console.print(_picture(console, tokenizer, problem, pair))
        pictures.append((problem, pair))

    with show.progress(f"{problems} problems, {len(rows)} ways, one at a time", problems) as advance:
        single = compare(model, tokenizer, held_out, rows, progress=advance, max_new_tokens=MAX_NEW_TOKENS)
    few = {name: rows[name] for name in (HF_GENERATE, "verified")}
    with show.progress(f"{problems} problems, {len(few)} ways, {BATCH} at a time", problems) as advance:
        batched = compare(
            model, tokenizer, held_out, few, batch_size=BATCH, progress=advance, max_new_tokens=MAX_NEW_TOKENS
        )

    n = torch.get_num_threads()
    threads = f"{n} thread{'' if n == 1 else 's'}"
    where = f"{platform.machine()} {model.device.type}, {threads}, torch {torch.__version__}"
    title = f"{problems} held-out problems, {where}"
    lines = _lines(rows, single, batched)
    table = Table(title=title, title_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if page is not None:
        page.write(_page(tokenizer, pictures, title, lines))
    return summary(single, batched)


def summary(single: Mapping[str, Tally], batched: Mapping[str, Tally]) -> dict[str, object]:
    """What --json prints: per way tokens per pass, accuracy, and tokens per second over Hugging Face's generate.

    summary(tallies, batched)["speedup_vs_hf_generate"]["verified"]
    """
    return {
        "problems": single[HF_GENERATE].problems,
        "tokens_per_pass": {name: round(t.tokens_per_pass, 3) for name, t in single.items()},
        "accuracy": {name: round(t.accuracy, 4) for name, t in single.items()},
        "speedup_vs_hf_generate": _speedups(single),
        f"speedup_vs_hf_generate_batch_{BATCH}": _speedups(batched),
    }


def _speedups(tallies: Mapping[str, Tally]) -> dict[str, float]:
    base = tallies[HF_GENERATE].tokens_per_second
    return {name: round(t.tokens_per_second / base, 3) for name, t in tallies.items()}


def _pair(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problem: Problem, strategy: Strategy | None
) -> list[tuple[str, Completion]]:
    """The problem decoded by `strategy` and one token at a time: title (with the time), completion."""
    inputs = encode(tokenizer, [problem.prompt], model.device)
    out = []
    for title, way in (("several tokens a pass", strategy), ("one token a pass", None)):
        timed(model, inputs, way, max_new_tokens=MAX_NEW_TOKENS)
        (completion,), seconds = timed(model, inputs, way, max_new_tokens=MAX_NEW_TOKENS)
        right = count_right(tokenizer, [problem], [completion])
        verdict = "right" if right else f"wrong, expected {problem.result}"
        out.append((f"{title}: {len(completion.blocks)} passes, {seconds * 1e3:.0f} ms, {verdict}", completion))
    return out


def _picture(
    console: Console, tokenizer: PreTrainedTokenizerBase, problem: Problem, pair: Sequence[tuple[str, Completion]]
) -> Group:
    """Both decodings side by side, or one below the other where there is little room."""
    cells = []
    for title, completion in pair:
        parts = show.pieces(tokenizer, completion.tokens, completion.blocks)
        cell = Text.assemble((title, "bold"), "\n", show.terminal(parts, colour=show.coloured(console)))
        if max(completion.blocks) > 1:
            cell.append(f"\n{show.sizes(completion.blocks)}", style="dim")
        cells.append(cell)
    grid = Table.grid(padding=(0, 2), expand=console.is_terminal)
    wide = console.is_terminal and console.width >= 80
    for _ in cells if wide else ():
        grid.add_column(ratio=1)
    for row in [cells] if wide else zip(cells):
        grid.add_row(*row)
    return Group(Text(printable(problem.prompt), style="italic"), grid, "")


HEADER = ("way of decoding", "right", "tokens/pass", "tokens/s", "× HF")


def _label(strategy: Strategy | None) -> str:
    if strategy is None:
        return "HF generate"
    settings = f"{strategy.k}" if isinstance(strategy, Static) else f"{strategy.k}, {strategy.threshold}"
    return f"{type(strategy).__name__}({settings})"


def _lines(rows: Mapping[str, Strategy | None], *runs: Mapping[str, Tally]) -> list[tuple[str, ...]]:
    """The rows of the table as text; the second run is the batched one."""
    out: list[tuple[str, ...]] = []
    for tallies, batch in zip(runs, ("", f", batch {BATCH}")):
        for name, ratio in _speedups(tallies).items():
            t = tallies[name]
            label = _label(rows[name])
            right = f"{t.accuracy:.1%} ± {t.standard_error:.1%}"
            out.append((label + batch, right, f"{t.tokens_per_pass:.2f}", f"{t.tokens_per_second:.0f}", f"{ratio:.2f}"))
    return out


def _page(
    tokenizer: PreTrainedTokenizerBase,
    pictures: Sequence[tuple[Problem, Sequence[tuple[str, Completion]]]],
    title: str,
    rows: Sequence[tuple[str, ...]],
) -> str:
    body = ["<p>Each coloured block is what one forward pass wrote; the small number is its size in tokens.</p>"]
    for problem, pair in pictures:
        body.append(f'<p class="question">{escape(problem.prompt)}</p>\n<div class="pair">')
        for heading, completion in pair:
            parts = show.pieces(tokenizer, completion.tokens, completion.blocks)
            body.append(f"<section><h2>{escape(heading)}</h2>{show.html(parts, completion.blocks)}</section>")
        body.append("</div>")
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    body.append(f'<div class="wide"><table><caption>{escape(title)}</caption><tr>{head}</tr>\n{lines}</table></div>')
    return show.page("Several tokens per pass", "\n".join(body))
