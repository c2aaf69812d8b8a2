"""The prior's scale is chosen on validation rows that λ̂ was not tuned on."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import loguniform
from sklearn.datasets import make_regression
from sklearn.model_selection import PredefinedSplit

from hypertune import MLP, HyperTrainingSearchCV, TorchRegressor, per_feature, per_weight, trace, training
from hypertune.batches import Rows
from hypertune.folds import Fold
from hypertune.hyperprior import SCALES, choose_scale, vertex
from hypertune.losses import absolute_error, cross_entropy, nats_per_unit, output_scale, poisson_deviance, squared_error


def test_the_vertex_of_a_parabola_is_found_between_its_points():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    assert vertex(x, (x - 1.3) ** 2) == pytest.approx(1.3)
    assert vertex(x, x) == 0.0
    assert vertex(x, -x) == 3.0


def test_every_scale_is_tuned_on_one_half_and_judged_on_the_other(monkeypatch):
    X = torch.arange(10.0)[:, None]
    fold = Fold(None, None, Rows(X, X[:, 0]), Rows(X, X[:, 0]))
    seen: list[tuple[float, list[float]]] = []

    def losses(scale, objective, folds, lam):
        """Of a prediction that is a constant, so that its loss on a half says which rows it was judged on."""
        seen.append((scale, sorted(folds[0].valid.x.flatten().tolist())))
        return torch.tensor([[(math.log(scale) - math.log(1.5)) ** 2]])

    monkeypatch.setattr("hypertune.hyperprior.validation_losses", losses)
    tuned: list[tuple[float, list[float]]] = []

    def tune(folds, scale):
        tuned.append((scale, sorted(folds[0].valid.x.flatten().tolist())))
        space = SimpleNamespace(encode=lambda params: torch.zeros(1))
        return SimpleNamespace(hypernetwork=scale, objective=None, space=space, params={})

    assert choose_scale(tune, [fold]) == pytest.approx(1.5)
    assert [scale for scale, _ in tuned] == list(SCALES)
    for (_, one), (_, other) in zip(tuned, seen, strict=True):
        assert sorted(one + other) == list(range(10))
        assert len(one) == 5


def test_a_unit_of_a_loss_in_nats_is_the_slope_of_its_log_likelihood():
    value = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    of_squares = lambda v: 4 / 2 * v.log()  # noqa: E731
    for loss, nll in (
        (squared_error, of_squares), (poisson_deviance, of_squares), (absolute_error, lambda v: 4 * v.log())
    ):  # fmt: skip
        (slope,) = torch.autograd.grad(nll(value), value)
        assert float(nats_per_unit(loss, value.detach(), 4)) == pytest.approx(float(slope))
    assert float(nats_per_unit(cross_entropy, value.detach(), 4)) == 1.0
    for nothing in (0.0, -5e-8):  # of a perfect prediction, and a deviance by rounding
        assert 0 < float(nats_per_unit(squared_error, torch.tensor(nothing), 4)) < torch.inf


def test_what_varies_little_is_a_matter_of_the_outputs_units():
    y = torch.tensor([0.0, 0.0, 40.0])
    assert output_scale(squared_error, y) == float(y.std())
    assert output_scale(poisson_deviance, y) == output_scale(cross_entropy, torch.tensor([0, 7])) == 1.0


def test_the_slopes_of_a_search_are_in_nats(monkeypatch):
    """Where Adam's eps is above all slopes, λ̂ moves in proportion to them: ten nats in a unit of the loss move it ten times as far."""
    X, y = make_regression(60, 4, noise=10.0, random_state=0)
    net = TorchRegressor(MLP(hidden=()), lr=0.02, batch_size=60, max_epochs=90, weight_decay=0.1, random_state=0)
    own = {
        "start": "estimator",
        "evaluate": "hypernetwork",
        "refit": False,
        "hyper_eps": 1e3,
        "cv": 2,
        "random_state": 0,
    }

    def moved(nats: float) -> float:
        monkeypatch.setattr(training, "nats_per_unit", lambda loss, value, outputs: nats * torch.ones_like(value))
        search = HyperTrainingSearchCV(net, {"weight_decay": loguniform(1e-4, 1e2)}, **own, hyper_lr=100.0).fit(X, y)
        path = np.log(search.history_["weight_decay"])
        return abs(path[-1] - path[0])

    assert moved(10.0) > 5 * moved(1.0) > 0


def test_of_very_many_values_a_draw_is_recorded(iris, monkeypatch):
    """The same ones in every record."""
    net = TorchRegressor(MLP(hidden=(300,)), max_epochs=3, random_state=0)  # 1,500 weights that have a decay
    search = HyperTrainingSearchCV(
        net, {"weight_decay": per_weight(loguniform(1e-6, 1e1))}, algorithm="joint", cv=3, evaluate="hypernetwork",
        random_state=0,
    )  # fmt: skip
    all_of_them = search.fit(*iris).history_["weight_decay"]
    assert all_of_them.shape[1] == 1_500
    monkeypatch.setattr(trace, "_RECORDED_VALUES", 1_500 * len(all_of_them) - 1)
    some = search.fit(*iris).history_["weight_decay"]
    assert some.shape == (len(all_of_them), 1_000)
    assert set(map(tuple, some.T)) <= set(map(tuple, all_of_them.T))


@pytest.mark.slow
def test_auto_keeps_the_values_together_where_features_do_not_differ():
    """Every feature matters equally, and validation rows are few: a narrow prior; with useless features a wider one."""

    def chosen(informative: int) -> float:
        X, y = make_regression(160, 12, n_informative=informative, noise=60.0, random_state=0)
        net = TorchRegressor(MLP(hidden=()), lr=0.02, max_epochs=80, weight_decay=0.1, random_state=0)
        split = PredefinedSplit(np.r_[np.full(80, -1), np.zeros(80, dtype=int)])
        search = HyperTrainingSearchCV(
            net, {"weight_decay": per_feature(loguniform(1e-4, 1e2))}, cv=split, grain_scale="auto", start="estimator",
            hyper_lr=0.2, hyper_eps=1e-3, evaluate="hypernetwork", refit=False, random_state=0,
        )  # fmt: skip
        return search.fit(X, y).history_["grain_scale"]

    assert 0.5 <= chosen(12) < chosen(2) <= 4.0


def test_a_fold_of_one_validation_row_has_no_halves():
    fold = SimpleNamespace(valid=SimpleNamespace(x=torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="a fold has one row"):
        choose_scale(lambda some, scale: None, [fold])
