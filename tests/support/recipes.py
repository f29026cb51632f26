"""A tiny run of `mtpkern train`: its rows, and options that make it small."""

import pytest

# Rows as the data sets have them: their columns, their order, their kinds of values.
METAMATH = [
    {
        "type": f"{'GSM' if i % 2 else 'MATH'}_AnsAug",
        "query": f"Gracie has {i} marbles and buys 3 more. How many has she now?",
        "original_question": f"Gracie has {i // 3} marbles. How many has she?",
        "response": (
            f"Gracie starts with {i} marbles. She then buys 3 more of them.\nThen she has {i} + 3 = {i + 3}.\n"
            f"#### {i + 3}\nThe answer is: {i + 3}"
        ),
    }
    for i in range(60)
]


GSM8K = [
    {
        "question": f"Natalia sold {i} clips in April and half as many in May. How many in all?",
        "answer": f"She sold {i}/2 = <<{i}/2={i // 2}>>{i // 2} in May.\nIn all {i + i // 2}.\n#### {i + i // 2}",
    }
    for i in range(2, 26, 2)
]


TINY = ["--max-steps", "1", "--per-device-train-batch-size", "2", "--use-cpu", "--warmup-steps", "0"]


@pytest.fixture
def checkpoint(tmp_path, tiny, bytes_of):
    """`checkpoint("llama")`: a folder with a tiny random model that has never heard of a mask token."""

    def make(kind, name="start", **settings):
        folder = tmp_path / name
        tokenizer = bytes_of(kind)
        # As Qwen3's, that embedding has rows to spare.
        rows = len(tokenizer) + (40 if kind == "qwen" else 0)
        model = tiny.model("llama" if kind == "llama" else "qwen3", vocab_size=rows, **settings)
        del model.config.mtpkern
        model.config.max_position_embeddings = 2048
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make
