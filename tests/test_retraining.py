"""Candidates retrained together are what each would be in a fit of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, model_factory, per_unit
from hypertune.batches import Minibatches, Rows
from hypertune.folds import Fold
from hypertune.hypernetworks import Linear
from hypertune.losses import cross_entropy
from hypertune.objective import Objective
from hypertune.recipes import choose
from hypertune.retraining import retrain
from hypertune.space import Space
from hypertune.task import Task, stack
from tests.searches import assert_scores_are_those_of_own_fits

SPACE = {"weight_decay": per_unit(loguniform(1e-6, 1e0)), "module__dropout": uniform(0, 0.5)}
NET = TorchClassifier(MLP(hidden=(8,), dropout=0.1), max_epochs=8, batch_size=16, input_noise=0.1, random_state=3)


def search(net=NET, space=SPACE, **params) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(
        net, space, **{"cv": 3, "random_state": 0, "error_score": "raise", "start": "estimator", **params}
    )


class Keeping(HyperTrainingSearchCV):
    def _make_task(self):
        self.task = super()._make_task()
        return self.task


def test_scores_and_losses_are_those_of_single_fits(iris, used):
    X, y = iris
    found = search(scoring="neg_log_loss").fit(X, y)
    assert used == [True] * 6 + [False]  # two candidates on three folds; the refit trains
    for row, params in enumerate(found.cv_results_["params"]):
        for k, (train, valid) in enumerate(StratifiedKFold(3).split(X, y)):
            net = clone(NET).set_params(**params).fit(X[train], y[train])
            proba = net.predict_proba(X[valid])[np.arange(len(valid)), y[valid]]
            assert_allclose(found.cv_results_[f"split{k}_test_score"][row], np.log(proba).mean(), rtol=1e-3)


def normed(n: int, m: int, *, first: float = 0.0, second: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Linear(n, 8), nn.LayerNorm(8), nn.Dropout(first), nn.ReLU(), nn.Dropout(second), nn.Linear(8, m)
    )


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (MLP(hidden=(8,), dropout=0.1), {}),
        (model_factory(normed, second=0.1), {"module__first": uniform(0, 0.8)}),
    ],
)
def test_what_is_switched_off_draws_no_noise_of_others(iris, module, more):
    """The estimator's own 0 draws nothing in its own fit, a 0 among other values does: the noise that remains is the same."""
    X, y = iris
    net = clone(NET).set_params(module=module, input_noise=0.0, dtype="float64")
    space = {"input_noise": uniform(0, 1), "mixup": uniform(0, 1), **more}
    task = Keeping(net, space, cv=3, evaluate="hypernetwork").fit(X, y).task
    space = task.space
    settings = [dict.fromkeys(space.names, 0.0) | {name: 0.5} for name in space.names] + [
        dict.fromkeys(space.names, 0.0)
    ]
    curves = retrain(task, torch.stack([space.encode(one) for one in settings])).curves
    for c, setting in enumerate(settings):
        for k, (train, _) in enumerate(StratifiedKFold(3).split(X, y)):
            alone = clone(net).set_params(**setting).fit(X[train], y[train])
            assert_allclose(curves[k, c], alone.loss_curve_, rtol=1e-9)


def test_a_retrained_net_knows_its_losses(iris):
    X, y = iris
    rows = np.arange(len(X))
    found = search(cv=[(rows, rows)]).fit(X, y)
    alone = clone(NET).set_params(**found.best_params_).fit(X, y)  # the fold is all rows: the refit is known already
    assert_allclose(found.best_estimator_.loss_curve_, alone.loss_curve_, rtol=1e-4)
    assert found.best_estimator_.n_iter_ == 8


def test_through_a_pipeline(iris, used):
    space = {f"torchclassifier__{name}": prior for name, prior in SPACE.items()}
    search(make_pipeline(StandardScaler(), NET), space).fit(*iris)
    assert used == [True] * 6 + [False]


def test_the_full_validation_loss_is_the_weighted_mean_over_all_rows_in_pieces():
    """Two models on 5,000 weighted rows, which is more than one piece, against the mean by hand."""
    torch.manual_seed(0)
    objective = Objective(nn.Linear(3, 2), cross_entropy)
    rows = Rows(torch.randn(5000, 3), torch.arange(5000) % 2, torch.linspace(0.1, 2.0, 5000))
    w = torch.randn(2, objective.D)
    for model, loss in zip(w, objective.full_valid_loss(w, rows, 0), strict=True):
        named = objective.named(model)
        each = cross_entropy(rows.x @ named["weight"].T + named["bias"], rows.y)
        assert_allclose(float(loss), float((rows.weight * each).sum() / rows.weight.sum()), rtol=1e-4)


