"""skorch nets as estimators of the search."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import EarlyStopping, LRScheduler
from skorch.dataset import ValidSplit
from torch import nn
from torch.utils.data import RandomSampler

from hypertune import HyperTrainingSearchCV, per_layer
from hypertune.batches import Batch
from hypertune.retraining import retrain
from hypertune.skorch import SkorchNet
from hypertune.training import hyper_train
from tests.test_retraining import Keeping

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:skorch", "ignore:.*weights_only.*:FutureWarning")


class Net(nn.Module):
    def __init__(self, width: int = 16, dropout: float = 0.1, inputs: int = 4, outputs: int = 3):
        super().__init__()
        self.hidden, self.drop, self.out = nn.Linear(inputs, width), nn.Dropout(dropout), nn.Linear(width, outputs)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.relu(self.hidden(X))))


SPACE = {
    "optimizer__weight_decay": loguniform(1e-5, 1e-1),
    "module__dropout": uniform(0, 0.6),
    "criterion__label_smoothing": uniform(0, 0.3),
}
RATED = SPACE | {"lr": loguniform(1e-4, 0.3)}


def classifier(**params) -> NeuralNetClassifier:
    defaults = {
        "criterion": nn.CrossEntropyLoss,
        "optimizer": torch.optim.Adam,
        "lr": 0.02,
        "max_epochs": 20,
        "batch_size": 32,
        "iterator_train__shuffle": True,
        "train_split": None,
        "verbose": 0,
    }
    return NeuralNetClassifier(Net, **{**defaults, **params})


def search(net, space=SPACE, **params) -> HyperTrainingSearchCV:
    defaults = {"cv": 3, "random_state": 0, "error_score": "raise", "start": "estimator"}
    return HyperTrainingSearchCV(net, space, **{**defaults, **params})


@pytest.fixture(scope="module")
def iris32() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_iris(return_X_y=True)
    return StandardScaler().fit_transform(X).astype(np.float32), y


def test_penalty_dropout_and_smoothing_are_tuned_and_the_result_is_a_fitted_skorch_net(iris32):
    X, y = iris32
    torch.manual_seed(0)
    found = search(classifier(criterion__label_smoothing=0.1), scoring="neg_log_loss").fit(X, y)
    assert isinstance(found.best_estimator_, NeuralNetClassifier)
    assert found.best_estimator_.score(X, y) > 0.9
    assert found.best_params_.keys() == SPACE.keys()
    start, end = ({name: found.history_[name][i] for name in SPACE} for i in (0, -1))
    assert all(start[name] != end[name] for name in SPACE)
    assert (
        found.best_estimator_.get_params()["optimizer__weight_decay"] == found.best_params_["optimizer__weight_decay"]
    )
    assert_array_equal(pickle.loads(pickle.dumps(found)).predict(X), found.predict(X))
    at = found.best_response_.estimator_at({"module__dropout": 0.3})
    assert isinstance(at, NeuralNetClassifier)
    assert at.score(X, y) > 0.9


def test_in_a_pipeline_and_in_cross_validation(iris32):
    X, y = iris32
    torch.manual_seed(0)
    model = make_pipeline(StandardScaler(), classifier())
    space = {f"neuralnetclassifier__{name}": prior for name, prior in SPACE.items()}
    assert cross_val_score(search(model, space), X, y, cv=2).mean() > 0.85


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_tuned_loss_is_the_loss_that_skorch_trains(iris32, optimizer):
    """One full-batch step of skorch moves the weights along the gradient of our training loss, biases included."""
    X, y = iris32
    setting = {"optimizer__weight_decay": 0.3, "criterion__label_smoothing": 0.2, "module__dropout": 0.0}
    net = classifier(optimizer=optimizer, lr=1e-3, max_epochs=1, batch_size=-1, **setting).initialize()
    adapter = SkorchNet(net)
    objective = adapter._make_objective(net.module_)
    w = objective.initial_weights()[None].requires_grad_()
    rows = adapter._encode(X, y)
    loss = objective.train_loss(w, {}, Batch(rows.x[None], rows.y[None]))
    (gradient,) = torch.autograd.grad(loss.sum(), w)
    w, loss = w.detach(), loss.detach()
    before = w[0].clone()
    net.partial_fit(X, y)
    after = torch.cat([p.detach().reshape(-1) for p in net.module_.parameters()])
    expected = -1e-3 * (gradient[0] if optimizer is torch.optim.SGD else gradient[0].sign())
    assert_allclose((after - before).numpy(), expected.numpy(), rtol=1e-2, atol=2e-5)
    assert_allclose(net.history[-1, "train_loss"], float(loss) - 0.15 * float(w.square().sum()), rtol=1e-4)


def test_regression_binary_and_log_probabilities():
    X, y = load_diabetes(return_X_y=True)
    X, y = StandardScaler().fit_transform(X).astype(np.float32), ((y - y.mean()) / y.std()).astype(np.float32)
    space = {k: SPACE[k] for k in ("optimizer__weight_decay", "module__dropout")}
    torch.manual_seed(0)
    common = {"max_epochs": 10, "train_split": None, "verbose": 0, "lr": 0.05}
    net = NeuralNetRegressor(Net, module__inputs=10, module__outputs=1, **common)
    assert search(net, space).fit(X, y[:, None]).score(X, y[:, None]) > 0.2

    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X).astype(np.float32)
    binary = NeuralNetBinaryClassifier(Net, module__inputs=30, module__outputs=1, **common)
    assert search(binary, space).fit(X, y.astype(np.float32)).score(X, y) > 0.9

    class Probabilities(Net):
        def forward(self, X):
            return super().forward(X).softmax(dim=-1)

    default_loss = NeuralNetClassifier(Probabilities, module__inputs=30, module__outputs=2, **common)  # NLLLoss
    assert search(default_loss, space).fit(X, y).score(X, y) > 0.9


def test_the_learning_rate_follows_the_nets_scheduler():
    net = classifier(max_epochs=15, callbacks=[("lr", LRScheduler("StepLR", step_size=5, gamma=0.1))])
    optimizer, schedule = SkorchNet(net)._make_optimizer([nn.Parameter(torch.zeros(3))], steps=30)
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert_allclose(rates, np.repeat([0.02, 0.002, 0.0002], 10))


@pytest.mark.parametrize(
    ("net", "space", "message"),
    [
        (classifier(optimizer=torch.optim.AdamW), SPACE, "AdamW shrinks the weights beside the loss"),
        (classifier(optimizer=type("Muon", (torch.optim.SGD,), {})), SPACE, "Muon works on the matrices"),
        (classifier(criterion__weight=torch.ones(3)), SPACE, "needs criterion=torch.nn.CrossEntropyLoss"),
        (classifier(), {"optimizer__weight_decay": per_layer(loguniform(1e-5, 1))}, "This one is a single number"),
        (classifier(), {"lr": loguniform(1e-4, 1)}, "such as optimizer__weight_decay"),
        (classifier(), {"optimizer__lr": loguniform(1e-4, 1)}, "by trying some values: lr"),
        (
            classifier(optimizer__lr=0.1),
            SPACE | {"lr": loguniform(1e-4, 1)},
            r"optimizer__lr=0\.1, which is used in its place",
        ),
        (classifier(), {"module__width": [4, 8]}, "such as 'optimizer__weight_decay'"),
        (classifier(), SPACE | {"criterion": [nn.CrossEntropyLoss, nn.NLLLoss]}, "of different units"),
        (classifier(), SPACE | {"criterion__ignore_index": [-100, 1]}, "of different units"),
        (classifier(), SPACE | {"iterator_train__shuffle": [True, False]}, "batch_size and max_epochs alone"),
        (classifier(callbacks=[LRScheduler("ReduceLROnPlateau")]), SPACE, "depend on a loss"),
        (classifier(), {"module__dropuot": uniform(0, 0.5)}, "did you mean 'module__dropout'"),
        (classifier(), {"module__width": uniform(4, 10)}, "the factory does not take"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_training(iris32, net, space, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search(net, space, start="screened").fit(*iris32)


def test_a_stack_is_what_skorch_trains(iris32):
    """Two settings on two folds, full batches: the weights of four fits of skorch's own."""
    X, y = iris32
    net = classifier(batch_size=-1, max_epochs=7, callbacks=[LRScheduler("StepLR", step_size=3)])
    splits = list(StratifiedKFold(2).split(X, y))
    task = Keeping(net, RATED, cv=splits, random_state=0).fit(X, y).task
    settings = [
        {"module__dropout": 0.0, "criterion__label_smoothing": 0.1, "optimizer__weight_decay": decay, "lr": lr}
        for decay, lr in ((1e-4, 0.02), (0.1, 0.05))
    ]
    found = retrain(task, torch.stack([task.space.encode(one) for one in settings]), seed=5)
    for k, (train, _) in enumerate(splits):
        for c, setting in enumerate(settings):
            torch.manual_seed(5)
            alone = clone(net).set_params(**setting).fit(X[train], y[train])
            weights = np.concatenate([p.detach().numpy().ravel() for p in alone.module_.parameters()])
            assert_allclose(found.weights[k, c], weights, rtol=1e-3, atol=1e-4)
    assert not found.keys  # and none of skorch's is taken for one of these


