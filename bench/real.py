"""A real model with its gated adapter: the original's own tokens, several a pass, beside the original's own generate.

`python -m mtpkern.bench.real` (also `make real`) takes SmolLM2-135M-Instruct, which it makes a plain checkpoint of
where runs/smollm2/base is not there, and the adapter that comes along. It shows some answers in coloured blocks, then a
row for each kind of prompt and batch size: how many answers are the original's token for token, tokens a pass, and the
time against the original one token a pass, by the same code (`Static(1)`, in a CUDA graph on a GPU) and by Hugging
Face's `generate`, in turns. The original is another instance of the model.

The prompts are held out: no template of a problem and no subject of an instruction among them occurs in training.

What the default costs where no draft is ever right is told by the same model with an adapter that has learned nothing:

    python -m mtpkern.bench.real --untaught 8 --batch-size 1 8 --max-new-tokens 128 --results bench/results/untaught
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mtpkern import ASSETS, load_adapter, show
from mtpkern.bench.report import Goal, Table, environment, write
from mtpkern.cli import positive
from mtpkern.compare import (
    HF_GENERATE,
    Completion,
    Tally,
    batches,
    decode,
    ours,
    pad,
    rotated,
    synchronize,
    timed,
)
from mtpkern.loading import device_of
from mtpkern.output import exit_status, printable
from mtpkern.pool import slots_for
from mtpkern.prompting import Prompting
from mtpkern.rows import read_lines
from mtpkern.strategies import Static, Strategy, Verified
from mtpkern.train import smollm2

ADAPTER = ASSETS / "smollm2"
HEADER = ("prompts", "identical", "tokens a pass", "× one a pass", "by batch", "× HF generate", "by batch")
UNTAUGHT_HEADER = (
    *("batch", "calls", "tokens a pass", "one a pass, s", "default, s"),
    *("ratio of sums", "of medians", "of single calls"),
)
OURS, PLAIN = "ours", "plain"


@dataclass
class Sums:
    """What one kind of prompt has added up to, decoded in batches of one size, way by way.

    Right are those answers whose tokens are the original's; ratios: another way's seconds a token over ours for each
    batch in which both ran, and the sums of those seconds and tokens. In 16 bits near-ties fall as they like, and
    answers end elsewhere.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, seconds: Mapping[str, float], tokens: Mapping[str, int]) -> None:
        """Count in how long a batch took in each way, and how many tokens it made."""
        for way in seconds.keys() - {OURS}:
            self.ratios.setdefault(way, []).append(seconds[way] / tokens[way] / seconds[OURS] * tokens[OURS])
            for sums, found in ((self.seconds, seconds), (self.tokens, tokens)):
                theirs, own = sums.get(way, (0, 0))
                sums[way] = theirs + found[way], own + found[OURS]

    def row(self, name: str) -> tuple[str, ...]:
        """As the table shows it."""
        own = self.tallies[OURS]
        cells = [name, f"{own.right} of {own.problems}", f"{own.tokens_per_pass:.2f}"]
        for way in (PLAIN, HF_GENERATE):
            if way in self.ratios:
                theirs, mine = (s / n for s, n in zip(self.seconds[way], self.tokens[way]))
                all_ = self.ratios[way]
                cells += [f"{theirs / mine:.2f}", f"{min(all_):.2f}–{max(all_):.2f}, median {median(all_):.2f}"]
            else:
                cells += ["–", "–"]
        return tuple(cells)


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, n: int | None) -> list[tuple[str, list[int]]]:
    """Kind and token ids of the first n prompts (all for None) of a JSONL file with `kind` and `messages`."""
    found = []
    for _, row in read_lines(path):
        assert isinstance(row, dict)
        found.append((row["kind"], Prompting(chat=True).encode(tokenizer, row)))
    if n is not None and len(found) < n:
        raise ValueError(f"{path} holds {len(found)} prompts; expected at least {n}: ask for fewer")
    return found[:n]


