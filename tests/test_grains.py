"""Hyperparameters of a finer grain: per layer, unit, weight and feature."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hypertune import (
    MLP,
    HyperTrainingSearchCV,
    TorchClassifier,
    TorchRegressor,
    model_factory,
    per_feature,
    per_layer,
    per_unit,
    per_weight,
)
from hypertune.batches import Batch
from hypertune.space import Space

NET = TorchClassifier(MLP(hidden=(8,)), max_epochs=4, lr=1e-2, weight_decay=1e-3, random_state=0)
PRIOR = loguniform(1e-6, 1e1)
GRAINS = {"layer": per_layer, "unit": per_unit, "weight": per_weight, "feature": per_feature}
SHAPES = {
    "layer": {"1.weight": (), "4.weight": ()},
    "unit": {"1.weight": (8, 1), "4.weight": (3, 1)},
    "weight": {"1.weight": (8, 4), "4.weight": (3, 8)},
    "feature": {"1.weight": (1, 4), "4.weight": ()},
}


def search(estimator, space, **params) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(
        estimator, space, cv=3, random_state=0, error_score="raise", start="estimator", **params
    )


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", ["weight_decay", "l1"])
@pytest.mark.parametrize("algorithm", ["joint", "global", "simplified"])
def test_every_grain_of_every_penalty_moves_and_comes_back_as_the_estimator_takes_it(iris, grain, name, algorithm):
    X, y = iris
    found = search(NET, {name: GRAINS[grain](PRIOR)}, algorithm=algorithm).fit(X, y)
    value = found.best_response_.params[name]
    assert {k: np.shape(v) for k, v in value.items()} == SHAPES[grain]
    assert all(type(v) is float or isinstance(v, np.ndarray) for v in value.values())
    path = found.history_[name]
    assert path.shape[1] == sum(int(np.prod(shape)) for shape in SHAPES[grain].values())
    assert np.isfinite(path).all()
    assert (path[-1] != path[0]).any()
    if algorithm != "simplified":  # one displacement for all coordinates cannot tell those of a dense map apart
        assert np.unique(path[-1]).size > 1
    model = clone(NET).set_params(**found.best_params_).fit(X, y)
    assert_allclose(model.predict_proba(X), found.predict_proba(X), rtol=1e-5)
    assert len(found.cv_results_["params"]) == 2


@pytest.mark.parametrize("hypernetwork", ["linear", "low_rank", "mlp", "gated"])
def test_every_hypernetwork_takes_a_mixture_of_grains(iris, hypernetwork):
    space = {
        "weight_decay": per_unit(PRIOR),
        "l1": per_layer(PRIOR),
        "input_noise": per_feature(uniform(0, 1)),
        "module__dropout": uniform(0, 0.5),
    }
    net = clone(NET).set_params(input_noise=[0.1, 0.2, 0.1, 0.2], module__dropout=0.1)
    found = search(net, space, hypernetwork=hypernetwork).fit(*iris)
    for name in space:
        assert (found.history_[name][0] != found.history_[name][-1]).any(), name
    assert found.best_response_.params["input_noise"].shape == (4,)
    assert found.best_response_.estimator_at(found.best_response_.params).score(*iris) > 0.5


@pytest.mark.parametrize("grain", GRAINS)
def test_the_tuned_loss_is_the_loss_that_the_estimator_trains(iris, grain):
    """The training loss at λ in the hyper-training, against the estimator's own at ``decode(λ)``, row for row."""
    from hypertune.batches import Minibatches
    from hypertune.problem import make_problem
    from hypertune.task import stack

    tuned = search(NET, {"weight_decay": GRAINS[grain](PRIOR), "l1": GRAINS[grain](PRIOR)})
    tuned.fit(*iris)
    space, folds = tuned.best_response_.space, tuned.best_response_.folds
    X, y = iris
    net = clone(NET)
    rows = net._encode(X, y)
    folds = [type(folds[0])(net, None, rows, rows)]
    _, objective = stack(space, folds, len(X), 0)
    problem = make_problem(space, objective, folds, Minibatches([rows], 64, seed=0), [0], objective.initial_weights())
    lam = space.sample(3, np.random.default_rng(0))
    batch = Batch(rows.x[None], rows.y[None])
    w = torch.randn(1, 3, objective.D) * 0.1
    losses = problem.train_loss(w, lam.float(), batch)[0]
    for row, w_row, loss in zip(lam, w[0], losses, strict=True):
        at = clone(NET).set_params(**space.decode(row))
        at._encode(X, y)
        own = at._make_objective(at._build_module())
        assert_allclose(float(own.train_loss(w_row[None], {}, batch)[0]), float(loss), rtol=1e-5)
        by_hand = float(objective.valid_loss(w_row[None], batch)[0])
        for name, power in (("weight_decay", 0.5 * w_row.square()), ("l1", w_row.abs())):
            weights = {k: p.numpy() for k, p in objective.named(power).items()}
            by_hand += sum((weights[k] * v).sum() for k, v in space.decode(row)[name].items())
        assert_allclose(float(loss), by_hand, rtol=1e-5)


