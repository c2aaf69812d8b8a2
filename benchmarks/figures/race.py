"""What the two parts of figure 7 share: a clock, hyper-training by two recipes, random search, and how the curves are shown.

    for found in timed("random search", random_search(data.train, 10, size, seed), data, every=1, limit=30.0): ...

A solver is a generator of states. It sees training and validation images; test images are looked at here, off the clock. Seconds are
those of the processor, so that other work on the machine favours nobody.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.figures import linear
from benchmarks.figures.rows import Row, markdown, pick, row, seeds, spread
from hypertune.algorithms import ResponseOptimizer, joint
from hypertune.hypernetworks import Builder, Layout
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer

LOW, HIGH = -8.0, 2.0  # of every λ
START = -3.0  # everybody's first λ, the middle
BATCH = 250
OURS, PAPER, RANDOM = "hyper-training, ours", "hyper-training, the paper's", "random search"
ONE = "best single λ, exact"
FIRST = 0.1  # share of the run that is not judged


class Budget(NamedTuple):
    """Our hyper-training's steps, of which the others get the seconds; the steps of a training from scratch; points of a curve."""

    steps: int
    scratch_steps: int
    points: int


class State(NamedTuple):
    """Where a solver is: its steps, and the weights (D,) it would return now."""

    step: int
    w: Tensor


def timed(
    solver: str, states: Iterator[State], data: linear.Data, *, every: int, limit: float = np.inf
) -> Iterator[Row]:
    """Look at every so manieth state of a solver, until it ends or its seconds are over."""
    torch.optim.Adam([torch.zeros(1)])  # torch's first optimizer imports for seconds: off the clock
    start, off_clock = time.process_time(), 0.0
    for number, state in enumerate(states, start=1):
        now = time.process_time() - start - off_clock
        if number % every == 0:
            valid, test = (linear.mse(state.w, *part) for part in (data.valid, data.test))
            yield row(solver, seconds=now, step=state.step, valid=valid, test=test)
        if now > limit:
            return
        off_clock = time.process_time() - start - now


# --- hyper-training --------------------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """Algorithm 3 with its constants; ``steps`` is None where no step size falls."""

    builder: Builder
    layout: Layout
    n: int
    sigma: float
    lr: float
    hyper_lr: float
    steps: int | None = None
    warmup: int = 0
    every: int = 1


