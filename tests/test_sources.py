"""Where training data come from: files, folders and streams, shuffled, held out and refused."""

import json
import os

import pytest
from torch.utils.data import DataLoader

from mtpkern.train import data as data_module
from mtpkern.train.data import DataArguments, EncodedTexts, StreamedTexts, is_held_out, load_data
from mtpkern.train.encoder import Encoder
from mtpkern.train.sources import read_rows
from support.rows import prompts, sums, write


def test_held_out_groups(tmp_path, bytes_of):
    encode = Encoder(bytes_of("qwen"), chat=False)
    rows = [
        {
            "query": f"{word} {i}?",
            "response": f"{i}.",
            "original_question": f" Question  {i}" if word == "a" else f"question {i}",
        }
        for i in range(60)
        for word in ("a", "b", "c")
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    arguments = DataArguments([path], chat=False, group_field="original_question", eval_fraction=0.2)
    train, held_out, reports = load_data(arguments, encode)
    numbers = [{prompt.split()[1] for prompt in prompts(texts, encode.tokenizer)} for texts in (train, held_out)]
    assert not numbers[0] & numbers[1]
    assert len(train) + len(held_out) == 180
    assert len(train) == 3 * len(numbers[0])
    assert 6 <= len(numbers[1]) <= 18
    assert [(r.rows, r.used, r.other_split) for r in reports] == [
        (180, len(train), len(held_out)),
        (180, len(held_out), len(train)),
    ]
    # Rows that are added move none of the others.
    write(tmp_path / "rows.jsonl", [{"query": "x", "response": "y", "original_question": "z"}, *rows])
    assert set(prompts(load_data(arguments, encode)[1], encode.tokenizer)) >= set(prompts(held_out, encode.tokenizer))
    write(tmp_path / "rows.jsonl", [*rows[:3], {"query": "x", "response": "y"}])
    with pytest.raises(
        ValueError, match=r"line 4: expected a string in column 'original_question'; got columns query, resp"
    ):
        load_data(arguments, encode)
    write(tmp_path / "rows.jsonl", [*rows[:3], {"query": "x", "response": "y", "original_question": 7}])
    with pytest.raises(ValueError, match=r"line 4: expected a string in column 'original_question'; got 7"):
        load_data(arguments, encode)


def test_the_hash_is_the_same_in_every_process():
    held_out = [7, 10, 13, 16, 24, 28, 30, 31, 33, 36, 38]
    assert [i for i in range(40) if is_held_out(f"question {i}", 0.2)] == held_out
    assert all(is_held_out(f"\n QUESTION\t{i} ", 0.2) for i in held_out)


def test_every_source_gives_the_same_rows(tmp_path):
    from datasets import Dataset, config

    assert str(config.HF_DATASETS_CACHE) == os.environ["HF_DATASETS_CACHE"], "imported too early: kept under HOME"
    rows = sums(7)
    lines = write(tmp_path / "a.jsonl", rows[:3])
    (tmp_path / "b.json").write_text(json.dumps(rows[3:]))
    Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", rows)

    assert [row for _, row in read_rows([lines, str(tmp_path / "b.json")])] == rows
    assert [row for _, row in read_rows([str(tmp_path / "c.parquet")])] == rows
    places, found = zip(*read_rows([str(folder)], streaming=True))
    assert list(found) == rows
    assert places[2] == f"{folder}, row 3"
    for name in (tmp_path / "d.jsonl", tmp_path / "d", "a/b/c", "./d"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            list(read_rows([str(name)]))
    # Several sets, of any kind, are one.
    again = tmp_path / "again"
    again.mkdir()
    write(again / "train.jsonl", rows[:2])
    places, found = zip(*read_rows([str(folder), str(again), lines]))
    assert list(found) == rows + rows[:2] + rows[:3]
    assert places[7] == f"{again}, row 1"
    (tmp_path / "e.json").write_text('{"question": 1}')
    with pytest.raises(ValueError, match=r"use \.jsonl"):
        list(read_rows([str(tmp_path / "e.json")]))


def test_what_save_to_disk_has_written(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(3)]
    alone, splits = str(tmp_path / "alone"), str(tmp_path / "splits")
    Dataset.from_list(rows).save_to_disk(alone)
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(splits)
    for source, split, want in ((alone, "train", rows), (splits, "train", rows), (splits, "test", rows[:1])):
        assert [row for _, row in read_rows([source], split=split, streaming=split == "test")] == want
    with pytest.raises(ValueError, match="splits has no split 'validation'"):
        next(read_rows([splits], split="validation"))


def test_files_that_cannot_be_read(tmp_path, bytes_of):
    """A file of another kind or encoding is an error that names it; a byte order mark is none."""
    encode = Encoder(bytes_of("qwen"))
    line = json.dumps(sums(1)[0]).encode()
    for name, content, says in (
        ("a.csv", b"question,answer", r"a.csv: a data file must be one of .jsonl, .json, .parquet"),
        ("a.parquet", b"PAR1", "a.parquet: no whole parquet file"),
        ("a.json", b"[\xe9]", "a.json: expected UTF-8"),
        (
            "a.jsonl",
            line + b'\n{"question": "caf\xe9"}',
            r"a.jsonl, line 2: expected a JSON object, got .*\(no UTF-8: byte 0xe9 at 17\)",
        ),
        ("b.jsonl", b"hello\n[1]", "b.jsonl, line 1: expected a JSON object, .* no format shows in the first 2 rows"),
        ("c.jsonl", b"[1]", r"c.jsonl, line 1: expected an object with fields; got \[1\]"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            load_data(DataArguments([str(tmp_path / name)]), encode)
    for name, content in (("d.jsonl", line), ("d.json", b"[" + line + b"]")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert len(load_data(DataArguments([str(tmp_path / name)]), encode)[0]) == 1


def test_only_and_empty(tmp_path, bytes_of):
    encode = Encoder(bytes_of("qwen"))
    rows = [{**row, "type": f"{'GSM' if i % 3 else 'MATH'}_SV"} for i, row in enumerate(sums(6))]
    path = write(tmp_path / "rows.jsonl", rows)
    texts, _, (report,) = load_data(DataArguments([path], only="type=GSM"), encode)
    assert (len(texts), report.filtered) == (4, 2)
    with pytest.raises(ValueError, match=r"no row is left to train on.*6 left out by 'only'"):
        load_data(DataArguments([path], only="type=X"), encode)
    with pytest.raises(ValueError, match="no row is left to train on"):
        load_data(DataArguments([write(tmp_path / "none.jsonl", [])]), encode)


def test_encoded_texts_give_back_what_went_in():
    examples = [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": [8], "prompt_length": 2}]
    texts = EncodedTexts(examples)
    assert (len(texts), texts[0], texts[1], texts[-1]) == (2, *examples, examples[1])
    with pytest.raises(IndexError):
        texts[2]


def test_stream_is_shuffled_by_epoch_and_shared_by_workers(tmp_path, bytes_of, monkeypatch):
    monkeypatch.setattr(data_module, "_CHUNK", 4)
    encode = Encoder(bytes_of("qwen"), chat=False)
    path = write(tmp_path / "rows.jsonl", sums(30))
    stream, held_out, _ = load_data(
        DataArguments([path], chat=False, streaming=True, shuffle_buffer=10, eval_fraction=0.2, max_eval_rows=2), encode
    )
    assert isinstance(stream, StreamedTexts)
    assert len(held_out) == 2
    whole, _, _ = load_data(DataArguments([path], chat=False, eval_fraction=0.2), encode)
    texts = prompts(whole, encode.tokenizer)
    first = prompts(stream, encode.tokenizer)
    assert first == prompts(stream, encode.tokenizer)
    assert first != texts
    assert sorted(first) == sorted(texts)
    stream.set_epoch(1)
    second = prompts(stream, encode.tokenizer)
    assert second != first
    assert sorted(second) == sorted(texts)
    both = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(prompts(both, encode.tokenizer)) == sorted(texts)


def test_a_stream_says_what_it_skips(tmp_path, bytes_of, caplog):
    encode = Encoder(bytes_of("qwen"))
    path = write(tmp_path / "rows.jsonl", [*sums(1), *({"question": "x"} for _ in range(11))])
    arguments = DataArguments([path], streaming=True, shuffle_buffer=0, bad_rows="skip")
    stream, _, _ = load_data(arguments, encode)
    assert len(list(stream)) == 1
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{path}, line 2 is skipped: missing field (1 so far)",
        f"{path}, line 11 is skipped: missing field (10 so far)",
    ]
    empty, _, _ = load_data(
        DataArguments(
            [write(tmp_path / "bad.jsonl", [{"question": "", "answer": "1"}])], streaming=True, bad_rows="skip"
        ),
        encode,
    )
    with pytest.raises(ValueError, match="no row is left"):
        list(empty)
