"""What several test files share: models, cases, stand-ins; test files do not import one another."""

from pkgutil import iter_modules

import pytest

# Their assertions say what was compared, as a test's do.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))
