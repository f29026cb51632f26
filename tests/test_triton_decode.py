"""Whole generations with the Triton kernels in the loop, against the same in torch; what a step launches."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mtpkern
from mtpkern import cache, decoder
from mtpkern.attention import attention_context
from mtpkern.kernels.advance import advance_triton
from mtpkern.kernels.decode_attention import decode_attention_triton
from mtpkern.kernels.kv_write import kv_write_triton
from mtpkern.kernels.readout import readout_triton
from support.slow import slow_but

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS = 14  # which some of the sequences reach
STRATEGIES = [
    *(mtpkern.Verified(3, threshold=0.2), mtpkern.ConfAdapt(3, threshold=0.2), mtpkern.Static(2)),
    mtpkern.Verified(3, threshold=0.0, masks=3),
]
MODELS = {
    "llama": {},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}
KERNELS = {
    (cache, "kv_write"): kv_write_triton,
    (cache, "decode_attention"): decode_attention_triton,
    (decoder, "readout"): readout_triton,
    (decoder, "advance"): advance_triton,
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that have been launched, as they come."""
    from mtpkern.kernels.readout import _chunk_kernel

    names: list[str] = []
    run_class = type(_chunk_kernel)  # of the interpreter, or of the compiler where there is a GPU
    run = run_class.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        names.append(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return run(self, *args, **options)

    monkeypatch.setattr(run_class, "run", noted)
    return names


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts the kernels into decoding, in place of the torch forms."""

    def put() -> None:
        for (module, name), kernel in KERNELS.items():
            monkeypatch.setattr(module, name, kernel)

    return put


@pytest.mark.parametrize(
    ("name", "strategy"),
    slow_but(
        [
            *((name, strategy) for name in MODELS for strategy in STRATEGIES[:2]),
            *(("llama", STRATEGIES[2]), ("gemma3_text", STRATEGIES[3])),
        ],
        *(("llama", STRATEGIES[1]), ("gemma3_text", STRATEGIES[0]), ("gemma3_text", STRATEGIES[3])),
        interpreted=True,
    ),
    ids=str,
)
def test_generation_with_the_kernels_in_the_loop(
    strategy: Any, name: str, tiny: SimpleNamespace, launched: list[str], in_triton: Callable[[], None]
) -> None:
    model = tiny.model(name, **MODELS[name])
    input_ids, attention_mask = tiny.prompts(3, 7, 1)

    def run(device: str) -> Any:
        return mtpkern.generate(
            model.to(device),
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            strategy=strategy,
            rows=3 * (strategy.k + strategy.masks) + 1,  # fewer than all can use: the budget is dealt out
            max_new_tokens=9,
            eos_token_id=EOS,
            return_dict_in_generate=True,
        )

    expected = run("cpu")
    assert set(expected.finish_reasons) == {"stop", "length"}
    launched.clear()
    in_triton()
    got = run(DEVICE)
    assert torch.equal(got.sequences.cpu(), expected.sequences)
    assert got.blocks == expected.blocks
    assert got.finish_reasons == expected.finish_reasons
    assert {kernel.partition(".")[0] for kernel in launched} == {"kv_write", "decode_attention", "readout", "advance"}


@pytest.mark.parametrize(("capacity", "attention"), [(32, 1), (128, 2)], ids=["one split", "splits"])
def test_launches_of_a_step(
    capacity: int, attention: int, tiny: SimpleNamespace, launched: list[str], in_triton: Callable[[], None]
) -> None:
    """One or two a layer, three a step: in a CUDA graph each takes about two microseconds."""
    model = tiny.model("llama").to(DEVICE)
    in_triton()
    runner = decoder.Decoder(
        model,
        STRATEGIES[0],
        mask_token_id=tiny.mask,
        stop_ids=torch.tensor([EOS]),
        batch=1,
        capacity=capacity,
        max_new_tokens=9,
    )
    runner.prefill(tiny.prompts(5)[0].to(DEVICE))
    launched.clear()
    with attention_context(model, runner.cache) as route:
        runner.step(route)
    layer = ["decode_attention._attend_kernel", "decode_attention._merge_kernel"]
    step = ["readout._chunk_kernel", "readout._merge_kernel", "advance._advance_kernel"]
    assert launched == layer[:attention] * model.config.num_hidden_layers + step
