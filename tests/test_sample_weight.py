"""One weight for each training example: as a parameter of the estimator, and as hyperparameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import KFold, PredefinedSplit, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, TorchRegressor, per_feature, per_layer
from hypertune.batches import Batch, Minibatches, Rows

NET = TorchClassifier(MLP(hidden=(8,)), max_epochs=5, lr=1e-2, random_state=0)
SPACE = {"sample_weight": uniform(0, 2)}


def search(estimator=NET, space=SPACE, **params) -> HyperTrainingSearchCV:
    defaults = {"cv": 3, "random_state": 0, "error_score": "raise", "start": "estimator"}
    return HyperTrainingSearchCV(estimator, space, **{**defaults, **params})


def test_the_parameter_is_the_argument_of_fit(iris):
    X, y = iris
    weight = np.random.default_rng(0).uniform(0, 2, len(X))
    as_parameter = clone(NET).set_params(sample_weight=weight).fit(X, y)
    assert_array_equal(as_parameter.predict_proba(X), NET.fit(X, y, weight).predict_proba(X))
    both = clone(NET).set_params(sample_weight=np.sqrt(weight)).fit(X, y, np.sqrt(weight))
    assert_allclose(both.predict_proba(X), as_parameter.predict_proba(X), rtol=1e-4)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\), and there are 150 rows"):
        clone(NET).set_params(sample_weight=[1.0, 1.0, 1.0]).fit(X, y)


@pytest.mark.parametrize("algorithm", ["joint", "global", "simplified"])
@pytest.mark.parametrize("hypernetwork", ["linear", "low_rank", "mlp", "gated"])
def test_every_row_gets_its_own_weight(iris, algorithm, hypernetwork):
    X, y = iris
    space = {**SPACE, "weight_decay": loguniform(1e-5, 1e0)}
    found = search(space=space, algorithm=algorithm, hypernetwork=hypernetwork).fit(X, y)
    path = found.history_["sample_weight"]
    assert path.shape[1] == len(X)
    assert (path[-1] != path[0]).mean() > 0.9
    assert np.unique(path[-1]).size > 100
    assert found.best_response_.params["sample_weight"].shape == (len(X),)
    model = clone(NET).set_params(**found.best_params_).fit(X, y)
    assert_allclose(model.predict_proba(X), found.predict_proba(X), rtol=1e-5)
    assert vars(found.best_estimator_).get("_row_numbers") is None
    assert found.estimator is NET or found.get_params()["estimator"] is NET


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_each_fold_is_verified_with_the_weights_of_its_own_rows(iris, n_jobs, monkeypatch):
    """Through a pipeline, whose scaling changes the rows in every fold; row weights that name their row."""
    X, y = iris
    own = 0.5 + np.arange(len(X)) / len(X)
    pipeline = make_pipeline(StandardScaler(), clone(NET).set_params(sample_weight=own))
    space = {"torchclassifier__weight_decay": loguniform(1e-6, 1e0)}
    found = search(pipeline, space, n_jobs=n_jobs, cv=KFold(3, shuffle=True, random_state=0)).fit(X, y)
    for (train, valid), name in zip(KFold(3, shuffle=True, random_state=0).split(X), range(3), strict=True):
        scale = StandardScaler().fit(X[train])
        for row, params in enumerate(found.cv_results_["params"]):
            net = clone(NET).set_params(weight_decay=params["torchclassifier__weight_decay"])
            net.fit(scale.transform(X[train]), y[train], own[train])
            score = net.score(scale.transform(X[valid]), y[valid])
            assert found.cv_results_[f"split{name}_test_score"][row] == score
    fold = found.best_response_.folds[0]
    assert fold.valid.weight is None


def test_equal_rows_of_two_folds_with_other_weights_are_refused(iris):
    """A fit of one fold could not tell which of the weights are its own."""
    X, y = np.concatenate([iris[0]] * 2), np.concatenate([iris[1]] * 2)
    own = 1.0 + np.arange(len(X))
    halves = [(np.arange(150), np.arange(150, 300)), (np.arange(150, 300), np.arange(150))]
    space = {"weight_decay": loguniform(1e-6, 1e0)}
    with pytest.raises(ValueError, match="Two folds train on equal rows"):
        search(clone(NET).set_params(sample_weight=own), space, cv=halves).fit(X, y)
    search(clone(NET).set_params(sample_weight=np.tile(own[:150], 2)), space, cv=halves).fit(X, y)


def test_the_weights_in_the_loss_are_those_of_the_rows_relative_to_their_fold():
    folds = [
        Rows(torch.arange(4.0)[:, None], torch.zeros(4), None, torch.tensor([0, 2, 4, 5])),
        Rows(torch.arange(3.0)[:, None], torch.zeros(3), None, torch.tensor([1, 2, 3])),
    ]
    stream = Minibatches(folds, 2, seed=0)
    batch = next(stream)
    weights = torch.rand(2, 6) + 0.1
    found = stream.weighted(batch, weights)
    for k in range(2):
        for m in range(2):
            expected = weights[m, batch.number[k]] / weights[m, folds[k].number].mean()
            assert_allclose(found[2 * k + m], expected)
    assert Batch(*batch).repeat(2).number.shape == (4, 2)


def test_weights_that_the_user_gave_stay(iris):
    X, y = iris
    found = search().fit(X, y, sample_weight=1.0 + (y == 1))
    valid = found.best_response_.folds[0].valid
    expected = 1.0 + (valid.y == 1)
    assert_allclose(valid.weight, expected / expected.mean(), rtol=1e-6)
    with_zeros = search().fit(X, y, sample_weight=(np.arange(len(X)) % 5 > 0).astype(float))
    never_seen = with_zeros.history_["sample_weight"][-1][::5]
    assert_allclose(never_seen, 1.0)  # rows of weight zero are left out: nothing to learn about them


def test_regressors_too():
    X = np.random.default_rng(0).normal(size=(60, 3))
    net = TorchRegressor(MLP(hidden=(8,)), max_epochs=5, random_state=0)
    assert np.unique(search(net).fit(X, X[:, 0]).history_["sample_weight"][-1]).size > 50


def test_a_grain_makes_no_sense(iris):
    with pytest.raises(ValueError, match="needs something that has such a shape"):
        search(space={"sample_weight": per_layer(uniform(0, 2))}).fit(*iris)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_flipped_labels_are_found_and_the_model_without_them_is_better(seed):
    """40% of the training labels of digits flipped, 250 clean rows to validate on."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X / 16, y, test_size=0.3, random_state=seed, stratify=y)
    rng = np.random.default_rng(seed)
    training = np.arange(len(y)) >= 250
    flipped = training & (rng.random(len(y)) < 0.4)
    noisy = np.where(flipped, (y + rng.integers(1, 10, len(y))) % 10, y)
    net = TorchClassifier(MLP(hidden=(64,)), random_state=seed)
    found = search(net, cv=PredefinedSplit(np.where(training, -1, 0)), scoring="neg_log_loss").fit(X, noisy)
    weight = found.best_params_["sample_weight"]
    assert roc_auc_score(flipped[training], -weight[training]) >= 0.9
    untuned = clone(net).fit(X, noisy)
    assert log_loss(y_test, found.predict_proba(X_test)) < 0.7 * log_loss(y_test, untuned.predict_proba(X_test))


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e37, 1e300])
def test_the_scale_of_the_users_weights_means_nothing(iris, scale):
    X, y = iris
    weight = 1.0 + (y == 1)
    net, space = TorchClassifier(MLP(hidden=(8,)), max_epochs=3, random_state=0), {"weight_decay": loguniform(1e-6, 1)}
    for model in (net, HyperTrainingSearchCV(net, space, cv=3, random_state=0)):
        expected = clone(model).fit(X, y, sample_weight=weight).predict_proba(X)
        assert_allclose(clone(model).fit(X, y, sample_weight=scale * weight).predict_proba(X), expected, rtol=1e-4)


