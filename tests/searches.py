"""A search on iris, as cheap as it gets."""

from __future__ import annotations

from scipy.stats import loguniform, uniform

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
