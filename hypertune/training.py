"""Hyper-training of a torch estimator on K folds: the parts put together.

Rows and minibatches, the stacked objective, a hypernetwork, one of the algorithms and their optimizers. This room owns the
loop, the clock and the trace; the mathematics is in :mod:`hypertune.algorithms`.

    space, objective, w0 = stack(space, prefix, folds, n_rows, seed)
    response, history = hyper_train(space, prefix, folds, objective, w0, start, algorithm="joint", ...)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm.auto import tqdm

from hypertune.algorithms import (
    Adjoint,
    PlainOptimizer,
    Problem,
    ResponseOptimizer,
    Step,
    TangentOptimizer,
    descend_response,
    fit_response,
    joint,
    settle,
    simplified,
)
from hypertune.batches import Batch, Minibatches
from hypertune.estimator import Net
from hypertune.hypernetworks import Builder, Hypernetwork, Layout
from hypertune.objective import Objective, flat_weights
from hypertune.randomness import isolated
from hypertune.response import BestResponse, Fold
from hypertune.space import Space
from hypertune.tunable import arrangements, find_reaches

_VALID_BATCH = 256
_EVERY = 2  # steps per sample of λ and move of λ̂; the others are plain
_MOST_INITS = 3
_INITS_WEIGHTS = 75_000  # of all folds and initial weights together; beyond it another copy costs what it would alone
_RECORDS = 50
_RECORDED_ROWS = 1_000  # of each fold's validation rows
_SCREENED = 512  # settings that "global" ranks before its descent
_GLOBAL_FIT = 0.75  # share of the steps of "global" that fit the response; the rest descends it
_SETTLING = 50  # minibatches after which BatchNorm has forgotten what it was before
_SIMPLIFIED_OFFSET = 2.0  # units of λ between λ̂'s start and the centre in "simplified"


def hyper_train(
    space: Space,
    prefix: str,
    folds: list[Fold],
    objective: Objective,
    w0: Tensor,
    start: Tensor,
    *,
    algorithm: str,
    hypernetwork: Builder,
    response_optimizer: str,
    max_epochs: int,
    scale: float | None,
    grain_scale: float | None,
    n_samples: int | None,
    n_inits: int | None,
    hyper_lr: float,
    hyper_lr_schedule: str,
    hyper_eps: float,
    warmup: float,
    averaging: float,
    seed: int,
    progress: bool,
    end_epoch: Callable[..., bool],
) -> tuple[BestResponse, dict[str, np.ndarray]]:
    """Run one of the three algorithms; the parameters are those of ``HyperTrainingSearchCV``.

    ``space``, ``objective`` and ``w0`` are what :func:`stack` returns, and λ̂ starts at ``start`` (n,).
    ``end_epoch`` is called after every pass through the training rows, and ends the run by answering True.

    Returns
    -------
    response : BestResponse
        ``response.params`` is the tuned setting.
    history : dict from str to ndarray
        One entry per record: step, seconds, epoch, train_loss, validation_loss and each hyperparameter (one column for each
        of its values, if it has a grain).

    Raises
    ------
    ValueError
        If the loss is no longer finite (naming step and λ̂).
    """
    begin = time.perf_counter()
    net, K = folds[0].net, len(folds)
    rows = _of_rows(space).to(w0.device)
    with isolated(seed, net.device):
        lam_hat = start.to(w0)
        if n_inits is None:
            n_inits = min(_MOST_INITS, _INITS_WEIGHTS // w0.numel()) if objective.stacked and not rows.any() else 1
        models = folds * max(n_inits, 1)
        if more := [flat_weights(fold.net._build_module()) for fold in models[K:]]:
            w0 = torch.cat([w0, torch.stack(more)])
        train_batches = Minibatches([fold.train for fold in models], net.batch_size, seed=seed)
        problem = _problem(space, prefix, objective, models, train_batches, seed, w0)
        center = lam_hat if algorithm == "joint" else lam_hat.clone()
        if algorithm == "simplified":  # with V = 0 at a distance from λ̂, larger λ begins by meaning: closer to w₀
            center = torch.minimum(center + _SIMPLIFIED_OFFSET, problem.high)
        phi = hypernetwork.build(w0, center, _layout(space, prefix, net, objective, folds[0].train.x))
        response = BestResponse(space, prefix, {}, phi, objective, folds)

        per_epoch = train_batches.steps_per_epoch
        steps = max_epochs * per_epoch
        phi_steps = math.ceil(_GLOBAL_FIT * steps) if algorithm == "global" else steps
        first = phi_steps if algorithm == "global" else int(warmup * steps)
        phi_optimizer, phi_schedules = _phi_optimizer(net, phi, response_optimizer, phi_steps)
        adjoint = Adjoint(rows, phi, phi_optimizer.weight_optimizer) if rows.any() else None
        every = _EVERY if algorithm == "joint" and response_optimizer == "tangent" and adjoint is None else 1
        # λ̂ moves once in `every` steps, and as far as if it did in all of them.
        lam_optimizer = torch.optim.Adam([lam_hat], lr=every * hyper_lr, betas=(0.9, 0.99), eps=hyper_eps)
        # Each of many values has a small slope of its own; what matters is the slope of moving all of them together.
        sizes = space.sizes.to(lam_hat)

        grouped = (
            []
            if grain_scale is None
            else [
                (block, 1 / (grain_scale**2 * sum(len(fold.valid.x) for fold in folds)))
                for h, block in zip(space.hyperparameters, space.blocks.values(), strict=True)
                if h.grain not in (None, "row")
            ]
        )

        def prepare_slopes(*_: Any) -> None:
            for block, strength in grouped:  # a Gaussian prior around the mean, against one validation loss per row
                own = lam_hat.detach()[block]
                lam_hat.grad[block] += strength * (own - own.mean())  # type: ignore[index]
            lam_hat.grad.mul_(sizes)  # type: ignore[union-attr]

        lam_optimizer.register_step_pre_hook(prepare_slopes)
        decay = every / max(steps - first, 1) if hyper_lr_schedule == "linear" else 0.0
        lam_schedule = LambdaLR(lam_optimizer, lambda t: max(0.0, 1 - decay * t))
        run = _run(
            algorithm, problem, phi, lam_hat, phi_optimizer, lam_optimizer, adjoint, space,
            scale=scale, m=n_samples, warmup=first, every=every, phi_steps=phi_steps, seed=seed,
        )  # fmt: skip

        trace = _Trace(response, lam_hat, begin, per_epoch, averaged_from=max(first, (1 - averaging) * steps))
        recorded = max(1, min(per_epoch, steps // _RECORDS))
        with tqdm(total=steps, desc="hyper-training", unit="step", disable=not progress, leave=False) as bar:
            for number, step in enumerate(islice(run, steps), start=1):
                for schedule in phi_schedules if step.train_loss is not None else ():
                    schedule.step()
                if step.valid_loss is not None:
                    lam_schedule.step()
                trace.see(number, step)
                stop = number % per_epoch == 0 and end_epoch()
                if number % recorded == 0 or number == steps or stop:
                    trace.record(number)
                    bar.update(number - bar.n)
                    bar.set_postfix(validation_loss=f"{trace.rows[-1]['validation_loss']:.4g}")
                if stop:
                    break
        average = trace.average()
        for _ in range(_SETTLING if objective.has_statistics else 0):  # running statistics at the tuned setting
            settle(problem, phi, average, next(train_batches))
    phi.keep(K)  # the other initial weights have done their part
    response.params = space.decode(average)
    phi.center = phi.center.detach().clone()
    phi.requires_grad_(False)
    response.folds = [fold.without_training_rows() for fold in folds]
    return response, trace.arrays()


def stack(space: Space, prefix: str, folds: list[Fold], n_rows: int, seed: int) -> tuple[Space, Objective, Tensor]:
    """All folds in one objective. Refuses what cannot be trained.

    ``n_rows`` is the length of the whole data, for hyperparameters of single rows.

    Returns
    -------
    space : Space
        With the arrangement of every hyperparameter that has a grain.
    objective : Objective
    w0 : Tensor of shape (K, D)
        Initial weights.

    Raises
    ------
    ValueError
        If a hyperparameter reaches nothing in the model.
    """
    net = folds[0].net
    with isolated(seed, net.device):
        reaches = find_reaches(net, space, prefix)
        first = folds[0].net._build_module()
        w0 = torch.stack([flat_weights(first), *(flat_weights(fold.net._build_module()) for fold in folds[1:])])
        objective = net._make_objective(first, reach=reaches, folds=len(folds))
        x = folds[0].valid.x[:2]
        net._check_outputs(objective, x)
        settings = net.get_params()
        objective.try_stacking(x, {own: settings[own] for own in reaches})
    return space.resolve(arrangements(net, objective, space, prefix, x, n_rows)), objective, w0


def _layout(space: Space, prefix: str, net: Net, objective: Objective, x: Tensor) -> Layout:
    """Which coordinate of a fine grain acts on which weights: a penalty on its own, a feature's noise on its column."""
    local = []
    for h in space.hyperparameters:
        if h.grain in (None, "layer", "row"):
            continue
        if isinstance(h.shape, Mapping):
            index = objective.index(h.shape)
        else:
            try:
                arrangement = objective.arrangement("feature", x.shape[1])
            except ValueError:
                continue  # no layer with a column for each feature: a column of V for each instead
            index = objective.index({name: shape for name, shape in arrangement.items() if shape != ()})
        local.append(torch.where(index >= 0, index + space.blocks[h.name].start, -1))
    rows = _of_rows(space)
    return Layout(objective.units(), local, rows if rows.any() else None)


