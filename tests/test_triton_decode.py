"""Whole generations with the Triton kernels in the loop, against the same in torch."""

from types import SimpleNamespace

import pytest
import torch

import mtpkern
from mtpkern import cache, decoder
from mtpkern.kernels.advance import advance_triton
from mtpkern.kernels.decode_attention import decode_attention_triton
from mtpkern.kernels.kv_write import kv_write_triton
from mtpkern.kernels.readout import readout_triton

STRATEGIES = [mtpkern.Verified(3, threshold=0.2), mtpkern.ConfAdapt(3, threshold=0.2), mtpkern.Static(2)]
MODELS = {
    "llama": {},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.kernel
@pytest.mark.parametrize("form", [decode_attention_triton])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_the_kernels_in_the_loop(
    form: object, strategy: object, name: str, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(name, **MODELS[name])
    input_ids, attention_mask = tiny.prompts(3, 7)

    def run() -> object:
        return mtpkern.generate(
            model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            strategy=strategy,
            rows=2 * strategy.k + 1,  # fewer than both can use: the budget is dealt out
            max_new_tokens=9,
            eos_token_id=2,
            return_dict_in_generate=True,
        )

    expected = run()
    launched = []

    def counted(kernel: object) -> object:
        def launch(*args: object, **options: object) -> object:
            launched.append(kernel)
            options.pop("memo", None)  # of the torch form
            return kernel(*args, **options)

        return launch

    monkeypatch.setattr(cache, "kv_write", counted(kv_write_triton))
    monkeypatch.setattr(cache, "decode_attention", counted(form))
    monkeypatch.setattr(decoder, "readout", counted(readout_triton))
    monkeypatch.setattr(decoder, "advance", counted(advance_triton))
    got = run()
    assert torch.equal(got.sequences, expected.sequences)
    assert got.blocks == expected.blocks
    assert got.finish_reasons == expected.finish_reasons
    assert {kv_write_triton, form, readout_triton, advance_triton} == set(launched)
