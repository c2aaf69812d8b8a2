"""Training steps differentiated: in reverse, of the next or the last k of them, and in forward mode.

The descriptions are in :mod:`hypertune.hypergradients`, with the references.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertune.algorithms import Problem, ResponseOptimizer, settle
from hypertune.hypergradients import Linearisation, step_size
from hypertune.hypernetworks import Hypernetwork
from hypertune.response_optimizers import bias_correction, preconditioner


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
    def of(cls, hypernetwork: Hypernetwork, optimizer: torch.optim.Optimizer, rows: Callable[[], Tensor]) -> Dynamics:
        """Those of w₀ under Adam or SGD, as they are now.

        Adam divides the gradient of a weight that nothing but its decay moves by next to nothing, and corrects that at its next
        step, which a held preconditioner does not. So no step of Adam's is beyond one over the size of H's ``rows`` () → (K, D);
        those of SGD, which has no preconditioner, are what they are.
        """
        w0, group = hypernetwork.w0, optimizer.param_groups[0]
        state, P = optimizer.state.get(w0, {}), preconditioner(w0, optimizer)
        s = torch.full_like(w0.data, step_size(optimizer))
        if P is not None:
            s = torch.minimum(s / P, 1 / rows().clamp(min=1e-12))
        zero = torch.zeros_like(w0.data)
        if "betas" in group:
            beta = group["betas"][0]
            u = state["exp_avg"] / bias_correction(beta, state["step"], w0) if state else zero
            return cls(u, s, beta, 1 - beta)
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = zero
        elif P is not None:  # RMSprop's is of gradients that were divided by it
            buffer = buffer * P
        return cls(buffer, s, group.get("momentum", 0.0), 1.0)


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
        trajectory: list[Linearisation] = []
        for _ in range(self.steps):
            at = Linearisation(problem, w, lam_hat)
            if not trajectory:
                step = Dynamics.of(self.hypernetwork, self.weight_optimizer, at.row_sizes)
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
        self._trajectory: deque[Linearisation] = deque(maxlen=steps)

    def step(self, problem: Problem, lam_hat: Tensor) -> Tensor:
        """One step; L_Train (), mean over folds, before it."""
        at = Linearisation(problem, self.hypernetwork.w0.data[:, None].clone(), lam_hat)
        self._trajectory.append(at)
        settle(problem, self.hypernetwork, lam_hat, at.x)
        self.phi_optimizer.step_at_center(at.g.detach()[:, 0])
        return at.loss

    def __call__(self, problem: Problem, w: Tensor, lam_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`hypertune.algorithms.Unroll`: the steps are those that led to w."""
        first = self._trajectory[0]
        step = Dynamics.of(self.hypernetwork, self.phi_optimizer.weight_optimizer, first.row_sizes)
        return _back(problem, w, self._trajectory, step)


def _back(
    problem: Problem, w: Tensor, trajectory: MutableSequence[Linearisation], step: Dynamics
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
        V = self.hypernetwork.maps[0].V
        at = Linearisation(problem, self.hypernetwork.w0.data[:, None].clone(), lam_hat)
        change = at.forward(V.data)
        settle(problem, self.hypernetwork, lam_hat, at.x)
        self.phi_optimizer.step_at_center(at.g.detach()[:, 0])
        step = Dynamics.of(self.hypernetwork, self.phi_optimizer.weight_optimizer, at.row_sizes)
        self.U = step.beta * self.U + step.gamma * change
        V.data.sub_(step.s[:, None] * self.U)
        return at.loss
