"""The gradient methods without a hypernetwork in a search, and refused where they cannot be."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import loguniform, uniform

from hypertune import (
    MLP,
    HyperTrainingSearchCV,
    TorchClassifier,
    per_layer,
    per_weight,
)
from hypertune.algorithms import descend_response
from hypertune.hypergradients import Implicit, Unrolled

DECAY = loguniform(1e-6, 1e1)


def search(algorithm, space=None, **kwargs) -> HyperTrainingSearchCV:
    net = TorchClassifier(MLP(hidden=(8,)), max_epochs=kwargs.pop("epochs", 8), weight_decay=1e-3, random_state=0)
    own = {"algorithm": algorithm, "start": "estimator", "cv": 2, "random_state": 0, **kwargs}
    return HyperTrainingSearchCV(net, space or {"weight_decay": per_layer(DECAY), "input_noise": uniform(0, 1)}, **own)


ALGORITHMS = [
    "implicit", "t1t2", "unrolled", "forward", "hybrid", Unrolled(steps=3), Implicit(solver="cg", iterations=3),
    Implicit(solver="nystrom", iterations=3), Implicit(solver="cg", iterations=5, inner="newton", horizon=1e4),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_every_algorithm_searches(breast_cancer, algorithm):
    X, y = breast_cancer
    epochs = 30 if algorithm == "unrolled" else None  # 20 steps for each move of λ̂
    found = search(algorithm, max_epochs=epochs).fit(X[:200], y[:200])
    history = found.history_
    assert history["algorithm"].endswith(": asked for")
    assert np.isfinite(history["validation_loss"]).all()
    assert (history["weight_decay"][-1] != history["weight_decay"][0]).any()
    assert found.best_estimator_.score(X, y) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_lam_hat_moves_far_whatever_divides_the_gradients(breast_cancer, optimizer):
    """From a weight decay that is far too strong; with a response of the wrong size it stays there."""
    net = TorchClassifier(
        MLP(hidden=(16,)), optimizer=optimizer, lr=1e-2, max_epochs=60, weight_decay=0.03, random_state=0
    )
    found = HyperTrainingSearchCV(
        net, {"weight_decay": loguniform(1e-6, 1e1)}, start="estimator", evaluate="hypernetwork", cv=3, random_state=0
    ).fit(*breast_cancer)
    assert 1e-3 < found.best_params_["weight_decay"] < 0.015


def test_what_is_screened_by_a_global_hypernetwork_is_inside_the_bounds(breast_cancer, monkeypatch):
    """Its samples around the start are not, and a response that is extrapolated promises most."""
    starts = []

    def noted(problem, phi, lam_hat, *args, **kwargs):
        starts.append((problem.low <= lam_hat).all() & (lam_hat <= problem.high).all())
        return descend_response(problem, phi, lam_hat, *args, **kwargs)

    monkeypatch.setattr("hypertune.recipes.descend_response", noted)
    space = {"weight_decay": loguniform(1e-3, 1e-1), "module__dropout": uniform(0, 0.8)}
    for seed in range(3):
        search("global", space, scale=1.5, evaluate="hypernetwork").set_params(random_state=seed).fit(*breast_cancer)
    assert starts == [True] * 3


def test_what_a_method_cannot_do_is_refused(breast_cancer):
    dropout = {"weight_decay": DECAY, "module__dropout": uniform(0, 0.8)}
    for algorithm in ("implicit", "t1t2", "unrolled", "forward"):
        with pytest.raises(ValueError, match=r"no such derivative for \['module__dropout'\].*\"hybrid\""):
            search(algorithm, dropout).fit(*breast_cancer)
    with pytest.raises(ValueError, match=r"at most 100, got 256"):
        search("forward", {"weight_decay": per_weight(DECAY)}).fit(*breast_cancer)
    assert search("hybrid", dropout, epochs=2).fit(*breast_cancer).best_params_["module__dropout"] >= 0


@pytest.mark.parametrize(
    ("description", "settings", "message"),
    [
        (Implicit, {"solver": "gmres"}, r"solver is one of \('neumann', 'cg', 'nystrom'\)"),
        (Implicit, {"inner": "adam"}, "inner one of"),
        (Implicit, {"solver": "nystrom", "horizon": math.inf}, "finite for solver='nystrom'"),
        (Implicit, {"horizon": 0.0}, "horizon must be positive"),
        (Implicit, {"iterations": 0}, "iterations must be at least 1"),
        (Unrolled, {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(description, settings, message: str):
    with pytest.raises(ValueError, match=message):
        description(**settings)


def test_a_search_without_a_response_says_so(breast_cancer):
    response = search("implicit", {"weight_decay": DECAY}, epochs=2).fit(*breast_cancer).best_response_
    assert response.validation_loss() == response.validation_loss({"weight_decay": response.params["weight_decay"]})
    with pytest.raises(ValueError, match="learned no response"):
        response.validation_loss({"weight_decay": 1.0})


def test_auto_says_what_it_chose_and_why(breast_cancer):
    X, y = breast_cancer
    net = TorchClassifier(MLP(hidden=(64,)), max_epochs=2, random_state=0)
    many = {"weight_decay": per_weight(DECAY)}

    def chosen(space) -> str:
        return (
            HyperTrainingSearchCV(net, space, cv=2, random_state=0, evaluate="hypernetwork", refit=False)
            .fit(X, y)
            .history_["algorithm"]
        )

    assert chosen({"weight_decay": DECAY}).startswith("joint: not more than 1,000 values")
    assert chosen(many).startswith("implicit: more than 1,000 values")
    assert (
        chosen(many | {"module__dropout": uniform(0, 0.8)})
        == "joint: joint, and the implicit gradient for 2,048 of 2,049 values"
    )


@pytest.mark.slow
def test_forward_mode_takes_any_adam_and_no_weights_of_rows(breast_cancer):
    X, y = breast_cancer
    own = search("forward", {"weight_decay": DECAY}, epochs=2)
    own.estimator.set_params(optimizer=partial(torch.optim.Adam, betas=(0.9, 0.99)))
    assert np.isfinite(own.fit(X, y).best_score_)
    with pytest.raises(ValueError, match="cannot tune the weights of rows"):
        search("forward", {"sample_weight": uniform(0, 2)}, epochs=2).fit(X[:60], y[:60])
