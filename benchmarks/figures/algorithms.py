"""Algorithms 1 to 4 on one problem: validation loss against seconds.

The paper prints the four algorithms side by side; it does not race them. The problem here is one whose answer is known: the linear model
on 1,000 MNIST images with one weight decay for each class. A class's loss depends on its own weight decay alone, so that the best of all is
found class by class on a grid, exactly.

====================================  ===================  ====================================================================
constant                              value                from
====================================  ===================  ====================================================================
training images                       1,000                ours
hyperparameters                       10, one per class    paper (appendix)
loss                                  squared error        paper
range of λ                            [−8, 2]              ours
λ at the start                        −7                   ours: little regularisation, as in the released code
Algorithm 1                           random search        ours; uniform in the range, trained from scratch for 1,000 steps
Algorithm 2: hypernetwork             50 ReLU units        paper
Algorithm 2: p(λ)                     uniform, 8 draws     ours
Algorithms 3, 4: hypernetwork         linear               paper
Algorithm 3: p(λ | λ̂)                 N(λ̂, 1)              ours (paper: variance 1e-5)
steps that λ̂ waits                    1/3                  ours; Algorithm 4: 1/10; Algorithm 2: 5/6, in which φ is fitted
optimizer of the response             tangent              ours, the package's default; Algorithm 4: Adam, as in the paper
step size of the weights              Adam 1e-3, to 0      ours (paper: 1e-4)
step size of λ̂                        Adam 0.05, to 0      ours; Algorithm 4: 0.01, as in the released code
training and validation minibatch     250; 1,000           ours; paper ("up to 1,000 data points")
====================================  ===================  ====================================================================

Deviations
----------
1. All four start from the same λ; Algorithms 2 to 4 make the same number of steps, and Algorithm 1 is given the seconds of the slowest of
   them.
2. Algorithm 4 waits too. Without that λ̂ hardly moves: the hypergradients of the first steps are so large that Adam's second moment remembers
   them for the rest of the run.
3. The settings were chosen on the validation loss of seed 0.

Command: ``python -m benchmarks algorithms --budget full --seeds 3 --mnist DIR``, 12 minutes on one thread of a busy machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.figures import linear, race
from benchmarks.figures.race import HIGH, LOW, ONE, State, Trainer
from benchmarks.figures.rows import Row, markdown, pick, row, seeds, spread
from hypertune.algorithms import (
    Problem,
    ResponseOptimizer,
    Step,
    descend_response,
    fit_response,
    joint,
    simplified,
)
from hypertune.hypernetworks import Builder, Hypernetwork, Linear, ReluMLP
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer

TITLE = "Algorithms 1 to 4 on one problem, 10 weight decays of a linear model: validation loss against seconds"


class Budget(NamedTuple):
    """Sizes of a run."""

    images: int
    evaluated: int
    steps: int
    scratch_steps: int
    points: int


BUDGETS = {
    "smoke": Budget(images=100, evaluated=100, steps=60, scratch_steps=20, points=5),
    "full": Budget(images=1_000, evaluated=10_000, steps=3_000, scratch_steps=1_000, points=60),
}
n = linear.CLASSES
START = -7.0
LR = 1e-3

EXACT = "exact optimum"


class Setting(NamedTuple):
    """What differs between the algorithms that train a hypernetwork; the centre None is λ̂, ``warmup`` a share of the steps."""

    builder: Builder
    center: float | None
    hyper_lr: float
    warmup: float


ALGORITHMS = {
    "Algorithm 2": Setting(ReluMLP(50), (LOW + HIGH) / 2, hyper_lr=0.05, warmup=5 / 6),
    "Algorithm 3": Setting(Linear(), None, hyper_lr=0.05, warmup=1 / 3),
    "Algorithm 4": Setting(Linear(), 0.0, hyper_lr=0.01, warmup=1 / 10),
}


def cells(seed: int, budget: str, directory: str | None) -> Iterator[Row]:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    size = BUDGETS[budget]
    data = linear.load(directory, (size.images, size.evaluated, size.evaluated), seed=seed)
    yield from _exact(data)
    seconds = 0.0
    for name in ALGORITHMS:
        lam_hat = torch.full((n,), START)
        states = _hypertrain(name, lam_hat, data, size.steps, seed)
        for found in race.timed(name, states, data, every=size.steps // size.points):
            yield found
            seconds = max(seconds, found["seconds"])
        yield row(_end(name), step=size.steps, lam=lam_hat)
    search = race.random_search(Trainer(data, size.scratch_steps, seed), n, START)
    yield from race.timed("Algorithm 1", search, data, every=1, limit=seconds)


def _end(name: str) -> str:
    return f"λ̂ of {name}"


def _exact(data: linear.Data) -> Iterator[Row]:
    """The best λ on a grid for all classes together, and for each class."""
    grid = torch.arange(LOW, HIGH + 0.01, 0.05)[:, None]
    w = linear.ridge_path(data.train, grid)
    one = linear.mse(w, *data.valid).argmin().repeat(n)
    for solver, best in ((ONE, one), (EXACT, linear.best_of_each_class(w, data.valid))):
        chosen = linear.joined(w, best)
        valid, test = (linear.mse(chosen, *part) for part in (data.valid, data.test))
        yield row(solver, valid=valid, test=test, lam=grid[best, 0])


# --- the algorithms ------------------------------------------------------------------------------------------------------------


def _hypertrain(name: str, lam_hat: Tensor, data: linear.Data, steps: int, seed: int) -> Iterator[State]:
    """Algorithms 2, 3 and 4, for the same number of steps; λ̂ is moved in place."""
    setting = ALGORITHMS[name]
    center = lam_hat if setting.center is None else torch.full((n,), setting.center)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hypernetwork = setting.builder.build(linear.initial_weights(seed), center, linear.layout())
    warmup = round(setting.warmup * steps)
    fitting = warmup if name == "Algorithm 2" else steps
    phi, optimizers = _optimizers(name, hypernetwork)
    hyper = torch.optim.Adam([lam_hat], lr=setting.hyper_lr)
    train = [_to_zero(optimizer, fitting) for optimizer in optimizers]
    valid = [_to_zero(hyper, steps - warmup)]
    batches = linear.minibatches(data.train, race.BATCH, seed), linear.minibatches(data.valid, 1_000, seed)
    problem = linear.problem(*batches, n, low=LOW, high=HIGH)
    generator = torch.Generator().manual_seed(seed)
    for step in itertools.islice(_run(name, problem, hypernetwork, lam_hat, phi, hyper, warmup, generator), steps):
        for schedule in (train if step.train_loss is not None else []) + (valid if step.valid_loss is not None else []):
            schedule.step()
        with torch.no_grad():
            w = hypernetwork(lam_hat[None])[0, 0]
        yield State(step.number, w)


def _run(
    name: str,
    problem: Problem,
    hypernetwork: Hypernetwork,
    lam_hat: Tensor,
    phi: ResponseOptimizer,
    hyper: torch.optim.Optimizer,
    warmup: int,
    generator: torch.Generator,
) -> Iterator[Step]:
    if name == "Algorithm 3":
        return joint(problem, hypernetwork, lam_hat, phi, hyper, sigma=1.0, warmup=warmup, generator=generator)
    if name == "Algorithm 4":
        return simplified(problem, hypernetwork, lam_hat, phi, hyper, warmup=warmup)

    def sample(m: int) -> Tensor:
        return LOW + (HIGH - LOW) * torch.rand(m, n, generator=generator)

    fit = fit_response(problem, hypernetwork, phi, sample, lam_hat, m=8)
    descent = descend_response(problem, hypernetwork, lam_hat, hyper)
    both = itertools.chain(itertools.islice(fit, warmup), descent)
    return (replace(step, number=number) for number, step in enumerate(both, start=1))


def _optimizers(name: str, hypernetwork: Hypernetwork) -> tuple[ResponseOptimizer, list[torch.optim.Optimizer]]:
    """φ's optimizer, and those torch optimizers in it whose step size falls to zero."""
    if name == "Algorithm 4":
        everything = torch.optim.Adam(hypernetwork.parameters(), lr=LR, fused=True)
        return PlainOptimizer(hypernetwork, everything), [everything]
    weights, basis = torch.optim.Adam([hypernetwork.w0], lr=LR, fused=True), list(hypernetwork.basis.parameters())
    own = torch.optim.Adam(basis, lr=LR, fused=True) if basis else None
    return TangentOptimizer(hypernetwork, weights, own), [weights] if own is None else [weights, own]


