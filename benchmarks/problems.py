"""What is tuned: data, estimator, folds and space. Solvers never see the test rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.model_selection import KFold, PredefinedSplit, StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from skorch import NeuralNetClassifier

from benchmarks import mnist
from benchmarks.modules import Perceptron
from hypertune import MLP, TorchClassifier, TorchRegressor, per_feature, per_layer, per_unit
from hypertune.choices import own_values
from hypertune.folds import net_of
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
    scoring : str
    choices : mapping from str to list
        Parameters of the estimator that get one of some values; its own is among them.
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

    scoring: str = "neg_log_loss"
    choices: Mapping[str, list[Any]] = field(default_factory=dict)

    def loss(self, score: Any) -> float:
        """What is lacking to the best possible score; lower is better. The losses themselves, of scorers that are named "neg_…"."""
        return (0.0 if self.scoring.startswith("neg_") else 1.0) - float(score)

    @property
    def prefix(self) -> str:
        """What precedes the net's own parameter names."""
        return f"{self.estimator.steps[-1][0]}__" if isinstance(self.estimator, Pipeline) else ""

    @property
    def coordinates(self) -> Space:
        """The space with every hyperparameter of a finer grain resolved, so that a black-box search can name each number."""
        net = clone(net_of(self.estimator))
        rows = net._encode(self.X, self.y)
        objective = net._make_objective(net._build_module())
        space = Space.from_distributions(self.space, self.prefix)
        return space.resolve(arrangements(net, objective, space, rows.x[:2], len(self.X)))

    @property
    def current(self) -> dict[str, Any]:
        """The estimator's own setting, inside the declared bounds: where every solver starts."""
        own = {f"{self.prefix}{name}": value for name, value in net_of(self.estimator).get_params().items()}
        space = self.coordinates
        return space.decode(space.encode({name: own[name] for name in space.names})) | own_values(self.choices, own)


# --- small tables -----------------------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[..., Any]] = {
    "breast_cancer": load_breast_cancer,
    "wine": load_wine,
    "iris": load_iris,
    "diabetes": load_diabetes,
    "digits": load_digits,
}
_DECAY = loguniform(1e-6, 1e1)
SPACES: dict[str, dict[str, Any]] = {  # by what they hold; all under the net's own names
    "decay": {"weight_decay": _DECAY},
    "three": {"weight_decay": _DECAY, "module__dropout": uniform(0, 0.8), "input_noise": uniform(0, 1)},
    "five": {
        "weight_decay": _DECAY,
        "label_smoothing": uniform(0, 0.3),
        "input_noise": uniform(0, 1),
        "module__input_dropout": uniform(0, 0.8),
        "module__dropout": uniform(0, 0.8),
    },
}
SPACES["six"] = SPACES["five"] | {"mixup": uniform(0, 1)}
SPACES["layers"] = SPACES["six"] | {"weight_decay": per_layer(_DECAY), "l1": per_layer(loguniform(1e-7, 1e0))}
SPACES["features"] = {"weight_decay": per_feature(_DECAY), "module__dropout": uniform(0, 0.8)}
SPACES["units"] = SPACES["five"] | {"weight_decay": per_unit(_DECAY)}


