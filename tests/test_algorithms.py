"""Three tiers: exact wiring without training, then that every algorithm converges where the answer is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hypertune.algorithms import (
    descend_response,
    fit_response,
    joint,
    simplified,
)
from hypertune.hypernetworks import HYPERNETWORKS, Hypernetwork, Layout, Linear, ReluMLP
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer, preconditioner
from tests.ridge import Ridge


@pytest.fixture
def ridge() -> Ridge:
    return Ridge.make()


def test_the_hypergradient_is_exact_once_the_hypernetwork_holds_the_tangent(ridge: Ridge):
    """∇λ̂ L_Valid(w_φ(λ̂)) against central differences of L_Valid(w*(λ)), n = D, to 8 digits."""
    lam_hat = torch.linspace(-2.0, 1.0, ridge.D, dtype=torch.float64)
    hypernetwork = Linear().build(ridge.best_response(lam_hat)[None], lam_hat.clone(), Layout(torch.arange(ridge.D)))
    hypernetwork.maps[0].V.data[0] = ridge.tangent(lam_hat).T
    exact = torch.stack([
        (ridge.valid_loss(ridge.best_response(lam_hat + h)) - ridge.valid_loss(ridge.best_response(lam_hat - h))) / 2e-5
        for h in 1e-5 * torch.eye(ridge.D, dtype=torch.float64)
    ])  # fmt: skip
    optimizer = torch.optim.SGD([lam_hat], lr=0.0)
    next(descend_response(ridge.problem(ridge.D), hypernetwork, lam_hat, optimizer))
    assert_close(lam_hat.grad, exact, rtol=1e-8, atol=1e-10)


def test_the_hypergradient_is_the_mean_over_folds():
    folds = [Ridge.make(seed) for seed in (0, 1)]
    lam_hat = torch.tensor([-1.0], dtype=torch.float64)

    def hypergradient(some: list[Ridge]) -> Tensor:
        problem = some[0].problem()
        object.__setattr__(
            problem, "valid_loss", lambda w, x: torch.stack([r.valid_loss(w[k]) for k, r in enumerate(some)])
        )
        w0 = torch.stack([r.best_response(lam_hat) for r in some])
        hypernetwork = Linear().build(w0, lam_hat.clone(), Layout(torch.arange(8)))
        hypernetwork.maps[0].V.data.copy_(torch.stack([r.tangent(lam_hat).T for r in some]))
        moved = lam_hat.clone()
        next(descend_response(problem, hypernetwork, moved, torch.optim.SGD([moved], lr=0.0)))
        return moved.grad

    assert_close(hypergradient(folds), (hypergradient(folds[:1]) + hypergradient(folds[1:])) / 2)


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_the_written_out_gradient_of_phi_is_autograd_s(ridge: Ridge, name: str):
    """One step of the plain optimizer (SGD) moves every part of φ by −α times what autograd says."""
    torch.manual_seed(0)
    hypernetwork = HYPERNETWORKS[name].build(
        torch.randn(1, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), Layout(torch.arange(8) // 2)
    )
    torch.nn.init.normal_(hypernetwork.maps[0].V)
    lam = torch.tensor([[-1.0], [0.3], [0.7]], dtype=torch.float64)
    loss = ridge.train_loss(hypernetwork(lam), lam).mean()
    expected = [p.detach() - 0.1 * g for p, g in zip(
        hypernetwork.parameters(), torch.autograd.grad(loss, list(hypernetwork.parameters())), strict=True
    )]  # fmt: skip
    plain = PlainOptimizer(hypernetwork, torch.optim.SGD(hypernetwork.parameters(), lr=0.1))
    next(fit_response(ridge.problem(), hypernetwork, plain, lambda m: lam, lam[0], m=3))
    assert_close([p.detach() for p in hypernetwork.parameters()], expected)


def test_the_tangent_step_is_the_tangent_equation(ridge: Ridge):
    """A pair one unit of ε apart, α = 1, n = 1: V moves by −(H V + ∂²L/∂w∂λ)/3, so it rests at the true tangent."""
    lam_hat = torch.tensor([-1.0], dtype=torch.float64)
    lam = lam_hat + torch.tensor([[1e-4], [-1e-4]], dtype=torch.float64)
    best, tangent = ridge.best_response(lam_hat), ridge.tangent(lam_hat)[:, 0]
    for V, expected in ((tangent, torch.zeros(8)), (torch.zeros(8), -lam_hat.exp() * best / 3)):
        hypernetwork = Linear().build(best[None], lam_hat, Layout(torch.arange(8)))
        hypernetwork.maps[0].V.data[0, 0] = V
        w = hypernetwork(lam).detach().requires_grad_()
        (G,) = torch.autograd.grad(ridge.train_loss(w, lam).sum(), w)
        optimizer = TangentOptimizer(hypernetwork, torch.optim.SGD([hypernetwork.w0], lr=1.0))
        optimizer.step(hypernetwork.features(lam), G)
        assert_close(hypernetwork.maps[0].V[0, 0].detach() - V, expected.double(), rtol=1e-6, atol=1e-7)


def test_shared_noise_between_the_signs_cancels_in_the_tangent(ridge: Ridge):
    """A gradient that all samples share says nothing about the response and leaves V alone."""
    lam_hat = torch.zeros(1, dtype=torch.float64)
    hypernetwork = Linear().build(torch.zeros(1, 8, dtype=torch.float64), lam_hat, Layout(torch.arange(8)))
    optimizer = TangentOptimizer(hypernetwork, torch.optim.Adam([hypernetwork.w0], lr=0.1))
    clipped = torch.tensor([[0.5], [0.0]], dtype=torch.float64)  # a pair at a bound: one of the two stays inside
    optimizer.step(hypernetwork.features(clipped), torch.ones(1, 2, 8, dtype=torch.float64))
    assert_close(hypernetwork.maps[0].V.detach(), torch.zeros(1, 1, 8, dtype=torch.float64))


def test_a_weight_whose_gradients_cancel_is_not_thrown_by_adams_preconditioner():
    """First step: the gradients at λ̂ ± σε are ±1, so that Adam has seen next to none."""
    lam_hat = torch.zeros(1)
    hypernetwork = Linear().build(torch.zeros(1, 8), lam_hat, Layout(torch.arange(8)))
    optimizer = TangentOptimizer(hypernetwork, torch.optim.Adam([hypernetwork.w0], lr=0.1))
    G = torch.stack([torch.ones(1, 8), 1e-6 - torch.ones(1, 8)], dim=1)
    optimizer.step(hypernetwork.features(torch.tensor([[0.5], [-0.5]])), G)
    V = hypernetwork.maps[0].V.detach()
    assert (V < 0).all()
    assert (V > -10 * 0.1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda w: torch.optim.SGD(w, lr=0.1),
        lambda w: torch.optim.Adam(w, lr=0.1, betas=(0.0, 0.9)),
        lambda w: torch.optim.Adam(w, lr=0.1, betas=(0.0, 0.9), amsgrad=True),
        lambda w: torch.optim.Adamax(w, lr=0.1, betas=(0.0, 0.9)),
        lambda w: torch.optim.RMSprop(w, lr=0.1),
        lambda w: torch.optim.RMSprop(w, lr=0.1, centered=True),
        lambda w: torch.optim.Adagrad(w, lr=0.1),
        lambda w: torch.optim.Adadelta(w, lr=0.1, rho=0.0),
    ],
)
def test_the_preconditioner_is_what_the_optimizer_divides_its_gradient_by(make):
    """Without momentum a step is −α G/P, whatever the optimizer."""
    w = torch.nn.Parameter(torch.zeros(1, 8, dtype=torch.float64))
    optimizer = make([w])
    for G in torch.randn(20, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        before, w.grad = w.detach().clone(), G
        earlier = optimizer.state[w]["acc_delta"].clone() if "acc_delta" in optimizer.state[w] else torch.zeros_like(w)
        optimizer.step()
        if "acc_delta" in optimizer.state[w]:  # the step was taken with what it was before
            optimizer.state[w]["acc_delta"].copy_(earlier)
        P = preconditioner(w, optimizer)
        assert (P is None) == (type(optimizer) is torch.optim.SGD)
        assert_close(w.detach() - before, -0.1 * G / (1.0 if P is None else P), rtol=1e-6, atol=1e-9)


def _tune(ridge: Ridge, algorithm: str, name: str, steps: int = 3000) -> tuple[Tensor, Hypernetwork]:
    torch.manual_seed(0)
    lam_hat = torch.tensor([-2.0], dtype=torch.float64)
    center = {"joint": lam_hat, "global": lam_hat.clone(), "simplified": lam_hat + 2.0}[algorithm]
    units = torch.zeros(ridge.D, dtype=torch.long)
    hypernetwork = HYPERNETWORKS[name].build(torch.zeros(1, ridge.D, dtype=torch.float64), center, Layout(units))
    basis = list(hypernetwork.basis.parameters())
    weights = torch.optim.Adam([hypernetwork.w0], lr=0.02)
    phi = TangentOptimizer(hypernetwork, weights, torch.optim.Adam(basis, lr=0.02) if basis else None)
    lam_optimizer = torch.optim.Adam([lam_hat], lr=0.05, betas=(0.9, 0.99), eps=1e-2)
    decay = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: max(0.0, 1 - t / steps)) for o in (weights, lam_optimizer)]
    problem, g = ridge.problem(), torch.Generator().manual_seed(1)
    if algorithm == "joint":
        run = joint(problem, hypernetwork, lam_hat, phi, lam_optimizer, sigma=0.3, warmup=steps // 6, generator=g)
    elif algorithm == "simplified":
        run = simplified(problem, hypernetwork, lam_hat, phi, lam_optimizer, warmup=steps // 30)
    else:

        def sample(m: int) -> Tensor:
            return -1.0 + 1.5 * torch.randn(m, 1, generator=g, dtype=torch.float64)

        run = fit_response(problem, hypernetwork, phi, sample, lam_hat, m=8)
    for step in itertools.islice(run, steps):
        decay[0].step()
        if step.valid_loss is not None:
            decay[1].step()
    if algorithm == "global":
        for _ in itertools.islice(descend_response(problem, hypernetwork, lam_hat, lam_optimizer), 1000):
            pass
    return lam_hat, hypernetwork


# How far λ̂ may end from λ* (both in log units). Over a broad p(λ) a function linear in λ is biased, however long it is
# trained, and therefore allowed more.
TOLERANCE = {
    ("joint", "linear"): 0.15, ("joint", "low_rank"): 0.15, ("joint", "mlp"): 0.15, ("joint", "gated"): 0.15,
    ("global", "linear"): 0.45, ("global", "low_rank"): 0.45, ("global", "mlp"): 0.15, ("global", "gated"): 0.15,
    ("simplified", "linear"): 0.15, ("simplified", "low_rank"): 0.15,
    ("simplified", "mlp"): 0.15, ("simplified", "gated"): 0.15,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "name"), TOLERANCE)
def test_lam_hat_reaches_the_exact_optimum(ridge: Ridge, algorithm: str, name: str):
    """From λ̂ = −2, 1.6 log units away."""
    lam_hat, _ = _tune(ridge, algorithm, name)
    assert abs(float(lam_hat) - ridge.best_lam()) < TOLERANCE[algorithm, name]


@pytest.mark.slow
@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_algorithm_3_learns_the_true_tangent(ridge: Ridge, name: str):
    """Direction and length of dw_φ/dλ at λ̂ against dw*/dλ."""
    lam_hat, hypernetwork = _tune(ridge, "joint", name)
    lam = lam_hat.detach()
    learned = torch.autograd.functional.jacobian(lambda one: hypernetwork(one[None])[0, 0], lam)[:, 0]
    true = ridge.tangent(lam)[:, 0]
    assert torch.cosine_similarity(learned, true, dim=0) > 0.99
    assert 0.9 < float(learned.norm() / true.norm()) < 1.1


@pytest.mark.slow
def test_theorem_2_1_an_mlp_hypernetwork_reaches_the_minimum_over_the_whole_support(ridge: Ridge):
    """L_Train(w_φ(λ), λ) is within 0.5% of min_w L_Train(w, λ) for every λ of p(λ)'s support, U(−3, 2)."""
    torch.manual_seed(0)
    center = torch.zeros(1, dtype=torch.float64)
    hypernetwork = ReluMLP(hidden=50).build(
        torch.zeros(1, ridge.D, dtype=torch.float64), center, Layout(torch.arange(8))
    )
    optimizer = torch.optim.Adam(hypernetwork.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / 4000))
    g = torch.Generator().manual_seed(0)
    run = fit_response(
        ridge.problem(), hypernetwork, PlainOptimizer(hypernetwork, optimizer),
        lambda m: 5 * torch.rand(m, 1, generator=g, dtype=torch.float64) - 3, center, m=16,
    )  # fmt: skip
    for _ in itertools.islice(run, 4000):
        decay.step()
    lam = torch.linspace(-3, 2, 101, dtype=torch.float64)[:, None]
    reached = ridge.train_loss(hypernetwork(lam)[0].detach(), lam)
    minimum = torch.stack([ridge.train_loss(ridge.best_response(one), one) for one in lam])
    assert (reached >= minimum - 1e-12).all()
    assert float((reached / minimum - 1).max()) < 5e-3


