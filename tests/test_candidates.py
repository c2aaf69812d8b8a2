"""Which settings are verified."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.base import clone

from hypertune import MLP
from hypertune.candidates import distinct, retrain_candidates
from hypertune.retraining import Retrained
from tests.test_retraining import NET, Keeping

TUNED, START, OWN = torch.tensor([-8.0]), torch.tensor([-7.0]), torch.tensor([-13.0])


def test_settings_that_hardly_differ_are_verified_once():
    tuned, near, far = torch.zeros(2), torch.tensor([0.0, 0.009]), torch.tensor([0.0, 1.0])
    assert [lam.tolist() for lam in distinct(tuned, near, far)] == [[0, 0], [0, 1]]
    assert [lam.tolist() for lam in distinct(tuned, far, far)] == [[0, 0], [0, 0.5], [0, 1]]
    assert distinct(tuned, None, near) == [tuned, near]  # the estimator's own setting always is
    assert len(distinct(tuned, None, tuned.clone())) == 1


@pytest.fixture
def verified(iris, monkeypatch):
    """Candidates and stacks of a search whose validation losses are ``loss`` of λ."""

    def run(loss, high=10.0, net=NET, space=None, lams=(TUNED, START, OWN)):
        space = {"weight_decay": loguniform(1e-6, 1e1)} if space is None else space
        setup = Keeping(clone(net).set_params(max_epochs=1), space, cv=3, random_state=0).fit(*iris).setup
        narrow = tuple(replace(h, high=min(high, h.high)) for h in setup.space.hyperparameters)
        monkeypatch.setattr(Retrained, "validation_losses", lambda self, folds: loss(self.lam[:, 0]))
        setup = setup._replace(space=replace(setup.space, hyperparameters=narrow))
        candidates, retrained, (lam, losses) = retrain_candidates(*setup[:4], distinct(*lams))
        monkeypatch.undo()
        assert_allclose(losses, loss(lam[:, 0]))
        assert {tuple(row) for row in lam.tolist()} == {tuple(row) for row in torch.stack(candidates).tolist()}
        return torch.stack(candidates).squeeze(1).tolist(), [len(r.lam) for r in retrained]

    return run


def test_more_regularisation_is_tried_and_what_lies_beyond_it_if_that_is_better(verified):
    """λ̂ asks for too little where fits are far from converged."""
    first = [-8.0, -7.5, -7.0, -6.5]
    assert verified(lambda lam: (lam + 7.8).square()) == ([*first, -13.0], [5])
    assert verified(lambda lam: (lam + 5.0).square()) == ([*first, -7.25, -5.75, -5.0, -3.5, -13.0], [5, 4])


@pytest.mark.parametrize(
    ("best", "beyond"),
    [(-7.55, [-7.75, -7.25]), (-7.05, [-6.0, -5.0]), (-13.1, [-10.5, -13.8155])],
    ids=["middle", "start", "own"],
)
def test_settings_on_the_line_through_a_better_one_follow(verified, best, beyond):
    """Not those that are known already or beyond the bounds: -6.5 is, as e^1.5 times the tuned setting."""
    found, stacks = verified(lambda lam: (lam - best).abs())
    assert found == pytest.approx([-8.0, -7.5, -7.0, -6.5, *beyond, -13.0], abs=1e-3)
    assert stacks == [5, len(beyond)]


def test_bounds_are_kept(verified):
    assert verified(lambda lam: -lam, high=-6.8)[0] == pytest.approx([-8.0, -7.5, -7.0, -6.8, -7.4, -13.0])


def test_a_model_that_costs_time_and_settings_without_a_scale_are_not_tried_stronger(verified):
    large = clone(NET).set_params(module=MLP(hidden=(256, 256)))  # 3 × 68,000 weights
    assert verified(lambda lam: lam.abs(), net=large, lams=(TUNED, None, OWN))[1] == [2]
    rate = torch.tensor([0.5]), None, torch.tensor([2.0])
    assert verified(lambda lam: -lam, net=large)[1] == [4]  # nor is what lies beyond the best of them
    assert verified(lambda lam: lam, space={"module__dropout": uniform(0, 0.5)}, lams=rate)[1] == [2]


def test_a_tuned_setting_that_is_the_own_is_tried_stronger_too(verified):
    assert verified(lambda lam: (lam + 13.0).abs(), lams=(OWN, None, OWN.clone())) == ([-13.0, -11.5], [2])
