"""Bad seeds: the same data, split and folds; what changes is the seed of the estimator and of the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sklearn.utils.parallel import Parallel, delayed

from benchmarks import solvers
from benchmarks.problems import ARENA

PROBLEMS = ("cancer-6", "diabetes-5", "digits200-6")


def measure_robustness(seeds: int, jobs: int = 1, problems: Sequence[str] = PROBLEMS) -> dict[str, np.ndarray]:
    """Print and return the test losses (seeds × 2) of our search and of random search for our seconds."""
    losses = {}
    for name in problems:
        found = Parallel(n_jobs=jobs)(delayed(_both)(name, seed) for seed in range(seeds))
        losses[name] = np.array(found)
        ours, random = losses[name].T
        print(
            f"{name:<16}ours: median {np.median(ours):.4f}, worst {ours.max():.4f}; random search: median {np.median(random):.4f}, "
            f"worst {random.max():.4f}; ours is better in {np.mean(ours < random):.0%} of {seeds} seeds",
            flush=True,
        )
    return losses


def _both(name: str, seed: int) -> tuple[float, float]:
    problem = ARENA[name](0, None)
    last = problem.estimator.steps[-1][0]
    problem = replace(problem, seed=seed, estimator=problem.estimator.set_params(**{f"{last}__random_state": seed}))
    ours = solvers.run("hypertune", problem)
    return ours.test_loss, solvers.run("random", problem, ours.seconds).test_loss
