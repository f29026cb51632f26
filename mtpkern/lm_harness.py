"""Tasks of lm-evaluation-harness (extra eval), decoded in several ways: `mtpkern eval MODEL --tasks gsm8k_cot`.

The harness makes the prompts (few-shot examples, chat template) and judges the answers by the task's own filters and
metrics; in between `Answers`, its `LM`, has every prompt decoded once in every way, in turns, by an `Evaluation`. The
results folder holds

    run.json                 what makes the evaluation what it is; another one is refused there
    samples.jsonl            a line a prompt, as of mtpkern.evaluation, with the task and a digest of what was asked
    TASK/results.json, .md   figures of every way (mtpkern.evidence) by the headline metric, and all the harness says

A prompt that is asked again in the same words is not decoded again: more tasks, a larger limit or another way of
counting go on in the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from mtpkern.answers import opened_alone
from mtpkern.cases import Case
from mtpkern.compare import batches
from mtpkern.evaluation import Evaluation, facts_of, require_same, samples_there, write_results
from mtpkern.evidence import PLAIN
from mtpkern.output import first_line, json_line
from mtpkern.prompting import Prompting
from mtpkern.show import progress

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

# A digest of what a request asks, its stop strings and its limit.
Asked = tuple[str, tuple[str, ...], int]


@dataclass(frozen=True)
class Ready:
    """A task of the paper's as the harness has it: its name there, the headline metric, and what is changed in it."""

    task: str
    metric: str
    changes: Mapping[str, Any] = field(default_factory=dict)


_STEP_BY_STEP = "Q: {{question}}\n\nA: Let's think step by step."

# arXiv 2602.06019, evaluated with the chat template, few-shot examples as turns and in float32. The variants of BBH
# and GPQA are the harness's ones with reasoning; which the paper took it does not say.
READY = {
    "gsm8k_cot": Ready("gsm8k_cot", "exact_match,flexible-extract", {"doc_to_text": _STEP_BY_STEP}),
    "bbh": Ready("bbh_cot_fewshot", "exact_match,get-answer"),
    "ifeval": Ready("ifeval", "prompt_level_strict_acc,none"),
    "aime25": Ready("aime25", "exact_match,none"),
    "gpqa": Ready("gpqa_main_cot_n_shot", "exact_match,flexible-extract"),
    "cnn_dm": Ready("cnn_dailymail_abisee", "rougeL,none"),
}


