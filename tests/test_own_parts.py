"""A user's own parts of the training loss: a penalty, an augmentation, mixup, and modules of several inputs."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import loguniform, norm, uniform
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, TorchRegressor
from hypertune.batches import Batch
from hypertune.losses import cross_entropy, squared_error
from hypertune.objective import Objective


def smoothness(weights, strength=0.01, target=0.0):
    return strength * (weights["1.weight"] - target).square().sum()


def jitter(x, generator, scale=0.1):
    return x + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)


NET = TorchClassifier(MLP(hidden=(8,)), max_epochs=6, lr=1e-2, penalty=smoothness, augment=jitter, random_state=0)
SPACE = {
    "penalty__strength": loguniform(1e-6, 1e1),
    "penalty__target": norm(0, 1),
    "augment__scale": uniform(0, 1),
    "mixup": uniform(0, 1),
}


def search(estimator, space, **params) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(
        estimator, space, cv=3, random_state=0, error_score="raise", start="estimator", **params
    )


def test_keywords_of_plain_functions_are_parameters():
    net = clone(NET)
    assert net.get_params()["penalty__strength"] == 0.01
    net.set_params(penalty__strength=0.5, augment__scale=0.2)
    assert net.get_params()["penalty__strength"] == 0.5
    assert net.get_params()["penalty__target"] == 0.0
    assert isinstance(net.penalty, partial)
    assert NET.penalty is smoothness
    again = pickle.loads(pickle.dumps(clone(net)))
    assert again.get_params()["augment__scale"] == 0.2
    assert clone(net).set_params(penalty=None).penalty is None
    with pytest.raises(ValueError, match=r"Invalid parameter 'strenght'.*\['strength', 'target'\]"):
        net.set_params(penalty__strenght=1.0)

    def build(n_features_in, n_outputs, *, width=3):
        return nn.Linear(n_features_in, n_outputs)

    assert TorchClassifier(build).set_params(module__width=5).get_params()["module__width"] == 5


@pytest.mark.parametrize("algorithm", ["joint", "global", "simplified"])
def test_their_hyperparameters_join_the_space(iris, algorithm):
    X, y = iris
    net = clone(NET).set_params(mixup=0.3, penalty__target=0.1)
    found = search(net, SPACE, algorithm=algorithm).fit(X, y)
    for name in SPACE:
        assert found.history_[name][-1] != found.history_[name][0], name
    model = clone(net).set_params(**found.best_params_).fit(X, y)
    assert_allclose(model.predict_proba(X), found.predict_proba(X), rtol=1e-6)


def test_a_penalty_that_makes_a_plain_number_of_its_hyperparameter_is_for_methods_with_a_hypernetwork(iris):
    def plain(weights, strength=0.01, other=0.1):
        return float(strength) * other * weights["1.weight"].square().sum()

    net = clone(NET).set_params(penalty=plain)
    for algorithm in ("implicit", "t1t2", "unrolled", "forward"):
        with pytest.raises(ValueError, match=r"penalty__strength'\]: .* a penalty makes a plain number of"):
            search(net, {"penalty__strength": loguniform(1e-4, 1)}, algorithm=algorithm).fit(*iris)
    search(net, {"penalty__other": loguniform(1e-4, 1)}, algorithm="implicit").fit(*iris)
    search(net, {"penalty__strength": loguniform(1e-4, 1)}).fit(*iris)


def test_a_penalty_that_takes_numbers_of_its_range_alone_is_tuned_with_a_hypernetwork(iris):
    def particular(weights, strength=1.5):
        if strength < 1:
            raise ValueError("never declared")
        return 0.01 * strength * weights["1.weight"].square().sum()

    search(clone(NET).set_params(penalty=particular), {"penalty__strength": uniform(1, 1)}).fit(*iris)


def test_a_grid_search_takes_them_too(iris):
    found = GridSearchCV(NET, {"penalty__strength": [0.1, 1.0]}, cv=2).fit(*iris)
    assert found.best_estimator_.penalty.keywords["strength"] == found.best_params_["penalty__strength"]


def test_a_penalty_is_added_as_it_is():
    net = MLP(hidden=(8,))(4, 3)
    own = Objective(net, cross_entropy, penalty=smoothness)
    plain = Objective(net, cross_entropy)
    batch = Batch(torch.randn(1, 5, 4), torch.arange(5)[None] % 3)
    w = torch.randn(2, own.D)
    values = {"penalty__strength": torch.tensor([0.5, 2.0])}
    difference = own.train_loss(w, values, batch.repeat(2)) - plain.train_loss(w, {}, batch.repeat(2))
    first = own.named(w)["1.weight"]
    assert_allclose(difference, torch.tensor([0.5, 2.0]) * first.square().sum(dim=(1, 2)), rtol=1e-4)


def test_neighbours_share_the_draws_of_an_augmentation():
    """Equal weights and equal strengths give equal losses; the strengths differ, the draws do not."""
    seen = []

    def recorded(x, generator, scale=1.0):
        seen.append((scale, torch.randn(x.shape, generator=generator)))
        return x + scale * seen[-1][1]

    objective = Objective(nn.Linear(4, 3), cross_entropy, augment=recorded)
    batch = Batch(torch.randn(1, 5, 4), torch.arange(5)[None] % 3)
    w = torch.randn(1, objective.D).expand(2, -1)
    losses = objective.train_loss(w, {"augment__scale": torch.tensor([0.3, 0.3])}, batch.repeat(2))
    assert losses[0] == losses[1]
    objective.train_loss(w, {"augment__scale": torch.tensor([0.1, 0.3])}, batch.repeat(2))
    assert [round(scale, 6) for scale, _ in seen] == [0.3, 0.3, 0.1, 0.3]
    assert_array_equal(seen[2][1], seen[3][1])
    assert (seen[0][1] != seen[2][1]).any()


def test_mixup_mixes_rows_and_losses():
    """Half of each of two rows: by hand, with the share and the order drawn again from the same seed."""
    objective = Objective(nn.Linear(4, 3), cross_entropy, fixed={"mixup": 0.8})
    batch = Batch(torch.randn(1, 5, 4), torch.arange(5)[None] % 3)
    w = objective.initial_weights()[None]
    torch.manual_seed(3)
    loss = objective.train_loss(w, {}, batch)
    torch.manual_seed(3)
    stream = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + 2)
    other, share = torch.randperm(5, generator=stream), 0.4 * torch.rand((), generator=stream)
    mixed = objective.predict(w, (1 - share) * batch.x + share * batch.x[:, other])
    by_hand = (1 - share) * cross_entropy(mixed, batch.y) + share * cross_entropy(mixed, batch.y[:, other])
    assert_allclose(loss.detach(), by_hand.mean(dim=1).detach(), rtol=1e-5)
    torch.manual_seed(3)
    weight = torch.tensor([[1.0, 2.0, 0.5, 1.0, 0.5]])
    weighted = objective.train_loss(w, {}, batch._replace(weight=weight))
    own, others = weight * cross_entropy(mixed, batch.y), weight[:, other] * cross_entropy(mixed, batch.y[:, other])
    assert_allclose(weighted.detach(), ((1 - share) * own + share * others).mean(dim=1).detach(), rtol=1e-5)
    off = Objective(nn.Linear(4, 3), squared_error, fixed={"mixup": 0.0})
    y = torch.randn(1, 5, 3)
    w = off.initial_weights()[None]
    assert_allclose(off.train_loss(w, {}, Batch(batch.x, y)).detach(), off.valid_loss(w, Batch(batch.x, y)).detach())


class TwoInputs(nn.Module):
    def __init__(self, n_features_in, n_outputs, dropout: float = 0.1):
        super().__init__()
        self.colour = nn.Embedding(3, 2)
        self.out = nn.Linear(n_features_in["numbers"] + 2, n_outputs)
        self.drop = nn.Dropout(dropout)

    def forward(self, numbers, colour):
        return self.out(self.drop(torch.cat([numbers, self.colour(colour[:, 0].long())], dim=1)))


def two_inputs(n_features_in, n_outputs, *, dropout=0.1):
    return TwoInputs(n_features_in, n_outputs, dropout)


def test_modules_of_several_inputs_get_their_columns_by_name():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=90), "colour": rng.integers(0, 3, 90), "b": rng.normal(size=90)})
    y = np.where(X["a"] + (X["colour"] == 2) > 0.4, "yes", "no")
    net = TorchClassifier(
        two_inputs, inputs={"numbers": ["a", "b"], "colour": ["colour"]}, max_epochs=40, lr=2e-2, random_state=0
    )
    space = {"module__dropout": uniform(0, 0.5), "weight_decay": loguniform(1e-6, 1)}
    found = search(net, space).fit(X, y)
    assert found.score(X, y) > 0.9
    by_number = clone(net).set_params(inputs={"numbers": [0, 2], "colour": [1]}).fit(X.to_numpy(), y)
    assert_allclose(by_number.predict_proba(X.to_numpy()), clone(net).fit(X, y).predict_proba(X))
    for inputs, message in (
        ({"numbers": ["a", "z"]}, r"inputs\['numbers'\]: X has no column 'z'; it has \['a', 'colour', 'b'\]"),
        ({"numbers": "a"}, r"must be a list of columns, got 'a'; write \['a'\]"),
        ({}, "needs X with columns"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(net).set_params(inputs=inputs).fit(X, y)


def vector_penalty(weights, strength=0.1):
    return strength * weights["1.weight"].square().sum(dim=1)


def half_the_rows(x, generator, share=0.5):
    return x[: len(x) // 2]


@pytest.mark.parametrize(
    ("params", "space", "message"),
    [
        ({"penalty": vector_penalty}, "penalty__strength", r"penalty .* returned shape \(8,\); return one number"),
        ({"augment": half_the_rows}, "augment__share", r"augment .* returned shape .* return as many rows"),
        ({}, "penalty__strnegth", "no such parameter; did you mean 'penalty__strength'"),
        (
            {"penalty": nn.Flatten()},
            "penalty__strength",
            r"penalty=Flatten.* no such keyword with a default.*strength=1\.0\)",
        ),
        ({"mixup": 1.5}, None, "'mixup' parameter of TorchClassifier must be a float in the range"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(iris, params, space, message):
    net = clone(NET).set_params(**params)
    with pytest.raises(ValueError, match=message):
        net.fit(*iris) if space is None else search(net, {space: uniform(0, 1)}).fit(*iris)


def test_regressors_have_them_too():
    X = np.random.default_rng(0).normal(size=(60, 3))
    net = TorchRegressor(MLP(hidden=(8,)), max_epochs=5, mixup=0.2, penalty=smoothness, augment=jitter, random_state=0)
    found = search(net, SPACE).fit(X, X[:, 0])
    assert np.isfinite(found.best_score_)


@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_a_layer_that_can_be_differentiated_once_is_for_methods_that_do_that(iris):
    class Bag(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(4, 5), nn.Linear(5 + n, m)

        def forward(self, x):
            return self.out(torch.cat([self.bag((x > 0).long()), x], dim=1))

    net, space = TorchClassifier(Bag, max_epochs=3, random_state=0), {"weight_decay": loguniform(1e-6, 1e1)}
    with pytest.raises(
        ValueError, match=r"'implicit' differentiates the training loss twice.*embedding_bag.*algorithm='joint'"
    ):
        search(net, space, algorithm="implicit").fit(*iris)
    assert search(net, space).fit(*iris).best_score_ > 0.3
