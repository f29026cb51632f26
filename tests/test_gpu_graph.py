"""The captured step on a GPU, for real."""

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mtpkern
from mtpkern import Static, Verified, pool
from mtpkern.attention import attention_context
from mtpkern.decoder import Decoder
from mtpkern.pool import release_graphs
from mtpkern.prompt_rows import Reads
from mtpkern.strategies import Strategy
from support.batches import mixed_prompts
from support.recording import STRATEGIES, assert_same, generate, kept, poison

# On a GPU, for real.

SETTINGS = {
    "llama": {},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}


LENGTHS = {1: (9,), 5: (9, 4, 12, 1, 7)}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("model_name", SETTINGS)
def test_graph_equals_no_graph(
    model_name: str, name: str, batch: int, captures: list[Any], tiny: SimpleNamespace
) -> None:
    model = tiny.model(model_name, **SETTINGS[model_name]).cuda()
    for seed in range(4):
        options: dict[str, Any] = {"strategy": STRATEGIES[name][seed % 2], "seed": seed, "max_new_tokens": 40}
        options["eos_token_id"] = [None, 3][seed // 2]
        expected = generate(tiny, model, *LENGTHS[batch], use_graph=False, **options)
        assert_same(generate(tiny, model, *LENGTHS[batch], **options), expected)
        for decoder in kept(model):
            poison(decoder)
    assert len(captures) == 1


@pytest.mark.gpu
def test_no_token_depends_on_the_form_of_the_run(captures: list[Any], tiny: SimpleNamespace) -> None:
    """Chunks, compilation and the batch-invariant splits, in the graph, against the plain run."""
    model = tiny.model("llama").cuda()
    expected = generate(tiny, model, 30, 17, 5, use_graph=False, max_new_tokens=40)
    for options in ({"prefill_chunk": 21}, {"compile": True}, {"batch_invariant": True}, {"rows": 36}):
        for _ in range(2):
            assert_same(generate(tiny, model, 30, 17, 5, max_new_tokens=40, **options), expected)
    assert len(captures) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("batch", LENGTHS)
def test_a_generation_waits_for_nothing(batch: int, captures: list[Any], tiny: SimpleNamespace) -> None:
    """Prefill without padding and all passes, warm: nothing but the event of the poll, which torch does not count."""
    model = tiny.model("llama").to("cuda", torch.bfloat16)
    stop_ids = torch.tensor([-1])
    ids = tiny.prompts(*[9] * batch)[0].cuda()
    decoder = Decoder(
        model, Verified(3), mask_token_id=tiny.mask, stop_ids=stop_ids, batch=batch, capacity=64, max_new_tokens=40
    )
    for run in range(3):
        decoder.restart(Verified(3), stop_ids, 40)
        torch.cuda.set_sync_debug_mode("error" if run else "default")
        try:
            decoder.prefill(ids)
            with attention_context(model, decoder.cache) as route:
                decoder.run(route)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(captures) == 1
    assert bool((decoder.sequences.passes > 1).all())


@pytest.mark.gpu
def test_what_waits_around_a_generation(captures: list[Any], tiny: SimpleNamespace) -> None:
    """Of ours: both prompts and mask to the host, the stop tokens to the device, the results and their record back."""
    model = tiny.model("llama").cuda()
    generate(tiny, model, 9, 4, eos_token_id=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            generate(tiny, model, 9, 4, eos_token_id=3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in said if "synchronizing" in str(w.message)]
    ours = [place for place in waits if "/mtpkern/" in place and "/tests/" not in place]  # a clone has any name
    assert len(ours) <= 5, ours


@pytest.mark.gpu
def test_passes_that_read_prompts(captures: list[Any], tiny: SimpleNamespace) -> None:
    """Prompts of a pass and of several, some that begin alike, beside others that run."""
    model = tiny.model("llama").cuda()
    prompts, new = mixed_prompts(24)
    prompts[5] = [1 + i % 14 for i in range(300)]
    options: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": 3, "batch_size": 3, "check_model": False}
    expected = mtpkern.generate_batch(model, prompts, use_graph=False, **options)
    for _ in range(3):
        outputs = mtpkern.generate_batch(model, prompts, **options)
        assert [output.tokens for output in outputs] == [output.tokens for output in expected]
        for decoder in kept(model):
            decoder.reading_cost.apart = 1e3
    assert decoder.graph is not None
    assert Reads(len(decoder.all_rows.seq)) in decoder.graph.captured


@pytest.mark.gpu
def test_two_models_take_turns(captures: list[Any], tiny: SimpleNamespace) -> None:
    models = [tiny.model("llama", seed=seed).cuda() for seed in range(2)]
    for seed in range(3):
        expected = [generate(tiny, model, 9, 4, seed=seed, use_graph=False) for model in models]
        for model, result in zip(models, expected):
            assert_same(generate(tiny, model, 9, 4, seed=seed), result)
    assert len(captures) == 2


@pytest.mark.gpu
def test_a_graph_outlives_the_others(captures: list[Any], tiny: SimpleNamespace) -> None:
    """Neither graphs that go nor whoever clears cuBLAS' workspaces, as torch.compile does, take memory from under it.

    Wide enough, in bfloat16 and with few rows, for products that need a workspace.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_hidden_layers": 1}
    model, other = (tiny.model("llama", seed=seed, **sizes).to("cuda", torch.bfloat16) for seed in range(2))
    expected = [generate(tiny, model, 9, 4) for _ in range(2)][1]  # all replays
    for strategy in (Static(1), Static(2)):
        generate(tiny, model, 9, 4, strategy=strategy)
    generate(tiny, other, 9, 4)
    assert len(captures) == 4

    captures.clear()
    release_graphs(other)
    for key in list(pool._kept[model])[1:]:
        del pool._kept[model][key]
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    elsewhere = [torch.ones(1 << 22, device="cuda") for _ in range(64)]  # takes the place of what is free now
    assert_same(generate(tiny, model, 9, 4), expected)
    assert not captures
    assert all(bool((x == 1).all()) for x in elsewhere)


@pytest.mark.gpu
def test_a_model_that_waits_is_not_captured(tiny: SimpleNamespace) -> None:
    """The capture fails, which is announced, and leaves nothing broken behind."""
    model, other = tiny.model("llama").cuda(), tiny.model("llama", seed=3).cuda()
    expected, others = (generate(tiny, x, 9, 4, use_graph=False) for x in (model, other))
    assert_same(generate(tiny, other, 9, 4), others)
    (before,) = kept(other)
    assert before.graph is not None
    assert before.graph.captured
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: float(out[0].sum()) and None)
    with pytest.warns(RuntimeWarning, match="could not be captured in a CUDA graph"):
        assert_same(generate(tiny, model, 9, 4), expected)
    assert_same(generate(tiny, model, 9, 4), expected)
    # A graph from before is replayed, random numbers can be drawn, and captures go on, in the pool of the other, too.
    assert_same(generate(tiny, other, 9, 4), others)
    assert kept(other) == [before]
    assert float(torch.rand(8, device="cuda").sum()) > 0
    for strategy in (Static(2), Static(3)):
        generate(tiny, other, 9, 4, strategy=strategy)
        assert kept(other)[-1].graph.captured
    hook.remove()
    assert_same(generate(tiny, model, 9, 4), expected)
    assert kept(model)[-1].graph.captured
    torch.cuda.synchronize()
    release_graphs()


@pytest.mark.gpu
def test_memory_does_not_grow(captures: list[Any], tiny: SimpleNamespace) -> None:
    model = tiny.model("llama").cuda()
    held = []
    for call in range(50):
        generate(
            tiny, model, 9 + call % 5, 4, seed=call, max_new_tokens=20, strategy=(Verified(3), Static(1))[call % 2]
        )
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(captures) == 2
    assert held[-1] == held[9]
    release_graphs(model)
    gc.collect()
    assert torch.cuda.memory_allocated() < held[-1]


@pytest.mark.gpu
@pytest.mark.slow("graph::test_replays_give_the_tokens_of_fresh_runs")
def test_soak(captures: list[Any], tiny: SimpleNamespace) -> None:
    """A hundred thousand passes of two graphs that share a pool, always the same tokens, no memory: about a minute."""
    model = tiny.model("llama").cuda()
    ids, mask = (x.cuda() for x in tiny.prompts(9, 4, 12, 1, 7))
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 100, "return_dict_in_generate": True}
    first: dict[Strategy, Any] = {}
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    steps = runs = 0
    while steps < 100_000:
        for strategy in (Static(1), Verified(3, threshold=0.2)):
            result = mtpkern.generate(model, ids, strategy=strategy, **options)
            before = first.setdefault(strategy, result)
            differences += (result.sequences != before.sequences).any()
            assert result.blocks == before.blocks
            steps += max(result.passes)
        runs += 1
        if runs == 5:
            allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert not differences
    assert len(captures) == 2
    assert torch.cuda.memory_allocated() <= allocated + 4096
    assert torch.cuda.memory_reserved() == reserved
