"""Stop strings: the same ends with every tokenizer, whether transformers can look into it or the text is decoded."""

import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StopStringCriteria

import mtpkern
from mtpkern import Static, Verified
from mtpkern.stops import NO_TOKEN, TextStops, stop_criterion

WORDS = ["no", "yes", "oh", "so", "the", "then", "and", "a", "of", "off", "is", "it", "Q", "A", "hen", "<mask>"]


@cache
def words() -> Any:
    """Whole words, of which transformers' criterion can make nothing."""
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(WORDS)}, unk_token="<mask>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def letters() -> Any:
    """Some letters a token, without bytes."""
    from tokenizers import Tokenizer, decoders, models

    tokens = ["a", "b", "c", "ab", "cab", "é", "bcé", " ", " a", "a ", "cc"]
    plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*tokens, "d", "e", "f"])}, merges=[]))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def pieces() -> Any:
    """As Llama 2's: spaces in front of words, and bytes of what is no token."""
    from tokenizers import Tokenizer, decoders, models

    tokens = [
        "<unk>",
        "</s>",
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
        "c",
        "d",
        "e",
        "f",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    plain = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tokenizers_that_are_known(bytes_of: Any) -> dict[str, tuple[Any, list[list[int]]]]:
    """Each with tokens to draw from, those that are drawn together joined."""
    byte, piece = bytes_of("qwen"), pieces()
    drawn = byte("ab é c", add_special_tokens=False).input_ids
    one, two, three = ([piece.convert_tokens_to_ids(f"<0x{x:02X}>") for x in letter.encode()] for letter in "bé€")
    return {
        "letters": (letters(), [[x] for x in range(11)]),
        "bytes": (byte, [[x] for x in [*drawn, *drawn, byte.eos_token_id]]),
        "pieces": (piece, [*([x] for x in range(1, 9)), one, *[two, three] * 4]),
    }


@pytest.mark.parametrize("kind", ["letters", "bytes", "pieces"])
def test_the_text_says_what_transformers_says(kind: str, tokenizers_that_are_known: Any) -> None:
    tokenizer, tokens = tokenizers_that_are_known[kind]
    rng = random.Random(0)
    # The first of a text may lose its space.
    rows = torch.tensor([sum((rng.choice(tokens) for _ in range(24)), tokens[3])[:24] for _ in range(40)])
    ended = 0
    for strings in (
        ["a"],
        ["ab"],
        ["é"],
        [" a", "b c", "é€"],
        ["cab", "aé", "bb"],
        ["a ab", "b</s>", "a<|im_end|>", "f"],
    ):
        ends = []
        for criterion in (StopStringCriteria(tokenizer, strings), TextStops(tokenizer, strings)):
            # At the first prefix of which it says so.
            asked = torch.stack([criterion(rows[:, :t], None) for t in range(2, 25)], dim=1)
            ends.append(torch.where(asked.any(1), asked.int().argmax(1), -1))
        odd = ends[0] != ends[1]
        assert not odd.any(), (strings, tokenizer.batch_decode(rows[odd]))
        ended += int((ends[0] > 0).sum())
        assert type(stop_criterion(tokenizer, strings)) is StopStringCriteria
    assert ended > 100


def test_a_string_right_behind_a_character_of_four_bytes() -> None:
    """Of which no byte may be missing: with bytes that begin no character those behind them are none either."""
    tokenizer = pieces()
    ids = tokenizer.convert_tokens_to_ids(["a", *(f"<0x{x:02X}>" for x in "🙂é".encode())])
    stops = TextStops(tokenizer, ["é"])
    assert [stops(torch.tensor([ids[:t]]), None).tolist() for t in range(4, 8)] == [[False]] * 3 + [[True]]


def test_what_was_there_before_the_last_token_does_not_count() -> None:
    tokenizer = words()
    with pytest.raises(Exception, match=r"."):
        StopStringCriteria(tokenizer, ["Q"])
    stops = stop_criterion(tokenizer, ["yes n", "Q"])
    assert type(stops) is TextStops
    for text, ends in {"yes no": 1, "yes no oh": 0, "yes": 0, "Q": 1, "Q Q": 1, "Q A": 0, "oh yes no": 1}.items():
        ids = [WORDS.index(word) for word in text.split()]
        assert stops(torch.tensor([[NO_TOKEN] * 3 + ids]), None).tolist() == [bool(ends)], text
    with pytest.raises(TypeError, match="tokenizer must be the model's tokenizer itself, got 'gpt2'"):
        stop_criterion("gpt2", ["Q"])  # type: ignore[arg-type]


# In decoding


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Any:
    model = tiny.model("llama")
    model.config.mtpkern["k_max"] = 16
    return model


def end_of(prompt: list[int], new: list[int], strings: list[str]) -> int | None:
    """How many new tokens there are when the first string is whole in the text, all of which is decoded."""
    tokenizer = words()
    for t in range(1, len(new) + 1):
        text, before = (str(tokenizer.decode([*prompt, *new[:n]])) for n in (t, t - 1))
        if any(string in text[max(0, len(before) - len(string) + 1) :] for string in strings):
            return t
    return None


@pytest.mark.parametrize("k", range(1, 17))
def test_at_every_place_of_a_block(k: int, model: Any, tiny: SimpleNamespace) -> None:
    """Strings that begin and end inside of words, of blocks of k tokens."""
    ids, real = tiny.prompts(*range(3, 19))
    given = {"input_ids": ids, "attention_mask": real, "max_new_tokens": 2 * k + 5, "strategy": Static(k)}
    given |= {"return_dict_in_generate": True, "pad_token_id": 0}
    T, tokenizer = ids.shape[1], words()
    texts = mtpkern.generate(model, **given)
    prompts, free = [row[mask == 1].tolist() for row, mask in zip(ids, real)], texts.sequences[:, T:].tolist()
    # Of each place of a block some that end there and not before, each of another row.
    ending: dict[int, list[str]] = {place: [] for place in range(1, k + 1)}
    for place, found in ending.items():
        i = next(i for i in range(3, 2 * k + 4) if i % k + 1 == place)
        for b in [*range(place - 1, 16), *range(place - 1)]:
            string = str(tokenizer.decode(free[b][:i]))[-8:] + " " + WORDS[free[b][i]][:1]
            if len(found) < 4 and end_of(prompts[b], free[b][: i + 1], [string]) == i + 1:
                found.append(string)
    places: set[int] = set()
    for turn in range(4):
        # Strings of other places may end a row before: what is missing is asked for once more.
        strings = [found[turn % len(found)] for place, found in ending.items() if place not in places]
        output = mtpkern.generate(model, **given, stop_strings=strings, tokenizer=tokenizer)
        for b, row in enumerate(output.sequences[:, T:].tolist()):
            end = end_of(prompts[b], free[b], strings)
            reason = "length" if end is None else "stop_string"
            assert (output.finish_reasons[b], sum(output.blocks[b])) == (reason, end or 2 * k + 5)
            assert row[:end] == free[b][:end]
            assert not any(row[end or len(row) :])
            if end is not None:
                places.add(output.blocks[b][-1])
        if places == set(range(1, k + 1)):
            return
    raise AssertionError(f"stops fell on {places} alone")


def test_every_way_of_decoding_cuts_there(model: Any, tiny: SimpleNamespace) -> None:
    ids, real = tiny.prompts(4, 9)
    prompts = [row[mask == 1].tolist() for row, mask in zip(ids, real)]
    tokenizer, new = words(), 20
    given = {"max_new_tokens": new, "strategy": Verified(4, threshold=0.0)}
    free = mtpkern.generate(model, ids, attention_mask=real, **given)[:, 9:].tolist()
    # One that the first prompt holds, too: only what is written counts.
    string = str(tokenizer.decode(free[0][5:8]))[1:-1]
    given |= {"tokenizer": tokenizer, "stop_strings": [string, str(tokenizer.decode(prompts[0][1:3]))]}
    ends = [end_of(prompt, row, given["stop_strings"]) or new for prompt, row in zip(prompts, free)]
    cut = [row[:end] for row, end in zip(free, ends)]
    assert 1 < ends[0] < 9
    assert [o.tokens for o in mtpkern.generate_batch(model, prompts, **given)] == cut
    shown: list[list[int]] = [[], []]
    for blocks in mtpkern.stream(model, ids, attention_mask=real, **given):
        for text, block in zip(shown, blocks):
            text += block
    assert shown == cut
    # The criterion by itself is one of transformers' kind.
    criterion = stop_criterion(tokenizer, given["stop_strings"])
    options = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": [tiny.mask], "pad_token_id": 0}
    theirs: Tensor = model.generate(ids, attention_mask=real, stopping_criteria=[criterion], **options)
    assert [row[:end] for row, end in zip(theirs[:, 9:].tolist(), ends)] == cut
    assert theirs.shape[1] - 9 == max(ends)
