"""From the names of the API to a stream of steps: which algorithm, which optimizers, in which proportions.

recipe = choose("auto", space, differentiable, scale=None, n_samples=None, response_optimizer="tangent")
for step in stream(recipe, problem, phi, lam_hat, recipe.phi_optimizer(net, phi, steps), lam_optimizer, ...):
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypertune.algorithms import (
    Problem,
    ResponseOptimizer,
    Step,
    descend_response,
    descend_w,
    fit_response,
    inside,
    joint,
    simplified,
)
from hypertune.hypergradients import DESCRIPTIONS, T1T2, Description, Forward, Hybrid, Implicit, Unrolled, alternate
from hypertune.hypernetworks import Builder, Constant, Hypernetwork, Linear
from hypertune.implicit import ImplicitAdjoint, T1T2Adjoint
from hypertune.net import Net
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer
from hypertune.space import Space
from hypertune.unrolled import Recorder, Tangent, Unroller

PAPER = ("joint", "global", "simplified")
NAMES = ("auto", *PAPER, *DESCRIPTIONS)
_MANY = 1_000  # values of one hyperparameter, from which on the implicit gradient is better and cheaper than sampling
_FEW = 100  # hyperparameters, up to which forward mode carries a copy of the weights for each
_EVERY = 2  # steps per sample of λ and move of λ̂ in "joint"; the others are plain
_OF_ROWS = Implicit(horizon=10.0, every=1)  # weights of training examples: what they do to w is forgotten soon
_SCREENED = 512  # settings that "global" ranks before its descent
_GLOBAL_FIT = 0.75  # share of the steps of "global" that fit the response; the rest descends it


@dataclass(frozen=True)
class Recipe:
    """An algorithm for a space, what it leaves to the implicit gradient, and the settings that are its own.

    Parameters
    ----------
    algorithm : str or Description
        "joint", "global" or "simplified"; or one of :mod:`hypertune.hypergradients`.
    implicit : Tensor of shape (n,)
        Booleans: coordinates whose hypergradient does not come through the hypernetwork.
    by : Implicit or T1T2
        What gives the hypergradient of the implicit ones.
    reason : str
        Why this one, in words.
    space : Space
    differentiable : Tensor of shape (n,)
        Booleans: the coordinates in which the training loss is differentiable.
    scale : float or None
    n_samples : int or None
    response_optimizer : {"tangent", "plain"}
        As ``HyperTrainingSearchCV`` has them.
    """

    algorithm: str | Description
    implicit: Tensor
    by: Implicit | T1T2
    reason: str
    space: Space
    differentiable: Tensor
    scale: float | None
    n_samples: int | None
    response_optimizer: str

    @property
    def name(self) -> str:
        """As a search names it."""
        return self.algorithm if isinstance(self.algorithm, str) else type(self.algorithm).__name__.lower()

    @property
    def every(self) -> int:
        """Training steps for one of λ̂."""
        if not isinstance(self.algorithm, str):
            return self.algorithm.every
        rests = self.name == "joint" and self.response_optimizer == "tangent" and not self.implicit.any()
        return _EVERY if rests else 1

    @property
    def sigma(self) -> Tensor | None:
        """Standard deviation of the λ around λ̂ that the response is learned from, (n,); None if it is not learned so."""
        if self.name not in ("joint", "hybrid"):
            return None
        return torch.where(self.implicit, 0.0, 0.5 if self.scale is None else self.scale)

    def phi_steps(self, steps: int) -> int:
        """How many of the steps train φ."""
        return math.ceil(_GLOBAL_FIT * steps) if self.name == "global" else steps

    def first_move(self, steps: int, warmup: float) -> int:
        """After how many of the steps λ̂ may move, if it is to rest for a share ``warmup`` of them."""
        return fitted if (fitted := self.phi_steps(steps)) < steps else int(warmup * steps)

    def builder(self, hypernetwork: Builder) -> Builder:
        """What it learns of the response: the given family, the tangent, or nothing."""
        if isinstance(self.algorithm, Implicit | T1T2 | Unrolled):
            return Constant()
        return Linear(local=False) if isinstance(self.algorithm, Forward) else hypernetwork

    def phi_optimizer(self, net: Net, phi: Hypernetwork, steps: int) -> ResponseOptimizer:
        """Line 4 by the estimator's own optimizer and learning-rate schedule, over a run of so many steps."""
        steps = self.phi_steps(steps)
        if self.response_optimizer == "plain":
            optimizer, schedule = net._make_optimizer(list(phi.parameters()), steps)
            return PlainOptimizer(phi, optimizer, [schedule])
        weights, schedule = net._make_optimizer([phi.w0], steps)
        if not (basis := list(phi.basis.parameters())):
            return TangentOptimizer(phi, weights, schedules=[schedule])
        basis_optimizer, basis_schedule = net._make_optimizer(basis, steps)
        return TangentOptimizer(phi, weights, basis_optimizer, [schedule, basis_schedule])


