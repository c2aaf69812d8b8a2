"""Figure 3: exact and approximate optimal weights.

The paper draws a training and a validation loss surface with the exact best response w*(λ) and with a linear one, fitted at λ̂: the
validation loss along the line has its minimum at λ_φ*, near λ*, that of the exact one.

Here there are two weights and one weight decay, all of it exact:

    L_Train(w, λ) = ½ Σ_d h_d (w_d − a_d)² + ½ e^λ ‖w‖²      L_Valid(w) = ½ ‖w − b‖²      w*(λ)_d = h_d a_d / (h_d + e^λ)

====================================  ===================  ====================================================================
constant                              value                from
====================================  ===================  ====================================================================
h, a, b                               see below            ours
λ̂                                     −1                   ours (released code: 0)
hypernetwork                          linear               paper
p(λ | λ̂)                              N(λ̂, 0.1²)           ours (paper: variance 1e-5)
optimizer of w₀                       SGD, 0.5, to 0       ours
optimizer of the response             tangent              ours, the package's default
λ̂ of Algorithm 3                      Adam, 0.02, to 0     ours
====================================  ===================  ====================================================================

Deviations
----------
1. Two weights and not one, and contours instead of surfaces in perspective.
2. The paper's line is drawn; this one is learned, by sampling λ around a λ̂ that stays where it is.
3. Algorithm 3 from the same λ̂ is added: it moves λ̂ and the line with it, and so ends at λ* and not at λ_φ*.

Command: ``python -m benchmarks fig3 --budget full --seeds 3``, half a minute.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.figures.rows import Row, markdown, pick, row, seeds, spread
from hypertune.algorithms import Problem, Step, fit_response, joint
from hypertune.hypernetworks import Hypernetwork, Layout, Linear
from hypertune.response_optimizers import TangentOptimizer

TITLE = "exact and approximate optimal weights on a two-weight problem: w*(λ), the tangent at λ̂, λ* and λ_φ*"


class Budget(NamedTuple):
    """Sizes of a run."""

    steps: int
    points: int


BUDGETS = {"smoke": Budget(steps=50, points=41), "full": Budget(steps=1_500, points=161)}
CURVATURE = torch.tensor([1.0, 0.1])  # h
TRAIN_OPTIMUM = torch.tensor([1.0, 1.0])  # a
VALID_OPTIMUM = torch.tensor([0.6, 0.6])  # b
LOW, HIGH = -6.0, 2.0
LAM_HAT = -1.0
SIGMA = 0.1

EXACT, TANGENT, JOINT = "exact", "tangent at λ̂", "Algorithm 3"


def train_loss(w: Tensor, lam: Tensor, x: object = None) -> Tensor:
    """w (..., 2), λ (..., 1) → (...)."""
    return 0.5 * (CURVATURE * (w - TRAIN_OPTIMUM).square() + lam.exp() * w.square()).sum(dim=-1)


def valid_loss(w: Tensor, x: object = None) -> Tensor:
    """w (..., 2) → (...)."""
    return 0.5 * (w - VALID_OPTIMUM).square().sum(dim=-1)


def best_response(lam: Tensor) -> Tensor:
    """λ (M, 1) → w*(λ) (M, 2)."""
    return CURVATURE * TRAIN_OPTIMUM / (CURVATURE + lam.exp())


def cells(seed: int, budget: str, directory: str | None) -> Iterator[Row]:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    size = BUDGETS[budget]
    lam = torch.linspace(LOW, HIGH, size.points)[:, None]
    yield from _curve(EXACT, lam, best_response(lam))
    hypernetwork, _, seconds = _train(seed, size.steps, move=False)
    with torch.no_grad():
        yield from _curve(TANGENT, lam, hypernetwork(lam)[0], seconds=seconds, step=size.steps)
    hypernetwork, lam_hat, seconds = _train(seed, size.steps, move=True)
    with torch.no_grad():
        yield from _curve(JOINT, lam_hat[None], hypernetwork(lam_hat[None])[0], seconds=seconds, step=size.steps)


def _curve(solver: str, lam: Tensor, w: Tensor, **more: Any) -> Iterator[Row]:
    for i in range(len(lam)):
        yield row(solver, lam=lam[i, 0], w=w[i], train=train_loss(w[i], lam[i]), valid=valid_loss(w[i]), **more)


def _train(seed: int, steps: int, *, move: bool) -> tuple[Hypernetwork, Tensor, float]:
    """Algorithm 3, or its training of φ alone with λ̂ where it is."""
    generator = torch.Generator().manual_seed(seed)
    nothing = itertools.repeat(None)
    problem = Problem(train_loss, valid_loss, nothing, nothing, torch.tensor([LOW]), torch.tensor([HIGH]))
    lam_hat = torch.tensor([LAM_HAT])
    w0 = torch.randn(1, 2, generator=generator)
    hypernetwork = Linear().build(w0, lam_hat, Layout(units=torch.zeros(2, dtype=torch.long)))
    weights, hyper = torch.optim.SGD([hypernetwork.w0], lr=0.5), torch.optim.Adam([lam_hat], lr=0.02)
    schedules = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps) for optimizer in (weights, hyper)]
    phi = TangentOptimizer(hypernetwork, weights)
    run: Iterator[Step]
    if move:
        run = joint(problem, hypernetwork, lam_hat, phi, hyper, sigma=SIGMA, warmup=steps // 3, generator=generator)
    else:

        def pair(m: int) -> Tensor:
            epsilon = SIGMA * torch.randn(1, 1, generator=generator)
            return lam_hat + torch.cat([epsilon, -epsilon])

        run = fit_response(problem, hypernetwork, phi, pair, lam_hat)
    start = time.perf_counter()
    for step in itertools.islice(run, steps):
        schedules[0].step()
        if step.valid_loss is not None:
            schedules[1].step()
    return hypernetwork, lam_hat, time.perf_counter() - start


# --- what is shown -----------------------------------------------------------------------------------------------------------


def plot(rows: list[Row], figure: Figure) -> None:
    """See :class:`benchmarks.figures.rows.FigureModule`. The curves are those of the first seed."""
    figure.set_size_inches(9.5, 8)
    against, along, train, valid = figure.subplots(2, 2).flat
    first = pick(rows, seed=seeds(rows)[0])
    exact, tangent = pick(first, solver=EXACT), pick(first, solver=TANGENT)
    for own, color, style, label in ((exact, "C0", "-", "w*(λ)"), (tangent, "C3", "--", "w_φ(λ), fitted at λ̂")):
        lam, w = [r["lam"] for r in own], np.array([r["w"] for r in own])
        against.plot(lam, w, color=color, ls=style, label=[label, None])
        along.plot(lam, [r["valid"] for r in own], color=color, ls=style, label=label)
        for axis in (train, valid):
            axis.plot(*w.T, color=color, ls=style, label=label)
    for axis in (against, along):
        axis.axvline(LAM_HAT, color="C2", ls=":", label="λ̂")
    best, learned, moved = (_lowest(pick(first, solver=s)) for s in (EXACT, TANGENT, JOINT))
    for found, color, label in ((best, "C0", "λ*"), (learned, "C3", "λ_φ*"), (moved, "k", "λ̂ after Algorithm 3")):
        marker = {"color": color, "ls": "", "marker": "+" if color == "k" else "*", "ms": 12, "label": label}
        along.plot(found["lam"], found["valid"], **marker)
        valid.plot(*found["w"], **marker)
    train.plot(*best_response(torch.tensor([LAM_HAT])).tolist(), "*", color="C2", ms=12, label="w*(λ̂)")
    _contours(train, lambda w: train_loss(w, torch.tensor([LAM_HAT])), "L_Train(w, λ̂)")
    _contours(valid, valid_loss, "L_Valid(w)")
    against.set(xlabel="λ", ylabel="the two weights", title="optimal weights", ylim=(-0.2, 1.2))
    along.set(xlabel="λ", ylabel="L_Valid", title="validation loss along both", ylim=(-0.01, 0.3))
    for axis in (against, along, train, valid):
        axis.legend(fontsize=8)


def _contours(axis: Axes, loss: Any, title: str) -> None:
    grid = torch.linspace(-0.2, 1.3, 60)
    w = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)
    axis.contour(grid, grid, loss(w), levels=15, colors="0.7", linewidths=0.7)
    axis.set(xlabel="w₁", ylabel="w₂", title=title, xlim=(-0.2, 1.3), ylim=(-0.2, 1.3))


def table(rows: list[Row]) -> str:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    lines = []
    for solver, name in ((EXACT, "λ*, exact"), (TANGENT, "λ_φ*, of the tangent at λ̂"), (JOINT, "λ̂ after Algorithm 3")):
        found = [_lowest(pick(rows, seed=seed, solver=solver)) for seed in seeds(rows)]
        true = best_response(torch.tensor([[f["lam"]] for f in found]))
        losses = [float(valid_loss(w)) for w in true]
        lines.append([name, spread([f["lam"] for f in found], 3), spread([f["valid"] for f in found]), spread(losses)])
    header = ["", "λ", "L_Valid(w_φ(λ))", "L_Valid(w*(λ))"]
    error = max(_slope_error(pick(rows, seed=seed, solver=TANGENT)) for seed in seeds(rows))
    return (
        f"{markdown(header, lines)}\n\nλ̂ = {LAM_HAT:g}. The learned slope differs from dw*/dλ at λ̂ by at most {error:.1%} of its length "
        f"({len(seeds(rows))} seeds)."
    )


def _lowest(rows: list[Row]) -> Row:
    return min(rows, key=lambda r: r["valid"])


def _slope_error(line: list[Row]) -> float:
    """‖V − dw*/dλ‖ / ‖dw*/dλ‖ at λ̂."""
    first, last = line[0], line[-1]
    slope = (np.array(last["w"]) - np.array(first["w"])) / (last["lam"] - first["lam"])
    lam = torch.tensor([LAM_HAT]).exp()
    tangent = (-CURVATURE * TRAIN_OPTIMUM * lam / (CURVATURE + lam).square()).numpy()
    return float(np.linalg.norm(slope - tangent) / np.linalg.norm(tangent))