@pytest.mark.parametrize("lr", [1e-4, 0.02])
def test_it_is_screened_and_the_learning_rate_tried(iris32, lr):
    """From a learning rate with which nothing is learned, too; what is verified is fitted by skorch, so only a few settings are."""
    X, y = iris32
    torch.manual_seed(0)
    found = search(classifier(lr=lr), RATED, start="screened", scoring="neg_log_loss").fit(X, y)
    names = [*found.cv_results_["candidate"]]
    assert names[0] == "tuned"
    assert "own" in names
    others = [name for name in names if name not in ("tuned", "own")]
    assert len(others) <= 1
    assert lr > 0.001 or others  # from nothing learned there is more to find than λ̂
    assert found.best_params_["lr"] > 0.005
    assert found.best_score_ > -0.15
    low, high = found.best_response_.validation_band("module__dropout", [found.best_params_["module__dropout"]])[0]
    assert 0 < low < high


def test_lists_of_values_are_compared(iris32):
    X, y = iris32
    torch.manual_seed(0)
    net = classifier(module__width=1, batch_size=-1)
    space = SPACE | {"module__width": [1, 32], "batch_size": [-1, 16], "optimizer": [torch.optim.Adam, torch.optim.SGD]}
    found = search(net, space, start="screened", scoring="neg_log_loss").fit(X, y)
    assert {k: found.best_params_[k] for k in ("module__width", "batch_size")} == {
        "module__width": 32,
        "batch_size": 16,
    }
    assert found.best_params_["optimizer"] is torch.optim.Adam
    assert found.best_estimator_.module_.hidden.out_features == 32
    assert {"own", "own values"} <= {*found.cv_results_["candidate"]}
    assert (net.module__width, net.batch_size) == (1, -1)