def test_a_space_of_arrays_survives_the_round_trip():
    space = Space.from_distributions({"a": per_unit(PRIOR), "b": uniform(0, 1), "c": per_feature(uniform(0, 2))})
    space = space.resolve({"a": {"x": (2, 1), "y": ()}, "c": (3,)})
    assert space.n == 7
    params = {"a": {"x": np.array([[0.1], [0.2]]), "y": 0.3}, "b": 0.25, "c": np.array([0.5, 1.0, 1.5])}
    back = space.decode(space.encode(params))
    assert_allclose(back["a"]["x"], params["a"]["x"])
    assert type(back["a"]["y"]) is float
    assert_allclose(back["c"], params["c"])
    assert_allclose(space.encode({"a": 0.1, "b": 0.25, "c": 1.0})[:3].exp(), 0.1)  # a number stands for all
    assert space.sample(5, np.random.default_rng(0)).shape == (5, 7)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "copies"), [("joint", 2), ("auto", 1)])
def test_a_hundred_thousand_hyperparameters_fit_in_memory(algorithm: str, copies: int):
    X, y = make_classification(200, 784, n_informative=20, random_state=0)
    net = TorchClassifier(MLP(hidden=(128,)), max_epochs=2, random_state=0)  # 784·128 + 128·2 = 100,608 weights
    found = search(net, {"weight_decay": per_weight(PRIOR)}, algorithm=algorithm).fit(X, y)
    assert found.history_["weight_decay"].shape[1] == 100_608
    phi = found.best_response_.hypernetwork
    assert sum(p.numel() for p in phi.parameters()) == 3 * copies * phi.w0.shape[1]


@pytest.mark.slow
def test_irrelevant_features_get_more_weight_decay_than_relevant_ones():
    X, y = make_regression(150, 12, n_informative=3, noise=30, random_state=0)
    relevant = np.abs(np.corrcoef(X.T, y)[-1, :-1]) > 0.25
    net = make_pipeline(StandardScaler(), TorchRegressor(MLP(hidden=()), max_epochs=150, random_state=0))
    space = {"torchregressor__weight_decay": per_feature(loguniform(1e-4, 1e2))}
    found = search(net, space, hyper_lr=0.15, hyper_eps=1e-3, grain_scale=None, max_epochs=300).fit(
        X, y
    )  # 300 moves: they have to be large
    decay = np.log(found.best_response_.params["torchregressor__weight_decay"]["1.weight"][0])
    assert decay[relevant].max() < decay[~relevant].mean() - 2
    assert np.diff(found.cv_results_["mean_test_score"]) < -0.05  # than the estimator's own


@model_factory
class Behind(nn.Module):
    """What is registered first is not what sees the features."""

    def __init__(self, n, m):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, n))
        self.out, self.first, self.norm = nn.Linear(n, m), nn.Linear(n, n), nn.LayerNorm(n)

    def forward(self, x):
        return self.out(torch.relu(self.first(self.norm(x + self.token))))


class OfCodes(nn.Module):
    """An embedding as wide as there are columns has no column for each of them."""

    def __init__(self, n, m):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, n), nn.Linear(n, m)

    def forward(self, x):
        return self.out(self.embed(x.long()).sum(1))


