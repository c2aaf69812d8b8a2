"""Where λ̂ starts: with which learning rate, at a screened setting, out of the corners, and again where only a constant prediction was left.

No gradient finds a learning rate, so some are tried. And a gradient needs a slope: far down on a logarithmic axis there is none, nor where
regularisation is so strong that nothing but a constant prediction remains.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hypertune.batches import Minibatches
from hypertune.folds import Fold
from hypertune.hyperprior import vertex
from hypertune.retraining import Retrained, retrain
from hypertune.space import Space
from hypertune.task import Task

_SCREENED = 600_000  # multiplications for a row by all models: beyond it each costs what it would alone
_LINE = (0.4, 0.5, 0.6, 0.7)  # quantiles
_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)  # quantiles
_APART = 0.4  # of the distance between these: one that is nearer to the estimator's own learning rate is left out
_SCREENED_STEPS = 150  # a screening is at least so long, or as long as a fit
_SCREENED_SHARE = 1 / 3
_NEARLY = 1.05  # times the least loss: as good, in a screening
_RESTARTS = 2
_ROUNDING = 1e-9  # units of λ, or epochs: a bound's logarithm may round to the wrong side of it
_THIRD = 1 / 3  # of the way up a distribution: out of the flat part


def screen(task: Task) -> Tensor | None:
    """Where λ̂ should start (n,): the best of a handful of settings from weak to strong regularisation.

    None where screening does not pay; a model with BatchNorm and a logarithmic hyperparameter is then screened on one fold (``current`` and the line).

    They are ``current`` (n,), a line of quantiles of all logarithmic hyperparameters together with the others as they are, and
    two of that line with the others a quarter of the way up. They are trained on as many of the folds as is cheap, for a third of
    a fit (at least 150 steps, at most a whole fit) with a schedule of that length: by then the best setting shows;
    how good the others are may not. But what overfits late looks good so early: where ``current`` is best, the strongest of the line that
    is nearly as good is taken. If the best is inside the line, λ̂ starts at the vertex of the parabola through it and its neighbours.
    """
    space, folds, objective, current, _ = task
    log = space.log
    line = _at_quantiles(space, _LINE) if log.any() else current.repeat(0, 1)
    quarter = _at_quantiles(space, (0.25,))
    as_they_are = torch.where(log, line, current)
    up = torch.where(log, line[1:3], quarter) if log.any() else quarter
    settings = torch.cat([as_they_are, current[None], up])
    affordable = _SCREENED // (len(settings) * objective.cost) if objective.stacked else 0
    if not affordable and objective.has_statistics and log.any():
        settings, affordable = settings[: len(line) + 1], 1
    if not affordable:
        return None
    train, folds = _Screening(task._replace(folds=folds[:affordable])), folds[:affordable]
    screened = []
    for some in [settings] if objective.stacked else settings.split(1):
        if (trained := train(some)) is None:
            return None
        screened.append(trained.validation_losses(folds))
    losses = torch.cat(screened)
    best = int(losses.argmin())
    if best == len(line) and (near := (losses[:best] <= _NEARLY * losses[best]).nonzero()).numel():
        return settings[near[-1, 0]]
    around = losses[max(best - 1, 0) : best + 2]
    if not 0 < best < len(line) - 1 or not (around.isfinite() & (around > 0)).all():
        return settings[best]
    at = vertex(np.arange(len(line)), losses[: len(line)].log().numpy())
    return torch.lerp(settings[int(at)], settings[math.ceil(at)], at % 1)


class Tried(NamedTuple):
    """Short trainings of B settings with each of R learning rates, rising; ``rates`` (R,) is empty and R = 1 if none is searched for.

    ``each`` (some folds, B, R) are their validation losses, infinite where nobody looked, ``own`` is the number of the own learning rate, and
    ``seed`` that of initial weights and minibatches.
    """

    rates: Tensor
    each: Tensor
    own: int
    seed: int

    @property
    def best(self) -> tuple[int, int]:
        """The best setting and learning rate, by number."""
        return divmod(int(self.each.mean(dim=0).argmin()), self.each.shape[2])

    @property
    def losses(self) -> Tensor:
        """Of these, (some folds,)."""
        setting, rate = self.best
        return self.each[:, setting, rate]


def screened_share(max_epochs: int, per_epoch: int) -> float:
    """The share of a fit of so many steps that is enough to compare settings."""
    return min(1.0, max(_SCREENED_SHARE, _SCREENED_STEPS / (max_epochs * per_epoch)))


def try_settings(task: Task, share: float = 0.0, seed: int | None = None, near: Tried | None = None) -> Tried | None:
    """The estimator's own learning rate and five quantiles of its distribution, if it is searched for, with little and with more regularisation.

    A weak regularisation asks for smaller learning rates than the tuned one will. So each is tried with the other hyperparameters as they are, with the
    logarithmic ones at their medians, and with the rest at quantile 0.25, too. They are trained as in :func:`screen`, on as many folds as is cheap.
    Where not even one is, they are trained one by one on one, without the second of the three, from the own learning rate upwards, and downwards if
    that was no better, until the loss rises. None where such a training would not be that of a fit.

    For what is compared with another net, which has tried ``near``: that one's best learning rate and its two neighbours alone, its best setting and the last, for at least the same
    ``share`` of a fit, and from its ``seed``.
    """
    space, folds, objective, current, _ = task
    rates, others = _rates(space, current), _others(space, current)
    begin = int((rates < current[space.rate]).sum())
    if near is not None:
        setting, rate = near.best
        rates, begin = near.rates[max(rate - 1, 0) : rate + 2], min(rate, 1)
        its = len(others) - 1 if setting == near.each.shape[1] - 1 else min(setting, len(others) - 1)
        others = others[sorted({its, len(others) - 1})]
    settings = others[:, None].repeat(1, max(len(rates), 1), 1)  # (up to 3, R, n)
    if len(rates):
        settings[..., space.rate] = rates[:, None]
    affordable = _SCREENED // (settings[..., 0].numel() * objective.cost) if objective.stacked else 0
    few = folds[: max(affordable, 1)]
    train = _Screening(task._replace(folds=few), share, seed)
    if affordable and (trained := train(settings.flatten(0, 1))) is not None:
        return Tried(rates, trained.fold_losses(few).view(len(few), *settings.shape[:2]), begin, trained.seed)
    settings = settings[[0, -1]] if len(settings) > 1 else settings
    train = _Screening(task._replace(folds=folds[:1]), share, seed)
    each = _climbed(train, folds[:1], settings, begin)
    return None if each is None or train.seed is None else Tried(rates, each, begin, train.seed)


def screen_rate(task: Task, tried: Tried | None = None) -> Tensor:
    """``current`` (n,), with the learning rate to train with, if one is searched for.

    The least of all losses of :func:`try_settings` tells (``tried``, if they are known), or the vertex of the parabola through it and its neighbours.
    On several folds the own one is kept unless the best of the others is better by more than one standard error over folds.

    Warns, and keeps the own one, where such a training would not be that of a fit. Raises ValueError if every one diverges.
    """
    space, current = task.space, task.current
    if not space.rate.any():
        return current
    tried = try_settings(task) if tried is None else tried
    if tried is None:
        warnings.warn(
            f"The learning rate is left at {_rate_of(space, current):g}: trainings to compare others would not be those of fits. A function of yours "
            "changes from call to call, weights have a hook, or the model is too large.",
            UserWarning,
            stacklevel=2,
        )
        return current
    rates, each, own, _ = tried
    losses = each.mean(dim=0)
    if not losses.isfinite().any():
        lowest = torch.where(space.rate, rates[0], current)
        raise ValueError(
            f"Trainings with learning rates from {_rate_of(space, lowest):.2g} upwards all diverge: give smaller ones, or scale X."
        )
    row, best = divmod(int(losses.argmin()), len(rates))
    gain = each[:, int(losses[:, own].argmin()), own] - each[:, row, best]
    if best != own and len(gain) > 1 and float(gain.mean()) <= float(gain.std()) / math.sqrt(len(gain)):
        return current
    losses = losses[row]
    found, around = rates[best], losses[max(best - 1, 0) : best + 2]
    if 0 < best < len(rates) - 1 and (around.isfinite() & (around > 0)).all():
        a, b, _ = np.polyfit(rates[best - 1 : best + 2], around.double().log(), 2)
        if a > 0:
            found = torch.tensor(-b / (2 * a), device="cpu").clamp(rates[best - 1], rates[best + 1])
    return torch.where(space.rate, found, current)


def _rates(space: Space, current: Tensor) -> Tensor:
    """The coordinate of the learning rates to try, rising: the estimator's own, and quantiles that are not near it. Empty if none is searched for."""
    if not space.rate.any():
        return current[:0]
    spread, own = _at_quantiles(space, _RATES)[:, space.rate].flatten(), current[space.rate]
    return torch.cat([spread[(spread - own).abs() > _APART * spread.diff().min()], own]).sort().values


