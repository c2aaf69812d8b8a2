"""Rows and minibatches: K folds in step, one minibatch of B rows for each.

>>> import torch
>>> folds = [Rows(torch.zeros(3, 1), torch.zeros(3)), Rows(torch.ones(4, 1), torch.ones(4))]
>>> stream = Minibatches(folds, 2, seed=0)
>>> batch = next(stream)
>>> tuple(batch.x.shape), tuple(batch.y.shape)                                    # (K, B, features), (K, B)
((2, 2, 1), (2, 2))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The rows of one fold: ``x`` (N, ...), ``y`` (N,) or (N, outputs), and the rows' weights (N,) or None."""

    x: Tensor
    y: Tensor
    weight: Tensor | None = None


class Batch(NamedTuple):
    """Rows for M models: ``x`` (M, B, ...), ``y`` (M, B) or (M, B, outputs), ``weight`` (M, B) of mean one, or None."""

    x: Tensor
    y: Tensor
    weight: Tensor | None = None

    def repeat(self, m: int) -> Batch:
        """Every model's rows m times over, for m weights per model; no copy of the rows is made for m = 1."""
        if m == 1:
            return self
        weight = None if self.weight is None else self.weight.repeat_interleave(m, dim=0)
        return Batch(self.x.repeat_interleave(m, dim=0), self.y.repeat_interleave(m, dim=0), weight)


class Minibatches(Iterator[Batch]):
    """An endless stream of shuffled minibatches from K folds, every one of the same size.

    Each fold runs through its rows in a fresh random order, again and again; a minibatch may span two of these
    passes, so no short last batch exists and every row is seen equally often.

    Parameters
    ----------
    folds : sequence of K Rows
    batch_size : int
        B is this or the size of the smallest fold.
    seed : int
        The order depends on it alone.
    """

    def __init__(self, folds: Sequence[Rows], batch_size: int, *, seed: int):
        self.folds = list(folds)
        self.batch_size = min(batch_size, *(len(rows.x) for rows in folds))
        self.generator = torch.Generator().manual_seed(seed)
        self._queues = [torch.empty(0, dtype=torch.long) for _ in folds]
        self._weights = [None if rows.weight is None else rows.weight / rows.weight.mean() for rows in folds]

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches in which the largest fold is seen once."""
        return math.ceil(max(len(rows.x) for rows in self.folds) / self.batch_size)

    def __next__(self) -> Batch:
        picks = [self._pick(k).to(rows.x.device) for k, rows in enumerate(self.folds)]
        x = torch.stack([rows.x[pick] for rows, pick in zip(self.folds, picks, strict=True)])
        y = torch.stack([rows.y[pick] for rows, pick in zip(self.folds, picks, strict=True)])
        weights = [weight[pick] for weight, pick in zip(self._weights, picks, strict=True) if weight is not None]
        return Batch(x, y, torch.stack(weights) if weights else None)

    def _pick(self, k: int) -> Tensor:
        while len(self._queues[k]) < self.batch_size:
            order = torch.randperm(len(self.folds[k].x), generator=self.generator)
            self._queues[k] = torch.cat([self._queues[k], order])
        pick, self._queues[k] = self._queues[k].split([self.batch_size, len(self._queues[k]) - self.batch_size])
        return pick
