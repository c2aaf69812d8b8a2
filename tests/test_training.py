"""The loop of the hyper-training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import loguniform
from sklearn.model_selection import ShuffleSplit

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, problem, trace, training
from hypertune.recipes import choose
from hypertune.space import Space


@pytest.mark.parametrize(
    ("costly", "batch_size", "seen", "recorded"), [(1e9, 16, 256, 1_000), (0, 16, 128, 256), (0, 200, 200, 256)]
)
def test_where_each_row_costs_fewer_validate_a_step(monkeypatch, costly, batch_size, seen, recorded):
    """But not fewer than train one."""
    sizes, rows = [], []
    own, losses = training.Minibatches, trace.validation_losses
    for room in (training, problem, trace):
        monkeypatch.setattr(room, "COSTLY", costly)
    for room in (training, problem):
        monkeypatch.setattr(room, "Minibatches", lambda f, size, seed: sizes.append(size) or own(f, size, seed=seed))
    monkeypatch.setattr(
        trace,
        "validation_losses",
        lambda phi, objective, folds, lam: rows.append(len(folds[0].valid.x)) or losses(phi, objective, folds, lam),
    )
    X = np.random.default_rng(0).normal(size=(1_400, 2)).astype(np.float32)
    net = TorchClassifier(MLP(hidden=(4,)), batch_size=batch_size, max_epochs=2, random_state=0)
    cv = ShuffleSplit(1, test_size=1_200, random_state=0)
    HyperTrainingSearchCV(
        net, {"weight_decay": loguniform(1e-6, 1e0)}, cv=cv, start="estimator", evaluate="hypernetwork", random_state=0
    ).fit(X, X[:, 0] > 0)
    assert sizes == [batch_size, seen]
    assert set(rows) == {recorded}


def test_lam_rests_for_a_share_of_the_run_and_in_global_until_the_response_is_fitted():
    space = Space.from_distributions({"weight_decay": loguniform(1e-6, 1e1)})
    settings = {"scale": None, "n_samples": None, "response_optimizer": "tangent"}
    joint, fitted_first = (choose(name, space, torch.tensor([True]), **settings) for name in ("joint", "global"))
    assert [recipe.first_move(100, 1 / 3) for recipe in (joint, fitted_first)] == [33, 75]
    assert fitted_first.first_move(1, 1 / 3) == 0  # a run so short moves nothing otherwise
