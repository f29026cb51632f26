"""Keys and values take what the texts need, and what cannot fit is refused before anything is allocated."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtpkern
import mtpkern.decoder
import mtpkern.memory
from mtpkern import Static, Verified
from mtpkern.cache import KVCache
from mtpkern.memory import available_memory, fits_at_once, kv_bytes, require_room

MILLION = 10**6


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots of each KV cache at the end of its growth, one entry a change."""
    sizes: list[int] = []
    fill, reserve = KVCache.fill, KVCache.reserve

    def noted(call: Callable[..., None]) -> Callable[..., None]:
        def note(self: KVCache, *args: Any) -> None:
            call(self, *args)
            if not sizes or sizes[-1] != self.held:
                sizes.append(self.held)

        return note

    monkeypatch.setattr(KVCache, "fill", noted(fill))
    monkeypatch.setattr(KVCache, "reserve", noted(reserve))
    return sizes


def test_a_million_tokens_are_not_allocated_for_an_answer_of_ten(tiny: Any, held: list[int]) -> None:
    model = tiny.model("llama", max_position_embeddings=2 * MILLION)
    ids, real = tiny.prompts(9, 4)
    options: dict[str, Any] = {"attention_mask": real, "strategy": Static(3)}
    stops = mtpkern.generate(model, ids, **options, max_new_tokens=10)[:, -1].tolist()
    options |= {"eos_token_id": stops, "pad_token_id": 0}
    expected = mtpkern.generate(model, ids, **options, max_new_tokens=10)
    held.clear()
    assert mtpkern.generate(model, ids, **options, max_new_tokens=MILLION).equal(expected)
    # The capacity is a multiple of 16, from which the room for new tokens is counted.
    assert len(held) == 1
    assert 9 + mtpkern.decoder.FIRST_SLOTS <= held[0] <= 9 + mtpkern.decoder.FIRST_SLOTS + 2 * 3 + 16


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("strategy", [Static(3), Verified(3, threshold=0.2, masks=1)], ids=str)
def test_growing_buffers_change_no_bit(
    strategy: Any, compile: bool, tiny: Any, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of no logit, on the way over several sizes; with `compile` the host asks how far the texts are."""
    model = tiny.model("llama")
    # What `compile` changes in a run is how room is made; the compiler itself is no part of this.
    monkeypatch.setattr(mtpkern.decoder, "CompiledLayers", lambda model: nullcontext)
    seen: list[Tensor] = []
    readout = mtpkern.decoder.readout
    monkeypatch.setattr(mtpkern.decoder, "readout", lambda z, *a: (seen.append(z.clone()), readout(z, *a))[1])
    ids, real = tiny.prompts(9, 4, 6)

    def run(first: int) -> tuple[Tensor, list[Tensor]]:
        monkeypatch.setattr(mtpkern.decoder, "FIRST_SLOTS", first)
        seen.clear()
        held.clear()
        output = mtpkern.generate(
            model, ids, attention_mask=real, strategy=strategy, max_new_tokens=70, compile=compile
        )
        return output, list(seen)

    output, logits = run(512)
    assert len(held) == 1
    again, found = run(1)
    assert len(held) > 3
    assert again.equal(output)
    assert len(found) == len(logits)
    if not compile:  # else attention has looked at slots more, all of them unused
        assert all(a.equal(b) for a, b in zip(found, logits))


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("gemma3_text", {"head_dim": 16}), ("qwen2", {"num_key_value_heads": 4})],
)
def test_the_estimate_is_what_is_allocated(model_type: str, settings: dict[str, Any], tiny: Any) -> None:
    model = tiny.model(model_type, **settings)
    decoder = mtpkern.decoder.Decoder(
        model,
        Static(1),
        mask_token_id=tiny.mask,
        stop_ids=torch.tensor([-1]),
        batch=3,
        capacity=37,
        max_new_tokens=10,
        use_graph=False,
    )
    decoder.prefill(*tiny.prompts(9, 4, 6))
    assert kv_bytes(model, 3, 37) == decoder.cache.nbytes
    vars(model.config)["num_key_value_heads"] = [2, 2]
    assert kv_bytes(model, 3, 37) is None


def test_what_cannot_fit_is_refused_with_its_size(tiny: Any, monkeypatch: pytest.MonkeyPatch, held: list[int]) -> None:
    model = tiny.model("llama")
    ids, _ = tiny.prompts(9, 9)
    monkeypatch.setattr(mtpkern.memory, "available_memory", lambda device: 10**8)
    needed = 2 * (MILLION + 10) * 2 * 2 * 16 * 4
    with pytest.raises(
        ValueError, match=rf"2 sequences of 1,000,009 tokens would take {needed:,} bytes, and 100,000,000"
    ):
        mtpkern.generate(model, ids, max_new_tokens=MILLION)
    assert not held
    mtpkern.generate(model, ids, max_new_tokens=3)
    # What earlier calls have kept can be dropped; where nobody knows, nobody refuses.
    require_room(model, 2, MILLION, kept=10**9)
    monkeypatch.setattr(mtpkern.memory, "available_memory", lambda device: None)
    require_room(model, 2, 10**12)


def test_a_graph_gets_a_bounded_share_which_is_announced(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr(mtpkern.memory, "available_memory", lambda device: 2 * kv_bytes(model, 2, 4096))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fits_at_once(model, 2, 4096)
    with pytest.warns(RuntimeWarning, match="more than 50% of the .* made as the texts grow"):
        assert not fits_at_once(model, 2, 4097)


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not say what memory is available")
    assert free > 0
    monkeypatch.setattr(mtpkern.memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert available_memory(torch.device("cpu")) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = available_memory(torch.device("cpu"))
    assert unlimited is not None
    assert unlimited > 3000


def test_attention_looks_at_slots_of_sequences_that_run(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer of two texts ends first; behind it the slots are those of the shorter one."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(200, 4)
    plain = mtpkern.generate(model, ids, attention_mask=mask, strategy=Static(1), max_new_tokens=24)[:, ids.shape[1] :]
    stop = next(int(x) for x in plain[0] if x not in plain[1])
    slots: list[int] = []
    attend = KVCache.attend

    def noted(self: KVCache, *args: Any) -> Tensor:
        slots.append(self.slots)
        return attend(self, *args)

    monkeypatch.setattr(KVCache, "attend", noted)
    options = {"attention_mask": mask, "eos_token_id": stop, "max_new_tokens": 24}
    found = mtpkern.generate(model, ids, strategy=Static(1), **options)
    assert found[1, ids.shape[1] :].tolist() == plain[1].tolist()
    assert slots[-1] < 64