def table(
    name: str,
    seed: int,
    data: str,
    space: str,
    *,
    rows: int | None = None,
    flipped: float = 0.0,
    noise_features: int = 0,
) -> Problem:
    """A table of scikit-learn's, 60/40 split, standardised; MLP 64-64 with the estimator's defaults; 3 folds.

    Parameters
    ----------
    data : str
        One of :data:`LOADERS`.
    space : str
        One of :data:`SPACES`.
    rows : int, optional
        Keep so many rows to tune on.
    flipped : float
        Share of the labels to tune on that are replaced by others; test labels stay.
    noise_features : int
        Columns of noise to add.
    """
    X, y = LOADERS[data](return_X_y=True)
    rng, regression = np.random.default_rng(seed), data == "diabetes"
    if noise_features:
        X = np.column_stack([X, X.std() * rng.normal(size=(len(X), noise_features))])
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.4, random_state=seed, stratify=None if regression else y)
    if rows:
        X, _, y, _ = train_test_split(X, y, train_size=rows, random_state=seed, stratify=None if regression else y)
    if flipped:
        wrong, classes = rng.random(len(y)) < flipped, y.max() + 1
        y = np.where(wrong, (y + rng.integers(1, classes, len(y))) % classes, y)
    net = (TorchRegressor if regression else TorchClassifier)(MLP(hidden=(64, 64)), random_state=seed)
    names = {k: v for k, v in SPACES[space].items() if not (regression and k == "label_smoothing")}
    if regression:  # losses in units of the target's variance
        y, y_test = (y - y.mean()) / y.std(), (y_test - y.mean()) / y.std()
    return Problem(
        name,
        seed,
        make_pipeline(StandardScaler(), net),
        {f"{type(net).__name__.lower()}__{k}": v for k, v in names.items()},
        (KFold if regression else StratifiedKFold)(3, shuffle=True, random_state=seed),
        X, y, X_test, y_test,
        scoring="neg_mean_squared_error" if regression else "neg_log_loss",
    )  # fmt: skip


def digits(seed: int) -> Problem:
    """scikit-learn's digits, 5 hyperparameters."""
    return table("digits", seed, "digits", "five")


# --- MNIST -----------------------------------------------------------------------------------------------------------------------

MNIST_SPACE = {
    "weight_decay": loguniform(1e-6, 1e0),
    "label_smoothing": uniform(0, 0.3),
    "input_noise": uniform(0, 0.5),
    "module__dropout_0": uniform(0, 0.8),
    "module__dropout_1": uniform(0, 0.8),
    "module__dropout_2": uniform(0, 0.8),
}


