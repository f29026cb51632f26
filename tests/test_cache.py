from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedConfig

import mtpkern
from mtpkern import Verified
from mtpkern.cache import KVCache, PrefillCache
from mtpkern.decoder import Decoder
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.state import Rows
from support.models import LATENT

B, HKV, D, C = 2, 2, 4, 6
CPU = torch.device("cpu")


def rows_of(*slots: tuple[int, ...], trash: int = 0) -> Rows:
    """Rows of B sequences in these slots, then unused ones."""
    seq = [b for b, row in enumerate(slots) for _ in row] + [len(slots) - 1] * trash
    slot = [s for row in slots for s in row] + [C] * trash
    rows = Rows.allocate(len(seq), len(slots), CPU)
    rows.seq.copy_(torch.tensor(seq))
    rows.slot.copy_(torch.tensor(slot))
    rows.start[1:] = torch.tensor([len(row) for row in slots]).cumsum(0)
    return rows


def attend(cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    # Each call is a pass.
    cache.attended.clear()
    cache.memo.clear()
    return cache.attend(layer, q, k, v, Scoring(0.5, **kwargs))


def test_prefill_compacts_ragged_prompts() -> None:
    """Left padding goes to the trash slot; every token stands in the slot of its position."""
    cache = KVCache(C, rows_of((3,), (1,)), max_rows=1)
    key = torch.arange(B * HKV * 3 * D, dtype=torch.float32).view(B, HKV, 3, D)
    slot = torch.tensor([[0, 1, 2], [C, C, 0]])
    cache.fill(0, key, -key, slot)
    k_cache, v_cache = cache.layers[0]
    assert k_cache.shape == v_cache.shape == (B, HKV, C + 1, D)
    assert_close(k_cache[0, :, :3], key[0])
    assert_close(k_cache[1, :, 0], key[1, :, 2])
    assert_close(v_cache[:, :, :C], -k_cache[:, :, :C])
    assert not k_cache[0, :, 3:C].any()
    assert not k_cache[1, :, 1:C].any()


def test_each_layer_has_a_width_of_its_own() -> None:
    cache = KVCache(C, rows_of((0,), (0,)), max_rows=1)
    slot = torch.zeros(B, 1, dtype=torch.long)
    cache.fill(0, torch.ones(B, 2, 1, 4), torch.ones(B, 2, 1, 4), slot)
    cache.fill(5, torch.ones(B, 1, 1, 8, dtype=torch.float64), torch.ones(B, 1, 1, 6, dtype=torch.float64), slot)
    assert [tuple(x.shape) for x in cache.layers[5]] == [(B, 1, C + 1, 8), (B, 1, C + 1, 6)]
    assert [x.dtype for x in cache.layers[0] + cache.layers[5]] == [torch.float32] * 2 + [torch.float64] * 2


def test_a_step_writes_its_keys_before_it_reads_them() -> None:
    """Two sequences, two rows and one, against attention written out; stale slots hold large numbers, trash NaN."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = rows_of((2, 3), (1,), trash=2)
    cache = KVCache(C, rows, max_rows=2)
    prompt_k, prompt_v = draw(B, HKV, 2, D), draw(B, HKV, 2, D)
    cache.fill(0, prompt_k, prompt_v, torch.tensor([[0, 1], [C, 0]]))
    for x in cache.layers[0]:
        x[0, :, 2:C] = x[1, :, 1:C] = 1e4
        x[:, :, C] = torch.nan
    query, key, value = draw(1, 2 * HKV, 5, D), draw(1, HKV, 5, D), draw(1, HKV, 5, D)
    out = attend(cache, 0, query, key, value)
    assert out.shape == (1, 5, 2 * HKV, D)

    keys = [torch.cat([prompt_k[0], key[0, :, :2]], 1), torch.cat([prompt_k[1, :, 1:], key[0, :, 2:3]], 1)]
    values = [torch.cat([prompt_v[0], value[0, :, :2]], 1), torch.cat([prompt_v[1, :, 1:], value[0, :, 2:3]], 1)]
    for r, (b, seen) in enumerate([(0, 3), (0, 4), (1, 2)]):
        for h in range(2 * HKV):
            weight = (0.5 * keys[b][h // 2, :seen] @ query[0, h, r]).softmax(0)
            assert_close(out[0, r, h], weight @ values[b][h // 2, :seen])
    assert cache.attended == {0}


def test_options_of_a_layer_reach_the_kernel() -> None:
    rows = rows_of((2,), (2,))
    cache = KVCache(C, rows, max_rows=1)
    prompt = torch.ones(B, HKV, 2, D)
    cache.fill(0, prompt, prompt, torch.tensor([[0, 1], [0, 1]]))
    new = torch.full((1, HKV, 2, D), 4.0)
    query = torch.ones(1, HKV, 2, D)
    # Scores are 2, 2 and 8; the new value is 4, the old ones 1.
    weights = torch.tensor([2.0, 2.0, 8.0]).softmax(0)
    assert_close(
        attend(cache, 0, query, new, new), torch.full((1, 2, HKV, D), float(weights @ torch.tensor([1, 1, 4.0])))
    )
    assert_close(attend(cache, 0, query, new, new, window=1), torch.full((1, 2, HKV, D), 4.0))
    capped = (torch.tensor([2.0, 2.0, 8.0]) / 3).tanh().mul(3).softmax(0) @ torch.tensor([1, 1, 4.0])
    assert_close(attend(cache, 0, query, new, new, softcap=3.0), torch.full((1, 2, HKV, D), float(capped)))
    sunk = torch.tensor([2.0, 2.0, 8.0, 8.0]).softmax(0)[:3] @ torch.tensor([1, 1, 4.0])
    sinks = torch.full((HKV,), 8.0)
    assert_close(attend(cache, 0, query, new, new, sinks=sinks), torch.full((1, 2, HKV, D), float(sunk)))


def test_a_layer_that_cached_nothing() -> None:
    cache = KVCache(C, rows_of((0,), (0,)), max_rows=1)
    with pytest.raises(ValueError, match="layer 7 runs in a decoding step but cached nothing"):
        attend(cache, 7, torch.ones(1, 2, 2, D), torch.ones(1, 2, 2, D), torch.ones(1, 2, 2, D))


def test_a_model_that_cached_nothing() -> None:
    """Where the config does not tell how many layers there are, too."""
    with pytest.raises(ValueError, match="OddForCausalLM: of None layers, 0 cached keys"):
        KVCache(C, rows_of((0,)), max_rows=1, model_name="OddForCausalLM").require_cached(PreTrainedConfig())


def test_a_layer_that_attends_twice_or_to_other_shapes_is_refused() -> None:
    cache = KVCache(C, rows_of((2,), (2,)), max_rows=1, model_name="OddForCausalLM")
    cache.fill(0, torch.ones(B, HKV, 2, D), torch.ones(B, HKV, 2, D), torch.tensor([[0, 1], [0, 1]]))
    query, new = torch.ones(1, HKV, 2, D), torch.ones(1, HKV, 2, D)
    cache.attend(0, query, new, new, Scoring(0.5))
    with pytest.raises(ValueError, match="OddForCausalLM: layer 0 calls attention more than once in a pass"):
        cache.attend(0, query, new, new, Scoring(0.5))
    cache.attended.clear()
    with pytest.raises(ValueError, match=r"layer 0 attends to values of 1 heads of 8, but has cached 2 heads of 4"):
        cache.attend(0, query, new, torch.ones(1, 1, 2, 8), Scoring(0.5))


def test_a_layer_that_caches_twice_is_refused() -> None:
    cache = PrefillCache(KVCache(C, rows_of((2,), (2,)), max_rows=1), torch.tensor([[0, 1], [0, 1]]))
    x = torch.ones(B, HKV, 1, D)
    cache.update(x, x, 0)
    with pytest.raises(ValueError, match="layer 0 caches keys more than once in a pass"):
        cache.update(x, x, 0)
    cache.next_chunk(1)
    cache.update(x, x, 0)


def test_buffers_grow_and_keep_what_they_hold() -> None:
    rows = rows_of((3,), (1,), trash=1)
    cache = KVCache(50, rows, max_rows=1, held=4)
    rows.slot[-1] = 50
    key = torch.randn(B, HKV, 3, D)
    cache.fill(0, key, -key, torch.tensor([[0, 1, 2], [4, 4, 0]]))
    assert cache.layers[0][0].shape == (B, HKV, 5, D)
    new = torch.randn(1, HKV, 3, D)
    before = attend(cache, 0, new.repeat_interleave(2, 1), new, new)
    cache.reserve(4)
    assert cache.held == 4
    for slots, held in ((5, 8), (30, 30), (31, 50)):
        cache.reserve(slots)
        cache.slots = cache.held
        assert cache.held == held
        assert cache.layers[0][0].shape == (B, HKV, held + 1, D)
        assert_close(cache.layers[0][0][0, :, :3], key[0], rtol=0, atol=0)
        assert_close(attend(cache, 0, new.repeat_interleave(2, 1), new, new), before)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_to_the_model_the_prefill_cache_stays_empty(model_type: str, tiny: Any) -> None:
    """So the model's own masks are those of a pass without cache: its logits are the same."""
    model = tiny.model(model_type, **({"sliding_window": 4} if model_type == "mistral" else {}))
    ids, real = tiny.prompts(9, 5)
    position = (real.cumsum(1) - 1).clamp(min=0)
    slot = torch.where(real == 1, position, 16)
    cache = PrefillCache(KVCache(16, Rows.allocate(2, 2, CPU), max_rows=1), slot)
    with torch.no_grad():
        kwargs = {"input_ids": ids, "attention_mask": real, "position_ids": position}
        logits = model(**kwargs, past_key_values=cache, use_cache=True).logits
        plain = model(**kwargs, use_cache=False).logits
    assert cache.get_seq_length() == 0
    assert_close(logits[real == 1], plain[real == 1])
    assert sorted(cache.kv.layers) == [0, 1]
    # Compact: the shorter prompt's keys stand in slots 0 to 4, and nothing behind them.
    key = cache.kv.layers[0][0]
    assert key[1, :, :5].abs().sum((0, 2)).all()
    assert not key[1, :, 5:16].any()


CHUNKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"attention": "eager", "sliding_window": 5, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"attention": "eager", "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "minicpm3": LATENT,
}


