"""A real model with its gated adapter: the original's own tokens, several a pass, beside the original's own generate.

`python -m mtpkern.bench.real` (also `make real`) takes SmolLM2-135M-Instruct, which it makes a plain checkpoint of
where runs/smollm2/base is not there, and the adapter that comes along. It shows some answers in coloured blocks, then a
row for each kind of prompt and batch size: how many answers are the original's token for token, tokens a pass, and the
time against Hugging Face's `generate` of the original, which is another instance of the model, in turns.

The prompts are held out: no template of a problem and no subject of an instruction among them occurs in training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mtpkern import ASSETS, load_adapter, show
from mtpkern.bench.harness import environment
from mtpkern.bench.report import Table, write
from mtpkern.compare import Completion, Tally, batches, ours, pad, timed
from mtpkern.output import printable
from mtpkern.prompting import Prompting
from mtpkern.rows import read_lines
from mtpkern.strategies import Verified
from mtpkern.train import smollm2

ADAPTER = ASSETS / "smollm2"
HEADER = ("prompts", "identical", "tokens a pass", "× HF generate", "by batch")


@dataclass
class Pair:
    """What one kind of prompt has added up to, decoded in batches of one size, by us and by the original.

    Right are those whose tokens are the original's; ratios has the original's seconds over ours for each batch.
    """

    ours: Tally = field(default_factory=Tally)
    original: Tally = field(default_factory=Tally)
    ratios: list[float] = field(default_factory=list)

    def row(self, name: str) -> tuple[str, ...]:
        """As the table shows it."""
        spread = f"{min(self.ratios):.2f}-{max(self.ratios):.2f}, median {median(self.ratios):.2f}"
        ratio = self.ours.tokens_per_second / self.original.tokens_per_second
        identical = f"{self.ours.right} of {self.ours.problems}"
        return name, identical, f"{self.ours.tokens_per_pass:.2f}", f"{ratio:.2f}", spread


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
) -> Iterator[tuple[str, list[Completion], Pair]]:
    """Decode the prompts in both ways, in turns; for each batch its kind, our completions and the sums of that kind.

    reference   number of a prompt -> the original's tokens, which the first batch size fills in
    """
    pairs: dict[str, Pair] = {}
    for kind in dict.fromkeys(kind for kind, _ in prompts):
        numbered = [(i, ids) for i, (its, ids) in enumerate(prompts) if its == kind]
        for turn, batch in enumerate(batches(numbered, batch_size)):
            inputs = pad([ids for _, ids in batch], original.device)
            options = {"max_new_tokens": max_new_tokens}
            if turn == 0:
                ours(adapted, inputs, strategy=strategy, max_new_tokens=4)  # type: ignore[arg-type]
            if turn % 2:
                got, seconds = timed(adapted, inputs, strategy, **options)  # type: ignore[arg-type]
            theirs, theirs_seconds = timed(original, inputs, None, **options)
            if not turn % 2:
                got, seconds = timed(adapted, inputs, strategy, **options)  # type: ignore[arg-type]
            wanted = [reference.setdefault(i, one.tokens) for (i, _), one in zip(batch, theirs)]
            pair = pairs.setdefault(kind, Pair())
            for tally, completions, took in ((pair.ours, got, seconds), (pair.original, theirs, theirs_seconds)):
                tally.add(completions, sum(one.tokens == ids for one, ids in zip(completions, wanted)), took)
            pair.ratios.append(theirs_seconds / seconds)
            yield kind, got, pair


def main(argv: Sequence[str] | None = None) -> None:
    """Show answers, measure, print the table and, where asked, write it."""
    parser = argparse.ArgumentParser(prog="python -m mtpkern.bench.real", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, help="the original (default: runs/smollm2/base, made at need)")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="its gated adapter (default: the shipped one)")
    parser.add_argument("--prompts", type=Path, default=ADAPTER / "prompts.jsonl", help="JSONL with kind and messages")
    parser.add_argument("--number", type=int, metavar="N", help="the first N of them (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--masks", type=int, default=0, help="rows more a pass of each prompt, for when drafts fail")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="answers shown in coloured blocks (default 3)")
    parser.add_argument("--results", type=Path, help="folder for real.md and real.json")
    args = parser.parse_args(argv)

    base = args.base or smollm2.base()
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    original, plain = (
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False).to(args.device).eval()
        for _ in range(2)
    )
    adapted = load_adapter(plain, args.adapter)
    prompts = read_prompts(args.prompts, tokenizer, args.number)
    strategy = Verified(args.k, args.threshold, args.masks)
    console = Console(highlight=False)
    reference: dict[int, list[int]] = {}
    rows, records = [], []
    for size in args.batch_size:
        done = 0
        last: dict[str, Pair] = {}
        run = decode_in_turns(
            original,
            adapted,
            prompts,
            strategy,
            batch_size=size,
            max_new_tokens=args.max_new_tokens,
            reference=reference,
        )
        with show.progress(f"{len(prompts)} prompts, {size} at a time", len(prompts)) as progress:
            for kind, completions, pair in run:
                last[kind] = pair
                shown = completions if size == args.batch_size[0] else []
                for completion in shown[: max(0, args.show - done)]:
                    _show(console, tokenizer, prompts[done][1], completion)
                done += len(completions)
                progress(done)
        for kind, pair in last.items():
            rows.append(pair.row(f"{kind}, batch {size}"))
            records.append({"prompts": kind, "batch_size": size, **asdict(pair)})
    facts: Mapping[str, str] = environment(torch.device(args.device)) | {
        "dtype": args.dtype,
        "new tokens": f"at most {args.max_new_tokens}",
        "strategy": f"Verified({args.k}, {args.threshold}, masks={args.masks})",
        "threads": str(torch.get_num_threads()),
    }
    note = (
        "Identical: the tokens of Hugging Face's greedy generate of the original, decoded "
        f"{args.batch_size[0]} at a time. Times include the prefill; the last column has the ratios of single batches."
    )
    table = Table("SmolLM2-135M-Instruct with its gated adapter", note, HEADER, rows, records)
    print(table.markdown())
    if args.results is not None:
        title = "The original model's own tokens"
        print("written:", write("real", title, facts, [table], {"rows": records}, args.results))
    else:
        print(json.dumps(facts))


def _show(console: Console, tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: Completion) -> None:
    """Question and answer, a colour a pass."""
    question = str(tokenizer.decode(prompt, skip_special_tokens=True)).strip()
    console.print(printable(question.removesuffix("assistant").strip().splitlines()[-1]), style="italic", markup=False)
    parts = show.pieces(tokenizer, completion.tokens, completion.blocks)
    console.print(show.terminal(parts, colour=show.coloured(console)))
    console.print(show.sizes(completion.blocks) + "\n", style="dim")


if __name__ == "__main__":
    main()
