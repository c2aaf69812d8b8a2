"""Several labels for each row: what TorchClassifier makes of a y with a column for each, and the search around it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_array
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import make_multilabel_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, PredefinedSplit, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, check_hypergradient, per_feature
from hypertune.losses import binary_cross_entropy, cross_entropy, labels_squared_error, nats_per_unit, output_scale


@pytest.fixture(scope="module")
def labelled() -> tuple[np.ndarray, np.ndarray]:
    X, Y = make_multilabel_classification(120, n_features=12, n_classes=4, random_state=0)
    return StandardScaler().fit_transform(X), Y


NET = TorchClassifier(MLP(hidden=(16,)), max_epochs=20, lr=1e-2, random_state=0)


def test_the_losses_are_those_of_as_many_problems_of_two_classes():
    torch.manual_seed(0)
    outputs, y, smoothing = torch.randn(2, 5, 3), torch.randint(0, 2, (2, 5, 3)), torch.tensor([[0.1], [0.3]])
    two_classes = torch.stack([torch.zeros_like(outputs), outputs], dim=-1)
    for s in (0.0, smoothing):
        own = cross_entropy(two_classes, y, s if s is not smoothing else s[..., None]).mean(dim=-1)
        assert_allclose(binary_cross_entropy(outputs, y.float(), s), own, rtol=1e-5)
    assert_allclose(binary_cross_entropy(outputs, y.float()).mean(), nn.BCEWithLogitsLoss()(outputs, y.float()))
    smoothed = y * (1 - smoothing[..., None]) + smoothing[..., None] / 2
    assert_allclose(labels_squared_error(outputs, y.float(), smoothing), (outputs - smoothed).square().mean(-1))
    assert output_scale(binary_cross_entropy, y.float()) == 1
    assert float(nats_per_unit(binary_cross_entropy, torch.tensor(0.4), 3)) == 3


def test_a_linear_model_is_a_logistic_regression_for_each_label(labelled):
    X, Y = labelled
    weight_decay = 0.02
    net = TorchClassifier(
        MLP(hidden=()), weight_decay=weight_decay, batch_size=120, lr=0.05, max_epochs=1500, dtype="float64", random_state=0
    ).fit(X, Y)  # fmt: skip
    logistic = OneVsRestClassifier(LogisticRegression(C=1 / (weight_decay * Y.size), tol=1e-8)).fit(X, Y)
    assert_allclose(net.predict_proba(X), logistic.predict_proba(X), atol=1e-4)
    assert_allclose(np.exp(net.predict_log_proba(X)), net.predict_proba(X))
    assert_array_equal(net.predict(X), logistic.predict(X))
    assert net.predict(X).dtype == Y.dtype
    assert_array_equal(net.classes_, [[0, 1]] * 4)
    assert net.score(X, Y) == (net.predict(X) == Y).all(axis=1).mean()


@pytest.mark.parametrize("criterion", ["squared_error", nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2, 1, 1]))])
def test_other_criteria(labelled, criterion):
    X, Y = labelled
    net = clone(NET).set_params(criterion=criterion).fit(X, Y)
    P = net.predict_proba(X)
    assert P.min() >= 0
    assert P.max() <= 1
    assert_array_equal(net.predict(X), P > 0.5)
    assert roc_auc_score(Y, P) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [False, True])
def test_the_search_tunes_it_and_its_scores_are_those_of_fits_of_their_own(labelled, smoothing):
    X, Y = labelled
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8), "mixup": uniform(0, 1)}
    if smoothing:
        space |= {"label_smoothing": uniform(0, 0.3)}
    search = HyperTrainingSearchCV(NET, space, cv=3, scoring="roc_auc", random_state=0).fit(X, Y)
    for params, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        own = cross_val_score(clone(NET).set_params(**params), X, Y, cv=3, scoring="roc_auc")
        assert score == pytest.approx(own.mean(), abs=1e-3)
    assert len(search.cv_results_["params"]) >= 3  # stacked, and screened
    assert search.best_score_ >= cross_val_score(NET, X, Y, cv=3, scoring="roc_auc").mean() - 1e-3
    assert search.predict_proba(X).shape == Y.shape
    assert search.history_["validation_loss"][-1] < search.history_["validation_loss"][0]


def test_two_labels_are_no_two_classes(labelled):
    """scikit-learn's scorers look at classes_."""
    X, Y = labelled
    search = HyperTrainingSearchCV(
        clone(NET).set_params(max_epochs=3), {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0, refit="roc_auc",
        scoring=["roc_auc", "average_precision", "f1_micro", "accuracy"], error_score="raise",
    ).fit(X, Y[:, :2])  # fmt: skip
    assert search.predict_proba(X).shape == (120, 2)
    assert search.best_score_ > 0.5


def test_labels_of_any_form_with_weights_and_without_retraining(labelled):
    X, Y = labelled
    rare = Y.copy()
    rare[:, 3] = np.arange(120) == 5  # no fold validates and trains on it
    weight = np.linspace(0.5, 2, 120)
    found = []
    for form in (rare, rare.tolist(), pd.DataFrame(rare, columns=list("abcd")), rare.astype(bool), rare.astype(float)):
        search = HyperTrainingSearchCV(
            clone(NET).set_params(max_epochs=5), {"weight_decay": loguniform(1e-6, 1e1)}, cv=KFold(3), random_state=0, evaluate="hypernetwork"
        ).fit(X, form, sample_weight=weight)  # fmt: skip
        found.append(search.predict_proba(X))
        assert_array_equal(search.best_response_.estimator_at(fold=1).predict_proba(X).shape, Y.shape)
    for other in found[1:]:
        assert_array_equal(other, found[0])


def test_a_validation_label_that_is_no_zero_or_one_is_refused(labelled):
    X, Y = labelled
    wrong = Y.copy()
    wrong[100, 0] = 2
    search = HyperTrainingSearchCV(
        NET, {"weight_decay": loguniform(1e-6, 1e1)}, cv=PredefinedSplit(np.r_[[-1] * 90, [0] * 30])
    )
    with pytest.raises(ValueError, match="zeros and ones for each label"):
        search.fit(X, wrong)


def test_its_hypergradient_is_right(labelled):
    net = TorchClassifier(MLP(hidden=()), weight_decay=0.05, batch_size=120, lr=0.02, max_epochs=600, random_state=0)
    search = HyperTrainingSearchCV(
        net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}, algorithm="implicit", cv=2, random_state=0
    )
    check = check_hypergradient(search, *labelled)
    assert check.cosine > 0.99
    assert 0.9 < check.ratio < 1.1


def test_what_is_no_column_of_zeros_and_ones_for_each_label_is_refused(labelled):
    X, Y = labelled
    for y in (2 * Y, Y + np.arange(4), csr_array(Y)):
        with pytest.raises(ValueError, match=r"zeros and ones for each label.*MultiOutputClassifier"):
            clone(NET).fit(X, y)
    with pytest.raises(ValueError, match="continuous-multioutput"):
        clone(NET).fit(X, Y + 0.5)
    with pytest.raises(ValueError, match="one column per label"):
        clone(NET).set_params(module=lambda n_features_in, n_outputs: nn.Linear(n_features_in, 2)).fit(X, Y)
    several = MultiOutputClassifier(clone(NET).set_params(max_epochs=2)).fit(X, Y + np.arange(4))
    assert several.predict(X).shape == Y.shape


def test_after_labels_it_takes_classes_again(labelled):
    X, Y = labelled
    net = clone(NET).fit(X, Y)
    assert net.fit(X, Y[:, 0]).predict(X).shape == (120,)
    with pytest.warns(match="column-vector y"):
        assert net.fit(X, Y[:, :1]).predict_proba(X).shape == (120, 2)
