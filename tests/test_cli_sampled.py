"""`mtpkern generate` that samples and stops at texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtpkern
from mtpkern.cli import main

SAMPLING = ["--temperature", "1.5", "--top-k", "20", "--top-p", "0.9", "--seed", "5"]


@pytest.fixture(scope="module")
def folder(solver: Callable[..., Path]) -> Path:
    return solver(3)


def run(folder: Path, tmp_path: Path, *words: str, out: str) -> list[dict[str, Any]]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question: {i} + 1"}) + "\n" for i in range(5)))
    common = ["generate", str(folder), "--file", str(path), "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*common, *words, "--output", str(tmp_path / out)]) == 0
    return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]


def test_a_seed_gives_the_same_text_and_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path, *SAMPLING, "--batch-size", "4", out="whole.jsonl")
    assert [row["tokens"] for row in run(folder, tmp_path, *SAMPLING, "--batch-size", "2", out="two.jsonl")] == [
        row["tokens"] for row in whole
    ]
    assert [row["tokens"] for row in run(folder, tmp_path, out="greedy.jsonl")] != [row["tokens"] for row in whole]
    (tmp_path / "half.jsonl").write_text("".join((tmp_path / "whole.jsonl").read_text().splitlines(True)[:2]))
    assert [row["tokens"] for row in run(folder, tmp_path, *SAMPLING, out="half.jsonl")] == [
        row["tokens"] for row in whole
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(5)
    ids = tokenizer("Question: 0 + 1", return_tensors="pt").input_ids
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "max_new_tokens": 8}
    alone = mtpkern.generate(model, ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    first = whole[0]["tokens"]
    assert alone[: len(first)] == first


@pytest.mark.parametrize(
    "words", [["--top-k", "3"], ["--seed", "1", "--top-p", "0.5"], ["--temperature", "0", "--seed", "1"]]
)
def test_what_says_how_to_sample_needs_a_temperature(words: list[str], capsys: Any) -> None:
    assert main(["generate", "somewhere", "--prompt", "x", *words]) == 2
    assert "give a --temperature" in capsys.readouterr().err


def test_a_seed_that_is_none_is_refused_by_name(folder: Path, capsys: Any) -> None:
    words = ["generate", str(folder), "--prompt", "x", "--temperature", "1", "--seed", str(1 << 70)]
    assert main(words) == 2
    assert f"seed must have 64 bits, as torch's seeds have, got {1 << 70}" in capsys.readouterr().err


def test_a_text_ends_it(start: Path, tmp_path: Path) -> None:
    common = ["--strategy", "static:1"]
    plain = run(start, tmp_path, *common, out="plain.jsonl")
    stop = next(c for row in plain for c in row["text"][1:-1] if c.isprintable() and c.isascii())
    stopped = run(start, tmp_path, *common, "--stop", stop, out="stopped.jsonl")
    for before, row in zip(plain, stopped):
        assert before["text"].startswith(row["text"]) or row["text"] in before["text"]
        if stop in before["text"]:
            assert row["text"].endswith(stop)
            assert row["finished"]
