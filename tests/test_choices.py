"""Lists of values in the space: compared first, trained with the best, and verified beside the estimator's own."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution, IntDistribution
from scipy.stats import loguniform, randint, uniform
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import nn

from hypertune import (
    MLP,
    HyperTrainingSearchCV,
    TorchClassifier,
    check_hypergradient,
    model_factory,
    per_layer,
    starts,
)
from hypertune.candidates import retrain_candidates
from hypertune.choices import choose, own_values, same, split
from hypertune.comparing import _share
from hypertune.optuna import to_study
from hypertune.retraining import Retrained
from tests.searches import assert_scores_are_those_of_own_fits
from tests.test_retraining import NET

PRIOR = loguniform(1e-6, 1e1)
SPACE = {"weight_decay": PRIOR, "module__hidden": [(1,), (16,), (8, 8)], "batch_size": (32, 64)}


def search(net=NET, space=SPACE, **params) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(net, space, **{"cv": 3, "random_state": 0, "error_score": "raise", **params})


@pytest.fixture(scope="module")
def found(iris):
    """From a hidden layer of one unit."""
    net = clone(NET).set_params(module__hidden=(1,), weight_decay=0.0)
    return search(net, SPACE | {"lr": loguniform(1e-3, 1e-1)}, scoring="neg_log_loss").fit(*iris)


# --- the choice ---------------------------------------------------------------------------------------------------------------


def test_what_has_a_list_is_told_from_what_has_a_range():
    prior = uniform(0, 1)
    lists = {"a": [1, 2], "b": (None, "x"), "c": np.array([1, 2]), "d": range(2), "e": CategoricalDistribution([3, 4])}
    choices, ranges = split({**lists, "f": prior, "g": per_layer(prior), "h": [0.1]}, tuned={"h"})
    assert choices == {"a": [1, 2], "b": [None, "x"], "c": [1, 2], "d": [0, 1], "e": [3, 4]}
    assert all(type(value) is int for value in choices["c"])
    assert list(ranges) == ["f", "g", "h"]
    with pytest.raises(ValueError, match=r"\['a'\] is empty"):
        split({"a": []})


def test_the_own_value_is_the_estimators_or_else_the_first():
    scaler = StandardScaler()
    choices = {"a": [1, 2], "b": [(8,), (16, 16)], "c": [np.zeros(2), np.ones(2)], "d": [MinMaxScaler(), scaler]}
    own = own_values(choices, {"a": 2, "b": [16, 16], "c": np.ones(2), "d": StandardScaler()})
    assert own["a"] == 2
    assert own["b"] == (16, 16)
    assert own["c"] is choices["c"][1]
    assert own["d"] is scaler
    assert own_values(choices, {"a": 2, "b": 1, "c": np.arange(2), "d": None})["c"] is choices["c"][0]
    assert own_values(choices, {"a": 3, "b": 16, "c": None, "d": None})["b"] == (8,)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]), (1, np.int64(1)), (0.5, np.float32(0.5)), (None, None), ("a", "a"), (np.ones(3), np.ones(3)),
        (torch.ones(3), torch.ones(3)), (MLP((4,)), clone(MLP((4,)))), (torch.optim.SGD, torch.optim.SGD),
        (partial(torch.optim.SGD, momentum=0.5), partial(torch.optim.SGD, momentum=0.5)),
    ],
)  # fmt: skip
def test_what_is_the_same_value(one, other):
    assert same(one, other)
    assert same(one, copy.deepcopy(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), (1, 2, 3)), (1, True), (1, 1.0), (0, None), ("a", "b"), (np.ones(3), np.zeros(3)), (np.ones(3), 1),
        (torch.ones(3), torch.zeros(3)), (MLP((4,)), MLP((5,))), (StandardScaler(), MinMaxScaler()),
        (partial(torch.optim.SGD, momentum=0.5), partial(torch.optim.SGD, momentum=0.9)), (lambda: 0, lambda: 0),
    ],
)  # fmt: skip
def test_what_is_another_value(one, other):
    assert not same(one, other)


def losses_of(table, seen):
    def losses_at(values):
        seen.append(tuple(values.values()))
        return None if table[seen[-1]] is None else torch.tensor(table[seen[-1]], dtype=torch.float64)

    return losses_at


def test_one_parameter_follows_the_other_at_the_best_of_the_one_before():
    table = {(1, "x"): [3.0], (0, "x"): [4.0], (2, "x"): [2.0], (2, "y"): [1.0], (2, "z"): [1.5]}
    seen = []
    choices = {"a": [0, 1, 2], "b": ["x", "y", "z"]}
    assert choose(choices, {"a": 1, "b": "x"}, losses_of(table, seen)) == {"a": 2, "b": "y"}
    assert seen == [(1, "x"), (0, "x"), (2, "x"), (2, "y"), (2, "z")]  # each once


def test_a_gain_within_five_percent_is_none():
    for loss, left in [(0.96, False), (0.94, True)]:
        table = {(0,): [1.0, 1.01], (1,): [loss, loss + 0.01]}
        assert choose({"a": [0, 1]}, {"a": 0}, losses_of(table, [])) == {"a": int(left)}


def test_on_several_folds_a_value_is_left_for_a_gain_of_more_than_its_standard_error():
    own = {"a": 0}
    for gain, left in [([0.3, 0.1, 0.16], True), ([0.3, -0.1, 0.0], False), ([0.0, 0.0, 0.0], False)]:
        table = {(0,): [1.0, 1.0, 1.0], (1,): [1.0 - g for g in gain]}
        assert choose({"a": [0, 1]}, own, losses_of(table, [])) == {"a": int(left)}
    # the folds that both were tried on: the first one
    assert choose({"a": [0, 1]}, own, losses_of({(0,): [1.0, 9.0, 9.0], (1,): [1.1]}, [])) == own
    assert choose({"a": [0, 1]}, own, losses_of({(0,): [1.0, 0.0, 0.0], (1,): [0.9]}, [])) == {"a": 1}


def test_where_there_is_nothing_to_compare_nothing_is_tried():
    assert choose({"a": [1], "b": [[2, 3], (2, 3)]}, {"a": 1, "b": (2, 3)}, None) == {"a": 1, "b": (2, 3)}


def test_what_diverged_or_cannot_be_tried_is_left_and_if_that_is_the_own_one_all_is():
    inf = float("inf")
    assert choose({"a": [0, 1]}, {"a": 0}, losses_of({(0,): [1.0, 1.0], (1,): [0.1, inf]}, [])) == {"a": 0}
    assert choose({"a": [0, 1]}, {"a": 0}, losses_of({(0,): [inf, inf], (1,): [0.1, 0.1]}, [])) == {"a": 1}
    seen = []
    own = {"a": 0}
    assert choose({"a": [0, 1]}, own, losses_of({(0,): None}, seen)) is own
    assert seen == [(0,)]
    assert choose({"a": [0, 1, 2]}, own, losses_of({(0,): [1.0], (1,): None, (2,): [0.5]}, [])) == {"a": 2}


# --- the search ---------------------------------------------------------------------------------------------------------------


def test_a_net_that_is_too_small_gets_the_better_layers(found, iris):
    X, y = iris
    assert found.best_params_["module__hidden"] in [(16,), (8, 8)]
    assert found.best_params_["batch_size"] in (32, 64)
    results = found.cv_results_
    tuned = results["params"][0]
    assert tuned["module__hidden"] in [(16,), (8, 8)]
    assert {"tuned", "own"} <= {*results["candidate"]}
    own = results["params"][list(results["candidate"]).index("own")]
    assert own == {
        "module__hidden": (1,), "batch_size": 32, "lr": pytest.approx(NET.lr), "weight_decay": pytest.approx(1e-6),
    }  # fmt: skip
    assert all(params.keys() == own.keys() for params in results["params"])
    assert results["mean_test_score"].max() > results["mean_test_score"][list(results["candidate"]).index("own")]
    again = clone(found.estimator).set_params(**found.best_params_).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), found.predict_proba(X))
    assert found.best_response_.estimator_at().get_params()["module__hidden"] == tuned["module__hidden"]
    with pytest.raises(ValueError, match=r"'batch_size': this best response is .* alone; it was learned at (32|64)"):
        found.best_response_.weights({"batch_size": 32})


def test_the_best_setting_is_verified_with_the_own_values_too(found, iris):
    """What looked better in short trainings need not be so in the end. The learning rate is the one that goes with them."""
    rows = dict(zip(found.cv_results_["candidate"], found.cv_results_["params"], strict=True))
    scores = dict(zip(found.cv_results_["candidate"], found.cv_results_["mean_test_score"], strict=True))
    kept, own = rows["own values"], rows["own"]
    assert (kept["module__hidden"], kept["batch_size"]) == (own["module__hidden"], own["batch_size"])
    best = max((name for name in rows if not name.startswith("own")), key=scores.get)
    assert kept["weight_decay"] == rows[best]["weight_decay"]
    alone = search(found.estimator, {k: found.param_distributions[k] for k in ("weight_decay", "lr")}).fit(*iris)
    assert kept["lr"] == pytest.approx(float(alone.history_["lr"]))
    listed = search(found.estimator, {k: v for k, v in found.param_distributions.items() if k != "lr"}).fit(*iris)
    assert listed.cv_results_["params"][list(listed.cv_results_["candidate"]).index("own values")].keys() == {*SPACE}


def test_own_values_that_hardly_differ_from_the_own_setting_are_left_out(iris):
    net = clone(NET).set_params(module__hidden=(1,), weight_decay=1e-3)
    for most, new in ((1.001e-3, set()), (1e-1, {"own values"})):
        space = {"weight_decay": loguniform(1e-3, most), "module__hidden": [(1,), (16, 16)]}
        assert {*search(net, space).fit(*iris).cv_results_["candidate"]} & {"own values"} == new


def test_scores_are_those_of_own_fits(found, iris):
    assert_scores_are_those_of_own_fits(found, *iris, rel=1e-4)


def test_nothing_of_the_users_is_changed_and_the_same_seed_gives_the_same(found, iris):
    assert found.estimator.module.hidden == (1,)
    assert found.estimator.batch_size == NET.batch_size
    assert found.param_distributions["module__hidden"] == [(1,), (16,), (8, 8)]
    again = clone(found).fit(*iris)
    assert again.best_params_ == found.best_params_
    assert again.best_score_ == found.best_score_


@pytest.mark.parametrize("kind", ["optimizers", "arrays", "factories"])
def test_the_own_setting_is_no_fit_with_the_values_that_were_chosen(iris, kind):
    """Values that are no numbers, from an own setting at which the others were trained, too."""

    def scaled(n_features_in, n_outputs, *, scale, act, dropout):
        net = nn.Sequential(nn.Linear(n_features_in, 16), act(), nn.Dropout(dropout), nn.Linear(16, n_outputs))
        with torch.no_grad():
            net[0].weight.mul_(torch.as_tensor(scale, dtype=net[0].weight.dtype))
        return net

    @model_factory
    def one(n_features_in, n_outputs, *, scale=1.0, dropout=0.02):
        return scaled(n_features_in, n_outputs, scale=scale, act=nn.Sigmoid, dropout=dropout)

    @model_factory
    def another(n_features_in, n_outputs, *, scale=1.0, dropout=0.02):
        return scaled(n_features_in, n_outputs, scale=scale, act=nn.Tanh, dropout=dropout)

    name, values = {
        "optimizers": ("optimizer", [partial(torch.optim.SGD, momentum=0.0), partial(torch.optim.SGD, momentum=0.9)]),
        "arrays": ("module__scale", [np.full(4, 0.01), np.full(4, 3.0)]),
        "factories": ("module", [one, another]),
    }[kind]
    net = TorchClassifier(one, optimizer=torch.optim.SGD, lr=0.1, max_epochs=20, random_state=0)
    net.set_params(**{name: values[0]})
    found = search(net, {"module__dropout": uniform(0, 0.8), name: values}, scoring="neg_log_loss").fit(*iris)
    assert found.best_params_[name] is values[1] or same(found.best_params_[name], values[1])
    assert "own" in found.cv_results_["candidate"]
    assert_scores_are_those_of_own_fits(found, *iris, rel=1e-4)


def test_the_users_objects_are_copied(iris):
    pca, other = PCA(2), MLP(hidden=(16,), dropout=0.1)
    model = Pipeline([("red", PCA(2)), ("net", clone(NET).set_params(module=other, max_epochs=5))])
    space = {"net__module__dropout": uniform(0, 0.5), "red": [pca, StandardScaler()], "red__n_components": [2, 3]}
    with pytest.raises(ValueError, match="n_components") as refused:
        search(model, space).fit(*iris)
    assert "StandardScaler()" in refused.value.__notes__[0]
    found = search(model, space | {"red": [pca], "red__n_components": [3]}).fit(*iris)
    assert found.best_params_["red__n_components"] == 3
    assert pca.n_components == 2
    assert not hasattr(pca, "mean_")
    mlps = [MLP(hidden=(8,), dropout=0.1), MLP(hidden=(16,), dropout=0.1)]
    listed = search(model, {"net__module__dropout": uniform(0, 0.5), "net__module": mlps}).fit(*iris)
    own = listed.cv_results_["params"][list(listed.cv_results_["candidate"]).index("own")]
    assert own["net__module"].get_params()["hidden"] == (16,)  # an equal object is the own one
    assert [mlp.dropout for mlp in mlps] == [0.1, 0.1]


def test_all_values_have_the_same_share_of_their_fits(iris, monkeypatch):
    """The longest that one of them needs: batches of 100 a whole fit, for 150 steps."""
    seen = []
    original = starts.retrain

    def recorded(task, lam, **params):
        seen.append((task.folds[0].net.batch_size, params["epochs"], params["seed"]))
        return original(task, lam, **params)

    monkeypatch.setattr(starts, "retrain", recorded)
    net = clone(NET).set_params(max_epochs=20, batch_size=16, random_state=None)
    search(net, {"weight_decay": PRIOR, "batch_size": [16, 100]}).fit(*iris)
    assert [(batch, epochs) for batch, epochs, _ in seen[:2]] == [(16, 20), (100, 20)]
    assert seen[1][2] is not None  # the seed of the first
    longer = [("batch_size", 16), ("max_epochs", 120)]
    assert _share(NET, {"batch_size": 8, "max_epochs": 60}, longer, rows=100) == pytest.approx(150 / (60 * 7))
    assert _share(NET, {"batch_size": 8, "max_epochs": 60}, longer[1:], rows=100) == pytest.approx(1 / 3)


def test_another_value_is_tried_near_the_best_of_the_own_one(iris, monkeypatch):
    """The learning rate that is best there, and its neighbours, with the best setting and with the most regularisation."""
    stacks = []
    original = Retrained.fold_losses

    def fold_losses(self, folds, smoothing=0.0):
        values, found = self.space.values(self.lam), original(self, folds, smoothing)
        if (
            "lr" in values and self.settings["batch_size"] == 32
        ):  # the least is that of the third learning rate as they are
            found = 1 + (torch.arange(len(self.lam)) - 2).abs().double().expand(len(folds), -1)
        if "lr" in values:
            tried = (values["lr"].tolist(), values["module__dropout"].tolist())
            stacks.append((self.settings["batch_size"], *tried))
        return found

    monkeypatch.setattr(Retrained, "fold_losses", fold_losses)
    space = {"module__dropout": uniform(0, 0.8), "lr": loguniform(1e-4, 1e-1), "batch_size": [32, 64]}
    search(clone(NET).set_params(max_epochs=5, batch_size=32), space).fit(*iris)
    (_, first, _), (batch, rates, dropouts) = stacks[:2]
    assert (len(first), batch) == (2 * 5, 64)
    assert rates == pytest.approx(2 * first[1:4])
    assert dropouts == pytest.approx([0.1] * 3 + [0.2] * 3)
    assert (stacks[2][0], len(stacks[2][1])) == (64, 2 * 5)  # chosen: its learning rates are tried in full


def test_where_the_own_values_are_kept_there_is_one_own_row(iris):
    net = clone(NET).set_params(module__hidden=(16,), batch_size=32)
    kept = search(net, SPACE | {"module__hidden": [(16,), [1]], "batch_size": [32]}).fit(*iris)
    alone = search(net, {"weight_decay": PRIOR}).fit(*iris)
    assert list(kept.cv_results_["candidate"]) == list(alone.cv_results_["candidate"])
    assert {params["module__hidden"] for params in kept.cv_results_["params"]} == {(16,)}
    np.testing.assert_array_equal(kept.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    np.testing.assert_array_equal(kept.history_["weight_decay"], alone.history_["weight_decay"])


def test_a_value_outside_the_list_is_never_returned(iris):
    found = search(clone(NET).set_params(batch_size=16), SPACE).fit(*iris)
    assert {params["batch_size"] for params in found.cv_results_["params"]} <= {32, 64}


def test_steps_of_a_pipeline_have_choices_too():
    X, y = load_digits(return_X_y=True)
    model = make_pipeline(StandardScaler(), PCA(2), clone(NET).set_params(max_epochs=20))
    space = {"torchclassifier__weight_decay": PRIOR, "pca__n_components": [2, 30], "standardscaler": [StandardScaler(), MinMaxScaler()]}  # fmt: skip
    found = search(model, space).fit(X[:400], y[:400])
    assert found.best_estimator_[1].n_components_ == 30
    assert found.best_estimator_[-1].n_features_in_ == 30
    assert model[1].n_components == 2
    assert not hasattr(space["standardscaler"][0], "mean_")
    assert found.score(X[400:800], y[400:800]) > 0.7  # with 2 components less than 0.5


def test_values_of_a_finer_grain_are_those_of_the_layers_that_were_chosen(iris):
    net = clone(NET).set_params(module__hidden=(1,))
    found = search(net, {"weight_decay": per_layer(PRIOR), "module__hidden": [(1,), (16, 16)]}).fit(*iris)
    layers = {name: len(params["weight_decay"]) for name, params in zip(found.cv_results_["candidate"], found.cv_results_["params"], strict=True)}  # fmt: skip
    assert layers["tuned"] == 3
    assert layers["own"] == 2
    assert "own values" not in layers  # their layers are others
    assert found.best_params_["module__hidden"] == (16, 16)
    assert len(to_study(found).trials[0].params) == 3 + 1


def test_larger_models_and_those_that_cannot_be_stacked_are_compared_one_by_one(iris):
    class Odd(nn.Module):
        def __init__(self, n_features_in, n_outputs, *, width=1):
            super().__init__()
            self.a, self.b = nn.Linear(n_features_in, width), nn.Linear(width, n_outputs)

        def forward(self, x):
            h = self.a(x)
            return self.b(h.relu() if h.sum() > -1e9 else h)  # branches on data

    for module, name, values in [(Odd, "width", [1, 16]), (MLP(hidden=(1,)), "hidden", [(1,), (400, 400)])]:
        net = clone(NET).set_params(module=module, max_epochs=20)
        with pytest.warns(UserWarning, match="one after the other") if module is Odd else _nothing():
            found = search(net, {"weight_decay": PRIOR, f"module__{name}": values}, cv=2).fit(*iris)
        assert found.best_params_[f"module__{name}"] == values[1]


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return False


class Counting:
    """A criterion that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, y):
        self.calls += 1
        return nn.functional.cross_entropy(outputs, y, reduction="none")


