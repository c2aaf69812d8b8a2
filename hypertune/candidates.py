"""Which settings are verified: the tuned one, what is on the way to it, the estimator's own, and what may be better beyond these.

λ̂ need not be where a retrained model is best. In fits that are far from converged the weights keep what they learned under an
earlier λ, and λ̂ asks for too little regularisation: an effect like the short-horizon bias of step sizes (Wu et al. 2018,
*Understanding short-horizon bias in stochastic meta-optimization*). Retrained models show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hypertune.retraining import Retrained, retrain
from hypertune.space import Hyperparameter, Space
from hypertune.task import Task

_NOTICEABLE = 0.01  # units of λ
_SMALL = 60_000  # multiplications for a row by a setting's models on all folds: one more in the stack costs 3 to 10% of a search
_STRONGER = 1.5  # units of λ: 4.5 times each weight decay
_WORTHWHILE = 0.02  # of the tuned setting's loss: so much better must another be to be followed
_ON_THE_LINE = (0.5, 1.5, 2.0, 3.0)  # times as far from the tuned setting as the best one
_NOISIER, _MORE_NOISE = ("noisier", "noisier x 2", "noisier x 3"), 0.2  # of the way up to the bounds
_SHORT = 1_200  # training steps
_ALWAYS = ("tuned", "own")
_OTHER_RATES = {"lr / 2": 0.5, "lr x 2": 2.0}


Candidates = dict[str, Tensor]  # by name, λ of each, (n,)


class Verification(NamedTuple):
    """What :func:`retrain_candidates` found.

    ``candidates`` are what it was given, and then what was added and did not diverge. ``best`` (n,) is the one of the least validation loss if a bit more had been
    seen (:meth:`hypertune.retraining.Retrained.cautious_losses`), or "tuned" where that is not known. No ``candidates`` and, if they are ranked, no ``best`` depends on
    who watches. ``retrained`` is empty where they cannot be stacked. ``verified`` are λ (C, n) of what was given, and the validation losses (C,), means over folds.
    """

    candidates: Candidates
    best: Tensor
    retrained: list[Retrained]
    verified: tuple[Tensor, Tensor] | None


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
    ours: bool = True,
    ranked: bool = False,
) -> Verification:
    """Retrain what :func:`distinct` gave, if that can be stacked; and with ``more``:

    1. of small models, "stronger": the tuned setting with all logarithmic hyperparameters e^1.5 times as large, which for penalties is so;
    2. of these, if one of all is better than the tuned setting by 2%: four settings on the line from that through the best, "tuned x 1.5" being
       half as far again, with the best one's learning rate;
    3. of these, if the learning rate is searched for: the best before 2. with half and with twice of it, "lr / 2" and "lr x 2", as far as
       its range goes;
    4. of others with BatchNorm: "stronger", from the best setting;
    5. of others without, if fits are short (fewer than 1,200 steps, those on all folds together): "noisier", from the best setting, with all strengths of
       noise that have a linear range a fifth of the way up to their bounds, as long as the best one's training loss, noise, penalties and all, ended below its validation loss; "noisier x 2"
       and "noisier x 3" from there.

    2. and 3. are a second stacked pass, 4. is one, and 5. one for each. With ``more`` or ``ranked``, settings whose validation loss is below that of the best are left out, but for "tuned" and "own":
    they are the better by luck, and who chooses by that loss would take them.

    Where each fit is ``watched`` someone wants to see it happen: they are retrained here only where there is more to find, or they must be ``ranked``, and
    what comes out is not known to the fits. Nor is it to those of a net that is not ``ours``: then there are 1. to 3. alone, and left of all settings are "tuned",
    "own" and the best, since each costs a fit on every fold.
    """
    space, folds, objective, *_ = task
    small, noise = objective.cost * len(folds) <= _SMALL, _noise(task)
    more = more and (small or (ours and (objective.has_statistics or bool(noise.any() and _is_short(task)))))
    unverified = Verification(candidates, candidates["tuned"], [], None)
    if (watched or not ours) and not more and not ranked:
        return unverified
    stronger, found = _STRONGER * (space.log & ~space.rate), _Verified(task)
    first = dict(candidates)
    if more and small:
        first |= _new({"stronger": space.clip(first["tuned"] + stronger)}, first.values())
    if not found.retrain(first):
        return unverified
    if more and small:
        found.add(_on_the_line(space, found) | _with_other_rates(space, found.best))
    elif more and objective.has_statistics and found.losses.isfinite().any():
        found.add({"stronger": found.best + stronger})
    elif more and not objective.has_statistics:
        for name in _NOISIER:
            if not found.overfits:
                break
            found.add({name: torch.where(noise, torch.lerp(found.best, space.high, _MORE_NOISE), found.best)})
    given = len(candidates)
    added = zip([*found.tried.items()][given:], found.losses[given:], strict=True)
    # Added ones are not verified: they were chosen by their losses and lie on one line, which would bias how far the response is off.
    verified = torch.stack([*candidates.values()]), found.losses[:given]
    candidates = candidates | {name: lam for (name, lam), loss in added if loss.isfinite()}
    left_out = found.lucky if more or ranked else set()  # else nobody knows of them who is watched
    if not ours:
        left_out = {name for name, lam in candidates.items() if not torch.equal(lam, found.best)}
    candidates = {name: lam for name, lam in candidates.items() if name in _ALWAYS or name not in left_out}
    return Verification(candidates, found.best, [] if watched else found.retrained, verified)


class _Verified:
    """What has been retrained, pass after pass and all from one seed: settings by their names, and their losses, means over folds.

    ``losses`` (C,) are those of validation, and ``fitted`` (C,) those of training in the last epoch, noise, penalties and all.
    """

    def __init__(self, task: Task):
        self.task = task
        self.tried, self.retrained = Candidates(), list[Retrained]()
        self.losses = self._cautious = self.fitted = torch.empty(0, device="cpu")

    def add(self, settings: Candidates) -> bool:
        """Retrain what of them is new, moved inside the bounds; says whether there was any, and it could be stacked."""
        new = _new({name: self.task.space.clip(lam) for name, lam in settings.items()}, self.tried.values())
        return bool(new) and self.retrain(new)

    def retrain(self, settings: Candidates) -> bool:
        """Says whether they could be stacked."""
        seed = self.retrained[0].seed if self.retrained else None
        if (one := retrain(self.task, torch.stack([*settings.values()]), seed=seed)) is None:
            return False
        self.tried |= settings
        self.retrained.append(one)
        self.losses = torch.cat([self.losses, one.validation_losses(self.task.folds)])
        self._cautious = torch.cat([self._cautious, one.cautious_losses(self.task.folds)])
        self.fitted = torch.cat([self.fitted, one.curves[:, :, -1].mean(dim=0)])
        return True

    @property
    def cautious(self) -> Tensor:
        """Losses (C,) by which the best is chosen: of validation, as if a bit more had been seen; as they are where a model rules out labels, so that these are infinite."""
        ruled_out = self.losses.isfinite() & ~self._cautious.isfinite()
        return self.losses if ruled_out.any() else self._cautious

    @property
    def best(self) -> Tensor:
        return [*self.tried.values()][int(self.cautious.argmin())]

    @property
    def lucky(self) -> set[str]:
        """The names of those whose validation loss is below the best one's."""
        best = self.losses[int(self.cautious.argmin())]
        return {name for name, loss in zip(self.tried, self.losses, strict=True) if loss < best}

    @property
    def overfits(self) -> bool:
        """Whether the best setting's training loss is below its validation loss."""
        best = int(self.cautious.argmin())
        return bool(self.losses[best].isfinite() and self.fitted[best] < self.losses[best])


