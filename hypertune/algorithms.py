"""Algorithms 2, 3 and 4 of Lorraine & Duvenaud (2018), line by line.

    for step in joint(problem, hypernetwork, lam_hat, phi_optimizer, lam_optimizer, sigma=0.5, generator=g):
        ...                                   # the caller owns the clock, the schedules, the trace and the end

Each algorithm is an endless generator of :class:`Step`. Everything that changes lives in what the caller passed in
(hypernetwork, λ̂, optimizers, generators), so stopping, inspecting or resuming needs no hook. Nothing here knows
scikit-learn or neural networks: two loss functions and two streams of minibatches are the whole problem.

Shapes: m sampled hyperparameters, n hyperparameters, D weights, K folds. One λ̂ (n,) is shared by the K folds, and
its gradient is the mean over folds of each fold's own validation gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from hypertune.hypernetworks import Hypernetwork
from hypertune.randomness import rng_state, set_rng_state

_TOGETHER = 2**23  # weights of all folds and sampled λ in one pass; beyond it each λ has its own, which is slower


@dataclass(frozen=True)
class Problem:
    """min_λ L_Valid(argmin_w L_Train(w, λ)), for K folds at once.

    Parameters
    ----------
    train_loss : callable ``(w (K, m, D), lam (m, n), x) -> (K, m)``
        L_Train; need not be differentiable in λ.
    valid_loss : callable ``(w (K, 1, D), x) -> (K, 1)``
        L_Valid; does not depend on λ but through w.
    train_batches, valid_batches : iterator
        Endless streams of minibatches x, in whatever form the losses take.
    low, high : Tensor of shape (n,)
        Bounds of λ.
    settle : callable ``(w (K, 1, D), lam (1, n), x)``, optional
        Sees the weights at λ̂ with every training minibatch: for state of the model beside w, which is to be λ̂'s and not that
        of the λ sampled around it.
    """

    train_loss: Callable[[Tensor, Tensor, Any], Tensor]
    valid_loss: Callable[[Tensor, Any], Tensor]
    train_batches: Iterator[Any]
    valid_batches: Iterator[Any]
    low: Tensor
    high: Tensor
    settle: Callable[[Tensor, Tensor, Any], None] | None = None


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes
    ----------
    number : int
        Counts from 1.
    train_loss : Tensor of shape () or None
        L_Train on the minibatch, mean over folds and sampled λ; None if the step did not train φ.
    valid_loss : Tensor of shape () or None
        L_Valid on the minibatch at λ̂, mean over folds; None if the step did not move λ̂.
    """

    number: int
    train_loss: Tensor | None
    valid_loss: Tensor | None


class ResponseOptimizer(Protocol):
    """Line 4 of the algorithms: φ ← φ − α ∇_φ L_Train(w_φ(λ), λ, x), given ∂L/∂w at the m sampled weights."""

    weight_optimizer: torch.optim.Optimizer

    def step(self, features: Tensor, G: Tensor) -> None:
        """Move φ; features (K, m, r) of the sampled λ, G (K, m, D) = ∂L_Train/∂w there, which it may overwrite."""
        ...

    def step_at_center(self, G: Tensor) -> None:
        """Move w₀ alone; G (K, D) = ∂L_Train/∂w at λ̂."""
        ...


class Adjoint(Protocol):
    """The hypergradient of some coordinates by other means than the hypernetwork; see :mod:`hypertune.implicit`."""

    coordinates: Tensor

    def hypergradient(self, problem: Problem, w: Tensor, lam_hat: Tensor, G: Tensor) -> Tensor:
        """(n,), given the weights w (K, 1, D) at λ̂ and G (K, 1, D), the gradient there of the mean over folds of L_Valid."""
        ...


