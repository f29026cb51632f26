"""What rows bring besides their texts: used where the chat template reads it, refused by name where it does not."""

import json

import pytest

from mtpkern.rows import own_bos
from mtpkern.train.data import DataArguments, load_data
from mtpkern.train.encoder import Encoder
from mtpkern.train.formats import conversation_of
from mtpkern.train.template import ChatTemplate

# In the manner of Qwen 3: tools and tool calls, reasoning in the last answer only, a switch for it.
THINKING = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]
USER = {"role": "user", "content": "What is 1 + 1?"}
ANSWER = {"role": "assistant", "content": "It is 2."}
CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "2"}, ANSWER]


@pytest.fixture
def thinking(bytes_of):
    tokenizer = bytes_of("qwen")
    tokenizer.chat_template = THINKING
    return tokenizer


def read(encode, row, data_format="messages"):
    (example,) = encode([conversation_of(row, data_format)])
    if not isinstance(example, dict):
        raise example
    ids, n = example["input_ids"], example["prompt_length"]
    parts = [encode.tokenizer.decode(ids[a:b]) for a, b in example.get("earlier_answers", ())]
    return encode.tokenizer.decode(ids[:n]), encode.tokenizer.decode(ids[n:]), parts, example.get("unread")


def test_tools_and_their_calls_are_rendered(thinking):
    encode = Encoder(thinking)
    prompt, answer, earlier, _ = read(encode, {"messages": CALLED, "tools": json.dumps(TOOLS)})
    given = [*CALLED[:1], {**CALLED[1], "content": ""}, CALLED[2]]
    assert prompt == thinking.apply_chat_template(given, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert '{"type": "function", "function": {"name": "add"' in prompt
    assert answer == "<think>\n\n</think>\n\nIt is 2.<|im_end|>"
    assert earlier == []  # which this template writes without its reasoning
    # A call may be the answer, and is one where it stands in a conversation as it stands at its end.
    called = read(encode, {"messages": CALLED[:2], "tools": TOOLS})[1]
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call><|im_end|>'
    assert called == f"<think>\n\n</think>\n\n{call}"
    thinking.chat_template = THINKING.replace("and loop.last", "and false")
    assert read(Encoder(thinking), {"messages": CALLED})[2] == [call]


def test_reasoning_under_any_name(thinking):
    for name in ("reasoning_content", "reasoning", "thinking"):
        row = {"messages": [USER, {**ANSWER, name: "1 and 1."}]}
        assert read(Encoder(thinking), row)[1] == "<think>\n1 and 1.\n</think>\n\nIt is 2.<|im_end|>"


def test_variables_of_the_template(thinking):
    encode = Encoder(thinking)
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}
    assert read(encode, row)[:2] == (
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "It is 2.<|im_end|>",
    )
    for options, says in (
        ({"date_string": "today"}, "the chat template does not read 'date_string'"),
        ({"tokenize": True}, "must not set 'tokenize'"),
        ([1], r"expected an object, or its JSON; got \[1\]"),
        ("{", "chat_template_kwargs: expected JSON"),
    ):
        with pytest.raises(ValueError, match=says):
            read(encode, {**row, "chat_template_kwargs": options})
    with pytest.raises(ValueError, match="column 'enable_thinking' has the name of a variable"):
        read(encode, {"messages": [USER, ANSWER], "enable_thinking": False})
    # What a file with columns leaves empty is nothing.
    empty = {"enable_thinking": None, "tools": [], "chat_template_kwargs": {}, "system": ""}
    assert read(encode, {"messages": [USER, {**ANSWER, "tool_calls": []}], **empty})


def test_a_system_column_is_the_system_prompt(bytes_of):
    for chat in (True, False):
        encode = Encoder(bytes_of("llama"), chat=chat)
        inside = {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}
        expected = read(encode, inside)
        assert "Be brief." in expected[0]
        for name in ("system", "system_prompt"):
            assert read(encode, {"messages": [USER, ANSWER], name: "Be brief."}) == expected
            row = {"question": USER["content"], "answer": ANSWER["content"], name: "Be brief."}
            assert read(encode, row, "question-answer") == expected
            assert read(encode, {**inside, name: "Be brief."}) == expected
            with pytest.raises(ValueError, match=f"{name}: the messages begin with another one"):
                read(encode, {**inside, name: "Be long."})
            with pytest.raises(ValueError, match=f"{name}: expected a string; got 3"):
                read(encode, {**row, name: 3}, "question-answer")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER, ANSWER], "tools": TOOLS}, "tools: "),
        ({"messages": [USER, ANSWER], "tools": "x"}, "tools: expected JSON, got 'x'"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "tools: expected a list of JSON schemas"),
        ({"messages": [USER, {**ANSWER, "tool_calls": CALL}]}, r"messages\[1\].tool_calls"),
        ({"messages": CALLED}, r"messages\[1\].tool_calls"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "x"}]}, r"messages\[1\].reasoning_content"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking|_kwargs"),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_what_is_not_read_is_refused_by_name(tmp_path, bytes_of, row, says, chat):
    """By a template in the manner of SmolLM2, which reads role and content, and without one."""
    path = tmp_path / "rows.jsonl"
    good = {"messages": [USER, ANSWER]}
    path.write_text("".join(json.dumps(x) + "\n" for x in (good, row)))
    encode = Encoder(bytes_of("qwen"), chat=chat)
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{says}"):
        load_data(DataArguments([str(path)], chat=chat), encode)
    assert len(load_data(DataArguments([str(path)], chat=chat, bad_rows="skip"), encode)[0]) == 1


