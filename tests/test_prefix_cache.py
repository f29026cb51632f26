"""What one call has read another need not read again: the same tokens, fewer columns, nothing of what has changed."""

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import mtpkern
from mtpkern import ConfAdapt, PrefixCache, Static, Verified
from mtpkern.prefix_cache import common

WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {"llama": {}, "gemma3_text": WINDOWED, "gpt_oss": {**WINDOWED, "attention": "eager"}, "gpt_neox": {}}


def test_fewer_than_8_common_tokens_are_not_worth_a_copy() -> None:
    for n, shared in ((0, 0), (7, 0), (8, 8), (9, 9)):
        a, b = np.arange(12), np.arange(12)
        b[n:] += 1
        assert common(a, b) == common(a, b[: n + 1]) == common(b[:n], a) == shared


@pytest.fixture(params=["llama"])
def model(tiny: Any, request: Any) -> Any:
    return tiny.model(request.param, **MODELS[request.param])


@pytest.fixture
def read(model: Any) -> Iterator[list[int]]:
    """Columns that each pass of a prefill has run, or rows where prompts are packed."""
    columns: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if "logits_to_keep" in kwargs:
            columns.append((args[0] if args else kwargs["input_ids"]).shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield columns
    hook.remove()


def words(tiny: Any, n: int, seed: int = 1) -> list[int]:
    return tiny.prompts(n, seed=seed)[0][0].tolist()


def padded(*prompts: list[int]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])}


def run(model: Any, *prompts: list[int], **options: Any) -> list[list[int]]:
    """The new tokens of each prompt, without padding."""
    # A model with hooks is looked at anew, which takes passes.
    options = {"strategy": Verified(3, threshold=0.1), "max_new_tokens": 9, "check_model": False, **options}
    output = mtpkern.generate(model, **padded(*prompts), return_dict_in_generate=True, **options)
    width = max(map(len, prompts))
    return [row[width : width + sum(b)] for row, b in zip(output.sequences.tolist(), output.blocks, strict=True)]


# What is shared


@pytest.mark.parametrize("model", MODELS, indirect=True)
@pytest.mark.parametrize("chunk", [8192, 5])
def test_turns_of_a_chat_read_only_what_is_new(model: Any, tiny: Any, read: list[int], chunk: int) -> None:
    cache, text = PrefixCache(), words(tiny, 14)
    for turn in range(3):
        seen, fed = len(text), sum(map(len, cache.texts))
        (want,) = run(model, text)
        read.clear()
        (got,) = run(model, text, prefix_cache=cache, prefill_chunk=chunk)
        assert got == want
        assert cache.shared == [fed]
        assert sum(read) == seen - fed + 2  # two masks behind the prompt
        assert max(read) <= chunk + 2
        text += got + words(tiny, 5, seed=turn)
        assert cache.texts[0] == text[: len(cache.texts[0])]
        assert len(cache.texts[0]) >= seen + len(got) - 3


def test_verified_is_greedy_whoever_has_read_the_prefix(model: Any, tiny: Any) -> None:
    """Each strategy goes on from what another has written, of other k and masks, and draws or not."""
    cache, text = PrefixCache(), words(tiny, 12)
    for writer in (Static(3), ConfAdapt(4, 0.2), Verified(5, threshold=0.0, masks=7), Static(1)):
        torch.manual_seed(0)
        (answer,) = run(model, text, prefix_cache=cache, strategy=writer, do_sample=writer.k == 4)
        assert cache.shared[0] or writer.k == 3
        text += [*answer, 5]
        reader = Verified(3, threshold=0.1, masks=0 if writer.masks else 4)
        (got,) = run(model, text, prefix_cache=cache, strategy=reader)
        ids = torch.tensor([text])
        mask = torch.ones_like(ids)
        theirs = model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, suppress_tokens=[tiny.mask]
        )
        assert got == theirs[0, len(text) :].tolist()
        assert cache.shared[0] >= len(text) - 6
        text += got


def test_each_prompt_of_a_batch_takes_the_text_that_it_begins_like(model: Any, tiny: Any, read: list[int]) -> None:
    """Rows come in another order, in other numbers and lengths; columns that one has to read all read."""
    a, b = words(tiny, 20), words(tiny, 13, seed=2)
    cache = PrefixCache()
    run(model, a, b, prefix_cache=cache)
    batch = [*b, 1, 2], [*a, 4], b[:9] + [7] * 10, [9, 9], a
    want = run(model, *batch)
    read.clear()
    assert run(model, *batch, prefix_cache=cache) == want
    shared = [len(b), len(a), 9, 0, len(a) - 1]
    assert all(n <= m <= len(x) for n, m, x in zip(shared, cache.shared, batch, strict=True)), cache.shared
    columns = max(len(x) - n for x, n in zip(batch, cache.shared))
    assert read == [sum(min(columns, len(x)) + 2 for x in batch)]
    assert len(cache.texts) == len(batch)


