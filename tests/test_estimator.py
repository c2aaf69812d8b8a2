from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_diabetes, make_regression
from sklearn.linear_model import Ridge, TweedieRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from hypertune import MLP, TorchClassifier, TorchRegressor, model_factory


@model_factory
def two_layers(n_features_in: int, n_outputs: int, *, width: int = 8, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(n_features_in, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, n_outputs))


@model_factory
def of_a_function(n_features_in: int, n_outputs: int, *, function: str = "relu") -> nn.Module:
    return nn.Linear(n_features_in, n_outputs)


@pytest.mark.slow
@parametrize_with_checks([
    TorchClassifier(dtype="float64", lr=1e-2, random_state=0),
    TorchRegressor(dtype="float64", lr=1e-2, random_state=0),
])  # fmt: skip
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_labels_of_any_kind(iris):
    X, y = iris
    for labels in (np.array(["setosa", "versicolor", "virginica"]), np.array([10, -3, 7])):
        model = TorchClassifier(MLP(hidden=(16,)), max_epochs=40, lr=1e-2, random_state=0).fit(X, labels[y])
        assert_array_equal(model.classes_, np.unique(labels))
        assert model.score(X, labels[y]) > 0.9
        assert_allclose(model.predict_proba(X).sum(axis=1), 1)


def test_a_linear_regressor_at_fixed_weight_decay_is_ridge():
    """½·wd·‖w‖² against scikit-learn's α‖w‖² on standardised targets: α = N·wd/2·... the two agree to 1e-3."""
    X, y = make_regression(60, 4, noise=20, random_state=0)
    X = (X - X.mean(0)) / X.std(0)
    weight_decay = 0.3
    # Our loss is mean((wx − z)²) + ½·wd·‖w‖², z = (y − ȳ)/s; Ridge's is Σ(wx − z)² + α‖w‖²: α = N·wd/2.
    model = TorchRegressor(
        MLP(hidden=()),
        weight_decay=weight_decay,
        lr=0.05,
        max_epochs=500,
        batch_size=60,
        dtype="float64",
        random_state=0,
    ).fit(X, y)
    exact = Ridge(alpha=len(X) * weight_decay / 2).fit(X, (y - y.mean()) / y.std())
    weights = next(p for name, p in model.module_.named_parameters() if p.dim() == 2)
    assert_allclose(weights[0].detach().numpy(), exact.coef_, rtol=1e-3, atol=1e-4)


def test_one_hidden_layer_may_be_a_number():
    one, same = MLP(hidden=8)(4, 3), MLP(hidden=(8,))(4, 3)
    assert [p.shape for p in one.parameters()] == [p.shape for p in same.parameters()]


def test_with_weight_decay_alone_it_is_a_generalised_linear_model():
    """Half the deviance in units of the mean target, as scikit-learn's own regressors with a logarithmic link minimise it."""
    X, _ = make_regression(80, 3, random_state=0)
    rng = np.random.default_rng(0)
    for criterion, power, y in (
        ("poisson", 1, rng.poisson(2 * np.exp(0.5 * X[:, 0]))),
        ("gamma", 2, 5 * np.exp(0.5 * X[:, 0]) * rng.gamma(2.0, size=80)),
    ):
        model = TorchRegressor(
            MLP(hidden=()), criterion=criterion, weight_decay=0.1, lr=0.02, max_epochs=600, batch_size=80, dtype="float64",
            random_state=0,
        ).fit(X, y)  # fmt: skip
        exact = TweedieRegressor(power=power, link="log", alpha=0.1, tol=1e-8).fit(X, y / y.mean())
        assert_allclose(model.predict(X), y.mean() * exact.predict(X), rtol=1e-3)
        assert model.predict(10 * X).min() > 0
        far = model.set_params(criterion="squared_error").predict(1e6 * X)  # of the criterion that it was fitted by
        assert np.isfinite(far).all() and far.min() > 0  # noqa: PT018


