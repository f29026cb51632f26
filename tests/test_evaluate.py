"""Decoding while training, the score of an answer, and the summary with its curves."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mtpkern
from mtpkern import ConfAdapt, Static, Verified, generate
from mtpkern.compare import ours
from mtpkern.train.arithmetic import build_tokenizer, encode, problems, prompt
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.evaluate import HeldOut, figures
from mtpkern.train.summary import curves, summarise
from mtpkern.train.trainer import MTPTrainer


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


def test_figures_of_several_strategies_bear_their_names():
    ways = {"confadapt_0.9": ConfAdapt(threshold=0.9), "static_1": Static(1)}
    held_out = HeldOut(["a", "b"], ["1", "2"], build_tokenizer(), strategies=ways)
    found = held_out.metrics(torch.tensor([[2, 1, 16, 6, 6, 20], [2, 2, 18, 18, 2, 2]]))
    assert (found["accuracy"], found["accuracy_confadapt_0.9"], found["accuracy_static_1"]) == (0.5, 0.5, 1)
    assert (found["tokens_per_pass"], found["tokens_per_pass_static_1"]) == (pytest.approx(16 / 6), 1)
    assert len(found) == 3 * 4
    with pytest.raises(ValueError, match="at least one way to decode"):
        HeldOut(["a"], ["1"], build_tokenizer(), strategies={})


HISTORY = [
    {"step": 10, "loss": 2.0, "agreement": 0.3, "agreement_1": 0.5, "agreement_2": 0.1},
    {"step": 10, "eval_loss": 1.5, "eval_agreement_1": 0.6, "eval_agreement_2": 0.2, "eval_tokens_per_pass": 1.25},
    {"step": 20, "eval_loss": 1.25, "eval_agreement_1": 0.9, "eval_agreement_2": 0.4, "eval_accuracy": 0.5},
]


def test_summary(tmp_path, monkeypatch):
    assert curves(HISTORY) == {10: [0.6, 0.2], 20: [0.9, 0.4]}
    assert curves(HISTORY[:1]) == {10: [0.5, 0.1]}
    monkeypatch.setattr("mtpkern.train.summary.find_spec", lambda name: None)
    text = summarise(HISTORY, tmp_path)
    assert "| step | loss | accuracy | tokens_per_pass |" in text
    assert "decoding" not in text
    ways = {"eval_accuracy_verified": 0.5, "eval_tokens_per_pass_verified": 2.0, "eval_accuracy_static_1": 0.75}
    both = summarise([*HISTORY[:2], {**HISTORY[2], **ways}], tmp_path)
    assert "| step | decoding | accuracy | tokens_per_pass | effective_k | effective_k_deviation |" in both
    assert "| 20 | verified | 0.5 | 2 |  |  |\n| 20 | static_1 | 0.75 |  |  |  |\n" in both
    text = summarise(HISTORY, tmp_path)
    assert "| 20 | 1.25 | 0.5 |  |" in text
    assert "pip install 'mtpkern[plot]'" in text
    assert (tmp_path / "summary.md").read_text() == text
    # Agreement of training alone, without a picture, and nothing at all.
    for history in (HISTORY[:1], []):
        assert summarise(history, tmp_path / "empty") == ""
    assert not (tmp_path / "empty").exists()


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib (extra `plot`) is not installed")
def test_picture(tmp_path, monkeypatch):
    monkeypatch.undo()  # here it is drawn
    assert "agreement.png" in summarise(HISTORY, tmp_path / "new")
    assert (tmp_path / "new" / "agreement.png").read_bytes().startswith(b"\x89PNG")


def decoding_trainer(path, held_out, tokenizer, **change):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    pairs = [encode(problem, tokenizer) for problem in problems("train", 4)]
    data = [{"input_ids": ids, "prompt_length": n} for ids, n in pairs]
    options = {"use_cpu": True, "disable_tqdm": True, "teacher_target": "gt", "k_max": 4, "max_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 2, "per_device_train_batch_size": 4}
    return MTPTrainer(
        model=LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer) + 1, max_position_embeddings=200, **shape, **ends)
        ),
        args=MTPConfig(str(path), **options | change),
        mask_token_id=len(tokenizer),
        train_dataset=data,
        eval_dataset=data[:2],
        data_collator=MTPCollator(tokenizer.pad_token_id),
        held_out=held_out,
    )


@pytest.mark.parametrize("change", [{"bf16": True}, {"lora_rank": 2}])
def test_trainer_decodes_held_out_prompts(tmp_path, change):
    tokenizer = build_tokenizer()
    texts = [prompt(problem) for problem in problems("validation", 3)]
    seen = []

    def is_right(answer, expected):
        seen.append((answer, expected))
        return expected == "b"

    ways = {"static_3": Static(3), "static_1": Static(1)}
    held_out = HeldOut(texts, ["a", "b", "c"], tokenizer, is_right, ways, max_new_tokens=7, batch_size=2)
    options = {"save_strategy": "no", "learning_rate": 1e-2, **change}
    trainer = decoding_trainer(tmp_path, held_out, tokenizer, **options)
    trainer.train()
    scored = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(scored) == 2
    for name in ("", "_static_3", "_static_1"):
        assert all(entry[f"eval_accuracy{name}"] == pytest.approx(1 / 3) for entry in scored)
    assert scored[-1]["eval_tokens_per_pass_static_1"] == 1
    assert scored[-1]["eval_tokens_per_pass_static_3"] == scored[-1]["eval_tokens_per_pass"]
    assert "accuracy" in (tmp_path / "summary.md").read_text()
    # What was decoded last is what the trained model decodes now.
    trainer.save_model(str(tmp_path / "plain"))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    inputs = tokenizer(texts[2], return_tensors="pt")
    output = generate(plain, **inputs, strategy=Static(3), max_new_tokens=7, return_dict_in_generate=True)
    new = tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert seen[-2] == (new, "c")
    assert 1 <= scored[-1]["eval_tokens_per_pass"] <= 3
    assert scored[-1]["eval_tokens_per_pass"] <= scored[-1]["eval_effective_k"] <= 3
    assert "tokens_per_pass | effective_k | effective_k_deviation |" in (tmp_path / "summary.md").read_text()
    assert not trainer.plain.config.use_cache


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
    found = figures(counts[0][0])
    assert found["effective_k"] == pytest.approx(sum(ks) / 4)
    assert found["effective_k_deviation"] == pytest.approx(torch.tensor(ks, dtype=torch.float64).std().item())
    assert found["tokens_per_pass"] < found["effective_k"]


def test_confadapt_without_k_takes_the_recorded_one():
    """Each strategy decodes with what it has been asked, and ConfAdapt with all that the model was trained for."""
    assets = Path(mtpkern.__file__).parent / "assets"
    tokenizer = AutoTokenizer.from_pretrained(assets)
    model = AutoModelForCausalLM.from_pretrained(assets)
    seen = []
    texts = [prompt(p) for p in problems("validation", 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpkern.train.evaluate.ours", lambda *a, **k: seen.append(k["strategy"]) or ours(*a, **k))
        ways = {"confadapt": ConfAdapt(), "confadapt_3_0.5": ConfAdapt(3, 0.5), "verified": Verified()}
        sums = HeldOut(texts, ["1", "2"], tokenizer, strategies=ways, max_new_tokens=4).count(model)
    assert seen == [ConfAdapt(12, 0.9), ConfAdapt(3, 0.5), Verified(12, 0.6)]
    assert sums.shape == (3, 6)


def test_held_out_must_match():
    with pytest.raises(ValueError, match="as many"):
        HeldOut(["a"], [], build_tokenizer())


def test_decoding_is_greedy_whatever_the_models_file_asks_for(tmp_path):
    """Settings of published instruct models: Llama 3.1, Qwen3, Qwen2.5 and Gemma at once."""
    tokenizer = build_tokenizer()
    held_out = HeldOut([prompt(p) for p in problems("validation", 2)], ["a", "b"], tokenizer, max_new_tokens=5)
    sums = []
    for asked in ({}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}):
        run = decoding_trainer(tmp_path, held_out, tokenizer)
        settings = run.model.generation_config
        settings.update(**asked, cache_implementation="hybrid" if asked else None)
        sums.append(held_out.count(run.model))
        assert run.model.generation_config is settings
    assert sums[0].equal(sums[1])


def test_a_decoding_that_fails_costs_no_training(tmp_path, caplog):
    tokenizer = build_tokenizer()

    def fails(answer, expected):
        raise RuntimeError("no judge")

    held_out = HeldOut([prompt(p) for p in problems("validation", 1)], ["a"], tokenizer, fails, max_new_tokens=5)
    run = decoding_trainer(
        tmp_path, held_out, tokenizer, load_best_model_at_end=True, metric_for_best_model="accuracy", save_steps=1
    )
    run.train()
    assert run.state.global_step == 2
    assert "held-out prompts were not decoded: RuntimeError: no judge" in caplog.text
    scored = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(scored) == 2
    assert all(entry["eval_accuracy"] != entry["eval_accuracy"] for entry in scored)
    assert "nan" in (tmp_path / "summary.md").read_text()


def test_the_best_checkpoint_by_one_strategys_figure(tmp_path):
    """The first evaluation is right under static_1 alone, the second under the first strategy."""
    tokenizer, judged = build_tokenizer(), []

    def is_right(answer, expected):
        judged.append(answer)
        return (len(judged) - 1) % 4 in (1, 2)

    ways = {"static_2": Static(2), "static_1": Static(1)}
    held_out = HeldOut([prompt(p) for p in problems("validation", 1)], ["a"], tokenizer, is_right, ways, 3)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy_static_1", "save_steps": 1}
    run = decoding_trainer(tmp_path, held_out, tokenizer, **best)
    run._try_out = lambda: None
    run.train()
    scored = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert [(entry["eval_accuracy"], entry["eval_accuracy_static_1"]) for entry in scored] == [(0, 1), (1, 0)]
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")


def test_what_cannot_be_decoded_fails_before_the_first_step(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    texts = [prompt(p) for p in problems("validation", 1)]
    with pytest.raises(
        ValueError, match=r"and the 190 to decode must fit the model's 200 positions: lower decode_tokens"
    ):
        decoding_trainer(tmp_path, HeldOut(texts, ["a"], tokenizer, max_new_tokens=190), tokenizer)
    run = decoding_trainer(tmp_path, HeldOut(texts, ["a"], tokenizer, max_new_tokens=5), tokenizer)

    def refuse(*args, **kwargs):
        raise ValueError("this model cannot be decoded")

    monkeypatch.setattr("mtpkern.train.evaluate.ours", refuse)
    with pytest.raises(ValueError, match="cannot be decoded"):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))
