"""Of scikit-learn's tests for all its meta-estimators, those of our search."""

from hypertune import HyperTrainingSearchCV


def pytest_collection_modifyitems(config, items):
    def is_ours(item) -> bool:
        entry = getattr(item, "callspec", None) and item.callspec.params.get("metaestimator")
        return not isinstance(entry, dict) or issubclass(entry["metaestimator"], HyperTrainingSearchCV)

    others = [item for item in items if "sklearn_suites" in item.nodeid and not is_ours(item)]
    config.hook.pytest_deselected(items=others)
    gone = set(others)
    items[:] = [item for item in items if item not in gone]
