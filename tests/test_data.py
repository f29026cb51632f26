"""Training data: formats, templates, and what is cut or refused."""

import json

import pytest

import mtpkern
from mtpkern.cli import main
from mtpkern.rows import BadRow
from mtpkern.train.data import DataArguments, EncodedTexts, load_data
from mtpkern.train.encoder import Encoder
from mtpkern.train.formats import FORMATS, conversation_of, messages_of, recognise
from support.rows import sums, write

QUESTION, ANSWER = "What is 1 + 1?", "It is 2.\n#### 2"


TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


SAME = {
    "messages": {"messages": TURNS},
    "conversations": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "prompt-completion": {"prompt": QUESTION, "completion": ANSWER},
    "query-response": {"query": QUESTION, "response": ANSWER, "type": "GSM_SV", "original_question": "1 + 1?"},
    "question-answer": {"question": QUESTION, "answer": ANSWER},
    "generated": {"prompt": QUESTION, "text": ANSWER, "tokens": [1, 2], "blocks": [1, 1], "tokens_per_pass": 1.0},
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_is_recognised_and_read(name):
    assert recognise(SAME[name]) == name
    assert messages_of(SAME[name], name) == TURNS


def test_other_shapes_of_a_row():
    lists = {"prompt": [{"role": "system", "content": "Be brief."}, TURNS[0]], "completion": [TURNS[1]]}
    assert messages_of(lists, "prompt-completion") == [*lists["prompt"], TURNS[1]]
    assert recognise({"text": "x", "source": "y"}) == "text"
    assert messages_of({"text": ANSWER}, "text") == [TURNS[1]]
    # A message of one part is its text; what further parts would be, each template decides otherwise.
    (part,) = messages_of(
        {"messages": [{**TURNS[0], "content": [{"type": "text", "text": QUESTION}]}, TURNS[1]]}, "messages"
    )[:1]
    assert part == TURNS[0]
    for odd in ([{"type": "text", "text": "a"}] * 2, [{"type": "image", "text": "a"}], []):
        with pytest.raises(BadRow, match=r"messages\[0\].content: expected a string"):
            messages_of({"messages": [{**TURNS[0], "content": odd}, TURNS[1]]}, "messages")


def test_what_generate_writes_is_read(tmp_path, tiny, bytes_of, capsys):
    """Prompts of both kinds through `mtpkern generate --file`: the text is their answer, and a cut one has no EOS."""
    tokenizer = bytes_of("qwen")
    model = tiny.model("llama", vocab_size=320, eos_token_id=tokenizer.eos_token_id)
    del model.config.mtpkern
    mtpkern.add_mask_token(model, tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = [{"prompt": QUESTION, "id": 1}, {"messages": [{"role": "system", "content": "Brief."}, TURNS[0]]}]
    file, out = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    command = ["generate", str(tmp_path / "model"), "--file", file, "--output", str(out), "--max-new-tokens", "6"]
    assert main(command) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    # This model's bytes are no text; what matters is where the parts of a row go.
    for row, finished in zip(rows, (False, True)):
        row |= {"text": f"It is {len(row)}.", "finished": finished}
    texts, _, (report,) = load_data(DataArguments([write(out, rows)]), Encoder(tokenizer))
    template = tokenizer.apply_chat_template
    for text, row, end in zip(texts, rows, ("", "<|im_end|>")):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        prompt, answer = (tokenizer.decode(part) for part in halves(text))
        assert prompt == template(messages, tokenize=False, add_generation_prompt=True)
        assert answer == row["text"] + end
    assert "2 used (1 of them unfinished, without an EOS)" in str(report)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("mark", [{"finished": False}, {"finish_reason": "length"}])
def test_an_unfinished_answer_has_no_eos(bytes_of, chat, mark):
    for kind in ("llama", "qwen"):
        tokenizer = bytes_of(kind)
        encode = Encoder(tokenizer, chat=chat)
        row = {"kind": "x", "messages": MORE}
        whole, cut = encode([conversation_of(row, "messages"), conversation_of(row | mark, "messages")])
        assert cut["unfinished"]
        assert "unfinished" not in whole
        assert whole["input_ids"] == [*cut["input_ids"], tokenizer.eos_token_id]
        assert cut["prompt_length"] == whole["prompt_length"]
        # The earlier answers have come to their end.
        assert cut.get("earlier_answers") == whole.get("earlier_answers")
        (text,) = encode([conversation_of({"text": ANSWER} | mark, "text")])
        assert tokenizer.decode(text["input_ids"], skip_special_tokens=True) == ANSWER
        assert tokenizer.eos_token_id not in text["input_ids"]
    # A template that writes something between answer and EOS, or trims the answer.
    tokenizer = bytes_of("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "</s> <|im_end|>").replace(
        "m['content']", "m['content'] | trim"
    )
    turns = [TURNS[0], {"role": "assistant", "content": f" {ANSWER} "}]
    (cut,) = Encoder(tokenizer)([conversation_of({"messages": turns} | mark, "messages")])
    assert tokenizer.decode(halves(cut)[1]) == ANSWER


def test_other_columns_may_stand_beside_generated_ones():
    row = {"text": "x", "tokens": [], "blocks": []}
    assert recognise(row | {"messages": [], "kind": 1}) == "generated"
    assert recognise(row) == "text"  # whose prompt is not there
    with pytest.raises(ValueError, match="match question-answer and generated; choose one"):
        recognise(row | {"prompt": "x", "question": "x", "answer": "x"})
    with pytest.raises(BadRow, match="with either prompt or messages"):
        messages_of(row | {"prompt": "x", "messages": [TURNS[0]]}, "generated")
    with pytest.raises(BadRow, match="finished: expected true or false; got 'no'"):
        conversation_of({"text": "x", "finished": "no"}, "text")


def test_none_or_two_formats_are_refused():
    with pytest.raises(ValueError, match=r"question and answer.*got \['body', 'question'\]"):
        recognise(["question", "body"])
    with pytest.raises(ValueError, match=r"messages and text; choose one with data_format"):
        recognise(["text", "messages"])


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_chat_template_gives_prompt_and_answer_with_one_eos(bytes_of, kind):
    tokenizer = bytes_of(kind)
    (example,) = Encoder(tokenizer)([TURNS])
    ids, length = example["input_ids"], example["prompt_length"]
    prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids[:length]) == prompt
    assert tokenizer.decode(ids[length:]) == ANSWER + tokenizer.eos_token
    # The prompt's ids are those that decoding feeds.
    assert ids[:length] == tokenizer(prompt, add_special_tokens=False).input_ids


MORE = [*TURNS, {"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def earlier(example, tokenizer):
    return [tokenizer.decode(example["input_ids"][a:b]) for a, b in example.get("earlier_answers", ())]


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_every_answer_of_a_conversation_counts(bytes_of, kind):
    tokenizer = bytes_of(kind)
    eos = tokenizer.eos_token
    last = [*MORE, {"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Bye."}]
    (example,) = Encoder(tokenizer)([last])
    assert tokenizer.decode(halves(example)[1]) == f"Bye.{eos}"
    assert earlier(example, tokenizer) == [f"{ANSWER}{eos}", f"It is 4.{eos}"]
    # Each stands behind the very ids that decoding would feed for it.
    for (start, _), n in zip(example["earlier_answers"], (1, 3)):
        prompt = tokenizer.apply_chat_template(last[:n], tokenize=False, add_generation_prompt=True)
        assert example["input_ids"][:start] == tokenizer(prompt, add_special_tokens=False).input_ids
    assert EncodedTexts([example])[0] == example


def test_earlier_answers_that_do_not_count(tmp_path, bytes_of):
    tokenizer = bytes_of("qwen")
    encode = Encoder(tokenizer)
    # By weight, or within a prompt.
    light = messages_of({"messages": [MORE[0], {**MORE[1], "weight": 0}, *MORE[2:]]}, "messages")
    prompt = messages_of({"prompt": MORE[:3], "completion": MORE[3:]}, "prompt-completion")
    several = messages_of({"prompt": MORE[:1], "completion": MORE[1:]}, "prompt-completion")
    for messages, answers in ((light, 0), (prompt, 0), (several, 1)):
        (example,) = encode([messages])
        assert tokenizer.decode(halves(example)[1]) == "It is 4.<|im_end|>"
        assert len(earlier(example, tokenizer)) == answers
        assert "not_counted" not in example
    with pytest.raises(BadRow, match="weight must be 0 or 1; got 'no'"):
        messages_of({"messages": [MORE[0], {**MORE[1], "weight": "no"}, *MORE[2:]]}, "messages")
    with pytest.raises(BadRow, match="must not be 0"):
        messages_of({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "messages")
    # By the template, which leaves out an earlier answer's end, or begins it otherwise; or without one.
    path = write(tmp_path / "rows.jsonl", [{"messages": MORE}, {"messages": TURNS}])
    whole = tokenizer.chat_template
    for template in (
        whole.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last or m['role'] == 'user' }}"),
        whole.replace(
            "{{ m['content'] }}", "{{ '!' if m['role'] == 'assistant' and not loop.last }}{{ m['content'] }}"
        ),
        None,
    ):
        tokenizer.chat_template = template or whole
        texts, _, (report,) = load_data(DataArguments([path]), Encoder(tokenizer, chat=template is not None))
        assert [earlier(texts[i], tokenizer) for i in range(2)] == [[], []]
        assert (report.used, report.not_counted) == (2, 1)
        assert "2 used, 1 earlier answers not counted" in str(report)


def test_a_conversation_is_cut_inside_an_answer(bytes_of):
    tokenizer = bytes_of("qwen")
    (whole,) = Encoder(tokenizer)([MORE])
    ((start, end),) = whole["earlier_answers"]
    for window, ranges in ((start + 2, [(start, start + 2)]), (end + 1, [(start, end)])):
        (example,) = Encoder(tokenizer, window=window, long_rows="cut")([MORE])
        assert example == {
            "input_ids": whole["input_ids"][:window],
            "prompt_length": window,
            "cut": True,
            "earlier_answers": ranges,
        }
    (refused,) = Encoder(tokenizer, window=start, long_rows="cut")([MORE])
    assert isinstance(refused, BadRow)


@pytest.mark.parametrize(("kind", "front"), [("llama", "<|begin_of_text|>"), ("qwen", "")])
def test_without_template_a_blank_line_and_bos(bytes_of, kind, front):
    tokenizer = bytes_of(kind)
    (example,) = Encoder(tokenizer, chat=False)([TURNS])
    prompt, answer = (tokenizer.decode(part) for part in halves(example))
    assert (prompt, answer) == (f"{front}{QUESTION}\n\n", ANSWER + tokenizer.eos_token)


def halves(example):
    return example["input_ids"][: example["prompt_length"]], example["input_ids"][example["prompt_length"] :]


def test_tokens_do_not_run_across_the_border(bytes_of):
    """The blank line of the answer's beginning would join the prompt's last line break into one token."""
    tokenizer = bytes_of("qwen")
    turns = [TURNS[0], {"role": "assistant", "content": "\nTwo."}]
    (example,) = Encoder(tokenizer, chat=False, separator="\n")([turns])
    prompt, answer = halves(example)
    assert prompt == tokenizer(f"{QUESTION}\n").input_ids
    assert tokenizer.decode(answer) == "\nTwo.<|im_end|>"


def test_plain_text_is_all_answer(bytes_of):
    for kind in ("llama", "qwen"):
        tokenizer = bytes_of(kind)
        for chat in (True, False):
            (example,) = Encoder(tokenizer, chat=chat)([[TURNS[1]]])
            assert example["prompt_length"] == 1
            assert example["input_ids"] == [*tokenizer(ANSWER).input_ids, tokenizer.eos_token_id]


def test_exactly_one_eos(bytes_of):
    tokenizer = bytes_of("llama")
    other = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    # The text brings its EOS along: one is left. One of the model's other stop tokens inside a text is refused.
    brought = [TURNS[0], {"role": "assistant", "content": f"{ANSWER}<|eot_id|>"}]
    inside = [{"role": "user", "content": "Write <|end_of_text|>, please."}, TURNS[1]]
    for chat in (True, False):
        encode = Encoder(tokenizer, chat=chat, eos_token_ids=[other])
        plain, same, refused = encode([TURNS, brought, inside])
        assert plain == same
        assert plain["input_ids"][plain["prompt_length"] :].count(tokenizer.eos_token_id) == 1
        assert isinstance(refused, BadRow)
        assert "end_of_text" in str(refused)
    # A template that ends an answer otherwise still gets the tokenizer's EOS, behind its own end.
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|end_header_id|>")
    (example,) = Encoder(tokenizer)([TURNS])
    assert tokenizer.decode(halves(example)[1]) == f"{ANSWER}<|end_header_id|><|eot_id|>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        Encoder(tokenizer)


def test_templates_that_do_not_serve(bytes_of):
    tokenizer = bytes_of("qwen")
    whole = tokenizer.chat_template
    tokenizer.chat_template = whole.replace("assistant\n{%", "assistant\n<think>{%")
    (refused,) = Encoder(tokenizer)([TURNS])
    assert "'<think>'" in str(refused)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}" + whole
    (refused,) = Encoder(tokenizer)([TURNS])
    assert "no such role" in str(refused)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat: false"):
        Encoder(tokenizer)


BAD = [
    ("{'question'", "no JSON", "expected a JSON object"),
    ([1], "no object", "got [1]"),
    ({"question": QUESTION}, "missing field", "answer missing"),
    ({"question": QUESTION, "answer": None}, "missing field", "answer missing"),
    ({"question": QUESTION, "answer": 2}, "no string", "answer: expected a string; got 2"),
    ({"question": " \n", "answer": ANSWER}, "empty string", "question: expected text"),
    ({"question": QUESTION, "answer": "<|im_end|>"}, "empty string", "nothing but its end"),
    ({"question": QUESTION, "answer": "a <|mtp|> b"}, "mask token", "is the mask token"),
    ({"question": "<|im_end|>?", "answer": ANSWER}, "EOS inside a text", "'<|im_end|>' ends a text"),
]


@pytest.mark.parametrize(("row", "kind", "says"), BAD)
def test_a_bad_row_is_an_error_with_its_place_or_a_counted_skip(tmp_path, bytes_of, row, kind, says):
    tokenizer = bytes_of("qwen")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|mtp|>"]})
    encode = Encoder(tokenizer, mask_token_id=tokenizer.convert_tokens_to_ids("<|mtp|>"))
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(x) for x in sums(4)]
    path.write_text("\n".join([*good[:2], "", row if isinstance(row, str) else json.dumps(row), *good[2:]]))
    with pytest.raises(ValueError) as caught:
        load_data(DataArguments([str(path)]), encode)
    assert str(caught.value).startswith(f"{path}, line 4: ")
    assert says in str(caught.value)
    texts, _, (report,) = load_data(DataArguments([str(path)], bad_rows="skip"), encode)
    assert len(texts) == report.used == 4
    assert report.skipped == {kind: (1, f"{path}, line 4")}
    assert str(report) == f"{path}: 5 rows read; 4 used, 1 skipped, {kind} (first: {path}, line 4)"


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "expected a list"),
        ("hello", "expected a list"),
        (["hello"], r"messages\[0\]"),
        ([{"role": "robot", "content": "x"}], "role must be system, user, assistant, tool; got 'robot'"),
        ([{"role": ["user"], "content": "x"}], "role must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content: expected a string"),
        (TURNS[:1], "the assistant last; got user"),
        (TURNS[1:], "take turns"),
        ([*TURNS, *TURNS[1:]], "got user, assistant, assistant"),
        ([TURNS[0], {"role": "system", "content": "x"}, TURNS[1]], "got user, system, assistant"),
        ([{"role": "system", "content": "x"}], "got system"),
    ],
)
def test_wrong_messages(turns, says):
    with pytest.raises(BadRow, match=says):
        messages_of({"messages": turns}, "messages")


