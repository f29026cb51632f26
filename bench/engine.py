"""Requests at once: a second's answers where they share passes, and where they are decoded one behind the other.

`python -m mtpkern.bench.engine` has as many clients as it says, each in a thread of its own, ask for one problem after
the other: of `mtpkern.Engine`, and of `mtpkern.generate` and Hugging Face's `generate` in one thread, as a server's
that takes them in line. A thread that waits keeps no processors (`mtpkern.openmp`), whatever the way.
The ways run in turns, in each round with fresh problems; answers are compared with those of one that is alone. Once
all requests are greedy, and once every second one samples, at a temperature and a top-p that no other has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMixin

from mtpkern.bench.report import Table, program
from mtpkern.bench.timing import Spread
from mtpkern.cli import positive
from mtpkern.compare import read_problems
from mtpkern.demo import ASSETS, MAX_NEW_TOKENS, load
from mtpkern.engine import Engine
from mtpkern.generation import generate
from mtpkern.openmp import lend_processors

CLIENTS = (1, 4, 16)
HEADER = (
    *("clients", "asked for", "requests/s, in line", "requests/s, sharing"),
    *("sharing over in line", "over HF generate in line"),
)


def asked(ask: Callable[[int], Any], requests: int, clients: int) -> float:
    """Seconds that so many clients, each in a thread of its own, take for so many requests, ask(i) each."""
    began = perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        for _ in threads.map(ask, range(requests)):  # a request that fails is raised here
            pass
    return perf_counter() - began


def _answered(server: ThreadPoolExecutor, ask: Callable[[int], Any], i: int) -> Any:
    return server.submit(ask, i).result()


def settings_of(i: int, mixed: bool) -> dict[str, Any]:
    """What the i-th request asks for: of mixed ones every second samples in a way of its own."""
    if not (mixed and i % 2):
        return {}
    return {"do_sample": True, "temperature": 0.5 + 0.01 * i, "top_p": 0.95 - 0.01 * i}


def ways_of(
    model: PreTrainedModel, engine: Engine, asks: Sequence[Mapping[str, Any]]
) -> dict[str, Callable[[int], Any]]:
    """How the j-th of some requests is answered in each way."""
    return {
        "line": lambda j: generate(model, **asks[j]),
        "sharing": lambda j: engine.generate(**asks[j], seed=j),
        "hf": lambda j: GenerationMixin.generate(model, **{"do_sample": False, **asks[j]}),
    }


def by_clients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    clients: Sequence[int],
    rounds: int,
    per_round: int,
) -> Iterator[Table]:
    """Requests a second by the number of clients, and ratios within rounds; the table so far."""
    note = (
        f"{rounds} rounds of {per_round} problems, in turns, prefill included; medians, least and greatest in "
        f"brackets; threads: {torch.get_num_threads()}"
    )
    table = Table("Requests at once", note, HEADER)
    for n, mixed in ((n, mixed) for n in clients for mixed in (False, True)):
        found: dict[str, list[float]] = {"line": [], "sharing": [], "hf": []}
        with Engine(model, batch_size=n) as engine:
            for i in range(rounds + 1):
                first = i * per_round % max(1, len(prompts) - per_round + 1)
                inputs = [tokenizer(text, return_tensors="pt").to(model.device) for text in prompts[first:][:per_round]]
                limit = {"max_new_tokens": MAX_NEW_TOKENS}
                ways = ways_of(model, engine, [{**x, **limit, **settings_of(j, mixed)} for j, x in enumerate(inputs)])
                if not i:  # to be warm, and to be right
                    for j in range(len(inputs)):
                        torch.manual_seed(j)
                        if not torch.equal(ways["line"](j), ways["sharing"](j)):
                            raise AssertionError(f"problem {first + j}: an engine's answer is another")
                lend_processors(model.device)
                for name, ask in ways.items():
                    with ThreadPoolExecutor(1 if name != "sharing" else n) as server:
                        seconds = asked(partial(_answered, server, ask), len(inputs), n)
                    if i:
                        found[name].append(len(inputs) / seconds)
        ratios = {name: Spread.of([a / b for a, b in zip(found["sharing"], found[name])]) for name in ("line", "hf")}
        rates = {name: Spread.of(found[name]) for name in found}
        asked_for = "greedy and sampled, each as it likes" if mixed else "greedy"
        speed = rates["line"].text(1), rates["sharing"].text(1)
        row = str(n), asked_for, *speed, ratios["line"].text(), ratios["hf"].text()
        table = table.plus(row, {"clients": n, "mixed": mixed, "requests_per_second": rates, "ratios": ratios})
        yield table


def take_engine(
    device: torch.device, quick: bool, clients: Sequence[int], rounds: int, per_round: int
) -> Iterator[Table]:
    """The shipped checkpoint and its held-out problems."""
    model, tokenizer = load(ASSETS)
    if quick:
        clients, rounds, per_round = clients[:1], 1, 2
    prompts = [problem.prompt for problem in read_problems(ASSETS / "problems.jsonl", (rounds + 1) * per_round)]
    yield from by_clients(model.to(device), tokenizer, prompts, clients, rounds, per_round)


OPTIONS = {
    "--clients": {"nargs": "+", "type": positive, "default": CLIENTS, "help": "(default: %(default)s)"},
    "--rounds": {"type": positive, "default": 7},
    "--per-round": {"type": positive, "default": 32},
}


if __name__ == "__main__":
    how = {"options": OPTIONS, "on_cpu": lambda args: True, "device": "cpu"}
    program("engine", "Requests at once", take_engine, **how)