class Tokens(nn.Module):
    """Of each feature an embedding, as wide as there are features: the layer sees those."""

    def __init__(self, n, m):
        super().__init__()
        self.token, self.first, self.out = nn.Parameter(torch.randn(n, n)), nn.Linear(n, n), nn.Linear(n, m)

    def forward(self, x):
        return self.out(torch.relu(self.first(x[..., None] * self.token)).mean(1))


class Projected(nn.Module):
    """A matrix of its own in front of the first layer."""

    def __init__(self, n, m):
        super().__init__()
        self.matrix, self.first = nn.Parameter(torch.randn(n, n)), nn.Linear(n, m)

    def forward(self, x):
        return self.first(x @ self.matrix)


def normalised(n, m):
    return nn.Sequential(weight_norm(nn.Linear(n, n)), nn.ReLU(), nn.Linear(n, m))


class Behaved(nn.Module):
    """What comes before the first layer leaves features features."""

    def __init__(self, n, m, how="detached"):
        super().__init__()
        self.register_buffer("mask", (torch.arange(n) > 0).float())
        self.scale, self.first, self.how = nn.Parameter(torch.randn(n)), nn.Linear(n, m), how

    def forward(self, x):
        rows = {
            "detached": x.detach(),
            "signs": (x > 0).float(),
            "mask": x * self.mask,
            "scale": x * self.scale,
            "abs": x.abs(),
        }
        return self.first(input=rows[self.how])


@pytest.mark.parametrize("how", ["detached", "signs", "mask", "scale", "abs"])
def test_features_that_are_changed_one_by_one_are_features(iris, how):
    net = TorchClassifier(partial(Behaved, how=how), max_epochs=2, random_state=0)
    search(net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}).fit(*iris)


class Sorted(nn.Module):
    """Rows decide which layer is called."""

    def __init__(self, n, m):
        super().__init__()
        self.first, self.second = nn.Linear(n, m), nn.Linear(n, m)

    def forward(self, x):
        return self.first(x) if len(x) < 5 else self.second(x)


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
def test_a_layer_that_is_not_always_called_is_taken_for_the_first(iris):
    net = TorchClassifier(Sorted, max_epochs=2, random_state=0)
    found = search(net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}).fit(*iris)
    assert np.shape(found.best_params_["weight_decay"]["first.weight"]) == (1, 4)


class Frozen(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.before, self.first = nn.Linear(n, n).requires_grad_(False), nn.Linear(n, m)

    def forward(self, x):
        return self.first(self.before(x))


def frozen(n, m):
    return nn.Sequential(nn.Linear(n, n).requires_grad_(False), nn.ReLU(), nn.Linear(n, m))


@pytest.mark.parametrize("module", [Frozen, frozen])
def test_a_frozen_layer_that_sees_the_features_has_no_values_for_them(iris, module):
    net = TorchClassifier(module, max_epochs=2, random_state=0)
    with pytest.raises(ValueError, match=r"the layer that sees the features, .*, has no weights that are trained"):
        search(net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}).fit(*iris)


@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_layers_behind_others_do_not_see_the_features(iris):
    X, y = iris
    space = {"weight_decay": per_feature(loguniform(1e-4, 1e1))}
    for module in (Tokens, Projected):
        net = TorchClassifier(module, max_epochs=2, random_state=0)
        with pytest.raises(
            ValueError, match=r"'first.weight' .*: what enters that layer is not the features, one for one"
        ):
            HyperTrainingSearchCV(net, space, cv=2, random_state=0).fit(X, y)
    net = TorchClassifier(normalised, max_epochs=2, random_state=0)
    found = HyperTrainingSearchCV(net, space, cv=2, random_state=0).fit(X, y).best_params_["weight_decay"]
    assert np.shape(found["0.parametrizations.weight.original1"]) == (1, 4)
    assert np.shape(found["2.weight"]) == ()


@pytest.mark.parametrize("grain", [per_unit, per_weight])
def test_values_for_units_need_all_classes_in_every_fold(iris, grain):
    X, y = iris
    space = {"weight_decay": grain(loguniform(1e-4, 1e1))}
    cv = [(np.arange(0, 100), np.arange(100, 150)), (np.arange(0, 120), np.arange(120, 150))]
    with pytest.raises(ValueError, match=r"the training rows of fold 0 lack a class.*use StratifiedKFold"):
        HyperTrainingSearchCV(clone(NET), space, cv=cv).fit(X, y)