def test_a_diverging_candidate_is_left_to_its_own_fit(iris):
    """Its weights are not handed out, and the other candidate's are those of a fit of its own."""
    X, y = iris
    net = clone(NET).set_params(optimizer="sgd", lr=0.1)
    rows = net._encode(X, y)
    space = Space.from_distributions({"weight_decay": loguniform(1e-6, 1e30)})
    space, objective = stack(space, [Fold(net, None, rows, rows)], len(X), 0)
    lam = torch.stack([space.encode({"weight_decay": strength}) for strength in (1e-3, 1e20)])
    known = retrain(Task(space, [Fold(net, None, rows, rows)], objective, lam[0], 0), lam)
    good, bad, other = (clone(net).set_params(weight_decay=strength) for strength in (1e-3, 1e20, 1e-2))
    assert [known.fit_known(one, one._encode(X, y)) for one in (good, bad, other)] == [True, False, False]
    alone = clone(good).fit(X, y)
    assert_allclose(good.predict_proba(X), alone.predict_proba(X), rtol=1e-3)
    with pytest.raises(ValueError, match="the training loss became nan"):
        bad.fit(X, y)


def test_lam_hat_is_shared_by_several_initial_weights_and_one_per_fold_remains(iris):
    """With n_inits the path differs, the response keeps K folds, and its losses are those of the trace."""
    X, y = iris
    one, two = (search(n_inits=n, evaluate="hypernetwork").fit(X, y) for n in (1, 2))
    assert not np.allclose(one.history_["module__dropout"], two.history_["module__dropout"])
    response = two.best_response_
    assert len(response.hypernetwork.w0) == 3
    assert response.validation_curve("module__dropout", [0.1, 0.2]).shape == (2, 3)
    assert response.validation_loss() == pytest.approx(two.history_["validation_loss"][-1], rel=0.05)


class Noted(Linear):
    """The tangent, and what it was built around."""

    def build(self, w0, center, layout):
        type(self).w0 = w0.clone()
        return super().build(w0, center, layout)


def test_no_two_of_the_initial_weights_are_the_same(iris):
    space = {"weight_decay": loguniform(1e-6, 1.0)}
    search(space=space, hypernetwork=Noted(), n_inits=3, evaluate="hypernetwork").fit(*iris)
    assert len(Noted.w0) == 9
    assert len(Noted.w0.unique(dim=0)) == 9


def test_folds_that_lack_a_class_are_fitted_alone(iris, used):
    """KFold on sorted labels: every training fold has two of the three classes."""
    space = {"weight_decay": loguniform(1e-6, 1e0), "module__dropout": uniform(0, 0.5)}
    found = search(space=space, cv=KFold(3), start="screened").fit(*iris)
    assert not any(used)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()


def test_nothing_of_it_is_kept(iris):
    found = search(start="screened").fit(*iris)
    assert not any(fold.net._known for fold in found.best_response_.folds)
    assert not found.best_estimator_._known
    assert "_known" not in vars(found)


def test_folds_of_other_sizes_are_screened_and_retrained_as_single_fits_would_be(iris, used):
    """Full batches of 67, 66 and 67 rows."""
    X, y = iris[0][50:], iris[1][50:]
    splits = [list(StratifiedKFold(3).split(X, y))[k] for k in (1, 0, 2)]
    net = clone(NET).set_params(batch_size=1024, lr=0.05, dtype="float64", max_epochs=30)
    space = {"weight_decay": loguniform(1e-6, 1e1)}
    found = Keeping(net, space, cv=splits, scoring="neg_log_loss", random_state=0).fit(X, y)
    curves = retrain(found.task, found.task.current[None]).curves[:, 0]
    assert len(found.cv_results_["params"]) >= 4
    assert used.count(True) == 3 * len(found.cv_results_["params"])
    for row, params in enumerate(found.cv_results_["params"]):
        for k, (train, valid) in enumerate(splits):
            alone = clone(net).set_params(**params).fit(X[train], y[train])
            loss = log_loss(y[valid], alone.predict_proba(X[valid]), labels=[1, 2])
            assert -found.cv_results_[f"split{k}_test_score"][row] == pytest.approx(loss, rel=1e-6)
            if params["weight_decay"] == pytest.approx(1e-6):  # the estimator's own
                assert_allclose(curves[k], alone.loss_curve_, rtol=1e-6)


