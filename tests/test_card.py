"""The card of a trained model: what the run has recorded, and what evaluations add to it."""

import yaml

from mtpkern.card import MARK, add_to_card
from mtpkern.train import checkpoint
from mtpkern.train.card import card, deviations, write_card
from mtpkern.train.config import MTPConfig
from mtpkern.train.record import Record, options_of

FIGURES = {
    "static_1": {"accuracy": 0.9, "standard_error": 0.1, "tokens_per_pass": 1.0, "acceptance": [1.0]},
    "verified": {"accuracy": 0.9, "standard_error": 0.1, "tokens_per_pass": 2.5, "acceptance": [1.0, 0.8]},
}


def arguments(tmp_path, **changes):
    options = {"output_dir": str(tmp_path / "mine"), "max_steps": 90, "k_max": 4, "use_cpu": True, "bf16": False}
    config = MTPConfig(**(options | {"lora_rank": 4, "gated": True} | changes))
    recipe = options_of(config) | {"train_data": ["answers.jsonl (0123456789abcdef)"], "eval_data": None}
    history = [{"step": i, "loss": 2.0 - i / 100, "agreeing_prefix": 1 + i / 100} for i in range(1, 91)]
    history[-1] |= {"agreement_1": 0.75, "agreement_2": 0.5, "tokens_per_second": 812.4}
    return {
        "base": "someone/base",
        "config": config,
        "record": Record(recipe, step=90, max_steps=90, changes=[{"step": 40, "k_max": [8, 4]}]),
        "history": [*history, {"step": 90, "train_runtime": 61.04}],
        "data": ["training: answers.jsonl: 96 rows read"],
        "command": "mtpkern train run.yaml",
        "use": "mtpkern generate mine",
    }


def test_a_card_says_what_the_run_knows(tmp_path):
    given = arguments(tmp_path)
    text = card(**given)
    head, body = text.removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(head) == {
        "base_model": "someone/base", "library_name": "peft", "tags": ["multi-token-prediction"]
    }  # fmt: skip
    for line in (
        "- train_data: answers.jsonl (0123456789abcdef)",
        "- k_max: 4",
        "- gated: True",
        "- changed on the way: {'step': 40, 'k_max': [8, 4]}",
        "| 90 | 1.1 | 1.9 |",
        "Agreement by position in the span, at step 90: 0.750, 0.500.",
        "- seconds: 61.0",
        "- tokens of texts a second, greatest of the logs: 812",
        "- command: mtpkern train run.yaml",
    ):
        assert line in body.splitlines(), line
    assert sum(line.startswith("| ") for line in body.splitlines()) == 13
    # What no log holds is not said.
    assert "eval_" not in body
    assert "peak memory" not in body


def test_deviations_are_what_is_not_the_default(tmp_path):
    options = options_of(arguments(tmp_path, lora_rank=0, gated=False)["config"])
    assert deviations(options) == {"k_max": 4}
    assert deviations(options | {"learning_rate": 7.0}) == {"k_max": 4}


def test_evaluations_complete_it(tmp_path):
    given = arguments(tmp_path)
    (tmp_path / "mine").mkdir()
    assert write_card(tmp_path / "mine", card(**given))
    path = tmp_path / "mine" / "README.md"
    before = path.read_text()
    for accuracy in (0.5, 0.9):
        FIGURES["verified"]["accuracy"] = accuracy
        assert add_to_card(str(tmp_path / "mine"), "a.jsonl", FIGURES, {"command": "mtpkern eval"}) == path
    assert add_to_card(str(tmp_path / "mine"), "b.jsonl", FIGURES, {}) == path
    text = path.read_text()
    assert text.startswith(before.rstrip())
    assert text.count("## Measured: a.jsonl") == text.count("## Measured: b.jsonl") == 1
    assert "| verified | 90.00% ± 10.00%" in text
    assert "| verified | 50.00%" not in text
    assert "### Acceptance by position" in text


def test_cards_of_others_are_left_alone(tmp_path):
    given = arguments(tmp_path)
    (tmp_path / "README.md").write_text("# mine\n")
    assert not write_card(tmp_path, card(**given))
    assert add_to_card(str(tmp_path), "a.jsonl", FIGURES, {}) is None
    assert add_to_card("someone/on-the-hub", "a.jsonl", FIGURES, {}) is None
    assert (tmp_path / "README.md").read_text() == "# mine\n"
    assert MARK not in "# mine\n"


def test_the_shipped_models_card_is_the_last_phases(tmp_path, monkeypatch):
    """Where its folder has none; the one that is there stays."""
    monkeypatch.setattr(checkpoint, "load_student", lambda *args: (None, None))
    monkeypatch.setattr(checkpoint, "save_plain", lambda *args, **kwargs: None)
    for folder in (*checkpoint.STEPS, "new", "old"):
        (tmp_path / folder).mkdir()
    last = tmp_path / list(checkpoint.STEPS)[-1]
    assert write_card(last, card(**arguments(tmp_path)))
    (tmp_path / "old" / "README.md").write_text("# mine\n")
    for folder in ("new", "old"):
        checkpoint.publish(tmp_path, tmp_path / folder)
    assert (tmp_path / "new" / "README.md").read_text() == (last / "README.md").read_text()
    assert (tmp_path / "old" / "README.md").read_text() == "# mine\n"
