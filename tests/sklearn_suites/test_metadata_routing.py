"""``sklearn.tests.test_metaestimators_metadata_routing`` with our search in place of theirs."""

import pytest

from tests.sklearn_suites.substitution import suite

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
globals().update(suite("sklearn.tests.test_metaestimators_metadata_routing"))