def decode_in_turns(
    original: PreTrainedModel,
    adapted: torch.nn.Module,
    prompts: Sequence[tuple[str, list[int]]],
    strategy: Verified,
    *,
    batch_size: int,
    max_new_tokens: int,
    reference: dict[int, list[int]],
    against: Sequence[str] = (HF_GENERATE, PLAIN),
    hf: int | None = None,
) -> Iterator[tuple[str, list[tuple[list[int], Completion]], Sums]]:
    """Decode the prompts in turns; for each batch its kind, prompts with our completions, and the sums of that kind.

    reference   number of a prompt -> the original's tokens, which the first that decodes them fills in
    against     what is decoded beside ours; the first of them says what is right
    hf          Hugging Face's generate takes part for so many prompts of each kind; None: for all
    """
    every: dict[str, tuple[Any, Strategy | None]] = {HF_GENERATE: (original, None), PLAIN: (original, Static(1))}
    ways = {name: way for name, way in every.items() if name in against} | {OURS: (adapted, strategy)}
    sums: dict[str, Sums] = {}
    warm: set[tuple[str, int, int]] = set()
    for kind in dict.fromkeys(kind for kind, _ in prompts):
        numbered = [(i, ids) for i, (its, ids) in enumerate(prompts) if its == kind]
        for turn, batch in enumerate(batches(numbered, batch_size)):
            inputs = pad([ids for _, ids in batch], original.device)
            names = [name for name in ways if name != HF_GENERATE or hf is None or turn * batch_size < hf]
            found, seconds = {}, {}
            cuda = original.device.type == "cuda"
            shape = len(batch), slots_for(inputs["input_ids"].shape[1] + max_new_tokens, cuda) if cuda else 0
            for name in rotated(names, turn):
                model, way = ways[name]
                if (name, *shape) not in warm:
                    # A graph is captured for the lengths that it is to decode.
                    decode(model, inputs, way, max_new_tokens=max_new_tokens if cuda and way is not None else 4)
                    warm.add((name, *shape))
                found[name], seconds[name] = timed(model, inputs, way, max_new_tokens=max_new_tokens)
            wanted = [reference.setdefault(i, one.tokens) for (i, _), one in zip(batch, found[names[0]])]
            own = sums.setdefault(kind, Sums())
            for name, completions in found.items():
                right = sum(one.tokens == ids for one, ids in zip(completions, wanted))
                own.tallies.setdefault(name, Tally()).add(completions, right, seconds[name])
            own.add(seconds, {name: sum(len(one.tokens) for one in its) for name, its in found.items()})
            yield kind, [(ids, one) for (_, ids), one in zip(batch, found[OURS])], own


