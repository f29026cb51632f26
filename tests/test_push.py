"""What goes to the hub is what save_model writes, whatever a run has pushed of its checkpoints on the way."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mtpkern
from mtpkern.train.trainer import MTPTrainer
from support.trained import data, llama, trainer


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What has been in the folders that were pushed, to a hub that nobody sees."""
    found: list[set[str]] = []

    def upload_folder(*, folder_path: str, **_: Any) -> Any:
        found.append({path.name for path in Path(folder_path).iterdir()})
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    def create_repo(name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=name)

    api = SimpleNamespace(upload_folder=upload_folder, create_repo=create_repo)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api, raising=False)
    for name, call in vars(api).items():  # in earlier versions
        monkeypatch.setattr(transformers.trainer, name, call, raising=False)
    monkeypatch.setattr(MTPTrainer, "create_model_card", lambda self, **_: None)
    return found


@pytest.mark.parametrize("kind", ["full", "lora", "gated"])
def test_pushed(kind: str, tmp_path: Path, pushes: list[set[str]]) -> None:
    options: dict[str, Any] = {"teacher_target": "gt"} if kind == "full" else {"lora_rank": 2}
    if kind == "gated":
        options |= {"gated": True, "k_min": 2}
    options |= {"max_steps": 2, "save_steps": 1, "save_dtype": "bfloat16", "push_to_hub": True, "hub_model_id": "a/b"}
    run = trainer(tmp_path, teacher=None, train=data(8), **options)
    run.train()
    assert len(pushes) == 2
    run.push_to_hub()
    weights = {name for name in pushes[2] if name.endswith(".safetensors")}
    assert weights == {"adapter_model.safetensors" if kind == "gated" else "model.safetensors"}
    assert {x.dtype for x in load_file(tmp_path / weights.pop()).values()} == {torch.bfloat16}
    inputs = {"input_ids": torch.tensor([[1, 2, 10, 11]]), "max_new_tokens": 6}
    if kind == "gated":
        mtpkern.generate(mtpkern.load_adapter(llama(), tmp_path), **inputs)
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not any("lora" in name for name, _ in again.named_parameters())
        mtpkern.generate(again, **inputs)
    # A run goes on in float32.
    run._save_checkpoint(run.model, None)
    kept = next((tmp_path / "checkpoint-2").glob("*model.safetensors"))
    assert {x.dtype for x in load_file(kept).values()} == {torch.float32}
