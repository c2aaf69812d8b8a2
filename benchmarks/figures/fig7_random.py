"""Figure 7, left: 7,850 hyperparameters, hyper-training against random search.

The paper tunes one weight decay for each weight of the linear model, which leaves random search as the only black box to compare with. It
reports .543 on validation and .606 on test for hyper-training against .616 and .684. These are a Gaussian log-likelihood of standard
deviation 0.1, which the released code minimises: 50 × the squared error − 1.384. So they are squared errors of .0385 and .0398 against
.0400 and .0414.

====================================  ===================  ====================================================================
constant                              value                from
====================================  ===================  ====================================================================
hyperparameters                       7,850                paper
loss                                  squared error        paper
weight decay                          Σ e^λ_d w_d² / 10    ours (paper: "an L2 weight decay weighted by exp(λ)")
range of λ                            [−8, 2]              ours; everybody starts in the middle
training and validation minibatch     250                  ours (paper: up to 1,000)
random search: a training             1,000 steps          paper
its Adam's step size                  1e-3, to 0           ours (paper: 1e-4, at which 1,000 steps stop early)
the paper's hypernetwork              rank 10              paper (164,860 parameters)
its p(λ | λ̂), all its step sizes      N(λ̂, 1e-5), 1e-4     paper
our hypernetwork                      linear, local        ours: a weight moves with its own λ (15,700 parameters)
its p(λ | λ̂), step size of w          N(λ̂, 0.5²), 3e-4     ours; the step size falls to zero
its step size of λ̂                    0.1, to 0            ours; λ̂ waits for a twentieth of the steps, and moves every other one
====================================  ===================  ====================================================================

Deviations
----------
1. The budget is a number of steps of our hyper-training; everybody else has its seconds.
2. Hyper-training's curve is the loss of w_φ(λ̂) as it is then; that of random search is its best so far.
3. Our step size of w is that of ``fig7_bayes.py``; for 7,850 λ one of 1e-3 does as well.

Command: ``python -m benchmarks fig7-random --budget full --seeds 3 --mnist DIR``, 2 minutes of processor time a seed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from matplotlib.figure import Figure

from benchmarks.figures import linear, race
from benchmarks.figures.rows import Row
from hypertune.hypernetworks import Layout, Linear, LowRank

TITLE = "7,850 weight decays of a linear model, hyper-training against random search: losses against seconds"
BUDGETS = {
    "smoke": race.Budget(steps=100, scratch_steps=20, points=20),
    "full": race.Budget(steps=12_000, scratch_steps=1_000, points=100),
}
SOLVERS = (race.OURS, race.PAPER, race.RANDOM)
n = linear.D


def cells(seed: int, budget: str, directory: str | None) -> Iterator[Row]:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    size, data = BUDGETS[budget], linear.load(directory)
    every = size.steps // size.points
    yield race.best_single(data)
    local = Layout(linear.layout().units, local=[torch.arange(n)])
    mine = race.hypertrain(race.ours(local, n, Linear(), size.steps), data, seed)
    for found in race.timed(race.OURS, mine, data, every=every):
        yield found
        limit = found["seconds"]
    paper = race.hypertrain(race.paper(linear.layout(), n, LowRank(10)), data, seed)
    yield from race.timed(race.PAPER, paper, data, every=every, limit=limit)
    random = race.random_search(race.Trainer(data, size.scratch_steps, seed), n)
    yield from race.timed(race.RANDOM, random, data, every=1, limit=limit)


def plot(rows: list[Row], figure: Figure) -> None:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    figure.set_size_inches(11, 4)
    race.draw(rows, SOLVERS, figure.subplots(1, 2))


def table(rows: list[Row]) -> str:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    return f"{race.lines(rows, SOLVERS)}\n\n{race.words(rows, SOLVERS[2:])}"
