"""hypertune, then the black-box searches with the same estimator, the same folds and the same wall-clock seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks import report, solvers
from benchmarks.problems import Problem
from benchmarks.solvers import Found


def compare(make: Callable[[int], Problem], seeds: int, out: Path, *, tpe_trials: int | None = None) -> list[Found]:
    """Run the comparison, print its table and write its JSON and its picture.

    Parameters
    ----------
    make : callable
        Seed → problem.
    seeds : int
        Number of seeds, from 0.
    out : Path
        Folder for ``NAME.json`` and ``NAME.png``.
    tpe_trials : int, optional
        Also run TPE for that many trials, however long it takes.
    """
    methods = ["defaults", "hypertune", "tpe", "random"] + ([f"tpe-{tpe_trials}"] if tpe_trials else [])
    rows: list[tuple[int, Found]] = []
    with tqdm(total=seeds * len(methods), unit="run") as bar:
        for seed in range(seeds):
            problem = make(seed)
            seconds = math.inf
            for method in methods:
                bar.set_description(f"{problem.name}, seed {seed}, {method}")
                trials = tpe_trials if method.startswith("tpe-") else None
                found = solvers.run(method.partition("-")[0], problem, seconds, trials=trials)
                found.solver = method
                if method == "hypertune":
                    seconds = found.seconds
                rows.append((seed, found))
                bar.update()
    out.mkdir(parents=True, exist_ok=True)
    report.save(rows, problem.name, out / f"{problem.name}.json")
    title = f"{problem.name}: {len(problem.space)} hyperparameters, {seeds} seed{'s' if seeds > 1 else ''}"
    report.picture(rows, problem.space, title, out / f"{problem.name}.png")
    print(f"\n{title}\n{report.table([found for _, found in rows])}")
    if tpe_trials:
        ours, theirs = (
            [row for _, row in rows if row.solver == solver] for solver in ("hypertune", f"tpe-{tpe_trials}")
        )
        ratio = np.median([b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)])
        gap = np.median([a.cv_loss - b.cv_loss for a, b in zip(ours, theirs, strict=True)])
        print(
            f"\nTPE's {tpe_trials} trials took {ratio:.1f} × our seconds (median over seeds); our validation loss minus "
            f"its best: {gap:+.4f} (median)."
        )
    print(f"\nWritten: {out / problem.name}.json and .png")
    return [found for _, found in rows]
