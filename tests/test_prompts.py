"""Padded prompts on a CPU, read without their padding: keys and logits are those of the model's own attention."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import mtpkern
from mtpkern import Static, Verified, prompts
from mtpkern.decoder import Decoder
from support.models import ARCHITECTURES


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TILE", 3)


@pytest.mark.parametrize("chunk", [8192, 21, 6])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_through_the_models_own_attention(
    name: str, chunk: int, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(name, **ARCHITECTURES[name])
    ids, real = tiny.prompts(4, 17, 8)  # a window of 5 hides a token from the last mask of the first

    def prefill() -> tuple[Tensor, list[Tensor], int]:
        strategy = Verified(3, threshold=0.2, masks=2)
        d = Decoder(
            model,
            strategy,
            mask_token_id=tiny.mask,
            stop_ids=torch.tensor([-1]),
            batch=3,
            capacity=32,
            max_new_tokens=9,
        )
        rows = 0

        def note(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal rows
            rows += kwargs["input_ids"].numel()

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        logits = d.prefill(ids, real, chunk=chunk)
        hook.remove()
        return logits, [x[:, :, :-1] for pair in d.cache.layers.values() for x in pair], rows

    logits, keys, rows = prefill()
    assert rows == 4 + 17 + 8 + 3 * 2
    monkeypatch.setattr(prompts, "is_tested", lambda model: False)
    theirs, their_keys, their_rows = prefill()
    assert their_rows == 3 * (17 + 2)
    assert_close(logits, theirs)
    assert len(keys) == len(their_keys) > 0
    assert_close(keys, their_keys)


def test_prompts_of_almost_one_length_stay_as_they_are(tiny: SimpleNamespace, model: Any) -> None:
    ids, real = tiny.prompts(16, 15, 16)
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    mtpkern.generate(model, ids, attention_mask=real, max_new_tokens=6, strategy=Static(1), check_model=False)
    assert seen[0] == (3, 16)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_columns_of_padding_alone_are_not_run(
    name: str, packed: bool, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of all prompts, by a tokenizer that pads to a multiple, say."""
    model = tiny.model(name, **ARCHITECTURES[name])
    ids, real = tiny.prompts(9, 12)
    options: dict[str, Any] = {"max_new_tokens": 8, "strategy": Verified(3, 0.1), "check_model": False}
    if not packed:
        monkeypatch.setattr(prompts, "is_tested", lambda model: False)
    want = mtpkern.generate(model, ids, attention_mask=real, **options)[:, 12:]
    ids, real = (torch.cat([x.new_zeros(2, 3), x], dim=1) for x in (ids, real))
    rows: list[int] = []
    with model.register_forward_pre_hook(
        lambda _, args, given: rows.append(given["input_ids"].shape[1]), with_kwargs=True
    ):
        got = mtpkern.generate(model, ids, attention_mask=real, **options)[:, 15:]
        chunks = mtpkern.generate(model, ids, attention_mask=real, prefill_chunk=10, **options)[:, 15:]
    assert rows[0] == (21 + 2 * 2 if packed else 12 + 2)
    assert got.equal(want)
    assert chunks.equal(want)


def test_a_layer_that_attends_twice_is_refused(tiny: SimpleNamespace, model: Any) -> None:
    layer = model.model.layers[1].self_attn
    once = layer.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        once(*args, **kwargs)
        return once(*args, **kwargs)

    layer.forward = twice
    ids, real = tiny.prompts(4, 7)
    with pytest.raises(ValueError, match="layer 1 calls attention more than once"):
        mtpkern.generate(model, ids, attention_mask=real, max_new_tokens=6, check_model=False)


def test_a_layer_that_does_not_attend_is_refused(tiny: SimpleNamespace, model: Any) -> None:
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    ids, real = tiny.prompts(4, 7)
    with pytest.raises(ValueError, match="of 2 layers, 1 cached keys and values"):
        mtpkern.generate(model, ids, attention_mask=real, max_new_tokens=6, check_model=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_processors_without_16_bit_products_attend_in_float32(
    dtype: torch.dtype, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return attend(query, *args, **kwargs)

    monkeypatch.setattr("mtpkern.kernels.form.has_products", lambda dtype: False)
    monkeypatch.setattr(prompts.F, "scaled_dot_product_attention", note)
    ids, real = tiny.prompts(4, 7)
    model = tiny.model("llama").to(dtype)
    mtpkern.generate(model, ids, attention_mask=real, max_new_tokens=2, check_model=False, strategy=Static(1))
    assert seen[:2] == [torch.float32] * 2


def test_logits_do_not_depend_on_neighbours(tiny: SimpleNamespace) -> None:
    """But for rounding, as matrix products have other shapes."""
    model, (ids, real) = tiny.model("qwen3"), tiny.prompts(9, 5, 2)
    options: dict[str, Any] = {"max_new_tokens": 4, "return_logprobs": True, "return_dict_in_generate": True}
    whole = mtpkern.generate(model, ids, attention_mask=real, **options)
    for i, n in enumerate((9, 5, 2)):
        alone = mtpkern.generate(model, ids[i : i + 1, -n:], **options)
        assert_close(whole.logprobs[i], alone.logprobs[0])
