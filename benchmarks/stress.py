"""Settings that nobody would choose for a benchmark: ours against the untouched estimator and ten random settings, on generated tables.

What is odd is the estimator (its own setting kills the model, its optimizer, batches or epochs are unusual, its module is no MLP), the
folds (of different sizes, one split, a time series) or the data (few or unbalanced rows, much noise, hardly any). Random search draws ten
settings from the same space on the same folds, whatever time that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import make_classification, make_friedman1, make_moons, make_regression
from sklearn.metrics import get_scorer
from sklearn.model_selection import KFold, RandomizedSearchCV, ShuffleSplit, StratifiedKFold, TimeSeriesSplit
from sklearn.preprocessing import StandardScaler
from sklearn.utils.parallel import Parallel, delayed

from benchmarks.modules import Convolutions, Normed, Recurrent, Residual, Transformer
from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, TorchRegressor, model_factory

_TEST_ROWS = 4_000
_DRAWS = 10
_L2 = {"weight_decay": loguniform(1e-6, 1e1)}
_FOUR = {**_L2, "module__dropout": uniform(0, 0.8), "input_noise": uniform(0, 1), "label_smoothing": uniform(0, 0.3)}
_PENALTIES = {**_L2, "l1": loguniform(1e-6, 1)}


@dataclass(frozen=True)
class Case:
    """Data ``make(n_samples=, random_state=)``, so many rows of it to tune on, an estimator's parameters, a space and folds."""

    make: Callable[..., tuple[np.ndarray, np.ndarray]]
    rows: int
    params: dict[str, Any] = field(default_factory=dict)
    module: Any = field(default_factory=lambda: MLP(hidden=(64,)))
    space: dict[str, Any] = field(default_factory=lambda: _FOUR)
    cv: Any = 3


def _classes(**params: Any) -> Callable[..., Any]:
    return lambda **rows: make_classification(**{"n_features": 20, "n_informative": 5, **params}, **rows)


def _line(**params: Any) -> Callable[..., Any]:
    def make(n_samples: int, random_state: int) -> tuple[np.ndarray, np.ndarray]:
        X, y = make_regression(n_samples, random_state=random_state, **params)
        return X, y / y.std() + 0.3 * np.random.default_rng(random_state).standard_normal(n_samples)

    return make


def _curved(noise: float) -> Callable[..., Any]:
    return lambda **rows: make_friedman1(noise=noise, **rows)


def _series(n_samples: int, random_state: int) -> tuple[np.ndarray, np.ndarray]:
    """12 steps of three channels, and three classes: by the level that one has reached, by one step of another, by the end of the third."""
    rng = np.random.default_rng(random_state)
    X = rng.standard_normal((n_samples, 12, 3))
    z = np.tanh(X[:, :, 0].sum(axis=1) / 3) + 0.8 * X[:, 4, 1] + 0.5 * X[:, -3:, 2].sum(axis=1)
    z += 0.7 * rng.standard_normal(n_samples)
    return X, (z > 0).astype(int) + (z > 1.2)