def mnist_mlp(
    seed: int,
    directory: str | None,
    *,
    name: str = "mnist-mlp",
    rows: int = 5_000,
    valid_rows: int = 10_000,
    epochs: int = 40,
    per_unit_decay: bool = False,
) -> Problem:
    """784-256-256-10 on MNIST images, validated on the last training images; 6 hyperparameters, one split.

    The images are the seed's own draw from the first 50,000. Inputs in [0, 1]; Adam 1e-3, cosine, batch 250 (at most a tenth of
    the rows).
    """
    batch = min(250, rows // 10)
    estimator = TorchClassifier(mnist.three_dropouts, lr=1e-3, batch_size=batch, max_epochs=epochs, random_state=seed)
    space = MNIST_SPACE | ({"weight_decay": per_unit(MNIST_SPACE["weight_decay"])} if per_unit_decay else {})
    return _on_mnist(name, seed, directory, estimator, space, rows=rows, valid_rows=valid_rows)


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


# --- the arena ---------------------------------------------------------------------------------------------------------------------


def _table(seed: int, directory: str | None, *, name: str, of: dict[str, Any]) -> Problem:
    return table(name, seed, **of)


_TABLES: dict[str, dict[str, Any]] = {
    "iris-3": {"data": "iris", "space": "three"},
    "wine-6": {"data": "wine", "space": "six"},
    "cancer-6": {"data": "breast_cancer", "space": "six"},
    "diabetes-5": {"data": "diabetes", "space": "six"},
    "digits-1": {"data": "digits", "space": "decay"},
    "digits-6": {"data": "digits", "space": "six"},
    "digits200-6": {"data": "digits", "space": "six", "rows": 200},
    "digits-flipped-6": {"data": "digits", "space": "six", "flipped": 0.2},
    "digits-noise-6": {"data": "digits", "space": "six", "noise_features": 50},
    "digits-11": {"data": "digits", "space": "layers"},
    "cancer-33": {"data": "breast_cancer", "space": "features"},
    "diabetes-noise-63": {"data": "diabetes", "space": "features", "noise_features": 50},
}
ARENA: dict[str, Callable[[int, str | None], Problem]] = {
    name: partial(_table, name=name, of=of) for name, of in _TABLES.items()
} | {
    "mnist1000-6": partial(mnist_mlp, name="mnist1000-6", rows=1_000, valid_rows=2_000),
    "mnist1000-527": partial(mnist_mlp, name="mnist1000-527", rows=1_000, valid_rows=2_000, per_unit_decay=True),
    "mnist5000-6": partial(mnist_mlp, name="mnist5000-6", valid_rows=5_000),
    "mnist20000-6": partial(mnist_mlp, name="mnist20000-6", rows=20_000, valid_rows=5_000, epochs=15),
    "mnist5000-conv-8": mnist_conv,
}


def _with_rate(seed: int, directory: str | None, *, of: Callable[[int, str | None], Problem]) -> Problem:
    """The same problem with the learning rate in the space, over three decades; all start from the estimator's own."""
    problem = of(seed, directory)
    space = problem.space | {f"{problem.prefix}lr": loguniform(1e-4, 1e-1)}
    return replace(problem, name=f"{problem.name}+lr", space=space)


_RATED = (
    "wine-6",
    "diabetes-5",
    "cancer-6",
    "digits200-6",
    "digits-6",
    "mnist1000-6",
    "mnist5000-6",
    "mnist5000-conv-8",
)
RATES = {f"{name}+lr": partial(_with_rate, of=ARENA[name]) for name in _RATED}

_SIZES: dict[str, list[Any]] = {
    "module__hidden": [(16,), (64, 64), (256,), (128, 128), (64, 64, 64)],
    "batch_size": [16, 64, 256],
}
_MNIST_SIZES: dict[str, list[Any]] = {"module__width": [64, 256, 512], "batch_size": [50, 100, 250]}
_SMALL = {"module__hidden": (16,), "batch_size": 256}


def _with_sizes(
    seed: int, directory: str | None, *, of: Callable[[int, str | None], Problem], own: Mapping[str, Any]
) -> Problem:
    """The same problem with learning rate, layers and batch size in the space; all start from the estimator's own, or from ``own``."""
    problem = _with_rate(seed, directory, of=of)
    sizes = _MNIST_SIZES if "mnist" in problem.name else _SIZES
    estimator = clone(problem.estimator).set_params(**{problem.prefix + name: value for name, value in own.items()})
    return replace(
        problem,
        name=problem.name.replace("+lr", "+small" if own else "+net"),
        estimator=estimator,
        choices={problem.prefix + name: values for name, values in sizes.items()},
    )


_SIZED = ("cancer-6", "digits200-6", "digits-6")
SIZES = {f"{name}+net": partial(_with_sizes, of=ARENA[name], own={}) for name in (*_SIZED, "mnist1000-6")} | {
    f"{name}+small": partial(_with_sizes, of=ARENA[name], own=_SMALL) for name in _SIZED
}


# --- skorch nets ---------------------------------------------------------------------------------------------------------------------

_SKORCH_NAMES = {"weight_decay": "optimizer__weight_decay", "label_smoothing": "criterion__label_smoothing"}


def _in_skorch(seed: int, directory: str | None, *, of: Callable[[int, str | None], Problem]) -> Problem:
    """The same problem for a skorch net with as many units, and what it can tune: no noise on inputs, and the learning rate."""
    problem = of(seed, directory)
    net = NeuralNetClassifier(
        Perceptron,
        module__features=problem.X.shape[1],
        module__outputs=len(np.unique(problem.y)),
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=3e-3,
        max_epochs=100,
        batch_size=64,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    )
    names = {name.removeprefix(problem.prefix): prior for name, prior in problem.space.items()}
    space = {
        _SKORCH_NAMES.get(name, name): prior for name, prior in names.items() if name not in ("input_noise", "mixup")
    }
    return replace(
        problem,
        name=problem.name.replace("-6+lr", "-5+skorch"),
        estimator=make_pipeline(StandardScaler(), FunctionTransformer(_single), net),
        space={f"neuralnetclassifier__{name}": prior for name, prior in space.items()},
    )


def _single(X: np.ndarray) -> np.ndarray:
    return X.astype(np.float32)


SKORCH = {
    f"{name}-5+skorch": partial(_in_skorch, of=RATES[f"{name}-6+lr"])
    for name in ("wine", "cancer", "digits200", "digits")
}
