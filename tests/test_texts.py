"""`from mtpkern.train import ...`: the public names, and rows in memory as examples."""

import subprocess
import sys

import pyarrow
import pytest
from datasets import Dataset

import mtpkern.train
from mtpkern.train import MTPCollator, MTPConfig, MTPTrainer, encode_rows
from mtpkern.train.data import DataArguments, load_data
from mtpkern.train.encoder import Encoder


def test_public_names_come_on_first_use():
    code = "import sys, mtpkern.train; print({'torch', 'transformers'} & set(sys.modules), dir(mtpkern.train))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"set() {sorted(mtpkern.train.__all__)}\n"
    for name in mtpkern.train.__all__:
        assert getattr(mtpkern.train, name).__doc__
    with pytest.raises(AttributeError, match="its public names: GatedTrainer"):
        _ = mtpkern.train.Trainer


ROWS = [{"prompt": "1 + 1?", "completion": " 2"}, {"prompt": "2 + 2?", "completion": " 4"}]


def test_rows_are_encoded_as_those_of_a_file(tmp_path, bytes_of):
    tokenizer = bytes_of("llama")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1 + 1?", "completion": " 2"}\n{"prompt": "2 + 2?", "completion": " 4"}\n')
    read, _, _ = load_data(
        DataArguments([str(file)], chat=False, separator=""), Encoder(tokenizer, chat=False, separator=""), seed=0
    )
    data = encode_rows(ROWS, tokenizer, chat=False, separator="")
    assert data.fingerprint == read.fingerprint
    assert len(data) == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x"}, "row 3: expected prompt and completion"),
        ({"prompt": "x", "completion": ""}, "row 3: completion"),
    ],
)
def test_a_faulty_row_is_named(bytes_of, row, says):
    with pytest.raises(ValueError, match=says):
        encode_rows([*ROWS, row], bytes_of("llama"), chat=False)


def test_the_trainer_takes_them(tmp_path, tiny, bytes_of):
    tokenizer = bytes_of("llama")
    model = tiny.model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.mtpkern = {"mask_token_id": 7}
    config = MTPConfig(
        str(tmp_path), k_max=3, max_steps=1, teacher_target="gt", bf16=False, report_to="none", use_cpu=True
    )
    data = encode_rows(ROWS, tokenizer, chat=False)
    trainer = MTPTrainer(model=model, args=config, train_dataset=data, data_collator=MTPCollator(0))
    assert trainer.train().global_step == 1


def test_what_is_not_counted_is_said(bytes_of, caplog):
    tokenizer = bytes_of("llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b")) * 2]
    encode_rows([{"messages": turns}], tokenizer)
    assert "1 earlier answers not counted" in caplog.text


