"""The whole search: what it starts from, trains and hands back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from optuna.distributions import FloatDistribution
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import make_regression
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, TorchRegressor
from hypertune.hypernetworks import HYPERNETWORKS, LowRank
from tests.searches import NET, SPACE, search


def test_the_estimators_own_setting_is_verified_too(iris):
    """... moved into the bounds; so the search never hands back something that scored worse."""
    found = search(estimator=clone(NET).set_params(weight_decay=1e-3, module__dropout=0.1, label_smoothing=0.05)).fit(
        *iris
    )
    own = found.cv_results_["params"][1]
    assert own == {
        "weight_decay": pytest.approx(1e-3),
        "module__dropout": pytest.approx(0.1),
        "label_smoothing": pytest.approx(0.05),
    }
    assert found.best_score_ >= found.cv_results_["mean_test_score"][1]


def test_simplified_leaves_an_upper_bound(iris):
    """Its centre is beyond that: at no distance from it nothing would ever move."""
    net = clone(NET).set_params(module__dropout=0.8, max_epochs=10)
    own = search(
        estimator=net, param_distributions={"module__dropout": uniform(0, 0.8)}, algorithm="simplified", warmup=0.0
    )
    path = own.set_params(evaluate="hypernetwork").fit(*iris).history_["module__dropout"]
    assert path[0] <= 0.8
    assert path[-1] < 0.79


@pytest.mark.parametrize("hypernetwork", [*HYPERNETWORKS, LowRank(rank=3)])
@pytest.mark.parametrize("algorithm", ["joint", "global", "simplified"])
def test_every_algorithm_with_every_hypernetwork(iris, algorithm, hypernetwork):
    found = search(algorithm=algorithm, hypernetwork=hypernetwork, evaluate="hypernetwork").fit(*iris)
    history = dict(found.history_)
    assert history.pop("algorithm") == f"{algorithm}: asked for"
    assert history.pop("grain_scale") == 1.0
    assert set(history) == {"step", "seconds", "epoch", "train_loss", "validation_loss", *SPACE}
    assert all(np.isfinite(values).all() and len(values) == len(history["step"]) for values in history.values())
    assert history["validation_loss"][-1] < history["validation_loss"][0]
    assert any(np.ptp(history[name]) > 0 for name in SPACE)


def test_lam_hat_starts_at_the_estimators_setting_unless_that_is_a_flat_corner(iris):
    """The bound of a log range is left for its prior's lower third; the bound of a linear range is a start like others."""
    net = clone(NET).set_params(weight_decay=0.0, input_noise=0.2)
    space = {"weight_decay": loguniform(1e-6, 1e0), "input_noise": uniform(0, 1), "module__dropout": uniform(0, 0.8)}
    found = search(estimator=net, param_distributions=space, warmup=0.9, evaluate="hypernetwork").fit(*iris)
    first = {name: found.history_[name][0] for name in space}
    assert first == {"weight_decay": pytest.approx(1e-4), "input_noise": pytest.approx(0.2), "module__dropout": 0.0}


@pytest.mark.slow
def test_joint_finds_what_a_grid_finds(breast_cancer):
    """One weight decay on an overfitting logistic regression: λ̂, from far away, retrained, against a fine grid."""
    X, y = breast_cancer
    X, y = np.column_stack([X, np.random.default_rng(0).normal(size=(len(X), 60))])[:200], y[:200]
    net = TorchClassifier(MLP(hidden=()), max_epochs=200, lr=1e-2, random_state=0)
    space = {"weight_decay": loguniform(1e-5, 1e1)}
    found = search(estimator=net, param_distributions=space).fit(X, y)
    grid = {wd: -cross_val_score(clone(net).set_params(weight_decay=wd), X, y, cv=3, scoring="neg_log_loss").mean()
            for wd in np.geomspace(1e-3, 1, 7)}  # fmt: skip
    start = -found.cv_results_["mean_test_score"][-1]  # the estimator's own setting
    tuned = -found.cv_results_["mean_test_score"][0]
    assert tuned < min(grid.values()) + 0.05 * (start - min(grid.values()))


def test_the_hypernetwork_can_be_the_judge(iris):
    """evaluate="hypernetwork": scores are those of w_φ(λ̂) on every fold, and nothing is retrained but the refit."""
    X, y = iris
    found = search(evaluate="hypernetwork").fit(X, y)
    assert len(found.cv_results_["params"]) == 1
    scores = []
    for k, (_, valid) in enumerate(StratifiedKFold(3).split(X, y)):
        judged = found.best_response_.estimator_at(found.best_params_, fold=k)
        scores.append(-log_loss(y[valid], judged.predict_proba(X[valid])))
        assert found.cv_results_[f"split{k}_test_score"][0] == pytest.approx(scores[-1], rel=1e-6)
    assert found.best_score_ == pytest.approx(np.mean(scores))
    assert -found.best_score_ == pytest.approx(found.best_response_.validation_loss(), rel=1e-5)
    assert not found.best_estimator_._known
    assert len(found.best_estimator_.loss_curve_) == NET.max_epochs


