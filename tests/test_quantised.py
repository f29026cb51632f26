"""A gated adapter beside a quantised base: trained as beside its dequantised twin, and what cannot be gated refused.

The libraries that quantise are no requirement: where they are missing, a linear layer of int8 weights stands for them.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import mtpkern
from mtpkern.adapter import gate_of
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.lora import add_gated_lora
from mtpkern.train.trainer import MTPTrainer

EOS = 7


class Int8Linear(nn.Linear):
    """Weights in int8 with a scale for each row, as quanto's and others' weight-only layers."""

    def __init__(self, plain):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """No nn.Linear, and what it packs its weights into is no parameter: as hqq's and gptqmodel's layers."""

    SUPPORTS_TRAINING = True

    def __init__(self, plain):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        packed = Int8Linear(plain)
        self.register_buffer("qweight", packed.weight.data)
        self.register_buffer("scale", packed.scale)

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype))


def base(tiny):
    model = tiny.model("llama", vocab_size=41, eos_token_id=EOS)
    del model.config.mtpkern
    return model


def int8(model, method="int8", kind=Int8Linear):
    """The model with its linear layers but the head quantised, as from_pretrained would say it."""
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, kind(module))
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(
        is_trainable=True, is_compileable=False, quantization_config=SimpleNamespace(quant_method=method)
    )
    return model


def dequantised(model):
    """Its twin of plain float32 layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, Int8Linear):
            parent, _, child = name.rpartition(".")
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = module.weight.float() * module.scale
            setattr(model.model.get_submodule(parent), child, plain)
    model.is_quantized = False
    del model.hf_quantizer
    return model


def trained(model, out, **change):
    texts = [[1, 2, *range(10 + 5 * (i % 3), 22 + 5 * (i % 3)), EOS] for i in range(24)]
    data = [{"input_ids": ids, "prompt_length": 3} for ids in texts]
    options = {
        "gated": True,
        "lora_rank": 4,
        "k_max": 4,
        "num_spans": 4,
        "teacher_target": "hard",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }
    args = MTPConfig(str(out), **{**options, **change})
    run = GatedTrainer(model=model, args=args, train_dataset=data, data_collator=MTPCollator(0))
    run.train()
    run.save_model(str(out / "adapter"))
    return run, [x["loss"] for x in run.state.log_history if "loss" in x]


def weights(run):
    return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}