def test_a_value_for_each_feature_is_one_of_the_layer_that_sees_them(iris):
    X, y = iris
    space = {"weight_decay": per_feature(loguniform(1e-4, 1e1))}
    found = HyperTrainingSearchCV(TorchClassifier(Behind, max_epochs=2, random_state=0), space, cv=2, random_state=0)
    shapes = {name: np.shape(value) for name, value in found.fit(X, y).best_params_["weight_decay"].items()}
    assert shapes == {"token": (), "out.weight": (), "first.weight": (1, 4)}
    codes = HyperTrainingSearchCV(TorchClassifier(OfCodes, max_epochs=2), space, cv=2)
    with pytest.raises(
        ValueError, match=r"the first layer's weight 'embed.weight' .* not one column for each of the 4"
    ):
        codes.fit(np.abs(X).round(), y)


def conv(n_features_in, n_outputs):
    channels = n_features_in[0]
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, n_outputs))


def test_channels_are_units_and_features_of_images():
    X, y = np.random.default_rng(0).normal(size=(30, 2, 4, 4)), np.arange(30) % 3
    net = TorchClassifier(conv, max_epochs=2, random_state=0)
    for grain, shape in ((per_unit, (4, 1, 1, 1)), (per_feature, (1, 2, 1, 1))):
        found = search(net, {"weight_decay": grain(PRIOR)}).fit(X, y)
        assert found.best_response_.params["weight_decay"]["0.weight"].shape == shape
    with pytest.raises(ValueError, match="per_feature noise needs rows of features"):
        search(net, {"input_noise": per_feature(uniform(0, 1))}).fit(X, y)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"label_smoothing": per_layer(uniform(0, 0.3))},
            r"\['label_smoothing'\]: per_layer.* needs something that has",
        ),
        ({"module__dropout": per_unit(uniform(0, 0.3))}, r"\['module__dropout'\]: per_unit.* needs something that has"),
        ({"input_noise": per_weight(uniform(0, 0.3))}, r"\['input_noise'\]: per_weight.* needs something that has"),
        ({"weight_decay": per_layer(per_unit(PRIOR))}, "has two grains"),
        ({"weight_decay": per_layer(3)}, "expected a frozen continuous"),
    ],
)
def test_a_grain_on_what_has_none_is_refused_by_name(iris, space, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search(NET, space).fit(*iris)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weight_decay": {"2.weight": 0.1}}, r"weight_decay: \['2.weight'\] are no penalised parameters.*'1.weight'"),
        ({"weight_decay": {"1.weight": np.ones(5)}}, r"weight_decay\['1.weight'\] of shape \(5,\) does not broadcast"),
        ({"l1": {"1.weight": -0.1}}, r"l1\['1.weight'\] must be zero or positive"),
        ({"input_noise": [0.1, 0.2]}, r"input_noise must be a number or one number for each feature, shape \(4,\)"),
    ],
)
def test_values_that_do_not_fit_the_model_are_refused_by_name(iris, params, message):
    with pytest.raises(ValueError, match=message):
        clone(NET).set_params(**params).fit(*iris)


@pytest.mark.slow
def test_the_prior_keeps_the_values_of_a_grain_together(iris):
    spread = {
        scale: np.log(search(NET, {"weight_decay": per_weight(PRIOR)}, max_epochs=120, grain_scale=scale).fit(*iris)
                      .history_["weight_decay"][-1]).std()
        for scale in (None, 1.0, 0.1)
    }  # fmt: skip
    assert spread[None] > 1.5 * spread[1.0] > 3 * spread[0.1]


def test_a_search_starts_from_values_of_a_grain(iris):
    net = clone(NET).set_params(weight_decay={"1.weight": 0.1, "4.weight": np.full((3, 1), 0.01)})
    with pytest.warns(UserWarning, match="did not move: 'joint' moves them once in 2 steps after the first 1"):
        found = search(net, {"weight_decay": per_unit(PRIOR)}, max_epochs=1, warmup=0.9).fit(*iris)
    assert_allclose(found.history_["weight_decay"][0], [0.1] * 8 + [0.01] * 3, rtol=1e-3)