def test_a_fold_that_validates_on_rows_without_weight_is_refused_by_name(iris):
    X, y = iris
    net = TorchClassifier(MLP(hidden=(8,)), max_epochs=2, random_state=0)
    own = HyperTrainingSearchCV(net, {"weight_decay": loguniform(1e-6, 1)}, cv=KFold(3, shuffle=True, random_state=0))
    (_, first), *_ = own.cv.split(X, y)
    weight = np.ones(len(X))
    weight[first] = 0.0
    with pytest.raises(ValueError, match=r"zero for all 50 validation rows of a fold.*choose folds \(cv\)"):
        own.fit(X, y, sample_weight=weight)


def test_a_first_row_without_weight_is_no_obstacle_to_values_by_feature_in_a_pipeline(iris):
    X, y = iris
    net = make_pipeline(StandardScaler(), TorchClassifier(MLP(hidden=(8,)), max_epochs=2, random_state=0))
    space = {"torchclassifier__weight_decay": per_feature(loguniform(1e-6, 1))}
    weight = (np.arange(len(X)) > 0).astype(float)
    own = HyperTrainingSearchCV(net, space, cv=3, random_state=0, evaluate="hypernetwork")
    assert own.fit(X, y, torchclassifier__sample_weight=weight).best_score_ > 0
