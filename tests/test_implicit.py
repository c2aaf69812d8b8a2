"""Implicit gradients: exact on ridge regression, whatever solves the linear system."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from hypertune.hypergradients import Implicit, alternate
from hypertune.hypernetworks import Constant, Layout
from hypertune.implicit import ImplicitAdjoint, T1T2Adjoint, conjugate_gradients, nystrom
from tests.ridge import Exact


@pytest.mark.parametrize(
    ("description", "tolerance"),
    [
        (Implicit(solver="cg", iterations=20, horizon=math.inf), 1e-9),
        (Implicit(solver="neumann", iterations=600, horizon=math.inf), 1e-6),
        (Implicit(solver="nystrom", iterations=8, horizon=1e8), 1e-6),
    ],
)
def test_implicit_is_the_implicit_function_theorem(exact: Exact, description: Implicit, tolerance: float):
    torch.manual_seed(0)
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.3)
    adjoint = ImplicitAdjoint(description, exact.everything, exact.hypernetwork, weights)
    own = adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)
    assert_close(own, exact.hypergradient, rtol=tolerance, atol=tolerance)


def test_one_iteration_at_a_time_converges_as_it_is_continued(exact: Exact):
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.3)
    adjoint = ImplicitAdjoint(Implicit(horizon=math.inf), exact.everything, exact.hypernetwork, weights)
    for _ in range(3000):
        own = adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)
    assert_close(own, exact.hypergradient, rtol=1e-6, atol=1e-8)


def test_a_horizon_damps_by_the_preconditioner_over_step_size_and_horizon(exact: Exact):
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.3)
    adjoint = ImplicitAdjoint(
        Implicit(solver="cg", iterations=20, horizon=10.0), exact.everything, exact.hypernetwork, weights
    )
    own = adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)
    H = exact.ridge.X.T @ exact.ridge.X / len(exact.ridge.X) + torch.diag(exact.lam.exp()) + torch.eye(8) / (0.3 * 10)
    assert_close(own, -torch.linalg.solve(H, exact.G[0, 0]) * exact.lam.exp() * exact.best)


def test_momentum_lengthens_what_a_horizon_reaches(exact: Exact):
    """SGD at 0.03 with momentum 0.9 gets as far in a step as SGD at 0.3."""

    def own(**kwargs: float) -> torch.Tensor:
        weights = torch.optim.SGD([exact.hypernetwork.w0], **kwargs)
        description = Implicit(solver="cg", iterations=20, horizon=10.0)
        adjoint = ImplicitAdjoint(description, exact.everything, exact.hypernetwork, weights)
        return adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)

    assert_close(own(lr=0.03, momentum=0.9), own(lr=0.3))


def test_the_tolerance_falls_with_every_step_of_lam(exact: Exact):
    """As in HOAG: a loose solution at first, an exact one after many steps."""
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.3)
    description = Implicit(solver="cg", iterations=20, horizon=math.inf, tolerance=0.9)
    adjoint = ImplicitAdjoint(description, exact.everything, exact.hypernetwork, weights)
    errors = [
        float((adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G) - exact.hypergradient).norm())
        for _ in range(100)
    ]
    assert errors[0] > 1e-2 * float(exact.hypergradient.norm())
    assert errors[-1] < 1e-3 * errors[0]


def test_newton_steps_are_refused_where_the_loss_is_not_convex(exact: Exact):
    hypernetwork = Constant().build(torch.ones(1, 8, dtype=torch.float64), exact.lam, Layout(torch.arange(8)))
    own = Implicit(solver="cg", iterations=5, horizon=math.inf, inner="newton")
    adjoint = ImplicitAdjoint(own, exact.everything, hypernetwork, torch.optim.SGD([hypernetwork.w0], lr=1.0))
    concave = replace(exact.problem, train_loss=lambda w, lam, x: -w.square().sum(dim=-1) - 0.0 * lam.sum())
    with pytest.raises(ValueError, match="curves downwards along its gradient"):
        adjoint.newton(concave, exact.lam)


def test_t1t2_takes_the_identity_for_the_hessian(exact: Exact):
    adjoint = T1T2Adjoint(exact.everything)
    own = adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)
    assert_close(own, -exact.G[0, 0] * exact.lam.exp() * exact.best)


def test_newton_steps_find_the_weights(exact: Exact):
    hypernetwork = Constant().build(torch.zeros(1, 8, dtype=torch.float64), exact.lam, Layout(torch.arange(8)))
    own = Implicit(solver="cg", iterations=20, horizon=math.inf, inner="newton")
    adjoint = ImplicitAdjoint(own, exact.everything, hypernetwork, torch.optim.SGD([hypernetwork.w0], lr=1.0))
    lam = exact.lam.clone()
    optimizer = torch.optim.SGD([lam], lr=0.0)
    run = alternate(
        exact.problem, hypernetwork, lam, lambda: adjoint.newton(exact.problem, lam), optimizer, adjoint=adjoint
    )
    next(run)
    assert_close(hypernetwork.w0.detach()[0], exact.best, rtol=1e-8, atol=1e-9)
    assert_close(lam.grad, exact.hypergradient, rtol=1e-8, atol=1e-9)


def test_the_linear_solvers_serve_several_folds_at_once():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    A = roots @ roots.transpose(1, 2) + 0.1 * torch.eye(6)
    b = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    def times(v: torch.Tensor) -> torch.Tensor:
        return (A @ v[..., None])[..., 0]

    solution = torch.linalg.solve(A, b)
    P = A.diagonal(dim1=1, dim2=2)
    assert_close(conjugate_gradients(times, b, torch.zeros_like(b), P, 30), solution)
    damping = torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.1
    assert_close(nystrom(times, b, damping, 6), torch.linalg.solve(A + torch.diag_embed(damping), b))
    loose = conjugate_gradients(times, b, torch.zeros_like(b), P, 30, tolerance=0.5)
    assert 1e-3 < float((times(loose) - b).norm() / b.norm()) <= 0.5
    indefinite = conjugate_gradients(lambda v: -v, b, torch.zeros_like(b), P, 30)
    assert_close(indefinite, torch.zeros_like(b))


def test_a_fold_that_meets_negative_curvature_keeps_what_it_has_while_others_go_on():
    H = torch.stack([torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, -0.5, 2.0], [1.0, 2.0, 4.0])])
    b, zero = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)

    def A(v: torch.Tensor) -> torch.Tensor:
        return (H @ v[..., None])[..., 0]

    first, second = conjugate_gradients(A, b, zero, torch.ones_like(b), 30)
    alone = conjugate_gradients(lambda v: A(torch.cat([v, v]))[:1], b[:1], zero[:1], torch.ones_like(b[:1]), 30)
    assert_close(first, alone[0])
    assert_close(second, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))


def test_newton_steps_have_no_step_size_that_could_damp_the_hypergradient(exact: Exact):
    """Whatever the optimizer that never runs."""

    def own(lr: float) -> torch.Tensor:
        weights = torch.optim.SGD([exact.hypernetwork.w0], lr=lr)
        description = Implicit(solver="cg", iterations=20, inner="newton")
        adjoint = ImplicitAdjoint(description, exact.everything, exact.hypernetwork, weights)
        torch.manual_seed(0)
        return adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)

    assert_close(own(1e-3), own(1.0))
    assert_close(own(1e-3), exact.hypergradient, rtol=0.1, atol=0.01)


def test_nystrom_has_no_more_directions_than_there_are_weights(exact: Exact):
    description = Implicit(solver="nystrom", iterations=50, horizon=1e8)
    weights = torch.optim.SGD([exact.hypernetwork.w0], lr=0.3)
    adjoint = ImplicitAdjoint(description, exact.everything, exact.hypernetwork, weights)
    own = adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)
    assert_close(own, exact.hypergradient, rtol=1e-6, atol=1e-6)
