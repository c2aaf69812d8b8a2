"""On a GPU: what needs no noise of its own comes out as on the CPU, and nothing waits for the device at every step.

Where there is no GPU all of this is left out.
"""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from hypertune import (
    MLP,
    HyperTrainingSearchCV,
    TorchClassifier,
    TorchRegressor,
    per_feature,
    per_layer,
    per_unit,
    per_weight,
)
from tests.searches import assert_scores_are_those_of_own_fits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PENALTIES = {"weight_decay": loguniform(1e-5, 1e1), "l1": loguniform(1e-6, 1e-1)}
NOISES = {"input_noise": uniform(0, 0.5), "mixup": uniform(0, 1), "module__dropout": uniform(0, 0.7)}


def classifier(**params: Any) -> TorchClassifier:
    defaults = {"module": MLP(hidden=(16,)), "lr": 0.02, "max_epochs": 40, "random_state": 0}
    return TorchClassifier(**{**defaults, **params})


def search(estimator: Any, space: dict[str, Any], **params: Any) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(estimator, space, cv=3, random_state=0, error_score="raise", **params)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_fit_is_that_of_the_cpu(iris, optimizer: str):
    X, y = iris
    on = {
        device: classifier(device=device, dtype="float64", optimizer=optimizer, weight_decay=1e-3).fit(X, y)
        for device in ("cpu", "cuda")
    }
    assert next(on["cuda"].module_.parameters()).is_cuda
    assert_allclose(on["cuda"].predict_proba(X), on["cpu"].predict_proba(X), rtol=1e-6)
    assert_allclose(on["cuda"].loss_curve_, on["cpu"].loss_curve_, rtol=1e-6)


@pytest.mark.parametrize(
    "algorithm", ["joint", "global", "simplified", "implicit", "t1t2", "unrolled", "forward", "hybrid"]
)
def test_a_search_is_that_of_the_cpu(iris, algorithm: str):
    """In float64, so that rounding does not grow to something."""
    X, y = iris
    on = {
        device: search(classifier(device=device, dtype="float64"), PENALTIES, algorithm=algorithm).fit(X, y)
        for device in ("cpu", "cuda")
    }
    assert_allclose(on["cuda"].history_["validation_loss"], on["cpu"].history_["validation_loss"], rtol=1e-3)
    for name, value in on["cpu"].best_params_.items():
        assert on["cuda"].best_params_[name] == pytest.approx(value, rel=0.02)
    assert_array_equal(on["cuda"].predict(X), on["cpu"].predict(X))


@pytest.mark.parametrize("hidden", [(16,), (400, 400)])
def test_a_learning_rate_is_that_of_the_cpu(iris, hidden: tuple[int, ...]):
    """In one stack, and one after the other."""
    space = {"lr": loguniform(1e-4, 1e-1), "weight_decay": loguniform(1e-5, 1e1)}
    net = classifier(module=MLP(hidden=hidden), dtype="float64", lr=1e-3, max_epochs=5)
    on = {device: search(clone(net).set_params(device=device), space).fit(*iris) for device in ("cpu", "cuda")}
    assert on["cuda"].history_["lr"] == pytest.approx(on["cpu"].history_["lr"], rel=1e-3)
    assert {*on["cuda"].cv_results_["candidate"]} == {*on["cpu"].cv_results_["candidate"]}
    assert_allclose(on["cuda"].cv_results_["mean_test_score"], on["cpu"].cv_results_["mean_test_score"], atol=0.02)


@pytest.mark.parametrize("hidden", [[(4,), (16,)], [(400,), (400, 400)]])
def test_lists_of_values_are_chosen_as_on_the_cpu(iris, hidden: list[tuple[int, ...]]):
    """In one stack, and one after the other."""
    space = {"module__hidden": hidden, "batch_size": [16, 64], "weight_decay": loguniform(1e-5, 1e1)}
    net = classifier(module=MLP(hidden=hidden[0]), dtype="float64", max_epochs=5)
    on = {device: search(clone(net).set_params(device=device), space).fit(*iris) for device in ("cpu", "cuda")}
    assert on["cuda"].best_params_["module__hidden"] == on["cpu"].best_params_["module__hidden"]
    assert on["cuda"].best_params_["batch_size"] == on["cpu"].best_params_["batch_size"]
    assert_allclose(on["cuda"].cv_results_["mean_test_score"], on["cpu"].cv_results_["mean_test_score"], atol=0.02)
    assert next(on["cuda"].best_estimator_.module_.parameters()).is_cuda


@pytest.mark.parametrize("per", [per_layer, per_unit, per_weight, per_feature])
@pytest.mark.parametrize("algorithm", ["joint", "implicit"])
def test_a_finer_grain_is_that_of_the_cpu(iris, per: Any, algorithm: str):
    X, y = iris
    on = {
        device: search(
            classifier(device=device, dtype="float64"),
            {"weight_decay": per(loguniform(1e-5, 1e1)), "label_smoothing": uniform(0, 0.5)},
            algorithm=algorithm,
        ).fit(X, y)
        for device in ("cpu", "cuda")
    }
    assert_allclose(on["cuda"].history_["validation_loss"], on["cpu"].history_["validation_loss"], rtol=1e-3)