def test_wrong_sharegpt_roles():
    with pytest.raises(BadRow, match="from must be system, human, gpt, tool; got 'bing'"):
        messages_of({"conversations": [{"from": "bing", "value": "x"}]}, "conversations")


def test_texts_beyond_the_window(tmp_path, bytes_of):
    tokenizer = bytes_of("qwen")
    rows = [
        {"question": "Q?", "answer": "short"},
        {"question": "Q?", "answer": "long " * 10},
        {"question": "what " * 10, "answer": "short"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)

    def load(long_rows, bad_rows="error", **options):
        encode = Encoder(tokenizer, chat=False, window=20, long_rows=long_rows, **options)
        return load_data(DataArguments([path], chat=False, long_rows=long_rows, bad_rows=bad_rows), encode)

    texts, _, (report,) = load("skip")
    assert [len(x["input_ids"]) for x in texts] == [9]
    assert report.skipped == {"longer than the window": (2, f"{path}, line 2")}

    texts, _, (report,) = load("cut")
    assert [len(x["input_ids"]) for x in texts] == [9, 20]
    assert tokenizer.eos_token_id not in texts[1]["input_ids"]
    assert (report.used, report.cut) == (2, 1)
    assert report.skipped == {"cut inside its prompt": (1, f"{path}, line 3")}

    texts, _, (report,) = load("cut", response_only=False)
    assert [len(x["input_ids"]) for x in texts] == [9, 20, 20]

    for bad_rows in ("error", "skip"):
        with pytest.raises(ValueError, match=r"line 2: 54 tokens, the window has 20 .* set long_rows to skip or cut"):
            load("error", bad_rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data_format": "alpaca"}, "data_format must be one of auto, messages"),
        ({"long_rows": "keep"}, "long_rows"),
        ({"bad_rows": "keep"}, "bad_rows"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"eval_fraction": 0.1, "eval_data": ["x.jsonl"]}, "give one of them"),
        ({"only": "GSM"}, "COLUMN=PREFIX"),
    ],
)
def test_wrong_arguments(change, says):
    with pytest.raises(ValueError, match=says):
        DataArguments(["x.jsonl"], **change)


def test_formats_and_their_table_agree():
    assert set(SAME) | {"text"} == set(FORMATS)
