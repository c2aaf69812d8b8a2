"""Hypergradients without a hypernetwork: implicit, T1−T2, unrolled and forward mode, and their mixtures with it.

All of them are ways to multiply ∇_w L_Valid by the tangent of the best response, dw/dλ:

==============  ======================================================================  ============================
name            dw/dλ                                                                   costs
==============  ======================================================================  ============================
``Implicit``    −H⁻¹ ∂²L_Train/∂w∂λ, the implicit function theorem at the optimum        a few H-vector products; any n
``T1T2``        the same with H = I                                                      one product; any n
``Unrolled``    of the last k training steps, in reverse                                 k training graphs; any n
``Forward``     of all training steps, carried along with w                              n copies of w, n products a step
==============  ======================================================================  ============================

The first three need L_Train differentiable in λ, so that no dropout rate can be tuned by them. Each is a description that a
search takes as ``algorithm=``; beside it stands what does the work on a :class:`hypertune.algorithms.Problem`.

>>> Implicit(solver="nystrom", iterations=20)
Implicit(solver='nystrom', iterations=20, horizon=100.0, tolerance=0.0, inner='optimizer', every=4)

References
----------
Pedregosa (2016), *Hyperparameter optimization with approximate gradient* (HOAG). Lorraine et al. (2020), *Optimizing millions of
hyperparameters by implicit differentiation* (Neumann). Hataya & Yamada (2023), *Nyström method for accurate and scalable implicit
differentiation*. Luketina et al. (2016), *Scalable gradient-based tuning of continuous regularization hyperparameters* (T1−T2).
Maclaurin et al. (2015), *Gradient-based hyperparameter optimization through reversible learning*. Franceschi et al. (2017),
*Forward and reverse gradient-based hyperparameter optimization*. Shaban et al. (2019), *Truncated back-propagation*.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hypertune.algorithms import Adjoint, Problem, ResponseOptimizer, Step, Unroll, descend_lam, preconditioner
from hypertune.hypernetworks import Hypernetwork

# --- descriptions: what algorithm= may be ---------------------------------------------------------------------------------

_Solver = Literal["neumann", "cg", "nystrom"]
_Inner = Literal["optimizer", "newton"]


def _at_least_one(description: object, *names: str) -> None:
    if few := [name for name in names if getattr(description, name) < 1]:
        raise ValueError(f"{description}: {few[0]} must be at least 1.")


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: −q ∂²L_Train/∂w∂λ with (H + damping) q = ∇_w L_Valid, warm-started.

    Parameters
    ----------
    solver : {"neumann", "cg", "nystrom"}
        Preconditioned Richardson iteration (the Neumann series, continued from step to step), conjugate gradients, or the
        inverse of a Nyström approximation of H.
    iterations : int
        H-vector products at each step of λ̂; the rank for "nystrom".
    horizon : float
        Damping: directions in which the weights would need more than so many steps of their optimizer to respond are damped.
        Infinite for none, which is right for strongly convex losses only ("nystrom" needs some).
    tolerance : float
        "cg" ends early once the residual is below this share of the right side; the share falls by a tenth with every step of
        λ̂, as in HOAG. 0 never ends early.
    inner : {"optimizer", "newton"}
        How the weights are trained: by their optimizer, or (convex losses without noise, large minibatches) by truncated Newton
        steps with the same conjugate gradients.
    every : int
        λ̂ moves at one training step in so many.
    """

    solver: _Solver = "neumann"
    iterations: int = 1
    horizon: float = 100.0
    tolerance: float = 0.0
    inner: _Inner = "optimizer"
    every: int = 4

    def __post_init__(self) -> None:
        if self.solver not in get_args(_Solver) or self.inner not in get_args(_Inner):
            raise ValueError(f"{self}: solver is one of {get_args(_Solver)}, inner one of {get_args(_Inner)}.")
        _at_least_one(self, "iterations", "every")
        if not self.horizon > 0 or (self.solver == "nystrom" and math.isinf(self.horizon)):
            raise ValueError(
                f"{self}: horizon must be positive, and finite for solver='nystrom', which needs some damping."
            )


