import gc
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.commands import TEMPLATE, write_jsonl
from support.interpreter import prepare
from support.llama_cpp import llama_as_gguf
from support.models import MASK, PAD, PUBLISHED, VOCABULARY, adapted_model, byte_tokenizer, random_model, random_prompts
from support.processes import run_in_two_processes

# Their fixtures are there for all.
pytest_plugins = [
    f"support.{name}"
    for name in (
        "batches",
        "engines",
        "made_up_device",
        "recipes",
        "recording",
        "replaying",
        "riding",
        "servers",
        "watching",
    )
]

# Triton reads this when it is first imported: without a GPU, its interpreter runs the kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Autograd makes its threads for other devices than the CPU at the first backward, if it knows of any, and a process
# that has such threads cannot be forked: in a build with CUDA a made-up device of some test would count.
torch.ones((), requires_grad=True).backward()


def laid_out(x: Tensor, device: str) -> Tensor:
    """A copy of x on the device with the strides of x and as far from an address that is a multiple of 16 bytes.

    `x.to(device)` would make gaps vanish, and with them what passes 2^31 and what is not aligned.
    """
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    offset = x.data_ptr() % 16 // x.element_size()
    there = torch.empty(offset + reach, dtype=x.dtype, device=device).as_strided(x.shape, x.stride(), offset)
    once(there).copy_(once(x))
    return there


def once(x: Tensor) -> Tensor:
    """Each element of an expanded tensor once."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def carried_to(device: str, form: Callable[..., Any]) -> Callable[..., Any]:
    """The form with its tensors carried to a device and back, those that it changed in place included."""

    def carried(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []

        def carry(x: Any) -> Any:
            if isinstance(x, Tensor):
                pairs.append((x, laid_out(x, device)))
                return pairs[-1][1]
            if isinstance(x, list):
                return [carry(y) for y in x]
            return type(x)(**{f.name: carry(getattr(x, f.name)) for f in fields(x)}) if is_dataclass(x) else x

        result = form(*map(carry, args), **{name: carry(x) for name, x in kwargs.items()})
        for here, there in pairs:
            once(here).copy_(once(there))
        if isinstance(result, tuple):
            return tuple(x.cpu() for x in result)
        return result.cpu() if isinstance(result, Tensor) else result

    return carried


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels run in Triton's interpreter, or on the GPU where there is one: the same tests either way."""
    gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("kernel"):
            params = getattr(getattr(item, "callspec", None), "params", {})
            # Said wherever tests are collected: where there is a GPU, it would end all of them.
            assert "form" in params, f"{item.nodeid}: a test of a kernel takes it as its parameter `form`"
            # Where there is no GPU, too: a test that asks which form it has got would be wrong on a GPU alone.
            params["form"] = carried_to("cuda" if gpu else "cpu", params["form"])
            if gpu:
                item.add_marker("gpu")
            elif not find_spec("triton"):
                item.add_marker(pytest.mark.skip(reason="Triton is not installed"))
        elif gpu and "interpreter" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        elif item.get_closest_marker("gpu") and not gpu:
            reason = "needs a CUDA or ROCm device; torch.cuda.is_available() is False"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What has been imported stays: half a million objects that every `gc.collect`, as at a training's end, looked at.

    A fork does not copy them either.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note each failure at once where MTPKERN_FAILURES names a file: a run that is killed sums nothing up."""
    file = os.environ.get("MTPKERN_FAILURES")
    if file and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:  # the workers' reports come here, too
        with open(file, "a") as out:
            out.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n{report.capstderr[-2000:]}\n")


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """What the tests of decoding share."""
    return SimpleNamespace(
        model=random_model,
        adapted=adapted_model,
        prompts=random_prompts,
        vocabulary=VOCABULARY,
        mask=MASK,
        pad=PAD,
    )


@pytest.fixture
def model(tiny: SimpleNamespace) -> Any:
    """A tiny random Llama, new in each test."""
    return tiny.model("llama")


@pytest.fixture(scope="module")
def shared(tiny: SimpleNamespace) -> Any:
    """One for all tests of a file, which leave it as it is."""
    return tiny.model("llama")


@pytest.fixture
def inputs(tiny: SimpleNamespace) -> dict[str, Tensor]:
    """Three prompts for it, padded on the left."""
    ids, real = tiny.prompts(9, 4, 12)
    return {"input_ids": ids, "attention_mask": real}


@pytest.fixture
def pair(tiny: SimpleNamespace) -> dict[str, Tensor]:
    """Two of them."""
    ids, real = tiny.prompts(6, 4)
    return {"input_ids": ids, "attention_mask": real}


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[[Callable[[int], None]], None]:
    """Runs work(rank) in two forks that can talk, as torchrun sets them up; fails with what either of them says."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    return run_in_two_processes


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, and colours neither forced nor forbidden, wherever the tests are started."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def uncompiled_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds for each model and shape: only tests of it wait for that."""
    monkeypatch.setattr("mtpkern.layers.COMPILE_CAPTURED", False)


