"""Which settings are verified: the tuned one, what is on the way to it, the estimator's own, and what may be better beyond these.

λ̂ need not be where a retrained model is best. In fits that are far from converged the weights keep what they learned under an
earlier λ, and λ̂ asks for too little regularisation: an effect like the short-horizon bias of step sizes (Wu et al. 2018,
*Understanding short-horizon bias in stochastic meta-optimization*). Retrained models show it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypertune.retraining import Retrained, retrain
from hypertune.task import Task

_NOTICEABLE = 0.01  # units of λ
_SMALL = 60_000  # multiplications for a row by a setting's models on all folds: one more in the stack costs 3 to 10% of a search
_STRONGER = 1.5  # units of λ: 4.5 times each weight decay
_WORTHWHILE = 0.02  # of the tuned setting's loss: so much better must another be to be followed
_ON_THE_LINE = (0.5, 1.5, 2.0, 3.0)  # times as far from the tuned setting as the best one


def distinct(tuned: Tensor, start: Tensor | None, current: Tensor) -> list[Tensor]:
    """Tuned, the middle, start, the estimator's own setting, each (n,); the second and third where they differ noticeably."""
    known = [tuned, current]
    between = [] if start is None else _new([(tuned + start) / 2, start], known)
    return [tuned, *between] if torch.equal(tuned, current) else [tuned, *between, current]


def retrain_candidates(
    task: Task,
    candidates: list[Tensor],
    *,
    more: bool = True,
    watched: bool = False,
) -> tuple[list[Tensor], list[Retrained], tuple[Tensor, Tensor] | None]:
    """Retrain what :func:`distinct` gave, if that can be stacked; and with ``more``:

    1. of small models the tuned setting with all logarithmic hyperparameters e^1.5 times as large, which for penalties is stronger;
    2. of these, if one of all is better than the tuned setting by 2%: four settings on the line from that through the best;
    3. of others with BatchNorm: the best setting, with stronger penalties.

    The last two take a second stacked pass.

    Returns
    -------
    candidates : list of Tensor of shape (n,)
        What was given, and then what was added and did not diverge. They do not depend on ``watched``.
    retrained : list of Retrained
        Empty if they cannot be stacked, or if each fit is ``watched``: someone wants to see it happen.
    verified : tuple of Tensor of shape (C, n) and Tensor of shape (C,), or None
        λ of what was given, and the validation losses, mean over folds.
    """
    space, folds, objective, *_ = task
    small = objective.cost * len(folds) <= _SMALL
    more = more and (small or objective.has_statistics)
    if watched and not more:
        return candidates, [], None
    stronger, tried = _STRONGER * space.log, list(candidates)
    if more and small:
        tried += _new([space.clip(tried[0] + stronger)], tried)
    first = retrain(task, torch.stack(tried))
    if first is None:
        return candidates, [], None
    retrained, losses = [first], first.validation_losses(folds)
    best, further = tried[int(losses.argmin())], []
    if more and not small and losses.isfinite().any():
        further = [best + stronger]
    elif more and losses[0] - losses.min() > _WORTHWHILE * losses[0].abs():
        further = [tried[0] + times * torch.where(best == tried[0], 0.0, best - tried[0]) for times in _ON_THE_LINE]
    if further := _new([space.clip(lam) for lam in further], tried):
        second = retrain(task, torch.stack(further), seed=first.seed)
        if second is not None:
            tried, retrained = [*tried, *further], [first, second]
            losses = torch.cat([losses, second.validation_losses(folds)])
    given = len(candidates)
    added = [lam for lam, loss in zip(tried[given:], losses[given:], strict=True) if loss.isfinite()]
    # Added ones are not among them: they were chosen by their losses and lie on one line, which would bias how far the response is off.
    return [*candidates, *added], [] if watched else retrained, (torch.stack(candidates), losses[:given])


def _new(settings: list[Tensor], known: list[Tensor]) -> list[Tensor]:
    """Those of ``settings`` that differ noticeably from all of ``known`` and from one another."""
    kept: list[Tensor] = []
    for lam in settings:
        if all(_distance(lam, other) > _NOTICEABLE for other in [*known, *kept]):
            kept.append(lam)
    return kept


def _distance(lam: Tensor, other: Tensor) -> float:
    """The largest difference of a coordinate; those that are infinite alike (the logarithm of 0) do not differ."""
    return float(torch.where(lam == other, 0.0, lam - other).abs().max())
