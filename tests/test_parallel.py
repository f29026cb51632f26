"""A model split over two processes by transformers' tp_plan decodes as one that is whole; the processes are forks."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import mtpkern
from mtpkern import ConfAdapt, Static, Verified
from mtpkern.load import Load

NEW = 12


def split(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_split_by_its_plan_a_model_decodes_as_whole(
    kind: str,
    tiny: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_two_processes: Callable[..., None],
) -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    model = tiny.model(kind, **(experts if kind == "qwen3_moe" else {}))
    model.save_pretrained(tmp_path)
    ids, real = tiny.prompts(9, 4, 6)
    options = {"attention_mask": real, "max_new_tokens": NEW}
    strategies = [Verified(3, threshold=0.2), ConfAdapt(3, threshold=0.3), Static(1)]
    expected = [mtpkern.generate(model, ids, strategy=strategy, **options) for strategy in strategies]
    # What a pass costs is for each process to find out, and must not decide how many rows it has.
    monkeypatch.setattr(Load, "price", lambda *_: float(os.environ["RANK"]))

    def work(rank: int) -> None:
        torch.set_num_threads(1)  # a fork has none of the threads of its parent, and would wait for them
        parts = split(tmp_path)
        assert isinstance(parts.model.layers[0].self_attn.q_proj.weight, DTensor)
        for strategy, wanted in zip(strategies, expected):
            assert mtpkern.generate(parts, ids, strategy=strategy, **options).equal(wanted)
        assert mtpkern.generate(parts, ids, **options).equal(expected[0])
        # The processes' generators differ, the text does not.
        torch.manual_seed(rank)
        sampled = mtpkern.generate(parts, ids, do_sample=True, **options)
        of_both = [torch.empty_like(sampled) for _ in range(2)]
        torch.distributed.all_gather(of_both, sampled)
        assert of_both[0].equal(of_both[1])
        prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, real)]
        outputs = mtpkern.generate_batch(parts, prompts, max_new_tokens=NEW, batch_size=2)
        assert [output.tokens for output in outputs] == expected[0][:, ids.shape[1] :].tolist()
        with pytest.raises(ValueError, match=r"max_time.*several processes"):
            mtpkern.generate(parts, ids, max_time=1.0, **options)
        torch.distributed.barrier()

    in_two_processes(work)


@pytest.mark.parametrize("part", ["fsdp", "pp"])
def test_other_ways_to_split_are_refused(part: str, tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    setattr(model, f"_{part}_size", 2)
    with pytest.raises(ValueError, match=f"{part}_size"):
        mtpkern.generate(model, tiny.prompts(4)[0], max_new_tokens=2)