@dataclass(frozen=True)
class T1T2:
    """−∇_w L_Valid ∂²L_Train/∂w∂λ: the implicit function theorem with the identity for the Hessian."""

    every: int = 4

    def __post_init__(self) -> None:
        _at_least_one(self, "every")


@dataclass(frozen=True)
class Unrolled:
    """Reverse mode through ``steps`` training steps from the current weights (truncated back-propagation)."""

    steps: int = 20

    def __post_init__(self) -> None:
        _at_least_one(self, "steps")

    @property
    def every(self) -> int:
        """λ̂ moves once in as many steps as are unrolled."""
        return self.steps


@dataclass(frozen=True)
class Forward:
    """The tangent dw/dλ of the training steps themselves, exact to first order; for few hyperparameters."""

    every: int = 2

    def __post_init__(self) -> None:
        _at_least_one(self, "every")


@dataclass(frozen=True)
class Hybrid:
    """Algorithm 3, with L_Valid after ``steps`` training steps more from the hypernetwork's weights."""

    steps: int = 5
    every: int = 4

    def __post_init__(self) -> None:
        _at_least_one(self, "steps", "every")


Description = Implicit | T1T2 | Unrolled | Forward | Hybrid
DESCRIPTIONS: dict[str, Description] = {
    "implicit": Implicit(),
    "t1t2": T1T2(),
    "unrolled": Unrolled(),
    "forward": Forward(),
    "hybrid": Hybrid(),
}


# --- the loop ---------------------------------------------------------------------------------------------------------------


def alternate(
    problem: Problem,
    hypernetwork: Hypernetwork,
    lam_hat: Tensor,
    descend: Callable[[], Tensor],
    lam_optimizer: torch.optim.Optimizer,
    *,
    adjoint: Adjoint | None = None,
    unroll: Unroll | None = None,
    warmup: int = 0,
    every: int = 1,
) -> Iterator[Step]:
    """Training steps at λ̂, and at one in ``every`` a step of λ̂.

    Parameters
    ----------
    descend : callable ``() -> L_Train``
        One training step.

    The others are those of :func:`hypertune.algorithms.joint`.
    """
    number = 0
    while True:
        number += 1
        train, valid = descend(), None
        if number > warmup and number % every == 0:
            valid = descend_lam(problem, hypernetwork, lam_hat, lam_optimizer, adjoint, unroll)
        yield Step(number, train, valid)