class Normed(nn.Sequential):
    def __init__(self, n, m):
        super().__init__(nn.Linear(n, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, m))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [16, 1024])  # 1024: folds of 67, 66 and 67 rows are groups of their own
def test_running_statistics_are_those_of_single_fits(iris, used, batch_size):
    X, y = iris[0][50:], iris[1][50:]
    splits = [list(StratifiedKFold(3).split(X, y))[k] for k in (1, 0, 2)]
    net = clone(NET).set_params(module=Normed, batch_size=batch_size, dtype="float64", max_epochs=20)
    space = {"weight_decay": loguniform(1e-6, 1e1), "input_noise": uniform(0, 1)}
    found = search(net, space, cv=splits, scoring="neg_log_loss", start="screened").fit(X, y)
    assert len(found.cv_results_["params"]) >= 4
    assert used == [True] * 3 * len(found.cv_results_["params"]) + [False]
    for row, params in enumerate(found.cv_results_["params"]):
        for k, (train, valid) in enumerate(splits):
            alone = clone(net).set_params(**params).fit(X[train], y[train])
            loss = log_loss(y[valid], alone.predict_proba(X[valid]), labels=[1, 2])
            assert -found.cv_results_[f"split{k}_test_score"][row] == pytest.approx(loss, rel=1e-6)
    lam, losses = found.best_response_.verified
    first = -found.cv_results_["mean_test_score"][: len(lam)]
    assert_allclose(losses, first, rtol=1e-6)  # on the statistics of each candidate and fold
    band = found.best_response_.validation_band("weight_decay", [found.best_response_.params["weight_decay"]])
    assert band[0, 0] <= found.best_response_.validation_loss() <= band[0, 1]


class NormedBranching(nn.Module):
    def __init__(self, n, m, dropout=0.0):
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(n, 4), nn.BatchNorm1d(4), nn.Linear(4, m)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.out(self.dropout(self.norm(self.hidden(x).relu()))) if x.isfinite().all() else x


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
def test_what_cannot_be_stacked_is_trained_one_after_the_other_if_asked_for(iris, used):
    X, y = iris[0][50:], iris[1][50:]
    splits = [list(StratifiedKFold(3).split(X, y))[k] for k in (1, 0, 2)]
    net = clone(NET).set_params(module=NormedBranching, dtype="float64", max_epochs=5, batch_size=1024)  # unequal folds
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.5)}
    task = Keeping(net, space, cv=splits, random_state=0).fit(X, y).task
    assert not task.objective.stacked
    used.clear()
    lam = torch.stack([task.current, task.space.quantile(np.full((1, 2), 0.6))[0]])
    assert retrain(task, lam) is None
    found = retrain(task, lam, unstacked=True).validation_losses(task.folds)
    for one, loss in zip(lam, found, strict=True):
        alone = clone(net).set_params(**task.space.decode(one))
        scores = cross_val_score(alone, X, y, cv=splits, scoring="neg_log_loss")
        assert loss == pytest.approx(-scores.mean(), rel=1e-6)
    assert not any(used)


def test_one_validation_row_is_enough_for_a_module_with_batchnorm(iris):
    net = clone(NET).set_params(module=Normed, max_epochs=2)
    splits = [(np.arange(1, 100), np.arange(1)), (np.arange(50, 150), np.arange(50))]
    found = search(net, {"weight_decay": loguniform(1e-6, 1e0)}, cv=splits).fit(*iris)
    assert found.best_response_.objective.stacked


class Frozen(nn.Sequential):
    def __init__(self, n, m):
        super().__init__(nn.Linear(n, 8).requires_grad_(False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, m))


def test_with_frozen_weights_that_each_fit_draws_anew_it_is_its_own_fit_that_counts(iris, used):
    X, y = iris
    found = search(clone(NET).set_params(module=Frozen), {"weight_decay": loguniform(1e-6, 1e0)}).fit(X, y)
    assert not any(used)
    alone = cross_val_score(clone(NET).set_params(module=Frozen, **found.best_params_), X, y, cv=3)
    assert found.best_score_ == alone.mean()


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.isfinite().all() else x


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize("change", [{"module": Branching}, {"verbose": 1}])
def test_where_they_cannot_be_stacked_each_is_fitted_alone(iris, used, change, capsys):
    net = clone(NET).set_params(**change)
    found = search(net, {"weight_decay": loguniform(1e-6, 1e0)}).fit(*iris)
    assert not any(used)
    assert np.isfinite(found.best_score_)