def test_a_schedule_may_return_any_number(iris):
    curves = [
        TorchClassifier(lr_schedule=schedule, max_epochs=2, random_state=0).fit(*iris).loss_curve_
        for schedule in (
            lambda share: 1 - share,
            lambda share: np.asarray(1 - share),
            lambda share: torch.tensor(1 - share),
        )
    ]
    assert curves[0] == curves[1]
    assert curves[0] == pytest.approx(curves[2], rel=1e-6)


def test_a_schedule_of_ones_own_gets_the_share_that_is_done():
    X, y = make_regression(60, 3, random_state=0)
    shares = []
    net = TorchRegressor(MLP(hidden=()), max_epochs=2, batch_size=20, random_state=0)
    own = clone(net).set_params(lr_schedule=lambda share: shares.append(share) or 0.5)
    half = clone(net).set_params(lr_schedule="constant", lr=net.lr / 2)
    assert_allclose(own.fit(X, y).predict(X), half.fit(X, y).predict(X), rtol=1e-6)
    assert set(np.round(np.arange(7) / 6, 6)) <= set(np.round(shares, 6))
    assert (min(shares), max(shares)) == (0, 1)


def test_several_outputs():
    X, Y = make_regression(80, 5, n_targets=3, random_state=0)
    model = TorchRegressor(MLP(hidden=()), lr=0.05, random_state=0).fit(X, Y)
    assert model.predict(X).shape == (80, 3)
    assert model.score(X, Y) > 0.99
    assert TorchRegressor(max_epochs=2).fit(X, Y[:, :1]).predict(X).shape == (80, 1)
    assert TorchRegressor(max_epochs=2).fit(X, Y[:, 0]).predict(X).shape == (80,)


def test_real_regression():
    X, y = load_diabetes(return_X_y=True)
    model = TorchRegressor(MLP(hidden=(32,), dropout=0.3), weight_decay=0.03, random_state=0).fit(X[:300] * 20, y[:300])
    assert model.score(X[300:] * 20, y[300:]) > 0.4


@pytest.mark.parametrize(
    "params",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": torch.optim.AdamW},
        {"lr_schedule": "constant"},
        {"dtype": "float64"},
        {"criterion": "squared_error", "label_smoothing": 0.1},
        {"criterion": nn.CrossEntropyLoss()},
        {"criterion": nn.CrossEntropyLoss},
        {"weight_decay": 1e-3, "l1": 1e-4, "input_noise": 0.1, "label_smoothing": 0.05},
        {"module": two_layers},
        {"module": lambda n, m: nn.Linear(n, m)},
    ],
)
def test_its_options_train(iris, params):
    X, y = iris
    model = TorchClassifier(**{"module": MLP(hidden=(16,)), "lr": 1e-2, "random_state": 0, "max_epochs": 50, **params})
    assert model.fit(X, y).score(X, y) > 0.8
    assert model.loss_curve_[-1] < model.loss_curve_[0]


def test_the_same_seed_gives_the_same_model_and_global_random_states_are_untouched(iris):
    X, y = iris
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    make = TorchClassifier(MLP(dropout=0.3), max_epochs=5, input_noise=0.1)
    a, b = (clone(make).set_params(random_state=3).fit(X, y) for _ in range(2))
    c = clone(make).fit(X, y)
    assert_array_equal(a.predict_proba(X), b.predict_proba(X))
    assert np.abs(a.predict_proba(X) - c.predict_proba(X)).max() > 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_integer_weights_are_repetitions(iris):
    """Full batches in float64: a weight of 2 is the row twice, a weight of 0 is no row."""
    X, y = iris
    weight = np.arange(len(X)) % 3
    make = TorchClassifier(batch_size=10_000, dtype="float64", max_epochs=30, random_state=0)
    weighted = clone(make).fit(X, y, sample_weight=weight)
    repeated = clone(make).fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
    assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), rtol=1e-6, atol=1e-9)


