"""What is shown: one table, one picture and one JSON file for a comparison."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.solvers import Found
from hypertune.space import Space

_SHOWN = 20  # paths of one hyperparameter of a finer grain
_COLORS = {
    "hypertune": "C3",
    "tpe": "C0",
    "random": "C2",
    "defaults": "0.5",
    "hyperband": "k",
    "early-stop": "tab:olive",
    "halving": "gold",
}


def table(rows: Sequence[Found]) -> str:
    """One line per method: medians of seconds, means ± standard errors over seeds of the losses, the first seed's setting."""
    header = f"{'method':<12}{'seconds':>9}{'settings':>10}{'CV log-loss':>18}{'test log-loss':>18}{'test accuracy':>15}  best_params_ (first seed)"
    lines = [header, "-" * len(header)]
    for name in dict.fromkeys(row.solver for row in rows):
        own = [row for row in rows if row.solver == name]
        params = ", ".join(f"{k.rpartition('__')[2]}={_short(v)}" for k, v in own[0].params.items()) or "as given"
        lines.append(
            f"{name:<12}{np.median([r.seconds for r in own]):>9.1f}{np.median([r.settings for r in own]):>10.0f}"
            f"{_mean([r.cv_loss for r in own]):>18}{_mean([r.test_loss for r in own]):>18}"
            f"{np.mean([r.test_accuracy for r in own]):>15.4f}  {params}"
        )
    return "\n".join(lines)


def _short(value: Any) -> str:
    """A number, or the numbers of a finer grain from the smallest to the largest."""
    numbers = np.concatenate([np.ravel(v) for v in (value.values() if isinstance(value, Mapping) else [value])])
    return f"{numbers[0]:.3g}" if numbers.size == 1 else f"{numbers.min():.3g}..{numbers.max():.3g} ({numbers.size})"


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}"


def picture(rows: Sequence[tuple[int, Found]], space: Mapping[str, Any], title: str, path: Path) -> None:
    """Best validation loss against seconds, one line per method and seed; λ̂'s path of the first seed beneath."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 8), constrained_layout=True)
    labelled = set()
    for _, found in rows:
        label = None if found.solver in labelled else found.solver
        labelled.add(found.solver)
        color = _COLORS[found.solver.partition("-")[0]]
        if found.solver == "defaults":
            top.axhline(found.cv_loss, color=color, lw=1, ls=":", label=label)
        elif found.path:
            label = "hypertune: hypernetwork's weights while training" if label else None
            top.plot(*zip(*found.curve, strict=True), color=color, lw=1, alpha=0.7, label=label)
            top.plot(
                found.seconds,
                found.cv_loss,
                "*",
                color=color,
                ms=12,
                label="hypertune: retrained, verified" if label else None,
            )
        else:
            top.step(
                *zip(*found.curve, strict=True),
                color=color,
                lw=1,
                where="post",
                label=label,
                ls="--" if "-" in found.solver else "-",
            )
    top.set(xlabel="seconds", ylabel="best validation log-loss (nats)", yscale="log", title=title)
    top.legend(fontsize=8)

    declared = Space.from_distributions(space)
    path_of = next(found.path for _, found in rows if found.path)
    for h in declared.hyperparameters:
        lam = (h.to_lam(np.array(path_of[h.name])) - h.low) / (h.high - h.low)
        lines = bottom.plot(path_of["epoch"], lam if lam.ndim == 1 else lam[:, :_SHOWN])
        lines[0].set_label(h.name.rpartition("__")[2] + ("" if h.grain is None else f", per {h.grain}"))
        for line in lines[1:]:
            line.set(color=lines[0].get_color(), alpha=0.6)
    bottom.set(
        xlabel="epoch of the hyper-training",
        ylabel="λ̂, from its lower to its upper bound",
        ylim=(-0.03, 1.03),
    )
    bottom.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def environment() -> dict[str, Any]:
    """What a number depends on beside the code."""
    return {
        "versions": {package: version(package) for package in ("torch", "scikit-learn", "optuna", "numpy")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def multiples(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One small picture for each problem: best validation loss so far against seconds, every seed and solver a line."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    across = min(4, len(problems))
    down = -(-len(problems) // across)
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 3 * down), squeeze=False, constrained_layout=True)
    for axis, problem in zip(axes.flat, problems, strict=False):
        for row in (row for row in rows if row["problem"] == problem):
            color = _COLORS.get(row["solver"], f"C{solvers.index(row['solver']) % 10}")
            if row["solver"] == "defaults":
                axis.axhline(row["cv_loss"], color=color, lw=1, ls=":")
            elif row["solver"] == "hypertune":
                axis.plot(row["seconds"], row["cv_loss"], "*", color=color, ms=9)
            else:
                seconds, losses = zip(*((s, loss) for s, loss in row["curve"] if np.isfinite(loss)), strict=True)
                axis.step(seconds, losses, color=color, lw=0.8, where="post")
        axis.set_title(problem, fontsize=9)
        axis.set(xscale="log", yscale="log")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            scale.set_major_formatter(FormatStrFormatter("%g"))
            scale.set_minor_formatter(NullFormatter())
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=_COLORS.get(s, f"C{i % 10}"), label=s) for i, s in enumerate(solvers)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(solvers), fontsize=8)
    figure.suptitle("best validation loss so far against seconds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(rows: Sequence[tuple[int, Found]], name: str, path: Path) -> None:
    """Every row with its problem, seed, versions and threads."""
    records = [{"problem": name, "seed": seed, **asdict(found)} for seed, found in rows]
    path.write_text(json.dumps({"environment": environment(), "rows": records}, indent=1))
