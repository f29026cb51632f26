"""`mtpkern eval --tasks`: lm-evaluation-harness asks, every way answers. Skipped where the harness is not installed."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mtpkern import answers, eval_command
from mtpkern.cli import main
from mtpkern.demo import ASSETS
from mtpkern.grading import is_right

PROBLEMS = ASSETS / "problems.jsonl"

TASK = {
    "task": "word_problems",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(PROBLEMS)}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{result}}",
    # No fewer than the demo gives an answer.
    "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 96, "do_sample": False},
    "filter_list": [
        {
            "name": "hashes",
            "filter": [{"function": "regex", "regex_pattern": "#### (-?[0-9]+)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def command(tmp_path, *more, tasks=("word_problems",), limit=4):
    words = ["eval", str(ASSETS), "--tasks", *tasks, "--include-path", str(tmp_path / "tasks")]
    return [*words, "--limit", str(limit), "--output", str(tmp_path / "out"), "--no-chat", *more]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Writes the task, with changes, where the command looks for it. The harness's own thousands are not read."""
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    from mtpkern import lm_harness

    monkeypatch.setattr(lm_harness, "TaskManager", lambda **where: manager(include_defaults=False, **where))

    def write(**changes):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / "task.yaml").write_text(yaml.safe_dump(TASK | changes))

    write()
    return write


def results(tmp_path, name="word_problems"):
    return json.loads((tmp_path / "out" / name / "results.json").read_text())


def test_the_harness_judges_as_we_do(task, tmp_path, monkeypatch, capsys):
    assert main(command(tmp_path, "--strategies", "verified", "static:32", "--limit", "6", "--batch-size", "6")) == 0
    assert "# assets on word_problems" in capsys.readouterr().out
    found = results(tmp_path)
    assert found["settings"]["metric"] == "exact_match,hashes"
    expected = [json.loads(line)["result"] for line in PROBLEMS.read_text().splitlines()[:6]]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for way in ("static_1", "verified", "static_32"):
        right = [is_right(s["ways"][way]["text"], f"#### {x}") for s, x in zip(lines, expected, strict=True)]
        assert found["figures"][way]["accuracy"] == pytest.approx(sum(right) / 6)
        assert found["metrics"][way]["word_problems"]["exact_match,hashes"] == found["figures"][way]["accuracy"]
    assert found["figures"]["static_1"]["accuracy"] > found["figures"]["static_32"]["accuracy"]
    assert found["figures"]["verified"]["difference_to_plain"] == [0, 0]
    assert found["figures"]["verified"]["tokens_per_pass"] > 4
    assert found["figures"]["verified"]["wall_clock"] > 0

    # Fewer are there already; what is asked otherwise is decoded.
    with monkeypatch.context() as patch:
        patch.setattr(eval_command.Evaluation, "decode", lambda *args, **kwargs: pytest.fail("decoded again"))
        words = ("--strategies", "verified", "static:32", "--limit", "2", "--batch-size", "6")
        assert main(command(tmp_path, *words)) == 0
    assert results(tmp_path)["figures"]["verified"]["problems"] == 2
    assert main(command(tmp_path, "--strategies", "verified")) == 2
    assert "ways was" in capsys.readouterr().err


def test_a_killed_call_goes_on(task, tmp_path, monkeypatch):
    real, calls = eval_command.Evaluation.decode, []

    def killed(self, cases, **options):
        calls.append(len(cases))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, cases, **options)

    monkeypatch.setattr(eval_command.Evaluation, "decode", killed)
    words = command(tmp_path, "--batch-size", "2", "--max-new-tokens", "4", "--limit", "3")
    assert main(words) == 130
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write('{"asked": "half')
    assert main(words) == 0
    assert calls == [2, 1, 1]
    assert results(tmp_path)["figures"]["verified"]["problems"] == 3
    with answers.opened_alone(tmp_path / "out" / "samples.jsonl"):
        assert main(words) == (0 if answers.fcntl is None else 2)


