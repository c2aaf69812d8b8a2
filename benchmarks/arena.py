"""The arena: every solver on every problem, at the wall clock that our whole search takes.

Each (problem, seed) cell is run in one go: the defaults, then ours, then the others for our seconds. Its rows are written when
it is done, and what is there already is not run again, so that a run can be interrupted, resumed and extended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

from benchmarks import report, solvers
from benchmarks.problems import ARENA, RATES, SIZES, SKORCH

OURS = "hypertune"


def fight(
    problems: Sequence[str],
    names: Sequence[str],
    seeds: int,
    out: Path,
    directory: str | None = None,
    patience: float = 1.0,
    jobs: int = 1,
    first_seed: int = 0,
    scoring: str | None = None,
) -> list[dict[str, Any]]:
    """Run what is not in ``out/arena.json`` (with another scoring ``out/arena-SCORING.json``) yet, and print the summary of all that is.

    Parameters
    ----------
    problems, names : sequence of str
        Of ``ARENA``, ``RATES``, ``SIZES`` and ``SKORCH`` of :mod:`benchmarks.problems`, and of :data:`benchmarks.solvers.SOLVERS` and ``OF_RATES``.
    seeds : int
    out : Path
    directory : str, optional
        Of MNIST's files.
    patience : float, default=1
        How many times our seconds the others may go on to match our validation loss.
    jobs : int, default=1
        Cells run at the same time, each with its share of the threads.
    first_seed : int, default=0
    scoring : str, optional
        What everybody searches by and is judged by, in place of the log-loss or squared error: a name of scikit-learn's for a metric
        whose best value is 1, as "accuracy". Losses are 1 minus it.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("arena.json" if scoring is None else f"arena-{scoring}.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    have = {(row["problem"], row["seed"], row["solver"]): row for row in rows}
    order = ["defaults", OURS, *(name for name in names if name not in ("defaults", OURS))]
    cells = []
    for seed in range(first_seed, first_seed + seeds):
        for name in problems:
            missing = [solver for solver in order if (name, seed, solver) not in have]
            if missing:
                ours = have.get((name, seed, OURS))
                cells.append(delayed(_cell)(name, seed, missing, directory, patience, ours, scoring))
    done = Parallel(n_jobs=jobs, return_as="generator_unordered")(cells)
    for new in tqdm(done, total=len(cells), unit="cell"):
        rows += new
        path.write_text(json.dumps({"environment": report.environment() | {"jobs": jobs}, "rows": rows}))
    print(summary(rows))
    report.multiples(rows, path.with_suffix(".png"))
    return rows


def redraw(results: Path, docs: Path) -> None:
    """``docs/arena.png`` from the committed rows, and their summary and those with a learning rate and with lists, without rerunning anything."""
    names = ("arena", "arena-lr", "arena-nets")
    rows, *others = (json.loads((results / f"{name}.json").read_text())["rows"] for name in names)
    print("\n\n".join(map(summary, (rows, *others))))
    report.multiples(rows, docs / "arena.png")


def _cell(
    name: str,
    seed: int,
    names: Sequence[str],
    directory: str | None,
    patience: float,
    ours: dict[str, Any] | None,
    scoring: str | None,
) -> list[dict[str, Any]]:
    """The rows of some solvers on one problem; ``ours`` is our own row, if it is there already."""
    problem, rows = (ARENA | RATES | SIZES | SKORCH)[name](seed, directory), []
    if scoring is not None:
        problem = replace(problem, scoring=scoring)
    for solver in names:
        limits: dict[str, Any] = {"seconds": math.inf}
        if solver not in ("defaults", OURS):
            limits = {"seconds": ours["seconds"], "target": ours["cv_loss"], "patience": patience}  # type: ignore[index]
        found = asdict(solvers.run(solver, problem, **limits))
        del found["path"], found["params"]  # long; a cell gives the same ones when it is run again
        found["curve"] = [(round(second, 2), round(loss, 5)) for second, loss in found["curve"]]
        rows.append({"problem": name, "seed": seed, **found, "n": problem.coordinates.n, "patience": patience})
        if solver == OURS:
            ours = rows[-1]
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Test losses by problem, then ranks, wins, regret, time to match and over-tuning by solver.

    Only cells that every solver has run count.
    """
    solvers_ = list(dict.fromkeys(row["solver"] for row in rows))
    cells: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["problem"], row["seed"]), {})[row["solver"]] = row
    cells = {cell: found for cell, found in cells.items() if len(found) == len(solvers_)}
    problems = list(dict.fromkeys(problem for problem, _ in cells))
    loss = {
        p: np.array([[c[s]["test_loss"] for s in solvers_] for (q, _), c in cells.items() if q == p]) for p in problems
    }

    lines = [f"{'test loss':<20}{'seeds':>5}{'n':>6}{'seconds':>9}" + "".join(f"{s:>20}" for s in solvers_)]
    for p in problems:
        own = [c[OURS] for (q, _), c in cells.items() if q == p]
        means, errors = loss[p].mean(axis=0), _error(loss[p])
        best = means.argmin()
        shown = [
            f"{m:.4f} ± {e:.4f}{'*' if i == best else ' '}" for i, (m, e) in enumerate(zip(means, errors, strict=True))
        ]
        seconds = np.median([row["seconds"] for row in own])
        lines.append(f"{p:<20}{len(own):>5}{own[0]['n']:>6}{seconds:>9.1f}" + "".join(f"{s:>20}" for s in shown))

    ours = solvers_.index(OURS)
    ranks = np.concatenate([rankdata(loss[p], axis=1) for p in problems])
    spread = [(loss[p].max(axis=1) - loss[p].min(axis=1))[:, None].clip(1e-12) for p in problems]
    regret = np.concatenate(
        [(loss[p] - loss[p].min(axis=1)[:, None]) / s for p, s in zip(problems, spread, strict=True)]
    )
    rng = np.random.default_rng(0)
    resampled = regret[rng.integers(0, len(regret), (2000, len(regret)))].mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    lines.append(
        f"\n{'solver':<12}{'mean rank':>10}{'regret (95%)':>22}{'we win/tie/lose':>17}{'better or tied':>16}"
        f"{'their seconds to match / ours':>32}{'valid - test':>14}"
    )
    for i, s in enumerate(solvers_):
        counts = [0, 0, 0]
        for p in problems:
            gap = loss[p][:, i] - loss[p][:, ours]
            counts[1 if abs(gap.mean()) <= _error(gap) else 0 if gap.mean() > 0 else 2] += 1
        ratios = [c[s]["matched"] / c[OURS]["seconds"] for c in cells.values()]
        matched = np.isfinite(ratios).mean()
        over = np.mean([c[s]["cv_loss"] - c[s]["test_loss"] for c in cells.values()])
        against = "" if i == ours else f"{counts[0]}/{counts[1]}/{counts[2]}"
        share = "" if i == ours else f"{(counts[0] + counts[1]) / len(problems):.0%}"
        match = "" if s in (OURS, "defaults") else f"{np.median(ratios):.1f} ({matched:.0%} did)"
        lines.append(
            f"{s:<12}{ranks[:, i].mean():>10.2f}{f'{regret[:, i].mean():.3f} [{low[i]:.3f}, {high[i]:.3f}]':>22}"
            f"{against:>17}{share:>16}{match:>32}{over:>+14.4f}"
        )
    defaults = solvers_.index("defaults") if "defaults" in solvers_ else None
    if defaults is not None:
        worst = max(problems, key=lambda p: loss[p][:, ours].mean() / loss[p][:, defaults].mean())
        ratio = loss[worst][:, ours].mean() / loss[worst][:, defaults].mean()
        lines.append(f"\nour mean test loss over the defaults': at most {ratio:.2f} ({worst})")
    others = [s for s in solvers_ if s not in (OURS, "defaults")]
    for label, few in (("n < 30", True), ("n ≥ 30", False)):
        group = [c for c in cells.values() if (c[OURS]["n"] < 30) == few]
        if not group or not others:
            continue
        first = [min(c[s]["matched"] for s in others) / c[OURS]["seconds"] for c in group]
        lines.append(
            f"{label}: the first of the others to match our validation loss took {np.median(first):.1f} × our seconds (median of "
            f"{len(group)} cells; in {np.isinf(first).mean():.0%} none did while they were let go on)"
        )
    return "\n".join(lines)


def _error(values: np.ndarray) -> Any:
    """Standard error over the first axis."""
    return values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0 * values.mean(axis=0)
