"""Hyper-training of a torch estimator on K folds: the parts put together.

Rows and minibatches, the stacked objective, a hypernetwork, one of the algorithms and their optimizers. This room owns the
loop, the clock and the trace; the mathematics is in :mod:`hypertune.algorithms`.

    space, objective = stack(space, folds, n_rows, seed)
    response, history = hyper_train(space, folds, objective, start, algorithm="joint", ...)
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from hypertune.algorithms import Problem, Step, settle
from hypertune.batches import Batch, Minibatches
from hypertune.descent import Descent
from hypertune.folds import Fold
from hypertune.hypergradients import Description
from hypertune.hypernetworks import Builder, Hypernetwork, Layout
from hypertune.losses import nats_per_unit
from hypertune.net import Net
from hypertune.objective import NO_NOISE, Objective
from hypertune.randomness import isolated
from hypertune.recipes import choose, phi_optimizer, stream
from hypertune.response import BestResponse, validation_losses
from hypertune.space import OUTER, Hyperparameter, Space
from hypertune.stacked import flat_weights
from hypertune.tunable import arrangements, check_reach, find_reaches

_VALID_BATCH, _FEWER_VALID = 256, 128  # rows of a step of λ̂; fewer where each costs
_MOST_INITS = 3
_COSTLY = (
    75_000  # multiplications for a row: beyond it each row costs, and another copy of the model what it would alone
)
_FULL_PACE = 1_200  # training steps: in longer runs λ̂ is the slower, since the weights need the longer to respond
_RECORDS = 50
_RECORDED_ROWS, _FEWER_RECORDED = 1_000, 256  # of each fold's validation rows; fewer where each costs
_RECORDED_VALUES = 10_000_000  # of one hyperparameter in all records; of more, a draw of 1,000 in each
_LOOKED_AT = 16  # rows, to see what a keyword does
_SETTLING = 50  # minibatches after which BatchNorm has forgotten what it was before
_SIMPLIFIED_OFFSET = 2.0  # units of λ between λ̂'s start and the centre in "simplified"


def hyper_train(
    space: Space,
    folds: list[Fold],
    objective: Objective,
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
    seed: int,
    progress: bool,
    end_epoch: Callable[[], bool] = lambda: False,
) -> tuple[BestResponse, dict[str, Any]]:
    """Run one of the algorithms; the parameters are those of ``HyperTrainingSearchCV``.

    ``space`` and ``objective`` are what :func:`stack` returns, and λ̂ starts at ``start`` (n,).
    ``end_epoch`` is called after every pass through the training rows, and ends the run by answering True.

    Returns
    -------
    response : BestResponse
        ``response.params`` is the tuned setting.
    history : dict from str to ndarray
        "algorithm" (a string: which one, and why), and one entry per record: step, seconds, epoch, train_loss, validation_loss and each hyperparameter (one column for each
        of its values, if it has a grain).

    Raises
    ------
    ValueError
        If the loss is no longer finite (naming step and λ̂).
    """
    begin = time.perf_counter()
    net, K = folds[0].net, len(folds)
    with isolated(seed, net.device):  # a penalty may draw
        recipe = choose(algorithm, space, _differentiable(space, objective))
    with isolated(seed, net.device):
        if n_inits is None:
            several = objective.stacked and not recipe.implicit.any()
            n_inits = min(_MOST_INITS, _COSTLY // (K * objective.cost)) if several else 1
        models = folds * max(n_inits, 1)
        w0 = torch.stack([flat_weights(fold.net._build_module()) for fold in models])
        lam_hat = start.to(w0, copy=True)
        objective = objective.with_statistics_of(len(models), 1)
        # Each of a fold's initial weights has minibatches of its own.
        seeds = [seed + 2 * (i // K) for i in range(len(models))]
        train_batches = Minibatches([fold.train for fold in models], net.batch_size, seed=seeds)
        problem = _problem(space, objective, models, train_batches, seeds, w0)
        center = lam_hat.clone() if recipe.name in ("global", "simplified") else lam_hat
        if recipe.name == "simplified":  # with V = 0 at a distance from λ̂, larger λ begins by meaning: closer to w₀
            center = center + _SIMPLIFIED_OFFSET  # maybe out of the box: it is no setting
        phi = recipe.builder(hypernetwork).build(w0, center, _layout(space, net, objective, folds[0].train.x))
        del w0  # large models have no memory for two

        per_epoch = train_batches.steps_per_epoch
        steps = max_epochs * per_epoch
        phi_steps = recipe.phi_steps(steps)
        first = phi_steps if phi_steps < steps else int(warmup * steps)
        optimizer, phi_schedules = phi_optimizer(net, phi, response_optimizer, phi_steps)
        if recipe.newton:  # the weights are not moved by their optimizer
            phi_schedules = []
        every = recipe.every(response_optimizer)
        # λ̂ moves once in `every` steps, and as far as if it did in all of them; in a long run no further than in a shorter one.
        descent = Descent(
            lam_hat, space, lr=every * hyper_lr * min(1.0, _FULL_PACE / steps), eps=hyper_eps, grain_scale=grain_scale,
            n_valid=sum(len(fold.valid.x) for fold in folds),
        )  # fmt: skip
        decay = every / max(steps - first, 1) if hyper_lr_schedule == "linear" else 0.0
        lam_schedule = LambdaLR(descent, lambda t: max(0.0, 1 - decay * t))
        run = stream(
            recipe, problem, phi, lam_hat, optimizer, descent, space,
            scale=scale, m=n_samples, warmup=first, every=every, phi_steps=phi_steps, seed=seed,
        )  # fmt: skip

        recorded = max(1, min(per_epoch, steps // _RECORDS))
        trace = _Trace(
            space, phi, objective, folds, lam_hat, begin, per_epoch,
            averaged_from=max(first, (1 - averaging) * steps), n_records=steps / recorded,
        )  # fmt: skip
        with tqdm(total=steps, desc="hyper-training", unit="step", disable=not progress, leave=False) as bar:
            for number, step in enumerate(islice(run, steps), start=1):
                for schedule in phi_schedules if step.train_loss is not None else ():
                    schedule.step()
                if step.valid_loss is not None:
                    lam_schedule.step()
                    descent.nats_per_unit = nats_per_unit(
                        objective.loss, step.valid_loss, getattr(net, "n_outputs_", 1)
                    )
                trace.see(number, step)
                stop = number % per_epoch == 0 and end_epoch()
                if number % recorded == 0 or number == steps or stop:
                    trace.record(number)
                    bar.update(number - bar.n)
                    bar.set_postfix(validation_loss=f"{trace.rows[-1]['validation_loss']:.4g}")
                if stop:
                    break
        average = trace.average()
        if not trace.moves and not stop:
            warnings.warn(
                f"The hyperparameters did not move: {recipe.name!r} moves them once in {every} steps after the first {first}, and "
                f"there were {number}. Give it a larger max_epochs or a smaller batch_size.",
                UserWarning,
                stacklevel=2,
            )
        for _ in range(_SETTLING if objective.has_statistics else 0):  # running statistics at the tuned setting
            settle(problem, phi, average, next(train_batches))
    phi.keep(K)  # the other initial weights have done their part
    objective.forget_statistics_but_of(K)
    objective.remembered = objective.remembers()
    phi.center = phi.center.detach().clone()
    phi.zero_grad()
    phi.requires_grad_(False)
    response = BestResponse(
        space, space.decode(average), phi, objective, [fold.without_training_rows() for fold in folds],
        hypergradient=trace.slope.cpu(), sigma=recipe.sigma(scale) if phi.linear else None, seed=seed,
    )  # fmt: skip
    return response, {"algorithm": f"{recipe.name}: {recipe.reason}", **trace.arrays()}


def stack(space: Space, folds: list[Fold], n_rows: int, seed: int) -> tuple[Space, Objective]:
    """All folds in one objective, which has no weights of its own. Refuses what cannot be trained.

    ``n_rows`` is the length of the whole data, for hyperparameters of single rows.

    Returns
    -------
    space : Space
        With the arrangement of every hyperparameter that has a grain.
    objective : Objective

    Raises
    ------
    ValueError
        If a hyperparameter reaches nothing in the model, or is part of the prediction.
    """
    net = folds[0].net
    with isolated(seed, net.device):
        module = net._build_module()  # if it cannot be built as it is, that is not the hyperparameters' fault
        reaches = find_reaches(net, space)
        objective = net._make_objective(module, reach=reaches, folds=len(folds))
        x = folds[0].train.x[:2]  # of the validation rows there may be one
        net._check_outputs(objective, x)
        settings = net.get_params()
        for h in space.hyperparameters:
            own = h.own
            if own in reaches and objective.reads_in_eval_mode(x, own, h.prior.ppf([0.01, 0.99])):
                raise ValueError(
                    f"param_distributions[{h.name!r}]: the module reads it in eval mode, too. The gradient is that of a validation loss "
                    f"which depends on it through the weights alone, as on a dropout rate. Set it on the estimator, or give it to {OUTER}."
                )
            if own in reaches:
                check_reach(net, objective, folds[0].train.x[:_LOOKED_AT], h.name, own, h.prior.ppf([0.25, 0.75]), seed)
        objective.examine(x, {own: settings[own] for own in reaches})
        names = {h.name for h in space.hyperparameters if h.own in ("input_noise", "mixup")}
        if names and not objective.feels_noise:
            raise ValueError(f"param_distributions[{min(names)!r}]: it {NO_NOISE}")
    objective.forget_weights()
    return space.resolve(arrangements(net, objective, space, x, n_rows)), objective


def _layout(space: Space, net: Net, objective: Objective, x: Tensor) -> Layout:
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
    rows = space.mask(lambda h: h.grain == "row")
    return Layout(objective.units(), local, rows if rows.any() else None)


def _differentiable(space: Space, objective: Objective) -> Tensor:
    """Which coordinates of λ the training loss is differentiable in, (n,) booleans: not numbers inside the module."""

    def is_differentiable(h: Hyperparameter) -> bool:
        owner, _, keyword = h.own.partition("__")
        return objective.penalty_follows(keyword) if owner == "penalty" else owner not in ("module", "augment")

    return space.mask(is_differentiable)


def _problem(
    space: Space,
    objective: Objective,
    folds: list[Fold],
    train_batches: Minibatches,
    seeds: Sequence[int],
    like: Tensor,
) -> Problem:
    valid_rows = max(folds[0].net.batch_size, _FEWER_VALID if objective.cost > _COSTLY else _VALID_BATCH)
    valid_batches = Minibatches([fold.valid for fold in folds], valid_rows, seed=[seed + 1 for seed in seeds])

    train_loss = make_train_loss(space, objective, folds[0].net, train_batches)

    def keep(w: Tensor, lam: Tensor, batch: Batch) -> None:
        train_loss(w, lam, batch, keep_statistics=True)

    def valid_loss(w: Tensor, batch: Batch) -> Tensor:
        return objective.valid_loss(w[:, 0], batch)[:, None]

    low, high = space.low.to(like), space.high.to(like)
    return Problem(
        train_loss, valid_loss, train_batches, valid_batches, low, high, keep if objective.has_statistics else None
    )


def make_train_loss(space: Space, objective: Objective, net: Net, train_batches: Minibatches) -> Callable[..., Tensor]:
    """L_Train as a function of λ: ``(w (K, m, D), lam (m, n), batch of K × B rows) -> (K, m)``.

    ``train_batches`` is asked for the weights of single training rows, where these are hyperparameters.
    """
    values_of = make_values(space, objective, net)

    def train_loss(w: Tensor, lam: Tensor, batch: Batch, *, keep_statistics: bool = False) -> Tensor:
        K, m, _ = w.shape
        values, repeated = values_of(lam, K), batch.repeat(m)
        if "sample_weight" in values:
            repeated = repeated._replace(weight=train_batches.weighted(batch, values.pop("sample_weight")))
        loss = objective.train_loss(w.flatten(0, 1), values, repeated, keep_statistics=keep_statistics)
        return loss.view(K, m)

    return train_loss


def make_values(space: Space, objective: Objective, net: Net) -> Callable[[Tensor, int], dict[str, Any]]:
    """``(lam (m, n), K)`` → values by their names in the loss, as :meth:`Objective.train_loss` takes them for K × m models.

    Those of single rows are as they are in λ, (m, number of all rows).
    """
    names = {h.name: net.loss_names.get(h.own, h.own) for h in space.hyperparameters}
    arranged = {h.name: h.shape for h in space.hyperparameters if isinstance(h.shape, Mapping)}

    def values_of(lam: Tensor, K: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, v in space.values(lam).items():
            if K > 1 and names[name] != "sample_weight":
                v = v.repeat(K, *(1,) * (v.dim() - 1))
            values[names[name]] = objective.by_parameter(arranged[name], v) if name in arranged else v
        return values

    return values_of


class _Trace:
    """Collects ``history_``, one row per record, and the average of λ̂ over the last part of its path."""

    def __init__(
        self,
        space: Space,
        phi: Hypernetwork,
        objective: Objective,
        folds: Sequence[Fold],
        lam_hat: Tensor,
        begin: float,
        per_epoch: int,
        *,
        averaged_from: float,
        n_records: float,
    ):
        self.space, self.phi, self.objective = space, phi, objective
        self.lam_hat, self.begin, self.per_epoch = lam_hat, begin, per_epoch
        self.averaged_from, self._most_values = averaged_from, _RECORDED_VALUES / n_records
        rows = _FEWER_RECORDED if objective.cost > _COSTLY else _RECORDED_ROWS
        self._folds = [fold.with_fewer_valid(rows) for fold in folds]
        self.rows: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._sum, self._count = torch.zeros_like(lam_hat), 0
        self.slope, self.moves, self._averaged = torch.zeros_like(lam_hat), 0, 0

    def see(self, number: int, step: Step) -> None:
        if step.train_loss is not None:
            self._losses.append(step.train_loss)
        averaging = number > self.averaged_from
        if averaging:
            self._sum += self.lam_hat.detach()
            self._count += 1
        if step.valid_loss is not None:  # the last hypergradient, or the average over the last part of the path
            assert self.lam_hat.grad is not None
            self.moves += 1
            self._averaged += averaging
            self.slope.lerp_(self.lam_hat.grad, 1 / max(self._averaged, 1))

    def average(self) -> Tensor:
        return self._sum / self._count if self._count else self.lam_hat.detach()

    def record(self, number: int) -> None:
        train_loss = float(torch.stack(self._losses).mean()) if self._losses else self.rows[-1]["train_loss"]
        self._losses.clear()
        lam = self.lam_hat.detach().cpu().double()
        valid_loss = float(validation_losses(self.phi, self.objective, self._folds, lam[None]).mean())
        if not (math.isfinite(train_loss) and math.isfinite(valid_loss) and bool(lam.isfinite().all())):
            raise ValueError(
                f"Hyper-training diverged before step {number}: training loss {train_loss}, validation loss {valid_loss}, "
                f"λ̂ = {self.space.decode(lam)}. Lower the estimator's lr or the search's hyper_lr, or scale X."
            )
        self.rows.append(
            {
                "step": number,
                "seconds": time.perf_counter() - self.begin,
                "epoch": number / self.per_epoch,
                "train_loss": train_loss,
                "validation_loss": valid_loss,
                **{name: self._some(value.numpy()) for name, value in self.space.values(lam).items()},
            }
        )

    def _some(self, values: np.ndarray) -> np.ndarray:
        if values.size <= max(self._most_values, 1_000):
            return values
        return values[np.random.default_rng(0).choice(values.size, 1_000, replace=False)]

    def arrays(self) -> dict[str, np.ndarray]:
        return {key: np.array([row[key] for row in self.rows]) for key in self.rows[0]}
