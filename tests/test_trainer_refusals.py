"""What the trainer refuses."""

import math
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from mtpkern.adapter import gate_of
from mtpkern.train.checks import require_counted
from mtpkern.train.collator import MTPCollator
from mtpkern.train.lora import add_gated_lora, plain_model
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
        ({"lora_rank": 2, "lora_alpha": math.inf}, "lora_alpha must be a finite number; got inf"),
        ({"prefix_memory": math.inf, "gated": True, "lora_rank": 2}, "prefix_memory must be a finite number; got inf"),
        ({"prefix_weight": math.nan}, "prefix_weight must be a finite number; got nan"),
        ({"anchor_kl_weight": math.inf}, "anchor_kl_weight must be a finite number; got inf"),
        ({"k_max": 257}, "k_max must be at most 256, the largest k that mtpkern.generate decodes; got 257"),
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


def found(model):
    """What a model is, but for the values of its weights, and what it records."""
    modules = [
        (name, id(x), x.training, [*vars(x)], len(x._forward_hooks), len(x._forward_pre_hooks))
        for name, x in model.named_modules()
    ]
    gate = gate_of(plain_model(model))
    trained = [(name, x.requires_grad) for name, x in model.named_parameters()]
    return modules, trained, model.config.to_dict(), model.generation_config.to_dict(), gate and gate.settings


@pytest.mark.parametrize("kind", ["full", "lora", "gated", "further"])
@pytest.mark.parametrize("fault", ["of_trainer", "of_engine", "behind", "interrupt"], ids=str)
def test_a_model_is_as_it_was_wherever_the_set_up_ends(tmp_path, monkeypatch, kind, fault):
    """In the midst of transformers' own, before ours and behind it."""
    gated = kind in ("gated", "further")
    options = {} if kind == "full" else {"lora_rank": 2, "gated": gated}
    model = llama(vocab_size=MASK) if gated else llama()
    model.get_decoder().layers[0].register_forward_hook(lambda *args: None)
    teacher = llama(3).train() if kind == "full" else None
    if kind == "further":
        model = add_gated_lora(model, rank=2, k_max=3)
    given, before, taught = model, found(model), teacher and found(teacher)
    part, error = {
        "of_trainer": ("transformers.Trainer.create_accelerator_and_postprocess", ValueError("of Trainer")),
        "of_engine": ("mtpkern.train.trainer.require_tested_engine", ValueError("of the engine")),
        "behind": ("mtpkern.train.trainer.learned_positions", ValueError("behind it")),
        "interrupt": ("transformers.Trainer.create_accelerator_and_postprocess", KeyboardInterrupt("Ctrl-C")),
    }[fault]

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as faulty:
        faulty.setattr(part, fail)
        with pytest.raises(type(error), match=str(error)):
            trainer(tmp_path, given, teacher, **options)
    assert found(model) == before
    assert teacher is None or found(teacher) == taught
    run = trainer(tmp_path, given, teacher, **options, max_steps=1, save_strategy="no")
    run.train()
    assert gate_of(plain_model(model)) is None or model.get_input_embeddings()._forward_hooks