CASES: dict[str, Case] = {
    "plain": Case(_classes(), 300),
    "own setting kills it": Case(_classes(), 300, {"weight_decay": 3.0}),
    "the same, unequal folds": Case(_classes(), 193, {"weight_decay": 3.0, "max_epochs": 60}),
    "full batch, unequal folds": Case(_classes(), 301, {"batch_size": 1024, "lr": 0.01, "weight_decay": 3.0}),
    "a time series": Case(_classes(), 300, {"weight_decay": 3.0, "max_epochs": 60}, cv=TimeSeriesSplit(5)),
    "deep, short": Case(_classes(), 200, {"max_epochs": 30}, MLP(hidden=(128, 128, 128)), cv=5),
    "deep, short, killed": Case(_classes(), 300, {"max_epochs": 30, "weight_decay": 0.3}, MLP(hidden=(256, 256, 256))),
    "one split": Case(_classes(), 300, cv=ShuffleSplit(1, test_size=0.3, random_state=0)),
    "ten folds": Case(_classes(), 300, cv=10),
    "batches of 16": Case(_classes(), 300, {"batch_size": 16, "max_epochs": 40}),
    "sgd": Case(_classes(), 300, {"optimizer": "sgd", "lr": 0.05}),
    "7% positive": Case(_classes(weights=[0.93]), 500),
    "30% label noise": Case(_classes(flip_y=0.3), 300),
    "40 rows": Case(_classes(), 40),
    "moons, 60 rows": Case(lambda **rows: make_moons(noise=0.3, **rows), 60),
    "l1 over 15 decades": Case(_classes(n_features=60), 300, {"max_epochs": 50}, space={"l1": loguniform(1e-12, 1e3)}),
    "friedman1, hardly any noise": Case(_curved(0.1), 500, module=MLP(hidden=(64, 64)), space=_L2),
    "the same, two penalties": Case(_curved(0.1), 500, module=MLP(hidden=(64, 64)), space=_PENALTIES),
    "friedman1, noise": Case(_curved(1.0), 300, module=MLP(hidden=(64, 64)), space=_PENALTIES),
    "linear, 100 features": Case(
        _line(n_features=100, n_informative=10), 301, {"batch_size": 1024, "lr": 0.03}, MLP(hidden=()), _PENALTIES
    ),
    "batch norm": Case(_classes(), 300, {"max_epochs": 40}, model_factory(Normed)),
    "residual, layer norm": Case(_classes(), 250, {"max_epochs": 40}, model_factory(Residual)),
    "convolutions, batch norm": Case(_series, 240, {"max_epochs": 40}, model_factory(Convolutions)),
    "recurrent": Case(_series, 240, {"max_epochs": 40, "lr": 0.01}, model_factory(Recurrent)),
    "transformer": Case(_series, 240, {"max_epochs": 40}, model_factory(Transformer)),
}


def measure_stress(seeds: int, jobs: int = 1, first_seed: int = 0, cases: Sequence[str] = tuple(CASES)) -> np.ndarray:
    """Print test losses over those of the estimator's own setting and of random search, and return the losses (cases, seeds, 3).

    Each seed of each case is another draw of data, folds, initial weights and random settings: had the cases the same ten settings,
    one lucky draw would count in all of them. Ratios are geometric means over seeds.
    """
    found = Parallel(n_jobs=jobs)(
        delayed(_losses)(CASES[name], _seed_of(name, seed))
        for name in cases
        for seed in range(first_seed, first_seed + seeds)
    )
    losses = np.array(found).reshape(len(cases), seeds, 3)
    ratios = np.log(losses[:, :, :1] / losses[:, :, 1:])  # ours over own, ours over random
    print(f"{'test loss of ours, over that of':<30}{'own setting':>14}{'10 random':>12}{'worst seed':>13}")
    for name, own in zip(cases, ratios, strict=True):
        means, worst = np.exp(own.mean(axis=0)), np.exp(own[:, 1].max())
        print(f"{name:<30}{means[0]:>14.2f}{means[1]:>12.2f}{worst:>13.2f}", flush=True)
    by_case = np.exp(ratios.mean(axis=1))
    shares = (by_case > 1.05).mean(axis=0)
    print(
        f"median over cases: {np.median(by_case[:, 0]):.2f} and {np.median(by_case[:, 1]):.2f}; "
        f"more than 5% worse: {shares[0]:.0%} and {shares[1]:.0%}"
    )
    return losses


def _seed_of(name: str, seed: int) -> int:
    return int(np.random.SeedSequence((seed, list(CASES).index(name))).generate_state(1)[0])


def _losses(case: Case, seed: int) -> tuple[float, float, float]:
    """Test losses of our search, the estimator's own setting and random search."""
    X, y = case.make(n_samples=case.rows + _TEST_ROWS, random_state=seed)
    if X.ndim == 2:
        X = StandardScaler().fit(X[: case.rows]).transform(X)
    X, X_test, y, y_test = X[: case.rows], X[case.rows :], y[: case.rows], y[case.rows :]
    classes = len(np.unique(y)) < 10
    kind, folds = (TorchClassifier, StratifiedKFold) if classes else (TorchRegressor, KFold)
    scoring = "neg_log_loss" if classes else "neg_mean_squared_error"
    cv = folds(case.cv, shuffle=True, random_state=seed) if isinstance(case.cv, int) else case.cv
    net = kind(case.module, random_state=seed, **case.params)
    common: dict[str, Any] = {"cv": cv, "scoring": scoring, "random_state": seed}
    models = (
        HyperTrainingSearchCV(net, case.space, **common),
        clone(net),
        RandomizedSearchCV(net, case.space, n_iter=_DRAWS, **common),
    )
    ours, own, random = (-get_scorer(scoring)(model.fit(X, y), X_test, y_test) for model in models)
    return ours, own, random