def test_factories_are_searchable_and_travel(iris):
    X, y = iris
    search = GridSearchCV(
        TorchClassifier(two_layers, max_epochs=3, random_state=0),
        {"module__dropout": [0.0, 0.5], "module__width": [4]},
        cv=2,
    ).fit(X, y)
    assert search.best_params_["module__width"] == 4
    assert two_layers.get_params() == {"width": 8, "dropout": 0.0}
    for factory in (MLP(hidden=(3,)), two_layers, model_factory(two_layers.function, width=3), of_a_function):
        travelled = pickle.loads(pickle.dumps(factory))
        assert repr(travelled) == repr(factory)
        assert repr(clone(factory)) == repr(factory)
    with pytest.raises(TypeError, match=r"no keyword \['depth'\]"):
        model_factory(two_layers.function, depth=3)
    with pytest.raises(TypeError, match="wrap what builds it"):
        model_factory(nn.Linear(1, 1))


def test_a_factory_is_its_users_and_keywords_make_another():
    one, other = TorchClassifier(two_layers), TorchClassifier(two_layers).set_params(module__width=4)
    assert one.get_params()["module__width"] == two_layers.get_params()["width"] == 8
    assert other.get_params()["module__width"] == two_layers(width=4).get_params()["width"] == 4
    assert two_layers(4, 3)[0].out_features == 8
    assert two_layers(4, 3, width=5)[0].out_features == two_layers(width=5)(4, 3)[0].out_features == 5
    assert two_layers(n_features_in=4, n_outputs=3)[0].in_features == 4
    with pytest.raises(TypeError, match="depth"):
        two_layers(depth=3)


def test_a_fitted_model_can_be_pickled(iris):
    X, y = iris
    model = TorchClassifier(two_layers, max_epochs=3, random_state=0).fit(X, y)
    assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))


def test_the_data_are_never_changed_and_may_be_of_any_layout(iris):
    X, y = iris
    expected = TorchClassifier(max_epochs=3, random_state=0).fit(X, y).predict_proba(X)
    frozen = X.copy()
    frozen.setflags(write=False)
    for same in (frozen, np.asfortranarray(X), X[::-1][::-1], X.astype(">f8"), X.astype(np.longdouble)):
        model = TorchClassifier(max_epochs=3, random_state=0).fit(same, y)
        assert_allclose(model.predict_proba(same), expected, atol=1e-6)
        assert_array_equal(same, X)


def test_images_reach_the_factory_with_their_shape():
    def conv(shape: tuple[int, int, int], n_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, n_outputs))

    X = np.random.default_rng(0).normal(size=(20, 2, 6, 6))
    model = TorchClassifier(conv, max_epochs=2, random_state=0).fit(X, np.arange(20) % 2)
    assert model.predict_proba(X).shape == (20, 2)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"module": nn.Linear(4, 3)}, TypeError, "expected a factory"),
        ({"module": lambda n, m: "net"}, TypeError, "returned str, not a torch.nn.Module"),
        (
            {"module": lambda n, m: nn.Linear(n, m + 1)},
            ValueError,
            r"shape \(2, 4\); expected \(2, 3\): one column per class",
        ),
        ({"module": lambda n, m: nn.ReLU()}, ValueError, "without trainable parameters"),
        (
            {"weight_decay": -1.0},
            ValueError,
            r"'weight_decay' parameter of TorchClassifier must be .* in the range \[0.0, inf\)",
        ),
        ({"label_smoothing": 1.5}, ValueError, r"'label_smoothing' .* in the range \[0.0, 1.0\]. Got 1.5"),
        ({"lr": 0.0}, ValueError, "'lr' parameter .* Got 0.0"),
        ({"max_epochs": 0}, ValueError, "'max_epochs' parameter .* Got 0"),
        ({"optimizer": "lbfgs"}, ValueError, "'optimizer' .* among {'(adam|sgd)', '(adam|sgd)'} or a callable"),
        ({"lr_schedule": "step"}, ValueError, "'lr_schedule' .* Got 'step'"),
        ({"dtype": "float16"}, ValueError, "'dtype' .* Got 'float16'"),
        ({"criterion": "hinge"}, ValueError, "'criterion' .* Got 'hinge'"),
        ({"module": MLP(activation="swish")}, ValueError, "activation='swish'"),
        (
            {"lr": 1e9, "optimizer": "sgd", "criterion": "squared_error"},
            ValueError,
            r"training loss became .* in epoch \d+",
        ),
    ],
)
def test_bad_parameters_are_refused_with_what_to_do(iris, params, error, message):
    with pytest.raises(error, match=message):
        TorchClassifier(**{"max_epochs": 2, **params}).fit(*iris)