def _others(space: Space, current: Tensor) -> Tensor:
    """Settings to try them with (1 to 3, n), from weak to strong regularisation; those that are equal once."""
    half, quarter = _at_quantiles(space, (0.5, 0.25))
    log, rate = space.log, space.rate
    rows = [current, torch.where(log, half, current), torch.where(log, half, quarter)]
    rows = [torch.where(rate, current, row) for row in rows]
    return torch.stack([row for i, row in enumerate(rows) if not any(torch.equal(row, other) for other in rows[:i])])


def _at_quantiles(space: Space, q: tuple[float, ...]) -> Tensor:
    """All hyperparameters at the same quantile of theirs, (len(q), n)."""
    return space.quantile(np.array(q)[:, None].repeat(space.n, axis=1))


def _rate_of(space: Space, lam: Tensor) -> float:
    return float(next(space.decode(lam)[h.name] for h in space.hyperparameters if h.is_rate))


def _climbed(
    train: Callable[[Tensor], Retrained | None], folds: list[Fold], settings: Tensor, begin: int
) -> Tensor | None:
    """Losses of settings (B, R, n) on one fold, (1, B, R): in each row from ``begin`` upwards, or else downwards, until they rise.

    Infinite where nobody looked; None where they cannot be trained.
    """
    losses = torch.full(settings.shape[:2], math.inf, dtype=torch.float64, device="cpu")
    for row, found in zip(settings, losses, strict=True):
        best = begin
        for way in (range(begin, len(row)), range(begin - 1, -1, -1)):
            for i in way if best == begin else ():
                if (trained := train(row[i, None])) is None:
                    return None
                found[i] = float(trained.validation_losses(folds))
                if found[i] > found[best] or (i >= begin and not found[i].isfinite()):
                    break
                best = i
    return losses[None]