def test_trains_as_beside_the_dequantised_weights(tiny, tmp_path):
    model = int8(base(tiny))
    twin = dequantised(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    run, losses = trained(model, tmp_path / "int8")
    other, wanted = trained(copy.deepcopy(twin), tmp_path / "plain")
    assert losses == pytest.approx(wanted, abs=1e-5)
    got, want = weights(run), weights(other)
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-4)
    after = {name.replace("base_layer.", ""): x for name, x in model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    # For the weights as they were quantised, and for others of that vocabulary: nothing there can be compared.
    ids = torch.tensor([[1, 2, 10, 11]])
    for fresh in (int8(base(tiny)), twin):
        want = fresh.generate(ids, max_new_tokens=12, do_sample=False)
        loaded = mtpkern.load_adapter(fresh, tmp_path / "int8" / "adapter")
        assert mtpkern.generate(loaded, ids, max_new_tokens=12).equal(want)
    with pytest.raises(ValueError, match="41 tokens"):
        mtpkern.load_adapter(tiny.model("llama", vocab_size=43), tmp_path / "int8" / "adapter")


def of_bitsandbytes(bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # With a threshold outliers are looked for over all rows of a pass, and no row is by itself.
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8, llm_int8_threshold=0.0, load_in_4bit=bits == 4, bnb_4bit_compute_dtype="float32"
    )


def of_torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def of_quanto():
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def of_gptq():
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum.gptq")
    from transformers import GPTQConfig

    texts = torch.randint(1, 15, (16, 32), generator=torch.Generator().manual_seed(0))
    seen = [{"input_ids": [text.tolist()], "attention_mask": [[1] * 32]} for text in texts]
    # Its kernels in torch, which has them on every processor.
    return GPTQConfig(bits=8, group_size=32, dataset=seen, backend="torch")


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def by_hqq(folder):
    """Quantised by hqq itself: transformers 5 does not load such models."""
    quantize = pytest.importorskip("hqq.core.quantize")
    from hqq.models.hf.base import AutoHQQHFModel

    model, config = load(folder), quantize.BaseQuantizeConfig(nbits=8, group_size=32)
    return AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")


def by_transformers(config):
    return lambda folder: load(folder, quantization_config=config(), device_map={"": "cpu"})


# What loads the checkpoint of a folder quantised, or skips the test where a library is missing.
QUANTISED = {
    "bitsandbytes-8": by_transformers(lambda: of_bitsandbytes(8)),
    "bitsandbytes-4": by_transformers(lambda: of_bitsandbytes(4)),
    "torchao": by_transformers(of_torchao),
    "quanto": by_transformers(of_quanto),
    "gptq": by_transformers(of_gptq),
    "hqq": by_hqq,
}


@pytest.mark.parametrize(("threshold", "warned"), [(6.0, True), (0.0, False)])
def test_eight_bits_with_outliers_are_told(tiny, threshold, warned, recwarn):
    model = int8(tiny.model("llama"))
    model.hf_quantizer.quantization_config = SimpleNamespace(load_in_8bit=True, llm_int8_threshold=threshold)
    mtpkern.generate(model, tiny.prompts(4)[0], max_new_tokens=2)
    assert [w.filename == __file__ for w in recwarn if "llm_int8_threshold" in str(w.message)] == [True] * warned


def quantised_model(tiny, folder, library):
    tiny.model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return QUANTISED[library](folder)


@pytest.mark.parametrize("library", [*QUANTISED, "int8"])
def test_a_quantised_model_decodes_as_its_own_generate(tiny, tmp_path, library):
    """Without an adapter: in several tokens a pass the tokens that the quantised weights write one by one."""
    model = int8(tiny.model("llama")) if library == "int8" else quantised_model(tiny, tmp_path, library)
    ids, real = tiny.prompts(9, 4, 6)
    options = {"attention_mask": real, "max_new_tokens": 24}
    want = model.generate(ids, do_sample=False, suppress_tokens=[tiny.mask], **options)
    output = mtpkern.generate(
        model, ids, strategy=mtpkern.Verified(5, threshold=0.0), return_dict_in_generate=True, **options
    )
    assert output.sequences.equal(want)
    assert max(max(blocks) for blocks in output.blocks) > 1
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, real)]
    outputs = mtpkern.generate_batch(model, prompts, max_new_tokens=24, batch_size=2)
    assert [output.tokens for output in outputs] == want[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("library", QUANTISED)
def test_libraries(tiny, tmp_path, library):
    # Widths of whole blocks.
    model = tiny.model("llama", vocab_size=41, eos_token_id=EOS, hidden_size=64, intermediate_size=128, head_dim=16)
    del model.config.mtpkern
    model.save_pretrained(tmp_path / "base")

    def quantised():
        return QUANTISED[library](tmp_path / "base")

    run, losses = trained(quantised(), tmp_path / library)
    layer = run.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(getattr(layer, "weight", None)) is not nn.Parameter
    _, wanted = trained(load(tmp_path / "base"), tmp_path / "plain")
    assert losses[0] == pytest.approx(wanted[0], rel=0.1)
    assert losses[-1] < 0.8 * losses[0]
    assert all((x != 0).any() for name, x in weights(run).items() if "lora_B" in name)
    ids = torch.tensor([[1, 2, 10, 11]])
    want = quantised().generate(ids, max_new_tokens=12, do_sample=False)
    # Upon another, not yet run: on processors with AVX512-BF16 bitsandbytes 0.50.2 packs 4-bit weights in their first
    # pass, and state_dict(), which peft calls to load, unpacks them with their scales in another order.
    loaded = mtpkern.load_adapter(quantised(), tmp_path / library / "adapter")
    assert gate_of(loaded.get_base_model()) is not None
    assert mtpkern.generate(loaded, ids, max_new_tokens=12).equal(want)
    # Outside of mtpkern the base's own tokens too, through peft.
    assert loaded.generate(input_ids=ids, max_new_tokens=12, do_sample=False).equal(want)


@pytest.fixture
def of_gptqmodel(monkeypatch):
    """Packed layers are gptqmodel's to peft, whose layer for these knows no invocation tokens."""
    from peft.tuners.lora import model as dispatch
    from peft.tuners.lora.gptq import GPTQLoraLinear

    def gptq(target, adapter_name, config, **kwargs):
        packed = isinstance(target, PackedLinear)
        return GPTQLoraLinear(target, adapter_name, config=config, **kwargs) if packed else None

    monkeypatch.setattr(dispatch, "dispatch_gptq", gptq)


def test_layers_that_are_no_linear(tiny, tmp_path, of_gptqmodel):
    """All of them get an adapter, trained as beside int8, and outside of mtpkern it is closed there too."""
    run, losses = trained(int8(base(tiny), "gptq", PackedLinear), tmp_path / "packed")
    _, wanted = trained(int8(base(tiny)), tmp_path / "int8")
    assert losses == pytest.approx(wanted, abs=1e-5)
    kinds = [type(x).__name__ for x in run.model.modules() if hasattr(x, "lora_A")]
    assert kinds == ["GPTQLoraLinear"] * 14
    fresh = int8(base(tiny), "gptq", PackedLinear)
    ids, real = tiny.prompts(9, 4, 6)
    options = {"attention_mask": real, "max_new_tokens": 24}
    want = fresh.generate(ids, do_sample=False, **options)
    loaded = mtpkern.load_adapter(fresh, tmp_path / "packed" / "adapter")
    assert mtpkern.generate(loaded, ids, **options).equal(want)
    for model in (loaded, copy.deepcopy(loaded)):
        assert model.generate(input_ids=ids, do_sample=False, **options).equal(want)
    # A second one that mtpkern has not met has no gate: peft fails, and adapts no row behind its back.
    loaded.load_adapter(str(tmp_path / "packed" / "adapter"), "second")
    loaded.set_adapter("second")
    with pytest.raises(TypeError, match="alora_offsets"):
        loaded.generate(input_ids=ids, do_sample=False, **options)
    assert mtpkern.generate(loaded, ids, **options).equal(want)
    assert loaded.generate(input_ids=ids, do_sample=False, **options).equal(want)
    assert loaded.unload().generate(ids, do_sample=False, **options).equal(want)


def test_refuses_to_train_beside_kernels_without_backward(tiny, tmp_path, monkeypatch, of_gptqmodel):
    monkeypatch.setattr(PackedLinear, "SUPPORTS_TRAINING", False)
    with pytest.raises(ValueError, match=r"PackedLinear have no backward.*auto_trainable"):
        trained(int8(base(tiny), "gptq", PackedLinear), tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_refuses_layers_that_would_adapt_every_row(tiny, tmp_path, monkeypatch, known):
    """AWQ's of peft, of which its older versions do not know that they take no variant."""
    from peft.tuners.lora import model as dispatch
    from peft.tuners.lora.awq import AwqLoraLinear

    trained(base(tiny), tmp_path)

    def awq(target, adapter_name, config, **kwargs):
        return AwqLoraLinear(target, adapter_name, config=config, **kwargs) if isinstance(target, Int8Linear) else None

    monkeypatch.setattr(dispatch, "dispatch_awq", awq)
    if not known:
        monkeypatch.setattr(AwqLoraLinear, "resolve_lora_variant", lambda self, **kwargs: None)
    model = int8(base(tiny), "awq")
    ids = torch.tensor([[1, 2, 10]])
    before = model(ids).logits
    for give in (
        lambda: add_gated_lora(model, rank=4, k_max=4),
        lambda: mtpkern.load_adapter(model, tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match="cannot be gated, because"):
            give()
        assert gate_of(model) is None
        assert type(model.model.layers[0].mlp.up_proj) is Int8Linear
        assert torch.equal(model(ids).logits, before)


def test_refuses_a_quantised_head_and_an_ungated_run(tiny, tmp_path):
    for kind in (Int8Linear, PackedLinear):
        model = int8(base(tiny))
        model.lm_head = kind(model.lm_head)
        with pytest.raises(ValueError, match=f"{kind.__name__} is quantised"):
            add_gated_lora(model, rank=4, k_max=4)
    args = MTPConfig(str(tmp_path), lora_rank=4, k_max=4, use_cpu=True, teacher_target="gt")
    by_hqq_itself = base(tiny)
    by_hqq_itself.hqq_quantized = True
    for quantised in (int8(base(tiny)), by_hqq_itself):
        with pytest.raises(ValueError, match="gated=True"):
            MTPTrainer(model=quantised, mask_token_id=40, args=args, train_dataset=[], data_collator=MTPCollator(0))
