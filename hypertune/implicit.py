"""The implicit function theorem at work: dw*/dλ = −H⁻¹ ∂²L_Train/∂w∂λ, and T1−T2, for which H is the identity.

The descriptions are in :mod:`hypertune.hypergradients`, with the references.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hypertune.algorithms import Problem, settle
from hypertune.hypergradients import Implicit, Linearisation, pace, step_size
from hypertune.hypernetworks import Hypernetwork
from hypertune.response_optimizers import preconditioner


class T1T2Adjoint:
    """−∇_w L_Valid ∂²L_Train/∂w∂λ for some ``coordinates`` (n,), on one training minibatch."""

    def __init__(self, coordinates: Tensor):
        self.coordinates = coordinates

    def hypergradient(self, problem: Problem, w: Tensor, lam_hat: Tensor, G: Tensor) -> Tensor:
        """See :class:`hypertune.algorithms.Adjoint`."""
        return -Linearisation(problem, w, lam_hat).backward(G[:, 0])[1]


class ImplicitAdjoint:
    """The hypergradient of coordinates that act through the training loss alone, at the cost of one more copy of w.

    By the implicit function theorem ∇_λ L_Valid = −q ∂²L_Train/∂w∂λ at the optimum, with q (K, D) the solution of

        (H + P / (α · horizon)) q = ∇_w L_Valid,

    P the preconditioner of the weights' optimizer, and α its step size over 1 − momentum (or 1, for Newton steps). Far from a strongly convex optimum q would grow along
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
        at, b = Linearisation(problem, w, lam_hat), G[:, 0]
        self._calls += 1
        P, own = self._preconditioner(at), self.description
        damping = 1 / (own.horizon if own.inner == "newton" else pace(self.weight_optimizer) * own.horizon)

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
        at = Linearisation(problem, w0[:, None], lam_hat)
        settle(problem, self.hypernetwork, lam_hat, at.x)
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

    def _preconditioner(self, at: Linearisation) -> Tensor:
        """The weights' own; where they have none, a running estimate of the size of H's rows (as AdaHessian's)."""
        if (P := preconditioner(self.hypernetwork.w0, self.weight_optimizer)) is not None:
            return P
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
        lr = 1.0 if self.description.inner == "newton" else step_size(self.weight_optimizer)
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
    going = torch.ones_like(rz, dtype=torch.bool)
    for _ in range(iterations):
        A_p = A(p)
        curvature = _dot(p, A_p)
        going = going & (curvature > 0) & (_dot(r, r) > enough)
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
    root, rank = damping.sqrt(), min(rank, b.shape[1])
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