def test_a_copy_shares_no_parameters():
    net = SkorchNet(classifier())
    copied = copy.copy(net)
    copied.set_params(lr=1.0, module__dropout=0.5)
    assert (net.net.lr, net.get_params()["module__dropout"]) == (0.02, 0.1)


def test_data_that_skorch_would_not_take_is_refused_early(iris32):
    X, y = iris32
    with pytest.raises(ValueError, match="skorch does not cast"):
        search(classifier()).fit(X.astype(np.float64), y)
    with pytest.raises(ValueError, match=r"columns skorch passes as keywords; pass X.to_numpy\(\)"):
        search(classifier()).fit(pd.DataFrame(X), y)
    with pytest.raises(ValueError, match="does not encode"):
        search(classifier()).fit(X, np.array(["a", "b", "c"])[y])
    with pytest.raises(ValueError, match="needs a TorchClassifier"):
        search(classifier(), evaluate="hypernetwork").fit(X, y)


def test_small_targets_are_no_constant_prediction(monkeypatch):
    """The targets of a skorch net are as they are: outputs count in their standard deviations."""
    runs = []
    own = hyper_train
    monkeypatch.setattr("hypertune.search.hyper_train", lambda *args, **kwargs: runs.append(1) or own(*args, **kwargs))
    X, y = (a.astype(np.float32) for a in load_diabetes(return_X_y=True))
    module = nn.Linear(10, 1)
    nn.init.zeros_(module.weight)
    net = NeuralNetRegressor(module, lr=0.1, max_epochs=20, train_split=None, verbose=0)
    space = {"optimizer__weight_decay": loguniform(1e-6, 1e-3)}
    HyperTrainingSearchCV(net, space, cv=3, random_state=0).fit(X * 20, y[:, None] * 1e-5)
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"train_split": ValidSplit(5)}, r"train_split \(set it to None\)"),
        ({"callbacks": [("stop", EarlyStopping(monitor="train_loss"))]}, "EarlyStopping"),
        ({"callbacks": [("stop", EarlyStopping)], "callbacks__stop__monitor": "train_loss"}, "EarlyStopping"),
        (
            {"iterator_train__sampler": RandomSampler(range(100)), "iterator_train__shuffle": False},
            "iterator_train__sampler",
        ),
    ],
)
def test_what_the_hyper_training_ignores_is_said(iris32, params, message):
    net = classifier(max_epochs=1, **params)
    with pytest.warns(UserWarning, match=f"it ignores {message}"):
        search(net, SPACE).fit(*iris32)


