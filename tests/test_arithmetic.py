import hashlib
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import islice
from typing import get_args

import pytest
from transformers import AutoTokenizer

from mtpkern.grading import final_answer
from mtpkern.train import arithmetic
from mtpkern.train.arithmetic import (
    LEVELS,
    Problem,
    Split,
    build_tokenizer,
    encode,
    names,
    problems,
    prompt,
    split_of_numbers,
)
from mtpkern.train.data import DataArguments, load_data
from mtpkern.train.encoder import Encoder
from mtpkern.train.options import read_config

SPLITS = get_args(Split)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module", params=LEVELS)
def difficulty(request):
    return request.param


def numbers_of(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def names_of(text: str) -> set[str]:
    everyone = {name for split in SPLITS for name in names(split)}
    return everyone & set(re.findall(r"[A-Za-z]+", text))


def test_splits_share_no_names_and_no_numbers(difficulty):
    seen = {split: list(problems(split, 150, difficulty=difficulty)) for split in SPLITS}
    for split, of_split in seen.items():
        for problem in of_split:
            people = names_of(problem.question + problem.answer)
            assert people
            assert people <= set(names(split))
            assert split_of_numbers(numbers_of(problem.question)) == split
    for a, b in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not {numbers_of(p.question) for p in seen[a]} & {numbers_of(p.question) for p in seen[b]}


def test_names_are_disjoint_and_every_syllable_occurs_in_training(tokenizer):
    sets = {split: names(split) for split in SPLITS}
    assert [len(sets[split]) for split in SPLITS] == [192, 32, 32]
    assert len(set().union(*sets.values())) == 256
    syllables = {split: {s for name in sets[split] for s in tokenizer.tokenize(name)} for split in SPLITS}
    assert syllables["train"] >= syllables["test"] | syllables["validation"]
    for name in set().union(*sets.values()):
        assert len(tokenizer.tokenize(name)) == 2, name


def test_training_uses_the_whole_vocabulary_of_the_other_splits(tokenizer):
    def used(split, n):
        return {i for problem in problems(split, n) for i in encode(problem, tokenizer)[0]}

    assert used("train", 1500) >= used("test", 400) | used("validation", 400)


def worked_total(problem: Problem) -> int:
    """The result by the question alone: the operation that each sentence tells, applied in order."""
    opening, *deeds, _closing = re.split(r"(?<=[.?]) ", problem.question)
    (total,) = numbers_of(opening)
    for deed in deeds:
        given = numbers_of(deed)
        if "each" in deed:
            total += given[0] * given[1]
        elif "times as many" in deed:
            total *= given[0]
        elif "equal parts" in deed or "divides" in deed:
            assert total % given[0] == 0
            total //= given[0]
        elif "more" in deed:
            total += given[0]
        else:
            total -= given[0]
    return total


def test_answers_are_right(difficulty):
    level = LEVELS[difficulty]
    operations = set()
    for problem in problems("train", 500, difficulty=difficulty):
        steps = re.findall(r"(\d+) ([-+×÷]) (\d+) = (\d+)", problem.answer)
        assert min(level.steps) <= len(steps) <= max(level.steps)
        for left, operation, right, result in steps:
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b == c, "-": a - b == c, "×": a * b == c, "÷": a == b * c}[operation], problem.answer
            assert 0 < c <= level.limit
            operations.add(operation)
        assert worked_total(problem) == problem.result == int(steps[-1][3]), problem
        assert final_answer(problem.answer, "hashes") == problem.result
    assert operations == (set("+-×÷") if level.scaling else set("+-×"))


def test_the_question_fixes_the_answer():
    """The wording of an answer follows from deeds, closing and thing: each must be told apart in the question."""
    pairs = [arithmetic.GAINS, arithmetic.LOSSES, arithmetic.GROUPS, arithmetic.TIMES, arithmetic.SHARES]
    deeds = [clause for group in pairs for clause, _ in group]
    closings = [ask for ask, _ in arithmetic.CLOSINGS]
    assert len(set(deeds)) == len(deeds) >= 24
    assert len(set(closings)) == len(closings)
    assert all("{thing}" in opening for opening in arithmetic.OPENINGS)
    for problem in problems("train", 500):
        # Besides the fixed words of the frames, an answer says only names and things that its question has said.
        content = names_of(problem.answer) | (
            set(problem.answer.split()) & {*arithmetic.OBJECTS, *arithmetic.ADJECTIVES}
        )
        assert content <= set(re.findall(r"[A-Za-z]+", problem.question))


