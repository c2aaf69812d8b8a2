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

They need L_Train differentiable in λ, so that no dropout rate can be tuned by them. Each is a description that a
search takes as ``algorithm=``; what does the work on a :class:`hypertune.algorithms.Problem` is in :mod:`hypertune.implicit` and
:mod:`hypertune.unrolled`, and here what they share.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

import torch
from torch import Tensor

from hypertune.algorithms import Adjoint, Problem, Step, Unroll, descend_lam
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

    Raises
    ------
    ValueError
        For a setting without a meaning.
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
    """−∇_w L_Valid ∂²L_Train/∂w∂λ: the implicit function theorem with the identity for the Hessian.

    Parameters
    ----------
    every : int
        λ̂ moves at one training step in so many.
    """

    every: int = 4

    def __post_init__(self) -> None:
        _at_least_one(self, "every")


@dataclass(frozen=True)
class Unrolled:
    """Reverse mode through the last training steps (truncated back-propagation).

    Parameters
    ----------
    steps : int
        How many; λ̂ moves once in as many.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        _at_least_one(self, "steps")

    @property
    def every(self) -> int:
        """λ̂ moves once in as many steps as are unrolled."""
        return self.steps


@dataclass(frozen=True)
class Forward:
    """The tangent dw/dλ of the training steps themselves, exact to first order; for at most 100 hyperparameters.

    Parameters
    ----------
    every : int
        λ̂ moves at one training step in so many.
    """

    every: int = 2

    def __post_init__(self) -> None:
        _at_least_one(self, "every")


@dataclass(frozen=True)
class Hybrid:
    """Algorithm 3, with L_Valid after some training steps more from the hypernetwork's weights.

    Parameters
    ----------
    steps : int
        How many.
    every : int
        λ is sampled, and λ̂ moves, at one training step in so many.
    """

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
    for number in count(1):
        train, valid = descend(), None
        if number > warmup and number % every == 0:
            valid = descend_lam(problem, hypernetwork, lam_hat, lam_optimizer, adjoint, unroll)
        yield Step(number, train, valid)


class Linearisation:
    """∇_w L_Train on one minibatch at w (K, 1, D) and λ̂ (n,), and products with its derivatives."""

    def __init__(self, problem: Problem, w: Tensor, lam_hat: Tensor):
        self.w, self.lam = w.detach().requires_grad_(), lam_hat.detach()[None].requires_grad_()
        self.x = next(problem.train_batches)
        loss = problem.train_loss(self.w, self.lam, self.x)
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


def step_size(optimizer: torch.optim.Optimizer) -> float:
    """The weights' own, α; of a schedule what it began with."""
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def pace(optimizer: torch.optim.Optimizer) -> float:
    """How far the weights get in a step, in the long run, with a momentum that is not averaged (SGD's)."""
    return step_size(optimizer) / (1 - optimizer.param_groups[0].get("momentum", 0.0))
