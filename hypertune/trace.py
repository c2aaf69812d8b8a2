"""What a hyper-training records of its run: ``history_``, and the averages over the last part of λ̂'s path."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypertune.algorithms import Step
from hypertune.hypernetworks import Hypernetwork
from hypertune.problem import COSTLY
from hypertune.response import validation_losses
from hypertune.task import Task

_RECORDS = 50  # at least, if there are so many steps
_RECORDED_ROWS, _FEWER_RECORDED = 1_000, 256  # of each fold's validation rows; fewer where each costs
_RECORDED_VALUES = 10_000_000  # of one hyperparameter in all records; of more, a draw of 1,000 in each


class Trace:
    """Collects ``history_``, one row per record, and the average of λ̂ over the last part of its path."""

    def __init__(
        self,
        task: Task,
        phi: Hypernetwork,
        lam_hat: Tensor,
        *,
        begin: float,
        steps: int,
        per_epoch: int,
        averaged_from: float,
    ):
        self.space, self.objective, self.phi, self.lam_hat = task.space, task.objective, phi, lam_hat
        self.begin, self.steps, self.per_epoch, self.averaged_from = begin, steps, per_epoch, averaged_from
        self._between = max(1, min(per_epoch, steps // _RECORDS))
        self._most_values = _RECORDED_VALUES / (steps / self._between)
        rows = _FEWER_RECORDED if task.objective.cost > COSTLY else _RECORDED_ROWS
        self._folds = [fold.with_fewer_valid(rows) for fold in task.folds]
        self.rows: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._sum, self._count = torch.zeros_like(lam_hat), 0
        self.slope, self.moves, self._averaged = torch.zeros_like(lam_hat), 0, 0

    def is_due(self, number: int) -> bool:
        """Whether this step is to be recorded: one in each pass, and about fifty in all if passes are long."""
        return number % self._between == 0 or number == self.steps

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