@pytest.fixture(autouse=True)
def rows_for_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which pass brings which tokens would follow the load of the machine; test_load.py has a fixture of this name."""
    monkeypatch.setattr("mtpkern.load.Load.price", lambda *_: 0.0)
    monkeypatch.setattr("mtpkern.load.Ladder.choose", lambda self, *_: (self.rungs[-1], 0.0))


@pytest.fixture(autouse=True)
def undrawn_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training would end with half a second of matplotlib; `test_picture` undoes this."""
    monkeypatch.setattr("mtpkern.train.summary._draw", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def prepared_interpreter() -> None:
    if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
        prepare()


@pytest.fixture
def nan_in_new_tensors() -> Iterator[None]:
    """Every tensor that is allocated without values is full of NaN: reading what was not written shows."""
    # As a warning only: on a GPU products are called nondeterministic unless an environment variable says otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreter(nan_in_new_tensors: None) -> None:
    """A test of kernels in Triton's interpreter. What nobody has written is NaN, so that reading it shows."""


@pytest.fixture
def bytes_of() -> Callable[[str], Any]:
    """`bytes_of("llama")`: a new tokenizer."""
    return byte_tokenizer


@pytest.fixture
def start(tmp_path: Path, tiny: SimpleNamespace) -> Path:
    """A folder with a tiny random model that has never heard of a mask token, and a tokenizer of bytes."""
    tokenizer = byte_tokenizer("llama")
    model = tiny.model("llama", vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=512)
    del model.config.mtpkern
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def served(start: Path) -> Callable[[str], Path]:
    """`served("Qwen3")`: that folder, with the generation configuration that this model is published with."""

    def publish(name: str) -> Path:
        path = start / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **PUBLISHED[name]}))
        return start

    return publish


@pytest.fixture(scope="session")
def solver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`solver(k_max)`: a folder with a tiny random Llama for word problems, whose weights vary enough not to echo."""
    import mtpkern
    from mtpkern.train.arithmetic import build_tokenizer

    def make(k_max: int, template: str | None = None) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), build_tokenizer()
        tokenizer.chat_template = template
        torch.manual_seed(0)
        names = ("eos_token_id", "bos_token_id", "pad_token_id")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        special = {name: getattr(tokenizer, name) for name in names}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes, **special))
        mtpkern.add_mask_token(model, tokenizer)
        model.config.mtpkern = {**model.config.mtpkern, "k_max": k_max}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def chat_solver(solver: Callable[..., Path]) -> Path:
    """Such a folder with a chat template and eight problems."""
    from mtpkern.bench.problems import problems

    folder = solver(4, TEMPLATE)
    write_jsonl(folder / "problems.jsonl", [vars(p) for p in problems("test", 8)])
    return folder


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, and the compiler's counters stand at zero; nor is anything behind the test."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def write_gguf() -> Callable[..., tuple[Any, Any]]:
    """`write_gguf("tiny.gguf")`: a file of a tiny chat model."""
    return llama_as_gguf


@pytest.fixture
def gsm_symbolic(monkeypatch):
    """A stand-in for the module of reasoning-gym that makes word problems, with its names: twenty templates."""
    name = "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic"
    module = types.ModuleType(name)

    def generator(i):
        def problem(rng, difficulty=1.0):
            n = rng.randrange(10**6)
            return {"question": f"Template {i}, {n} + {i}?", "answer": str(n + i), "answer_cot": f"#### {n + i}"}

        return problem

    class Problems:
        def __init__(self, config):
            self.generators = {i: generator(i) for i in range(20)}

    module.tasks_ok, module.GSMSymbolicDataset, module.GSMSymbolicDatasetConfig = list(range(20)), Problems, dict
    for i in range(name.count(".")):
        parent = ".".join(name.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
