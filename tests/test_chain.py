"""From a real chat model's files to one that decodes several tokens a pass, by the command line alone.

GGUF or safetensors -> `mtpkern convert` -> plain checkpoint -> own answers by `mtpkern generate` -> `mtpkern train` ->
the command that it names: what one writes the next one reads, and nothing is edited in between.
"""

import json
import shlex

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.cli import main

PROMPTS = ["Hello", "How many are 2 and 3?", "Who is it?", "Why?"]
NEW = 9


@pytest.fixture
def source(tmp_path, write_gguf, tiny, bytes_of):
    """`source("gguf")`: a chat model as they are published; in safetensors with settings that sample, in bfloat16."""

    def make(kind):
        if kind == "gguf":
            write_gguf(tmp_path / "chat.Q8_0.gguf")
            return str(tmp_path / "chat.Q8_0.gguf")
        tokenizer = bytes_of("llama")
        model = tiny.model("llama", vocab_size=len(tokenizer), num_hidden_layers=1).bfloat16()
        del model.config.mtpkern
        model.config.eos_token_id = tokenizer.eos_token_id
        stops = [tokenizer.eos_token_id]
        model.generation_config.update(eos_token_id=stops, do_sample=True, temperature=0.6, top_p=0.9)
        model.save_pretrained(tmp_path / "published")
        tokenizer.save_pretrained(tmp_path / "published")
        return str(tmp_path / "published")

    return make


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy(model, tokenizer, prompt, **options):
    """The text that transformers writes: of an assistant, one token a pass, the mask token never."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": NEW, "temperature": None, "top_p": None} | options
    ids = model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), inputs


@pytest.mark.parametrize(
    ("kind", "gated"), [("gguf", False), ("gguf", True), ("safetensors", False)], ids=["gguf", "gguf gated", "sampling"]
)
def test_from_a_published_file_to_several_tokens_a_pass(tmp_path, source, capsys, kind, gated):
    plain, answers, out = tmp_path / "plain", tmp_path / "answers.jsonl", tmp_path / "out"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))

    assert main(["convert", source(kind), str(plain)]) == 0
    decoding = ["--file", str(prompts), "--max-new-tokens", str(NEW), "--dtype", "float32", "--device", "cpu"]
    assert main(["generate", str(plain), "--k", "1", "--chat", *decoding, "--output", str(answers)]) == 0
    base, tokenizer = AutoModelForCausalLM.from_pretrained(plain, dtype="float32"), AutoTokenizer.from_pretrained(plain)
    own = [row["text"] for row in rows_of(answers)]
    assert own == [greedy(base, tokenizer, text)[0] for text in PROMPTS]

    training = ["--max-steps", "3", "--k-max", "4", "--num-spans", "2", "--learning-rate", "0.01", "--use-cpu"]
    training += ["--save-strategy", "no", "--report-to", "none", *(["--gated", "--lora-rank", "4"] if gated else [])]
    files = ["--model", str(plain), "--train-data", str(answers), "--output-dir", str(out)]
    capsys.readouterr()
    assert main(["train", *files, *training]) == 0
    printed = capsys.readouterr()
    assert f"{len(PROMPTS)} used" in printed.err
    if gated:
        model = mtpkern.load_adapter(base, out)
        for text, before in zip(PROMPTS, own):
            inputs = greedy(base, tokenizer, text)[1]
            ids = mtpkern.generate(model, **inputs, max_new_tokens=NEW)[0, inputs.input_ids.shape[1] :]
            assert tokenizer.decode(ids, skip_special_tokens=True) == before
        return

    # The command that training prints, and the same for all prompts.
    words = shlex.split(printed.out.splitlines()[-1])[1:]
    assert main([*words, "--max-new-tokens", "3"]) == 0
    final = tmp_path / "final.jsonl"
    assert main([*words[: words.index("--prompt")], *decoding, "--output", str(final)]) == 0
    trained = AutoModelForCausalLM.from_pretrained(out)
    mask = trained.config.mtpkern["mask_token_id"]
    rows = rows_of(final)
    assert [row["text"] for row in rows] == [
        greedy(trained, tokenizer, text, suppress_tokens=[mask])[0] for text in PROMPTS
    ]
    assert [row["text"] for row in rows] != own
    assert all(sum(row["blocks"]) == len(row["tokens"]) for row in rows)
