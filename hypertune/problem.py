"""From λ to losses: the bilevel problem of a search's space, objective and folds, as :mod:`hypertune.algorithms` takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypertune.algorithms import Problem
from hypertune.batches import Batch, Minibatches
from hypertune.folds import Fold
from hypertune.hypernetworks import Layout
from hypertune.net import Net
from hypertune.objective import Objective
from hypertune.space import Hyperparameter, Space

COSTLY = 75_000  # multiplications for a row; beyond it each row costs, and another copy of the model as much as alone
_VALID_BATCH, _FEWER_VALID = 256, 128  # rows of a step of λ̂; fewer where each costs


def make_problem(
    space: Space,
    objective: Objective,
    folds: list[Fold],
    train_batches: Minibatches,
    seeds: Sequence[int],
    like: Tensor,
) -> Problem:
    """Losses, minibatches and bounds of λ, of one model for each of ``folds`` (repeated for several initial weights)."""
    valid_rows = max(folds[0].net.batch_size, _FEWER_VALID if objective.cost > COSTLY else _VALID_BATCH)
    valid_batches = Minibatches([fold.valid for fold in folds], valid_rows, seed=[seed + 1 for seed in seeds])

    train_loss = make_train_loss(space, objective, folds[0].net, train_batches)

    def keep(w: Tensor, lam: Tensor, batch: Batch) -> None:
        train_loss(w, lam, batch, keep_statistics=True)

    def valid_loss(w: Tensor, batch: Batch) -> Tensor:
        return objective.valid_loss(w[:, 0], batch)[:, None]

    low, high = space.low.to(like), space.high.to(like)
    return Problem(
        train_loss,
        valid_loss,
        train_batches,
        valid_batches,
        low,
        high,
        keep if objective.has_statistics or objective.memories else None,
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
        for name, v in space.values(lam.repeat(K, 1)).items():
            if names[name] == "sample_weight":
                v = v[: len(lam)]
            values[names[name]] = objective.by_parameter(arranged[name], v) if name in arranged else v
        return values

    return values_of


def layout_of(space: Space, net: Net, objective: Objective, x: Tensor) -> Layout:
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


def differentiable(space: Space, objective: Objective) -> Tensor:
    """Which coordinates of λ the training loss is differentiable in, (n,) booleans: not numbers inside the module."""

    def is_differentiable(h: Hyperparameter) -> bool:
        owner, _, keyword = h.own.partition("__")
        return objective.penalty_follows(keyword) if owner == "penalty" else owner not in ("module", "augment")

    return space.mask(is_differentiable)
