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
    """The rows of one fold: ``x`` (N, ...), ``y`` (N,) or (N, outputs), the rows' weights (N,) or None.

    ``number`` (N,) says which rows of the whole data they are, where that is known.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    number: Tensor | None = None

    def take(self, rows: Tensor) -> Rows:
        """Some of the rows, by position."""
        return Rows(*(None if t is None else t[rows.to(t.device)] for t in self))  # type: ignore[arg-type]


class Batch(NamedTuple):
    """Rows for M models: ``x`` (M, B, ...), ``y`` (M, B) or (M, B, outputs), ``weight`` (M, B) of mean one, or None.

    ``number`` (M, B) says which rows of the whole data they are, or is None.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    number: Tensor | None = None

    def of(self, k: int) -> Batch:
        """The rows of one model."""
        return Batch(*(None if t is None else t[k : k + 1] for t in self))  # type: ignore[arg-type]

    def repeat(self, m: int) -> Batch:
        """Every model's rows m times over, for m weights per model; no copy of the rows is made for m = 1."""
        if m == 1:
            return self
        return Batch(*(None if t is None else t.repeat_interleave(m, dim=0) for t in self))  # type: ignore[arg-type]


class Minibatches(Iterator[Batch]):
    """An endless stream of shuffled minibatches from K folds, every one of the same size.

    Each fold runs through its rows in a fresh random order, again and again; a minibatch may span two of these
    passes, so no short last batch exists and every row is seen equally often.

    Parameters
    ----------
    folds : sequence of K Rows
    batch_size : int
        B is this or the size of the smallest fold.
    seed : int or sequence of K int
        One for all folds, or each its own. The order depends on it alone, and is for each fold what it would be without the others.
    """

    def __init__(self, folds: Sequence[Rows], batch_size: int, *, seed: int | Sequence[int]):
        self.folds = list(folds)
        self.batch_size = min(batch_size, *(len(rows.x) for rows in folds))
        seeds = [seed] * len(self.folds) if isinstance(seed, int) else seed
        self.generators = [torch.Generator("cpu").manual_seed(own) for own in seeds]
        self._queues = [torch.empty(0, dtype=torch.long, device=rows.x.device) for rows in folds]
        self._weights = [None if rows.weight is None else rows.weight / rows.weight.mean() for rows in folds]

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches in which the largest fold is seen once."""
        return math.ceil(max(len(rows.x) for rows in self.folds) / self.batch_size)

    def __next__(self) -> Batch:
        picks = [self._pick(k) for k in range(len(self.folds))]

        def stack(columns: Sequence[Tensor | None]) -> Tensor | None:
            taken = [c.index_select(0, pick) for c, pick in zip(columns, picks, strict=True) if c is not None]
            return torch.stack(taken) if len(taken) > 1 else taken[0][None] if taken else None

        x, y, _, number = (stack(columns) for columns in zip(*self.folds, strict=True))
        return Batch(x, y, stack(self._weights), number)  # type: ignore[arg-type]

    def weighted(self, batch: Batch, weights: Tensor) -> Tensor:
        """Weights for m models on a minibatch of K folds, out of m weights for every row of the whole data.

        They multiply the rows' own, and are relative to the mean over each fold's rows, as in a fit.

        Parameters
        ----------
        batch : Batch of K × B rows, with their numbers
        weights : Tensor of shape (m, number of all rows)

        Returns
        -------
        Tensor of shape (K · m, B)
        """
        found = []
        for k, rows in enumerate(self.folds):
            own = self._weights[k]
            all_rows = weights[:, rows.number] if own is None else weights[:, rows.number] * own
            these = weights[:, batch.number[k]]  # type: ignore[index]
            if batch.weight is not None:
                these = these * batch.weight[k]
            found.append(these / all_rows.mean(dim=1, keepdim=True).clamp(min=1e-12))
        return torch.cat(found)

    def _pick(self, k: int) -> Tensor:
        while len(self._queues[k]) < self.batch_size:
            order = torch.randperm(len(self.folds[k].x), generator=self.generators[k], device="cpu")
            order = order.to(self._queues[k].device, non_blocking=True)
            self._queues[k] = torch.cat([self._queues[k], order])
        pick, self._queues[k] = self._queues[k].split([self.batch_size, len(self._queues[k]) - self.batch_size])
        return pick
