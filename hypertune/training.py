"""Hyper-training of a torch estimator on K folds: the parts put together.

Rows and minibatches, the stacked objective, a hypernetwork, one of the algorithms and their optimizers. This room owns the
loop; the mathematics is in :mod:`hypertune.algorithms`.

    space, objective = stack(space, folds, n_rows, seed)
    response, history = hyper_train(Task(space, folds, objective, current, seed), start, algorithm="joint", ...)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hypertune.algorithms import Problem, Step, settle
from hypertune.batches import Minibatches
from hypertune.descent import Descent
from hypertune.hypergradients import Description
from hypertune.hypernetworks import Builder, Hypernetwork
from hypertune.losses import nats_per_unit
from hypertune.objective import Objective
from hypertune.problem import COSTLY, differentiable, layout_of, make_problem
from hypertune.randomness import isolated
from hypertune.recipes import Recipe, choose, stream
from hypertune.response import BestResponse
from hypertune.stacked import flat_weights
from hypertune.task import Task
from hypertune.trace import Trace

_MOST_INITS = 3
_FULL_PACE = 1_200  # training steps: in longer runs λ̂ is the slower, since the weights need the longer to respond
_SETTLING = 50  # minibatches after which BatchNorm has forgotten what it was before
_SIMPLIFIED_OFFSET = 2.0  # units of λ between λ̂'s start and the centre in "simplified"


def hyper_train(
    task: Task,
    start: Tensor,
    *,
    algorithm: str | Description,
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
    progress: bool,
    end_epoch: Callable[[], bool] = lambda: False,
) -> tuple[BestResponse, dict[str, Any]]:
    """Run one of the algorithms from λ̂ = ``start`` (n,); the other parameters are those of ``HyperTrainingSearchCV``.

    ``end_epoch`` is called after every pass through the training rows, and ends the run by answering True.

    Returns
    -------
    response : BestResponse
        ``response.params`` is the tuned setting.
    history : dict from str to ndarray
        "algorithm" (a string: which one, and why), and one entry per record: step, seconds, epoch, train_loss, validation_loss and each
        hyperparameter (one column for each of its values, if it has a grain).

    Raises
    ------
    ValueError
        If the loss is no longer finite (naming step and λ̂), or the module has no second derivative and the algorithm needs one.
    """
    begin, (space, folds, objective, _, seed) = time.perf_counter(), task
    net = folds[0].net
    with isolated(seed, net.device):  # a penalty may draw
        recipe = choose(
            algorithm, space, differentiable(space, objective),
            scale=scale, n_samples=n_samples, response_optimizer=response_optimizer,
        )  # fmt: skip
    with isolated(seed, net.device):
        run = _begin(task, start, recipe, hypernetwork, n_inits)
        per_epoch = run.train_batches.steps_per_epoch
        steps = max_epochs * per_epoch
        first, every = recipe.first_move(steps, warmup), recipe.every
        # λ̂ moves once in `every` steps, and as far as if it did in all of them; in a long run no further than in a shorter one.
        descent = Descent(
            run.lam_hat, space, lr=every * hyper_lr * min(1.0, _FULL_PACE / steps), eps=hyper_eps, grain_scale=grain_scale,
            decay=every / max(steps - first, 1) if hyper_lr_schedule == "linear" else 0.0,
            n_valid=sum(len(fold.valid.x) for fold in folds),
        )  # fmt: skip
        taken = stream(
            recipe, run.problem, run.phi, run.lam_hat, recipe.phi_optimizer(net, run.phi, steps), descent,
            steps=steps, warmup=warmup, seed=seed,
        )  # fmt: skip
        trace = Trace(
            task._replace(objective=run.objective), run.phi, run.lam_hat,
            begin=begin, steps=steps, per_epoch=per_epoch, averaged_from=max(first, (1 - averaging) * steps),
        )  # fmt: skip
        worth = partial(nats_per_unit, run.objective.loss, outputs=getattr(net, "n_outputs_", 1))
        try:
            stopped = _follow(islice(taken, steps), trace, descent, worth, progress, end_epoch)
        except NotImplementedError as error:
            if not str(error).startswith("the derivative for '"):
                raise
            raise ValueError(
                f"{recipe.name!r} differentiates the training loss twice, and the module cannot be: {error} algorithm='joint' "
                "differentiates it once."
            ) from error
        if not trace.moves and not stopped:
            warnings.warn(
                f"The hyperparameters did not move: {recipe.name!r} moves them once in {every} steps after the first {first}, and "
                f"there were {steps}. Give it a larger max_epochs or a smaller batch_size.",
                UserWarning,
                stacklevel=2,
            )
        memories = list(run.objective.memories)
        for _ in range(_SETTLING if run.objective.has_statistics else 0):  # running statistics at the tuned setting
            settle(run.problem, run.phi, trace.average(), next(run.train_batches))
        run.objective.memories = memories  # these were no steps of the training
    return _response(task, run, trace, recipe.sigma), {
        "algorithm": f"{recipe.name}: {recipe.reason}",
        **trace.arrays(),
    }


class _Run(NamedTuple):
    """What changes in a run: λ̂ (n,), the hypernetworks of all models, the data order and the state beside the weights."""

    objective: Objective
    problem: Problem
    train_batches: Minibatches
    phi: Hypernetwork
    lam_hat: Tensor


def _begin(task: Task, start: Tensor, recipe: Recipe, hypernetwork: Builder, n_inits: int | None) -> _Run:
    """K folds times the number of initial weights, each with its own minibatches, and a hypernetwork around each."""
    space, folds, objective, _, seed = task
    net, K = folds[0].net, len(folds)
    if n_inits is None:
        several = objective.stacked and not recipe.implicit.any()
        n_inits = min(_MOST_INITS, COSTLY // (K * objective.cost)) if several else 1
    models = folds * max(n_inits, 1)
    w0 = torch.stack([flat_weights(fold.net._build_module()) for fold in models])
    lam_hat = start.to(w0, copy=True)
    objective = objective.with_statistics_of(len(models), 1)
    # Each of a fold's initial weights has minibatches of its own.
    seeds = [seed + 2 * (i // K) for i in range(len(models))]
    train_batches = Minibatches([fold.train for fold in models], net.batch_size, seed=seeds)
    problem = make_problem(space, objective, models, train_batches, seeds, w0)
    center = lam_hat.clone() if recipe.name in ("global", "simplified") else lam_hat
    if recipe.name == "simplified":  # with V = 0 at a distance from λ̂, larger λ begins by meaning: closer to w₀
        center = center + _SIMPLIFIED_OFFSET  # maybe out of the box: it is no setting
    phi = recipe.builder(hypernetwork).build(w0, center, layout_of(space, net, objective, folds[0].train.x))
    return _Run(objective, problem, train_batches, phi, lam_hat)


def _follow(
    taken: Iterable[Step],
    trace: Trace,
    descent: Descent,
    worth: Callable[[Tensor], Tensor],
    progress: bool,
    end_epoch: Callable[[], bool],
) -> bool:
    """Take the steps, and record them; says whether ``end_epoch`` ended them early."""
    stop = False
    with tqdm(total=trace.steps, desc="hyper-training", unit="step", disable=not progress, leave=False) as bar:
        for number, step in enumerate(taken, start=1):
            if step.valid_loss is not None:
                descent.nats_per_unit = worth(step.valid_loss)
            trace.see(number, step)
            stop = number % trace.per_epoch == 0 and end_epoch()
            if trace.is_due(number) or stop:
                trace.record(number)
                bar.update(number - bar.n)
                bar.set_postfix(validation_loss=f"{trace.rows[-1]['validation_loss']:.4g}")
            if stop:
                break
    return stop


def _response(task: Task, run: _Run, trace: Trace, sigma: Tensor | None) -> BestResponse:
    """What is kept of a run: one model of each fold, without its training rows."""
    space, folds, _, _, seed = task
    phi, objective, K = run.phi, run.objective, len(folds)
    phi.keep(K)  # the other initial weights have done their part
    objective.memories = objective.final_memories()
    objective.forget_statistics_but_of(K)
    phi.center = phi.center.detach().clone()
    phi.zero_grad()
    phi.requires_grad_(False)
    return BestResponse(
        space, space.decode(trace.average()), phi, objective, [fold.without_training_rows() for fold in folds],
        hypergradient=trace.slope.cpu(), sigma=sigma if phi.linear else None, seed=seed,
    )  # fmt: skip
