"""What several test files share: models, cases, stand-ins; test files do not import one another."""

import pytest

pytest.register_assert_rewrite(__name__)  # their assertions say what was compared, as a test's do