def test_fields_that_say_nothing_are_counted(tmp_path, bytes_of):
    tokenizer = bytes_of("qwen")
    rows = [{"messages": [{**USER, "name": "Ann", "id": i}, ANSWER]} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    _, _, (report,) = load_data(DataArguments([str(path)]), Encoder(tokenizer))
    assert report.unread == {"id": 3, "name": 3}
    assert "does not read: id (in 3 rows), name (in 3 rows)" in str(report)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['role'] }}", "{{ m['name'] or m['role'] }}")
    assert read(Encoder(tokenizer), rows[0])[0].startswith("<|im_start|>Ann\n")


def test_nulls_that_arrow_fills_in_are_no_fields(tmp_path, thinking):
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    other = [{"type": "function", "function": {"name": "neg", "arguments": {"c": 3}}}]
    rows = [{"messages": CALLED}, {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": other}]}]
    write_table(pyarrow.Table.from_pylist(rows), path)
    texts, _, _ = load_data(DataArguments([str(path)]), Encoder(thinking))
    assert '{"name": "add", "arguments": {"a": 1, "b": 1}}' in thinking.decode(texts[0]["input_ids"])
    assert '{"name": "neg", "arguments": {"c": 3}}' in thinking.decode(texts[1]["input_ids"])


def test_names_are_those_of_the_program():
    """Not the words of the text that it writes."""
    from types import SimpleNamespace

    template = "Your name is {{ messages[0]['content'] }}{% if tools %}{{ x.tool_calls }}{% endif %}"
    tokenizer = SimpleNamespace(chat_template=template, apply_chat_template=lambda conversation, tools=None: "")
    read = ChatTemplate(tokenizer)
    assert read.variables == {"messages", "tools", "x"}
    assert read.fields == {"content", "tool_calls"}
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ValueError, match="chat template is no Jinja"):
        ChatTemplate(tokenizer)


# BOS and EOS that a text brings along


def test_a_bos_that_is_brought_along_gets_no_second(bytes_of):
    tokenizer = bytes_of("llama")
    bos = tokenizer.bos_token
    for chat in (True, False):
        encode = Encoder(tokenizer, chat=chat)
        for row, data_format in (
            ({"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}, "messages"),
            ({"prompt": USER["content"], "completion": "2"}, "prompt-completion"),
            ({"text": "One and one is two."}, "text"),
        ):
            brought = json.loads(json.dumps(row).replace(': "Be', f': "{bos}Be'))
            brought = {k: f"{bos}{v}" if k in ("prompt", "text") else v for k, v in brought.items()}
            assert brought != row
            assert read(encode, brought, data_format) == read(encode, row, data_format)
            assert "".join(read(encode, brought, data_format)[:2]).count(bos) == 1
        with pytest.raises(ValueError, match=r"'<\|begin_of_text\|>' begins a text and stands inside"):
            read(encode, {"prompt": "x", "completion": f"{bos}y"}, "prompt-completion")
        with pytest.raises(ValueError, match="begins a text and stands inside"):
            read(encode, {"text": f"{bos}{bos}y"}, "text")


def test_a_begin_of_turn_that_is_called_bos(bytes_of):
    """As SmolLM2's: its tokenizer adds none, and a text that was rendered elsewhere holds it at every turn."""
    tokenizer = bytes_of("qwen")
    tokenizer.bos_token = "<|im_start|>"
    text = "<|im_start|>user\nHello\n<|im_start|>assistant\nBye"
    assert "".join(read(Encoder(tokenizer), {"text": text}, "text")[:2]) == f"{text}<|im_end|>"
    assert own_bos(tokenizer, text) == text
    assert read(Encoder(tokenizer), {"messages": [USER, ANSWER]})
    with pytest.raises(ValueError, match="begins a text and stands inside"):
        read(Encoder(tokenizer), {"messages": [{**USER, "content": text}, ANSWER]})


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|>", "<|endoftext|><|im_end|> "])
def test_an_eos_that_is_brought_along_is_one(bytes_of, end):
    tokenizer = bytes_of("qwen")
    for chat in (True, False):
        encode = Encoder(tokenizer, chat=chat, eos_token_ids=[tokenizer.convert_tokens_to_ids("<|endoftext|>")])
        for row, data_format in (
            ({"text": "Two."}, "text"),
            ({"question": "1 + 1?", "answer": "Two."}, "question-answer"),
        ):
            brought = {k: v + end if k in ("text", "answer") else v for k, v in row.items()}
            assert read(encode, brought, data_format) == read(encode, row, data_format)


def test_texts_and_chats_in_one_batch(bytes_of):
    """Each with the special tokens that it would have alone."""
    encode = Encoder(bytes_of("llama"))
    chats = [conversation_of({"messages": [USER, ANSWER]}, "messages"), conversation_of({"text": "Two."}, "text")]
    assert encode(chats) == [example for chat in chats for example in encode([chat])]
