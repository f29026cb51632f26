"""What a bare call comes to on a GPU: passes captured, layers compiled, products joined, rows by load.

The tests switch most of that off elsewhere (tests/conftest.py), as it takes seconds.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mtpkern
from mtpkern import Verified, layers, products
from mtpkern.compare import encode, read_problems
from mtpkern.demo import ASSETS, load
from mtpkern.kernels.linear import few_rows_linear
from mtpkern.options import Options
from support.recording import RecordedStep, kept

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def uncompiled_unless_asked() -> None:
    """Not here."""


@pytest.fixture
def rows_for_free() -> None:
    """Not here."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Options]:
    """`asked(device, call, model, prompts)`: what the call wants where the model is there; nothing is decoded."""
    read = Options.__init__

    class Read(Exception): ...

    def ask(device: torch.device, call: Callable[..., Any], model: Any, *args: Any, **options: Any) -> Options:
        def note(self: Options, *given: Any) -> None:
            with patch.object(type(model), "device", device):
                read(self, *given)
            raise Read(self)

        monkeypatch.setattr(Options, "__init__", note)
        with pytest.raises(Read) as end:
            call(model, *args, **options)
        found: Options = end.value.args[0]
        return found

    return ask


CALLS = {"generate": torch.tensor([[3, 4]]), "generate_batch": [[3, 4]]}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_bare_call_asks_for(name: str, asked: Callable[..., Options], tiny: SimpleNamespace) -> None:
    call, prompts, model = getattr(mtpkern, name), CALLS[name], tiny.model("llama", num_hidden_layers=1)

    def how(device: torch.device, *, on_host: bool = False, **options: Any) -> tuple[bool, bool, bool]:
        found = asked(device, call, model, prompts, **options).of_decoder(on_host=on_host)
        assert found["rows"] is None
        return found["use_graph"], found["compile"], found["by_load"]

    assert how(CUDA) == (True, True, True)
    assert how(CPU) == (False, False, True)
    # A pass that no graph takes is not worth compiling; what is asked for is had.
    assert how(CUDA, on_host=True) == how(CUDA, use_graph=False) == (False, False, True)
    assert how(CUDA, compile=False) == (True, False, True)
    assert how(CUDA, compile=True, use_graph=False) == how(CPU, compile=True) == (False, True, True)
    assert how(CUDA, strategy=Verified(3)) == (True, True, False)
    masks = [asked(device, call, model, prompts).strategy_of(1).masks for device in (CUDA, CPU)]
    assert masks[0] > masks[1] == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_a_bare_call_has_all_of_it(
    recorded: type[RecordedStep], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph that is none, on a processor that is taken for a Hopper; the tokens are those of a CPU."""
    multiplied: list[int] = []

    def note(x: Tensor, *args: Any) -> Tensor:
        multiplied.append(x[..., 0].numel())
        return few_rows_linear(x, *args)

    monkeypatch.setattr(products, "_is_hopper", lambda device: True)
    monkeypatch.setattr(products, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(products, "few_rows_linear", note)
    monkeypatch.setattr(layers, "BACKEND", "eager")
    model = tiny.model("llama")
    ids, _ = tiny.prompts(9)
    call = {"max_new_tokens": 24, "eos_token_id": 3}
    expected = mtpkern.generate(model, ids, use_graph=False, **call)
    assert not multiplied
    assert not counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert torch.equal(mtpkern.generate(model, ids, **call), expected)
    (decoder,) = kept(model)
    assert_all_of_it(decoder)
    # q, k and v; gate and up; in each layer.
    assert [len(refs) for refs in decoder.products.found] == [3, 2] * 2
    assert {9} <= set(multiplied) <= {1, 9}
    assert len(decoder.ladder.rungs) == 2


def assert_all_of_it(decoder: Any) -> None:
    """In a graph, its layers compiled, siblings joined, several numbers of rows to choose from."""
    assert decoder.graph.captured
    assert not decoder.graph.refused
    assert decoder.compile
    assert counters["stats"]["unique_graphs"]
    assert decoder.products.found
    assert len(decoder.ladder.rungs) > 1
    assert decoder.ladder.made


@pytest.mark.gpu
@pytest.mark.usefixtures("captures", "fresh_compiler")
@pytest.mark.parametrize(("dtype", "k", "batch"), [("float32", 12, 3), ("bfloat16", 3, 1)])
def test_a_bare_call_on_a_gpu_writes_the_cpus_tokens(
    dtype: str, k: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped checkpoint, as new and as replayed. On Hopper 9 rows of bfloat16 are multiplied by our kernel.

    On a CPU bfloat16 moves no logit of these answers by a tenth of what their tokens are ahead by.
    """
    monkeypatch.setattr(products, "LEAST_WEIGHT", 0)
    (model, tokenizer), (there, _) = load(ASSETS), load(ASSETS)
    there.to("cuda", getattr(torch, dtype))
    there.config.mtpkern = {**there.config.mtpkern, "k_max": k}
    prompts = [problem.prompt for problem in read_problems(ASSETS / "problems.jsonl", batch)]
    expected = mtpkern.generate(model, **encode(tokenizer, prompts, CPU), max_new_tokens=48)
    for _ in range(3):
        found = mtpkern.generate(there, **encode(tokenizer, prompts, there.device), max_new_tokens=48)
        assert torch.equal(found.cpu(), expected)
    (decoder,) = kept(there)
    assert_all_of_it(decoder)
    assert decoder.strategy.k == k
    assert decoder.strategy.masks > 0
    hopper = torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    assert (decoder.products.few_rows, bool(decoder.products.plain)) == (16 if hopper else 0, hopper)
    assert not hopper or not decoder.products.counters.any()
