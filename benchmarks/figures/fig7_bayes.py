"""Figure 7, right: 10 hyperparameters, hyper-training against Bayesian optimisation and random search.

The paper tunes one weight decay for each class of the linear model (in an appendix, on a scale that is 50 × the squared error − 1.384, see
``fig7_random.py``): hyper-training reaches .487 on validation and .554 on test, which are squared errors of .0374 and .0388, and Bayesian
optimisation .593 and .656, which are .0395 and .0408.

====================================  ===================  ====================================================================
constant                              value                from
====================================  ===================  ====================================================================
hyperparameters                       10, one per class    paper
loss                                  squared error        paper
weight decay                          Σ e^λ_c ‖w_c‖² / 10  ours (released code: the norm, not its square)
range of λ                            [−8, 2]              ours; everybody starts in the middle
training and validation minibatch     250                  ours (paper: up to 1,000)
a training from scratch               1,000 steps          paper
its Adam's step size                  1e-3, to 0           ours (paper: 1e-4, at which 1,000 steps stop early)
the paper's hypernetwork              linear               paper (86,350 parameters)
its p(λ | λ̂), all its step sizes      N(λ̂, 1e-5), 1e-4     paper
our hypernetwork                      linear, local        ours: a class's weights move with its own λ (15,700 parameters)
its p(λ | λ̂), step size of w          N(λ̂, 0.5²), 3e-4     ours; the step size falls to zero
its step size of λ̂                    0.1, to 0            ours; λ̂ waits for a twentieth of the steps, and moves every other one
GPSampler, TPESampler                 Optuna's defaults    ours (the paper names no package)
sklearn GP, expected improvement      Matérn 5/2, ARD      ours: ``gaussian.py``; 10 random λ first, 4,096 candidates
====================================  ===================  ====================================================================

Deviations
----------
1. The budget is a number of steps of our hyper-training; everybody else has its seconds, and may finish the training that it is in.
2. Hyper-training's curve is the loss of w_φ(λ̂) as it is then; that of the others is their best so far.
3. Our step size of w is 3e-4. At 1e-3 it is stable for w alone and for 7,850 λ, but the tangent of 10 λ is noisy (before its
   steps were bounded it diverged): all weights of a class move together along the sharpest direction of the loss, which the preconditioner that w shares with it does not feel.

Command: ``python -m benchmarks fig7-bayes --budget full --seeds 3 --mnist DIR``, 4 minutes of processor time a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from scipy.stats import norm

from benchmarks.figures import linear, race
from benchmarks.figures.gaussian import fair_gp
from benchmarks.figures.race import HIGH, LOW, START, State, Trainer
from benchmarks.figures.rows import Row, row
from hypertune.hypernetworks import Layout, Linear

TITLE = "10 weight decays of a linear model, hyper-training against Bayesian optimisation: losses against seconds"
BUDGETS = {
    "smoke": race.Budget(steps=100, scratch_steps=20, points=20),
    "full": race.Budget(steps=12_000, scratch_steps=1_000, points=100),
}
n = linear.CLASSES
STARTUP, CANDIDATES = 10, 4_096  # of the sklearn GP; Optuna's GPSampler begins with 10 random λ, too
EXACT = "exact optimum"


def gp_sampler(trainer: Trainer) -> Iterator[State]:
    """Optuna's Gaussian process."""
    return _optuna(trainer, optuna.samplers.GPSampler(seed=trainer.seed))


def tpe(trainer: Trainer) -> Iterator[State]:
    """Optuna's tree-structured Parzen estimator."""
    return _optuna(trainer, optuna.samplers.TPESampler(seed=trainer.seed))


def expected_improvement(trainer: Trainer) -> Iterator[State]:
    """The fair GP of figure 6, and the largest expected improvement among random candidates, half of them around the best λ."""
    rng = np.random.default_rng(trainer.seed)
    lam, losses = np.full((1, n), START), np.empty(0)
    while True:
        losses = np.append(losses, trainer.loss(torch.from_numpy(lam[-1]).float()))
        yield trainer.state
        anywhere = rng.uniform(LOW, HIGH, (CANDIDATES // 2, n))
        if len(losses) < STARTUP:
            following = anywhere[0]
        else:
            near = lam[losses.argmin()] + 0.1 * (HIGH - LOW) * rng.standard_normal((CANDIDATES // 2, n))
            candidates = np.concatenate([anywhere, near.clip(LOW, HIGH)])
            mean, sd = fair_gp(lam, losses, trainer.seed, width=HIGH - LOW, restarts=1).predict(
                candidates, return_std=True
            )
            gain = losses.min() - mean
            following = candidates[(gain * norm.cdf(gain / sd) + sd * norm.pdf(gain / sd)).argmax()]
        lam = np.vstack([lam, following])


def _optuna(trainer: Trainer, sampler: optuna.samplers.BaseSampler) -> Iterator[State]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, names = optuna.create_study(sampler=sampler), [f"class {c}" for c in range(n)]
    study.enqueue_trial(dict.fromkeys(names, START))
    while True:
        trial = study.ask()
        study.tell(trial, trainer.loss(torch.tensor([trial.suggest_float(name, LOW, HIGH) for name in names])))
        yield trainer.state


SEARCHES: dict[str, Callable[[Trainer], Iterator[State]]] = {
    "Optuna GPSampler": gp_sampler,
    "sklearn GP, expected improvement": expected_improvement,
    "Optuna TPE": tpe,
    race.RANDOM: lambda trainer: race.random_search(trainer, n),
}
SOLVERS = (race.OURS, race.PAPER, *SEARCHES)


def cells(seed: int, budget: str, directory: str | None) -> Iterator[Row]:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    size, data = BUDGETS[budget], linear.load(directory)
    every = size.steps // size.points
    yield race.best_single(data)
    yield _exact(data)
    local = Layout(linear.layout().units, local=[linear.layout().units])
    mine = race.hypertrain(race.ours(local, n, Linear(), size.steps), data, seed)
    for found in race.timed(race.OURS, mine, data, every=every):
        yield found
        limit = found["seconds"]
    paper = race.hypertrain(race.paper(linear.layout(), n, Linear()), data, seed)
    yield from race.timed(race.PAPER, paper, data, every=every, limit=limit)
    for solver, search in SEARCHES.items():
        states = search(Trainer(data, size.scratch_steps, seed))
        yield from race.timed(solver, states, data, every=1, limit=limit)


def _exact(data: linear.Data) -> Row:
    """The best of a grid for each class."""
    grid = torch.arange(LOW, HIGH + 0.01, 0.1)[:, None]
    w = linear.ridge_path(data.train, grid)
    best = linear.best_of_each_class(w, data.valid)
    chosen = linear.joined(w, best)
    valid, test = (linear.mse(chosen, *part) for part in (data.valid, data.test))
    return row(EXACT, valid=valid, test=test, lam=grid[best, 0])


def plot(rows: list[Row], figure: Figure) -> None:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    figure.set_size_inches(11, 4)
    race.draw(rows, SOLVERS, figure.subplots(1, 2))


def table(rows: list[Row]) -> str:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    return f"{race.lines(rows, SOLVERS, EXACT)}\n\n{race.words(rows, SOLVERS[2:])}"
