"""Theorem 2.1: a sufficiently powerful hypernetwork learns the best response.

The paper proves that for every p(λ) of convex support the φ that minimises E_p(λ) L_Train(w_φ(λ), λ) reaches min_w L_Train(w, λ) at each
λ of the support, if w_φ can represent w*(λ). It shows no figure. Here the minimum is known, and the gap to it is measured,

    gap(λ) = L_Train(w_φ(λ), λ) − min_w L_Train(w, λ),        L_Train(w, λ) = mean (Xw − y)² / 2 + e^λ ‖w‖² / 2,

against the number of ReLU units, against the number of training steps, and for two p(λ) with the same support.

====================================  ===================  ====================================================================
constant                              value                from
====================================  ===================  ====================================================================
hypernetwork                          ReLU units           paper (50 in its figure 2); the widths are ours
data                                  diabetes             ours: scikit-learn's, 10 weights, all standardised
support of p(λ)                       [−3, 3]              ours (two standard deviations of the paper's figure 2)
p(λ)                                  uniform; normal      ours: uniform, and N(0, 1.5²) cut off at the ends of the support
sampled λ in a minibatch              16                   ours (paper: 2)
Adam's step size                      1e-2, linearly to 0  ours (paper: 1e-4)
====================================  ===================  ====================================================================

Deviations
----------
1. A theorem about the minimum cannot be tested by a run that stops; the gap shows both what the width allows and what training reaches.
2. Each number of steps is a run of its own, because the step size goes to zero in it.
3. The theorem's proof assumes a penalty that is linear in the hyperparameter; e^λ is not, and it is what the paper's experiments use.

Command: ``python -m benchmarks theorem --budget full --seeds 3``, 16 minutes on one thread of a busy machine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from torch import Tensor

from benchmarks.figures.rows import Row, markdown, pick, row, seeds
from hypertune.algorithms import Problem, fit_response
from hypertune.hypernetworks import Builder, Hypernetwork, Layout, Linear, ReluMLP
from hypertune.response_optimizers import PlainOptimizer

TITLE = "Theorem 2.1: the gap to min_w L_Train over the support of p(λ) against hypernetwork width and training steps"


class Budget(NamedTuple):
    """Sizes of a run."""

    widths: tuple[int, ...]
    steps: tuple[int, ...]


BUDGETS = {
    "smoke": Budget(widths=(0, 2, 8), steps=(10, 100)),
    "full": Budget(widths=(0, 2, 4, 8, 16, 32, 64), steps=(100, 300, 1_000, 3_000, 10_000)),
}
SUPPORT = 3.0  # p(λ) is on [−SUPPORT, SUPPORT]
SPREAD = 1.5  # standard deviation of the normal p(λ), before it is cut off
POINTS = 61  # at which the gap is measured


class Ridge(NamedTuple):
    """The problem: X (N, D), y (N,), in float64."""

    X: Tensor
    y: Tensor

    def train_loss(self, w: Tensor, lam: Tensor, x: object = None) -> Tensor:
        """w (..., D), λ (..., 1) → (...)."""
        residual = w @ self.X.T - self.y
        return 0.5 * residual.square().mean(dim=-1) + 0.5 * (lam.exp() * w.square()).sum(dim=-1)

    def best_response(self, lam: Tensor) -> Tensor:
        """λ (M, 1) → argmin_w L_Train (M, D)."""
        gram, moment = self.X.T @ self.X / len(self.X), self.X.T @ self.y / len(self.X)
        return torch.linalg.solve(gram + torch.diag_embed(lam.exp().expand(-1, len(gram))), moment.expand(len(lam), -1))


def load() -> Ridge:
    """Diabetes: 442 patients, 10 measurements."""
    X, y = (torch.from_numpy(a) for a in load_diabetes(return_X_y=True))
    return Ridge((X - X.mean(dim=0)) / X.std(dim=0), (y - y.mean()) / y.std())


def cells(seed: int, budget: str, directory: str | None) -> Iterator[Row]:
    """See :class:`benchmarks.figures.rows.FigureModule`. Width 0 is the linear hypernetwork."""
    size, ridge = BUDGETS[budget], load()
    lam = torch.linspace(-SUPPORT, SUPPORT, POINTS, dtype=torch.float64)[:, None]
    least = ridge.train_loss(ridge.best_response(lam), lam)
    runs = [("uniform", steps) for steps in size.steps] + [("normal", max(size.steps))]
    for width, (distribution, steps) in itertools.product(size.widths, runs):
        start = time.perf_counter()
        hypernetwork = _fit(ridge, width, steps, distribution, seed)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            gap = ridge.train_loss(hypernetwork(lam)[0], lam) - least
        along: dict[str, Any] = {"lam": lam[:, 0], "gaps": gap} if steps == max(size.steps) else {}
        yield row(distribution, seconds=seconds, step=steps, width=width, gap=gap.mean(), largest=gap.max(), **along)


def _fit(ridge: Ridge, width: int, steps: int, distribution: str, seed: int) -> Hypernetwork:
    """Algorithm 2's first loop."""
    generator = torch.Generator().manual_seed(seed)
    D = ridge.X.shape[1]
    builder: Builder = ReluMLP(width) if width else Linear()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        zeros = torch.zeros(1, D, dtype=torch.float64)
        hypernetwork = builder.build(zeros, zeros[0, :1], Layout(units=torch.zeros(D, dtype=torch.long)))
    bound = torch.full((1,), SUPPORT, dtype=torch.float64)
    nothing = itertools.repeat(None)
    problem = Problem(ridge.train_loss, lambda w, x: w.sum(dim=-1), nothing, nothing, -bound, bound)

    def sample(m: int) -> Tensor:
        u = torch.rand(m, 1, generator=generator, dtype=torch.float64)
        if distribution == "uniform":
            return SUPPORT * (2 * u - 1)
        low, high = torch.special.ndtr(torch.tensor([-SUPPORT, SUPPORT], dtype=torch.float64) / SPREAD)
        return SPREAD * torch.special.ndtri(low + (high - low) * u)

    optimizer = torch.optim.Adam(hypernetwork.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    phi = PlainOptimizer(hypernetwork, optimizer)
    for _ in itertools.islice(fit_response(problem, hypernetwork, phi, sample, bound - bound, m=16), steps):
        schedule.step()
    return hypernetwork


# --- what is shown -----------------------------------------------------------------------------------------------------------


def plot(rows: list[Row], figure: Figure) -> None:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    figure.set_size_inches(10, 4.5)
    left, right = figure.subplots(1, 2)
    widths, steps = _values(rows, "width"), _values(rows, "step")
    for distribution, number in [*(("uniform", number) for number in steps), ("normal", max(steps))]:
        means = [_mean(pick(rows, solver=distribution, step=number, width=width)) for width in widths]
        style = {"ls": "-", "label": f"{number:,} steps"}
        if distribution == "normal":
            style = {"ls": ":", "label": f"{number:,} steps, normal p(λ)", "color": left.lines[-1].get_color()}
        left.plot(range(len(widths)), means, marker=".", **style)
    left.set_xticks(range(len(widths)), [str(width) if width else "linear" for width in widths])
    left.set(xlabel="ReLU units", ylabel="mean gap over the support", yscale="log")
    left.set_title("uniform p(λ), and normal where it says so", fontsize=10)
    for i, width in enumerate(widths):
        found = pick(rows, solver="uniform", step=max(steps), width=width)
        gaps = np.mean([r["gaps"] for r in found], axis=0)
        right.plot(found[0]["lam"], gaps, color=f"C{i}", label=f"{width} units" if width else "linear")
    right.set(xlabel="λ", ylabel="gap(λ)", yscale="log")
    right.set_title(f"uniform p(λ), {max(steps):,} steps", fontsize=10)
    right.set_ylim(top=20 * right.get_ylim()[1])
    left.legend(fontsize=8)
    right.legend(fontsize=8, ncols=4, loc="upper center")


def table(rows: list[Row]) -> str:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    widths, steps = _values(rows, "width"), _values(rows, "step")
    header = ["ReLU units", *(f"{number:,} steps" for number in steps), "largest gap", "normal p(λ)"]
    lines = []
    for width in widths:
        uniform, normal = (pick(rows, solver=d, width=width) for d in ("uniform", "normal"))
        last = pick(uniform, step=max(steps))
        line = [_shown([r["gap"] for r in pick(uniform, step=number)]) for number in steps]
        line += [_shown([r["largest"] for r in last]), _shown([r["gap"] for r in normal])]
        lines.append([str(width) if width else "0 (linear)", *line])
    best = [_mean(pick(rows, solver="uniform", width=widths[-1], step=number)) for number in (min(steps), max(steps))]
    linear = _mean(pick(rows, solver="uniform", width=0, step=max(steps)))
    return (
        f"{markdown(header, lines)}\n\nMean gap over [−{SUPPORT:g}, {SUPPORT:g}] in units of the target's variance, ± standard error over "
        f"{len(seeds(rows))} seeds; the last two columns after {max(steps):,} steps. {widths[-1]} units come {linear / best[1]:,.0f} × "
        f"closer to the minimum than the linear hypernetwork, and {best[0] / best[1]:,.0f} × closer than after {min(steps):,} steps."
    )


def _values(rows: list[Row], name: str) -> list[int]:
    return sorted({r[name] for r in rows})


def _mean(rows: list[Row]) -> float:
    return float(np.mean([r["gap"] for r in rows]))


def _shown(gaps: list[float]) -> str:
    error = f" ± {np.std(gaps, ddof=1) / np.sqrt(len(gaps)):.0e}" if len(gaps) > 1 else ""
    return f"{np.mean(gaps):.1e}{error}"
