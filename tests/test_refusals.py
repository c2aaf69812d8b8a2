"""Bad input gets a clear error before any training."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import loguniform, uniform
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn

from hypertune import MLP, TorchClassifier, TorchRegressor, model_factory, per_feature, per_unit
from tests.searches import NET, search


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"weigth_decay": uniform(0, 1)},
            r"\['weigth_decay'\]: TorchClassifier has no such parameter; did you mean 'weight_decay'",
        ),
        ({"dropout": uniform(0, 0.5)}, r"did you mean .*'module__dropout'"),
        ({}, "nothing to tune"),
        ({"weight_decay": loguniform(0.0, 1.0)}, r"\['weight_decay'\].*0 < low < high"),
        (
            {"max_epochs": uniform(10, 50)},
            r"\['max_epochs'\]: 'max_epochs' does not change the loss.*section 2.2.*outer search.*by trying some values: lr",
        ),
        ({"batch_size": uniform(10, 50)}, r"\['batch_size'\].*outer search"),
        ({"optimizer": ["adam", "sgd"]}, r"nothing but lists, for \['optimizer'\]: GridSearchCV"),
        ({"weight_decay": uniform(-1, 2)}, r"\['weight_decay'\]: the range \[-1, 1\] must lie in \[0, inf\]"),
        (
            {"label_smoothing": uniform(0, 2)},
            r"\['label_smoothing'\]: the range \[0, 2\] must lie in \[0, 1\]",
        ),
        (
            {"module__dropout": uniform(0, 1.5)},
            r"\['module__dropout'\].*dropout probability has to be between 0 and 1",
        ),
        (
            {"module__dropout": uniform(0.5, 0.8)},
            r"between 0 and 1.*ends at 1\.3: uniform\(a, b\) goes from a to a \+ b",
        ),
        ({"label_smoothing": (0.0, 0.1)}, r"\['label_smoothing'\]: .*no need of a list: give its range"),
        ({"module__dropout": uniform(0, 1)}, r"\['module__dropout'\].*a dropout rate must lie in \[0, 1\)"),
        (
            {"module__activation": uniform(0, 1)},
            r"\['module__activation'\]: its current value 'relu' is not a number",
        ),
        ({"module__ignored": uniform(0, 1)}, r"\['module__ignored'\]: it reaches nothing in the model"),
        (
            {"weight_decay": uniform([0, 0], [1, 1])},
            r"uniform with arrays of arguments is many distributions.*per_layer",
        ),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_bad_spaces_are_refused_by_name(iris, space, message):
    class Ignoring(MLP):
        def __init__(self, hidden=(8,), dropout=0.0, input_dropout=0.0, activation="relu", ignored=0.0):
            super().__init__(hidden, dropout, input_dropout, activation)
            self.ignored = ignored

    with pytest.raises(ValueError, match=message):
        search(estimator=clone(NET).set_params(module=Ignoring()), param_distributions=space).fit(*iris)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"estimator": LogisticRegression()}, TypeError, "tunes a TorchClassifier.*got LogisticRegression"),
        ({"algorithm": "grid"}, ValueError, "'algorithm' parameter of HyperTrainingSearchCV must be a str among .*'joint'.* Got 'grid'"),
        ({"estimator": clone(NET).set_params(optimizer="nope")}, ValueError, "'optimizer' parameter of TorchClassifier .* Got 'nope'"),
        ({"hypernetwork": "lineal"}, ValueError, "'hypernetwork' .* Got 'lineal'"),
        ({"hypernetwork": 3}, ValueError, "'hypernetwork' .* implementing 'build'. Got 3"),
        ({"evaluate": "no"}, ValueError, "'evaluate' .* Got 'no'"),
        ({"warmup": 1.5}, ValueError, "'warmup' .* Got 1.5"),
        ({"scale": -1.0}, ValueError, "'scale' .* Got -1.0"),
        ({"n_samples": 0}, ValueError, "'n_samples' .* Got 0"),
        ({"cv": 200}, ValueError, "n_splits=200|number of members"),
        ({"estimator": Pipeline([("s", StandardScaler()), ("net", NET)]), "param_distributions": {"s__with_mean": uniform(0, 1)}},
         ValueError, r"\['s__with_mean'\]: it belongs to a preprocessing step"),
        ({"estimator": clone(NET).set_params(criterion=nn.CrossEntropyLoss())}, ValueError,
         r"\['label_smoothing'\]: needs criterion='cross_entropy'"),
        ({"estimator": clone(NET).set_params(optimizer=torch.optim.AdamW)}, ValueError,
         r"\['weight_decay'\]: the optimizer has a weight decay of its own, 0\.01.*functools\.partial\(AdamW, weight_decay=0\.0\)"),
        ({"estimator": clone(NET).set_params(module=nn.Linear(4, 3))}, ValueError,
         r"\['module__dropout'\]: module is a Linear that is built already"),
        ({"estimator": clone(NET).set_params(module=nn.ReLU), "param_distributions": {"l1": uniform(0, 1)}},
         TypeError, r"called with \(n_features_in, n_outputs\), here \(4, 3\)"),
        ({"estimator": clone(NET).set_params(module=lambda n, m: None), "param_distributions": {"l1": uniform(0, 1)}},
         TypeError, "returned NoneType"),
        ({"estimator": clone(NET).set_params(module=lambda n, m: nn.Linear(n, 7)), "param_distributions": {"l1": uniform(0, 1)}},
         ValueError, r"expected \(2, 3\)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_training")
def test_bad_parameters_are_refused(iris, params, error, message):
    with pytest.raises(error, match=message):
        search(**params).fit(*iris)


@pytest.mark.usefixtures("no_training")
def test_bad_data_are_refused(iris):
    X, y = iris
    with pytest.raises(ValueError, match="requires y to be passed"):
        search().fit(X)
    with pytest.raises(ValueError, match="NaN"):
        search().fit(np.where(X > 2, np.nan, X), y)
    with pytest.raises(ValueError, match="infinity"):
        search().fit(np.where(X > 2, np.inf, X), y)
    with pytest.raises(ValueError, match="class"):
        search().fit(X, np.zeros(len(X)))


def test_divergence_is_reported_with_step_and_lam(iris):
    net = TorchRegressor(MLP(hidden=()), optimizer="sgd", lr=1e6, lr_schedule="constant", max_epochs=20, random_state=0)
    with pytest.raises(ValueError, match=r"Hyper-training diverged before step \d+.*λ̂ = {'weight_decay'"):
        search(estimator=net, param_distributions={"weight_decay": loguniform(1e-3, 1)}, scoring=None).fit(*iris)


def test_a_factory_that_leaves_out_layers_at_a_bound_is_refused(iris, no_training):
    """Its weights would have other names there, or be of other layers."""

    @model_factory
    def skipping(n: int, m: int, *, dropout: float = 0.1) -> nn.Module:
        layers = [nn.Linear(n, 8), nn.ReLU()]
        return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout > 0 else []), nn.Linear(8, m))

    net = TorchClassifier(skipping, max_epochs=2, random_state=0)
    with pytest.raises(ValueError, match="at 0 the factory builds other layers"):
        search(estimator=net, param_distributions={"module__dropout": uniform(0, 0.8)}).fit(*iris)


def test_what_is_refused_leaves_the_search_as_it_was(iris):
    X, y = iris
    own = search()
    before = own.estimator
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        own.fit(X, y[:-1])
    assert own.estimator is before
    assert "_known" not in vars(own)
    with pytest.raises(ValueError, match="Was the CV iterator empty"):
        search(cv=[]).fit(X, y)


def test_a_fit_that_fails_leaves_the_results_of_the_one_before(iris):
    X, y = iris
    own = search().fit(X, y)
    history, response = own.history_, own.best_response_

    def failing(*args):
        raise RuntimeError("this scorer fails")

    own.set_params(scoring=failing, error_score="raise")
    with pytest.raises(RuntimeError, match="this scorer"):
        own.fit(X[:, :2], y)
    assert own.history_ is history
    assert own.best_response_ is response
    fresh = search(scoring=failing, error_score="raise")
    with pytest.raises(RuntimeError, match="this scorer"):
        fresh.fit(X, y)
    assert not {"history_", "best_response_"} & vars(fresh).keys()


def test_what_is_part_of_the_prediction_is_refused(iris, no_training):
    """The validation loss depends on it beside the weights."""

    @model_factory
    def leaky(n: int, m: int, *, leak: float = 0.01) -> nn.Module:
        return nn.Sequential(nn.Linear(n, 8), nn.LeakyReLU(leak), nn.Linear(8, m))

    @model_factory
    def zero(n: int, m: int, *, leak: float = 0.01) -> nn.Module:
        module = leaky(n, m)
        nn.init.zeros_(module[2].weight)
        module[1].negative_slope = leak
        return module

    for factory in (leaky, zero):
        net = TorchClassifier(factory, max_epochs=2, random_state=0)
        with pytest.raises(ValueError, match=r"\['module__leak'\]: the module reads it in eval mode"):
            search(estimator=net, param_distributions={"module__leak": uniform(0, 1)}).fit(*iris)


class Trembling(nn.Module):
    """Random in eval mode, too."""

    def __init__(self, n: int, m: int, *, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n, 8), nn.Dropout(dropout), nn.Linear(8, m))

    def forward(self, x):
        return self.layers(x) + 1e-3 * torch.randn(x.shape[0], 1)


def test_what_is_random_in_eval_mode_is_not_taken_for_part_of_the_prediction(iris):
    net = TorchClassifier(model_factory(Trembling), max_epochs=4, random_state=0)
    search(estimator=net, param_distributions={"module__dropout": uniform(0, 0.5)}).fit(*iris)


def test_keywords_of_no_module_are_refused_with_what_to_do(iris):
    with pytest.raises(ValueError, match=r"\['module__dropout'\]: module is None.*module=MLP\(\)"):
        search(estimator=TorchClassifier(), param_distributions={"module__dropout": uniform(0, 0.5)}).fit(*iris)


def test_a_factory_that_takes_any_keyword_is_to_name_it(iris, no_training):
    def factory(n, m, **keywords):
        return nn.Linear(n, m)

    with pytest.raises(ValueError, match=r"takes any keyword \(\*\*\), and names none"):
        search(estimator=TorchClassifier(factory), param_distributions={"module__dropout": uniform(0, 0.5)}).fit(*iris)


def test_parameters_of_an_object_that_is_a_penalty_are_refused(iris, no_training):
    class Ridge(BaseEstimator):
        def __init__(self, strength=0.1):
            self.strength = strength

        def __call__(self, weights):
            return self.strength * weights["1.weight"].square().sum()

    net = TorchClassifier(MLP(hidden=(6,)), penalty=Ridge())
    with pytest.raises(ValueError, match=r"'strength' is a parameter of the object penalty=Ridge\(\).*plain function"):
        search(estimator=net, param_distributions={"penalty__strength": loguniform(1e-5, 1)}).fit(*iris)


@pytest.mark.parametrize(
    "change",
    [
        {"param_distributions": {"torchclassifier__weight_decay": per_unit(loguniform(1e-6, 1))}},
        {"param_distributions": {"torchclassifier__weight_decay": per_feature(loguniform(1e-6, 1))}},
        {"evaluate": "hypernetwork"},
    ],
)
def test_folds_of_other_widths_are_refused_with_what_to_do_where_zeros_are_no_way_out(change):
    X = pd.DataFrame({"a": np.arange(30.0), "b": ["x"] * 24 + ["y"] * 5 + ["z"]})
    encode = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["b"]), remainder="passthrough")
    own = search(
        estimator=make_pipeline(encode, TorchClassifier(max_epochs=1)), cv=KFold(3),
        **({"param_distributions": {"torchclassifier__weight_decay": loguniform(1e-6, 1)}} | change),
    )  # fmt: skip
    with pytest.raises(ValueError, match="rows of other shapes in other folds"):
        own.fit(X, np.arange(30) % 2)


def one_in_each_fold() -> tuple[pd.DataFrame, np.ndarray]:
    """Three folds that train on as many categories each, and fewer than there are in all."""
    codes = np.array(["a", "b"] * 30, dtype=object)
    codes[[0, 25, 50]] = ["r1", "r2", "r3"]
    return pd.DataFrame({"c": codes}), np.tile([0, 0, 1, 1], 15)


@pytest.mark.parametrize("name", ["weight_decay", "input_noise"])
def test_a_value_for_each_column_needs_as_many_in_the_whole_data(name, no_training):
    prior = uniform(0, 1) if name == "input_noise" else loguniform(1e-6, 1)
    own = search(
        estimator=make_pipeline(OneHotEncoder(handle_unknown="ignore"), TorchClassifier(max_epochs=1)), cv=KFold(3),
        param_distributions={f"torchclassifier__{name}": per_feature(prior)},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"other folds, and in the whole data: \[\(4,\), \(4,\), \(4,\), \(5,\)\]"):
        own.fit(*one_in_each_fold())


def test_a_value_for_each_column_of_other_columns_in_other_folds_is_warned_of():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(90, 40)), np.arange(90) % 2
    X[:, 7] += y
    net = TorchClassifier(MLP((4,)), max_epochs=2, random_state=0)
    space = {"torchclassifier__input_noise": per_feature(uniform(0, 1))}
    with pytest.warns(UserWarning, match="would mean a different column"):
        search(estimator=make_pipeline(SelectKBest(k=4), net), param_distributions=space).fit(X, y)
    for steps, prior in (([StandardScaler()], per_feature(uniform(0, 1))), ([SelectKBest(k=4)], uniform(0, 1))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            space = {"torchclassifier__input_noise": prior}
            search(estimator=make_pipeline(*steps, net), param_distributions=space).fit(X, y)


class Doubles(BaseEstimator):
    def fit_resample(self, X, y):
        return np.concatenate([X, X]), np.concatenate([y, y])


class Resampling(Pipeline):
    """What imbalanced-learn's pipeline is."""


