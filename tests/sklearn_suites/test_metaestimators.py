"""``sklearn.tests.test_metaestimators`` with our search in place of theirs."""

import pytest

from tests.sklearn_suites.substitution import suite

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
globals().update(suite("sklearn.tests.test_metaestimators", in_marks=False))
