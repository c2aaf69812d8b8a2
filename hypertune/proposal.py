"""What a search proposes: from what it trains to the settings that are verified.

A learning rate is tried first, then settings to start from; λ̂ is hyper-trained, with a prior whose scale may be chosen before, and again where
nothing but a constant prediction was left; what may be better beside it is retrained; and all settings get names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from hypertune.candidates import differ, distinct, retrain_candidates
from hypertune.folds import Fold
from hypertune.hyperprior import choose_scale
from hypertune.net import Known
from hypertune.response import BestResponse
from hypertune.starts import Tried, out_of_corners, restarts, screen, screen_rate
from hypertune.task import Task

Tune = Callable[..., tuple[BestResponse, dict[str, Any]]]  # a hyper-training of a task: its response and its history
EndEpoch = Callable[..., bool]


class Chosen(NamedTuple):
    """What is trained, with the best values of whatever has a list of them.

    ``values`` are these values by name, and ``own`` the whole setting of the estimator, where these are not its own values, or else None. ``tried`` are the short
    trainings with its own values, if there were any.
    """

    task: Task
    values: dict[str, Any]
    own: dict[str, Any] | None
    tried: Tried | None


class Proposal(NamedTuple):
    """Settings to verify, by name; the response and the history of the hyper-training; and who knows weights of these settings already."""

    settings: dict[str, dict[str, Any]]
    response: BestResponse
    history: dict[str, Any]
    known: list[Known]


def propose(
    chosen: Chosen,
    tuner: Callable[[Tensor], Tune],
    showing: Callable[[], AbstractContextManager[EndEpoch]],
    *,
    epochs: int,
    screened: bool,
    learned_everywhere: bool,
    retrains: bool,
    grain_scale: float | str | None,
    watched: bool,
    ours: bool,
    prefix: str,
) -> Proposal:
    """Hyper-train, and name what is to be verified.

    Parameters
    ----------
    chosen : Chosen
    tuner : callable
        From where λ̂ starts (n,) to the hyper-training.
    showing : callable
        What shows the epochs of that to callbacks: a context that yields what ends one.
    epochs : int
        How long that is; where it was shorter, a callback has stopped it.
    screened : bool
        Whether to try more than the estimator's own setting: where to start, to begin again, and what may be better beside λ̂.
    learned_everywhere : bool
        Whether the response is learned all over the space, so that it needs no start.
    retrains : bool
        Whether settings are retrained; else there is the tuned one alone.
    grain_scale : float, "auto" or None
    watched, ours : bool
        As for :func:`hypertune.candidates.retrain_candidates`.
    prefix : str
        What precedes the net's own parameter names.
    """
    whole, values, own, tried = chosen
    rated = screen_rate(whole, None if own else tried)  # λ, with the learning rate
    task = whole.with_rate(rated)
    start = screen(task) if screened and not learned_everywhere else None
    begin = out_of_corners(task.space, task.current if start is None else start)
    tune = tuner(begin)
    if isinstance(grain_scale, str):
        grain_scale = _scale_of(task, tune)
    with showing() as end_epoch:
        response, history = tune(task, grain_scale=grain_scale, end_epoch=end_epoch)
    stopped = history["epoch"][-1] < epochs
    for again in restarts(task.space, begin):
        if not screened or stopped or not response.is_constant():
            break
        response, history = tune(task, start=again, grain_scale=grain_scale)
    rate = {h.name: whole.space.decode(rated)[h.name] for h in whole.space.hyperparameters if h.is_rate}
    history = history | {"grain_scale": grain_scale} | rate
    if not retrains:
        return Proposal({"tuned": response.params}, response, history, [response])

    tuned = whole.insert_rate(task.space.encode(response.params), rated)
    start = None if start is None else whole.insert_rate(start, rated)
    candidates = distinct(tuned, start, whole.current if own is None else None)
    found = retrain_candidates(whole, candidates, more=screened, watched=watched, ours=ours, ranked=own is not None)
    if found.verified is not None:  # the response is of one learning rate
        lam, losses = found.verified
        same = (lam == rated)[:, whole.space.rate].all(dim=1)
        response = replace(response, verified=(lam[same][:, ~whole.space.rate], losses[same]))
    of_the_net = {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}
    known: list[Known] = [replace(one, chosen=of_the_net) for one in found.retrained]
    settings = {name: values | whole.space.decode(lam) for name, lam in found.candidates.items()}
    if own is not None:
        settings |= _with_own_values(chosen, found.best, own) | {"own": own}
    return Proposal(settings, response, history, known)


def _scale_of(task: Task, tune: Tune) -> float | None:
    """The scale of the prior that validation rows ask for which λ̂ was not tuned on; None if there is nothing to hold together."""

    def of_folds(some: list[Fold], scale: float) -> BestResponse:
        return tune(task._replace(folds=some), grain_scale=scale)[0]

    held = task.space.mask(lambda h: h.size > 1 and h.grain != "row").any()
    return choose_scale(of_folds, task.folds) if held else None


def _with_own_values(chosen: Chosen, best: Tensor, own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The best setting with the estimator's own values, and the learning rate that was best with them; nothing where that is hardly another than its own."""
    whole, _, _, tried = chosen
    if tried is None or not tried.losses.isfinite().all() or any(h.grain for h in whole.space.hyperparameters):
        return {}
    best = whole.insert_rate(best[~whole.space.rate], screen_rate(whole, tried))
    if not differ(best, whole.space.encode({name: own[name] for name in whole.space.names})):
        return {}
    return {"own values": own | whole.space.decode(best)}
