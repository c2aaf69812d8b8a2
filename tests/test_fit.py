"""What fit is given, and the process and the settings around it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import sklearn
import torch
from scipy.stats import loguniform, uniform
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.fixes import parse_version
from torch import nn

from hypertune import MLP, TorchClassifier
from hypertune.randomness import ONE_AT_A_TIME
from tests.searches import NET, SPACE, search

OLD = parse_version(sklearn.__version__) < parse_version("1.7")

_FIRST, _REST = range(100), range(100, 150)


@pytest.mark.parametrize(
    "split",
    [(_FIRST, _REST), (tuple(_FIRST), list(_REST)), (torch.tensor(_FIRST), torch.tensor(_REST)), (np.arange(150) < 100, _REST)],
    ids=["ranges", "tuple and list", "tensors", "mask"],
)  # fmt: skip
def test_a_split_is_whatever_numbers_rows(iris, split):
    order = np.random.default_rng(0).permutation(150)
    X, y = iris[0][order], iris[1][order]
    expected = search(cv=[(np.array(_FIRST), np.array(_REST))], max_epochs=2).fit(X, y).best_score_
    assert search(cv=[split], max_epochs=2).fit(X, y).best_score_ == expected


def test_weights_may_be_a_tensor(iris):
    weight = np.random.default_rng(0).uniform(0.5, 1.5, 150)
    scores = [
        search(max_epochs=2).fit(*iris, sample_weight=given).best_score_ for given in (weight, torch.tensor(weight))
    ]
    assert scores[0] == scores[1]


def test_a_misspelt_fit_parameter_is_refused_before_anything_is_trained(iris, no_training):
    with pytest.raises(TypeError, match=r"unexpected argument 'eval_set'; it takes \['sample_weight'\]"):
        search().fit(*iris, eval_set=iris)


def test_a_fit_of_a_subclass_is_warned_of(iris):
    class Centring(TorchClassifier):
        def fit(self, X, y, sample_weight=None):
            return super().fit(np.asarray(X) - 1, y, sample_weight)

    net = Centring(MLP(hidden=(4,)), max_epochs=1, random_state=0)
    with pytest.warns(UserWarning, match=r"Centring has a fit of its own.*in a Pipeline"):
        search(estimator=net, evaluate="hypernetwork").fit(*iris)


@pytest.mark.skipif(OLD, reason="scikit-learn's own fit_transform does not transform them")
def test_inputs_of_earlier_steps_are_transformed_in_every_fold(iris):
    class Sees(TransformerMixin, BaseEstimator):
        def fit(self, X, y=None, X_val=None):
            self.mean_ = float(np.mean(X_val))
            return self

        def transform(self, X):
            return X

    with config_context(enable_metadata_routing=True):
        steps = [
            ("scale", StandardScaler(with_std=False)),
            ("sees", Sees().set_fit_request(X_val=True)),
            ("net", clone(NET).set_params(max_epochs=1)),
        ]
        pipeline = Pipeline(steps, transform_input=["X_val"])
        space = {f"net__{name}": distribution for name, distribution in SPACE.items()}
        found = search(estimator=pipeline, param_distributions=space).fit(iris[0] + 5, iris[1], X_val=iris[0] + 5)
    assert abs(found.best_response_.estimator_at()[1].mean_) < 0.5
    assert found.best_estimator_[1].mean_ == pytest.approx(0.0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:The hyperparameters did not move")
@pytest.mark.skipif(
    parse_version(torch.__version__) < parse_version("2.13"), reason="there torch's Adam counts on that device"
)
@pytest.mark.parametrize("algorithm", ["joint", "global", "implicit", "unrolled", "hybrid"])
def test_a_default_device_of_the_callers_does_not_matter(iris, algorithm):
    def on_the_cpu(n: int, m: int) -> nn.Module:
        with torch.device("cpu"):
            return nn.Sequential(nn.Linear(n, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, m))

    net = TorchClassifier(on_the_cpu, max_epochs=3, random_state=0)
    space = {"weight_decay": loguniform(1e-6, 1e1), "input_noise": uniform(0, 1)}
    found = []
    for device in ("cpu", "meta"):  # on the second nothing can be computed
        with torch.device(device):
            one = search(
                estimator=net, param_distributions=space, algorithm=algorithm, start="screened", grain_scale="auto"
            ).fit(*iris)
            found.append([one.best_score_, one.best_response_.validation_loss(), *one.history_["validation_loss"]])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="needs a package more")
def test_tensors_are_taken_where_scikit_learn_dispatches_arrays():
    """scipy wants to know before it is imported."""
    code = (
        "import torch, sklearn; from hypertune import TorchClassifier; X = torch.randn(20, 3); y = (X[:, 0] > 0).long()\n"
        "with sklearn.config_context(array_api_dispatch=True):\n"
        "    assert TorchClassifier(max_epochs=1).fit(X, y).predict(X).shape == (20,)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "SCIPY_ARRAY_API": "1"})


def test_a_child_process_can_fit_whatever_the_threads_of_its_parent_hold():
    """A lock that another thread holds at a fork is not given back in the child."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with ONE_AT_A_TIME:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        os._exit(0 if ONE_AT_A_TIME.acquire(timeout=10) else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_a_criterion_that_draws_leaves_global_random_numbers_alone(iris):
    def criterion(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs + 0.01 * torch.randn_like(outputs), y, reduction="none")

    space = {"weight_decay": loguniform(1e-6, 1e1)}
    net = clone(NET).set_params(criterion=criterion, max_epochs=2)
    before = torch.get_rng_state()
    response = search(estimator=net, param_distributions=space).fit(*iris).best_response_
    assert response.validation_loss() == response.validation_loss()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pipeline_under_routing_needs_no_parameter_of_fit(iris):
    with config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(StandardScaler(), clone(NET).set_params(max_epochs=1))
        space = {f"torchclassifier__{name}": distribution for name, distribution in SPACE.items()}
        search(estimator=pipeline, param_distributions=space).fit(*iris)


@pytest.mark.parametrize("split", [([], range(150)), (range(150), [])])
def test_an_empty_side_of_a_split_is_refused_in_words(iris, split):
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        search(cv=[split], max_epochs=1).fit(*iris)
