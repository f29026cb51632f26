"""The damage of training, at every evaluation: plain decoding's tokens that are still the original model's."""

import copy
import shutil

import pytest
import torch

from support.trained import EOS, MASK, data, llama, trainer

# Of several lengths, with an earlier answer, and one without a prompt.
HELD_OUT = [*data(5), {"input_ids": [1, 9, 10, EOS, 11, 12, 13, EOS], "prompt_length": 6, "earlier_answers": [(2, 4)]}]
HELD_OUT += [{"input_ids": [8, 9, 10, 11], "prompt_length": 0}]


def make(path, student=None, teacher=None, eval_dataset=HELD_OUT, **change):
    settings = {"teacher_target": "gt", "eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "linear"}
    settings |= {"num_spans": 2, "spacing": "stride"}
    return trainer(path, student, teacher, held=eval_dataset, **settings | change)


def found(run):
    return [x["eval_original_agreement"] for x in run.state.log_history if "eval_original_agreement" in x]


def predicted(model, ids):
    """Greedy next token behind every token but the last, the mask token never."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.index_fill(1, torch.tensor(MASK), -torch.inf).argmax(-1)


def by_hand(before, after, rows):
    agree = total = 0
    with torch.no_grad():
        for row in rows:
            ids, prompt = row["input_ids"], max(1, row["prompt_length"])
            answer = {*range(prompt, len(ids)), *(t for a in row.get("earlier_answers", ()) for t in range(*a))}
            old, new = predicted(before, ids), predicted(after, ids)
            agree += sum(int(old[t - 1] == new[t - 1]) for t in answer)
            total += len(answer)
    return agree / total


def test_it_is_what_two_models_predict(tmp_path):
    student = llama()
    before = copy.deepcopy(student).eval()
    run = make(tmp_path / "a", student)
    with torch.no_grad():
        student.get_output_embeddings().weight[MASK] = 9.0  # never predicted, however much it wants to be
        before.get_output_embeddings().weight[MASK] = 9.0
    run.train()
    last = found(run)[1]
    assert last == pytest.approx(by_hand(before, run.model.eval(), HELD_OUT))
    assert last < 1
    assert "original_agreement" in (tmp_path / "a" / "summary.md").read_text()
    # Nothing learned, nothing lost; and batches of another size are the same texts.
    still = make(tmp_path / "b", learning_rate=0.0)
    still.train()
    still.args.per_device_eval_batch_size = 3
    assert [*found(still), still.evaluate()["eval_original_agreement"]] == [1.0, 1.0, 1.0]
    assert "eval_original_agreement" not in still.evaluate(data(9)[7:])


def test_a_resumed_run_reports_the_same(tmp_path):
    """Against the model that training started from, not the checkpoint that it goes on from."""
    whole = make(tmp_path / "run")
    whole.train()
    assert found(whole)[1] < 1
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "run.json").unlink()
    again = make(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    assert found(again) == found(whole)
    # One that has ended is evaluated as it was.
    ended = make(tmp_path / "run")
    ended.train(resume_from_checkpoint=True)
    assert ended.evaluate()["eval_original_agreement"] == found(whole)[1]


def test_adapters_and_several_data_sets(tmp_path):
    """With LoRA the original is the base, also where the adapters have learned before."""
    first = make(tmp_path / "a", lora_rank=2, learning_rate=0.1)
    first.train()
    assert found(first)[1] < 1
    held_out = {"one": HELD_OUT[:2], "two": HELD_OUT[2:]}
    second = make(tmp_path / "b", first.model, eval_dataset=held_out, learning_rate=0.0, save_strategy="no")
    second.train()
    logged = {name: value for x in second.state.log_history for name, value in x.items() if "original" in name}
    assert sorted(logged) == ["eval_one_original_agreement", "eval_two_original_agreement"]
    assert min(logged.values()) < 1
    # Each has figures of its own, and what is only asked for is no part of training's.
    both = second.evaluate()
    for name, rows in held_out.items():
        for key, value in second.evaluate(rows, metric_key_prefix=f"of_{name}").items():
            if "agreement" in key or "confidence" in key:
                assert both[key.replace("of", "eval")] == value
        assert "test_agreement" in second.predict(rows).metrics
    assert not second._sums
    # Evaluations are no part of the time.
    assert min(x["texts_per_second"] for x in second.state.log_history if "texts_per_second" in x) > 0


def test_a_gated_adapter_does_no_damage(tmp_path):
    run = make(tmp_path, llama(vocab_size=MASK), gated=True, lora_rank=2, learning_rate=0.1)
    run.train()
    assert found(run) == [1.0, 1.0]


def test_texts_span_rows_and_tokens_a_second(tmp_path, monkeypatch):
    """Each is its own count, packed or not."""
    plans = []
    for packing in (False, True):
        run = make(tmp_path, packing=packing, max_steps=1, k_min=3, k_max=3, save_strategy="no", eval_strategy="no")
        plan = run.plan
        monkeypatch.setattr(run, "plan", lambda *a, plan=plan, **o: plans.append(plan(*a, **o)) or plans[-1])
        run.train()
        logs = run.state.log_history[0]
        counts = 4, int(plans[-1]["layout"].valid.sum()), int(plans[-1]["layout"].lengths.sum())
        rates = [logs[f"{name}_per_second"] for name in ("texts", "span_rows", "tokens")]
        assert [rate / rates[0] * 4 for rate in rates] == pytest.approx(counts)


def test_a_short_run_logs_evaluates_and_saves(tmp_path):
    change = {"logging_steps": 50, "save_steps": 500, "eval_steps": 500, "max_steps": 3}
    run = make(tmp_path / "a", **change)
    run.train()
    assert [x["step"] for x in run.state.log_history if "loss" in x] == [3]
    assert [x["step"] for x in run.state.log_history if "eval_loss" in x] == [3]
    assert (tmp_path / "a" / "checkpoint-3").is_dir()
    silent = make(tmp_path / "b", **change, logging_strategy="no", save_strategy="no")
    silent.train()
    assert not [x for x in silent.state.log_history if "loss" in x]
    assert not list((tmp_path / "b").glob("checkpoint-*"))