def test_names_are_no_models(tmp_path):
    for given, name in (({"student": "runs/sft"}, "model"), ({"teacher": "runs/sft"}, "teacher")):
        with pytest.raises(TypeError, match=f"^{name} must be a loaded model; got 'runs/sft'"):
            trainer(tmp_path, **given)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_length": 16}, "prompt_length must lie from 0 to the 15 tokens"),
        ({"prompt_length": -1}, "got prompt_length -1"),
        ({"input_ids": [], "prompt_length": 0}, "input_ids must have a token"),
        ({"earlier_answers": [(-3, -1)]}, r"got prompt_length 4, earlier_answers \[.-3, -1.\]"),
        ({"attention_mask": [1] * 14 + [0]}, "attention_mask must be 1 throughout; got zeros"),
        ({"attention_mask": [1] * 14}, "attention_mask must have a number for each of the 15 tokens; got 14"),
        ({"position_ids": [*range(8), *range(7)]}, "several texts are packed into it"),
        ({"seq_lengths": [8, 7]}, "several texts are packed into it"),
        ({"labels": data(8)[3]["input_ids"]}, "token 1 is 11, labels has 11 there, and .* 4 it does not count: leave"),
        (
            {"labels": [-100] * 5 + data(8)[3]["input_ids"][5:]},
            "labels has -100 there, and by .* 4 it count",
        ),
        ({"labels": [-100] * 14 + [MASK]}, f"token 14 is {EOS}, labels has {MASK} there"),
        ({"completion_mask": [0] * 6 + [1] * 9}, "completion_mask and prompt_length must say the same"),
        ({"input_ids": [*range(5, 19), MASK]}, f"input_ids must be from 0 to below .*, and not {MASK}, its mask token"),
        ({"input_ids": [*range(5, 19), MASK + 1]}, f"input_ids must be from 0 to below .*; got {MASK + 1}: encode"),
        ({"input_ids": [*range(5, 19), -1]}, "input_ids must be from 0 to below .*; got -1: encode"),
        ({"assistant_masks": [0] * 15}, "assistant_masks and prompt_length must say the same"),
    ],
)
def test_examples_that_are_none_are_refused_by_number(tmp_path, gated, change, says):
    """Before the first step, where the data are at hand."""
    own = {"gated": True, "lora_rank": 2} if gated else {}
    rows = data(8)
    rows[3] |= change
    filled = Dataset.from_list([{"earlier_answers": None, **dict.fromkeys(change)} | x for x in rows])
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


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}, {"lora_rank": 2, "gated": True}], ids=str)
def test_a_stream_of_another_vocabulary_is_refused_as_it_comes(tmp_path, lora):
    """And what is evaluated by hand."""
    rows = [{"input_ids": [5, 6, MASK + 1], "prompt_length": 1}] * 8
    model = llama(vocab_size=MASK + ("gated" not in lora))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    run = trainer(tmp_path, model, None, train=stream, teacher_target="gt", **lora)
    for call in (run.train, lambda: run.evaluate(rows)):
        with pytest.raises(ValueError, match=rf"input_ids must be from 0 .*; got {MASK + 1}: encode"):
            call()


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


def test_masks_and_labels_that_say_the_same_change_nothing(tmp_path):
    """A row of another trainer's, with the prompt's length beside it."""
    rows = [x | ({"earlier_answers": [(1, 3)]} if i % 2 else {}) for i, x in enumerate(data(8))]
    filled = []
    for x in rows:
        ids, answers = x["input_ids"], [*x.get("earlier_answers", ()), (x["prompt_length"], len(x["input_ids"]))]
        marks = [int(any(start <= i < end for start, end in answers)) for i in range(len(ids))]
        labels = [token if counted else -100 for token, counted in zip(ids, marks)]
        same = {"attention_mask": [1] * len(ids), "position_ids": [*range(len(ids))], "labels": labels}
        filled.append({**x, **same, "completion_mask": marks, "assistant_masks": marks, "seq_lengths": None})
    assert MTPCollator(0)(filled)["digests"] == MTPCollator(0)(rows)["digests"]
    tensors = Dataset.from_list([{"earlier_answers": None, **x} for x in filled]).with_format("torch")
    require_counted("train_dataset", tensors, config(tmp_path), lambda ids: None)


@pytest.mark.parametrize("gated", [False, True])
def test_an_evaluation_of_nothing_is_refused(tmp_path, gated):
    """By hand, too: its figures would be of no text."""
    own = {"gated": True, "lora_rank": 2} if gated else {}
    run = trainer(
        tmp_path,
        llama(vocab_size=MASK + (not gated)),
        None,
        teacher_target="gt",
        held=data(3),
        dataloader_drop_last=True,
        per_device_eval_batch_size=4,
        **own,
    )
    for given in ({}, {"eval_dataset": data(2)}, {"eval_dataset": {"some": data(4), "few": data(3)}}):
        with pytest.raises(ValueError, match=r"expected one at least, and \d texts make none; give more, or where"):
            run.evaluate(**given)
    with pytest.raises(ValueError, match="and 0 texts make none"):
        run.evaluate([])
    assert run.evaluate(data(4))["eval_loss"] > 0
    batches = [*run.get_eval_dataloader(data(4))]
    run.get_eval_dataloader = lambda *args: batches  # a subclass may give anything
    assert run.evaluate()["eval_loss"] > 0


def test_prompts_that_count_need_no_answer(tmp_path, caplog):
    rows = [x | {"prompt_length": 8} for x in data(8)]
    for change in ({"response_only": False}, {"prefix_weight": 1.0, "prefix_scope": "all"}):
        options = {"teacher": None, "teacher_target": "gt", "max_steps": 1, "save_strategy": "no", "max_length": 8}
        trainer(tmp_path, train=rows, **options | change).train()
    assert "nothing counts" not in caplog.text
