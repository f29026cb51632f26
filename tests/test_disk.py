"""A full disk is named, before the first step where that can be known, and nothing half-written passes for a whole."""

import errno
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mtpkern.train import disk
from mtpkern.train.config import MTPConfig
from mtpkern.train.disk import DiskFull, checkpoint_bytes, full_disk_named, require_space, written_whole


@pytest.fixture
def free(monkeypatch):
    """`free(100)`: so many bytes are free from now on."""

    def set_free(size):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    return set_free


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        # What safetensors and torch.save say.
        RuntimeError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_whatever_a_library_raises_is_named(tmp_path, free, error):
    free(5 << 20)
    with (
        pytest.raises(
            DiskFull, match=r"out: the disk is full; about 3.00 GiB are needed, 5.00 MiB are free; free some"
        ),
        full_disk_named(tmp_path / "out", 3 << 30),
    ):
        raise error


def test_other_errors_stay_what_they_are(tmp_path, free):
    free(5 << 40)
    for error in (OSError(errno.EACCES, "denied"), RuntimeError("inline_container: bad"), ValueError("x")):
        with pytest.raises(type(error)) as caught, full_disk_named(tmp_path, 100):
            raise error
        assert caught.value is error


def test_torch_says_so_of_a_full_device(tmp_path, free):
    """The words by which it is recognised are torch's own."""
    free(0)
    with pytest.raises(DiskFull), full_disk_named(tmp_path, 4_000_000), open("/dev/full", "wb") as full:
        torch.save({"a": torch.zeros(1_000_000)}, full)


def test_room_that_a_run_needs(tmp_path, free):
    model = nn.Linear(1024, 1024, bias=False)
    weights = 4 << 20
    for change, checkpoint in (({}, 3), ({"save_only_model": True}, 1), ({"optim": "sgd"}, 1)):
        args = MTPConfig(str(tmp_path), use_cpu=True, **change)
        assert checkpoint_bytes(model, args) == checkpoint * weights
        free((2 * checkpoint + 1) * weights - 1)
        with pytest.raises(DiskFull, match=r"two checkpoints of .* must fit; free some, or take another output_dir"):
            require_space(tmp_path / "not" / "yet", model, args)
        free((2 * checkpoint + 1) * weights)
        require_space(tmp_path, model, args)
    free(weights // 2)
    require_space(tmp_path, model, MTPConfig(str(tmp_path), use_cpu=True, save_strategy="no", save_dtype="bfloat16"))
    # Of adapters these alone, whoever has made them.
    adapted = get_peft_model(nn.Sequential(model), LoraConfig(r=2, target_modules=["0"]))
    assert checkpoint_bytes(adapted, MTPConfig(str(tmp_path), use_cpu=True)) == 3 * 4 * 2 * (1024 + 1024)


def test_files_come_whole_or_not_at_all(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def fail():
        with written_whole(tmp_path) as part:
            (part / "config.json").write_text("half")
            raise DiskFull("full")

    with pytest.raises(DiskFull):
        fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    with written_whole(tmp_path) as part:
        (part / "model.safetensors").write_text("new")
        (part / "config.json").write_text("new")
        (part / "templates").mkdir()
        (part / "templates" / "tool").write_text("new")
    shutil.rmtree(tmp_path / "templates")
    after = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert after == {"model.safetensors": "new", "config.json": "new", "notes.txt": "old"}