def test_what_hides_the_net_or_resamples_is_refused_with_what_to_do(iris, no_training):
    with pytest.raises(TypeError, match=r"Resampling resamples its rows.*compute_sample_weight"):
        search(
            estimator=Resampling([("doubles", Doubles()), ("net", TorchClassifier())]),
            param_distributions={"net__weight_decay": loguniform(1e-6, 1)},
        ).fit(*iris)
    with pytest.raises(TypeError, match="put all steps into one"):
        search(estimator=make_pipeline(StandardScaler(), make_pipeline(StandardScaler(), TorchClassifier()))).fit(*iris)
    with pytest.raises(
        TypeError, match=r"CalibratedClassifierCV hides its TorchClassifier.*CalibratedClassifierCV\(Hyper"
    ):
        search(estimator=CalibratedClassifierCV(TorchClassifier())).fit(*iris)


def test_a_sum_over_rows_is_no_criterion(iris):
    for criterion in (nn.CrossEntropyLoss(reduction="sum"), nn.HuberLoss(reduction="sum")):
        with pytest.raises(ValueError, match="adds up rows"):
            TorchClassifier(criterion=criterion).fit(*iris)


def test_a_softmax_at_the_end_is_noticed(iris):
    net = TorchClassifier(lambda n, m: nn.Sequential(nn.Linear(n, m), nn.Softmax(dim=-1)), max_epochs=1)
    with pytest.warns(UserWarning, match="leave out the softmax"):
        net.fit(*iris)