class Last(nn.Module):
    """A recurrent layer, and what it says after the last row of an image."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0][:, -1]


class Attention(nn.Module):
    """Of the rows of an image to each other."""

    def __init__(self, inputs: int, classes: int, dropout: float = 0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.encoder(x.unflatten(1, (8, 8))).flatten(1))


class Normed(nn.Sequential):
    def __init__(self, inputs: int, classes: int, dropout: float = 0.0):
        super().__init__(
            nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, classes)
        )


def recurrent(kind: type[nn.RNNBase], **form: Any) -> Callable[..., nn.Module]:
    def build(inputs: int, classes: int, dropout: float = 0.0) -> nn.Module:
        width = 8 * (1 + form.get("bidirectional", False))
        layer = kind(8, 8, num_layers=2, batch_first=True, dropout=dropout, **form)
        return nn.Sequential(nn.Unflatten(1, (8, 8)), Last(layer), nn.Linear(width, classes))

    return build


STACKED = {
    "rnn": recurrent(nn.RNN),
    "gru": recurrent(nn.GRU, bidirectional=True),
    "lstm": recurrent(nn.LSTM),
    "attention": Attention,
    "batch norm": Normed,
}


@pytest.mark.parametrize("kind", STACKED)
def test_layers_of_our_own_are_searched_as_on_the_cpu(digits, kind: str):
    X, y = digits[0][:300], digits[1][:300]
    on = {
        device: search(
            classifier(module=STACKED[kind], device=device, dtype="float64", max_epochs=10),
            {"weight_decay": loguniform(1e-5, 1e1), "label_smoothing": uniform(0, 0.5)},
        ).fit(X, y)
        for device in ("cpu", "cuda")
    }
    assert_allclose(on["cuda"].history_["validation_loss"], on["cpu"].history_["validation_loss"], rtol=1e-3)
    for results in zip(*(on[device].cv_results_["params"] for device in on), strict=True):
        for name in results[0]:
            assert results[1][name] == pytest.approx(results[0][name], rel=0.02)


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.filterwarnings("ignore:.*does not work under torch.func.vmap")
def test_candidates_have_the_scores_of_their_own_fits(digits, used, kind: str):
    """With noise, which is drawn on the GPU, for all of them at once."""
    net = classifier(module=STACKED[kind], device="cuda", dtype="float64", max_epochs=6)
    space = {"weight_decay": loguniform(1e-5, 1e-1), "module__dropout": uniform(0, 0.5), "input_noise": uniform(0, 1)}
    found = search(net, space, scoring="neg_log_loss").fit(digits[0][:300], digits[1][:300])
    assert used.count(True) == 3 * len(found.cv_results_["params"])
    assert_scores_are_those_of_own_fits(found, digits[0][:300], digits[1][:300], rel=1e-6)


def test_weights_of_classes_go_where_the_model_is(iris):
    net = classifier(device="cuda", criterion=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    found = search(net, PENALTIES, scoring="neg_log_loss").fit(*iris)
    assert_scores_are_those_of_own_fits(found, *iris, rel=1e-3)


class Coded(nn.Module):
    """A code out of range would end everything on the device."""

    def __init__(self, inputs: dict[str, int], classes: int):
        super().__init__()
        self.embed, self.out = nn.Embedding(4, 3), nn.Linear(inputs["numbers"] + 3, classes)

    def forward(self, code: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.embed(code[:, 0].long()), numbers], dim=1))


def test_codes_stay_in_their_range(iris):
    X = np.column_stack([np.arange(len(iris[0])) % 4, iris[0]])
    net = classifier(module=Coded, device="cuda", inputs={"code": [0], "numbers": [1, 2, 3, 4]})
    space = {"input_noise": per_feature(uniform(0, 1)), "weight_decay": loguniform(1e-5, 1e1)}
    assert search(net, space).fit(X, iris[1]).best_score_ > 0.8


def test_several_labels(iris):
    X, y = (rows[np.random.default_rng(0).permutation(len(rows))] for rows in iris)
    Y = np.stack([y > 0, y > 1], axis=1).astype(int)
    assert search(classifier(device="cuda"), PENALTIES | NOISES).fit(X, Y).best_score_ > 0.7


def test_noise_drawn_on_the_gpu_is_reproducible_and_nobody_else_s(iris):
    X, y = iris
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    found = [search(classifier(device="cuda"), PENALTIES | NOISES).fit(X, y) for _ in range(2)]
    assert found[0].best_params_ == pytest.approx(found[1].best_params_, rel=1e-3)
    assert found[0].best_score_ > 0.9
    assert all(
        torch.equal(*pair) for pair in zip(before, (torch.cuda.get_rng_state(), torch.get_rng_state()), strict=True)
    )


def test_as_a_drop_in(iris):
    X, y = iris
    pipeline = make_pipeline(StandardScaler(), classifier(device="cuda"))
    tuned = search(pipeline, {f"torchclassifier__{name}": prior for name, prior in (PENALTIES | NOISES).items()})
    assert cross_val_score(tuned, X, y, cv=3, error_score="raise").mean() > 0.9
    tuned.fit(X, y)
    again = pickle.loads(pickle.dumps(tuned))
    assert_array_equal(again.predict(X), tuned.predict(X))
    assert isinstance(tuned.predict_proba(X), np.ndarray)
    curve = tuned.best_response_.validation_curve("torchclassifier__weight_decay", np.geomspace(1e-4, 1.0, 5))
    assert np.isfinite(curve).all()
    weight_decay = tuned.best_response_.params["torchclassifier__weight_decay"]
    assert np.isfinite(tuned.best_response_.validation_band("torchclassifier__weight_decay", [weight_decay])).all()


def test_a_regressor_of_several_targets(iris):
    X = np.random.default_rng(0).permutation(iris[0])
    net = TorchRegressor(MLP(hidden=(16,)), lr=0.02, max_epochs=40, random_state=0, device="cuda")
    assert search(net, PENALTIES).fit(X[:, :2], X[:, 2:]).best_score_ > 0.5


class ConvNet(nn.Sequential):
    def __init__(self, inputs: int, classes: int, drop_0: float = 0.1, drop_1: float = 0.1):
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(drop_0),
            nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
            nn.Dropout(drop_1), nn.Linear(256, classes),
        )  # fmt: skip


class Opaque(nn.Module):
    """What cannot be stacked is called network by network."""

    def __init__(self, inputs: int, classes: int, dropout: float = 0.1):
        super().__init__()
        self.layer, self.drop, self.out = nn.Linear(inputs, 32), nn.Dropout(dropout), nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() == 0:
            return self.out(self.drop(self.layer(x)))
        return self.out(self.drop(torch.relu(self.layer(x))))


class Recurrent(nn.Module):
    """cuDNN gives the gradient of a recurrent layer in training mode only."""

    def __init__(self, inputs: int, classes: int, dropout: float = 0.1):
        super().__init__()
        self.rnn, self.drop, self.out = nn.GRU(8, 32, batch_first=True), nn.Dropout(dropout), nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.rnn(x.unflatten(1, (8, 8)))[0][:, -1]))


def shift(x: torch.Tensor, generator: torch.Generator, scale: float = 0.1) -> torch.Tensor:
    return x + scale * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


@pytest.mark.parametrize(
    ("params", "space"),
    [
        ({"module": ConvNet}, {"weight_decay": per_layer(loguniform(1e-6, 1e-1)), "module__drop_0": uniform(0, 0.5), "module__drop_1": uniform(0, 0.7)}),
        ({"module": Opaque}, {"weight_decay": loguniform(1e-6, 1e-1), "module__dropout": uniform(0, 0.7)}),
        ({"module": Recurrent, "max_epochs": 40}, {"weight_decay": loguniform(1e-6, 1e-1), "module__dropout": uniform(0, 0.7)}),
        ({}, {"input_noise": per_feature(uniform(0, 1.0))}),
        ({"augment": shift}, {"augment__scale": uniform(0, 1.0)}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*does not work under torch.func.vmap")
def test_kinds_of_models(digits, params: dict[str, Any], space: dict[str, Any]):
    X, y = digits[0][:600], digits[1][:600]
    assert search(classifier(device="cuda", **{"max_epochs": 8, **params}), space).fit(X, y).best_score_ > 0.8


def test_weights_of_rows(iris):
    X, y = iris
    net = classifier(device="cuda", sample_weight=np.ones(len(X)))
    found = search(net, {"sample_weight": loguniform(0.1, 10.0)}).fit(X, y)
    assert found.best_params_["sample_weight"].shape == (len(X),)


@pytest.mark.filterwarnings("default")
def test_a_step_does_not_wait_for_the_device(digits):
    """The host runs ahead: it waits at records and once a pass, not at every step."""
    X, y = digits[0][:1000], digits[1][:1000]

    def waits(epochs: int) -> Counter:
        """Places in the code at which the host waited for the device, by how often."""
        net = TorchClassifier(MLP(hidden=(32,)), batch_size=10, max_epochs=epochs, device="cuda", random_state=0)
        tuner = search(net, PENALTIES | NOISES, evaluate="hypernetwork", refit=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                tuner.fit(X, y)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message))

    waits(1)
    more = waits(20)
    more.subtract(waits(10))
    steps = 10 * 67  # of the ten epochs more
    assert more.total() < 0.25 * steps, more.most_common(5)