def test_bad_data_are_refused(iris):
    X, y = iris
    with pytest.raises(ValueError, match="only one class"):
        TorchClassifier().fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="NaN"):
        TorchClassifier().fit(np.where(X > 1, np.nan, X), y)
    with pytest.raises(ValueError, match="infinity"):
        TorchClassifier().fit(np.where(X > 1, np.inf, X), y)
    with pytest.raises(ValueError, match="zero"):
        TorchClassifier().fit(X, y, sample_weight=np.zeros(len(X)))
    with pytest.raises(ValueError, match=r"too large for float32.*dtype='float64'"):
        TorchClassifier().fit(X * 1e39, y)


def test_it_trains_whatever_mode_the_caller_is_in(iris):
    X, y = iris
    net = TorchClassifier(max_epochs=2, random_state=0)
    expected = net.fit(X, y).predict_proba(X)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_array_equal(clone(net).fit(X, y).predict_proba(X), expected)


@pytest.mark.skipif(not hasattr(TorchClassifier, "set_callbacks"), reason="scikit-learn before 1.9 has no callbacks")
def test_callbacks_see_every_epoch_with_a_model_that_predicts_and_may_stop(iris):
    from sklearn.callback import ScoringMonitor
    from sklearn.callback.tests._utils import RecordingCallback

    class StopAfter(RecordingCallback):
        scores: list = []  # noqa: RUF012

        def on_fit_task_end(self, estimator, context, *, X, y, fitted_estimator=None):
            if context.task_name == "epoch":
                self.scores.append(fitted_estimator.score(X, y))
            return len(self.scores) == 7

    model = TorchClassifier(MLP((8,)), max_epochs=20, random_state=0)
    stopped = clone(model).set_callbacks(StopAfter()).fit(*iris)
    assert stopped.n_iter_ == len(stopped.loss_curve_) == len(StopAfter.scores) == 7
    assert stopped.score(*iris) == StopAfter.scores[-1] > StopAfter.scores[0]
    monitor = ScoringMonitor(scoring="accuracy")
    assert len(clone(model).set_callbacks(monitor).fit(*iris).loss_curve_) == 20
    assert monitor.get_logs().data_as_pandas["accuracy"].tolist()[:7] == StopAfter.scores
    assert stopped.loss_curve_ == model.fit(*iris).loss_curve_[:7]  # watching changes nothing


@pytest.mark.slow
def test_a_decorated_function_of_a_script_reaches_worker_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from sklearn.datasets import load_iris\n"
        "from sklearn.model_selection import cross_val_score\n"
        "from torch import nn\n"
        "from hypertune import TorchClassifier, model_factory\n"
        "@model_factory\n"
        "def net(n, m, *, width=4):\n"
        "    return nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Linear(width, m))\n"
        "if __name__ == '__main__':\n"
        "    model = TorchClassifier(net, max_epochs=1, random_state=0)\n"
        "    print(len(cross_val_score(model, *load_iris(return_X_y=True), cv=2, n_jobs=2)))\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.stdout == "2\n", run.stderr


def test_no_generator_of_another_device_is_seeded(iris, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a fit on the CPU seeded CUDA"))
    TorchClassifier(max_epochs=1, random_state=0).fit(*iris)
