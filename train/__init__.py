"""Training: layout of spans, the self-distillation objective, a thin transformers Trainer, the demonstration task."""

from importlib.util import find_spec

# Not datasets: only sources on the hub need it, and say so.
_missing = [name for name in ("accelerate", "peft") if find_spec(name) is None]
if _missing:
    raise ImportError(f"mtpkern.train needs {', '.join(_missing)}; run: pip install 'mtpkern[train]'")