@pytest.mark.slow
def test_each_network_of_a_fold_has_its_own_minibatches_and_statistics(iris, monkeypatch):
    X, y = iris
    seen = []
    forget = Objective.forget_statistics_but_of

    def noted(self, folds):
        seen.extend(self.statistics["1.running_mean"].clone())
        forget(self, folds)

    monkeypatch.setattr(Objective, "forget_statistics_but_of", noted)
    net = clone(NET).set_params(module=Normed, max_epochs=1)
    search(net, {"weight_decay": loguniform(1e-6, 1e0)}, n_inits=2, evaluate="hypernetwork").fit(X, y)
    assert len(torch.stack(seen).unique(dim=0)) == 6  # 3 folds, 2 networks each

    seeds = []
    for room in ("training", "problem"):  # of the training rows, of the validation rows
        noting = lambda *args, seed: seeds.append(tuple(seed)) or Minibatches(*args, seed=seed)  # noqa: E731
        monkeypatch.setattr(f"hypertune.{room}.Minibatches", noting)
    search(net, {"weight_decay": loguniform(1e-6, 1e0)}, n_inits=2, evaluate="hypernetwork").fit(X, y)
    train, valid = seeds
    assert train[:3] == (train[0],) * 3
    assert len({*train, *valid}) == 4  # the folds of one network alike, and nobody else


@pytest.mark.slow
def test_networks_of_a_fold_do_not_share_running_statistics(iris):
    """With BatchNorm, too, several initial weights find what one finds."""
    X, y = iris
    net = clone(NET).set_params(module=Normed, max_epochs=30, lr=1e-2)
    one, three = (
        search(net, {"weight_decay": loguniform(1e-6, 1e0)}, n_inits=n, evaluate="hypernetwork").fit(X, y)
        for n in (1, 3)
    )
    assert len(three.best_response_.objective.statistics["1.running_mean"]) == 3
    assert three.history_["validation_loss"][-1] < 1.5 * one.history_["validation_loss"][-1] + 0.05


def test_a_search_that_chooses_the_scale_starts_each_time_where_it_said(iris, monkeypatch):
    """In float64, too, where λ̂ needs no conversion: four hyper-trainings and the last begin at one λ̂."""
    starts = []
    monkeypatch.setattr(
        "hypertune.training.choose",
        lambda *args, **own: starts.append(monitored["start"].clone()) or choose(*args, **own),
    )
    monitored = {}
    tuner = HyperTrainingSearchCV._tuner

    def noted(self, start):
        tune = tuner(self, start)
        monitored["start"] = tune.keywords["start"]
        return tune

    monkeypatch.setattr(HyperTrainingSearchCV, "_tuner", noted)
    net = clone(NET).set_params(dtype="float64", max_epochs=2)
    search(net, {"weight_decay": per_unit(loguniform(1e-4, 1e1))}, grain_scale="auto", evaluate="hypernetwork").fit(
        *iris
    )
    assert len(starts) == 5
    assert all(torch.equal(start, starts[0]) for start in starts)
    starts.clear()
    search(net, {"weight_decay": loguniform(1e-4, 1e1)}, grain_scale="auto", evaluate="hypernetwork").fit(*iris)
    assert len(starts) == 1  # no grain, no scale to choose


def test_an_optimizer_that_sees_all_weights_at_once_trains_each_candidate_alone(iris, used):
    """The norm of a clipped step would be that of all models together."""

    def clipped(params, lr):
        optimizer = torch.optim.SGD(params, lr=lr)
        optimizer.register_step_pre_hook(
            lambda opt, *_: nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.1) and None
        )
        return optimizer

    net = clone(NET).set_params(optimizer=clipped, max_epochs=3)
    search(net, {"weight_decay": loguniform(1e-6, 1e0)}).fit(*iris)
    assert not any(used)


def by_size(params, lr):
    (w,) = params = list(params)
    return torch.optim.SGD(params, lr=lr * w.numel() ** 0.5)


