"""Faults planted in what is shown to those who watch: the checks of test_watch.py see each."""

from typing import Any

import pytest

from mtpkern import Static, Verified
from mtpkern.watch import Watch
from support.watching import check_blocks, check_columns, check_strings


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny.model("llama")


# Planted faults


def drafts_count_as_certain(watch: Watch, monkeypatch: Any) -> None:
    poll = Watch.poll

    def planted(self: Watch, sequences: Any, strategy: Any) -> Any:
        made = poll(self, sequences, strategy)
        self.verify = False
        return made

    monkeypatch.setattr(Watch, "poll", planted)


def strings_at_the_end_of_a_block_alone(watch: Watch, monkeypatch: Any) -> None:
    ask = Watch._ask_strings
    monkeypatch.setattr(Watch, "_ask_strings", lambda self, added: ask(self, [min(n, 1) for n in added]))


def one_token_more(watch: Watch, monkeypatch: Any) -> None:
    end = Watch._end

    def late(self: Watch, b: int, at: int, reason: str) -> None:
        end(self, b, min(at + (reason in ("stop_string", "criteria")), self.certain[b]), reason)

    monkeypatch.setattr(Watch, "_end", late)


def padding_is_something_else(watch: Watch, monkeypatch: Any) -> None:
    begin = Watch.begin
    monkeypatch.setattr(Watch, "begin", lambda *args, **options: begin(*args, **{**options, "padding": 5}))


def ends_are_forgotten(watch: Watch, monkeypatch: Any) -> None:
    end = Watch._end

    def keeping(self: Watch, b: int, at: int, reason: str) -> None:
        text = list(self.text[b])
        end(self, b, at, reason)
        self.text[b] = text

    monkeypatch.setattr(Watch, "_end", keeping)


def columns_skip(watch: Watch, monkeypatch: Any) -> None:
    step = Watch._step_columns

    def skipping(self: Watch) -> None:
        self.columns += self.columns == 4
        step(self)

    monkeypatch.setattr(Watch, "_step_columns", skipping)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (drafts_count_as_certain, check_blocks),
        (drafts_count_as_certain, check_columns),
        (strings_at_the_end_of_a_block_alone, check_strings),
        (one_token_more, check_strings),
        (one_token_more, check_columns),
        (padding_is_something_else, check_columns),
        (ends_are_forgotten, check_columns),
        (columns_skip, check_columns),
    ],
    ids=lambda x: x.__name__,
)
def test_a_planted_fault_is_seen(
    fault: Any, check: Any, model: Any, inputs: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(None, monkeypatch)
    strategy = Verified(4, threshold=0.0) if fault is drafts_count_as_certain else Static(4)
    with pytest.raises(AssertionError):
        check(strategy, model, inputs, *([tokenizer] if check is check_strings else []))
