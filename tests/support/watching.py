"""Who watches a run, and what they must be shown: streamers, criteria and stop strings, in step with transformers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import StopStringCriteria

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, pool
from mtpkern.strategies import Strategy
from support.recording import captured_by

NEW = 11


STOPS = [3, 7]


# One letter a token, and some of several: stop strings begin and end inside of tokens.
TOKENS = ["a", "b", "c", "d", "e", "f", "g", "h", "ab", "cab", "dd", "fgh", "i", "j", "bad", "<mask>"]


STRATEGIES = [Static(4), ConfAdapt(5, 0.1), Verified(4, threshold=0.0), Verified(4, threshold=0.0, masks=9)]


every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models

    plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@pytest.fixture
def kept(model: Any, monkeypatch: pytest.MonkeyPatch, lagging: None) -> Iterator[Callable[[], int]]:
    """Decoders are kept, and steps captured by a stand-in that runs them; says how many there are."""

    class Captured:
        def __init__(self, step: Any, device: Any, beside: Any) -> None:
            self.replay = step

    with captured_by(Captured, monkeypatch):
        yield lambda: len(pool._kept.get(model, {}))


class Recorder:
    """A streamer that notes what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        assert value.dtype == torch.int64
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


class Asked(StoppingCriteria):
    """A criterion that notes what it is asked of."""

    def __init__(self, rule: Callable[[Tensor], Any]) -> None:
        self.rule = rule
        self.prefixes: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        assert scores is None
        self.prefixes.append(input_ids.tolist())
        return self.rule(input_ids)


RULES: dict[str, Callable[[Tensor], Any]] = {
    "each by itself": lambda ids: (ids[:, -1] == 13) | (ids[:, -2:].sum(1) == 0),
    "one for all": lambda ids: bool((ids[:, -1] == 6).any()),
    "by the batch": lambda ids: (ids[:, -1:] == ids[:, -1]).sum(1) > 1,
    "at once": lambda ids: True,
    "never": lambda ids: False,
    "by the whole text": lambda ids: ids.sum(1) % 11 == 0,
}


def theirs(model: Any, tiny: Any, **kwargs: Any) -> Any:
    return model.generate(**kwargs, do_sample=False, suppress_tokens=[tiny.mask])


def in_step(prompts: Tensor, texts: Tensor, criteria: Any, pad: int, streamer: Any = None) -> Tensor:
    """The loop of transformers' greedy decoding over texts [B, n] that it would write; `theirs` shows that it is."""
    ids, going = prompts, torch.ones(len(prompts), dtype=torch.bool)
    if streamer is not None:
        streamer.put(ids)
    for column in texts.T:
        ids = torch.cat([ids, torch.where(going, column, pad)[:, None]], dim=1)
        going = going & ~criteria(ids, None)
        if streamer is not None:
            streamer.put(ids[:, -1])
        if not going.any():
            break
    if streamer is not None:
        streamer.end()
    return ids


def strings_of(texts: list[list[int]]) -> list[str]:
    """Of each text every letter and every few letters, so that stops fall on every place of every block."""
    found: dict[str, None] = {}
    for tokens in texts:
        text = "".join(TOKENS[token] for token in tokens)
        for width in (1, 3):
            found |= dict.fromkeys(text[i : i + width] for i in range(0, len(text) - width + 1, width))
    return list(found)


def check_strings(strategy: Strategy, model: Any, inputs: Any, tokenizer: Any, late: Any = False) -> None:
    free = mtpkern.generate(
        model, **inputs, max_new_tokens=NEW, strategy=strategy, return_dict_in_generate=True, pad_token_id=0
    )
    texts = free.sequences[:, 12:]
    if late:
        late.getfixturevalue("lagging")
    places = set()
    for string in strings_of(texts.tolist()):
        criterion = StopStringCriteria(tokenizer, string)
        expected = in_step(inputs["input_ids"], texts, criterion, 0)
        output = mtpkern.generate(
            model,
            **inputs,
            max_new_tokens=NEW,
            strategy=strategy,
            stop_strings=[string],
            tokenizer=tokenizer,
            return_dict_in_generate=True,
        )
        assert output.sequences.equal(expected), string
        for b, reason in enumerate(output.finish_reasons):
            emitted = sum(output.blocks[b])
            assert reason == ("stop_string" if "stop_string" in reason else "length")
            assert output.passes[b] == len(output.blocks[b])
            assert output.tokens_per_pass[b] == emitted / output.passes[b]
            # The record is that of the free run, cut.
            assert output.blocks[b][:-1] == free.blocks[b][: output.passes[b] - 1]
            assert 0 < output.blocks[b][-1] <= free.blocks[b][output.passes[b] - 1]
            assert bool(criterion(expected[b : b + 1, : 12 + emitted], None)) == (reason == "stop_string")
            assert (expected[b, 12 + emitted :] == 0).all()
            if reason == "stop_string":
                places.add((free.blocks[b][output.passes[b] - 1], output.blocks[b][-1]))
    width = 2 if strategy.verify else 4
    assert {place for size, place in places if size >= width} >= set(range(1, width + 1))


def check_columns(strategy: Strategy, model: Any, inputs: Any, late: Any = False) -> None:
    options = {**inputs, "max_new_tokens": NEW, "strategy": strategy, "pad_token_id": 0}
    texts = mtpkern.generate(model, **options)[:, 12:]
    if late:
        late.getfixturevalue("lagging")
    for rule in RULES.values():
        expected, shown, asked, streamer = Asked(rule), Recorder(), Asked(rule), Recorder()
        cut = in_step(inputs["input_ids"], texts, StoppingCriteriaList([expected]), 0, shown)
        output = mtpkern.generate(
            model, **options, stopping_criteria=[asked], streamer=streamer, return_dict_in_generate=True
        )
        assert output.sequences.equal(cut)
        assert asked.prefixes == expected.prefixes
        assert streamer.got == shown.got
        assert set(output.finish_reasons) <= {"criteria", "length"}


def check_blocks(strategy: Strategy, model: Any, inputs: Any, late: Any = False) -> None:
    given = {**inputs, "max_new_tokens": NEW, "eos_token_id": STOPS, "strategy": strategy}
    expected = mtpkern.generate(model, **given, return_dict_in_generate=True)
    if late:
        late.getfixturevalue("lagging")
    stream = mtpkern.stream(model, **given, return_dict_in_generate=True)
    blocks = list(stream)
    for b, text in enumerate(expected.sequences[:, 12:].tolist()):
        assert [len(block[b]) for block in blocks if block[b]] == expected.blocks[b]
        assert [token for block in blocks for token in block[b]] == text[: sum(expected.blocks[b])]
    assert stream.output.sequences.equal(expected.sequences)
    assert stream.output.blocks == expected.blocks
    assert stream.output.finish_reasons == expected.finish_reasons
    assert next(stream, None) is None


@pytest.fixture(scope="session")
def one(tiny: Any) -> dict[str, Tensor]:
    """A prompt of seven tokens, by itself."""
    ids, real = tiny.prompts(7)
    return {"input_ids": ids, "attention_mask": real}