class _Screening:
    """Trains settings (C, n) for a third of a fit (at least 150 steps, or ``share`` of it, at most a whole fit), all from one seed."""

    def __init__(self, task: Task, share: float = 0.0, seed: int | None = None):
        net = task.folds[0].net
        per_epoch = min(Minibatches([fold.train], net.batch_size, seed=0).steps_per_epoch for fold in task.folds)
        steps = max(_SCREENED_SHARE * net.max_epochs * per_epoch, _SCREENED_STEPS)
        epochs = max(math.ceil(steps / per_epoch), math.ceil(share * net.max_epochs - _ROUNDING))
        self.task, self.epochs, self.seed = task, min(net.max_epochs, epochs), seed

    def __call__(self, settings: Tensor) -> Retrained | None:
        trained = retrain(self.task, settings, epochs=self.epochs, seed=self.seed, unstacked=True)
        self.seed = self.seed if trained is None else trained.seed
        return trained


def out_of_corners(space: Space, current: Tensor) -> Tensor:
    """Where λ̂ starts: at the given setting, except where that is the bound of a logarithmic range.

    Far down on a logarithmic axis the loss is flat, and a gradient does not lead out of there: such a hyperparameter starts
    at a third of the way up its distribution.
    """
    (third,) = _at_quantiles(space, (_THIRD,))
    low, high = (torch.isclose(current, bound, rtol=0.0, atol=_ROUNDING) for bound in (space.low, space.high))
    return torch.where(space.log & (low | high), third, current)


def restarts(space: Space, constant: Tensor) -> Iterator[Tensor]:
    """Where to begin again if a run from λ = ``constant`` (n,) ended with a constant prediction; each (n,).

    Logarithmic hyperparameters above their distribution's quantile 1/3 move half way towards it, the others half way towards quantile 1/9
    (never upwards); and then the same again.
    """
    third, ninth = _at_quantiles(space, (_THIRD, _THIRD**2))
    for _ in range(_RESTARTS if space.log.any() else 0):
        weaker = torch.where(constant > third, third, torch.minimum(ninth, constant))
        constant = torch.where(space.log, (constant + weaker) / 2, constant)
        yield constant
