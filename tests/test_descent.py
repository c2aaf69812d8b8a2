from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import loguniform
from torch.testing import assert_close

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, per_unit
from hypertune.descent import Descent
from hypertune.hypernetworks import Layout, Linear
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer
from hypertune.space import Space

PRIOR = loguniform(1e-6, 1e1)
GRAINED = Space.from_distributions({"weight_decay": per_unit(PRIOR), "l1": PRIOR}).resolve(
    {"weight_decay": {"0": (4, 1)}}
)
PLAIN = Space.from_distributions({"weight_decay": PRIOR, "l1": PRIOR})


def descend(space: Space, slopes: torch.Tensor, **params) -> torch.Tensor:
    """λ̂ (n,) from 0 after a step for each row of slopes."""
    lam_hat = torch.zeros(space.n)
    descent = Descent(lam_hat, space, **{"lr": 0.1, "eps": 1e-2, "grain_scale": None, "n_valid": 100} | params)
    for slope in slopes:
        lam_hat.grad = slope.clone()
        descent.step()
        assert_close(lam_hat.grad, slope)  # left as it was
    return lam_hat


def test_values_of_a_grain_that_have_the_same_slope_move_as_one_value_with_their_sum_would():
    slopes = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    each = torch.cat([slopes[:, :1].repeat(1, 4) / 4, slopes[:, 1:]], dim=1)
    one, many = descend(PLAIN, slopes), descend(GRAINED, each)
    assert_close(many, torch.cat([one[:1].repeat(4), one[1:]]), rtol=1e-5, atol=1e-6)


def test_slopes_that_cancel_move_the_values_apart_and_leave_their_mean():
    slopes = torch.tensor([[1.0, -1.0, 0.5, -0.5, 0.0]]).repeat(10, 1)
    moved = descend(GRAINED, slopes)
    assert moved[:4].mean().abs() < 1e-6
    assert (moved[:4] * slopes[0, :4] < -0.1).all()
    assert moved[4] == 0


def test_noise_of_single_values_does_not_move_their_mean():
    """Each value with noise of a size of its own, and all with a small slope: the mean goes down all the way."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 4, generator=generator) * torch.tensor([0.01, 0.1, 1.0, 10.0])
    noise -= noise.mean(dim=1, keepdim=True)
    moved = descend(GRAINED, torch.cat([noise + 0.05, torch.zeros(400, 1)], dim=1))
    assert moved[:4].mean() == pytest.approx(
        descend(PLAIN, torch.tensor([[0.2, 0.0]]).repeat(400, 1))[0].item(), rel=1e-3
    )


def test_the_prior_pulls_towards_the_mean_in_proportion_to_the_distance():
    lam_hat = torch.tensor([1.0, 0.0, 0.0, -1.0, 5.0])
    lam_hat.grad = torch.zeros(5)
    Descent(lam_hat, GRAINED, lr=0.1, eps=1e3, grain_scale=0.5, n_valid=100).step()
    # Adam's first step with an eps that drowns the slope: lr · slope / eps, and the slope is distance / (0.5² · 100), 4 times
    expected = torch.tensor([1.0, 0.0, 0.0, -1.0, 0.0]) * 4 / (0.25 * 100) * 0.1 / 1e3
    assert_close(torch.tensor([1.0, 0.0, 0.0, -1.0, 5.0]) - lam_hat, expected, rtol=0.05, atol=1e-7)


def test_slopes_are_in_nats():
    lam_hat = torch.zeros(2)
    lam_hat.grad = torch.tensor([1e-3, 0.0])
    descent = Descent(lam_hat, PLAIN, lr=0.1, eps=1e-2, grain_scale=None, n_valid=100)
    descent.nats_per_unit = torch.tensor(1e3)
    descent.step()
    assert lam_hat[0] == pytest.approx(-0.1 / (1 + 1e-2), rel=1e-4)


def test_in_a_long_run_the_steps_are_the_smaller(iris, monkeypatch):
    found = []

    def spy(*args: Any, lr: float, **params: Any) -> Descent:
        found.append(lr)
        return Descent(*args, lr=lr, **params)

    monkeypatch.setattr("hypertune.training.Descent", spy)
    monkeypatch.setattr("hypertune.training._FULL_PACE", 10)
    for epochs in (1, 20):  # of 5 steps
        net = TorchClassifier(MLP(hidden=(4,)), batch_size=20, max_epochs=epochs, random_state=0)
        split = [(np.arange(100), np.arange(100, 150))]
        HyperTrainingSearchCV(
            net, {"weight_decay": PRIOR}, cv=split, evaluate="hypernetwork", refit=False, random_state=0
        ).fit(*iris)
    assert found == [pytest.approx(2 * 0.05), pytest.approx(2 * 0.05 * 10 / 100)]


def test_the_step_of_lam_falls_by_its_decay_and_never_below_zero():
    space = Space.from_distributions({"weight_decay": loguniform(1e-6, 1e1)})
    lam = torch.zeros(1)
    descent = Descent(lam, space, lr=0.1, eps=1e-2, grain_scale=None, n_valid=10, decay=0.4)
    seen = []
    for _ in range(4):
        seen.append(descent.param_groups[0]["lr"])
        lam.grad = torch.ones(1)
        descent.step()
    assert seen == pytest.approx([0.1, 0.06, 0.02, 0.0])


@pytest.mark.parametrize("kind", [PlainOptimizer, TangentOptimizer])
def test_schedules_go_on_with_every_step_of_the_response(kind):
    """Whether λ is sampled or not, and once a step."""
    phi = Linear().build(torch.ones(1, 3), torch.zeros(2), Layout(torch.arange(3)))
    optimizer = torch.optim.SGD(list(phi.parameters()) if kind is PlainOptimizer else [phi.w0], lr=1.0)
    own = kind(phi, optimizer, schedules=[torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))])
    own.step_at_center(torch.ones(1, 3))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 2)
    own.step(torch.ones(1, 2, 2), torch.ones(1, 2, 3))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 3)
