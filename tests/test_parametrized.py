"""Layers under torch's parametrizations: pickled twice over, in worker processes, and through a whole search."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from numpy.testing import assert_array_equal
from scipy.stats import loguniform
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from hypertune import HyperTrainingSearchCV, TorchClassifier
from hypertune.parametrized import picklable


class EveryOther(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * (torch.arange(w.numel()) % 2).view_as(w)


def masked_and_bounded() -> nn.Module:
    layer = nn.Linear(4, 6)
    parametrize.register_parametrization(layer, "weight", EveryOther())
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 6)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 6)),
    "two masks and a bias": masked_and_bounded,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_what_it_was(name: str):
    layer = picklable(nn.Sequential(LAYERS[name](), nn.ReLU()))
    x = torch.randn(5, 4)
    layer(x)  # spectral_norm changes what it keeps
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(layer))))
    assert layer.state_dict().keys() == again.state_dict().keys()
    for one, other in zip(layer.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [k for k, _ in layer.named_parameters()] == [k for k, _ in again.named_parameters()]
    assert [sub.training for sub in layer.modules()] == [sub.training for sub in again.modules()]
    assert torch.equal(layer.eval()(x), again.eval()(x))


class Net(nn.Sequential):
    def __init__(self, n: int, m: int):
        super().__init__(masked_and_bounded(), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, m)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_search_is_what_it_was_and_runs_in_worker_processes(iris):
    net = TorchClassifier(Net, max_epochs=2, random_state=0)
    search = HyperTrainingSearchCV(net, {"weight_decay": loguniform(1e-5, 1)}, cv=2, random_state=0)
    found = search.fit(*iris)
    again = pickle.loads(pickle.dumps(found))
    assert_array_equal(again.predict_proba(iris[0]), found.predict_proba(iris[0]))
    one, other = (own.best_response_.estimator_at().predict_proba(iris[0]) for own in (found, again))
    assert_array_equal(one, other)
    parallel = search.__sklearn_clone__().set_params(n_jobs=2).fit(*iris)
    assert parallel.best_score_ == found.best_score_


def test_a_parametrized_recurrent_layer_can_be_pickled():
    layer = picklable(parametrizations.weight_norm(nn.GRU(3, 4, batch_first=True), "weight_hh_l0"))
    x = torch.randn(2, 5, 3)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x)[0], layer(x)[0])