def choose(
    algorithm: str | Description,
    space: Space,
    differentiable: Tensor,
    *,
    scale: float | None,
    n_samples: int | None,
    response_optimizer: str,
) -> Recipe:
    """The recipe for ``algorithm=``.

    Parameters
    ----------
    algorithm : str or Description
    space : Space
        With all grains resolved.
    differentiable : Tensor of shape (n,)
        Booleans: the coordinates in which the training loss is differentiable.
    scale, n_samples, response_optimizer
        See :class:`Recipe`.

    Raises
    ------
    ValueError
        If the algorithm cannot tune one of the hyperparameters.
    """
    recipe = partial(
        Recipe,
        space=space,
        differentiable=differentiable,
        scale=scale,
        n_samples=n_samples,
        response_optimizer=response_optimizer,
    )
    rows = space.mask(lambda h: h.grain == "row")
    many = space.mask(lambda h: h.size > _MANY) & differentiable
    by = _OF_ROWS if rows.any() else Implicit()
    if algorithm == "auto":
        implicit, many_values = many | rows, f"more than {_MANY:,} values of one hyperparameter"
        if not implicit.any():
            return recipe("joint", implicit, by, f"not {many_values}")
        if implicit.all() and not rows.any():
            return recipe(by, implicit, by, many_values)
        reason = f"joint, and the implicit gradient for {int(implicit.sum()):,} of {space.n:,} values"
        return recipe("joint", implicit, by, reason)
    if algorithm in PAPER:
        return recipe(algorithm, rows, by, "asked for")
    chosen = DESCRIPTIONS[algorithm] if isinstance(algorithm, str) else algorithm
    if isinstance(chosen, Hybrid):
        return recipe(chosen, rows, by, "asked for")
    _check(chosen, algorithm, space, differentiable)
    everything = torch.ones(space.n, dtype=torch.bool, device="cpu")
    if isinstance(chosen, Implicit | T1T2):
        return recipe(chosen, everything, chosen, "asked for")
    return recipe(chosen, ~everything, by, "asked for")


def _check(chosen: Description, asked: Any, space: Space, differentiable: Tensor) -> None:
    """Refuse what an algorithm that differentiates the training loss by λ cannot tune."""
    blocks = zip(space.hyperparameters, space.blocks.values(), strict=True)
    if names := [h.name for h, block in blocks if not differentiable[block].all()]:
        raise ValueError(
            f"algorithm={asked!r} differentiates the training loss by every hyperparameter, and there is no such derivative for "
            f'{names}: numbers inside the module (a dropout rate), augmentations, and what a penalty makes a plain number of. Use "joint", "global", "simplified" or "hybrid".'
        )
    if isinstance(chosen, Forward) and (names := [h.name for h in space.hyperparameters if h.grain == "row"]):
        raise ValueError(
            f'algorithm={asked!r} cannot tune the weights of rows ({names[0]!r}). Use "auto" or "implicit".'
        )
    if isinstance(chosen, Forward) and space.n > _FEW:
        raise ValueError(
            f"algorithm={asked!r} keeps a copy of the weights for each hyperparameter, and takes a second derivative for "
            f'each at every step: at most {_FEW}, got {space.n:,}. Use "auto" or "implicit".'
        )