def test_they_stay_where_short_trainings_would_not_be_those_of_fits(iris):
    net = clone(NET).set_params(criterion=Counting(), module__hidden=(1,), max_epochs=5)
    with pytest.warns(UserWarning, match=r"'module__hidden': \(1,\).* cannot be compared: .*Nothing is chosen"):
        found = search(net).fit(*iris)
    assert {params["module__hidden"] for params in found.cv_results_["params"]} == {(1,)}


def test_a_length_is_chosen_and_the_hyper_training_has_it(iris):
    net = clone(NET).set_params(max_epochs=1)
    found = search(net, {"weight_decay": PRIOR, "max_epochs": [1, 40], "optimizer": ["adam", "sgd"]})
    assert found.fit(*iris).best_params_["max_epochs"] == 40
    assert found.history_["epoch"][-1] == 40


def test_it_goes_into_a_study_and_around_it_a_grid(found, iris):
    study = to_study(found)
    best = study.best_params
    assert best["module__hidden"] == repr(found.best_params_["module__hidden"])
    assert best["batch_size"] == found.best_params_["batch_size"]
    assert study.trials[0].distributions["module__hidden"] == CategoricalDistribution(["(1,)", "(16,)", "(8, 8)"])
    changed = clone(found)
    vars(changed).update({name: value for name, value in vars(found).items() if name.endswith("_")})
    changed.param_distributions = SPACE | {"batch_size": [128]}
    assert to_study(changed).best_params["batch_size"] == best["batch_size"]
    outer = GridSearchCV(search(clone(NET).set_params(max_epochs=3), cv=2), {"max_epochs": [2]}, cv=2).fit(*iris)
    assert outer.best_estimator_.best_params_.keys() == SPACE.keys()


