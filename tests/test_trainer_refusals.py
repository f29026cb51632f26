"""What the trainer refuses."""

from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from mtpkern.train.collator import MTPCollator
from mtpkern.train.trainer import MTPTrainer
from support.trained import EOS, MASK, V, config, data, llama, trainer


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="needs teacher"):
        MTPTrainer(model=llama(), args=config(tmp_path), mask_token_id=MASK)
    with pytest.raises(ValueError, match="float32"):
        MTPTrainer(model=llama().bfloat16(), args=config(tmp_path), teacher=llama(), mask_token_id=MASK)
    with pytest.raises(ValueError, match="no mask token"):
        MTPTrainer(model=llama(), args=config(tmp_path), teacher=llama())
    for change, word in (
        ({"k_min": 5}, "k_min"),
        ({"teacher_target": "harder"}, "teacher_target"),
        ({"loss_support": "some"}, "loss_support"),
        ({"anchor_kl_weight": -1.0}, "anchor_kl_weight"),
        ({"spacing": "dense"}, "spacing"),
        ({"layout": "paper"}, "max_length"),
        ({"k_scope": "world"}, "k_scope"),
        ({"offset_scope": "world"}, "offset_scope"),
        ({"offset_scope": "rank"}, "spacing='stride'"),
        ({"offset_scope": "rank", "spacing": "stride", "span_offset": 0}, "no span_offset"),
        ({"prefix_scope": "some"}, "prefix_scope"),
        ({"prefix_scope": "all"}, "prefix_weight"),
        ({"pure_bf16": True, "bf16": True}, "leave out bf16, or"),
        ({"pure_bf16": True, "lora_rank": 2}, "leave out lora_rank, or"),
        ({"pure_bf16": True, "student_dtype": "float16"}, "leave out student_dtype float16, or"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha must be above 0"),
        ({"num_spans": 0}, "num_spans"),
        ({"span_offset": 3}, "spacing='stride'"),
        ({"gt_warmup_steps": -1}, "gt_warmup_steps"),
        ({"student_dtype": "bfloat16"}, "bf16=True"),
        ({"save_dtype": "float8"}, "save_dtype"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO-3"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"average_tokens_across_devices": False}, "average_tokens"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"parallelism_config": SimpleNamespace(tp_size=2)}, "tp_size"),
        ({"parallelism_config": SimpleNamespace(cp_size=2)}, "cp_size"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP version 1"),
    ):
        with pytest.raises(ValueError, match=word):
            config(tmp_path, **change)
    # A refused model is as it was, and may be given again.
    model = llama()
    names = list(model.state_dict())
    for options, says in (
        ({}, "without its adapters"),
        ({"teacher": None, "student_dtype": "bfloat16"}, "student_dtype"),
        ({"teacher": None, "lora_targets": "lm_head"}, "changes the output head"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer(tmp_path, model, lora_rank=2, **options)
        assert list(model.state_dict()) == names
    trainer(tmp_path, model, teacher=None, lora_rank=2)
    with pytest.raises(ValueError, match="share a vocabulary"):
        trainer(tmp_path, teacher=llama(vocab_size=V + 9))
    sharded = llama()
    sharded._device_mesh = "that from_pretrained laid it over"
    with pytest.raises(ValueError, match="sharded by from_pretrained"):
        trainer(tmp_path, sharded)
    with pytest.raises(ValueError, match="compute_metrics"):
        MTPTrainer(model=llama(), args=config(tmp_path), teacher=llama(), mask_token_id=MASK, compute_metrics=len)
    with pytest.raises(ValueError, match="pad_to"):
        MTPCollator(0, pad_to=5)(data(1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_length": 16}, "prompt_length must lie from 0 to the 15 tokens"),
        ({"prompt_length": -1}, "got prompt_length -1"),
        ({"input_ids": [], "prompt_length": 0}, "input_ids must have a token"),
        ({"earlier_answers": [(-3, -1)]}, r"got prompt_length 4, earlier_answers \[.-3, -1.\]"),
    ],
)
def test_examples_that_are_none_are_refused_by_number(tmp_path, gated, change, says):
    """Before the first step, where the data are at hand."""
    own = {"gated": True, "lora_rank": 2} if gated else {}
    rows = data(8)
    rows[3] |= change
    filled = Dataset.from_list([{"earlier_answers": None} | x for x in rows])
    for given, name in (
        ({"train": rows}, "train_dataset"),
        ({"train": filled}, "train_dataset"),
        ({"train": filled.with_format("torch")}, "train_dataset"),
        ({"held": rows}, "eval_dataset"),
        ({"held": {"other": rows}}, "eval_dataset other"),
    ):
        run = trainer(tmp_path, llama(vocab_size=MASK + (not gated)), None, teacher_target="gt", **own, **given)
        with pytest.raises(ValueError, match=f"^{name}, example 4: .*{says}"):
            run.train()


@pytest.mark.parametrize(
    ("change", "bare"),
    [
        ({"prompt_length": 15}, {}),
        ({"prompt_length": 15, "earlier_answers": [(0, 1)]}, {}),
        ({"input_ids": [EOS], "prompt_length": 0}, {}),
        ({"prompt_length": 8}, {"max_length": 8}),
        ({"prompt_length": 13}, {"max_length": 16, "layout": "paper", "num_spans": 1, "k_max": 4}),
    ],
)
def test_examples_of_which_nothing_counts_are_told_of(tmp_path, change, bare, caplog):
    """Alone they had trained at loss 0 and ended well."""

    def told(train, **change):
        caplog.clear()
        options = {"teacher": None, "teacher_target": "gt", "max_steps": 1, "save_strategy": "no"} | bare
        trainer(tmp_path, train=train, **options | change).train()
        return caplog.text

    rows = data(8)
    assert "nothing counts" not in told(rows)
    rows[3] |= change
    assert "train_dataset: of 1 examples in 8 nothing counts, the first is example 4" in told(rows)
    with pytest.raises(ValueError, match="train_dataset: of 2 examples in 2 nothing counts, the first is example 1"):
        told(rows[3:4] * 2)
    # A stream is looked at as it comes, and told of once.
    assert told(IterableDataset.from_generator(lambda: iter(rows * 2)), max_steps=3).count("without a span") == 1
    assert "without a span" not in told(IterableDataset.from_generator(lambda: iter(data(8))))


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_examples_of_datasets_are_those_of_lists(form):
    rows = [x | ({"earlier_answers": [(1, 2), (2, 4)]} if i else {}) for i, x in enumerate(data(2))]
    filled = Dataset.from_list([{"earlier_answers": None} | x for x in rows]).with_format(form)
    ours, wanted = MTPCollator(0)([*filled]), MTPCollator(0)(rows)
    assert (ours.pop("input_ids") == wanted.pop("input_ids")).all()
    assert ours == wanted


def test_prompts_that_count_need_no_answer(tmp_path, caplog):
    rows = [x | {"prompt_length": 8} for x in data(8)]
    for change in ({"response_only": False}, {"prefix_weight": 1.0, "prefix_scope": "all"}):
        options = {"teacher": None, "teacher_target": "gt", "max_steps": 1, "save_strategy": "no", "max_length": 8}
        trainer(tmp_path, train=rows, **options | change).train()
    assert "nothing counts" not in caplog.text
