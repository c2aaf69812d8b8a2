"""Modules as people write them: each kind with each kind of hyperparameter and each algorithm, a few steps on small data."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from hypertune import HyperTrainingSearchCV, TorchClassifier, per_layer, per_unit

N = 48


class Residual(nn.Module):
    def __init__(self, n, m, dropout=0.1):
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(n, n), nn.LayerNorm(n), nn.Linear(n, m)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.out(x + self.drop(torch.tanh(self.inner(self.norm(x)))))


class DropPath(nn.Module):
    """A user's own layer, that reads a number."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, device=x.device, dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)


class OwnDropPath(nn.Module):
    def __init__(self, n, m, dropout=0.1):
        super().__init__()
        self.inner, self.path, self.out = nn.Linear(n, n), DropPath(dropout), nn.Linear(n, m)

    def forward(self, x):
        return self.out(x + self.path(F.relu(self.inner(x))))


class Sequence(nn.Module):
    """LSTM or GRU on (N, T, F)."""

    kind: type[nn.Module] = nn.LSTM

    def __init__(self, shape, m, dropout=0.1):
        super().__init__()
        self.rnn = self.kind(shape[1], 6, num_layers=2, batch_first=True, dropout=dropout)
        self.out = nn.Linear(6, m)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Gru(Sequence):
    kind = nn.GRU


class Transformer(nn.Module):
    def __init__(self, shape, m, dropout=0.1):
        super().__init__()
        self.embed = nn.Linear(shape[1], 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.out = nn.Linear(8, m)

    def forward(self, x):
        return self.out(self.layer(self.embed(x)).mean(dim=1))


class StackedTransformer(Transformer):
    """Dropout in the attention is what cannot be stacked."""

    def __init__(self, shape, m, dropout=0.1):
        super().__init__(shape, m, dropout=0.0)
        self.out = nn.Sequential(nn.Dropout(dropout), self.out)


class Attention(nn.Module):
    def __init__(self, shape, m, dropout=0.1):
        super().__init__()
        self.embed, self.out = nn.Linear(shape[1], 8), nn.Linear(8, m)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)

    def forward(self, x):
        h = self.embed(x)
        return self.out(self.attention(h, h, h, need_weights=False)[0].mean(dim=1))


class Embedded(nn.Module):
    """Column 0 is a category, column 1 too, the rest are numbers; the two embeddings are tied."""

    def __init__(self, n, m, dropout=0.1):
        super().__init__()
        self.first, self.second = nn.Embedding(4, 3), nn.Embedding(4, 3)
        self.second.weight = self.first.weight
        self.out, self.drop = nn.Linear(6 + n - 2, m), nn.Dropout(dropout)

    def forward(self, x):
        category = x[:, :2].round().clamp(0, 3).long()
        parts = [self.first(category[:, 0]), self.second(category[:, 1]), x[:, 2:]]
        return self.out(self.drop(torch.cat(parts, dim=1)))


class Frozen(nn.Module):
    def __init__(self, n, m, dropout=0.1):
        super().__init__()
        self.features = nn.Linear(n, 8).requires_grad_(False)
        self.register_buffer("shift", torch.ones(8))
        self.out, self.drop = nn.Linear(8, m), nn.Dropout(dropout)

    def forward(self, x):
        return self.out(self.drop(torch.relu(self.features(x) + self.shift)))


def conv(norm):
    def build(shape, m, dropout=0.1):
        return nn.Sequential(
            nn.Conv2d(shape[0], 6, 3, padding=1), norm(6), nn.ReLU(), nn.Dropout2d(dropout),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, m),
        )  # fmt: skip

    return build


def conv1d(shape, m, dropout=0.1):
    return nn.Sequential(
        nn.Conv1d(shape[0], 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Dropout1d(dropout),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, m),
    )  # fmt: skip


def alpha(n, m, dropout=0.1):
    return nn.Sequential(nn.Linear(n, 8), nn.SELU(), nn.AlphaDropout(dropout), nn.Linear(8, m))


def batch_norm(n, m, dropout=0.1):
    return nn.Sequential(nn.Linear(n, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, m))


def spectral(n, m, dropout=0.1):
    inner = nn.utils.parametrizations.spectral_norm(nn.Linear(n, 8))
    return nn.Sequential(inner, nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, m))


FLAT, IMAGE, SERIES = (5,), (2, 4, 4), (6, 3)
MODULES = {
    "residual": (Residual, FLAT),
    "own layer": (OwnDropPath, FLAT),
    "alpha dropout": (alpha, FLAT),
    "batch norm": (batch_norm, FLAT),
    "spectral norm": (spectral, FLAT),
    "embedding, tied": (Embedded, FLAT),
    "frozen, buffer": (Frozen, FLAT),
    "conv2d batch norm": (conv(nn.BatchNorm2d), IMAGE),
    "conv2d group norm": (conv(lambda channels: nn.GroupNorm(2, channels)), IMAGE),
    "conv2d instance norm": (conv(nn.InstanceNorm2d), IMAGE),
    "conv1d": (conv1d, SERIES),
    "lstm": (Sequence, SERIES),
    "gru": (Gru, SERIES),
    "transformer": (Transformer, SERIES),
    "transformer, stacked": (StackedTransformer, SERIES),
    "attention": (Attention, SERIES),
}


def _penalty(weights, strength=0.01):
    return strength * sum(w.square().sum() for w in weights.values())


def _augment(x, generator, scale=0.1):
    return x + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)


