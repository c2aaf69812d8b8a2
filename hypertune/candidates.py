"""Which settings are verified: the tuned one, what is on the way to it, the estimator's own, and what is better beyond these.

λ̂ need not be where a retrained model is best. In fits that are far from converged the weights keep what they learned under an
earlier λ, and the gradient at the end of so short a run asks for too little regularisation (Wu et al. 2018, *Understanding
short-horizon bias in stochastic meta-optimization*). Retrained models show it, and stacked they cost little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypertune.objective import Objective
from hypertune.response import Fold
from hypertune.retraining import Retrained, retrain
from hypertune.space import Space

_NOTICEABLE = 0.01  # units of λ
_SMALL = 60_000  # weights of a setting's models on all folds: one more in the stack costs 3 to 10% of a search
_STRONGER = 1.5  # units of λ: 4.5 times each weight decay
_BEYOND = (0.5, 1.5, 2.0, 3.0)  # times as far from the tuned setting as one that is better


def distinct(tuned: Tensor, start: Tensor | None, current: Tensor) -> list[Tensor]:
    """Tuned, the middle, start, the estimator's own setting, each (n,); the second and third where they differ noticeably."""
    known = [tuned, current]
    between = [] if start is None else _unknown([(tuned + start) / 2, start], known)
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
    """Retrain what :func:`distinct` gave, if that can be stacked, and with ``more``, if the models are small, what may be better.

    That is the tuned setting with all logarithmic hyperparameters e^1.5 times as large. And where the tuned setting is not the
    best of all, those on the line from it through the one that is.

    Returns
    -------
    candidates : list of Tensor of shape (n,)
        The estimator's own is the last. They do not depend on ``watched``.
    retrained : list of Retrained
        Empty if they cannot be stacked, or if each fit is ``watched``: someone wants to see it happen.
    verified : tuple of Tensor of shape (C, n) and Tensor of shape (C,), or None
        λ of all that were retrained, and their validation losses, mean over folds.
    """
    more = more and objective.D * len(folds) <= _SMALL
    if watched and not more:
        return candidates, [], None
    tuned, tried, own = candidates[0], candidates[:-1] or candidates, candidates[1:][-1:]
    log = space.mask(lambda h: h.coordinate == "log")
    if more and log.any():
        tried = [*tried, *_unknown([_inside(tuned + _STRONGER * log, space)], candidates)]
    first = retrain(space, prefix, folds, objective, torch.stack([*tried, *own]))
    if first is None:
        return candidates, [], None
    retrained, losses = [first], first.validation_losses(folds)
    towards = first.lam[losses.argmin()] - tuned
    line = [_inside(tuned + times * towards, space) for times in _BEYOND]
    if more and (beyond := _unknown(line, [*tried, *own])):
        second = retrain(space, prefix, folds, objective, torch.stack(beyond))
        assert second is not None  # the first could be
        tried, retrained = [*tried, *beyond], [first, second]
        losses = torch.cat([losses, second.validation_losses(folds)])
    verified = torch.cat([r.lam for r in retrained]), losses
    return [*tried, *own], [] if watched else retrained, verified


def _inside(lam: Tensor, space: Space) -> Tensor:
    return torch.minimum(torch.maximum(lam, space.low), space.high)


def _unknown(new: list[Tensor], known: list[Tensor]) -> list[Tensor]:
    """Those of ``new`` that differ noticeably from all of ``known`` and from one another."""
    kept: list[Tensor] = []
    for lam in new:
        if all((lam - other).abs().max() > _NOTICEABLE for other in [*known, *kept]):
            kept.append(lam)
    return kept