def test_examples_and_template_and_stops_reach_the_model(task, tmp_path, bytes_of, monkeypatch):
    from mtpkern import lm_harness
    from mtpkern.evaluation import Evaluation

    task(
        fewshot_config={"sampler": "first_n", "samples": [{"prompt": "1 + 1?", "result": "2"}]},
        target_delimiter="",
        num_fewshot=1,
    )
    tokenizer = bytes_of("llama")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    asked = []

    class Said(Evaluation):
        def __post_init__(self):
            pass

        def decode(self, cases, *, batch, first, warm):
            asked.extend((case.fields["prompt"], tuple(self.stops), self.max_new_tokens) for case in cases)
            part = {"tokens": [1], "blocks": [1], "finished": True, "seconds": 1.0, "text": "#### 75", "nll": None}
            return [{"row": i, "batch": batch, "ways": {"static_1": part}} for i in range(len(cases))]

    from mtpkern.strategies import Static

    judged = Said(None, tokenizer, {"static_1": Static(1)})
    tasks = lm_harness.tasks_of(["word_problems"], tmp_path / "tasks")
    found = {}
    for chat in (True, False):
        (tmp_path / str(chat)).mkdir()
        answers = lm_harness.Answers(judged, tmp_path / str(chat) / "samples.jsonl")
        found[chat] = lm_harness.evaluate_tasks(
            answers, tasks, tmp_path / str(chat), {"model": "m"}, chat=chat, limit=1
        )
    question = json.loads(PROBLEMS.read_text().splitlines()[0])["prompt"]
    assert asked == [
        (f"<user>1 + 1?<assistant>2<user>{question}<assistant>", ("Question:",), 96),
        (f"1 + 1?2\n\n{question}", ("Question:",), 96),
    ]
    assert found[True]["word_problems"]["static_1"]["accuracy"] == 1


@pytest.mark.parametrize(
    ("changes", "more", "says"),
    [
        ({"generation_kwargs": {"do_sample": True, "temperature": 1.0}}, (), "word_problems samples"),
        ({"generation_kwargs": {"do_sample": False, "num_beams": 4}}, (), "asks for num_beams"),
        ({"output_type": "loglikelihood"}, (), "word_problems compares log-likelihoods"),
        ({}, ("--chat",), "no chat template"),
    ],
)
def test_what_is_not_honoured_is_refused(task, tmp_path, capsys, changes, more, says):
    task(**changes)
    assert main(command(tmp_path, "--strategies", "static:1", "--max-new-tokens", "2", *more, limit=1)) == 2
    assert says in capsys.readouterr().err


def test_unknown_tasks_and_metrics_are_told_before_weights(task, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
    assert main(command(tmp_path, tasks=("gsm9k",))) == 2
    assert "--tasks gsm9k: no such task" in capsys.readouterr().err
    assert main(command(tmp_path, "--metric", "acc,none")) == 2
    assert "word_problems: --metric acc,none: documents are scored by exact_match,hashes" in capsys.readouterr().err


def test_the_papers_tasks_are_the_harnesses():
    """By name: their data lies on the hub."""
    tasks = Path(pytest.importorskip("lm_eval.tasks").__file__).parent
    from mtpkern.lm_harness import READY

    assert set(READY) == {"gsm8k_cot", "bbh", "ifeval", "aime25", "gpqa", "cnn_dm"}
    folders = ("gsm8k", "bbh/cot_fewshot", "ifeval", "aime", "gpqa/cot_n_shot", "cnn_dailymail")
    texts = [path.read_text() for folder in folders for path in (tasks / folder).iterdir() if path.is_file()]
    for ready in READY.values():
        assert any(re.search(rf"^(task|group): {ready.task}$", text, re.MULTILINE) for text in texts), ready


def test_without_the_harness_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_command, "find_spec", lambda name: None)
    assert main(command(tmp_path)) == 2
    assert "pip install 'mtpkern[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "gsm8k_cot", "--stop", "Q:"], "--stop: of --data only"),
        (["--data", str(PROBLEMS), "--fewshot", "3"], "--fewshot: of --tasks only"),
        (["--data", str(PROBLEMS), "--fewshot", "0"], "--fewshot: of --tasks only"),
        (["--tasks", "gsm8k_cot", "--fewshot", "-1"], "--fewshot must be a number of examples from 0 up, got -1"),
        (["--data", str(PROBLEMS), "--output", __file__], "test_lm_harness.py is no folder that can be written in"),
        (["--data", str(PROBLEMS), "--output", __file__ + "/out"], "test_lm_harness.py is no folder that can be"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, capsys, words, says):
    assert main(["eval", "no-model", "--output", str(tmp_path / "out"), *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)"), "Couldn't reach"),
        (
            FileNotFoundError("'gpqa' is a gated dataset on the Hub.\nVisit it"),
            "gated dataset",
        ),
        (OSError(), "could not be read (OSError"),
        (ModuleNotFoundError("No module named 'langdetect'"), "pip install 'lm_eval[ifeval]'"),
    ],
)
def test_what_is_not_here_is_named_before_a_model_is_loaded(task, tmp_path, monkeypatch, capsys, error, says):
    from mtpkern import lm_harness

    def load(self, names):
        raise error

    monkeypatch.setattr(lm_harness.TaskManager(include_path=str(tmp_path / "tasks")).__class__, "load", load)
    monkeypatch.setattr(eval_command, "_loaded", lambda *args, **options: pytest.fail("loaded"))
    assert main(command(tmp_path)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "--tasks word_problems: " in said
    assert not (tmp_path / "out").exists()
