"""Reverse and forward mode through training steps: exact on ridge regression."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from numpy.testing import assert_allclose
from torch.testing import assert_close

from hypertune.algorithms import joint
from hypertune.hypergradients import Implicit, alternate
from hypertune.hypernetworks import Constant, Layout, Linear
from hypertune.implicit import ImplicitAdjoint
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer
from hypertune.unrolled import Dynamics, Recorder, Tangent, Unroller
from tests.ridge import Exact


def after_five_steps(
    exact: Exact, momentum: float, w: torch.Tensor, lam: torch.Tensor, averaged: bool = False
) -> float:
    """L_Valid (plain SGD, written out; Adam averages its momentum)."""
    w, u = w.clone().requires_grad_(), torch.zeros_like(w)
    for _ in range(5):
        (g,) = torch.autograd.grad(exact.ridge.train_loss(w, lam).sum(), w)
        u = momentum * u + (1 - momentum if averaged else 1) * g
        w = (w - 0.1 * u).detach().requires_grad_()
    return float(exact.ridge.valid_loss(w).detach().sum())


@pytest.mark.parametrize(("momentum", "adam"), [(0.0, False), (0.9, False), (0.9, True)])
def test_unrolled_steps_are_differentiated_exactly(exact: Exact, momentum: float, adam: bool):
    """Five SGD steps from a point that is no optimum, against central differences of the loss after these steps."""
    start = torch.zeros(1, 1, 8, dtype=torch.float64)
    hypernetwork = Constant().build(start[0], exact.lam, Layout(torch.arange(8)))
    weights: torch.optim.Optimizer = torch.optim.SGD([hypernetwork.w0], lr=0.1, momentum=momentum)
    if adam:  # before its first step it has no preconditioner
        weights = torch.optim.Adam([hypernetwork.w0], lr=0.1)
    loss, of_w, of_lam = Unroller(exact.everything, hypernetwork, weights, 5)(exact.problem, start, exact.lam)

    def after(w: torch.Tensor, lam: torch.Tensor) -> float:
        return after_five_steps(exact, momentum, w, lam, averaged=adam)

    assert float(loss) == pytest.approx(after(start, exact.lam))
    h = 1e-5 * torch.eye(8, dtype=torch.float64)
    by_lam = [(after(start, exact.lam + d) - after(start, exact.lam - d)) / 2e-5 for d in h]
    by_w = [(after(start + d, exact.lam) - after(start - d, exact.lam)) / 2e-5 for d in h]
    assert_allclose(of_lam, by_lam, rtol=1e-6, atol=1e-9)
    assert_allclose(of_w[0, 0], by_w, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_recorded_steps_train_the_weights_and_are_differentiated_exactly(exact: Exact, momentum: float):
    start, lam = torch.zeros(1, 1, 8, dtype=torch.float64), exact.lam.clone()
    hypernetwork = Constant().build(start[0], lam, Layout(torch.arange(8)))
    weights = torch.optim.SGD([hypernetwork.w0], lr=0.1, momentum=momentum)
    recorder = Recorder(hypernetwork, TangentOptimizer(hypernetwork, weights), 5)
    run = alternate(
        exact.problem, hypernetwork, lam, lambda: recorder.step(exact.problem, lam), torch.optim.SGD([lam], lr=0.0),
        unroll=recorder, every=5,
    )  # fmt: skip
    *_, last = itertools.islice(run, 5)
    assert float(last.valid_loss) == pytest.approx(after_five_steps(exact, momentum, start, exact.lam))
    h = 1e-5 * torch.eye(8, dtype=torch.float64)
    by_lam = [
        (after_five_steps(exact, momentum, start, lam + d) - after_five_steps(exact, momentum, start, lam - d)) / 2e-5
        for d in h
    ]
    assert_allclose(lam.grad, by_lam, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["recorded", "forward", "newton"])
def test_every_training_step_shows_its_minibatch_to_the_weights_at_lam_hat(exact: Exact, kind: str):
    """Running statistics are settled by them, as they are by plain steps."""
    seen: list[torch.Tensor] = []
    problem = replace(exact.problem, settle=lambda w, lam, x: seen.append(w.clone()))
    hypernetwork = (Linear() if kind == "forward" else Constant()).build(
        torch.zeros(1, 8, dtype=torch.float64), exact.lam, Layout(torch.arange(8))
    )
    weights = torch.optim.SGD([hypernetwork.w0], lr=0.1)
    phi = TangentOptimizer(hypernetwork, weights)
    adjoint = ImplicitAdjoint(Implicit("cg", 9, math.inf, inner="newton"), exact.everything, hypernetwork, weights)
    step = {
        "recorded": Recorder(hypernetwork, phi, 5).step,
        "forward": Tangent(hypernetwork, phi).step if kind == "forward" else None,
        "newton": adjoint.newton,
    }[kind]
    for _ in range(2):
        step(problem, exact.lam)
    assert len(seen) == 2
    assert_close(seen[0], torch.zeros(1, 1, 8, dtype=torch.float64))
    assert not torch.equal(seen[0], seen[1])


def test_unrolling_long_enough_is_the_exact_hypergradient(exact: Exact):
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.3)
    _, _, own = Unroller(exact.everything, exact.hypernetwork, weights, 400)(exact.problem, exact.w.detach(), exact.lam)
    assert_close(own, exact.hypergradient, rtol=1e-6, atol=1e-8)


def test_unrolling_leaves_out_what_the_loss_is_not_differentiable_in(exact: Exact):
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.3)
    some = torch.arange(8) < 3
    _, _, own = Unroller(some, exact.hypernetwork, weights, 400)(exact.problem, exact.w.detach(), exact.lam)
    assert_close(own, torch.where(some, exact.hypergradient, 0.0), rtol=1e-6, atol=1e-8)


def test_a_held_preconditioner_is_curbed_by_the_size_of_the_rows_of_the_hessian(exact: Exact):
    """A weight that Adam has seen no gradient of: its step is 1 over its row, not 1 over Adam's eps."""
    weights = torch.optim.Adam([exact.hypernetwork.w0], lr=0.1)
    exact.hypernetwork.w0.grad = torch.ones(1, 8, dtype=torch.float64)
    exact.hypernetwork.w0.grad[0, 0] = 0.0
    weights.step()
    rows = torch.full((1, 8), 0.5, dtype=torch.float64)
    s = Dynamics.of(exact.hypernetwork, weights, lambda: rows).s
    assert_close(s, torch.tensor([[2.0] + [0.1] * 7]).double(), rtol=1e-6, atol=0)
    sgd = torch.optim.SGD([exact.hypernetwork.w0], lr=5.0)
    assert_close(Dynamics.of(exact.hypernetwork, sgd, lambda: rows).s, torch.full((1, 8), 5.0).double())


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_forward_mode_carries_the_tangent_of_the_training_itself(exact: Exact, momentum: float):
    hypernetwork = Linear().build(torch.zeros(1, 8, dtype=torch.float64), exact.lam, Layout(torch.arange(8)))
    weights = torch.optim.SGD([hypernetwork.w0], lr=0.1, momentum=momentum)
    carried = Tangent(hypernetwork, TangentOptimizer(hypernetwork, weights))

    def trained(lam: torch.Tensor, steps: int) -> torch.Tensor:
        w = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=momentum)
        for _ in range(steps):
            (w.grad,) = torch.autograd.grad(exact.ridge.train_loss(w, lam), w)
            optimizer.step()
        return w.detach()

    for _ in range(5):
        carried.step(exact.problem, exact.lam)
    h = 1e-5 * torch.eye(8, dtype=torch.float64)
    differences = torch.stack([(trained(exact.lam + d, 5) - trained(exact.lam - d, 5)) / 2e-5 for d in h])
    assert_close(hypernetwork.maps[0].V.data[0], differences, rtol=1e-6, atol=1e-9)
    for _ in range(1500):
        carried.step(exact.problem, exact.lam)
    assert_close(hypernetwork.maps[0].V.data[0].T, exact.tangent, rtol=1e-6, atol=1e-8)


def test_hybrid_corrects_a_response_that_knows_nothing_yet(exact: Exact):
    """V = 0: through the hypernetwork alone the hypergradient is zero; through many steps more it is exact."""
    lam = exact.lam.clone()
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.0, momentum=0.0)
    weights.param_groups[0]["initial_lr"] = 0.3
    unroll = Unroller(exact.everything, exact.hypernetwork, weights, 400)
    run = joint(
        exact.problem, exact.hypernetwork, lam, PlainOptimizer(exact.hypernetwork, weights),
        torch.optim.SGD([lam], lr=0.0), sigma=0.0, generator=torch.Generator(), unroll=unroll,
    )  # fmt: skip
    next(run)
    assert_close(lam.grad, exact.hypergradient, rtol=1e-6, atol=1e-8)
