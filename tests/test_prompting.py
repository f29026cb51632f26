"""Prompts are put to a model as in its training, which its checkpoint records; a flag that says otherwise warns."""

import json

import pytest

from mtpkern import batching
from mtpkern.cli import main
from mtpkern.model import recorded_settings
from mtpkern.prompting import Prompting, warnings_of
from support.rows import write

ROWS = [{"question": f"How many are {i} and 1?", "answer": f"They are {i + 1}.\n#### {i + 1}"} for i in range(8)]
SAID = {"prompt": "How many are 2 and 1?"}
MESSAGES = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 1?"}]}


@pytest.mark.parametrize(
    ("recorded", "flags", "plain", "messages"),
    [
        ({}, {}, "{q}", "template"),
        ({}, {"chat": True}, "template", "template"),
        ({}, {"chat": False}, "{q}", "a separator; give it as --separator"),
        ({}, {"separator": "\n"}, "{q}\n", "Be brief.\n2 + 1?\n"),
        ({"chat": True}, {}, "template", "template"),
        ({"chat": True}, {"chat": False}, "{q}", "a separator; give it as --separator"),
        ({"chat": False, "separator": "\n\n"}, {}, "{q}\n\n", "Be brief.\n\n2 + 1?\n\n"),
        ({"chat": False, "separator": "\n\n"}, {"chat": False}, "{q}\n\n", "Be brief.\n\n2 + 1?\n\n"),
        ({"chat": False, "separator": "\n\n"}, {"separator": ""}, "{q}", "Be brief.2 + 1?"),
        ({"chat": False, "separator": "\n\n"}, {"chat": True}, "template", "template"),
    ],
)
def test_as_recorded_or_as_a_flag_says(bytes_of, recorded, flags, plain, messages):
    tokenizer = bytes_of("llama")
    prompting = Prompting.of(recorded, **flags)
    for fields, expected in ((SAID, plain), (MESSAGES, messages)):
        if "--separator" in expected:
            with pytest.raises(ValueError, match=expected):
                prompting.encode(tokenizer, fields)
            continue
        ids = prompting.encode(tokenizer, fields)
        if expected == "template":
            chat = fields.get("messages") or [{"role": "user", "content": SAID["prompt"]}]
            assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        else:
            assert ids == tokenizer(expected.format(q=SAID["prompt"])).input_ids
    # Told otherwise than it was trained, and only then.
    said = {key for key, value in flags.items() if key in recorded and recorded[key] != value}
    warned = " ".join(warnings_of(recorded, prompting))
    assert bool(said) == bool(warned)
    assert all(f"--{key}" in warned or f"--no-{key}" in warned for key in said)


def test_a_separator_that_is_there_is_one(bytes_of):
    tokenizer = bytes_of("qwen")
    prompting = Prompting(chat=False, separator="\n\n")
    assert prompting.encode(tokenizer, {"prompt": "Why?\n\n"}) == prompting.encode(tokenizer, {"prompt": "Why?"})


def test_a_separator_and_the_template_contradict_one_another():
    with pytest.raises(ValueError, match="--separator is of prompts without the chat template"):
        Prompting.of({}, chat=True, separator="\n")


@pytest.mark.parametrize("gated", [False, True], ids=["weights", "gated"])
def test_it_travels_from_training_to_generate(tmp_path, start, bytes_of, capsys, monkeypatch, gated):
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    flags = ["--model", str(start), "--train-data", data, "--use-cpu", "--k-max", "3", "--num-spans", "2"]
    flags += ["--max-steps", "2", "--save-steps", "1", "--no-chat", "--separator", "\n", "--output-dir", str(out)]
    assert main(["train", *flags, *(["--gated", "--lora-rank", "2"] if gated else [])]) == 0
    file = "adapter_config.json" if gated else "config.json"
    for folder, finished in ((out, True), (out / "checkpoint-2", True), (out / "checkpoint-1", False)):
        values = json.loads((folder / file).read_text())
        recorded = (values["auto_mapping"] if gated else values)["mtpkern"]
        assert {"k_max": 3, "chat": False, "separator": "\n", "finished": finished}.items() <= recorded.items()

    capsys.readouterr()
    seen = []
    iterate_batch = batching.iterate_batch
    monkeypatch.setattr(
        batching, "iterate_batch", lambda model, ids, **kw: seen.append(ids[0]) or iterate_batch(model, ids, **kw)
    )
    command = ["generate", str(out), "--prompt", "How many?", "--max-new-tokens", "2"]
    assert main(command) == 0
    assert "warning: " not in capsys.readouterr().err
    assert seen[-1] == bytes_of("llama")("How many?\n").input_ids
    assert main([*command, "--separator", ""]) == 0
    assert seen[-1] == bytes_of("llama")("How many?").input_ids
    assert r"trained with the separator '\n' behind a prompt, and is asked with ''" in capsys.readouterr().err
    assert main([*command, "--chat"]) == 0
    assert "it was trained without a chat template, and is asked with it (--chat)" in capsys.readouterr().err
    assert main(["generate", str(out / "checkpoint-1"), *command[2:]]) == 0
    assert "checkpoint-1: its training had not ended when it was saved" in capsys.readouterr().err


def test_plain_texts_say_nothing_of_prompts(tmp_path, start):
    """A text has no prompt, so whether the template is meant nobody knows."""
    data, out = (
        write(tmp_path / "rows.jsonl", [{"text": f"{i} and 1 are {i + 1}."} for i in range(8)]),
        tmp_path / "out",
    )
    flags = ["--model", str(start), "--train-data", data, "--use-cpu", "--k-max", "3", "--num-spans", "2"]
    assert main(["train", *flags, "--max-steps", "1", "--output-dir", str(out)]) == 0
    assert {"chat", "separator"}.isdisjoint(json.loads((out / "config.json").read_text())["mtpkern"])


def test_the_trainer_records_whether_its_run_has_ended(tmp_path, tiny):
    """In the library, too, and after an interrupt."""
    from transformers import TrainerCallback

    from mtpkern.train import MTPCollator, MTPConfig, MTPTrainer

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = tiny.model("llama", eos_token_id=7)
    args = MTPConfig(str(tmp_path), k_max=3, num_spans=1, max_steps=2, teacher_target="gt", use_cpu=True)
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6, 7], "prompt_length": 2}] * 4
    trainer = MTPTrainer(model=model, args=args, train_dataset=rows, data_collator=MTPCollator(0))
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert recorded_settings(model)["finished"] is False
    trainer.remove_callback(interrupt)
    trainer.train()
    assert recorded_settings(model)["finished"] is True
