"""The gradient methods without a hypernetwork: exact on ridge regression, right in a search, and refused where they cannot be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch.testing import assert_close

from hypertune import (
    MLP,
    HyperTrainingSearchCV,
    TorchClassifier,
    check_hypergradient,
    per_feature,
    per_layer,
    per_weight,
)
from hypertune.algorithms import descend_response, joint
from hypertune.hypergradients import Hybrid, Implicit, Unrolled, alternate
from hypertune.hypernetworks import Constant, Layout, Linear
from hypertune.implicit import ImplicitAdjoint, T1T2Adjoint, conjugate_gradients, nystrom
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer
from hypertune.unrolled import Dynamics, Recorder, Tangent, Unroller
from tests.ridge import Ridge

INF = float("inf")
DECAY = loguniform(1e-6, 1e1)


class Exact:
    """Ridge regression at its optimum, one λ for each weight: everything that a hypergradient is made of."""

    def __init__(self) -> None:
        self.ridge = Ridge.make()
        self.lam = torch.linspace(-2.0, 1.0, self.ridge.D, dtype=torch.float64)
        self.best, self.tangent = self.ridge.best_response(self.lam), self.ridge.tangent(self.lam)
        self.w = self.best[None, None].clone().requires_grad_()
        (self.G,) = torch.autograd.grad(self.ridge.valid_loss(self.w).sum(), self.w)
        self.problem = self.ridge.problem(self.ridge.D)
        self.everything = torch.ones(self.ridge.D, dtype=torch.bool)
        self.hypernetwork = Linear().build(self.best[None], self.lam, Layout(torch.arange(self.ridge.D)))

    @property
    def hypergradient(self) -> torch.Tensor:
        return self.tangent.T @ self.G[0, 0]


@pytest.fixture
def exact() -> Exact:
    return Exact()


@pytest.mark.parametrize(
    ("description", "tolerance"),
    [
        (Implicit(solver="cg", iterations=20, horizon=INF), 1e-9),
        (Implicit(solver="neumann", iterations=600, horizon=INF), 1e-6),
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
    adjoint = ImplicitAdjoint(Implicit(horizon=INF), exact.everything, exact.hypernetwork, weights)
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
    description = Implicit(solver="cg", iterations=20, horizon=INF, tolerance=0.9)
    adjoint = ImplicitAdjoint(description, exact.everything, exact.hypernetwork, weights)
    errors = [
        float((adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G) - exact.hypergradient).norm())
        for _ in range(100)
    ]
    assert errors[0] > 1e-2 * float(exact.hypergradient.norm())
    assert errors[-1] < 1e-3 * errors[0]


def test_newton_steps_are_refused_where_the_loss_is_not_convex(exact: Exact):
    hypernetwork = Constant().build(torch.ones(1, 8, dtype=torch.float64), exact.lam, Layout(torch.arange(8)))
    own = Implicit(solver="cg", iterations=5, horizon=INF, inner="newton")
    adjoint = ImplicitAdjoint(own, exact.everything, hypernetwork, torch.optim.SGD([hypernetwork.w0], lr=1.0))
    concave = replace(exact.problem, train_loss=lambda w, lam, x: -w.square().sum(dim=-1) - 0.0 * lam.sum())
    with pytest.raises(ValueError, match="curves downwards along its gradient"):
        adjoint.newton(concave, exact.lam)


def test_t1t2_takes_the_identity_for_the_hessian(exact: Exact):
    adjoint = T1T2Adjoint(exact.everything)
    own = adjoint.hypergradient(exact.problem, exact.w.detach(), exact.lam, exact.G)
    assert_close(own, -exact.G[0, 0] * exact.lam.exp() * exact.best)


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
    adjoint = ImplicitAdjoint(Implicit("cg", 9, INF, inner="newton"), exact.everything, hypernetwork, weights)
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


def test_newton_steps_find_the_weights(exact: Exact):
    hypernetwork = Constant().build(torch.zeros(1, 8, dtype=torch.float64), exact.lam, Layout(torch.arange(8)))
    own = Implicit(solver="cg", iterations=20, horizon=INF, inner="newton")
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


# --- in a search ------------------------------------------------------------------------------------------------------------


def search(algorithm, space=None, **kwargs) -> HyperTrainingSearchCV:
    net = TorchClassifier(MLP(hidden=(8,)), max_epochs=kwargs.pop("epochs", 8), weight_decay=1e-3, random_state=0)
    own = {"algorithm": algorithm, "start": "estimator", "cv": 2, "random_state": 0, **kwargs}
    return HyperTrainingSearchCV(net, space or {"weight_decay": per_layer(DECAY), "input_noise": uniform(0, 1)}, **own)


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_breast_cancer(return_X_y=True)
    return scale(X), y


ALGORITHMS = [
    "implicit", "t1t2", "unrolled", "forward", "hybrid", Unrolled(steps=3), Implicit(solver="cg", iterations=3),
    Implicit(solver="nystrom", iterations=3), Implicit(solver="cg", iterations=5, inner="newton", horizon=1e4),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_every_algorithm_searches(table, algorithm):
    X, y = table
    epochs = 30 if algorithm == "unrolled" else None  # 20 steps for each move of λ̂
    found = search(algorithm, max_epochs=epochs).fit(X[:200], y[:200])
    history = found.history_
    assert history["algorithm"].endswith(": asked for")
    assert np.isfinite(history["validation_loss"]).all()
    assert (history["weight_decay"][-1] != history["weight_decay"][0]).any()
    assert found.best_estimator_.score(X, y) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_lam_hat_moves_far_whatever_divides_the_gradients(table, optimizer):
    """From a weight decay that is far too strong; with a response of the wrong size it stays there."""
    net = TorchClassifier(
        MLP(hidden=(16,)), optimizer=optimizer, lr=1e-2, max_epochs=60, weight_decay=0.03, random_state=0
    )
    found = HyperTrainingSearchCV(
        net, {"weight_decay": loguniform(1e-6, 1e1)}, start="estimator", evaluate="hypernetwork", cv=3, random_state=0
    ).fit(*table)
    assert 1e-3 < found.best_params_["weight_decay"] < 0.015


def test_what_is_screened_by_a_global_hypernetwork_is_inside_the_bounds(table, monkeypatch):
    """Its samples around the start are not, and a response that is extrapolated promises most."""
    starts = []

    def noted(problem, phi, lam_hat, *args, **kwargs):
        starts.append((problem.low <= lam_hat).all() & (lam_hat <= problem.high).all())
        return descend_response(problem, phi, lam_hat, *args, **kwargs)

    monkeypatch.setattr("hypertune.recipes.descend_response", noted)
    space = {"weight_decay": loguniform(1e-3, 1e-1), "module__dropout": uniform(0, 0.8)}
    for seed in range(3):
        search("global", space, scale=1.5, evaluate="hypernetwork").set_params(random_state=seed).fit(*table)
    assert starts == [True] * 3


def test_what_a_method_cannot_do_is_refused(table):
    dropout = {"weight_decay": DECAY, "module__dropout": uniform(0, 0.8)}
    for algorithm in ("implicit", "t1t2", "unrolled", "forward"):
        with pytest.raises(ValueError, match=r"no such derivative for \['module__dropout'\].*\"hybrid\""):
            search(algorithm, dropout).fit(*table)
    with pytest.raises(ValueError, match=r"at most 100, got 256"):
        search("forward", {"weight_decay": per_weight(DECAY)}).fit(*table)
    assert search("hybrid", dropout, epochs=2).fit(*table).best_params_["module__dropout"] >= 0


@pytest.mark.parametrize(
    ("description", "settings", "message"),
    [
        (Implicit, {"solver": "gmres"}, r"solver is one of \('neumann', 'cg', 'nystrom'\)"),
        (Implicit, {"inner": "adam"}, "inner one of"),
        (Implicit, {"solver": "nystrom", "horizon": INF}, "finite for solver='nystrom'"),
        (Implicit, {"horizon": 0.0}, "horizon must be positive"),
        (Implicit, {"iterations": 0}, "iterations must be at least 1"),
        (Unrolled, {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(description, settings, message: str):
    with pytest.raises(ValueError, match=message):
        description(**settings)


def test_a_search_without_a_response_says_so(table):
    response = search("implicit", {"weight_decay": DECAY}, epochs=2).fit(*table).best_response_
    assert response.validation_loss() == response.validation_loss({"weight_decay": response.params["weight_decay"]})
    with pytest.raises(ValueError, match="learned no response"):
        response.validation_loss({"weight_decay": 1.0})


def test_auto_says_what_it_chose_and_why(table):
    X, y = table
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
@pytest.mark.parametrize(
    ("algorithm", "cosine", "ratio"),
    [
        ("joint", 0.8, 0.5),
        ("forward", 0.99, 0.05),
        (Implicit(horizon=INF), 0.99, 0.1),
        (Implicit(solver="cg", iterations=20, horizon=INF), 0.99, 0.15),
        (Unrolled(steps=300), 0.9, 0.2),
        ("t1t2", 0.8, 1.0),
    ],
    ids=str,
)
def test_the_hypergradient_of_a_search_is_right(table, algorithm, cosine: float, ratio: float):
    """One weight decay per feature of a logistic regression, two folds, minibatches."""
    X, y = table
    net = TorchClassifier(MLP(hidden=()), weight_decay=0.03, batch_size=100, lr=0.02, max_epochs=300, random_state=0)
    own = HyperTrainingSearchCV(
        net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}, algorithm=algorithm, cv=2, random_state=0
    )
    check = check_hypergradient(own, X, y)
    assert check.cosine > cosine
    assert abs(check.ratio - 1) < ratio
    assert str(check).startswith(f"cosine {check.cosine:.4f}")


@pytest.mark.slow
def test_a_hypergradient_is_compared_with_retrained_models(table):
    X, y = table
    net = TorchClassifier(MLP(hidden=(8,)), weight_decay=0.03, lr=0.02, max_epochs=150, random_state=0)
    own = HyperTrainingSearchCV(
        net, {"weight_decay": per_layer(DECAY), "module__dropout": uniform(0, 0.8)}, cv=2, random_state=0
    )
    check = check_hypergradient(own, X, y, reference="retrain", step=0.5)
    assert check.reference.shape == (3,)
    assert check.cosine > 0.8


def test_a_check_leaves_the_search_alone_and_refuses_what_is_not_convex(table):
    X, y = table
    own = search("joint", {"weight_decay": DECAY}, epochs=1)
    with pytest.raises(ValueError, match=r"choose \"exact\" or \"retrain\""):
        check_hypergradient(own, X, y, reference="guess")
    with pytest.raises(ValueError, match="No optimum of the training loss was found"):
        check_hypergradient(own, X, y)
    assert own.evaluate == "retrain"
    assert not hasattr(own, "history_")


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


@pytest.mark.slow
def test_forward_mode_takes_any_adam_and_no_weights_of_rows(table):
    X, y = table
    own = search("forward", {"weight_decay": DECAY}, epochs=2)
    own.estimator.set_params(optimizer=partial(torch.optim.Adam, betas=(0.9, 0.99)))
    assert np.isfinite(own.fit(X, y).best_score_)
    with pytest.raises(ValueError, match="cannot tune the weights of rows"):
        search("forward", {"sample_weight": uniform(0, 2)}, epochs=2).fit(X[:60], y[:60])


@pytest.mark.slow
def test_a_check_is_where_lam_hat_was_held_and_not_at_a_bound(table):
    """The estimator's weight decay of 0 is no place on a logarithmic axis: λ̂ starts inside, and so does the reference."""
    X, y = table
    net = TorchClassifier(MLP(hidden=()), lr=0.02, max_epochs=100, random_state=0)
    exactly = Implicit(solver="cg", iterations=20, horizon=INF)
    own = HyperTrainingSearchCV(net, {"weight_decay": loguniform(1e-2, 1e1)}, algorithm=exactly, cv=2, random_state=0)
    check = check_hypergradient(own, X, y)
    assert check.cosine > 0.99
    assert abs(check.ratio - 1) < 0.2


