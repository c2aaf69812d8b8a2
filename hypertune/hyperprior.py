"""How far the values of a finer grain may be from each other, chosen without test data (hyper-regularisation).

Thousands of hyperparameters overfit the validation rows, as weights overfit the training rows: Lorraine & Duvenaud (2018) leave
that as an open question. Their prior is N(mean of the group, scale²); its scale is chosen here as any hyperparameter is, by data
that those who depend on it have not seen.

    scale = choose_scale(tune, folds)                 # tune(folds, scale) -> BestResponse
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from hypertune.folds import Fold
from hypertune.response import BestResponse, validation_losses

SCALES = (0.5, 1.0, 2.0, 4.0)  # units of λ


def choose_scale(tune: Callable[[list[Fold], float], BestResponse], folds: list[Fold]) -> float:
    """The scale with the lowest loss on one half of every fold's validation rows, when λ̂ is tuned on the other half.

    Between two scales it is the vertex of the parabola through the best and its neighbours, over log scale.

    Parameters
    ----------
    tune : callable ``(folds, scale) -> BestResponse``
        A whole hyper-training.
    folds : list of Fold
    """
    if min(len(fold.valid.x) for fold in folds) < 2:
        raise ValueError(
            "grain_scale='auto' compares settings on halves of each fold's validation rows, and a fold has one row; give a number."
        )
    first, second = zip(*(_halves(fold) for fold in folds), strict=True)
    losses = []
    for scale in SCALES:
        response = tune(list(first), scale)
        tuned = response.space.encode(response.params)[None]
        losses.append(float(validation_losses(response.hypernetwork, response.objective, second, tuned).mean()))
    return math.exp(vertex(np.log(SCALES), np.array(losses)))


def _halves(fold: Fold) -> tuple[Fold, Fold]:
    """The same fold twice, each with half of its validation rows; a draw that is the same every time."""
    order = torch.randperm(len(fold.valid.x), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    a, b = (replace(fold, valid=fold.valid.take(rows)) for rows in order.tensor_split(2))
    return a, b


def vertex(x: np.ndarray, y: np.ndarray) -> float:
    """Where the parabola through the least of y and its two neighbours is least; the least itself at either end.

    ``x`` must be evenly spaced.
    """
    best = int(np.argmin(y))
    if not 0 < best < len(x) - 1:
        return float(x[best])
    before, here, after = y[best - 1 : best + 2]
    return float(x[best] + 0.5 * (x[1] - x[0]) * (before - after) / max(before - 2 * here + after, 1e-300))