def test_lam_hat_waits_for_the_warmup_and_stays_in_its_box(ridge: Ridge):
    lam_hat = torch.tensor([-2.0], dtype=torch.float64)
    hypernetwork = Linear().build(torch.zeros(1, 8, dtype=torch.float64), lam_hat, Layout(torch.arange(8)))
    phi = TangentOptimizer(hypernetwork, torch.optim.Adam([hypernetwork.w0], lr=0.1))
    run = joint(
        ridge.problem(low=-2.1, high=-1.9), hypernetwork, lam_hat, phi, torch.optim.SGD([lam_hat], lr=100.0),
        sigma=0.3, warmup=5, every=2, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    steps = list(itertools.islice(run, 9))
    assert [s.number for s in steps if s.valid_loss is not None] == [7, 9]
    assert float(lam_hat) in (pytest.approx(-2.1), pytest.approx(-1.9))


def test_the_steps_between_samples_are_plain_training_at_lam_hat(ridge: Ridge):
    """every=2: the second step leaves V and λ̂ alone, and moves w₀ as a plain optimizer step of L_Train(·, λ̂) does."""
    lam_hat = torch.tensor([-2.0], dtype=torch.float64)
    hypernetwork = Linear().build(torch.ones(1, 8, dtype=torch.float64), lam_hat, Layout(torch.arange(8)))
    phi = TangentOptimizer(hypernetwork, torch.optim.SGD([hypernetwork.w0], lr=0.05))
    problem, g = ridge.problem(), torch.Generator().manual_seed(0)
    run = joint(
        problem, hypernetwork, lam_hat, phi, torch.optim.SGD([lam_hat], lr=0.1), sigma=0.3, every=2, generator=g
    )
    assert next(run).valid_loss is not None
    V, w0, lam = hypernetwork.maps[0].V.clone(), hypernetwork.w0.detach().clone().requires_grad_(), lam_hat.clone()
    (G,) = torch.autograd.grad(problem.train_loss(w0[:, None], lam[None], next(problem.train_batches)).sum(), w0)
    step = next(run)
    assert step.valid_loss is None
    assert V.any()
    assert_close(hypernetwork.maps[0].V, V)
    assert_close(lam_hat, lam)
    assert_close(hypernetwork.w0.detach(), w0.detach() - 0.05 * G)


def test_sigma_to_zero_is_algorithm_4(ridge: Ridge):
    """Both algorithms from the same fixed centre and the same V: as σ → 0 their paths meet."""
    paths = []
    for sigma in (None, 1e-7):
        lam_hat = torch.tensor([-2.0], dtype=torch.float64)
        hypernetwork = Linear().build(torch.zeros(1, 8, dtype=torch.float64), lam_hat + 2.0, Layout(torch.arange(8)))
        phi = PlainOptimizer(hypernetwork, torch.optim.SGD(hypernetwork.parameters(), lr=0.05))
        optimizer = torch.optim.SGD([lam_hat], lr=0.1)
        problem, g = ridge.problem(), torch.Generator().manual_seed(0)
        if sigma is None:
            run = simplified(problem, hypernetwork, lam_hat, phi, optimizer)
        else:
            run = joint(problem, hypernetwork, lam_hat, phi, optimizer, sigma=sigma, generator=g)
        paths.append(torch.stack([lam_hat.detach().clone() for _ in itertools.islice(run, 50)]))
    assert paths[0][0] != paths[0][-1]
    assert_close(paths[1], paths[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_response_of_many_hyperparameters_is_stable_under_momentum(ridge: Ridge):
    """Where SGD's steps along one random ε, with momentum, would not be."""
    lam_hat = torch.full((8,), -1.0, dtype=torch.float64)
    hypernetwork = Linear(local=False).build(torch.zeros(1, 8, dtype=torch.float64), lam_hat, Layout(torch.arange(8)))
    weights = torch.optim.SGD([hypernetwork.w0], lr=0.3, momentum=0.9)
    optimizer, generator = TangentOptimizer(hypernetwork, weights), torch.Generator().manual_seed(0)
    held = torch.optim.SGD([lam_hat], lr=0.0)
    run = joint(ridge.problem(8), hypernetwork, lam_hat, optimizer, held, sigma=0.1, generator=generator)
    for _ in range(2000):
        next(run)
    tangent = ridge.tangent(lam_hat).T
    assert (
        torch.nn.functional.cosine_similarity(hypernetwork.maps[0].V.data[0].flatten(), tangent.flatten(), dim=0) > 0.9
    )
