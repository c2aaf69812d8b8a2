"""Displays of what a search learned."""

from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.exceptions import NotFittedError

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, per_unit
from hypertune.plotting import PathDisplay, ResponseDisplay

matplotlib.use("Agg")
SPACE = {
    "weight_decay": loguniform(1e-6, 1e1),
    "module__dropout": uniform(0, 0.8),
    "l1": per_unit(loguniform(1e-6, 1e0)),
}


def search(**params) -> HyperTrainingSearchCV:
    net = TorchClassifier(MLP(hidden=(4,)), max_epochs=10, random_state=0)
    return HyperTrainingSearchCV(net, SPACE, cv=3, random_state=0, **params)


@pytest.fixture(scope="module")
def fitted(iris):
    return search().fit(*iris)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_the_response_is_drawn_with_its_band_around_the_tuned_value(fitted):
    drawn = ResponseDisplay.from_search(fitted, "weight_decay")
    response = fitted.best_response_
    assert_allclose(drawn.losses, response.validation_curve("weight_decay", drawn.values))
    assert_allclose(drawn.band, response.validation_band("weight_decay", drawn.values))
    assert drawn.tuned == response.params["weight_decay"]
    assert 1e-6 <= drawn.values.min() < drawn.tuned / np.e < drawn.tuned * np.e < drawn.values.max() <= 1e1
    *folds, mean, tuned = drawn.ax_.lines
    assert len(folds) == 3
    assert_allclose(mean.get_ydata(), drawn.losses.mean(axis=1))
    assert_allclose(tuned.get_xdata(), drawn.tuned)
    assert (drawn.ax_.get_xscale(), drawn.ax_.get_xlabel()) == ("log", "weight_decay")
    assert drawn.figure_ is drawn.ax_.figure
    rate = ResponseDisplay.from_search(fitted, "module__dropout", coverage=0.5)
    assert len(np.unique(rate.values)) == len(rate.values) < len(drawn.values)  # a bound is looked at once
    assert rate.ax_.get_xscale() == "linear"
    assert_allclose(rate.band, response.validation_band("module__dropout", rate.values, coverage=0.5))


def test_it_is_drawn_where_one_says(fitted):
    _, ax = plt.subplots()
    drawn = ResponseDisplay.from_search(fitted, "weight_decay", values=[1e-3, 1e-2], ax=ax)
    assert drawn.ax_ is ax
    assert drawn.values.tolist() == [1e-3, 1e-2]
    assert drawn.losses.shape == (2, 3)
    far = ResponseDisplay.from_search(fitted, "weight_decay", values=[1e-6, 1e-3, drawn.tuned, 1e1])
    assert not np.isfinite(far.band).all()  # it ends four units away, and is drawn as far as it goes
    (band,) = far.ax_.collections
    assert np.isfinite(band.get_paths()[0].vertices).all()


def test_without_a_band_it_stays_near(iris):
    drawn = ResponseDisplay.from_search(search(hypernetwork="gated").fit(*iris), "weight_decay")
    assert drawn.band is None
    assert drawn.values.max() <= drawn.tuned * np.e * 1.001


def test_the_path_of_each_hyperparameter_and_the_losses(fitted):
    drawn = PathDisplay.from_search(fitted)
    drawn.history = dict(drawn.history)
    losses, decay, rate, l1 = drawn.axes_
    assert_allclose(losses.lines[1].get_ydata(), fitted.history_["validation_loss"])
    assert_allclose(decay.lines[0].get_ydata(), fitted.history_["weight_decay"])
    assert [ax.get_yscale() for ax in (decay, rate, l1)] == ["log", "linear", "log"]
    for ax in (decay, l1):  # what moved by less than a unit of λ does not look as if it had
        low, high = ax.get_ylim()
        assert high / low >= np.e * 0.999
    assert len(l1.lines) == fitted.history_["l1"].shape[1] == 7
    drawn.history["l1"] = np.ones((len(drawn.history["epoch"]), 1_000_000))
    assert len(drawn.plot().axes_[3].lines) == 100
    _, axes = plt.subplots(2, 2)
    assert PathDisplay.from_search(fitted, axes=axes).axes_[3] is axes[1, 1]


def test_what_cannot_be_drawn_is_refused(fitted, iris, monkeypatch):
    with pytest.raises(NotFittedError):
        ResponseDisplay.from_search(search(), "weight_decay")
    with pytest.raises(NotFittedError):
        PathDisplay.from_search(search())
    for name in ("l1", "lr"):
        with pytest.raises(
            ValueError, match=r"not a hyperparameter of one number.*\['weight_decay', 'module__dropout'\]"
        ):
            ResponseDisplay.from_search(fitted, name)
    with pytest.raises(ValueError, match="axes must be 4"):
        PathDisplay.from_search(fitted, axes=plt.subplots(1, 2)[1])
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="hypertune\\[plot\\]"):
        PathDisplay.from_search(fitted)