def test_an_optimizer_that_looks_at_the_number_of_weights_trains_each_model_by_itself(iris, used):
    net = clone(NET).set_params(optimizer=by_size, lr=1e-2)
    found = search(net, scoring="neg_log_loss").fit(*iris)
    assert not any(used)
    alone = cross_val_score(clone(net).set_params(**found.best_params_), *iris, cv=3, scoring="neg_log_loss")
    assert found.best_score_ == pytest.approx(alone.mean(), rel=1e-9)


def test_codes_in_the_training_rows_of_one_fold_alone(iris, used):
    """In that fold no noise touches the column, and in the others it does."""

    class Both(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.out = nn.Linear(4, m)

        def forward(self, a, b):
            return self.out(torch.cat([a, b], dim=1))

    X, y = np.round(iris[0], 1), iris[1]
    X[:, 3] = np.round(X[:, 3])
    X[2, 3] = 0.5
    net = clone(NET).set_params(module=Both, inputs={"a": [0, 1, 2], "b": [3]}, input_noise=0.0)
    rows = np.arange(len(X))
    splits = [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in (2, 0, 1)]
    found = search(net, {"input_noise": uniform(0, 1)}, scoring="neg_log_loss", cv=splits).fit(X, y)
    assert not any(used)
    assert_scores_are_those_of_own_fits(found, X, y, rel=1e-9)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_settings_of_several_learning_rates_are_single_fits_in_one_stack(iris, optimizer):
    X, y = iris
    net = clone(NET).set_params(dtype="float64", optimizer=optimizer)
    space = {"lr": loguniform(1e-4, 1e-1), "weight_decay": loguniform(1e-6, 1e0)}
    task = Keeping(net, space, cv=3, random_state=0).fit(X, y).task
    settings = [
        {"lr": lr, "weight_decay": decay} for lr, decay in [(0.02, 1e-3), (1e-3, 0.1), (0.02, 0.1), (0.05, 1e-3)]
    ]
    retrained = retrain(task, torch.stack([task.space.encode(one) for one in settings]))
    for c, setting in enumerate(settings):
        for k, (train, _) in enumerate(StratifiedKFold(3).split(X, y)):
            alone = clone(net).set_params(**setting).fit(X[train], y[train])
            assert_allclose(retrained.curves[k, c], alone.loss_curve_, rtol=1e-9)
            last = torch.cat([p.detach().flatten() for p in alone.module_.parameters()])
            assert_allclose(retrained.weights[k, c], last, rtol=1e-6, atol=1e-9)


class Coupled(torch.optim.SGD):
    """Looks at all weights at once."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= p.grad.norm() + 1e-12
        return super().step(closure)


def test_an_optimizer_that_looks_at_all_weights_trains_one_model(iris):
    """Not several together, of settings or of folds; but a short training for comparison is of one."""
    X, y = iris
    net = clone(NET).set_params(optimizer=Coupled, dtype="float64")
    task = Keeping(net, {"lr": loguniform(1e-4, 1e-1), "weight_decay": loguniform(1e-6, 1e0)}, cv=3).fit(X, y).task
    settings = [{"lr": lr, "weight_decay": 1e-3} for lr in (0.02, 0.05)]
    lam = torch.stack([task.space.encode(one) for one in settings])
    assert retrain(task, lam) is None
    assert retrain(task, lam[:1]) is None
    train, _ = next(StratifiedKFold(3).split(X, y))
    for one, setting in zip(lam, settings, strict=True):
        curve = retrain(task._replace(folds=task.folds[:1]), one[None]).curves[0, 0]
        assert_allclose(curve, clone(net).set_params(**setting).fit(X[train], y[train]).loss_curve_, rtol=1e-9)


def test_hooks_on_gradients_are_noticed_at_every_learning_rate(iris):
    def clipping(params, lr):
        for p in params:
            p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return torch.optim.SGD(params, lr=lr)

    net = clone(NET).set_params(optimizer=clipping)
    with pytest.warns(UserWarning, match="learning rate is left at 0.003"):
        task = Keeping(net, {"lr": loguniform(1e-4, 1e-1), "weight_decay": loguniform(1e-6, 1e0)}, cv=3).fit(*iris).task
    for rates in [(0.02, 0.02), (0.02, 0.05)]:
        assert retrain(task, torch.stack([task.space.encode({"lr": lr, "weight_decay": 1e-3}) for lr in rates])) is None