@pytest.mark.parametrize("steps", [1, 5])
def test_hybrid_leaves_the_weights_of_rows_to_the_implicit_gradient_where_they_are(table, steps):
    """Not where the unrolled steps lead from there."""
    X, y = table
    X, y = X[:150], y[:150]
    net = TorchClassifier(
        MLP(hidden=()), weight_decay=0.1, lr=0.02, batch_size=200, max_epochs=200, sample_weight=np.ones(len(y)),
        random_state=0,
    )  # fmt: skip
    own = HyperTrainingSearchCV(net, {"sample_weight": uniform(0, 2)}, algorithm=Hybrid(steps), cv=2, random_state=0)
    check = check_hypergradient(own, X, y)
    assert check.cosine > 0.95
    assert 0.6 < check.ratio < 1.2


def test_the_momentum_of_rmsprop_is_of_preconditioned_gradients(table):
    X, y = table
    optimizer = partial(torch.optim.RMSprop, momentum=0.9)
    net = TorchClassifier(MLP(hidden=()), weight_decay=0.1, optimizer=optimizer, lr=3e-3, max_epochs=60, random_state=0)
    own = HyperTrainingSearchCV(
        net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}, algorithm="hybrid", cv=2, random_state=0
    )
    check = check_hypergradient(own, X, y)
    assert check.cosine > 0.9
    assert 0.5 < check.ratio < 1.5
