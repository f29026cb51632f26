"""What several test files share: models, cases, stand-ins; test files do not import one another."""

import os
from pathlib import Path
from pkgutil import iter_modules
from tempfile import TemporaryDirectory

import pytest

# transformers and datasets keep the code and the rows that they read under HOME, unless they are told when they are
# first imported: here, ahead of every other module. Ours go when the tests end.
KEPT = TemporaryDirectory(prefix="mtpkern-tests-")
for name in ("HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
    os.environ[name] = str(Path(KEPT.name) / name)

# Their assertions say what was compared, as a test's do.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))