def test_fewer_or_other_tokens_are_read_anew(model: Any, tiny: Any, read: list[int]) -> None:
    cache, text = PrefixCache(), words(tiny, 16)
    run(model, text, prefix_cache=cache)
    for prompt, n in (([*text[:11], 1, 1, 1], 11), ([*text[:7], 1, 1], 0), (text, 0)):
        read.clear()
        assert run(model, prompt, prefix_cache=cache) == run(model, prompt)
        assert cache.shared[0] in (n, n + 1) if n else cache.shared == [0]
        assert read[0] == len(prompt) - cache.shared[0] + 2


def test_generate_and_stream_share_one(model: Any, tiny: Any) -> None:
    cache, text = PrefixCache(), words(tiny, 18)
    model.generate = partial(mtpkern.generate, model)
    (want,) = run(model, text)
    options = {"strategy": Verified(3, threshold=0.1), "max_new_tokens": 9, "prefix_cache": cache}
    assert [x for (block,) in mtpkern.stream(model, **padded(text), **options) for x in block] == want
    assert model.generate(**padded(text), **options)[0, 18:].tolist() == want
    assert cache.shared == [17]


# However the call before has ended


@pytest.mark.parametrize("new", range(1, 8))
def test_stop_tokens_and_criteria_anywhere_in_a_block(model: Any, tiny: Any, new: int) -> None:
    """What the device has decoded behind the end, or never fed, is not kept."""
    text, slow = words(tiny, 16), {"strategy": Verified(4, threshold=0.0)}
    (whole,) = run(model, text)
    stops = {"eos_token_id": whole[new - 1]}, {"stopping_criteria": [lambda ids, _: second_from(ids, 16 + new)]}
    for stop in (*stops, {"max_new_tokens": new}):
        cache = PrefixCache()
        (answer,) = run(model, text, prefix_cache=cache, **slow, **stop)
        assert answer == whole[: len(answer)]
        (kept,) = cache.texts
        assert kept == (text + answer)[: len(kept)]
        follow = text + answer + [2, 6]
        assert run(model, follow, prefix_cache=cache) == run(model, follow)
        assert cache.shared[0] >= 16


def second_from(ids: Tensor, length: int) -> Tensor:
    return torch.full((len(ids),), ids.shape[1] >= length)


def test_a_reader_that_leaves_and_an_error(model: Any, tiny: Any) -> None:
    cache, text = PrefixCache(), words(tiny, 16)
    options = {"strategy": Verified(3, threshold=0.1), "max_new_tokens": 30, "prefix_cache": cache}
    with mtpkern.stream(model, **padded(text), **options) as blocks:
        next(blocks)
    assert blocks.output is not None
    assert cache.texts[0] == blocks.output[0, : len(cache.texts[0])].tolist()
    assert run(model, [*text, 1], prefix_cache=cache) == run(model, [*text, 1])
    assert cache.shared == [16]

    class Leaves(Exception): ...

    def leave(ids: Tensor, scores: Any) -> Tensor:
        raise Leaves

    before = cache.texts
    with pytest.raises(Leaves):
        run(model, words(tiny, 16, seed=5), prefix_cache=cache, stopping_criteria=[leave])
    assert cache.texts == before
    assert run(model, [*text, 1, 4], prefix_cache=cache) == run(model, [*text, 1, 4])
    assert cache.shared[0] >= 17


# What has changed


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7, 7] += 1  # none of those that are looked at


def past_autograd(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1)


def by_an_optimizer(model: Any) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def loaded(model: Any) -> None:
    state = {name: x.clone().neg_() if "v_proj" in name else x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: -out)


def another_setting(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def another_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def adapted(model: Any) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model).eval()