# --- refusals -----------------------------------------------------------------------------------------------------------------


def test_architectures_are_compared_as_factories(iris):
    """Classes, functions and factories of one's own; the keyword that is tuned is each one's."""

    class Deep(nn.Sequential):
        def __init__(self, n_features_in, n_outputs, *, dropout=0.2):
            super().__init__(nn.Linear(n_features_in, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, n_outputs))

    factories = [MLP(hidden=(1,), dropout=0.1), MLP(hidden=(16,)), model_factory(Deep)]
    net = clone(NET).set_params(module=factories[0], max_epochs=20)
    space = {"module__dropout": uniform(0, 0.5), "weight_decay": PRIOR, "module": factories}
    found = search(net, space).fit(*iris)
    assert found.best_params_["module"].get_params() != factories[0].get_params()
    assert [factory.get_params().get("dropout") for factory in factories] == [0.1, 0.0, 0.2]
    assert_scores_are_those_of_own_fits(found, *iris, rel=1e-4)
    assert "own" in found.cv_results_["candidate"]


def test_it_is_the_best_setting_whose_own_values_are_tried(iris, monkeypatch):
    original = retrain_candidates

    def other(task, *args, **kwargs):
        found = original(task, *args, **kwargs)
        return found._replace(best=task.space.encode(task.space.decode(found.best) | {"weight_decay": 0.02}))

    monkeypatch.setattr("hypertune.proposal.retrain_candidates", other)
    net = clone(NET).set_params(module__hidden=(1,), max_epochs=20)
    results = search(net, {"weight_decay": PRIOR, "module__hidden": [(1,), (16,)]}).fit(*iris).cv_results_
    rows = dict(zip(results["candidate"], results["params"], strict=True))
    assert rows["own values"] == {"module__hidden": (1,), "weight_decay": pytest.approx(0.02)}


