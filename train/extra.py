"""What the trainer takes of the extra `train`, or what to install. Layout and objective do without.

Modules import it first, because transformers would not name what is missing. Not datasets: only sources on the hub need
it, and say so.
"""

try:
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
except ModuleNotFoundError as error:
    raise ImportError(f"mtpkern.train needs {error.name}; run: pip install 'mtpkern[train]'") from error

__all__ = [
    "DynamoBackend",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "TorchDynamoPlugin",
    "fsdp2_prepare_model",
    "get_peft_model",
]
