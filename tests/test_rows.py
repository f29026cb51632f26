"""Whatever a file holds: rows, an error that names the place, or a counted skip; no fourth outcome."""

import json
import random

import pytest

from mtpkern.cli import read_rows as read_prompts
from mtpkern.rows import BadRow, parse, read_lines, shown, strings
from mtpkern.train.data import BadData, DataArguments, load_data
from mtpkern.train.encoder import Encoder

GOOD = [
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
    {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
    {"question": "1 + 1?", "answer": "It is 2.\n#### 2", "system": "Be brief."},
    {"prompt": "1 + 1?", "text": "2", "tokens": [1], "blocks": [1], "tokens_per_pass": 1.0, "finished": False},
    {"text": "One and one is two."},
]
LINES = {
    "a number of 5,000 digits": b'{"question": "x", "answer": "y", "n": ' + b"9" * 5000 + b"}",
    "100,000 brackets": b"[" * 100_000,
    "100,000 nested lists": b'{"question": "x", "answer": "y", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a surrogate pair": b'{"question": "x\\ud800", "answer": "y"}',
    "half a pair in a name": b'{"question": "x", "answer": "y", "\\uDC00": 1}',
    "a field twice": b'{"question": "x", "question": "z", "answer": "y"}',
    "no UTF-8": b'{"question": "x", "answer": "\xff"}',
    "a raw NUL": b'{"question": "x", "answer": "\0"}',
    "UTF-16": '{"question": "x"}'.encode("utf-16-le"),
    "nothing but a number": b"1e999",
    "not a number": b"NaN",
    "two objects": b"{} {}",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_faulty_line_is_named_or_skipped(tmp_path, bytes_of, capsys, line):
    good = [json.dumps({"question": f"{i}?", "answer": "y"}).encode() for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*good, line]))
    encode = Encoder(bytes_of("qwen"))
    with pytest.raises(BadData, match=r"rows\.jsonl, line 4: "):
        load_data(DataArguments([str(path)]), encode)
    texts, _, (report,) = load_data(DataArguments([str(path)], bad_rows="skip"), encode)
    assert len(texts) == 3
    assert [count for count, _ in report.skipped.values()] == [1]
    # The same as prompts, and in a file that is one list.
    path.write_bytes(b'{"prompt": "x"}\n' + line.replace(b"question", b"prompt"))
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: expected"):
        read_prompts(path)
    whole = path.with_suffix(".json")
    whole.write_bytes(b"[" + b", ".join([*good, line]) + b"]")
    with pytest.raises(ValueError, match=r"rows\.json"):
        load_data(DataArguments([str(whole)]), encode)


def test_what_is_strange_but_good_is_read(tmp_path, bytes_of):
    """Numbers that are none beside the texts, NUL and other controls as escapes, both halves of a pair, a huge line."""
    rows = [
        b'{"question": "x", "answer": "y", "score": NaN, "other": -Infinity}',
        b'{"question": "x\\u0000\\u001b", "answer": "y"}',
        b'{"question": "\\ud83d\\ude00", "answer": "\\\\ud800"}',
        b'\xef\xbb\xbf{"question": "x", "answer": "' + b"y " * 300_000 + b'"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r\n".join(rows[::-1]))
    tokenizer = bytes_of("qwen")
    texts, _, _ = load_data(DataArguments([str(path)]), Encoder(tokenizer))
    assert len(texts) == 4
    assert "\U0001f600" in tokenizer.decode(texts[1]["input_ids"])


def test_a_text_that_the_tokenizer_does_not_take_fails_alone(tmp_path, bytes_of, monkeypatch):
    tokenizer = bytes_of("qwen")
    encode = Encoder(tokenizer, chat=False)
    call = type(tokenizer).__call__

    def refuse(self, texts, **options):
        if any("y3" in text for text in texts):
            raise TypeError("TextInputSequence must be str")
        return call(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "x", "answer": f"y{i}"}) + "\n" for i in range(5)))
    says = "line 4: the tokenizer does not take this text: TextInputSequence must be str; mend the row"
    with pytest.raises(BadData, match=says):
        load_data(DataArguments([str(path)], chat=False), encode)
    texts, _, (report,) = load_data(DataArguments([str(path)], chat=False, bad_rows="skip"), encode)
    assert (len(texts), report.skipped) == (4, {"tokenizer": (1, f"{path}, line 4")})


