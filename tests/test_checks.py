"""``check_hypergradient``, and what it says of every algorithm in a search."""

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
    check_hypergradient,
    per_feature,
    per_layer,
)
from hypertune.hypergradients import Hybrid, Implicit, Unrolled
from tests.test_hypergradients import search

DECAY = loguniform(1e-6, 1e1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "cosine", "ratio"),
    [
        ("joint", 0.8, 0.5),
        ("forward", 0.99, 0.05),
        (Implicit(horizon=math.inf), 0.99, 0.1),
        (Implicit(solver="cg", iterations=20, horizon=math.inf), 0.99, 0.15),
        (Unrolled(steps=300), 0.9, 0.2),
        ("t1t2", 0.8, 1.0),
    ],
    ids=str,
)
def test_the_hypergradient_of_a_search_is_right(breast_cancer, algorithm, cosine: float, ratio: float):
    """One weight decay per feature of a logistic regression, two folds, minibatches."""
    X, y = breast_cancer
    net = TorchClassifier(MLP(hidden=()), weight_decay=0.03, batch_size=100, lr=0.02, max_epochs=300, random_state=0)
    own = HyperTrainingSearchCV(
        net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}, algorithm=algorithm, cv=2, random_state=0
    )
    check = check_hypergradient(own, X, y)
    assert check.cosine > cosine
    assert abs(check.ratio - 1) < ratio
    assert str(check).startswith(f"cosine {check.cosine:.4f}")


@pytest.mark.slow
def test_a_hypergradient_is_compared_with_retrained_models(breast_cancer):
    X, y = breast_cancer
    net = TorchClassifier(MLP(hidden=(8,)), weight_decay=0.03, lr=0.02, max_epochs=150, random_state=0)
    own = HyperTrainingSearchCV(
        net, {"weight_decay": per_layer(DECAY), "module__dropout": uniform(0, 0.8)}, cv=2, random_state=0
    )
    check = check_hypergradient(own, X, y, reference="retrain", step=0.5)
    assert check.reference.shape == (3,)
    assert check.cosine > 0.8


def test_a_check_leaves_the_search_alone_and_refuses_what_is_not_convex(breast_cancer):
    X, y = breast_cancer
    own = search("joint", {"weight_decay": DECAY}, epochs=1)
    with pytest.raises(ValueError, match=r"choose \"exact\" or \"retrain\""):
        check_hypergradient(own, X, y, reference="guess")
    with pytest.raises(ValueError, match="No optimum of the training loss was found"):
        check_hypergradient(own, X, y)
    assert own.evaluate == "retrain"
    assert not hasattr(own, "history_")


@pytest.mark.slow
def test_a_check_is_where_lam_hat_was_held_and_not_at_a_bound(breast_cancer):
    """The estimator's weight decay of 0 is no place on a logarithmic axis: λ̂ starts inside, and so does the reference."""
    X, y = breast_cancer
    net = TorchClassifier(MLP(hidden=()), lr=0.02, max_epochs=100, random_state=0)
    exactly = Implicit(solver="cg", iterations=20, horizon=math.inf)
    own = HyperTrainingSearchCV(net, {"weight_decay": loguniform(1e-2, 1e1)}, algorithm=exactly, cv=2, random_state=0)
    check = check_hypergradient(own, X, y)
    assert check.cosine > 0.99
    assert abs(check.ratio - 1) < 0.2


@pytest.mark.parametrize("steps", [1, 5])
def test_hybrid_leaves_the_weights_of_rows_to_the_implicit_gradient_where_they_are(breast_cancer, steps):
    """Not where the unrolled steps lead from there."""
    X, y = breast_cancer
    X, y = X[:150], y[:150]
    net = TorchClassifier(
        MLP(hidden=()), weight_decay=0.1, lr=0.02, batch_size=200, max_epochs=200, sample_weight=np.ones(len(y)),
        random_state=0,
    )  # fmt: skip
    own = HyperTrainingSearchCV(net, {"sample_weight": uniform(0, 2)}, algorithm=Hybrid(steps), cv=2, random_state=0)
    check = check_hypergradient(own, X, y)
    assert check.cosine > 0.95
    assert 0.6 < check.ratio < 1.2


def test_the_momentum_of_rmsprop_is_of_preconditioned_gradients(breast_cancer):
    X, y = breast_cancer
    optimizer = partial(torch.optim.RMSprop, momentum=0.9)
    net = TorchClassifier(MLP(hidden=()), weight_decay=0.1, optimizer=optimizer, lr=3e-3, max_epochs=60, random_state=0)
    own = HyperTrainingSearchCV(
        net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}, algorithm="hybrid", cv=2, random_state=0
    )
    check = check_hypergradient(own, X, y)
    assert check.cosine > 0.9
    assert 0.5 < check.ratio < 1.5
