"""What is tuned: data, estimator, folds and space. Solvers never see the test rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import PredefinedSplit, StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import mnist
from hypertune import MLP, TorchClassifier, per_layer
from hypertune.space import Space
from hypertune.tunable import arrangements


@dataclass(frozen=True)
class Problem:
    """One seed of one problem.

    Parameters
    ----------
    name : str
    seed : int
    estimator : estimator
        With its default setting, which is what every solver starts from.
    space : dict from str to scipy.stats distribution
    cv : splitter
        The folds, the same for every solver.
    X, y, X_test, y_test : ndarray
        Rows to tune on, and held-out rows that only the report sees.
    refit_rows : int or None
        How many of the first rows of X the reported model is trained on once the search is over; None means all.
    """

    name: str
    seed: int
    estimator: Any
    space: dict[str, Any]
    cv: Any
    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    refit_rows: int | None = None

    @property
    def coordinates(self) -> Space:
        """The space with every hyperparameter of a finer grain resolved, so that a black-box search can name each number."""
        step = self.estimator.steps[-1] if isinstance(self.estimator, Pipeline) else ("", self.estimator)
        prefix = f"{step[0]}__" if step[0] else ""
        net = clone(step[1])
        rows = net._encode(self.X, self.y)
        space = Space.from_distributions(self.space)
        return space.resolve(
            arrangements(net, net._make_objective(net._build_module()), space, prefix, rows.x[:2], len(self.X))
        )


def digits(seed: int) -> Problem:
    """scikit-learn's digits, 60/40 split, MLP 64-64, 5 hyperparameters, 3 folds."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.4, random_state=seed, stratify=y)
    step = "torchclassifier__"
    return Problem(
        "digits",
        seed,
        make_pipeline(StandardScaler(), TorchClassifier(MLP(hidden=(64, 64)), random_state=seed)),
        {
            step + "weight_decay": loguniform(1e-6, 1e1),
            step + "label_smoothing": uniform(0, 0.3),
            step + "input_noise": uniform(0, 1),
            step + "module__input_dropout": uniform(0, 0.8),
            step + "module__dropout": uniform(0, 0.8),
        },
        StratifiedKFold(3, shuffle=True, random_state=seed),
        X, y, X_test, y_test,
    )  # fmt: skip


MNIST_SPACE = {
    "weight_decay": loguniform(1e-6, 1e0),
    "label_smoothing": uniform(0, 0.3),
    "input_noise": uniform(0, 0.5),
    "module__dropout_0": uniform(0, 0.8),
    "module__dropout_1": uniform(0, 0.8),
    "module__dropout_2": uniform(0, 0.8),
}


def mnist_mlp(seed: int, directory: str | None) -> Problem:
    """784-256-256-10 on 5,000 MNIST images, validated on the last 10,000 training images; 6 hyperparameters, one split.

    The 5,000 images are the seed's own draw from the first 50,000. Inputs in [0, 1]; Adam 1e-3, cosine, batch 250,
    40 epochs.
    """
    estimator = TorchClassifier(mnist.three_dropouts, lr=1e-3, batch_size=250, max_epochs=40, random_state=seed)
    return _on_mnist("mnist-mlp", seed, directory, estimator, MNIST_SPACE, rows=5_000, valid_rows=10_000)


def mnist_conv(seed: int, directory: str | None) -> Problem:
    """A small ConvNet with BatchNorm on 5,000 MNIST images, 8 hyperparameters: one weight decay for each of 4 layers, 3 dropout
    rates, label smoothing. Adam 3e-3, cosine, batch 100, 15 epochs; validated on 5,000 others.
    """
    estimator = TorchClassifier(mnist.convnet, lr=3e-3, batch_size=100, max_epochs=15, random_state=seed)
    space = {
        "weight_decay": per_layer(loguniform(1e-6, 1e0)),
        "label_smoothing": uniform(0, 0.3),
        "module__dropout_0": uniform(0, 0.8),
        "module__dropout_1": uniform(0, 0.8),
        "module__dropout_2": uniform(0, 0.8),
    }
    return _on_mnist("mnist-conv", seed, directory, estimator, space, rows=5_000, valid_rows=5_000, images=True)


def _on_mnist(
    name: str,
    seed: int,
    directory: str | None,
    estimator: Any,
    space: dict[str, Any],
    *,
    rows: int,
    valid_rows: int,
    images: bool = False,
) -> Problem:
    """The seed's own draw from the first 50,000 images, validated on the last training images."""
    X, y, X_test, y_test = mnist.load(directory)
    if images:
        X, X_test = (Z.reshape(-1, 1, 28, 28) for Z in (X, X_test))
    drawn = np.random.default_rng(seed).choice(50_000, rows, replace=False)
    valid = slice(60_000 - valid_rows, 60_000)
    return Problem(
        name,
        seed,
        estimator,
        space,
        PredefinedSplit(np.r_[np.full(rows, -1), np.zeros(valid_rows, dtype=int)]),
        np.concatenate([X[drawn], X[valid]]),
        np.concatenate([y[drawn], y[valid]]),
        X_test, y_test,
        refit_rows=rows,
    )  # fmt: skip