def test_a_template_that_fails_on_a_row_names_it(tmp_path, bytes_of):
    tokenizer = bytes_of("qwen")
    front = "{% if 1 // (messages[0]['content'] | length - 3) %}{% endif %}"
    tokenizer.chat_template = front + tokenizer.chat_template
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "x" * n, "answer": "y"}) + "\n" for n in (1, 2, 3)))
    with pytest.raises(BadData, match=r"line 3: the chat template refuses these messages: .*by zero"):
        load_data(DataArguments([str(path)]), Encoder(tokenizer))


def test_a_broken_parquet_file_is_named(tmp_path, bytes_of):
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    rows = [{"question": f"What is {i} + {i * 7919}?", "answer": str(i)} for i in range(2000)]
    write_table(pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    encode = Encoder(bytes_of("qwen"))
    assert len(load_data(DataArguments([str(path)]), encode)[0]) == 2000
    content[3000:3400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet"):
        load_data(DataArguments([str(path)]), encode)


def mangle(rng, content):
    """A good file with one to three things done to it: cut out, doubled, put in, put in place of others."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice((1, 1, 4, 40)))
        signs = (b'"', b"{", b"]", b",", b":", b"\\", b"\n", b"\\ud83d")
        values = (b"null", b"[]", b"1", b"true", b'""', b"<|im_end|>")
        put = rng.choice(
            (
                b"",
                content[at:to] * 3,
                rng.randbytes(rng.choice((1, 3))),
                rng.choice(values),
                rng.choice(signs) + content[at:to],
                rng.choice(list(LINES.values())) + content[at:to],
            )
        )
        content = content[:at] + put + content[to:]
    return content


def odd(rng, value, depth=0):
    """A good row with a value of it, somewhere, in exchange for one of another kind."""
    if depth < 3 and value and isinstance(value, dict) and rng.random() < 0.8:
        name = rng.choice(list(value))
        return {**value, name: odd(rng, value[name], depth + 1)}
    if depth < 3 and value and isinstance(value, list) and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], odd(rng, value[i], depth + 1), *value[i + 1 :]]
    deep = []
    for _ in range(rng.choice((5, 200))):
        deep = [deep]
    return rng.choice(
        (None, 1, -0.5, True, "", " ", "x\0", "<|im_end|>", "\ufffe", [], {}, [None], {"a": None}, [[]], deep)
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_mangled_file_is_rows_an_error_or_a_counted_skip(tmp_path, bytes_of, suffix):
    rng = random.Random(suffix)
    path = tmp_path / f"rows{suffix}"
    encoders = {chat: Encoder(bytes_of("qwen"), chat=chat) for chat in (True, False)}
    ends = {"rows": 0, "error": 0, "skip": 0}
    for turn in range(300):
        rows = [rng.choice(GOOD)] * rng.randint(1, 4)
        if turn % 3 == 0:
            rows[-1] = odd(rng, rows[-1])
        lines = [json.dumps(row).encode() for row in rows]
        content = b"\n".join(lines) if suffix == ".jsonl" else b"[" + b",\n".join(lines) + b"]"
        path.write_bytes(content if turn % 3 == 0 else mangle(rng, content))
        chat, bad_rows = rng.random() < 0.5, rng.choice(("error", "skip"))
        arguments = DataArguments([str(path)], chat=chat, bad_rows=bad_rows)
        fault = None
        try:
            texts, _, (report,) = load_data(arguments, encoders[chat])
        except ValueError as error:
            fault = error
        if fault is not None:
            assert type(fault) in (ValueError, BadData), fault
            assert str(path) in str(fault)
            assert "\n" not in str(fault)
            ends["error"] += 1
            continue
        assert report.rows == len(texts) + sum(count for count, _ in report.skipped.values())
        assert report.used == len(texts) > 0
        ends["skip" if report.skipped else "rows"] += 1
    # All three come up, or the mangling has become too strong or too weak.
    assert min(ends.values()) > (20 if suffix == ".jsonl" else 5), ends


def test_small_things():
    assert shown("x" * 80) == "'" + "x" * 56 + "..."
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "<list>"
    assert shown(10**5000) == "<int>"
    assert list(strings(deep)) == []
    assert sorted(strings({"a": ["b", {"c": 1}], "d": "e"})) == ["a", "b", "c", "d", "e"]
    while deep:  # freed from without: a C stack is no deeper
        deep = deep[0]
    with pytest.raises(BadRow, match=r"expected JSON, got '\[\\n\\n\?\]' \(line 3: Expecting value\)"):
        parse("[\n\n?]", "JSON")


def test_blank_lines_count(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\n{"a": 1}\n \t\r\n[2]')
    assert list(read_lines(tmp_path / "x.jsonl")) == [(2, {"a": 1}), (4, [2])]