def stream(
    recipe: Recipe,
    problem: Problem,
    phi: Hypernetwork,
    lam_hat: Tensor,
    phi_optimizer: ResponseOptimizer,
    lam_optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    warmup: float,
    seed: int,
) -> Iterator[Step]:
    """The steps of a recipe for a run of so many; λ̂ rests for a share ``warmup`` of them. Endless: the caller ends it."""
    implicit, weights, by = recipe.implicit.to(lam_hat.device), phi_optimizer.weight_optimizer, recipe.by
    adjoint: Any = None
    if implicit.any():
        adjoint = T1T2Adjoint(implicit) if isinstance(by, T1T2) else ImplicitAdjoint(by, implicit, phi, weights)
    common: dict[str, Any] = {
        "warmup": recipe.first_move(steps, warmup), "every": recipe.every, "adjoint": adjoint,
    }  # fmt: skip
    plain = partial(descend_w, problem, phi, phi_optimizer, lam_hat)
    match recipe.algorithm:
        case "joint" | Hybrid():
            generator, unroll, sigma = torch.Generator("cpu").manual_seed(seed), None, recipe.sigma
            assert sigma is not None
            if isinstance(recipe.algorithm, Hybrid):
                unroll = Unroller(
                    recipe.differentiable.to(lam_hat.device) & ~implicit, phi, weights, recipe.algorithm.steps
                )
            yield from joint(
                problem, phi, lam_hat, phi_optimizer, lam_optimizer, sigma=sigma.to(lam_hat),
                m=recipe.n_samples or (1 if implicit.all() else 2), generator=generator, unroll=unroll, **common,
            )  # fmt: skip
        case "simplified":
            yield from simplified(problem, phi, lam_hat, phi_optimizer, lam_optimizer, **common)
        case "global":
            sample = _prior(recipe.space, lam_hat, recipe.scale, seed, implicit)
            fitted = fit_response(problem, phi, phi_optimizer, sample, lam_hat, m=recipe.n_samples or 8)
            yield from islice(fitted, recipe.phi_steps(steps))
            _start_at_the_best(problem, phi, lam_hat, sample(_SCREENED))
            yield from descend_response(problem, phi, lam_hat, lam_optimizer, adjoint=adjoint)
        case Implicit(inner="newton"):
            yield from alternate(
                problem, phi, lam_hat, partial(adjoint.newton, problem, lam_hat), lam_optimizer, **common
            )
        case Implicit() | T1T2():
            yield from alternate(problem, phi, lam_hat, plain, lam_optimizer, **common)
        case Unrolled(last):
            recorder = Recorder(phi, phi_optimizer, last)
            carry = partial(recorder.step, problem, lam_hat)
            yield from alternate(problem, phi, lam_hat, carry, lam_optimizer, unroll=recorder, **common)
        case Forward():
            carry = partial(Tangent(phi, phi_optimizer).step, problem, lam_hat)
            yield from alternate(problem, phi, lam_hat, carry, lam_optimizer, **common)


@torch.no_grad()
def _start_at_the_best(problem: Problem, phi: Hypernetwork, lam_hat: Tensor, drawn: Tensor) -> None:
    """Between the two loops of Algorithm 2: λ̂ becomes that of the drawn λ (·, n) of which the response promises most."""
    screened, batch = inside(drawn, problem), next(problem.valid_batches)
    predicted = torch.cat([problem.valid_loss(phi(lam[None]), batch).mean(dim=0) for lam in screened])
    lam_hat.copy_(screened[predicted.argmin()])


def _prior(space: Space, lam_hat: Tensor, scale: float | None, seed: int, fixed: Tensor) -> Callable[[int], Tensor]:
    """p(λ) of Algorithm 2: the declared distributions, or N(start, scale² I) as in the paper; ``fixed`` coordinates stay."""
    rng = np.random.default_rng(seed)
    start = lam_hat.detach().clone()

    def sample(m: int) -> Tensor:
        if scale is None:
            lam = space.sample(m, rng).to(start)
        else:
            lam = start + scale * torch.from_numpy(rng.standard_normal((m, space.n))).to(start)
        return torch.where(fixed, start, lam)

    return sample
