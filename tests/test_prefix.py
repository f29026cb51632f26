"""What is kept of prefixes: the same bits as computed anew, no text run twice, no byte over the budget."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from mtpkern.attention import exclusive
from mtpkern.train.collator import MTPCollator
from mtpkern.train.layout import build_layout, pack
from mtpkern.train.prefix import Packing, Prefixes, Text, texts_of

LENGTHS = [9, 6, 7]


@pytest.fixture(scope="module")
def model():
    """With windows, and a head of another width than its share of the hidden size."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.3}
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=61, **shape, **heads, **window)).eval()


@pytest.fixture
def passes(model):
    """The ids of every pass of the model."""
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


def batch(*rows):
    """Tokens, layout and named texts of some of three texts."""
    torch.manual_seed(2)
    texts = [torch.randint(1, 61, (n,)).tolist() for n in LENGTHS]
    found = MTPCollator(0)([{"input_ids": texts[i], "prompt_length": 1} for i in rows])
    prefix = torch.tensor([[2, 4]]).expand(len(rows), -1)
    layout = build_layout(prefix, torch.tensor(found["lengths"]), 3, num_tokens=found["input_ids"].shape[1])
    return found["input_ids"], layout, found["digests"]


def of(prefixes, model, tokens, layout, names):
    with exclusive(model):
        layers, states = prefixes.of(model, tokens, texts_of(layout, tokens.shape[1], names))
    return [x for pair in layers.values() for x in pair] + ([] if states is None else [states])


def test_kept_is_bit_equal_and_only_new_texts_run(model, passes):
    fresh = [of(Prefixes(states=True), model, *batch(*rows)) for rows in ((0, 1), (1, 2), (2, 0))]
    prefixes = Prefixes(2**30, states=True)
    passes.clear()
    for want, rows, new in zip(fresh, ((0, 1), (1, 2), (2, 0)), ([9, 6], [7], [])):
        got = of(prefixes, model, *batch(*rows))
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert [len(ids[0]) for ids in passes] == new
        passes.clear()


def test_equals_the_models_own_keys(model):
    """Also where new texts share a row, as on a GPU."""
    tokens, layout, names = batch(0, 1, 2)
    got = of(Prefixes(), model, tokens, layout, names)
    texts = texts_of(layout, tokens.shape[1])
    with exclusive(model):
        together = Prefixes()._run(model, tokens, Packing.of(texts, *tokens.shape))[0].split(LENGTHS)
    for b, n in enumerate(LENGTHS):
        cache = model(tokens[b : b + 1, :n], past_key_values=DynamicCache()).past_key_values
        want = [x[0, :, :n] for layer in cache.layers for x in (layer.keys, layer.values)]
        whole = torch.cat([x.transpose(0, 1).flatten(1) for x in want], dim=1)
        torch.testing.assert_close(together[b][:, : whole.shape[1]], whole)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x[b, :, :n], y)


def test_packed_texts_are_those_of_the_padded(model):
    tokens, layout, names = batch(0, 1, 2)
    prefixes = Prefixes(2**30)
    padded = of(prefixes, model, tokens, layout, names)
    packed, (row,) = pack(layout, tokens)
    assert texts_of(packed, row.shape[1]) == [Text(0, 0, 9), Text(0, 9, 15), Text(0, 15, 22)]
    for x, y in zip(of(Prefixes(), model, row, packed, names), padded, strict=True):
        assert torch.equal(x[0], torch.cat([y[b, :, :n] for b, n in enumerate(LENGTHS)], dim=1))


def test_a_packing_of_more_rows_is_laid_out_the_same(model):
    """As a captured step takes it: the host says nothing but where tokens stand, in tensors of a given size."""
    tokens, layout, names = batch(2, 0, 1)
    want = of(Prefixes(states=True), model, tokens, layout, names)
    texts = texts_of(layout, tokens.shape[1])
    packing = Packing.of(texts, *tokens.shape, rows=29)
    assert packing.position.shape == (1, 29)
    with exclusive(model):
        layers, states = Prefixes(states=True).of(model, tokens, packing)
    got = [*(x.transpose(1, 2) for pair in layers.values() for x in pair), states]
    want = [*(x.transpose(1, 2) for x in want[:-1]), want[-1]]
    for text in texts:
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x[text.row, : len(text)], y[text.row, : len(text)])


def test_first_come_first_kept_within_the_budget(model, passes):
    everything = Prefixes(2**30)
    of(everything, model, *batch(0, 1, 2))
    token = everything.bytes // sum(LENGTHS)
    assert token == 3 * 2 * 2 * 12 * 4  # layers, keys and values, heads, D, bytes
    prefixes = Prefixes(token * (LENGTHS[0] + LENGTHS[1]))
    for _ in range(2):
        passes.clear()
        of(prefixes, model, *batch(0, 2, 1))
        assert prefixes.bytes <= prefixes.max_bytes
    # The second did not fit behind the first, the third did.
    assert len(prefixes) == 2
    assert [len(ids[0]) for ids in passes] == [LENGTHS[2]]


def test_a_text_that_comes_twice_runs_once_and_a_longer_cut_is_another(model, passes):
    prefixes = Prefixes(2**30)
    of(prefixes, model, *batch(0, 0))
    assert len(passes) == 1
    tokens, layout, names = batch(0)
    cut = build_layout(layout.prefix, torch.tensor([6]), 3, num_tokens=6)
    got = of(prefixes, model, tokens[:, :6], cut, names)
    assert len(passes) == 2
    assert all(torch.equal(x, y) for x, y in zip(got, of(Prefixes(), model, tokens[:, :6], cut, names), strict=True))


def test_attends_in_autocasts_dtype(model):
    with torch.autocast("cpu", torch.bfloat16):
        got = of(Prefixes(2**30), model, *batch(0, 1))
    assert {x.dtype for x in got} == {torch.bfloat16}


def test_a_packed_pass_is_as_many_operations_whatever_the_texts(model):
    """No copy a text, neither into the row nor out of it."""

    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for rows in ((0,), (0, 1, 2), (0, 1, 2, 0, 1, 2)):
        tokens, layout, _ = batch(*rows)
        packing = Packing.of(texts_of(layout, tokens.shape[1]), *tokens.shape)
        with exclusive(model), Counting() as counting:
            Prefixes(states=True).of(model, tokens, packing)
        counts.append(counting.seen)
    assert counts[1] == counts[2]
