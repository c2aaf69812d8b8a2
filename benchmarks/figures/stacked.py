"""Thousands of trainings of the linear model, with one weight decay for each class, and their losses without the images.

    w = train(data.train, lam, steps=500, batch_size=100, seed=0)       # λ (M, 10) → weights (M, D)
    SecondMoments.of(data.valid).mse(w)                                 # (M,)

The squared error is quadratic in the weights: with A = XᵀX/B, b_c = Xᵀy_c/B and t_c = ‖y_c‖²/B it is the mean over classes of
w_cᵀ A w_c − 2 b_c·w_c + t_c, at the cost of 785 images instead of 10,000.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.figures import linear

_STACK = 64  # models whose weights and Adam's two moments stay in the cache; larger stacks are no faster
_CHUNK = 256  # models that are evaluated together


def train(rows: linear.Rows, lam: Tensor, *, steps: int, batch_size: int, seed: int, lr: float = 1e-3) -> Tensor:
    """Train one model for each λ from scratch, all on the same minibatches: (M, 10) → (M, D).

    A minibatch (B, 785) multiplies the weights of a whole stack of m models, (785, 10 m).
    """
    stacks = [
        linear.from_scratch(linear.minibatches(rows, batch_size, seed), some, steps, seed=seed, lr=lr, decay=True)
        for some in lam.split(_STACK)
    ]
    return torch.cat(stacks)


class SecondMoments(NamedTuple):
    """All that the squared error needs of some images: A (785, 785), b (10, 785) and t (10,)."""

    A: Tensor
    b: Tensor
    t: Tensor

    @classmethod
    def of(cls, rows: linear.Rows) -> SecondMoments:
        """Summed in float64."""
        x, y = rows.x.double(), rows.y.double()
        return cls(x.T @ x / len(x), y.T @ x / len(x), y.square().mean(dim=0))

    def mse(self, w: Tensor) -> Tensor:
        """``linear.mse`` of weights (M, D) on those images, (M,)."""
        A, b, t = (moment.to(w.dtype) for moment in self)
        losses = []
        for some in w.view(-1, linear.CLASSES, linear.INPUTS).split(_CHUNK):
            losses.append(((some @ A - 2 * b) * some).sum(dim=2).add(t).mean(dim=1))
        return torch.cat(losses)

    def ridge(self, lam: Tensor) -> Tensor:
        """The exact solutions of the trainings, (M, 10) → (M, D): all from one eigendecomposition."""
        values, vectors = torch.linalg.eigh(self.A)
        shrunk = (self.b @ vectors) / (values.clamp(min=0) + lam.double().exp()[..., None])  # (M, 10, 785)
        return (shrunk.to(lam.dtype) @ vectors.T.to(lam.dtype)).flatten(1)