def _on_the_line(space: Space, found: _Verified) -> Candidates:
    """Through the best setting from the tuned one, which is the first, if it is noticeably better; with the best one's learning rate."""
    tuned, *_ = found.tried.values()
    if not found.cautious[0] - found.cautious.min() > _WORTHWHILE * found.cautious[0].abs():
        return {}
    begin = torch.where(space.rate, found.best, tuned)
    away = torch.where(found.best == begin, 0.0, found.best - begin)
    return {f"tuned x {times:g}": begin + times * away for times in _ON_THE_LINE}


def _noise(task: Task) -> Tensor:
    """Which coordinates are strengths of noise, 0 or more and with an upper bound, on an axis that is not logarithmic: (n,) booleans."""
    net = task.folds[0].net

    def is_noise(h: Hyperparameter) -> bool:
        inside = h.own.partition("__")[0] in ("module", "augment")
        drawn = inside or net.loss_names.get(h.own) in ("input_noise", "mixup")
        return drawn and h.coordinate == "linear" and math.isfinite(h.high) and h.support[0] >= 0

    return task.space.mask(is_noise)


def _is_short(task: Task) -> bool:
    """Whether a fit on every fold is short. Then λ̂ has few steps to get away from the estimator's own noise, often none, and fits cost little."""
    net = task.folds[0].net
    return sum(net.max_epochs * math.ceil(len(fold.train.x) / net.batch_size) for fold in task.folds) < _SHORT


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
        if all(differ(lam, other) for other in [*known, *kept.values()]):
            kept[name] = lam
    return kept


def differ(lam: Tensor, other: Tensor) -> bool:
    """Whether a coordinate differs noticeably; those that are infinite alike (the logarithm of 0) do not."""
    return float(torch.where(lam == other, 0.0, lam - other).abs().max()) > _NOTICEABLE