def untaught(
    model: PreTrainedModel, prompts: Sequence[tuple[str, list[int]]], sizes: Sequence[int], calls: int, new_tokens: int
) -> Iterator[Table]:
    """An adapter that has learned nothing: the default against one token a pass, a row a batch size.

    Calls are in turns, of other prompts each, and write as many tokens each; the table behind every pair of them. One
    call token by token goes before. Of the default the first counts as well: it finds out that no draft is right.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    ways: dict[str, dict[str, Any]] = {PLAIN: {"strategy": Static(1)}, OURS: {}}
    note = (
        f"The default against Static(1), both with the adapter, in turns; {new_tokens} tokens a call and sequence, "
        "none of which stops it. Ratios of seconds, one a pass over ours: of sums, of medians, of single calls."
    )
    table = Table("No draft is ever right", note, UNTAUGHT_HEADER)
    for size in sizes:
        tally, seconds = Tally(), {way: list[float]() for way in ways}
        for i in range(-1, calls):
            batch = [prompts[(max(i, 0) * size + j) % len(prompts)][1] for j in range(size)]
            inputs = pad(batch, model.device)
            for way in rotated(list(ways), i) if i >= 0 else [PLAIN]:
                synchronize(model.device)
                start = perf_counter()
                found = ours(model, inputs, max_new_tokens=new_tokens, **ways[way])
                synchronize(model.device)
                took = perf_counter() - start
                assert all(len(completion.tokens) == new_tokens for completion in found)
                if i >= 0:
                    seconds[way].append(took)
                if way == OURS:
                    tally.add(found, 0, took)
            if i < 0:
                continue
            theirs, own = seconds[PLAIN], seconds[OURS]
            sums, medians = sum(theirs) / sum(own), median(theirs) / median(own)
            single = [a / b for a, b in zip(theirs, own)]
            times = f"{sum(theirs):.2f}", f"{sum(own):.2f}", f"{sums:.3f}", f"{medians:.3f}"
            record = {"B": size, "tokens_a_pass": tally.tokens_per_pass, "seconds": {**seconds}}
            record |= {"sums": sums, "medians": medians}
            goal = Goal(f"default over one a pass, no draft right, batch {size}", 0.95, sums, "×")
            singles = f"{min(single):.3f}–{max(single):.3f}"
            row = str(size), str(len(own)), f"{tally.tokens_per_pass:.2f}", *times, singles
            yield (so_far := table.plus(row, record, goal))
        table = so_far


def main(argv: Sequence[str] | None = None) -> None:
    """Show answers, measure, print the table and, where asked, write it."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.real", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, help="the original (default: runs/smollm2/base, made at need)")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="its gated adapter (default: the shipped one)")
    parser.add_argument("--prompts", type=Path, default=ADAPTER / "prompts.jsonl", help="JSONL with kind and messages")
    parser.add_argument("--number", type=positive, metavar="N", help="the first N of them (default: 40, if there are)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(default 64)")
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1], metavar="N")
    both = (HF_GENERATE, PLAIN)
    beside = "what is decoded beside ours (default: both; nothing only with --truth-batch-size)"
    parser.add_argument("--against", nargs="*", choices=both, default=both, help=beside)
    parser.add_argument("--hf", type=int, metavar="N", help="prompts of each kind that HF decodes too (default: all)")
    before = "have HF decode all prompts before, N at a time, to say what is right (default: what it says in its turn)"
    parser.add_argument("--truth-batch-size", type=positive, metavar="N", help=before)
    parser.add_argument("--k", type=int, default=4)
    threshold = "how sure drafts are to be (default: 0.2; with --by-load it follows what they have been worth)"
    parser.add_argument("--threshold", type=float, help=threshold)
    parser.add_argument("--masks", type=int, default=9, help="rows more a pass of each prompt, for when drafts fail")
    by_load = "the adapter's own k, as many rows as are worth their time, no masks behind drafts (mtpkern.load)"
    parser.add_argument("--by-load", action="store_true", help=by_load)
    nothing = "instead: with an adapter that has learned nothing, so many calls by default and one token a pass each"
    parser.add_argument("--untaught", type=positive, metavar="CALLS", help=nothing)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="answers shown in coloured blocks (default 3)")
    parser.add_argument("--results", type=Path, help="folder for real.*, real_by_load.* or untaught.*")
    args = parser.parse_args(argv)
    alone = args.hf is not None or not args.against
    if alone and not (args.untaught or args.truth_batch_size or PLAIN in args.against):
        which = "prompts beyond --hf" if args.against else "prompts"
        parser.error(f"{which} lack what to compare with: give --truth-batch-size, or add {PLAIN} to --against")

    device = device_of(args.device)
    base = args.base or smollm2.base()
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    original, plain = (
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False).to(device).eval()
        for _ in range(2)
    )
    adapted = load_adapter(plain, args.adapter)
    prompts = read_prompts(args.prompts, tokenizer, args.number)[: args.number or 40]
    if args.untaught:
        facts = environment(device) | {"dtype": args.dtype}
        for so_far in untaught(adapted, prompts, args.batch_size, args.untaught, args.max_new_tokens):
            if args.results is not None:
                tables = {"tables": [asdict(so_far)]}
                write("untaught", "An adapter that has learned nothing", facts, [so_far], tables, args.results)
        print(so_far.markdown())
        return
    if args.by_load:
        strategy = Verified(threshold=args.threshold)
    else:
        strategy = Verified(args.k, 0.2 if args.threshold is None else args.threshold, args.masks)
    console = Console(highlight=False)
    facts = environment(device) | {
        "dtype": args.dtype,
        "new tokens": f"at most {args.max_new_tokens}",
        "strategy": repr(strategy) + (", rows by load" if args.by_load else ""),
    }
    note = (
        f"Identical: the tokens of {_what_is_right(args)}. Times are those of a token, the prefill included, over all "
        "of them; beside them the ratios of single batches. One a pass: the original by the same "
        "code, in a CUDA graph too where there is one."
    )
    found: dict[tuple[str, int], Sums] = {}

    def table() -> Table:
        rows = [sums.row(f"{kind}, batch {size}") for (kind, size), sums in found.items()]
        records = [{"prompts": kind, "batch_size": size, **asdict(sums)} for (kind, size), sums in found.items()]
        return Table("SmolLM2-135M-Instruct with its gated adapter", note, HEADER, rows, records)

    file = "real_by_load" if args.by_load else "real"
    reference: dict[int, list[int]] = {}
    if args.truth_batch_size:
        for batch in batches(list(enumerate(prompts)), args.truth_batch_size):
            inputs = pad([ids for _, (_, ids) in batch], original.device)
            theirs = decode(original, inputs, None, max_new_tokens=args.max_new_tokens)
            reference |= {i: one.tokens for (i, _), one in zip(batch, theirs)}
    for size in args.batch_size:
        done = 0
        how = {"batch_size": size, "max_new_tokens": args.max_new_tokens, "against": args.against, "hf": args.hf}
        run = decode_in_turns(original, adapted, prompts, strategy, reference=reference, **how)
        with show.progress(f"{len(prompts)} prompts, {size} at a time", len(prompts)) as progress:
            for kind, completions, sums in run:
                found[kind, size] = sums
                shown = completions if size == args.batch_size[0] else []
                for prompt, completion in shown[: max(0, args.show - done)]:
                    _show(console, tokenizer, prompt, completion)
                done += len(completions)
                progress(done)
                if args.results is not None:
                    # All so far: a run that is cut keeps what it has.
                    so_far = table()
                    data = {"rows": so_far.records}
                    page = write(file, "The original model's own tokens", facts, [so_far], data, args.results)
    print(table().markdown())
    print(json.dumps(facts) if args.results is None else f"written: {page}")


def _what_is_right(args: argparse.Namespace) -> str:
    """Whose tokens answers are compared with."""
    theirs, own = "Hugging Face's greedy generate of the original", "the original one a pass by our code"
    if args.truth_batch_size:
        return f"{theirs}, decoded {args.truth_batch_size} at a time, before all else"
    some = f" (of the first {args.hf} of each kind; else of {own})" if args.hf is not None else ""
    return f"{theirs if HF_GENERATE in args.against else own}, decoded {args.batch_size[0]} at a time{some}"


def _show(console: Console, tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: Completion) -> None:
    """Question and answer, a colour a pass."""
    question = str(tokenizer.decode(prompt, skip_special_tokens=True)).strip()
    console.print(printable(question.removesuffix("assistant").strip().splitlines()[-1]), style="italic", markup=False)
    parts = show.pieces(tokenizer, completion.tokens, completion.blocks)
    console.print(show.terminal(parts, colour=show.coloured(console)))
    console.print(show.sizes(completion.blocks) + "\n", style="dim")


if __name__ == "__main__":
    sys.exit(exit_status(main))