@dataclass(frozen=True)
class Rendered(Prompting):
    """Of prompts that a chat template has been applied to, which brought the special tokens."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> list[int]:
        """The token ids of the prompt as it is."""
        return tokenizer(fields["prompt"], add_special_tokens=False).input_ids


class Answers(LM):  # type: ignore[misc]  # of a library without types
    """The harness's model: every prompt decoded once in all ways, kept in a file; `way` says whose are given.

    answers = Answers(evaluation, Path("runs/eval/samples.jsonl"), batch_size=8)
    answers.way = "verified"
    with answers.kept():
        simple_evaluate(model=answers, tasks=["gsm8k_cot"])
    """

    def __init__(
        self,
        evaluation: Evaluation,
        path: Path,
        *,
        batch_size: int = 8,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.evaluation, self.path, self.batch_size = evaluation, path, batch_size
        self.max_new_tokens = max_new_tokens
        self.way = PLAIN
        # By task and document; of those that were asked for last.
        self.samples: dict[tuple[str, int], dict[str, Any]] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Go on, inside the block, behind what the file has; ValueError where another run writes there."""
        with opened_alone(self.path) as self._file:
            self._known = {sample["asked"]: sample for sample in samples_there(self.path)}
            self._batches = 1 + max((sample["batch"] for sample in self._known.values()), default=-1)
            yield

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The texts of the way, one a request; what is not in the file yet is decoded before, in all ways."""
        asked = [self._asked(request) for request in requests]
        missing = {one: request for one, request in zip(asked, requests) if one[0] not in self._known}
        if missing:
            self._decode(missing)
        for request, (digest, _, _) in zip(requests, asked, strict=True):
            self.samples[request.task_name, request.doc_id] = self._known[digest]
        return [self._known[digest]["ways"][self.way]["text"] for digest, _, _ in asked]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused by name: such a task asks the weights, which no way of decoding changes."""
        raise ValueError(
            f"{requests[0].task_name} compares log-likelihoods, which are the same however a model is decoded; take a "
            "task that generates, or ask the checkpoint with lm_eval --model hf"
        )

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, by the tokenizer's template."""
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.evaluation.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template."""
        return str(self.evaluation.tokenizer.chat_template)

    @property
    def tokenizer_name(self) -> str:
        """Whose template it is."""
        return str(self.evaluation.tokenizer.name_or_path)

    def _asked(self, request: Instance) -> Asked:
        """What a request asks. ValueError for what is not greedy."""
        context, options = request.args
        options = normalize_gen_kwargs(options)
        stops = tuple(stop for stop in options.pop("until") if stop)
        limit = self.max_new_tokens or int(options.pop("max_gen_toks"))
        if options.pop("do_sample", False):
            raise ValueError(
                f"{request.task_name} samples (do_sample, temperature), and strategies are judged by greedy answers; "
                "take a task without, or a local copy with do_sample: false"
            )
        other = sorted(options.keys() - {"temperature", "top_p", "top_k", "max_gen_toks"})
        if other:
            raise ValueError(f"{request.task_name} asks for {', '.join(other)}, which is not supported here")
        # Not the task's name: what is asked is the same.
        digest = hashlib.sha256(json.dumps([context, stops, limit]).encode()).hexdigest()
        return digest, stops, limit

    def _decode(self, missing: Mapping[Asked, Instance]) -> None:
        label = f"{len(missing)} prompts, {len(self.evaluation.names)} ways"
        with progress(label, len(missing)) as advance:
            done = 0
            # Together only with the same stop strings and limit.
            for (stops, limit), alike in groupby(missing, key=lambda one: one[1:]):
                judge = replace(self.evaluation, stops=stops, max_new_tokens=limit)
                for batch in batches(list(alike), self.batch_size):
                    mine = [missing[one] for one in batch]
                    cases = [Case(f"{r.task_name}, document {r.doc_id}", {"prompt": r.args[0]}) for r in mine]
                    samples = judge.decode(cases, batch=self._batches, first=done, warm=done == 0)
                    for (digest, _, _), request, sample in zip(batch, mine, samples, strict=True):
                        self._known[digest] = {"asked": digest, "task": request.task_name, **sample}
                        self._file.write(json_line(self._known[digest]) + "\n")
                    self._file.flush()
                    self._batches += 1
                    done += len(batch)
                    advance(done)


@dataclass(frozen=True)
class Tasks:
    """By the name that was asked for: the harness's tasks, several for a group, and the headline, if it is known."""

    manager: TaskManager
    members: Mapping[str, tuple[list[Any], str | None]]


def tasks_of(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """The harness's tasks of each name, with their data; the headline metric is known of those in `READY`.

    include_path: a folder with tasks of one's own (yaml), whose names come before the harness's. Raises ValueError for
    a name that nothing bears and where a task's data or packages are not here.

        tasks_of(["gsm8k_cot"]).members["gsm8k_cot"][1]  # "exact_match,flexible-extract"
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"{include_path}: expected a folder with tasks in yaml files (--include-path), there is none")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    ready = {name: READY.get(name, Ready(name, "")) for name in names}
    unknown = [name for name in names if ready[name].task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"--tasks {' '.join(unknown)}: no such task in lm-evaluation-harness; ready are {', '.join(READY)}, "
            "`lm_eval ls tasks` lists all, and --include-path takes a folder with tasks of your own"
        )
    found = {}
    for name in names:
        tasks = _loaded(manager, name, ready[name].task)
        for task in tasks:
            for key, value in ready[name].changes.items():
                task.set_config(key=key, value=value)
        found[name] = (tasks, ready[name].metric or None)
    return Tasks(manager, found)


def _loaded(manager: TaskManager, name: str, task: str) -> list[Any]:
    """A name's tasks with their data. ValueError where these are not here and cannot be fetched."""
    try:
        return list(manager.load([task])["tasks"].values())
    except ImportError as error:
        raise ValueError(
            f"--tasks {name}: needs a package that is not here ({error}); the harness names its own as extras, such as "
            "pip install 'lm_eval[ifeval]'"
        ) from error
    # The libraries for data raise one or the other where there is no network, no such set, or no leave to read it.
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--tasks {name}: the data of {task} could not be read ({first_line(error)}); they come "
            "from the hub once, some after you have agreed to their terms and logged in (hf auth login), and are then "
            "read from the cache, offline too; or give --include-path a folder with a task of yours whose data lie in "
            "files"
        ) from error