class Unroll(Protocol):
    """A few training steps more, and the gradient through them; see :mod:`hypertune.unrolled`."""

    def __call__(self, problem: Problem, w: Tensor, lam_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_Valid (K, 1) after the steps, and of its mean over folds the gradients with respect to w (K, 1, D) and λ̂ (n,)."""
        ...


# --- the three algorithms --------------------------------------------------------------------------------------------


def joint(
    problem: Problem,
    hypernetwork: Hypernetwork,
    lam_hat: Tensor,
    phi_optimizer: ResponseOptimizer,
    lam_optimizer: torch.optim.Optimizer,
    *,
    sigma: float | Tensor,
    m: int = 2,
    warmup: int = 0,
    every: int = 1,
    generator: torch.Generator,
    adjoint: Adjoint | None = None,
    unroll: Unroll | None = None,
) -> Iterator[Step]:
    """Algorithm 3: hypernetwork and λ̂ together, λ ~ N(λ̂, σ²I).

    Parameters
    ----------
    problem : Problem
    hypernetwork : Hypernetwork
    lam_hat : Tensor of shape (n,)
        The current hyperparameters, moved in place.
    phi_optimizer : ResponseOptimizer
    lam_optimizer : torch.optim.Optimizer
        Holds ``lam_hat``.
    sigma : float or Tensor of shape (n,)
        Standard deviation of p(λ | λ̂), in units of λ.
    m : int, default=2
        Sampled λ per minibatch. An even number is drawn in antithetic pairs λ̂ ± σε on the same minibatch and noise.
    warmup : int, default=0
        Steps before λ̂ may move.
    every : int, default=1
        λ is sampled, and λ̂ moves, at one step in this many. The steps between train w₀ at λ̂, at the price of a plain step.
    generator : torch.Generator
        Draws ε.
    adjoint : Adjoint, optional
        Gives the hypergradient of the coordinates that the hypernetwork leaves to it.
    unroll : Unroll, optional
        L_Valid is that of the weights which so many training steps make of w_φ(λ̂): the paper's suggestion of a hybrid.

    Yields
    ------
    Step
    """
    for number in count(1):
        if (number - 1) % every:
            yield Step(number, descend_w(problem, hypernetwork, phi_optimizer, lam_hat), None)  # λ = λ̂, φ = w₀
            continue
        lam = inside(_neighbours(lam_hat, sigma, m, generator), problem)  # λ ~ p(λ | λ̂)
        train = _descend_phi(problem, hypernetwork, phi_optimizer, lam, lam_hat)  # φ ← φ − α ∇_φ L_Train(w_φ(λ), λ, x)
        valid = None
        if number > warmup:
            valid = descend_lam(
                problem, hypernetwork, lam_hat, lam_optimizer, adjoint, unroll
            )  # λ̂ ← λ̂ − β ∇_λ̂ L_Valid(w_φ(λ̂), x)
        yield Step(number, train, valid)


def simplified(
    problem: Problem,
    hypernetwork: Hypernetwork,
    lam_hat: Tensor,
    phi_optimizer: ResponseOptimizer,
    lam_optimizer: torch.optim.Optimizer,
    *,
    warmup: int = 0,
    every: int = 1,
    adjoint: Adjoint | None = None,
) -> Iterator[Step]:
    """Algorithm 4: no sampling; the movement of λ̂ is all that the hypernetwork sees of other λ.

    The parameters are those of :func:`joint`. The centre of the hypernetwork must stay where it is and V must not be
    zero, or λ̂ would never start to move.
    """
    for number in count(1):
        train = _descend_phi(
            problem, hypernetwork, phi_optimizer, lam_hat.detach()[None], lam_hat
        )  # φ ← φ − α ∇_φ L_Train(w_φ(λ̂), λ̂, x)
        valid = None
        if number > warmup and number % every == 0:
            valid = descend_lam(
                problem, hypernetwork, lam_hat, lam_optimizer, adjoint
            )  # λ̂ ← λ̂ − β ∇_λ̂ L_Valid(w_φ(λ̂), x)
        yield Step(number, train, valid)


def fit_response(
    problem: Problem,
    hypernetwork: Hypernetwork,
    phi_optimizer: ResponseOptimizer,
    sample: Callable[[int], Tensor],
    lam_hat: Tensor,
    *,
    m: int = 2,
) -> Iterator[Step]:
    """Algorithm 2, first loop: fit w_φ over a broad p(λ).

    Parameters
    ----------
    problem, hypernetwork, phi_optimizer
        As in :func:`joint`.
    sample : callable ``m -> Tensor of shape (m, n)``
        Draws from p(λ).
    lam_hat : Tensor of shape (n,)
        Not moved; where ``problem.settle`` keeps its state.
    m : int, default=2
        Sampled λ per minibatch.
    """
    for number in count(1):
        lam = inside(sample(m), problem)  # λ ~ p(λ)
        yield Step(
            number, _descend_phi(problem, hypernetwork, phi_optimizer, lam, lam_hat), None
        )  # φ ← φ − α ∇_φ L_Train


def descend_response(
    problem: Problem,
    hypernetwork: Hypernetwork,
    lam_hat: Tensor,
    lam_optimizer: torch.optim.Optimizer,
    *,
    adjoint: Adjoint | None = None,
) -> Iterator[Step]:
    """Algorithm 2, second loop: descend L_Valid(w_φ(λ̂), x) with φ fixed."""
    for number in count(1):
        if problem.settle is not None:
            settle(problem, hypernetwork, lam_hat, next(problem.train_batches))
        valid = descend_lam(problem, hypernetwork, lam_hat, lam_optimizer, adjoint)  # λ̂ ← λ̂ − β ∇_λ̂ L_Valid
        yield Step(number, None, valid)


# --- their lines ----------------------------------------------------------------------------------------------------


def _neighbours(lam_hat: Tensor, sigma: float | Tensor, m: int, generator: torch.Generator) -> Tensor:
    """m draws from N(λ̂, σ²I), as pairs λ̂ ± σε if m is even."""
    pairs = m if m % 2 else m // 2
    epsilon = torch.randn(pairs, len(lam_hat), generator=generator, dtype=lam_hat.dtype, device="cpu")
    epsilon = epsilon.to(lam_hat.device, non_blocking=True)
    signed = epsilon if m % 2 else torch.cat([epsilon, -epsilon])
    return lam_hat.detach() + sigma * signed


def inside(lam: Tensor, problem: Problem) -> Tensor:
    """λ (m, n), clipped to its bounds."""
    return torch.minimum(torch.maximum(lam, problem.low), problem.high)


def _weights(hypernetwork: Hypernetwork, features: Tensor) -> Tensor:
    """w_φ as a leaf: its gradient G is taken first, and pulled back to φ or λ̂ by the hypernetwork itself."""
    with torch.no_grad():
        w = hypernetwork.weights(features)
    return w.requires_grad_()


def _weights_at(lam_hat: Tensor, hypernetwork: Hypernetwork, features: Tensor) -> Tensor:
    """The same at λ̂; w₀ itself, and no copy, where it is that."""
    if hypernetwork.is_w0_at(lam_hat):
        return hypernetwork.w0.data[:, None].requires_grad_()
    return _weights(hypernetwork, features)


def settle(problem: Problem, hypernetwork: Hypernetwork, lam_hat: Tensor, x: Any) -> None:
    """Show the problem the weights at λ̂ with a minibatch, if it wants to see them."""
    if problem.settle is not None:
        with torch.no_grad():
            problem.settle(hypernetwork(lam_hat.detach()[None]), lam_hat.detach()[None], x)


def _descend_phi(
    problem: Problem,
    hypernetwork: Hypernetwork,
    phi_optimizer: ResponseOptimizer,
    lam: Tensor,
    lam_hat: Tensor,
) -> Tensor:
    x = next(problem.train_batches)
    settle(problem, hypernetwork, lam_hat, x)
    features = hypernetwork.features(lam)
    together = hypernetwork.w0.numel() * len(lam) <= _TOGETHER
    loss, G = (_gradient if together else _gradient_one_by_one)(problem, hypernetwork, features, lam, x)
    phi_optimizer.step(features, G)
    return loss


def _gradient(
    problem: Problem, hypernetwork: Hypernetwork, features: Tensor, lam: Tensor, x: Any
) -> tuple[Tensor, Tensor]:
    """L_Train (), mean over folds and the m sampled λ, and ∂L_Train/∂w (K, m, D)."""
    return _gradient_at(problem, _weights(hypernetwork, features), lam, x)


def _gradient_at(problem: Problem, w: Tensor, lam: Tensor, x: Any) -> tuple[Tensor, Tensor]:
    loss = problem.train_loss(w, lam, x)
    (G,) = torch.autograd.grad(loss.sum(), w)
    return loss.detach().mean(), G


def _gradient_one_by_one(
    problem: Problem, hypernetwork: Hypernetwork, features: Tensor, lam: Tensor, x: Any
) -> tuple[Tensor, Tensor]:
    """The same, with the same noise for all λ, and one graph in memory at a time: for large models."""
    noise, found = rng_state(lam.device), []
    for i in range(len(lam)):
        set_rng_state(noise, lam.device)
        found.append(_gradient(problem, hypernetwork, features[:, i : i + 1], lam[i : i + 1], x))
    losses, gradients = zip(*found, strict=True)
    del found
    return torch.stack(losses).mean(), torch.cat(gradients, dim=1)


def descend_w(
    problem: Problem, hypernetwork: Hypernetwork, phi_optimizer: ResponseOptimizer, lam_hat: Tensor
) -> Tensor:
    """A plain training step of w₀ at λ̂; L_Train (), mean over folds."""
    x = next(problem.train_batches)
    settle(problem, hypernetwork, lam_hat, x)
    lam = lam_hat.detach()[None]
    loss, G = _gradient_at(problem, _weights_at(lam_hat, hypernetwork, hypernetwork.features(lam)), lam, x)
    phi_optimizer.step_at_center(G[:, 0])
    return loss


def descend_lam(
    problem: Problem,
    hypernetwork: Hypernetwork,
    lam_hat: Tensor,
    lam_optimizer: torch.optim.Optimizer,
    adjoint: Adjoint | None = None,
    unroll: Unroll | None = None,
) -> Tensor:
    """Move λ̂ by one hypergradient; L_Valid (), mean over folds."""
    lam_hat.grad = None  # of the last call: lets go of it
    lam = lam_hat.detach().requires_grad_()
    features = hypernetwork.features(lam[None])
    w = _weights_at(lam_hat, hypernetwork, features)
    if unroll is None:
        loss = problem.valid_loss(w, next(problem.valid_batches))
        (G,) = torch.autograd.grad(loss.mean(), w)
        direct = None
    else:
        loss, G, direct = unroll(problem, w.detach(), lam_hat.detach())
    own = None
    if adjoint is not None:
        at_w = G  # and not where unrolled steps lead from there
        if unroll is not None:
            (at_w,) = torch.autograd.grad(problem.valid_loss(w, next(problem.valid_batches)).mean(), w)
        own = adjoint.hypergradient(problem, w.detach(), lam_hat.detach(), at_w)
    if hypernetwork.maps:
        (slope,) = torch.autograd.grad(features, lam, hypernetwork.pull_back(features, G))
    else:
        slope = torch.zeros_like(lam)
    if direct is not None:
        slope += direct
    lam_hat.grad = slope if own is None else torch.where(adjoint.coordinates, own, slope)  # type: ignore[union-attr]
    lam_optimizer.step()
    with torch.no_grad():
        lam_hat.copy_(inside(lam_hat, problem))
    return loss.detach().mean()
