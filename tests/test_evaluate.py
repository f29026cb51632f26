"""Decoding while training, the score of an answer, and the summary with its curves."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mtpkern
from mtpkern import Static, generate
from mtpkern.train.arithmetic import build_tokenizer, encode, problems, prompt
from mtpkern.train.evaluate import HeldOut, curves, figures, final_number, same_number, summarise
from mtpkern.train.trainer import MTPCollator, MTPConfig, MTPTrainer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 42", 42),
        ("#### 1 or rather #### -1,250", -1250),
        ("#### $3.50", 3.5),
        ("42", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_same_number():
    assert same_number("therefore #### 1250.0", "1,250")
    assert same_number("#### 7", "long worked answer #### 7")
    assert not same_number("#### 8", "7")
    assert not same_number("8", "8")
    assert not same_number("no number", "none either")


def test_figures_of_sums_over_batches_and_ranks():
    """Two problems of blocks [4, 4, 4, 1] and [2, 1], one of them right: as mtpkern.compare.Tally counts them."""
    found = figures(torch.tensor([2, 1, 16, 6, 4 + 2, 16 + 4]))
    assert found == {
        "accuracy": 0.5,
        "tokens_per_pass": pytest.approx(16 / 6),
        "effective_k": 3,
        "effective_k_deviation": pytest.approx(2**0.5),
    }
    assert figures(torch.tensor([1, 0, 3, 1, 3, 9]))["effective_k_deviation"] == 0


HISTORY = [
    {"step": 10, "loss": 2.0, "agreement": 0.3, "agreement_1": 0.5, "agreement_2": 0.1},
    {"step": 10, "eval_loss": 1.5, "eval_agreement_1": 0.6, "eval_agreement_2": 0.2, "eval_tokens_per_pass": 1.25},
    {"step": 20, "eval_loss": 1.25, "eval_agreement_1": 0.9, "eval_agreement_2": 0.4, "eval_accuracy": 0.5},
]


def test_summary(tmp_path, monkeypatch):
    assert curves(HISTORY) == {10: [0.6, 0.2], 20: [0.9, 0.4]}
    assert curves(HISTORY[:1]) == {10: [0.5, 0.1]}
    monkeypatch.setattr("mtpkern.train.evaluate.find_spec", lambda name: None)
    text = summarise(HISTORY, tmp_path)
    assert "| step | loss | accuracy | tokens_per_pass |" in text
    assert "| 20 | 1.25 | 0.5 |  |" in text
    assert "pip install 'mtpkern[plot]'" in text
    assert (tmp_path / "summary.md").read_text() == text
    assert "Nothing was logged" in summarise([], tmp_path)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib (extra `plot`) is not installed")
def test_picture(tmp_path):
    assert "agreement.png" in summarise(HISTORY, tmp_path / "new")
    assert (tmp_path / "new" / "agreement.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("change", [{"bf16": True}, {"lora_rank": 2}])
def test_trainer_decodes_held_out_prompts(tmp_path, change):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 1, **shape, **ends))
    texts = [prompt(problem) for problem in problems("validation", 3)]
    seen = []

    def is_right(answer, expected):
        seen.append((answer, expected))
        return expected == "b"

    held_out = HeldOut(texts, ["a", "b", "c"], tokenizer, is_right, Static(3), max_new_tokens=7, batch_size=2)
    pairs = [encode(problem, tokenizer) for problem in problems("train", 4)]
    data = [{"input_ids": ids, "prompt_length": n} for ids, n in pairs]
    trainer = MTPTrainer(
        model=model,
        args=MTPConfig(
            str(tmp_path),
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            k_max=4,
            **{"use_cpu": True, "disable_tqdm": True, "teacher_target": "gt", "learning_rate": 1e-2} | change,
        ),
        mask_token_id=len(tokenizer),
        train_dataset=data,
        eval_dataset=data[:2],
        data_collator=MTPCollator(tokenizer.pad_token_id),
        held_out=held_out,
    )
    trainer.train()
    scored = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(scored) == 2
    assert all(entry["eval_accuracy"] == pytest.approx(1 / 3) for entry in scored)
    assert "accuracy" in (tmp_path / "summary.md").read_text()
    # What was decoded last is what the trained model decodes now.
    trainer.save_model(str(tmp_path / "plain"))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    inputs = tokenizer(texts[2], return_tensors="pt")
    output = generate(plain, **inputs, strategy=Static(3), max_new_tokens=7, return_dict_in_generate=True)
    new = tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert seen[-1] == (new, "c")
    assert 1 <= scored[-1]["eval_tokens_per_pass"] <= 3
    assert scored[-1]["eval_tokens_per_pass"] <= scored[-1]["eval_effective_k"] <= 3
    assert "tokens_per_pass | effective_k | effective_k_deviation |" in (tmp_path / "summary.md").read_text()
    assert not model.config.use_cache


def test_tokens_per_pass_do_not_depend_on_the_batch():
    """The default row budget would deal masks by batch size and device."""
    assets = Path(mtpkern.__file__).parent / "assets"
    tokenizer = AutoTokenizer.from_pretrained(assets)
    model = AutoModelForCausalLM.from_pretrained(assets)
    chosen = list(problems("validation", 4))
    texts, answers = [prompt(p) for p in chosen], [str(p.result) for p in chosen]
    counts = [HeldOut(texts, answers, tokenizer, max_new_tokens=64, batch_size=n).count(model) for n in (1, 4)]
    torch.testing.assert_close(counts[0], counts[1], rtol=1e-12, atol=0)
    # Each problem's k without its last pass, beside all tokens over all passes.
    options = {"rows": 2 * 12 - 1, "max_new_tokens": 64, "return_dict_in_generate": True}
    outputs = [generate(model, **tokenizer(text, return_tensors="pt"), **options) for text in texts]
    ks = [sum(row[:-1]) / len(row[:-1]) for output in outputs for row in output.blocks]
    found = figures(counts[0])
    assert found["effective_k"] == pytest.approx(sum(ks) / 4)
    assert found["effective_k_deviation"] == pytest.approx(torch.tensor(ks).std().item())
    assert found["tokens_per_pass"] < found["effective_k"]


def test_held_out_must_match():
    with pytest.raises(ValueError, match="as many"):
        HeldOut(["a"], [], build_tokenizer())