def _to_zero(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)


# --- what is shown -----------------------------------------------------------------------------------------------------------


def plot(rows: list[Row], figure: Figure) -> None:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    figure.set_size_inches(8, 5)
    axis = figure.subplots()
    for i, solver in enumerate(("Algorithm 1", *ALGORITHMS)):
        for seed in seeds(rows):
            found = pick(rows, seed=seed, solver=solver)
            label = solver if seed == seeds(rows)[0] else None
            style = "steps-post" if solver == "Algorithm 1" else "default"
            axis.plot(
                [r["seconds"] for r in found], [r["valid"] for r in found], color=f"C{i}", lw=1, label=label, ds=style
            )
    for solver, style in ((ONE, ":"), (EXACT, "--")):
        axis.axhline(_mean(pick(rows, solver=solver)), color="0.4", ls=style, label=f"{solver} (mean)")
    optimum = _mean(pick(rows, solver=EXACT))
    axis.set(xlabel="seconds", ylabel="validation loss", ylim=(0.97 * optimum, 1.25 * optimum))
    axis.legend(fontsize=8)


def table(rows: list[Row]) -> str:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    header = ["", "validation loss", "test loss", "above the exact optimum", "seconds", "seconds to within 1% of it"]
    optima = {r["seed"]: r["valid"] for r in pick(rows, solver=EXACT)}
    lines = []
    for solver in ("Algorithm 1", *ALGORITHMS, ONE, EXACT):
        runs = [pick(rows, seed=seed, solver=solver) for seed in seeds(rows)]
        last = [run[-1] for run in runs]
        gaps = [r["valid"] / optima[r["seed"]] - 1 for r in last]
        losses = [spread([r[loss] for r in last], 5) for loss in ("valid", "test")]
        clock = ["", ""]
        if solver not in (ONE, EXACT):
            near = [[r["seconds"] for r in run if r["valid"] < 1.01 * optima[r["seed"]]] for run in runs]
            reached = [seconds[0] for seconds in near if seconds]
            first = f"{np.median(reached):.1f} ({len(reached)} of {len(runs)} seeds)" if reached else "never"
            clock = [f"{np.median([r['seconds'] for r in last]):.1f}", first]
        lines.append([solver, *losses, f"{np.mean(gaps):.2%}", *clock])
    ends = [r["lam"] for r in pick(rows, solver=_end("Algorithm 4"))]
    return (
        f"{markdown(header, lines)}\n\nAfter the last step, of {len(seeds(rows))} seeds; seconds are medians. The ten λ̂ of Algorithm 4 are at "
        f"most {max(np.ptp(lam) for lam in ends):.2f} apart: they move together, so that all the hypernetwork ever sees is one λ."
    )


def _mean(rows: list[Row]) -> float:
    return float(np.mean([r["valid"] for r in rows]))