def test_same_problems_in_every_process():
    """Strings hash differently in each, unless a seed is set, as it is in the one beside this."""
    program = (
        "import hashlib; from mtpkern.train.arithmetic import problems, build_tokenizer;"
        "text = repr([list(problems(s, 20, seed=3, difficulty=d))"
        " for s in ('train', 'validation', 'test') for d in ('shipped', 'medium', 'hard')]);"
        "text += build_tokenizer().backend_tokenizer.to_str();"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    other = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    ).stdout
    with redirect_stdout(StringIO()) as here:
        exec(program, {})
    assert here.getvalue() == other


def test_shipped_problems_have_not_changed():
    """The shipped checkpoint was trained on these texts: a change here means training it again."""
    text = "".join(repr(list(problems(split, 50))) for split in SPLITS)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "fcc99e992fe0d91f"
    vocabulary = repr(sorted(build_tokenizer().get_vocab().items()))
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:16] == "733146b54db41c50"


def test_stream_is_a_pure_function_of_its_arguments():
    assert list(problems("test", 30)) == list(islice(problems("test"), 30))
    assert list(problems("test", 30, seed=1)) != list(problems("test", 30))
    assert list(problems("test", 0)) == []


@pytest.mark.parametrize("arguments", [{"split": "dev"}, {"difficulty": "easy"}, {"n": -1}])
def test_wrong_arguments_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        problems(**{"split": "train", **arguments})


def test_text_survives_the_tokenizer(tokenizer, difficulty):
    for problem in (p for split in SPLITS for p in problems(split, 60, difficulty=difficulty)):
        ids, length = encode(problem, tokenizer)
        text = f"{prompt(problem)} {problem.answer}"
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids[length:], skip_special_tokens=True) == problem.answer
        assert ids[:length] == tokenizer(prompt(problem)).input_ids
        assert ids[:-1] == tokenizer(text).input_ids
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id


def test_special_tokens_are_distinct_and_digits_stand_alone(tokenizer):
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 4
    assert sorted(tokenizer.all_special_ids) == sorted(special)
    assert [tokenizer.decode([i]) for i in special] == ["<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"]
    assert tokenizer.tokenize("14 + 9 = 23") == ["▁", "1", "4", "▁+▁", "9", "▁=▁", "2", "3"]
    assert "<|mtp|>" not in tokenizer.get_vocab()
    assert len(tokenizer) == tokenizer.vocab_size == len(set(arithmetic._vocabulary()))


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.padding_side == tokenizer.padding_side == "left"
    for problem in problems("test", 50, difficulty="hard"):
        ids, length = encode(problem, loaded)
        assert (ids, length) == encode(problem, tokenizer)
        assert loaded.decode(ids[length:], skip_special_tokens=True) == problem.answer
    assert loaded.add_tokens(["<|mtp|>"], special_tokens=True) == 1
    assert loaded.decode([*encode(problem, loaded)[0], len(loaded) - 1])[-7:] == "<|mtp|>"


def test_lengths_fit_the_small_model(tokenizer):
    lengths = [encode(problem, tokenizer) for problem in problems("train", 1000)]
    answers = [len(ids) - length for ids, length in lengths]
    assert max(len(ids) for ids, _ in lengths) <= 160
    assert 45 <= sum(answers) / len(answers) <= 70


def test_written_rows_have_the_ids_of_encode(tokenizer, tmp_path, capsys):
    folder = tmp_path / "made" / "here"
    arithmetic.main(["--write", str(folder), "--problems", "600", "--held-out", "20", "--seed", "3"])
    assert f"{folder / 'test.jsonl'}: 20 problems" in capsys.readouterr().out
    values = read_config("arithmetic")
    encoder = Encoder(tokenizer, chat=values["chat"], separator=values["separator"])
    for split, n in (("train", 600), ("validation", 20), ("test", 20)):
        arguments = DataArguments([str(folder / f"{split}.jsonl")])
        texts, _, _ = load_data(arguments, encoder)
        expected = [encode(problem, tokenizer) for problem in problems(split, n, seed=3)]
        assert [tuple(texts[i].values()) for i in range(len(texts))] == expected


def test_module_prints_problems(capsys):
    arithmetic.main()
    out = capsys.readouterr().out
    assert all(f"[{split}: " in out for split in SPLITS)
    assert "#### " in out
