"""Which settings are verified: the tuned one, what is on the way to it, the estimator's own, and what may be better beyond these.

λ̂ need not be where a retrained model is best. In fits that are far from converged the weights keep what they learned under an
earlier λ, and λ̂ asks for too little regularisation: an effect like the short-horizon bias of step sizes (Wu et al. 2018,
*Understanding short-horizon bias in stochastic meta-optimization*). Retrained models show it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hypertune.retraining import Retrained, retrain
from hypertune.space import Space
from hypertune.task import Task

_NOTICEABLE = 0.01  # units of λ
_SMALL = 60_000  # multiplications for a row by a setting's models on all folds: one more in the stack costs 3 to 10% of a search
_STRONGER = 1.5  # units of λ: 4.5 times each weight decay
_WORTHWHILE = 0.02  # of the tuned setting's loss: so much better must another be to be followed
_ON_THE_LINE = (0.5, 1.5, 2.0, 3.0)  # times as far from the tuned setting as the best one
_OTHER_RATES = {"lr / 2": 0.5, "lr x 2": 2.0}


Candidates = dict[str, Tensor]  # by name, λ of each, (n,)


def distinct(tuned: Tensor, start: Tensor | None, current: Tensor | None) -> Candidates:
    """ "tuned"; "middle" and "start", if it was screened and where they differ noticeably; and the estimator's "own" setting, if it is given."""
    candidates = {"tuned": tuned}
    own = {} if current is None or torch.equal(tuned, current) else {"own": current}
    if start is not None:
        candidates |= _new({"middle": (tuned + start) / 2, "start": start}, [tuned, *own.values()])
    return candidates | own


def retrain_candidates(
    task: Task,
    candidates: Candidates,
    *,
    more: bool = True,
    watched: bool = False,
) -> tuple[Candidates, list[Retrained], tuple[Tensor, Tensor] | None]:
    """Retrain what :func:`distinct` gave, if that can be stacked; and with ``more``:

    1. of small models, "stronger": the tuned setting with all logarithmic hyperparameters e^1.5 times as large, which for penalties is so;
    2. of these, if one of all is better than the tuned setting by 2%: four settings on the line from that through the best, "tuned x 1.5" being
       half as far again, with the best one's learning rate;
    3. of these, if the learning rate is searched for: the best before 2. with half and with twice of it, "lr / 2" and "lr x 2", as far as
       its range goes;
    4. of others with BatchNorm: "stronger", from the best setting.

    The last three take a second stacked pass.

    Returns
    -------
    candidates : dict from str to Tensor of shape (n,)
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
    stronger, tuned, tried = _STRONGER * (space.log & ~space.rate), candidates["tuned"], dict(candidates)
    if more and small:
        tried |= _new({"stronger": space.clip(tuned + stronger)}, tried.values())
    first = retrain(task, torch.stack([*tried.values()]))
    if first is None:
        return candidates, [], None
    retrained, losses = [first], first.validation_losses(folds)
    best, further = [*tried.values()][int(losses.argmin())], {}
    if more and not small and losses.isfinite().any():
        further = {"stronger": best + stronger}
    elif more and losses[0] - losses.min() > _WORTHWHILE * losses[0].abs():
        begin = torch.where(space.rate, best, tuned)  # with the learning rate of the best
        away = torch.where(best == begin, 0.0, best - begin)
        further = {f"tuned x {times:g}": begin + times * away for times in _ON_THE_LINE}
    if more and small:
        further |= _with_other_rates(space, best)
    if further := _new({name: space.clip(lam) for name, lam in further.items()}, tried.values()):
        second = retrain(task, torch.stack([*further.values()]), seed=first.seed)
        if second is not None:
            tried, retrained = tried | further, [first, second]
            losses = torch.cat([losses, second.validation_losses(folds)])
    given = len(candidates)
    added = {
        name: lam for (name, lam), loss in zip([*tried.items()][given:], losses[given:], strict=True) if loss.isfinite()
    }
    # Added ones are not among them: they were chosen by their losses and lie on one line, which would bias how far the response is off.
    verified = torch.stack([*candidates.values()]), losses[:given]
    return candidates | added, [] if watched else retrained, verified


def _with_other_rates(space: Space, lam: Tensor) -> Candidates:
    """The same setting with half of its learning rate and with twice of it, if that is searched for."""
    params = space.decode(lam)
    return {
        name: space.encode(params | {h.name: factor * params[h.name]})
        for h in space.hyperparameters
        if h.is_rate
        for name, factor in _OTHER_RATES.items()
    }


def _new(settings: Candidates, known: Iterable[Tensor]) -> Candidates:
    """Those of ``settings`` that differ noticeably from all of ``known`` and from one another."""
    known, kept = list(known), Candidates()
    for name, lam in settings.items():
        if all(_distance(lam, other) > _NOTICEABLE for other in [*known, *kept.values()]):
            kept[name] = lam
    return kept


def _distance(lam: Tensor, other: Tensor) -> float:
    """The largest difference of a coordinate; those that are infinite alike (the logarithm of 0) do not differ."""
    return float(torch.where(lam == other, 0.0, lam - other).abs().max())