def _of_rows(space: Space) -> Tensor:
    """Which coordinates of λ belong to single training rows, (n,) booleans."""
    return torch.cat([torch.full((h.size,), h.grain == "row") for h in space.hyperparameters])


def _problem(
    space: Space,
    prefix: str,
    objective: Objective,
    folds: list[Fold],
    train_batches: Minibatches,
    seed: int,
    like: Tensor,
) -> Problem:
    valid_batches = Minibatches(
        [fold.valid for fold in folds], max(folds[0].net.batch_size, _VALID_BATCH), seed=seed + 1
    )

    train_loss = make_train_loss(space, prefix, objective, folds[0].net, train_batches)

    def keep(w: Tensor, lam: Tensor, batch: Batch) -> None:
        train_loss(w, lam, batch, keep_statistics=True)

    def valid_loss(w: Tensor, batch: Batch) -> Tensor:
        return objective.valid_loss(w[:, 0], batch)[:, None]

    low, high = space.low.to(like), space.high.to(like)
    return Problem(
        train_loss, valid_loss, train_batches, valid_batches, low, high, keep if objective.has_statistics else None
    )


def make_train_loss(
    space: Space, prefix: str, objective: Objective, net: Net, train_batches: Minibatches
) -> Callable[..., Tensor]:
    """L_Train as a function of λ: ``(w (K, m, D), lam (m, n), batch of K × B rows) -> (K, m)``.

    ``train_batches`` is asked for the weights of single training rows, where these are hyperparameters.
    """
    values_of = make_values(space, prefix, objective, net)

    def train_loss(w: Tensor, lam: Tensor, batch: Batch, *, keep_statistics: bool = False) -> Tensor:
        K, m, _ = w.shape
        values, repeated = values_of(lam, K), batch.repeat(m)
        if "sample_weight" in values:
            repeated = repeated._replace(weight=train_batches.weighted(batch, values.pop("sample_weight")))
        loss = objective.train_loss(w.flatten(0, 1), values, repeated, keep_statistics=keep_statistics)
        return loss.view(K, m)

    return train_loss