@pytest.mark.parametrize(
    ("net", "space", "params", "message"),
    [
        (NET, {"batch_size": [32, 64]}, {}, r"nothing but lists, for \['batch_size'\].*'weight_decay': loguniform"),
        (NET, SPACE, {"start": "estimator"}, r"\['module__hidden'\].*trying some values first.*start='screened'"),
        (NET, SPACE, {"evaluate": "hypernetwork"}, r"\['module__hidden'\].*evaluate='retrain'"),
        (NET, SPACE | {"batchsize": [1]}, {}, r"\['batchsize'\]: .* no such parameter; did you mean .*'batch_size'"),
        (NET, SPACE | {"sample_weight": uniform(0, 2)}, {}, r"\['module__hidden'\].*beside a weight for each row"),
        (NET, SPACE | {"criterion": ["cross_entropy", "squared_error"]}, {}, r"\['criterion'\]: .*different units"),
        (NET, SPACE | {"optimizer": "adam"}, {}, r"\['optimizer'\].*or for what has no gradient a list of values"),
        (NET, SPACE | {"weight_decay": [0.1, 1.0]}, {}, r"\['weight_decay'\]: it has a gradient.*loguniform"),
        (NET, SPACE | {"lr": [0.1, 1.0]}, {}, r"\['lr'\]: it has a gradient.*loguniform"),
        (NET, SPACE | {"batch_size": randint(8, 64)}, {}, r"\['batch_size'\].*give a list of values to compare"),
        (
            NET,
            SPACE | {"batch_size": IntDistribution(8, 64)},
            {},
            r"\['batch_size'\].*give a list of values to compare",
        ),
        (
            make_pipeline(StandardScaler(), NET),
            {"torchclassifier__weight_decay": PRIOR, "torchclassifier": [NET]},
            {},
            r"\['torchclassifier'\]: .*not whole nets",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(iris, net, space, params, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search(net, space, **params).fit(*iris)


def test_a_value_at_which_nothing_can_be_tuned_is_named(iris):
    space = {"module__dropout": uniform(0, 0.5), "module__hidden": [(16,), ()]}
    with pytest.raises(ValueError, match="module__dropout") as refused:
        search(clone(NET).set_params(module__hidden=(16,)), space).fit(*iris)
    assert refused.value.__notes__ == ["This was with {'module__hidden': ()}."]


def test_a_hypergradient_is_checked_without_them(iris):
    with pytest.raises(ValueError, match="check_hypergradient sets 'hypernetwork'"):
        check_hypergradient(search(), *iris)
