"""Figure 5, top: 7,850 hyperparameters, hyper-training against unrolled optimisation.

One L2 for each weight of the linear model, tuned on 10,000 validation images. In the paper the hypernetwork falls to a plateau
(validation .0391, test .0403) within 200 s; unrolled optimisation passes it on validation after 400 s, and reaches .0383 and .0401
after 1,000 s. The rows that the paper left out are the exact optimum of *one* λ for all weights, and the exact bilevel optimum.

====================================  =======================  ================================================================
constant                              value                    from
====================================  =======================  ================================================================
data, loss, penalty                   see linear.py            paper
minibatch                             1,000 images             paper ("up to 1,000 data points"), all solvers but *newton*
λ at the start                        0, all of them           ours (the paper does not say)
hypernetwork of "low rank"            10 units                 paper (164,860 parameters)
p(λ | λ̂), samples in a minibatch      N(λ̂, 1e-5), 2            paper
Adam of "low rank": φ and λ̂           1e-4, 1e-2               paper (φ); ours (λ̂: with 1e-4 it moves by 0.3 in the whole run)
"unrolled"                            100 steps from the last  ours (the paper does not say): SGD, 0.1, momentum 0.9
                                      weights
"unrolled, anew"                      200 steps from the       ours, the same steps, as Maclaurin et al. (2015) do it. At the best λ 100
                                      initial weights          steps from there do not get to .0385, and 500 take longer to it
Adam of λ̂, both                       0.3                      ours; with 0.1 they need over twice the seconds (one seed)
"default"                             what algorithm="auto"    ours: implicit, one product a step, λ̂ at every fourth step;
                                      chooses                  Adam 1e-2, cosine; λ̂ 0.2, falling to 0
"newton"                              20 products, 60 steps    ours: ``Implicit(solver="cg", inner="newton")`` on all rows through
                                                               XᵀX, which the squared error allows; its cost is on the clock
====================================  =======================  ================================================================

Deviations
----------
1. The paper does not publish this experiment's code, nor the loss at which λ starts.
2. Seconds are those of this machine; the paper's are of another.
3. "exact, one λ" and "exact, 7,850" use float64 solves; the second is 60 Adam steps on the exact implicit gradient.
4. None of them has a prior on λ (``grain_scale=None``), as in the paper: the figure is about the optimisation. "newton, prior chosen" is
   *newton* with a prior around the mean of λ, whose scale is chosen as ``grain_scale="auto"`` does, on halves of the validation images.

Command: ``python -m benchmarks fig5-unrolled --budget full --seeds 3 --mnist DIR``, about 2 minutes a seed on one thread.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from benchmarks.figures import linear
from benchmarks.figures.rows import Row, markdown, pick, row, seeds, spread
from hypertune.algorithms import Problem, Step, descend_w, joint
from hypertune.hypergradients import Implicit, alternate
from hypertune.hypernetworks import Constant, Hypernetwork, LowRank
from hypertune.hyperprior import SCALES, vertex
from hypertune.implicit import ImplicitAdjoint
from hypertune.losses import nats_per_unit, squared_error
from hypertune.response_optimizers import PlainOptimizer, TangentOptimizer
from hypertune.unrolled import Recorder

TITLE = "7,850 hyperparameters: hyper-training against unrolled optimisation, one exact λ and the exact bilevel optimum"


class Budget(NamedTuple):
    """Sizes of a run; of unrolled optimisation training steps for each hypergradient, and how many of these."""

    images: int | None
    low_rank_steps: int
    default_steps: int
    newton_steps: int
    unrolled: tuple[int, int]
    anew: tuple[int, int]
    exact_steps: int


BUDGETS = {
    "smoke": Budget(300, 40, 40, 4, (5, 3), (5, 3), 2),
    "full": Budget(None, 4_000, 2_000, 60, (100, 60), (200, 30), 60),
}
START, LOW, HIGH = 0.0, -18.0, 5.0
BATCH = 1_000
LOW_RANK, DEFAULT, NEWTON, PRIOR = "low rank", "default", "newton", "newton, prior chosen"
UNROLLED, ANEW = "unrolled", "unrolled, anew"
ONE, EXACT = "exact, one λ", "exact, 7,850 λ"
_POINTS = 60  # of each curve


def cells(seed: int, budget: str, directory: str | None) -> Iterator[Row]:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    size = BUDGETS[budget]
    data = linear.load(directory, (size.images,) * 3)
    yield from _low_rank(data, size.low_rank_steps, seed)
    yield from _default(data, size.default_steps, seed)
    yield from _newton(NEWTON, data, size.newton_steps, seed)
    yield from _prior_chosen(data, size.newton_steps, seed)
    yield from _unrolled(UNROLLED, data, *size.unrolled, seed)
    yield from _unrolled(ANEW, data, *size.anew, seed)
    if seed == 0:  # there is nothing random in it
        yield from _exact(data, size.exact_steps)


# --- the solvers -------------------------------------------------------------------------------------------------------------


def _low_rank(data: linear.Data, steps: int, seed: int) -> Iterator[Row]:
    lam_hat = torch.full((linear.D,), START)
    torch.manual_seed(seed)
    phi = LowRank().build(linear.initial_weights(seed), lam_hat.clone(), linear.layout())
    optimizer = PlainOptimizer(phi, torch.optim.Adam(phi.parameters(), lr=1e-4, fused=True))
    run = joint(
        _minibatched(data, seed), phi, lam_hat, optimizer, torch.optim.Adam([lam_hat], lr=1e-2),
        sigma=math.sqrt(1e-5), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return _timed(LOW_RANK, run, steps, phi, lam_hat, data)


def _default(data: linear.Data, steps: int, seed: int) -> Iterator[Row]:
    lam_hat = torch.full((linear.D,), START)
    phi = Constant().build(linear.initial_weights(seed), lam_hat, linear.layout())
    weights = torch.optim.Adam([phi.w0], lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(weights, steps)
    problem, description, optimizer = _minibatched(data, seed), Implicit(), TangentOptimizer(phi, weights)
    adjoint = ImplicitAdjoint(description, torch.ones(linear.D, dtype=torch.bool), phi, weights)
    lam_optimizer = torch.optim.Adam([lam_hat], lr=0.05 * description.every, betas=(0.9, 0.99), eps=1e-2)
    first = steps // 3
    decay = torch.optim.lr_scheduler.LinearLR(lam_optimizer, 1.0, 0.0, (steps - first) // description.every)
    run = alternate(
        problem, phi, lam_hat, lambda: descend_w(problem, phi, optimizer, lam_hat), lam_optimizer,
        adjoint=adjoint, warmup=first, every=description.every,
    )  # fmt: skip
    scheduled = _scheduled(run, lam_hat, lam_optimizer, decay, schedule)
    return _timed(DEFAULT, scheduled, steps, phi, lam_hat, data)


def _scheduled(
    run: Iterator[Step],
    lam_hat: Tensor,
    lam_optimizer: torch.optim.Optimizer,
    decay: LRScheduler,
    schedule: LRScheduler | None = None,
    *,
    scale: float | None = None,
    rows: int = 1,
) -> Iterator[Step]:
    """The steps of λ̂ as a search has them: slopes in nats, with those of a prior of this ``scale``, of all values together."""
    unit = torch.ones(())

    def prepare(*_: object) -> None:
        assert lam_hat.grad is not None
        lam_hat.grad.mul_(unit)
        if scale is not None:
            lam_hat.grad.add_((lam_hat - lam_hat.mean()) / (scale**2 * rows))
        lam_hat.grad.mul_(linear.D)

    lam_optimizer.register_step_pre_hook(prepare)
    for step in run:
        if schedule is not None:
            schedule.step()
        if step.valid_loss is not None:
            decay.step()
            unit.copy_(nats_per_unit(squared_error, step.valid_loss, linear.CLASSES))
        yield step


def _prior_chosen(data: linear.Data, steps: int, seed: int) -> Iterator[Row]:
    """Tuned on one half of the validation images and compared on the other, then tuned on all of them."""
    start = time.perf_counter()
    half = len(data.valid.x) // 2
    one, other = (linear.Rows(data.valid.x[rows], data.valid.y[rows]) for rows in (slice(half), slice(half, None)))
    losses = [list(_newton(PRIOR, data._replace(valid=one, test=other), steps, seed, s))[-1]["test"] for s in SCALES]
    scale = math.exp(vertex(np.log(SCALES), np.array(losses)))
    for found in _newton(PRIOR, data, steps, seed, scale, time.perf_counter() - start):
        yield found | {"scale": round(scale, 3)}


def _newton(
    solver: str, data: linear.Data, steps: int, seed: int, scale: float | None = None, before: float = 0.0
) -> Iterator[Row]:
    """``scale`` is that of the prior on λ, ``before`` the seconds that choosing it took."""
    start = time.perf_counter() - before
    lam_hat = torch.full((linear.D,), START)
    phi = Constant().build(linear.initial_weights(seed), lam_hat, linear.layout())
    weights = torch.optim.SGD([phi.w0], lr=1.0)
    description = Implicit(solver="cg", iterations=20, horizon=math.inf, tolerance=0.1, inner="newton", every=1)
    train, valid = (_through_moments(rows) for rows in (data.train, data.valid))
    nothing = itertools.repeat(None)
    problem = Problem(
        train_loss=lambda w, lam, _: train(w) + linear.l2(w, lam),
        valid_loss=lambda w, _: valid(w),
        train_batches=nothing,
        valid_batches=nothing,
        low=torch.full((linear.D,), LOW),
        high=torch.full((linear.D,), HIGH),
    )
    torch.manual_seed(seed)
    adjoint = ImplicitAdjoint(description, torch.ones(linear.D, dtype=torch.bool), phi, weights)
    lam_optimizer = torch.optim.Adam([lam_hat], lr=0.5, betas=(0.9, 0.99), eps=1e-12)
    decay = torch.optim.lr_scheduler.LinearLR(lam_optimizer, 1.0, 0.0, steps)

    newton = alternate(problem, phi, lam_hat, lambda: adjoint.newton(problem, lam_hat), lam_optimizer, adjoint=adjoint)
    scheduled = _scheduled(newton, lam_hat, lam_optimizer, decay, scale=scale, rows=len(data.valid.x))
    return _timed(solver, scheduled, steps, phi, lam_hat, data, time.perf_counter() - start)


def _unrolled(solver: str, data: linear.Data, unrolled: int, moves: int, seed: int) -> Iterator[Row]:
    """Every hypergradient trains on from the last weights, or anew from the initial ones, and differentiates all of that."""
    lam_hat, w0 = torch.full((linear.D,), START), linear.initial_weights(seed)
    phi = Constant().build(w0.clone(), lam_hat, linear.layout())
    weights = torch.optim.SGD([phi.w0], lr=0.1, momentum=0.9)
    recorder = Recorder(phi, TangentOptimizer(phi, weights), unrolled)
    problem, optimizer, number = _minibatched(data, seed), torch.optim.Adam([lam_hat], lr=0.3), itertools.count()

    def train() -> Tensor:
        if solver == ANEW and next(number) % unrolled == 0:
            phi.w0.data.copy_(w0)
            weights.state.clear()
        return recorder.step(problem, lam_hat)

    run = alternate(problem, phi, lam_hat, train, optimizer, unroll=recorder, every=unrolled)
    return _timed(solver, run, unrolled * moves, phi, lam_hat, data, ends=unrolled)


def _exact(data: linear.Data, steps: int) -> Iterator[Row]:
    grid = torch.linspace(-12, -2, 41, dtype=torch.float64)[:, None]
    w = linear.ridge_path(data.train, grid)
    best = int(linear.mse(w.float(), *data.valid).argmin())
    yield _row(ONE, w[best].float(), data, lam=float(grid[best]))
    lam, moments = torch.full((linear.D,), float(grid[best]), dtype=torch.float64), linear.moments_of(data.train)
    lam.requires_grad_()
    optimizer = torch.optim.Adam([lam], lr=0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        w, lam.grad = _exact_hypergradient(lam.detach(), moments, linear.moments_of(data.valid))
        optimizer.step()
        schedule.step()
        lam.data.clamp_(LOW, HIGH)
    w, _ = _exact_hypergradient(lam.detach(), moments, linear.moments_of(data.valid))
    yield _row(EXACT, w.float(), data)


def _exact_hypergradient(
    lam: Tensor, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """w* (D,) and −q ∘ ∂²L_Train/∂w∂λ (D,), class by class."""
    W, slopes = [], []
    for c, decay in enumerate(lam.exp().view(linear.CLASSES, -1)):
        factor = torch.linalg.cholesky(train[0] + decay.diag())
        w = torch.cholesky_solve(train[1][:, c : c + 1], factor)
        q = torch.cholesky_solve(valid[0] @ w - valid[1][:, c : c + 1], factor)
        W.append(w[:, 0])
        slopes.append(-0.2 * (q * w)[:, 0] * decay)
    return torch.cat(W), torch.cat(slopes)


# --- their parts ---------------------------------------------------------------------------------------------------------------


def _minibatched(data: linear.Data, seed: int) -> Problem:
    return linear.problem(
        linear.minibatches(data.train, BATCH, seed), linear.minibatches(data.valid, BATCH, seed + 1),
        n=linear.D, low=LOW, high=HIGH,
    )  # fmt: skip


def _through_moments(rows: linear.Rows) -> Callable[[Tensor], Tensor]:
    """The squared error of all rows by XᵀX and XᵀY, w (K, m, D) → (K, m)."""
    gram, moments = rows.x.T @ rows.x / len(rows.x), (rows.x.T @ rows.y / len(rows.x)).T
    squares = rows.y.square().sum(dim=1).mean()

    def loss(w: Tensor) -> Tensor:
        W = w.view(*w.shape[:-1], linear.CLASSES, linear.INPUTS)
        return ((W @ gram * W - 2 * W * moments).sum(dim=(-2, -1)) + squares) / linear.CLASSES

    return loss


def _timed(
    solver: str,
    run: Iterator[Step],
    steps: int,
    phi: Hypernetwork,
    lam_hat: Tensor,
    data: linear.Data,
    before: float = 0.0,
    ends: int = 1,
) -> Iterator[Row]:
    """A row now and then (after a multiple of ``ends``), with the losses of the weights at λ̂; looking at them is off the clock."""
    shown = {max(1, round(steps // ends * (i + 1) / _POINTS)) * ends for i in range(_POINTS)}
    seconds, start = before, time.perf_counter()
    for step in itertools.islice(run, steps):
        if step.number in shown:
            seconds += time.perf_counter() - start  # the clock
            with torch.no_grad():
                w = phi(lam_hat[None])[0, 0]
            yield _row(solver, w, data, seconds=seconds, step=step.number)
            start = time.perf_counter()


def _row(solver: str, w: Tensor, data: linear.Data, **more: Any) -> Row:
    with torch.no_grad():
        return row(solver, valid=linear.mse(w, *data.valid), test=linear.mse(w, *data.test), **more)


# --- what is shown -----------------------------------------------------------------------------------------------------------

CURVES = {UNROLLED: "C0", ANEW: "C5", LOW_RANK: "C1", DEFAULT: "C3", NEWTON: "C4", PRIOR: "C2"}


def plot(rows: list[Row], figure: Figure) -> None:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    figure.set_size_inches(11, 5)
    for axis, loss in zip(figure.subplots(1, 2), ("valid", "test"), strict=True):
        for solver, color in CURVES.items():
            for seed in seeds(rows):
                found = pick(rows, solver=solver, seed=seed)
                label = solver if seed == seeds(rows)[0] else None
                axis.plot([r["seconds"] for r in found], [r[loss] for r in found], color=color, lw=1, label=label)
        for solver, style in ((ONE, ":"), (EXACT, "--")):
            axis.axhline(pick(rows, solver=solver)[0][loss], color="k", lw=1, ls=style, label=solver)
        low = min(r[loss] for r in rows)
        axis.set(
            xscale="log", xlabel="seconds", ylabel=f"{loss} loss (mean squared error)", ylim=(low - 3e-4, low + 8e-3)
        )
    figure.axes[0].legend(fontsize=8)


def table(rows: list[Row]) -> str:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    lines = []
    for solver in (*CURVES, ONE, EXACT):
        ends = [found[-1] for seed in seeds(rows) if (found := pick(rows, solver=solver, seed=seed))]
        seconds = "" if ends[0]["seconds"] is None else f"{np.median([r['seconds'] for r in ends]):.1f}"
        reached = [_seconds_to(rows, solver, seed) for seed in seeds(rows)] if seconds else [()]
        cells = [_shown(r) for r in zip(*reached, strict=True)] if seconds else ["", ""]
        lines.append(
            [solver, seconds, spread([r["valid"] for r in ends], 5), spread([r["test"] for r in ends], 5), *cells]
        )
    header = ["solver", "seconds", "valid", "test", "seconds to .0385", "seconds to .0360"]
    return f"{markdown(header, lines)}\n\n{_words(rows)}"


def _seconds_to(rows: list[Row], solver: str, seed: int) -> tuple[float, float]:
    found = pick(rows, solver=solver, seed=seed)
    first, second = (next((r["seconds"] for r in found if r["valid"] <= t), math.inf) for t in (0.0385, 0.0360))
    return first, second


def _shown(seconds: tuple[float, ...]) -> str:
    median = float(np.median(seconds))
    return f"{median:.2f}" if math.isfinite(median) else "never"


def _words(rows: list[Row]) -> str:
    ratios: dict[str, list[float]] = {UNROLLED: [], ANEW: []}
    ahead = []
    for seed in seeds(rows):
        for solver, found in ratios.items():
            found.append(_seconds_to(rows, solver, seed)[0] / _seconds_to(rows, NEWTON, seed)[1])
        unrolled = pick(rows, solver=UNROLLED, seed=seed)
        later = [r for r in unrolled if r["seconds"] >= 0.1 * unrolled[-1]["seconds"]]
        default = pick(rows, solver=DEFAULT, seed=seed)
        ahead.append(np.mean([_best_by(default, r["seconds"]) < r["valid"] for r in later]))
    scales = ", ".join(f"{pick(rows, solver=PRIOR, seed=seed)[-1]['scale']:.2f}" for seed in seeds(rows))
    return (
        f"Unrolled optimisation needs {np.median(ratios[UNROLLED]):.1f} × the seconds to reach .0385 that *newton* needs to reach .0360 "
        f"(median over seeds), and {np.median(ratios[ANEW]):.1f} × where every hypergradient trains anew. "
        f"After the first tenth of unrolled's run, the default is ahead of it at {np.mean(ahead):.0%} of its points. Scales chosen for the "
        f"prior: {scales}."
    )


def _best_by(rows: list[Row], seconds: float) -> float:
    """The last validation loss by then."""
    return next((r["valid"] for r in reversed(rows) if r["seconds"] <= seconds), math.inf)
