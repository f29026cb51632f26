"""Adapters that transformers itself puts into a model, for which newer versions of it ask for a newer peft."""

from importlib.metadata import version

import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

injecting = pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {version('transformers')} asks for peft {MIN_PEFT_VERSION}, there is {version('peft')}",
)
