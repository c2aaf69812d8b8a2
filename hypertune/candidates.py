"""Which settings are verified: the tuned one, what is on the way to it, the estimator's own, and what may be better beyond these.

λ̂ need not be where a retrained model is best. In fits that are far from converged the weights keep what they learned under an
earlier λ, and λ̂ asks for too little regularisation: an effect like the short-horizon bias of step sizes (Wu et al. 2018,
*Understanding short-horizon bias in stochastic meta-optimization*). Retrained models show it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hypertune.objective import Objective
from hypertune.response import Fold
from hypertune.retraining import Retrained, retrain
from hypertune.space import Space

_NOTICEABLE = 0.01  # units of λ
_SMALL = 60_000  # multiplications for a row by a setting's models on all folds: one more in the stack costs 3 to 10% of a search
_STRONGER = 1.5  # units of λ: 4.5 times each weight decay
_WORTHWHILE = 0.02  # of the tuned setting's loss: so much better must another be to be followed
_ON_THE_LINE = (0.5, 1.5, 2.0, 3.0)  # times as far from the tuned setting as the best one
_MOST_STEPS = 2  # up from the best, one after the other, where each costs a fit on every fold


def distinct(tuned: Tensor, start: Tensor | None, current: Tensor) -> list[Tensor]:
    """Tuned, the middle, start, the estimator's own setting, each (n,); the second and third where they differ noticeably."""
    known = [tuned, current]
    between = [] if start is None else _new([(tuned + start) / 2, start], known)
    return [tuned, *between] if torch.equal(tuned, current) else [tuned, *between, current]


def retrain_candidates(
    space: Space,
    prefix: str,
    folds: list[Fold],
    objective: Objective,
    candidates: list[Tensor],
    *,
    more: bool = True,
    watched: bool = False,
) -> tuple[list[Tensor], list[Retrained], tuple[Tensor, Tensor] | None]:
    """Retrain what :func:`distinct` gave, if that can be stacked; and with ``more``, of small models and those with BatchNorm, what may be better.

    Of small models that is the tuned setting with all logarithmic hyperparameters e^1.5 times as large, which for penalties is stronger.
    And where one of all these is better than the tuned setting by 2%, in a second stacked pass, settings on the line from it through
    the best. Of others with BatchNorm, stacked or not, it is the best setting with stronger penalties; and if that is better by 2%,
    stronger ones still.

    Returns
    -------
    candidates : list of Tensor of shape (n,)
        What was given, and then what was added and did not diverge. They do not depend on ``watched``.
    retrained : list of Retrained
        Empty if they cannot be stacked, or if each fit is ``watched``: someone wants to see it happen.
    verified : tuple of Tensor of shape (C, n) and Tensor of shape (C,), or None
        λ of what was given, and the validation losses, mean over folds.
    """
    small = objective.stacked and objective.cost * len(folds) <= _SMALL
    more = more and (small or objective.has_statistics)
    if not more and (watched or not objective.stacked):
        return candidates, [], None
    stronger, passes = _STRONGER * space.log, 1 + (more and (1 if small else _MOST_STEPS))
    given, settings, tried = len(candidates), list(candidates), list[Tensor]()
    retrained, losses = list[Retrained](), torch.empty(0)
    if more and small:
        settings += _new([space.clip(settings[0] + stronger)], settings)
    while settings and len(retrained) < passes:
        seed = retrained[0].seed if retrained else None
        found = retrain(space, prefix, folds, objective, torch.stack(settings), seed=seed)
        if found is None:
            break
        tried, retrained = [*tried, *settings], [*retrained, found]
        yet, losses = losses.tolist(), torch.cat([losses, found.validation_losses(folds)])
        best = tried[int(losses.argmin())]
        if small:
            reference, further = float(losses[0]), [tried[0] + times * (best - tried[0]) for times in _ON_THE_LINE]
        else:
            reference, further = min(yet, default=math.inf), [best + stronger]
        better = math.isinf(reference) or reference - losses.min() > _WORTHWHILE * abs(reference)
        settings = _new([space.clip(lam) for lam in further], tried) if better else []
    if not retrained:
        return candidates, [], None
    added = [lam for lam, loss in zip(tried[given:], losses[given:], strict=True) if loss.isfinite()]
    # Those that were added say less of how far a response is off: they were chosen by their losses, and lie on one line.
    return [*candidates, *added], [] if watched else retrained, (torch.stack(candidates), losses[:given])


def _new(settings: list[Tensor], known: list[Tensor]) -> list[Tensor]:
    """Those of ``settings`` that differ noticeably from all of ``known`` and from one another."""
    kept: list[Tensor] = []
    for lam in settings:
        if all((lam - other).abs().max() > _NOTICEABLE for other in [*known, *kept]):
            kept.append(lam)
    return kept
