"""``sklearn.model_selection.tests.test_search`` with our search in place of theirs."""

import pytest

from tests.sklearn_suites.substitution import suite

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
globals().update(suite("sklearn.model_selection.tests.test_search"))
