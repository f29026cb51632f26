"""A model split over two processes by transformers' tp_plan decodes as one that is whole; the processes are forks."""

import os
import signal
import socket
import time
import traceback
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

SECONDS = 120
NEW = 12
# Autograd makes threads at the first backward, and a process that has them cannot be forked later.
torch.ones((), requires_grad=True).backward()


def in_two_processes(work: Callable[[int], None]) -> None:
    """Run work(rank) in two forks that can talk, as torchrun sets them up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(2):
        pid = os.fork()
        if pid:
            running.add(pid)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)  # a fork has none of the threads of its parent, and would wait for them
            work(rank)
            torch.distributed.barrier()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline, codes = time.monotonic() + SECONDS, []
    while running and time.monotonic() < deadline and not any(codes):
        for pid in set(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert codes == [0, 0], "a process failed or took too long; its error stands above"


def split(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_split_by_its_plan_a_model_decodes_as_whole(
    kind: str, tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    in_two_processes(work)


@pytest.mark.parametrize("part", ["fsdp", "pp"])
def test_other_ways_to_split_are_refused(part: str, tiny: SimpleNamespace) -> None:
    model = tiny.model("llama")
    setattr(model, f"_{part}_size", 2)
    with pytest.raises(ValueError, match=f"{part}_size"):
        mtpkern.generate(model, tiny.prompts(4)[0], max_new_tokens=2)