def test_a_criterion_that_does_not_take_the_outputs_is_refused_in_words(iris):
    net = TorchClassifier(criterion=nn.BCEWithLogitsLoss(), max_epochs=1)
    with pytest.raises(
        ValueError,
        match=r"outputs of shape \(64, 3\) and targets of shape \(64,\).*one output \(logit\) for each class",
    ):
        net.fit(*iris)


def test_what_a_criterion_raises_itself_is_not_reworded(iris):
    def criterion(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("its own words")

    with pytest.raises(RuntimeError, match=r"^its own words$"):
        TorchRegressor(criterion=criterion, max_epochs=1).fit(iris[0], iris[0][:, :2])


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Complex(nn.Linear):
    def __init__(self, n, m):
        super().__init__(n, m)
        self.phase = nn.Parameter(torch.ones(m, dtype=torch.cfloat))


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Locked(nn.Linear):
    def __init__(self, n, m):
        super().__init__(n, m)
        self.lock = threading.Lock()


class Codes(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.embed, self.out = nn.Embedding(3, 4), nn.Linear(4, m)

    def forward(self, x):
        return self.out(self.embed(x[:, 0].long()))


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (TorchClassifier(device="cuda:99"), ValueError, "device='cuda:99' is not available .* Here there is cpu"),
        (TorchClassifier(MLP), TypeError, r"returned MLP, not a torch\.nn\.Module\. Give a factory, MLP\(\)"),
        (TorchClassifier(Two), ValueError, "forward returns tuple, and not one tensor"),
        (TorchClassifier(Codes), ValueError, "an embedding's codes go from 0 to num_embeddings - 1; name their columns"),
        (TorchClassifier(lambda n, m: nn.utils.weight_norm(nn.Linear(n, m))), ValueError, r"cannot be copied .*parametrizations"),
        (TorchClassifier(lambda n, m: nn.Sequential(nn.Embedding(n, m, max_norm=1.0))), ValueError, r"0 \(Embedding\) changes its own weights"),
        (TorchClassifier(optimizer=type("Muon", (torch.optim.SGD,), {})), ValueError, "Muon works on the matrices"),
        (TorchClassifier(optimizer=torch.optim.LBFGS), TypeError, "step of optimizer .* is called with no closure"),
        (TorchClassifier(optimizer=lambda params, lr: None), TypeError, "returned None, and not a torch optimizer"),
        (TorchClassifier(lr_schedule=lambda share: None), TypeError, "returned None, and not a factor of lr"),
        (TorchClassifier(criterion=lambda outputs, y: 1.0), TypeError, "returned float, which has no gradient"),
        (TorchClassifier(Detached), ValueError, "have no gradient: they were detached"),
        (TorchClassifier(MLP(hidden="64")), ValueError, r"MLP\(hidden='64'\): give a number of units"),
        (TorchClassifier(MLP(hidden=64.0)), ValueError, r"MLP\(hidden=64.0\): give a number of units"),
        (TorchClassifier(lr_schedule=lambda: 1.0), TypeError, r"lr_schedule .* is called with \(share\)"),
        (TorchClassifier(Complex), ValueError, "has complex weights or buffers"),
        (TorchClassifier(lr=1.0, lr_schedule=lambda share: 0.01), ValueError, r"multiplies lr=1 by at most 0\.01"),
        (TorchClassifier(Locked), ValueError, r"cannot be copied \(cannot pickle"),
        (TorchClassifier(optimizer=lambda params: None), TypeError, r"optimizer .* is called with \(params, lr=\.\.\.\)"),
        (TorchClassifier(criterion=lambda outputs: None), TypeError, r"criterion .* is called with \(outputs, targets\)"),
        (TorchClassifier(augment=lambda x: x), TypeError, r"augment .* is called with \(x, generator\)"),
        (TorchClassifier(penalty=lambda: 0), TypeError, r"penalty .* is called with \(weights\)"),
        (TorchClassifier(penalty=lambda w: w["nope"].sum()), ValueError, r"asked for the weights 'nope'; the module has \['1\.weight'"),
        (TorchRegressor(criterion=nn.PoissonNLLLoss), ValueError, "criterion='poisson'"),
        (TorchRegressor(criterion="gamma"), ValueError, "for targets that are positive; y goes from 0 to 2"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_an_estimator_that_cannot_be_fitted_says_so_in_words(iris, net, error, message):
    with pytest.raises(error, match=message):
        net.fit(*iris)


@pytest.mark.parametrize(
    ("net", "space", "message"),
    [
        (TorchClassifier(MLP), uniform(0, 0.5), r"module is the class MLP; give it a factory, MLP\(\)"),
        (TorchClassifier(MLP(activation="rleu")), uniform(0, 0.5), r"^MLP\(activation='rleu'\)"),
        (TorchClassifier(MLP()), uniform(0, 1.5), r"the factory does not take 1\.485 .*Give it a range that suits it"),
        (TorchClassifier(MLP()), uniform(0, 1.0), r"the rate of the Dropout '3' from 0 to 1; .*end the range before 1"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_it_is_not_the_hyperparameter_that_is_blamed(iris, net, space, message):
    with pytest.raises(ValueError, match=message):
        search(estimator=net, param_distributions={"module__dropout": space}).fit(*iris)


@pytest.mark.usefixtures("no_training")
def test_rows_that_are_not_flat_need_a_module_that_takes_them(iris):
    X, y = iris
    with pytest.raises(ValueError, match=r"^MLP takes rows of numbers, and these have the shape \(2, 2\)"):
        search().fit(X.reshape(-1, 2, 2), y)


def test_a_target_transformer_goes_around_the_search(iris):
    with pytest.raises(TypeError, match=r"put it around the search instead"):
        search(estimator=TransformedTargetRegressor(TorchRegressor())).fit(*iris)