@pytest.mark.parametrize("name", CHUNKED)
def test_a_prompt_in_chunks_is_the_prompt(name: str, tiny: Any) -> None:
    """The logits that are read out, and the keys that the first step will find, whatever the chunks."""
    model = tiny.model(name, **CHUNKED[name])

    def prefill(chunk: int, **shape: Any) -> tuple[Tensor, list[Tensor]]:
        strategy, stop_ids = Verified(3, threshold=0.2, masks=2), torch.tensor([-1])
        decoder = Decoder(
            model, strategy, mask_token_id=tiny.mask, stop_ids=stop_ids, batch=2, use_graph=False, **shape
        )
        logits = decoder.prefill(ids, real, chunk=chunk)
        return logits, [x[:, :, :-1] for pair in decoder.cache.layers.values() for x in pair]

    for lengths in ((23, 9), (23, 23)):
        ids, real = tiny.prompts(*lengths)
        if lengths[0] == lengths[1]:
            real = None
        for shape in ({"capacity": 40, "max_new_tokens": 17}, {"capacity": 24, "max_new_tokens": 1}):
            logits, buffers = prefill(1000, **shape)
            for columns in (1, 7, 22, 23, 24):
                again, found = prefill(2 * columns, **shape)
                assert_close(
                    *(x.view(2, 3, -1)[:, : shape["capacity"] - 22] for x in (again, logits))
                )  # rows with a slot
                assert_close(found, buffers)


def test_generate_takes_prompts_in_chunks(tiny: Any) -> None:
    model = tiny.model("mistral", sliding_window=4)
    ids, real = tiny.prompts(13, 6)
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options: dict[str, Any] = {"attention_mask": real, "max_new_tokens": 9, "strategy": Verified(3, threshold=0.2)}
    options["check_model"] = False  # which takes passes
    expected = mtpkern.generate(model, ids, **options)
    assert seen[0] == 13 + 6 + 2 * 2  # no row of padding
    seen.clear()
    assert torch.equal(mtpkern.generate(model, ids, **options, prefill_chunk=11), expected)
    assert seen[:3] == [5, 5 + 3, 2 * 5]  # the last three tokens of each, with two masks
    with pytest.raises(ValueError, match="prefill_chunk must be a whole number of at least 1, got 0"):
        mtpkern.generate(model, ids, **options, prefill_chunk=0)
