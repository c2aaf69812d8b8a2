"""Where λ̂ starts: at a screened setting, out of the corners, and again where the model was left with a constant prediction.

A gradient needs a slope. Far down on a logarithmic axis there is none, nor where regularisation is so strong that nothing
but a constant prediction remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hypertune.batches import Minibatches
from hypertune.hyperprior import vertex
from hypertune.retraining import Retrained, retrain
from hypertune.space import Space
from hypertune.task import Task

_SCREENED = 600_000  # multiplications for a row by all models: beyond it each costs what it would alone
_LINE = (0.4, 0.5, 0.6, 0.7)  # quantiles
_SCREENED_STEPS = 150  # a screening is at least so long, or as long as a fit
_SCREENED_SHARE = 1 / 3
_NEARLY = 1.05  # times the least loss: as good, in a screening
_RESTARTS = 2
_ROUNDING = 1e-9  # units of λ: a bound's logarithm may round to the wrong side of it
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
    line = space.quantile(np.array(_LINE)[:, None].repeat(space.n, axis=1)) if log.any() else current.repeat(0, 1)
    quarter = space.quantile(np.full((1, space.n), 0.25))
    as_they_are = torch.where(log, line, current)
    up = torch.where(log, line[1:3], quarter) if log.any() else quarter
    settings = torch.cat([as_they_are, current[None], up])
    affordable = _SCREENED // (len(settings) * objective.cost) if objective.stacked else 0
    if not affordable and objective.has_statistics and log.any():
        settings, affordable = settings[: len(line) + 1], 1
    if not affordable:
        return None
    folds, net = folds[:affordable], folds[0].net
    per_epoch = min(Minibatches([fold.train], net.batch_size, seed=0).steps_per_epoch for fold in folds)
    steps = max(_SCREENED_SHARE * net.max_epochs * per_epoch, _SCREENED_STEPS)
    epochs = min(net.max_epochs, math.ceil(steps / per_epoch))
    screened: list[Retrained] = []
    for some in [settings] if objective.stacked else settings.split(1):
        seed = screened[0].seed if screened else None
        trained = retrain(task._replace(folds=folds), some, epochs=epochs, seed=seed, unstacked=True)
        if trained is None:
            return None
        screened.append(trained)
    losses = torch.cat([trained.validation_losses(folds) for trained in screened])
    best = int(losses.argmin())
    if best == len(line) and (near := (losses[:best] <= _NEARLY * losses[best]).nonzero()).numel():
        return settings[near[-1, 0]]
    around = losses[max(best - 1, 0) : best + 2]
    if not 0 < best < len(line) - 1 or not (around.isfinite() & (around > 0)).all():
        return settings[best]
    at = vertex(np.arange(len(line)), losses[: len(line)].log().numpy())
    return torch.lerp(settings[int(at)], settings[math.ceil(at)], at % 1)


def out_of_corners(space: Space, current: Tensor) -> Tensor:
    """Where λ̂ starts: at the given setting, except where that is the bound of a logarithmic range.

    Far down on a logarithmic axis the loss is flat, and a gradient does not lead out of there: such a hyperparameter starts
    at a third of the way up its distribution.
    """
    third = space.quantile(np.full((1, space.n), _THIRD))[0]
    low, high = (torch.isclose(current, bound, rtol=0.0, atol=_ROUNDING) for bound in (space.low, space.high))
    return torch.where(space.log & (low | high), third, current)


def restarts(space: Space, constant: Tensor) -> Iterator[Tensor]:
    """Where to begin again if a run from λ = ``constant`` (n,) ended with a constant prediction; each (n,).

    Logarithmic hyperparameters above their distribution's quantile 1/3 move half way towards it, the others half way towards quantile 1/9
    (never upwards); and then the same again.
    """
    third, ninth = space.quantile(np.array([[_THIRD], [_THIRD**2]]).repeat(space.n, axis=1))
    for _ in range(_RESTARTS if space.log.any() else 0):
        weaker = torch.where(constant > third, third, torch.minimum(ninth, constant))
        constant = torch.where(space.log, (constant + weaker) / 2, constant)
        yield constant
