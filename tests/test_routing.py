"""Nobody but the routed thread sees the routing: not other threads, not other models on the same config."""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mtpkern
from mtpkern.attention import NAME, attention_context, mtpkern_attention
from mtpkern.kernels.scoring import Scoring
from mtpkern.routing import routed_config


class Zeros:
    """An attention context that returns zeros."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


def elsewhere(call: Callable[[], Any]) -> Any:
    """What the call returns in another thread."""
    results: list[Any] = []
    thread = Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    (result,) = results
    return result


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns ten thousand times a second."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def test_other_threads_and_other_configs_are_not_routed(tiny: Any) -> None:
    model, other = tiny.model("llama"), tiny.model("llama", attention="eager")
    config, kind = model.config, type(model.config)
    settings = dict(vars(config))
    ids, real = tiny.prompts(9, 4)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(ids, attention_mask=real).logits

    expected = plain()
    with attention_context(model, Zeros()):
        assert config._attn_implementation == NAME
        assert elsewhere(lambda: config._attn_implementation) == "sdpa"
        assert other.config._attn_implementation == "eager"
        assert elsewhere(plain).equal(expected)
        with attention_context(other, Zeros()):
            assert other.config._attn_implementation == config._attn_implementation == NAME
        assert other.config._attn_implementation == "eager"
        # What anybody sets or copies meanwhile is the plain config.
        assert vars(config) == settings
        for twin in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
            assert type(twin) is kind
            assert twin == config
            assert config == twin
            assert twin._attn_implementation == "sdpa"
        assert type(config).__name__ == kind.__name__
        assert isinstance(config, kind)
        assert NAME not in config.to_json_string(use_diff=False).replace('"mtpkern": {', "")
        inside = config.to_json_string()
        config._attn_implementation = "eager"
    assert inside == config.to_json_string()
    assert type(config) is kind
    assert config._attn_implementation == "eager"


def test_two_models_on_one_config_in_any_order(tiny: Any) -> None:
    """Blocks that overlap without being nested leave the config as it was."""
    model = tiny.model("llama")
    twin = type(model)(model.config)
    kind, entered, leave = type(model.config), Event(), Event()

    def overlap() -> None:
        with attention_context(twin, Zeros()):
            entered.set()
            leave.wait()
            assert model.config._attn_implementation == NAME

    thread = Thread(target=overlap)
    with attention_context(model, Zeros()):
        thread.start()
        entered.wait()
    assert model.config._attn_implementation == "sdpa"
    leave.set()
    thread.join()
    assert model.config._attn_implementation == "sdpa"
    assert type(model.config) is kind


def test_a_pool_of_threads_changes_no_result(tiny: Any, hasty: None) -> None:
    """Decoding of two models on one config beside forwards of both, with padding on the left."""
    model = tiny.model("llama")
    twin = type(model)(model.config).eval()
    kind = type(model.config)
    ids, real = tiny.prompts(9, 4, 6)

    def decode(which: Any) -> Callable[[], Tensor]:
        return lambda: mtpkern.generate(
            which, ids, attention_mask=real, strategy=mtpkern.Verified(3, threshold=0.2), max_new_tokens=12
        )

    def forward(which: Any) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return which(ids, attention_mask=real).logits

        return call

    jobs = [decode(model), decode(twin), forward(model), forward(twin), decode(model), forward(model)]
    quiet = [job() for job in jobs]
    found: list[tuple[int, bool]] = []

    def repeat(i: int) -> None:
        for _ in range(4):
            found.append((i, jobs[i]().equal(quiet[i])))

    threads = [Thread(target=repeat, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * len(jobs)
    assert all(same for _, same in found)
    assert type(model.config) is kind
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_of_another_backward_gets_the_attention_of_its_own(tiny: Any) -> None:
    """Autograd's threads do not know whose backward they run; a layer without our context is not ours."""
    model = tiny.model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, _ = tiny.prompts(9, 9)

    def gradient(**route: Any) -> Callable[[], Tensor]:
        def call() -> Tensor:
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embeds, use_cache=False, **route).logits.square().sum()
            return torch.autograd.grad(loss, embeds)[0]

        return call

    expected = gradient()()
    with attention_context(model, Zeros()) as route:
        ours = gradient(**route)()
        assert not ours.equal(expected)
        assert elsewhere(gradient()).equal(expected)
    assert gradient()().equal(expected)


@pytest.mark.parametrize("forwards", [True, False])
def test_the_second_forward_of_checkpointing_is_routed_in_any_thread(forwards: bool) -> None:
    """As on a GPU, whose backward runs in a thread of autograd's: here the whole backward does, in another thread."""
    config = SimpleNamespace(config=_llama_config(), layer_idx=0)
    x = torch.ones(1, 2, 3, 4, requires_grad=True)
    seen: list[bool] = []
    context: Any = _Ones(seen)

    def layer(x: Tensor) -> Tensor:
        assert config.config._attn_implementation == NAME
        return mtpkern_attention(config, x, x, x, None, **({"mtpkern": context} if forwards else {}))[0] * x.sum()  # type: ignore[arg-type]

    with routed_config(config.config, context):
        y = checkpoint(layer, x, use_reentrant=False)
        elsewhere(lambda: y.sum().backward())
    assert seen == [True, True]
    assert config.config._attn_implementation == "sdpa"


class _Ones:
    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.seen.append(True)
        return torch.ones_like(query).transpose(1, 2) * query.mean()


def _llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(attn_implementation="sdpa", num_hidden_layers=1)
