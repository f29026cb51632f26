"""`from mtpkern.train import ...`: the public names, and rows in memory as examples."""

import subprocess
import sys

import pytest

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
