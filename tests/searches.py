"""A search on iris, as cheap as it gets; and what every search promises of its scores."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier

SPACE = {
    "weight_decay": loguniform(1e-6, 1e1),
    "module__dropout": uniform(0, 0.8),
    "label_smoothing": uniform(0, 0.3),
}
NET = TorchClassifier(MLP(hidden=(16,)), max_epochs=40, lr=1e-2, random_state=0)


def search(**params) -> HyperTrainingSearchCV:
    defaults = {
        "estimator": NET,
        "param_distributions": SPACE,
        "cv": 3,
        "random_state": 0,
        "scoring": "neg_log_loss",
        "start": "estimator",  # two candidates; tests/test_retraining.py has the screening
    }
    return HyperTrainingSearchCV(**{**defaults, **params})


def assert_scores_are_those_of_own_fits(found: HyperTrainingSearchCV, X: Any, y: Any, rel: float) -> None:
    """Of every candidate, cross-validated by scikit-learn as if there had been no search. ``cv`` must split the same way twice."""
    for params, score in zip(found.cv_results_["params"], found.cv_results_["mean_test_score"], strict=True):
        alone = clone(found.estimator).set_params(**params)
        scores = cross_val_score(alone, X, y, cv=found.cv, scoring=found.scoring)
        assert score == pytest.approx(scores.mean(), rel=rel)
