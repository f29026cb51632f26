"""Training: layout of spans, the self-distillation objective, a thin transformers Trainer, the demonstration task.

    from mtpkern.train import MTPCollator, MTPConfig, MTPTrainer, encode_rows

Importing this package imports neither torch nor transformers: each public name brings its module on first use, and
with it what the extra `train` installs.
"""

import importlib
from typing import TYPE_CHECKING, Any

import mtpkern

if TYPE_CHECKING:
    from mtpkern.train.collator import MTPCollator as MTPCollator
    from mtpkern.train.config import MTPConfig as MTPConfig
    from mtpkern.train.evaluate import HeldOut as HeldOut
    from mtpkern.train.gated_trainer import GatedTrainer as GatedTrainer
    from mtpkern.train.texts import encode_rows as encode_rows
    from mtpkern.train.trainer import MTPTrainer as MTPTrainer

__all__ = ["GatedTrainer", "HeldOut", "MTPCollator", "MTPConfig", "MTPTrainer", "encode_rows"]

_MODULE_OF = {
    "GatedTrainer": "mtpkern.train.gated_trainer",
    "HeldOut": "mtpkern.train.evaluate",
    "MTPCollator": "mtpkern.train.collator",
    "MTPConfig": "mtpkern.train.config",
    "MTPTrainer": "mtpkern.train.trainer",
    "encode_rows": "mtpkern.train.texts",
}

if getattr(mtpkern, "__file__", None) is None:
    # The working directory holds a clone of that name, which Python takes for a package without an __init__.py.
    raise ImportError(
        f"{next(iter(mtpkern.__path__))} is a clone, which Python takes for the package mtpkern because it lies in the "
        "working directory: run this in another folder, or give the clone another name"
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"mtpkern.train has no attribute {name!r}; its public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return __all__