@pytest.mark.parametrize(
    "change",
    [
        *(in_place, past_autograd, by_an_optimizer, loaded, hooked, another_setting, another_activation, adapted),
        *(lambda model: model.double(), lambda model: model.bfloat16()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Already found a `peft_config`")
def test_a_model_that_has_changed_reads_all(model: Any, tiny: Any, change: Callable[[Any], Any]) -> None:
    cache, text = PrefixCache(), words(tiny, 16)
    for _ in range(2):
        run(model, text, prefix_cache=cache, max_new_tokens=2)
    assert cache.shared == [15]
    change(model)
    want = run(model, text)
    assert run(model, text, prefix_cache=cache) == want
    assert cache.shared == [0]
    assert run(model, text, prefix_cache=cache) == want
    assert cache.shared == [15]


def test_a_function_in_the_place_of_one_that_has_gone(model: Any, tiny: Any) -> None:
    """Another lies where it lay in memory, as soon as that is free: what is kept must not take them for one."""
    text, cache, mlp = words(tiny, 30), PrefixCache(), model.model.layers[0].mlp
    del mlp.act_fn
    places = set()
    for i in range(12):
        mlp.act_fn = partial(torch.nn.functional.leaky_relu, negative_slope=0.1 + i)
        places.add(id(mlp.act_fn))
        new = run(model, text, prefix_cache=cache)
        assert cache.shared == [0]
        assert new == run(model, text)
        del mlp.act_fn
    assert len(places) < 12


def test_an_adapter_that_is_switched_off_and_on_or_merged(model: Any, tiny: Any) -> None:
    import peft

    with_lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False)).eval()
    cache, text = PrefixCache(), words(tiny, 16)

    def check(shared: int) -> None:
        assert run(with_lora, text, prefix_cache=cache) == run(with_lora, text)
        assert cache.shared == [shared]

    check(0)
    check(15)
    with with_lora.disable_adapter():
        check(0)
        check(15)
    check(0)
    with_lora.merge_adapter()
    check(0)
    check(15)
    with_lora.unmerge_adapter()
    check(0)


def test_autocast_and_another_model(model: Any, tiny: Any) -> None:
    cache, text = PrefixCache(), words(tiny, 16)
    run(model, text, prefix_cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model, text, prefix_cache=cache) == run(model, text)
        assert cache.shared == [0]
    other = tiny.model("llama", seed=4)
    for one in (model, other, model):
        assert run(one, text, prefix_cache=cache) == run(one, text)
        assert cache.shared == [0]


def test_a_gated_adapter_goes_on_from_the_bases_keys(tiny: Any) -> None:
    from mtpkern.train.lora import add_gated_lora

    model = tiny.model("llama", vocab_size=61)
    del model.config.mtpkern
    gated = add_gated_lora(model, rank=4, k_max=4).eval()
    with torch.no_grad():
        for name, x in gated.named_parameters():
            if "lora_B" in name:
                x.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    cache, text = PrefixCache(), words(tiny, 16)
    for strategy in (Verified(4, threshold=0.1), Static(2)):
        for _ in range(2):
            assert run(gated, text, prefix_cache=cache, strategy=strategy) == run(gated, text, strategy=strategy)
            text += [1, 2]
        assert cache.shared[0] >= len(text) - 5


# What it holds


def test_it_alone_holds_the_memory(model: Any, tiny: Any) -> None:
    cache = PrefixCache()
    run(model, words(tiny, 20), words(tiny, 5), prefix_cache=cache)
    longest = max(map(len, cache.texts))
    assert cache.nbytes == 2 * 2 * 2 * longest * 2 * 8 * 4  # layers, keys and values, B, n, Hkv, D, bytes
    assert cache._kept is not None
    there = [weakref.ref(x) for pair in cache._kept.layers.values() for x in pair]
    cache.clear()
    assert (cache.nbytes, cache.texts, cache.shared) == (0, [], [])
    gc.collect()
    assert not any(x() for x in there)


def test_it_does_not_keep_its_model(tiny: Any) -> None:
    model, cache = tiny.model("llama"), PrefixCache()
    run(model, words(tiny, 20), prefix_cache=cache)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert run(other := tiny.model("llama"), words(tiny, 20), prefix_cache=cache) == run(other, words(tiny, 20))
    assert cache.shared == [0]


def test_what_has_none_is_refused_by_name(model: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = words(tiny, 10)
    with pytest.raises(TypeError, match=r"prefix_cache must be a mtpkern\.PrefixCache\(\) or None, got DynamicCache"):
        run(model, text, prefix_cache=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values; give the calls a prefix_cache"):
        run(model, text, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="generate_batch does not support prefix_cache"):
        mtpkern.generate_batch(model, [text], prefix_cache=PrefixCache(), max_new_tokens=2)
    monkeypatch.setattr("mtpkern.prefix_cache.is_parallel", lambda model: True)
    with pytest.raises(ValueError, match="prefix_cache with LlamaForCausalLM split over processes"):
        mtpkern.stream(model, **padded(text), prefix_cache=PrefixCache())
    model.config.kv_lora_rank = 4
    with pytest.raises(ValueError, match="prefix_cache with LlamaForCausalLM, whose latent attention"):
        mtpkern.stream(model, **padded(text), prefix_cache=PrefixCache())
