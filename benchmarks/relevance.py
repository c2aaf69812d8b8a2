"""One weight decay for each input feature against one for the whole model, by nested cross-validation."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import loguniform
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, TorchRegressor, per_feature

_PRIOR = loguniform(1e-6, 1e1)


def measure_relevance(seeds: int) -> dict[tuple[str, str], np.ndarray]:
    """Print and return the outer test losses (seeds × 5 folds) of defaults, one weight decay and one per feature.

    MLP 32, standardised, inner cv of 3 folds, the search's defaults. Losses: log-loss, and mean squared error over the
    target's variance.
    """
    losses: dict[tuple[str, str], np.ndarray] = {}
    for name, (X, y) in {
        "diabetes": load_diabetes(return_X_y=True),
        "breast_cancer": load_breast_cancer(return_X_y=True),
    }.items():
        regression = name == "diabetes"
        scoring = "neg_mean_squared_error" if regression else "neg_log_loss"
        for method, prior in {"defaults": None, "one": _PRIOR, "per feature": per_feature(_PRIOR)}.items():
            found = []
            for seed in range(seeds):
                net = (TorchRegressor if regression else TorchClassifier)(MLP(hidden=(32,)), random_state=seed)
                model: Any = net
                if prior is not None:
                    model = HyperTrainingSearchCV(
                        net, {"weight_decay": prior}, cv=3, scoring=scoring, random_state=seed
                    )
                outer = (KFold if regression else StratifiedKFold)(5, shuffle=True, random_state=seed)
                scores = cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=outer, scoring=scoring)
                found.append(-scores / (y.var() if regression else 1.0))
            losses[name, method] = np.array(found)
            mean, error = losses[name, method].mean(), losses[name, method].std(ddof=1) / np.sqrt(seeds * 5)
            against = losses[name, method] - losses[name, "one"] if (name, "one") in losses else None
            paired = "" if against is None else f", minus one: {against.mean():+.4f} ± {_error(against):.4f}"
            print(f"{name:<14}{method:<12}{mean:.4f} ± {error:.4f}{paired}", flush=True)
    return losses


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(values.size))