def test_counts_of_which_a_fold_validates_on_none():
    X = np.random.default_rng(0).normal(size=(60, 3))
    y = np.where(np.arange(60) < 20, 0, np.random.default_rng(1).poisson(3, 60))
    net = TorchRegressor(MLP((8,)), criterion="poisson", max_epochs=5, random_state=0)
    found = HyperTrainingSearchCV(
        net,
        {"weight_decay": loguniform(1e-6, 1e1), "input_noise": uniform(0, 1)},
        cv=KFold(3),
        random_state=0,
        scoring="neg_mean_absolute_error",
        error_score="raise",
    ).fit(X, y)
    assert found.predict(X).min() > 0
    assert np.isfinite(found.best_response_.validation_loss())


def test_the_papers_constants_are_within_reach(iris):
    """Adam 1e-4 for everything at a constant rate, σ² = 1e-5, two sampled λ, p(λ) = N(0, 1.5²), one step each."""
    paper = {"response_optimizer": "plain", "hyper_lr": 1e-4, "hyper_eps": 1e-8, "hyper_lr_schedule": "constant",
             "warmup": 0.0, "averaging": 0.0, "n_samples": 2, "n_inits": 1, "evaluate": "hypernetwork", "max_epochs": 3}  # fmt: skip
    net = clone(NET).set_params(lr=1e-4, lr_schedule="constant", weight_decay=1.0)
    space = {"weight_decay": loguniform(1e-5, 1e5)}
    for specific in ({"scale": 1e-5**0.5}, {"algorithm": "global", "hypernetwork": "mlp", "scale": 1.5}):
        found = search(estimator=net, param_distributions=space, **paper, **specific).fit(*iris)
        assert np.isfinite(found.best_score_)
        steps = 3 * 2  # Adam moves log λ by at most its step size at each
        if "algorithm" not in specific:
            assert 0 < abs(np.log(found.best_params_["weight_decay"])) < 1.01e-4 * steps


def test_regression_weights_and_optuna_distributions():
    X, y = make_regression(120, 8, noise=30, random_state=0)
    net = TorchRegressor(MLP(hidden=(16,)), max_epochs=30, lr=1e-2, random_state=0)
    space = {
        "weight_decay": FloatDistribution(1e-5, 1e1, log=True),
        "input_noise": FloatDistribution(0.0, 1.0),
    }
    weight = np.r_[np.ones(100), np.zeros(20)]
    found = search(estimator=net, param_distributions=space, scoring=None, cv=KFold(3)).fit(X, y, sample_weight=weight)
    assert found.best_score_ > 0.5
    weighted = search(estimator=net, param_distributions=space, scoring=None, cv=KFold(3)).fit(X, y)
    assert weighted.best_response_.params != found.best_response_.params


@pytest.mark.slow
def test_a_module_that_cannot_be_stacked_is_tuned_one_fold_after_the_other(iris):
    class Branching(nn.Module):
        def __init__(self, n: int, m: int):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(n, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, m))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) if x.isfinite().all() else x

    space = {"weight_decay": loguniform(1e-6, 1)}
    net = clone(NET).set_params(module=Branching, max_epochs=100)
    with pytest.warns(UserWarning, match="The folds are trained one after the other"):
        found = search(estimator=net, param_distributions=space, scoring="accuracy").fit(*iris)
    assert not found.best_response_.objective.stacked
    assert len(np.unique(found.history_["weight_decay"])) > 10
    assert found.cv_results_["mean_test_score"][0] > 0.9  # of λ̂
    assert found.best_response_.estimator_at().score(*iris) > 0.9


def test_splits_are_drawn_once_whatever_their_random_state(iris):
    """An unseeded splitter: nothing that was found on its first splits may be lost on the second."""
    fits = []

    class Counting(TorchClassifier):
        def _train(self, *args):
            fits.append(1)
            return super()._train(*args)

    net = Counting(**NET.get_params(deep=False)).set_params(max_epochs=2)
    cv = StratifiedKFold(3, shuffle=True)
    found = search(estimator=net, cv=cv, evaluate="hypernetwork").fit(*iris)
    assert len(fits) == 1  # the refit
    assert found.cv is cv
    search(estimator=net, cv=cv).fit(*iris)
    assert len(fits) == 2  # and the candidates were retrained together


def test_a_part_of_the_validation_rows_may_have_no_weight(iris):
    X, y = iris
    weight = np.where(np.arange(len(X)) % 5 == 0, 0.0, 1.0)
    found = search(estimator=clone(NET).set_params(max_epochs=2)).fit(X, y, sample_weight=weight)
    assert sum(len(fold.valid.x) for fold in found.best_response_.folds) == weight.sum()