def test_nulls_that_arrow_fills_in_are_no_fields(bytes_of):
    """A Dataset gives each message the fields of all others, inside a tool call too."""
    tokenizer = bytes_of("qwen")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ (m.tool_calls or []) | tojson }}<|im_end|>{% endfor %}"
    )

    def row(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
        return {"messages": turns}

    rows = [row(x=1), row(y=2)]
    read = [encode_rows(some, tokenizer) for some in (rows, Dataset(pyarrow.Table.from_pylist(rows)))]
    assert '{"x": 1}' in tokenizer.decode(read[0][0]["input_ids"])
    assert read[0].fingerprint == read[1].fingerprint


END = 258  # that tokenizer's EOS


def tokenized(tokenizer, row, **options):
    return encode_rows([row], tokenizer, **options)[0]


@pytest.mark.parametrize(
    ("row", "prompt", "earlier"),
    [
        ({"labels": [-100, -100, 6, 7, END]}, 2, []),
        ({"completion_mask": [0, 0, 0, 1, 1]}, 3, []),
        ({"completion_mask": [0, 0, 0, 1, 1], "assistant_masks": [0, 1, 0, 0, 1]}, 4, []),
        ({"labels": [-100, 5, -100, 7, END], "completion_mask": [1] * 5}, 3, [(1, 2)]),
        ({"assistant_masks": [1, 1, 0, 1, 1]}, 3, [(1, 2)]),
        ({"labels": None}, 1, []),
        ({"attention_mask": [1] * 5, "position_ids": [0, 1, 2, 3, 4], "images": []}, 1, []),
        ({}, 1, []),
    ],
    ids=str,
)
def test_rows_that_are_tokenized_already(bytes_of, row, prompt, earlier):
    """Of texts that the trainers of TRL have prepared; without a chat template, which nothing is rendered by."""
    got = tokenized(bytes_of("llama"), {"input_ids": [4, 5, 6, 7, END], **row})
    assert got == {"input_ids": [4, 5, 6, 7, END], "prompt_length": prompt} | (
        {"earlier_answers": earlier} if earlier else {}
    )


def test_what_stands_behind_the_last_answer_is_left_out(bytes_of):
    tokenizer = bytes_of("llama")
    assert tokenizer.eos_token_id == END
    ids = [4, 5, 6, END, 8, 9]
    assert tokenized(tokenizer, {"input_ids": ids, "labels": [-100, 5, 6, -100, -100, -100]})["input_ids"] == ids[:3]
    # Templates write a line break behind it, and masks of completions count that.
    assert tokenized(tokenizer, {"input_ids": ids, "completion_mask": [0, 1, 1, 1, 1, 1]})["input_ids"] == ids[:4]
    assert tokenized(tokenizer, {"input_ids": ids}, eos_token_ids=[8])["input_ids"] == ids[:5]


def test_text_comes_first(bytes_of):
    """What SFTTrainer has prepared has both, and text is encoded as `mtpkern train` would."""
    tokenizer = bytes_of("llama")
    [want] = encode_rows(ROWS[:1], tokenizer, chat=False)
    assert tokenized(tokenizer, {**ROWS[0], "input_ids": [4, 5], "labels": [4, 5]}, chat=False) == want


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"input_ids": [4, 5], "labels": [4]}, {}, "row 1: input_ids, and labels or masks.*one length"),
        ({"input_ids": [4, 5], "labels": [5, -100]}, {}, "row 1: labels must be -100 or the token itself"),
        ({"input_ids": [4, 5], "labels": [4, -100]}, {}, "row 1: no token of it counts"),
        ({"input_ids": [4, 5, 6], "seq_lengths": [1, 2]}, {}, "row 1: several texts are packed.*packing=True"),
        ({"input_ids": [4, 5, 6], "prompt_length": 1}, {}, "row 1: its prompt_length says what counts"),
        ({"input_ids": None, "labels": [4]}, {}, "row 1: input_ids"),
        ({"input_ids": [4, 5, 6], "position_ids": [0, 1, 0]}, {}, "row 1: several texts are packed"),
        ({"input_ids": [0, 4, 5], "attention_mask": [0, 1, 1]}, {}, "row 1: its attention_mask has zeros.*padding"),
        ({"input_ids": [4, 5, 6], "pixel_values": [0.5]}, {}, "row 1: pixel_values: images are not read"),
        ({**ROWS[0], "images": [b"x"]}, {"chat": False}, "row 1: images: images are not read"),
        ({"input_ids": [4, 5, 6]}, {"window": 2}, "row 1: 3 tokens, the window has 2"),
        ({"input_ids": [4, 5, 6]}, {"mask_token_id": 5}, "row 1: token 1 is the mask token"),
    ],
    ids=str,
)
def test_faulty_tokenized_rows(bytes_of, row, options, says):
    with pytest.raises(ValueError, match=says):
        tokenized(bytes_of("llama"), row, **options)


def test_a_batch_of_what_is_no_example():
    with pytest.raises(ValueError, match=r"encode_rows.*prompt_length missing, got input_ids, labels"):
        MTPCollator(0)([{"input_ids": [4, 5], "labels": [4, 5]}])