def make_values(
    space: Space, prefix: str, objective: Objective, net: Net
) -> Callable[[Tensor, int], dict[str, Tensor]]:
    """``(lam (m, n), K)`` → values by their names in the loss, as :meth:`Objective.train_loss` takes them for K × m models.

    Those of single rows are as they are in λ, (m, number of all rows).
    """
    own = {name: name.removeprefix(prefix) for name in space.names}
    names = {name: net.loss_names.get(short, short) for name, short in own.items()}
    of_weights = {h.name: objective.index(h.shape) for h in space.hyperparameters if isinstance(h.shape, Mapping)}

    def values_of(lam: Tensor, K: int) -> dict[str, Tensor]:
        values = {}
        for name, v in space.values(lam).items():
            v = v[:, of_weights[name]] if name in of_weights else v
            values[names[name]] = v if names[name] == "sample_weight" else v.repeat(K, *(1,) * (v.dim() - 1))
        return values

    return values_of


def _phi_optimizer(net: Net, phi: Hypernetwork, kind: str, steps: int) -> tuple[ResponseOptimizer, list[LRScheduler]]:
    """Line 4 by the estimator's own optimizer and learning rate, and the schedules to step with it."""
    if kind == "plain":
        optimizer, schedule = net._make_optimizer(list(phi.parameters()), steps)
        return PlainOptimizer(phi, optimizer), [schedule]
    weights, schedule = net._make_optimizer([phi.w0], steps)
    if not (basis := list(phi.basis.parameters())):
        return TangentOptimizer(phi, weights), [schedule]
    basis_optimizer, basis_schedule = net._make_optimizer(basis, steps)
    return TangentOptimizer(phi, weights, basis_optimizer), [schedule, basis_schedule]