def ours(layout: Layout, n: int, builder: Builder, steps: int) -> Recipe:
    """The package's recipe: a tangent that shares the weights' preconditioner, a warm-up, step sizes that fall to zero."""
    return Recipe(builder, layout, n, sigma=0.5, lr=3e-4, hyper_lr=0.1, steps=steps, warmup=steps // 20, every=2)


def paper(layout: Layout, n: int, builder: Builder) -> Recipe:
    """The paper's constants: Adam 1e-4 for everything, λ ~ N(λ̂, 1e-5 I), one step each."""
    return Recipe(builder, layout, n, sigma=1e-5**0.5, lr=1e-4, hyper_lr=1e-4)


def hypertrain(recipe: Recipe, data: linear.Data, seed: int) -> Iterator[State]:
    """Algorithm 3; forever, or for the recipe's steps."""
    lam_hat = torch.full((recipe.n,), START)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hypernetwork = recipe.builder.build(linear.initial_weights(seed), lam_hat, recipe.layout)
    train, valid = linear.minibatches(data.train, BATCH, seed), linear.minibatches(data.valid, BATCH, seed)
    problem = linear.problem(train, valid, recipe.n, low=LOW, high=HIGH)
    hyper: torch.optim.Optimizer
    phi: ResponseOptimizer
    if recipe.steps is None:
        weights = torch.optim.Adam(hypernetwork.parameters(), lr=recipe.lr, fused=True)
        hyper = torch.optim.Adam([lam_hat], lr=recipe.hyper_lr)
        phi = PlainOptimizer(hypernetwork, weights)
    else:
        weights = torch.optim.Adam([hypernetwork.w0], lr=recipe.lr, fused=True)
        hyper = torch.optim.Adam([lam_hat], lr=recipe.hyper_lr, betas=(0.9, 0.99))
        phi = TangentOptimizer(hypernetwork, weights)
    run = joint(
        problem, hypernetwork, lam_hat, phi, hyper, sigma=recipe.sigma, warmup=recipe.warmup, every=recipe.every,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    for step in itertools.islice(run, recipe.steps):
        if recipe.steps is not None:
            left = 1 - step.number / recipe.steps
            weights.param_groups[0]["lr"], hyper.param_groups[0]["lr"] = recipe.lr * left, recipe.hyper_lr * left
        with torch.no_grad():
            w = hypernetwork(lam_hat[None])[0, 0]
        yield State(step.number, w)


# --- training from scratch -------------------------------------------------------------------------------------------------------


class Trainer:
    """Algorithm 1: trains at any λ from scratch, and keeps the weights that are best on the validation images."""

    def __init__(self, data: linear.Data, steps: int, seed: int):
        self.data, self.steps, self.seed = data, steps, seed
        self.best, self.state = np.inf, State(0, torch.zeros(linear.D))

    def loss(self, lam: Tensor) -> float:
        """The validation loss after training at λ (n,)."""
        train = linear.minibatches(self.data.train, BATCH, self.seed)
        w = linear.from_scratch(train, lam[None], self.steps, seed=self.seed, lr=1e-3, decay=True)[0]
        valid = float(linear.mse(w, *self.data.valid))
        self.state = State(self.state.step + self.steps, w if valid < self.best else self.state.w)
        self.best = min(self.best, valid)
        return valid


def random_search(trainer: Trainer, n: int, start: float = START) -> Iterator[State]:
    """The start, then λ uniform in the range: Algorithm 1, the best so far on the validation images."""
    generator = torch.Generator().manual_seed(trainer.seed)
    lam = torch.full((n,), start)
    while True:
        trainer.loss(lam)
        yield trainer.state
        lam = LOW + (HIGH - LOW) * torch.rand(n, generator=generator)


def best_single(data: linear.Data) -> Row:
    """The row that the paper leaves out: one λ for all weights, on a grid, solved exactly."""
    start = time.process_time()
    grid = torch.arange(LOW, HIGH + 0.01, 0.5)[:, None]
    w = linear.ridge_path(data.train, grid)
    valid = linear.mse(w, *data.valid)
    best = valid.argmin()
    seconds = time.process_time() - start
    return row(ONE, seconds=seconds, valid=valid[best], test=linear.mse(w[best], *data.test), lam=grid[best, 0])


# --- what is shown ---------------------------------------------------------------------------------------------------------------


def draw(rows: list[Row], solvers: Sequence[str], axes: Sequence[Axes]) -> None:
    """Validation and test loss against seconds, a line for each seed."""
    for axis, loss in zip(axes, ("valid", "test"), strict=True):
        for i, solver in enumerate(solvers):
            for seed in seeds(rows):
                found = pick(rows, solver=solver, seed=seed)
                axis.plot(
                    [r["seconds"] for r in found], [r[loss] for r in found], color=f"C{i}", lw=1,
                    label=solver if seed == seeds(rows)[0] else None, ds="default" if "hyper" in solver else "steps-post",
                )  # fmt: skip
        least = float(np.mean([r[loss] for r in pick(rows, solver=ONE)]))
        axis.axhline(least, color="0.4", ls=":", lw=1, label=f"{ONE} (mean)")
        axis.set(
            xlabel="processor seconds",
            ylabel=f"{'validation' if loss == 'valid' else loss} loss",
            ylim=(0.97 * least, 1.3 * least),
        )
    axes[0].legend(fontsize=7)


def lines(rows: list[Row], solvers: Sequence[str], *known: str) -> str:
    """A table of what each solver has at a tenth, a half and the end of our seconds, and of what is known exactly."""
    header = ["", *(f"validation loss at {share}" for share in ("1/10", "1/2", "the end")), "test loss at the end"]
    body = []
    for solver in solvers:
        cells = [
            spread(
                [value_at(pick(rows, solver=solver, seed=seed), share * _end(rows, seed)) for seed in seeds(rows)], 5
            )
            for share in (FIRST, 0.5, 1.0)
        ]
        body.append(
            [solver, *cells, spread([pick(rows, solver=solver, seed=seed)[-1]["test"] for seed in seeds(rows)], 5)]
        )
    for solver in (ONE, *known):
        found = pick(rows, solver=solver)
        body.append([solver, "", "", *(spread([r[loss] for r in found], 5) for loss in ("valid", "test"))])
    return markdown(header, body)


def words(rows: list[Row], rivals: Sequence[str]) -> str:
    """Whether our curve is below each rival's at every time after the first tenth; the paper's curve at the end; and the single λ."""
    margins = {rival: [_least_margin(rows, rival, seed) for seed in seeds(rows)] for rival in (*rivals, PAPER)}
    below = "; ".join(
        f"{rival} in {sum(margin > 0 for margin in some)} of {len(some)} seeds (smallest margin {min(some):.2g})"
        for rival, some in margins.items()
    )
    ends = {seed: _end(rows, seed) for seed in seeds(rows)}
    final = {
        solver: np.array([value_at(pick(rows, solver=solver, seed=seed), end) for seed, end in ends.items()])
        for solver in (*rivals, PAPER)
    }
    beaten = ", ".join(f"{rival} in {(final[PAPER] < final[rival]).sum()} of {len(ends)} seeds" for rival in rivals)
    mine, one = pick(rows, solver=OURS), pick(rows, solver=ONE)
    last = [max(pick(mine, seed=seed), key=lambda r: r["seconds"]) for seed in ends]
    gaps = [np.mean([r[loss] for r in last]) / np.mean([r[loss] for r in one]) - 1 for loss in ("valid", "test")]
    return (
        f"Our hyper-training took {np.median(list(ends.values())):.0f} processor seconds (median of {len(ends)} seeds), and the others as long. At every time "
        f"after the first tenth its validation loss is below that of {below}. It ends {gaps[0]:+.1%} from the best single λ on validation and "
        f"{gaps[1]:+.1%} on test. With the paper's constants hyper-training ends below {beaten}."
    )


def value_at(curve: list[Row], seconds: float) -> float:
    """The validation loss of the last point before a time; infinite if there is none."""
    before = [r["valid"] for r in curve if r["seconds"] <= seconds]
    return before[-1] if before else np.inf


def _end(rows: list[Row], seed: int) -> float:
    return pick(rows, solver=OURS, seed=seed)[-1]["seconds"]


def _least_margin(rows: list[Row], rival: str, seed: int) -> float:
    """Over all times after the first tenth at which one of the two curves has a point: rival's loss − ours."""
    mine, other, end = pick(rows, solver=OURS, seed=seed), pick(rows, solver=rival, seed=seed), _end(rows, seed)
    times = [r["seconds"] for r in mine + other if FIRST * end <= r["seconds"] <= end]
    return min(value_at(other, t) - loss if (loss := value_at(mine, t)) < np.inf else -np.inf for t in times)