def require_metric(tasks: Tasks, metric: str | None) -> None:
    """Raise ValueError for a headline that a task says nowhere: `require_metric(tasks, "exact_match,hashes")`."""
    for name, (members, _) in tasks.members.items():
        known = {f"{one},{way.name}" for task in members for one in task.aggregation() for way in task._filters}
        if metric is not None and metric not in known:
            raise ValueError(f"{name}: --metric {metric}: documents are scored by {', '.join(sorted(known))}")


def evaluate_tasks(
    answers: Answers,
    tasks: Tasks,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    chat: bool,
    fewshot: int | None = None,
    limit: int | None = None,
    metric: str | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Decode and judge the tasks of `tasks_of`, write their results, and return the figures of every way by task.

    answers: writes its samples into the folder; settings: what makes the evaluation what it is; chat: by the chat
    template, few-shot examples as turns; limit: documents of each task (of a group's each); metric: the headline, such
    as "exact_match,strict-match"; unless given the task's own first. Raises ValueError for a metric that a task does
    not have, and for settings other than the folder's.
    """
    how = {"num_fewshot": fewshot, "apply_chat_template": chat, "fewshot_as_multiturn": chat, "limit": limit}
    how |= {"bootstrap_iters": 0, "task_manager": tasks.manager}
    found = {}
    for name, (members, headline) in tasks.members.items():
        judged: dict[str, Any] = {}
        with answers.kept():
            require_same(folder / "run.json", settings)
            for way in answers.evaluation.names:
                answers.way, answers.samples = way, {}
                judged[way] = simple_evaluate(answers, tasks=members, **how)
        by_way = {way: _scores(results["samples"]) for way, results in judged.items()}
        chosen = _headline(name, by_way, metric or headline)
        samples = [
            {**sample, "ways": {way: {**part, "right": by_way[way].get(chosen, {}).get(asked)} for way, part in ways}}
            for asked, sample in answers.samples.items()
            for ways in [sample["ways"].items()]
        ]
        metrics = {way: results["results"] for way, results in judged.items()}
        record = {
            "settings": {**settings, "task": name, "metric": chosen, "limit": limit, "fewshot": fewshot},
            "ways": answers.evaluation.names,
            "metrics": json.loads(json.dumps(metrics, default=str)),
            "versions": dict(judged[PLAIN]["versions"]),
        }
        facts = {"prompts": str(len(samples)), "metric": chosen, **facts_of(settings)}
        (folder / name).mkdir(exist_ok=True)
        title = f"{Path(str(settings['model'])).name} on {name}"
        found[name] = write_results(folder / name, samples, title, record, facts)
    return found


def _scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[tuple[str, int], float]]:
    """By metric and filter, as the harness writes it, what each document scored, where that is a number."""
    scores: dict[str, dict[tuple[str, int], float]] = {}
    for task, documents in samples.items():
        for document in documents:
            for metric in document["metrics"]:
                if isinstance(document[metric], (bool, int, float)):
                    one = scores.setdefault(f"{metric},{document['filter']}", {})
                    one[task, document["doc_id"]] = float(document[metric])
    return scores


def _headline(task: str, by_way: Mapping[str, Mapping[str, Any]], asked: str | None) -> str:
    there = list(by_way[PLAIN])
    if asked is None and there:
        return there[0]
    if asked not in there:
        raise ValueError(
            f"{task}: --metric {asked}: documents are scored by {', '.join(there) or 'nothing that is a number'}"
        )
    return asked