PRIOR = loguniform(1e-5, 1e0)
KINDS = {
    "dropout": {"module__dropout": uniform(0, 0.5)},
    "loss": {"weight_decay": PRIOR, "l1": PRIOR, "label_smoothing": uniform(0, 0.3), "mixup": uniform(0, 1)},
    "noise": {"input_noise": uniform(0, 1)},
    "per layer": {"weight_decay": per_layer(PRIOR)},
    "per unit": {"weight_decay": per_unit(PRIOR)},
    "own": {"penalty__strength": PRIOR, "augment__scale": uniform(0, 1)},
    "rows": {"sample_weight": uniform(0, 2)},
}


def _data(shape) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, *shape)).astype(np.float32)
    return X, np.where(X.reshape(N, -1)[:, :3].sum(axis=1) > 0, "yes", "no")


def _net(module: str, **params) -> TorchClassifier:
    return TorchClassifier(
        MODULES[module][0], max_epochs=3, batch_size=16, lr=1e-2, label_smoothing=0.1, mixup=0.1, input_noise=0.1,
        penalty=_penalty, augment=_augment, random_state=0, **params,
    )  # fmt: skip


def _search(net, space, **params) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(
        net, space, cv=2, random_state=0, error_score="raise", warmup=0.2, start="estimator", **params
    )


def _each_by_joint_and_another():
    for i, module in enumerate(MODULES):
        for j, kind in enumerate(KINDS):
            yield module, kind, "joint"
            yield module, kind, ("global", "simplified")[(i + j) % 2]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "kind", "algorithm"), _each_by_joint_and_another())
def test_every_module_with_every_kind_of_hyperparameter(module, kind, algorithm):
    """The loss is finite, λ̂ has moved, and the best estimator is what a fit of the best parameters gives."""
    X, y = _data(MODULES[module][1])
    net, space = _net(module), KINDS[kind]
    net.max_epochs = 6 if kind == "rows" else 3  # the adjoint is zero at its first step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The folds are trained one after the other")
        found = _search(net, space, algorithm=algorithm).fit(X, y)
    history = found.history_
    assert np.isfinite(history["train_loss"]).all()
    assert np.isfinite(history["validation_loss"]).all()
    for name in space:
        assert (history[name][-1] != history[name][0]).any(), name
    again = clone(net).set_params(**found.best_params_).fit(X, y)
    assert_allclose(again.predict_proba(X), found.predict_proba(X), rtol=1e-4, atol=1e-6)
    assert np.isfinite(found.best_response_.estimator_at().predict_proba(X)).all()


@pytest.mark.parametrize("module", ["conv2d batch norm", "lstm"])
def test_images_and_series_go_through_pipelines(module):
    X, y = _data(MODULES[module][1])
    model = make_pipeline(FunctionTransformer(lambda Z: Z / 2), _net(module))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The folds are trained one after the other")
        found = _search(model, {"torchclassifier__weight_decay": PRIOR}).fit(X, y)
    assert found.predict(X[:4]).shape == (4,)


def test_running_statistics_are_those_of_the_tuned_setting():
    """The learned response's BatchNorm against a pass over the training rows at the same weights and the same dropout."""
    X, y = _data(FLAT)
    net = TorchClassifier(batch_norm, max_epochs=20, batch_size=16, random_state=0)
    rows = np.arange(N)
    found = HyperTrainingSearchCV(
        net, {"weight_decay": PRIOR, "module__dropout": uniform(0, 0.5)}, cv=[(rows, rows)], random_state=0, scale=2.0
    ).fit(X, y)
    module = found.best_response_.estimator_at().module_
    hidden = module[0](torch.from_numpy(X)).detach()
    assert_allclose(module[1].running_mean, hidden.mean(dim=0), atol=0.1)
    assert_allclose(module[1].running_var, hidden.var(dim=0), rtol=0.2)


def test_frozen_parameters_and_buffers_stay():
    X, y = _data(FLAT)
    found = _search(_net("frozen, buffer"), KINDS["dropout"]).fit(X, y)
    for model in (found.best_estimator_, found.best_response_.estimator_at()):
        torch.manual_seed(0)
        assert (model.module_.shift == 1).all()
    fits = [clone(_net("frozen, buffer")).set_params(max_epochs=e).fit(X, y).module_ for e in (1, 3)]
    assert torch.equal(fits[0].features.weight, fits[1].features.weight)
    assert not torch.equal(fits[0].out.weight, fits[1].out.weight)


def test_tied_weights_stay_tied():
    X, y = _data(FLAT)
    found = _search(_net("embedding, tied"), KINDS["per unit"]).fit(X, y)
    assert list(found.best_response_.params["weight_decay"]) == ["first.weight", "out.weight"]
    module = found.best_response_.estimator_at().module_
    assert torch.equal(module.first.weight, module.second.weight)


class Lazy(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.layer = nn.LazyLinear(m)

    def forward(self, x):
        return self.layer(x)


class Sparse(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 3, sparse=True), nn.Linear(3, m)

    def forward(self, x):
        return self.out(self.embedding(x[:, 0].abs().long()))


class Broken(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.layer = nn.Linear(n + 1, m)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Lazy, r"layer \(LazyLinear\).* has no shape before it has seen data.*nn.Linear"),
        (Sparse, r"embedding \(Embedding\).*sparse=True.*sparse=False"),
        (Broken, r"Broken'> does not run on rows of shape \(5,\)"),
    ],
)
def test_what_cannot_work_is_refused_before_training_by_name(module, message):
    X, y = _data(FLAT)
    for model in (TorchClassifier(module), _search(TorchClassifier(module), {"weight_decay": PRIOR})):
        with pytest.raises(ValueError, match=message):
            model.fit(X, y)
