"""Is the band of a validation curve calibrated? Settings along the curves are retrained, and counted inside or outside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.utils.parallel import Parallel, delayed

from benchmarks.problems import ARENA
from hypertune import HyperTrainingSearchCV
from hypertune.retraining import retrain
from hypertune.task import Task

PROBLEMS = ("iris-3", "wine-6", "diabetes-5", "cancer-6", "digits200-6", "cancer-33")
_SETTINGS = 40  # in each cell
_FURTHEST = 4.0  # units of λ from λ̂
_EDGES = (0.5, 1.0, 2.0, 3.0)


class _Search(HyperTrainingSearchCV):
    """Keeps its task, training rows included."""

    def _make_task(self) -> Task:
        self.task = super()._make_task()
        return self.task


def measure_band(
    seeds: int, jobs: int = 1, first_seed: int = 0, problems: Sequence[str] = PROBLEMS, coverage: float = 0.9
) -> np.ndarray:
    """Print the share of retrained settings inside their band, and return a row for each: problem, distance, inside, half, miss.

    Each setting has one hyperparameter (all its values, if it has a grain) up to 4 units of λ away from λ̂, inside the declared range: a
    factor of e⁴ for logarithmic ones. Half the width and the miss are relative to the loss that is predicted at λ̂.
    """
    cells = [(problem, seed) for problem in problems for seed in range(first_seed, first_seed + seeds)]
    found = Parallel(n_jobs=jobs)(delayed(_cell)(problem, seed, coverage) for problem, seed in cells)
    number = {problem: i for i, problem in enumerate(problems)}
    rows = np.concatenate(
        [np.c_[np.full(len(cell), number[name]), cell] for (name, _), cell in zip(cells, found, strict=True)]
    )
    at = np.digitize(rows[:, 1], _EDGES)
    labels = [f"{low:g} to {high:g}" for low, high in zip((0, *_EDGES), (*_EDGES, _FURTHEST), strict=True)]
    print(f"{'units of λ from λ̂':<20}{'settings':>9}{'inside':>8}{'half width':>12}{'miss, median':>14}")
    for label, here in [*((text, at == i) for i, text in enumerate(labels)), ("all", at >= 0)]:
        _, _, inside, half, miss = rows[here].T
        print(
            f"{label:<20}{here.sum():>9}{inside.mean():>8.0%}{np.median(half):>12.0%}{np.median(miss):>14.1%}",
            flush=True,
        )
    for problem, i in number.items():
        own = rows[rows[:, 0] == i]
        print(
            f"{problem:<20}{len(own):>9}{own[:, 2].mean():>8.0%}{np.median(own[:, 3]):>12.0%}{np.median(own[:, 4]):>14.1%}"
        )
    return rows


def _cell(name: str, seed: int, coverage: float) -> np.ndarray:
    """(settings, 4): distance, inside, half the width, miss."""
    problem, rng = ARENA[name](seed, None), np.random.default_rng(seed)
    search = _Search(
        problem.estimator, problem.space, cv=problem.cv, scoring=problem.scoring, random_state=seed, refit=False
    ).fit(problem.X, problem.y)
    response = search.best_response_
    space, folds, *_ = search.task
    lam_hat = space.encode(response.params)
    lam = lam_hat.repeat(_SETTINGS, 1)
    names = rng.choice(list(space.blocks), _SETTINGS)
    for row, moved in zip(lam, names, strict=True):
        row[space.blocks[moved]] += rng.uniform(-_FURTHEST, _FURTHEST)
    lam = lam.clamp(space.low, space.high)
    retrained = retrain(search.task, lam)
    assert retrained is not None
    losses, rows = retrained.validation_losses(folds).numpy(), []
    for one, moved, loss in zip(lam, names, losses, strict=True):
        ((low, high),) = response.validation_band(moved, [space.decode(one)[moved]], coverage=coverage)
        if np.isfinite(
            [low, high, loss]
        ).all():  # the band ends four units from the last λ̂, which is not quite the tuned one
            here, half = (low + high) / 2, (high - low) / 2
            rows.append([float((one - lam_hat).abs().max()), low <= loss <= high, half, abs(loss - here)])
    found = np.array(rows, dtype=float)
    found[:, 2:] /= response.validation_loss()
    return found