def _run(
    algorithm: str,
    problem: Problem,
    phi: Hypernetwork,
    lam_hat: Tensor,
    phi_optimizer: ResponseOptimizer,
    lam_optimizer: torch.optim.Optimizer,
    adjoint: Adjoint | None,
    space: Space,
    *,
    scale: float | None,
    m: int | None,
    warmup: int,
    every: int,
    phi_steps: int,
    seed: int,
) -> Iterator[Step]:
    generator = torch.Generator().manual_seed(seed)
    if algorithm == "joint":
        sigma: Any = 0.5 if scale is None else scale
        if adjoint is not None:
            sigma = torch.where(adjoint.coordinates, 0.0, sigma)
        yield from joint(
            problem, phi, lam_hat, phi_optimizer, lam_optimizer,
            sigma=sigma, m=m or 2, warmup=warmup, every=every, generator=generator, adjoint=adjoint,
        )  # fmt: skip
    elif algorithm == "simplified":
        yield from simplified(problem, phi, lam_hat, phi_optimizer, lam_optimizer, warmup=warmup, adjoint=adjoint)
    else:
        sample = _prior(space, lam_hat, scale, seed, None if adjoint is None else adjoint.coordinates)
        for step in fit_response(problem, phi, phi_optimizer, sample, lam_hat, m=m or 8):
            yield step
            if step.number == phi_steps:
                break
        with torch.no_grad():  # start the descent where the learned response promises most
            screened = sample(_SCREENED)
            batch = next(problem.valid_batches)
            predicted = torch.cat([problem.valid_loss(phi(lam[None]), batch).mean(dim=0) for lam in screened])
            lam_hat.copy_(screened[predicted.argmin()])
        yield from descend_response(problem, phi, lam_hat, lam_optimizer, adjoint=adjoint)


def _prior(
    space: Space, lam_hat: Tensor, scale: float | None, seed: int, fixed: Tensor | None
) -> Callable[[int], Tensor]:
    """p(λ) of Algorithm 2: the declared distributions, or N(start, scale² I) as in the paper; ``fixed`` coordinates stay."""
    rng = np.random.default_rng(seed)
    start = lam_hat.detach().clone()

    def sample(m: int) -> Tensor:
        if scale is None:
            lam = space.sample(m, rng).to(start)
        else:
            lam = start + scale * torch.from_numpy(rng.standard_normal((m, space.n))).to(start)
        return lam if fixed is None else torch.where(fixed, start, lam)

    return sample


class _Trace:
    """Collects ``history_``, one row per record, and the average of λ̂ over the last part of its path."""

    def __init__(self, response: BestResponse, lam_hat: Tensor, begin: float, per_epoch: int, averaged_from: float):
        self.response, self.lam_hat, self.begin, self.per_epoch = response, lam_hat, begin, per_epoch
        self.averaged_from = averaged_from
        self._folds = [fold.with_fewer_valid(_RECORDED_ROWS) for fold in response.folds]
        self.rows: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._sum, self._count = torch.zeros_like(lam_hat), 0

    def see(self, number: int, step: Step) -> None:
        if step.train_loss is not None:
            self._losses.append(step.train_loss)
        if number > self.averaged_from:
            self._sum, self._count = self._sum + self.lam_hat.detach(), self._count + 1

    def average(self) -> Tensor:
        return self._sum / self._count if self._count else self.lam_hat.detach()

    def record(self, number: int) -> None:
        train_loss = float(torch.stack(self._losses).mean()) if self._losses else self.rows[-1]["train_loss"]
        self._losses.clear()
        lam = self.lam_hat.detach().cpu().double()
        valid_loss = float(self.response._validation_losses(lam[None], self._folds).mean())
        if not (math.isfinite(train_loss) and math.isfinite(valid_loss) and bool(lam.isfinite().all())):
            raise ValueError(
                f"Hyper-training diverged before step {number}: training loss {train_loss}, validation loss {valid_loss}, "
                f"λ̂ = {self.response.space.decode(lam)}. Lower the estimator's lr or the search's hyper_lr, or scale X."
            )
        self.rows.append(
            {
                "step": number,
                "seconds": time.perf_counter() - self.begin,
                "epoch": number / self.per_epoch,
                "train_loss": train_loss,
                "validation_loss": valid_loss,
                **{name: value.numpy() for name, value in self.response.space.values(lam).items()},
            }
        )

    def arrays(self) -> dict[str, np.ndarray]:
        return {key: np.array([row[key] for row in self.rows]) for key in self.rows[0]}
