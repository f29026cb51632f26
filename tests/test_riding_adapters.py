"""Adapters that ride behind the base's weights: one at a time, the active one, and each is what it was."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mtpkern
from mtpkern import Static
from mtpkern.adapter import save_adapter
from mtpkern.kernels import gated_lora as kernels
from support.recording import RecordedStep
from support.riding import Ops, generate, joined

pytestmark = pytest.mark.usefixtures("joins")


def riders(model: Any, name: str = "default") -> list[nn.Linear]:
    """Every A of an adapter."""
    return [layer.lora_A[name] for layer in model.mtpkern_siblings.layers if name in layer.lora_A]


@pytest.fixture
def folders(tiny: SimpleNamespace, tmp_path: Any) -> list[str]:
    """Three adapters of one base, of which the last changes fewer layers."""
    for i, targets in enumerate(("all-linear", "all-linear", "q_proj,v_proj,down_proj")):
        model = tiny.adapted(tiny.model("llama"), targets, seed=i)
        with torch.no_grad():
            model.mask_row.normal_(0, 1, generator=torch.Generator().manual_seed(i))
        save_adapter(model, tmp_path / str(i))
    return [str(tmp_path / str(i)) for i in range(3)]


def test_switched_deleted_loaded_again_and_unloaded(
    folders: list[str], tiny: SimpleNamespace, joins: list[bool], ops: Ops
) -> None:
    """Each time the active one rides, and says what it says upon a base of its own."""

    def base() -> Any:
        model = tiny.model("llama")
        del model.config.mtpkern
        return model

    joins[0] = False
    alone = [generate(tiny, mtpkern.load_adapter(base(), folder)) for folder in folders]
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])
    joins[0] = True
    # q and v run apart where k between them is another adapter's.
    layer = [[3, 1, 2, 1], [3, 1, 2, 1], [1, 1, 1]]

    def assert_rides(i: int) -> None:
        ops.clear()
        assert torch.equal(generate(tiny, model), alone[i])
        assert ops.new()[-2 * len(layer[i]) :] == [("gated_expand", n) for n in layer[i]] * 2

    model = mtpkern.load_adapter(base(), folders[0])
    held = sum(x.nbytes for x in model.parameters())
    assert_rides(0)
    assert memory(model) == held
    for i, name in enumerate(("second", "third"), 1):
        model.load_adapter(folders[i], name)
    for name, i in (("default", 0), ("second", 1), ("third", 2), ("second", 1), ("default", 0)):
        model.set_adapter(name)
        assert_rides(i)
        assert memory(model) == sum(x.nbytes for x in model.parameters())
    model.delete_adapter("default")
    model.set_adapter("second")
    assert_rides(1)
    model.load_adapter(folders[2], "default")
    model.set_adapter("default")
    assert_rides(2)
    model.load_adapter(folders[0], "second")  # over the one that rode before
    model.set_adapter("second")
    assert_rides(0)
    plain = model.unload()
    ids, mask = tiny.prompts(9, 4)
    original = base().generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    ops.clear()
    assert torch.equal(generate(tiny, plain, strategy=Static(1)), original)
    model = mtpkern.load_adapter(plain, folders[1])
    assert not ops
    assert_rides(1)
    mtpkern.release_graphs(model)
    assert memory(model) == sum(x.nbytes for x in model.parameters()) == held
    assert len(places(model)) == len(list(model.parameters()))
    assert_rides(1)


def places(model: nn.Module) -> dict[int, int]:
    """Bytes of all memory that parameters hold, by address."""
    found = (p.untyped_storage() for p in model.parameters())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def memory(model: nn.Module) -> int:
    return sum(places(model).values())


def test_saved_copied_and_given_memory_of_its_own_again(
    folders: list[str], tiny: SimpleNamespace, tmp_path: Any
) -> None:
    """The same bytes of the adapter's files and the model's, by our means and by peft's."""
    base = tiny.model("llama")
    del base.config.mtpkern
    model = mtpkern.load_adapter(base, folders[0])
    expected = generate(tiny, model.get_base_model())
    joined(tiny, model.get_base_model())
    # Of a layer q, k, v lie together, o, gate and up, down, each with its A.
    assert len(places(model)) == len(list(model.parameters())) - 2 * (5 + 1 + 3 + 1)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "peft")
    for folder in ("ours", "peft"):
        saved, were = (load_file(f"{at}/adapter_model.safetensors") for at in (tmp_path / folder, folders[0]))
        assert saved.keys() == were.keys()
        assert all(torch.equal(x, were[name]) for name, x in saved.items())
    size = (tmp_path / "ours" / "adapter_model.safetensors").stat().st_size
    assert size == (tmp_path / "0" / "adapter_model.safetensors").stat().st_size
    twin = copy.deepcopy(model)
    assert places(twin).keys().isdisjoint(places(model))
    assert len(places(twin)) == len(list(twin.parameters()))
    assert torch.equal(generate(tiny, twin.get_base_model()), expected)
    with torch.no_grad():
        for a in riders(twin.get_base_model()):
            a.weight.zero_()
    assert torch.equal(generate(tiny, model.get_base_model()), expected)
    mtpkern.release_graphs(model.get_base_model())
    assert len(places(model)) == len(list(model.parameters()))


def test_captured_steps_are_replayed_until_the_adapter_is_another(
    folders: list[str],
    tiny: SimpleNamespace,
    joins: list[bool],
    recorded: type[RecordedStep],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a replay reads is where it was; an adapter that has been changed in place is read anew."""
    monkeypatch.setattr(kernels, "gated_rows", lambda gate: None)  # a CPU's captured step would have them as numbers
    base = tiny.model("llama")
    del base.config.mtpkern
    model = mtpkern.load_adapter(base, folders[0])
    model.load_adapter(folders[1], "second")
    for name, captures in (("default", 1), ("default", 0), ("second", 1), ("default", 1)):
        model.set_adapter(name)
        for new in (captures, 0):
            joins[0] = False
            expected = generate(tiny, model, use_graph=False, max_new_tokens=24)
            joins[0] = True
            before = recorded.captures
            assert torch.equal(generate(tiny, model, max_new_tokens=24), expected)
            assert recorded.captures == before + new
            with torch.no_grad():
                for a in riders(model.get_base_model(), name):
                    a.weight.neg_()