def test_a_step_of_its_own_is_said(iris32):
    class Own(NeuralNetClassifier):
        def train_step_single(self, batch, **fit_params):
            return super().train_step_single(batch, **fit_params)

    net = Own(**classifier(max_epochs=1).get_params(deep=False))
    with pytest.warns(UserWarning, match="it ignores train_step_single"):
        search(net, SPACE).fit(*iris32)


def test_callbacks_may_be_classes_with_parameters_of_their_own():
    named = {"callbacks": [("lr", LRScheduler)], "callbacks__lr__policy": "StepLR", "callbacks__lr__step_size": 5}
    disabled = {"callbacks": "disable"}
    off = {"callbacks": [("lr", LRScheduler("StepLR", step_size=5))], "callbacks__lr": None}
    for params, rates in ((named, 3), (off, 1), (disabled, 1)):
        optimizer, schedule = SkorchNet(classifier(max_epochs=15, **params))._make_optimizer(
            [nn.Parameter(torch.zeros(3))], steps=15
        )
        seen = set()
        for _ in range(15):
            seen.add(round(optimizer.param_groups[0]["lr"], 9))
            optimizer.step()
            schedule.step()
        assert len(seen) == rates


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_whole_numbers_are_screened_too(iris32, dtype):
    class Codes(nn.Module):
        def __init__(self, dropout: float = 0.1):
            super().__init__()
            self.embed, self.drop, self.out = nn.Embedding(50, 4), nn.Dropout(dropout), nn.Linear(4, 3)

        def forward(self, X):
            return self.out(self.drop(self.embed(X.long()).mean(dim=1)))

    X, y = iris32
    X = ((X - X.min()) * 5).astype(dtype)
    found = search(classifier(max_epochs=5).set_params(module=Codes), SPACE, start="screened").fit(X, y)
    assert found.best_score_ > 0.3
