"""A checkpoint named on the command line: looked for, loaded, put on a device; mistakes are said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mtpkern.adapter_config import GatedSettings


def require_found(name: str, kind: str = "model") -> None:
    """Raise FileNotFoundError for what is no local path and no id of a "model" or "dataset" (kind) on the hub.

    A name without an owner, as some old ids are, counts where the hub's cache has it or the hub knows it. That is asked
    once, where a download would try for half a minute.
    """
    if Path(name).exists():
        return
    form = "a hub id has the form owner/name"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: there is no such file or folder ({form})")
    if "/" not in name and not _on_hub(name, kind):
        raise FileNotFoundError(
            f"{name}: there is no such file or folder, and the hub has not answered to that name ({form})"
        )


def _on_hub(name: str, kind: str) -> bool:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name}").is_dir():
        return True
    try:
        HfApi(endpoint=constants.ENDPOINT).repo_info(name, repo_type=kind, timeout=5)
    except RepositoryNotFoundError:
        return False
    except HfHubHTTPError:
        return True  # the hub is there, and the download will say what is wrong with it
    except Exception:  # offline mode, a name that cannot be one, no connection: each version has other errors
        return False
    return True


def require_model(name: str) -> None:
    """Raise OSError for a local path that holds no model."""
    require_found(name)
    path = Path(name)
    if path.is_file():
        raise NotADirectoryError(f"{name}: expected a checkpoint's folder or hub id, this is a file")
    if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{name}: there is no model in this folder, config.json is missing")


def device_of(name: str | None = None) -> torch.device:
    """The device of that name; without one the accelerator, if there is one. ValueError for one that is not here.

    device_of("cuda:0")
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    count = 0 if accelerator is None else torch.accelerator.device_count()
    here = "cpu" if accelerator is None else f"cpu and {accelerator.type}:0 to {accelerator.type}:{count - 1}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: there is no such kind of device; this machine has {here}") from None
    there = accelerator is not None and device.type == accelerator.type and (device.index or 0) < count
    if device.type != "cpu" and not there:
        raise ValueError(f"--device {name}: torch finds no such device here; this machine has {here}")
    return device


def quiet() -> None:
    """No progress bars of transformers between the lines of a command: it says itself how far things are."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load(
    name: str, dtype: str, device: torch.device, *, base: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Model, in evaluation mode, and tokenizer of a checkpoint's path or hub id; code that comes with it is not run.

    A gated adapter is loaded upon the base that it records, or upon the folder or hub id `base`, and has its tokenizer.
    dtype: "auto" or a name in torch. Raises OSError for what cannot be loaded, ValueError for what needs its own code,
    for a base that is not the adapter's, and for one that is given to a whole checkpoint.

        model, tokenizer = load("my-model", "float32", torch.device("cpu"))
    """
    require_model(name)
    settings = _adapter_settings(name)
    if settings is None:
        if base is not None:
            raise ValueError(f"--base is for a gated adapter, {name} is a model of its own; leave --base out")
        model, tokenizer = _load(name, dtype)
        return model.to(device).eval(), tokenizer
    from mtpkern.adapter import load_adapter

    try:
        require_model(base or settings.base)
        model, tokenizer = _load(base or settings.base, dtype)
    except OSError as error:
        if base is not None:
            raise
        raise OSError(f"{name} is an adapter, and its base is not there: {error}; name its place by --base") from error
    try:
        return load_adapter(model.to(device).eval(), name), tokenizer
    except ValueError as error:
        raise ValueError(f"{error}; --base names another one") from error


def holds_adapter(name: str) -> bool:
    """Whether a folder holds an adapter of peft and no model: `holds_adapter("runs/gated")`."""
    return (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file()


def _adapter_settings(name: str) -> GatedSettings | None:
    """What a gated adapter's folder or hub id records; None for anything else."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if (Path(name) / "config.json").is_file() or find_adapter_config_file(name) is None:
        return None
    try:
        from peft import PeftConfig
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} is an adapter, which needs peft; run: pip install peft") from error
    from mtpkern.adapter_config import is_gated, settings_of

    config = PeftConfig.from_pretrained(name)
    return settings_of(config) if is_gated(config) else None


def _load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=False
        )
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" not in str(error):
            raise OSError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
        raise ValueError(
            f"{name} needs code of its own, which this command does not run; if you trust it, load the model in "
            "Python and call mtpkern.generate"
        ) from error
