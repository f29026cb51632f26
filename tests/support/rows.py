"""Rows of training data, as files hold them."""

import json


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(n):
    return [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(n)]


def prompts(texts, tokenizer):
    return [tokenizer.decode(x["input_ids"][: x["prompt_length"]]) for x in texts]
