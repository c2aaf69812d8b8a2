"""Shared data; torch in one thread, so that small tests do not fight for cores."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.preprocessing import StandardScaler

from hypertune.retraining import Retrained
from tests.ridge import Exact
from tests.searches import search


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def iris() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_iris(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture(scope="session")
def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture
def no_training(monkeypatch) -> None:
    """Whoever begins to train fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("training has begun")

    monkeypatch.setattr("hypertune.training.Minibatches", refuse)
    for room in ("base", "starts", "retraining"):
        monkeypatch.setattr(f"hypertune.{room}.Minibatches", refuse)


@pytest.fixture
def used(monkeypatch) -> list[bool]:
    """What the retrained candidates answered to the fits that asked for their weights."""
    answers: list[bool] = []
    own = Retrained.fit_known

    def recorded(self, net, rows):
        answers.append(own(self, net, rows))
        return answers[-1]

    monkeypatch.setattr(Retrained, "fit_known", recorded)
    return answers


@pytest.fixture(scope="session")
def fitted(iris):
    """The search of tests/searches.py, fitted."""
    return search().fit(*iris)


@pytest.fixture
def exact() -> Exact:
    return Exact()