class _Linearisation:
    """∇_w L_Train on one minibatch at w (K, 1, D) and λ̂ (n,), and products with its derivatives."""

    def __init__(self, problem: Problem, w: Tensor, lam_hat: Tensor):
        self.w, self.lam = w.detach().requires_grad_(), lam_hat.detach()[None].requires_grad_()
        loss = problem.train_loss(self.w, self.lam, next(problem.train_batches))
        (self.g,) = torch.autograd.grad(loss.sum(), self.w, create_graph=True)
        self.loss = loss.detach().mean()

    def hessian(self, v: Tensor) -> Tensor:
        """H v for v (K, D)."""
        (H_v,) = torch.autograd.grad(self.g, self.w, v[:, None], retain_graph=True)
        return H_v[:, 0]

    def row_sizes(self) -> Tensor:
        """A draw of |H z|, z of random signs, (K, D): the root mean square over draws is the norm of each row of H."""
        signs = torch.randint(0, 2, self.w[:, 0].shape, device=self.w.device).to(self.w) * 2 - 1
        return self.hessian(signs).abs()

    def mixed(self, q: Tensor) -> Tensor:
        """q ∂²L_Train/∂w∂λ, summed over folds, (n,), for q (K, D)."""
        (q_mixed,) = torch.autograd.grad(self.g, self.lam, q[:, None], retain_graph=True)
        return q_mixed[0]

    def backward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once: H v (K, D) and v ∂²L_Train/∂w∂λ (n,)."""
        H_v, v_mixed = torch.autograd.grad(self.g, [self.w, self.lam], v[:, None])
        return H_v[:, 0], v_mixed[0]

    def forward(self, V: Tensor) -> Tensor:
        """H V + ∂²L_Train/∂w∂λ, (K, n, D), for a tangent V (K, n, D)."""
        u = torch.zeros_like(self.g, requires_grad=True)  # what is linear in u is differentiated once more, by u
        linear = torch.autograd.grad(self.g, [self.w, self.lam], u, create_graph=True)
        units = torch.eye(len(self.lam[0]), dtype=V.dtype, device=V.device)
        columns = [
            torch.autograd.grad(linear, u, [V[:, i : i + 1], units[i : i + 1]], retain_graph=True)[0]
            for i in range(V.shape[1])
        ]
        return torch.cat(columns, dim=1)


def _step_size(optimizer: torch.optim.Optimizer) -> float:
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))  # of a schedule, which may have ended


def _pace(optimizer: torch.optim.Optimizer) -> float:
    """How far the weights get in a step, in the long run, with a momentum that is not averaged (SGD's)."""
    return _step_size(optimizer) / (1 - optimizer.param_groups[0].get("momentum", 0.0))


# --- implicit ------------------------------------------------------------------------------------------------------------------


class T1T2Adjoint:
    """−∇_w L_Valid ∂²L_Train/∂w∂λ for some ``coordinates`` (n,), on one training minibatch."""

    def __init__(self, coordinates: Tensor):
        self.coordinates = coordinates

    def hypergradient(self, problem: Problem, w: Tensor, lam_hat: Tensor, G: Tensor) -> Tensor:
        """See :class:`hypertune.algorithms.Adjoint`."""
        return -_Linearisation(problem, w, lam_hat).backward(G[:, 0])[1]


class ImplicitAdjoint:
    """The hypergradient of coordinates that act through the training loss alone, at the cost of one more copy of w.

    By the implicit function theorem ∇_λ L_Valid = −q ∂²L_Train/∂w∂λ at the optimum, with q (K, D) the solution of

        (H + P / (α · horizon)) q = ∇_w L_Valid,

    P and α the preconditioner and the step size of the weights' optimizer. Far from a strongly convex optimum q would grow along
    flat directions, in which the weights do not get anywhere in the time that they have: hence the second term. Every call
    starts from the last q. No response is sampled, so that the weight of one training example among thousands is not lost
    in the noise of the others.

    Parameters
    ----------
    description : Implicit
    coordinates : Tensor of shape (n,)
        Booleans: whose hypergradient it gives. L_Train must be differentiable in them.
    hypernetwork : Hypernetwork
    weight_optimizer : torch.optim.Optimizer
        Holds ``hypernetwork.w0``.
    """

    def __init__(
        self,
        description: Implicit,
        coordinates: Tensor,
        hypernetwork: Hypernetwork,
        weight_optimizer: torch.optim.Optimizer,
    ):
        self.description = description
        self.coordinates = coordinates
        self.hypernetwork = hypernetwork
        self.weight_optimizer = weight_optimizer
        self.q = torch.zeros_like(hypernetwork.w0.data)
        self._sharpness = self.q.new_zeros(len(self.q), 1)
        self._diagonal: Tensor | None = None
        self._calls = 0

    def hypergradient(self, problem: Problem, w: Tensor, lam_hat: Tensor, G: Tensor) -> Tensor:
        """−q ∂²L_Train/∂w∂λ (n,), on one training minibatch.

        ``G`` (K, 1, D) is the gradient of the mean over folds of L_Valid at the weights ``w`` (K, 1, D).
        """
        at, b = _Linearisation(problem, w, lam_hat), G[:, 0]
        self._calls += 1
        P, own = self._preconditioner(at), self.description
        damping = 1 / (_pace(self.weight_optimizer) * own.horizon)

        def A(v: Tensor) -> Tensor:
            return at.hessian(v).addcmul_(P, v, value=damping)

        if own.solver == "neumann":
            for _ in range(own.iterations - 1):
                self.q = self._richardson(A(self.q), b, self.q, P)
            H_q, q_mixed = at.backward(
                self.q
            )  # the last product and the answer in one: the answer is that of q before it
            self.q = self._richardson(H_q.addcmul_(P, self.q, value=damping), b, self.q, P)
            return -q_mixed
        if own.solver == "cg":
            self.q = conjugate_gradients(A, b, self.q, P, own.iterations, self._tolerance())
        else:
            self.q = nystrom(at.hessian, b, damping * P, own.iterations)
        return -at.mixed(self.q)

    def newton(self, problem: Problem, lam_hat: Tensor) -> Tensor:
        """w₀ ← w₀ − H⁻¹ ∇_w L_Train by the same conjugate gradients; L_Train (), mean over folds, before it.

        Raises
        ------
        ValueError
            If no fold's loss is convex along its gradient.
        """
        w0 = self.hypernetwork.w0
        at = _Linearisation(problem, w0[:, None], lam_hat)
        g, P, own = at.g.detach()[:, 0], self._preconditioner(at), self.description
        step = conjugate_gradients(at.hessian, g, torch.zeros_like(g), P, own.iterations, self._tolerance())
        if g.any() and not step.any():
            raise ValueError(
                'inner="newton": the training loss curves downwards along its gradient, so a Newton step does not descend. It is for '
                'convex losses (linear models with a weight decay); use inner="optimizer".'
            )
        w0.data.sub_(step)
        return at.loss

    def _tolerance(self) -> float:
        return self.description.tolerance * 0.9**self._calls

    def _preconditioner(self, at: _Linearisation) -> Tensor:
        """The weights' own; where they have none, a running estimate of the size of H's rows (as AdaHessian's)."""
        if self.weight_optimizer.state.get(self.hypernetwork.w0):
            return preconditioner(self.hypernetwork.w0, self.weight_optimizer)
        if self.description.inner == "optimizer":
            return torch.ones_like(self.q)
        rows = at.row_sizes().square()
        self._diagonal = rows if self._diagonal is None else torch.lerp(self._diagonal, rows, 0.1)
        return self._diagonal.sqrt() + 1e-12

    def _richardson(self, A_q: Tensor, b: Tensor, q: Tensor, P: Tensor) -> Tensor:
        """q ← q + α P⁻¹ (b − A q): the dynamics of the weights themselves, with α reduced where P⁻¹ A is too sharp for it.

        With the inner learning rate alone the Neumann series diverges along the top eigenvectors.
        """
        # ‖P⁻¹ A q‖ / ‖q‖ in the norm of P: a lower bound of the largest eigenvalue, close to it before q could diverge.
        sharpness = (_dot(A_q / P, A_q) / _dot(P * q, q).clamp(min=1e-30)).sqrt()
        self._sharpness = torch.maximum(sharpness, 0.99 * self._sharpness)
        lr = _step_size(self.weight_optimizer)
        return torch.addcdiv(q, (b - A_q).mul_(lr / (1 + lr * self._sharpness)), P)


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """Of each of K, (K, 1)."""
    return torch.linalg.vecdot(u, v)[:, None]


def conjugate_gradients(
    A: Callable[[Tensor], Tensor], b: Tensor, q: Tensor, P: Tensor, iterations: int, tolerance: float = 0.0
) -> Tensor:
    """A q = b for K positive definite A at once, from q (K, D), preconditioned by the diagonal P (K, D).

    A fold that meets a direction of negative curvature keeps what it has.
    """

    r = b - A(q) if q.any() else b
    z = r / P
    p, rz, enough = z, _dot(r, z), tolerance**2 * _dot(b, b)
    for _ in range(iterations):
        A_p = A(p)
        curvature = _dot(p, A_p)
        going = (curvature > 0) & (_dot(r, r) > enough)
        if not going.any():
            break
        alpha = torch.where(going, rz / curvature, 0.0)
        q, r = q + alpha * p, r - alpha * A_p
        z = r / P
        before, rz = rz, _dot(r, z)
        p = z + torch.where(going, rz / before, 0.0) * p
    return q


def nystrom(H: Callable[[Tensor], Tensor], b: Tensor, damping: Tensor, rank: int) -> Tensor:
    """(H̃ + damping)⁻¹ b with the Nyström approximation H̃ = Y (Ωᵀ Y)⁺ Yᵀ, Y = H Ω for ``rank`` random directions Ω.

    Scaled by the damping's root on both sides, so that what is approximated has the damping 1. All (K, D).
    """
    root = damping.sqrt()
    omega = torch.randn(rank, *b.shape, dtype=b.dtype, device=b.device)
    Omega = torch.linalg.qr(omega.permute(1, 2, 0))[0]  # (K, D, rank)
    Y = torch.stack([H(Omega[..., i] / root) / root for i in range(rank)], dim=-1)
    core = Omega.transpose(1, 2) @ Y
    core = (core + core.transpose(1, 2)) / 2
    values, vectors = torch.linalg.eigh(core)
    kept = torch.where(values > 1e-6 * values.amax(dim=1, keepdim=True), values, torch.inf)  # no negative curvature
    F = Y @ (vectors * kept.rsqrt()[:, None])  # H̃ = F Fᵀ
    inner = torch.eye(rank, dtype=b.dtype, device=b.device) + F.transpose(1, 2) @ F
    c = (b / root)[..., None]
    solved = c - F @ torch.linalg.solve(inner, F.transpose(1, 2) @ c)  # Woodbury
    return solved[..., 0] / root


# --- unrolled and forward ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dynamics:
    """A training step with the preconditioner held: u ← β u + γ g, w ← w − s u.

    Momentum belongs to it: Adam trains where its steps without momentum would diverge (Cohen et al. 2022, *Adaptive gradient methods
    at the edge of stability*).

    Parameters
    ----------
    u : Tensor of shape (K, D)
        The momentum so far.
    s : Tensor of shape (K, D)
        Step size over preconditioner.
    beta, gamma : float
    """

    u: Tensor
    s: Tensor
    beta: float
    gamma: float

    @classmethod
    def of(cls, hypernetwork: Hypernetwork, optimizer: torch.optim.Optimizer, rows: Tensor) -> Dynamics:
        """Those of w₀ under Adam or SGD, as they are now, with no step beyond the size (K, D) of H's rows.

        Adam divides the gradient of a weight that nothing but its decay moves by next to nothing, and corrects that at its next
        step, which a held preconditioner does not.
        """
        w0, group = hypernetwork.w0, optimizer.param_groups[0]
        state, s = optimizer.state.get(w0, {}), _step_size(optimizer) / preconditioner(w0, optimizer)
        s = torch.minimum(s, 1 / rows.clamp(min=1e-12))
        zero = torch.zeros_like(w0.data)
        if "betas" in group:
            beta = group["betas"][0]
            u = state["exp_avg"] / (1 - beta ** float(state["step"])) if state else zero
            return cls(u, s, beta, 1 - beta)
        buffer = state.get("momentum_buffer")
        return cls(zero if buffer is None else buffer, s, group.get("momentum", 0.0), 1.0)


class Unroller:
    """``steps`` training steps from w with the weights' own momentum, preconditioner and step size, and the gradient back.

    Parameters
    ----------
    coordinates : Tensor of shape (n,)
        Booleans: those in which L_Train is differentiable. The others have no part in the gradient with respect to λ̂.
    hypernetwork : Hypernetwork
    weight_optimizer : torch.optim.Optimizer
        Holds ``hypernetwork.w0``.
    steps : int
    """

    def __init__(
        self, coordinates: Tensor, hypernetwork: Hypernetwork, weight_optimizer: torch.optim.Optimizer, steps: int
    ):
        self.coordinates, self.steps = coordinates, steps
        self.hypernetwork, self.weight_optimizer = hypernetwork, weight_optimizer

    def __call__(self, problem: Problem, w: Tensor, lam_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`hypertune.algorithms.Unroll`."""
        trajectory: list[_Linearisation] = []
        for _ in range(self.steps):
            at = _Linearisation(problem, w, lam_hat)
            if not trajectory:
                step = Dynamics.of(self.hypernetwork, self.weight_optimizer, at.row_sizes())
                u = step.u[:, None]
            trajectory.append(at)
            u = step.beta * u + step.gamma * at.g.detach()
            w = w - step.s[:, None] * u
        loss, of_w, of_lam = _back(problem, w, trajectory, step)
        return loss, of_w, torch.where(self.coordinates, of_lam, 0.0)


class Recorder:
    """Training steps of w₀ that are remembered, and the gradient back through the last ``steps`` of them.

    Parameters
    ----------
    hypernetwork : Hypernetwork
    phi_optimizer : ResponseOptimizer
    steps : int
    """

    def __init__(self, hypernetwork: Hypernetwork, phi_optimizer: ResponseOptimizer, steps: int):
        self.hypernetwork, self.phi_optimizer = hypernetwork, phi_optimizer
        self._trajectory: deque[_Linearisation] = deque(maxlen=steps)

    def step(self, problem: Problem, lam_hat: Tensor) -> Tensor:
        """One step; L_Train (), mean over folds, before it."""
        at = _Linearisation(problem, self.hypernetwork.w0.data[:, None].clone(), lam_hat)
        self._trajectory.append(at)
        self.phi_optimizer.step_at_center(at.g.detach()[:, 0])
        return at.loss

    def __call__(self, problem: Problem, w: Tensor, lam_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`hypertune.algorithms.Unroll`: the steps are those that led to w."""
        rows = self._trajectory[0].row_sizes()
        step = Dynamics.of(self.hypernetwork, self.phi_optimizer.weight_optimizer, rows)
        return _back(problem, w, self._trajectory, step)


def _back(
    problem: Problem, w: Tensor, trajectory: MutableSequence[_Linearisation], step: Dynamics
) -> tuple[Tensor, Tensor, Tensor]:
    """L_Valid (K, 1) at w (K, 1, D), and of its mean over folds the gradients with respect to where the trajectory began and λ̂.

    The trajectory is used up: the graph of each step is let go of as soon as it has been differentiated.
    """
    w = w.detach().requires_grad_()
    loss = problem.valid_loss(w, next(problem.valid_batches))
    (G,) = torch.autograd.grad(loss.mean(), w)
    # What L_Valid owes to w and to u after each step, from the last to the first.
    of_w, of_u, of_lam = G[:, 0], torch.zeros_like(step.u), torch.zeros_like(trajectory[0].lam[0])
    while trajectory:
        of_u = of_u - step.s * of_w
        through_w, through_lam = trajectory.pop().backward(step.gamma * of_u)
        of_w, of_lam, of_u = of_w + through_w, of_lam + through_lam, step.beta * of_u
    return loss.detach(), of_w[:, None], of_lam


class Tangent:
    """Forward mode: plain training steps of w₀ at λ̂, and of its tangent V (K, n, D), that of a dense linear hypernetwork.

        U ← β U + γ (H V + ∂²L_Train/∂w∂λ),    V ← V − s U

    The hypergradient is V ∇_w L_Valid, as it is of Algorithm 3.

    Parameters
    ----------
    hypernetwork : Hypernetwork
        Dense and linear.
    phi_optimizer : ResponseOptimizer
    """

    def __init__(self, hypernetwork: Hypernetwork, phi_optimizer: ResponseOptimizer):
        self.hypernetwork, self.phi_optimizer = hypernetwork, phi_optimizer
        self.U = torch.zeros_like(hypernetwork.maps[0].V.data)

    def step(self, problem: Problem, lam_hat: Tensor) -> Tensor:
        """One step of both; L_Train (), mean over folds, before it."""
        V, at = self.hypernetwork.maps[0].V, _Linearisation(problem, self.hypernetwork.w0[:, None], lam_hat)
        change, rows = at.forward(V.data), at.row_sizes()
        self.phi_optimizer.step_at_center(at.g.detach()[:, 0])
        step = Dynamics.of(self.hypernetwork, self.phi_optimizer.weight_optimizer, rows)
        self.U = step.beta * self.U + step.gamma * change
        V.data.sub_(step.s[:, None] * self.U)
        return at.loss
