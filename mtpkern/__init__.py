"""Several tokens per forward pass for Hugging Face causal language models.

    ids = mtpkern.generate(model, **inputs, max_new_tokens=256)

Importing this package imports neither torch nor transformers: each public name brings its module on first use.
"""

import importlib
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpkern import reference as reference
    from mtpkern.adapter import load_adapter as load_adapter
    from mtpkern.batching import BatchOutput as BatchOutput
    from mtpkern.batching import generate_batch as generate_batch
    from mtpkern.batching import iterate_batch as iterate_batch
    from mtpkern.engine import Engine as Engine
    from mtpkern.generation import MTPGenerateOutput as MTPGenerateOutput
    from mtpkern.generation import generate as generate
    from mtpkern.model import add_mask_token as add_mask_token
    from mtpkern.pool import release_graphs as release_graphs
    from mtpkern.prefix_cache import PrefixCache as PrefixCache
    from mtpkern.strategies import ConfAdapt as ConfAdapt
    from mtpkern.strategies import Static as Static
    from mtpkern.strategies import Verified as Verified
    from mtpkern.streaming import stream as stream
    from mtpkern.verify import check as check

    __version__: str


# The folder of the small checkpoint that comes along, with its tokenizer and held-out problems.
ASSETS = Path(__file__).parent / "assets"

_PUBLIC = {
    "adapter": ("load_adapter",),
    "batching": ("BatchOutput", "generate_batch", "iterate_batch"),
    "engine": ("Engine",),
    "generation": ("MTPGenerateOutput", "generate"),
    "model": ("add_mask_token",),
    "pool": ("release_graphs",),
    "prefix_cache": ("PrefixCache",),
    "strategies": ("ConfAdapt", "Static", "Verified"),
    "streaming": ("stream",),
    "verify": ("check",),
}
_MODULE_OF = {name: f"mtpkern.{module}" for module, names in _PUBLIC.items() for name in names}
__all__ = sorted([*_MODULE_OF, "ASSETS", "__version__", "reference"])

_OLDEST_TRANSFORMERS = "5.17"


def _check_installation() -> None:
    """Say what to run where the imports behind the public names could only fail obscurely."""
    # kernels/, train/ and bench/ lie beside this folder in the repository: only an installation puts them inside.
    if importlib.util.find_spec("mtpkern.kernels") is None:
        raise ImportError(
            f"mtpkern is imported from a clone that is not installed ({__path__[0]}); "
            "run in the clone's root: pip install -e ."
        )
    wanted = f"transformers>={_OLDEST_TRANSFORMERS}"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(f"mtpkern needs {wanted}, found none; run: pip install '{wanted}'") from None
    major_minor = [[int(part) for part in re.findall(r"\d+", text)[:2]] for text in (found, _OLDEST_TRANSFORMERS)]
    if major_minor[0] < major_minor[1]:
        raise ImportError(f"mtpkern needs {wanted}, found {found}; run: pip install --upgrade '{wanted}'")


_check_installation()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            value: Any = version("mtpkern")
        except PackageNotFoundError:
            value = "0+clone"  # on the path as it lies in a clone, and not installed
    elif name == "reference":
        value = importlib.import_module("mtpkern.reference")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module 'mtpkern' has no attribute {name!r}; its public names: {', '.join(__all__)}")
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return __all__
