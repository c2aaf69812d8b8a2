"""Figure 5, bottom: one L2 for each weight of networks without, with one and with two hidden layers.

The paper tunes 7,850, 79,510 and 89,610 hyperparameters with one hypernetwork each, and compares with hand-tuned settings: validation
.039 (hand-tuned .037 is better), .013 (.0137) and .0105 (.013).

====================================  ============================  ===========================================================
constant                              value                         from
====================================  ============================  ===========================================================
networks                              784-10, 784-100-10,           paper
                                      784-100-100-10, ReLU
data                                  50,000 train, 10,000          paper
                                      validate, 10,000 test
loss                                  squared error, mean over 10   paper
                                      one-hot outputs
optimizer                             Adam 3e-3, cosine, batch 250  ours
epochs                                15                            ours
hyper-training                        HyperTrainingSearchCV with    ours: implicit, by algorithm="auto"; the paper's is Algorithm 3 with a
                                      its defaults                  low-rank hypernetwork
hand-tuned                            one weight decay, a grid of   ours: half decades from 1e-6 to 1e-3
                                      seven
====================================  ============================  ===========================================================

Deviations
----------
1. Biases are not penalised, so there are 7,840, 79,400 and 89,400 hyperparameters.
2. "hypernetwork's weights" are the paper's return value; "retrained" is the same setting from scratch, which the paper does not show.
3. "no prior" is ``grain_scale=None``; the default has a prior around the mean of all values.

Command: ``python -m benchmarks fig5-layers --budget full --seeds 3 --mnist DIR``, about 6 minutes a seed on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.model_selection import PredefinedSplit

from benchmarks import mnist
from benchmarks.figures.rows import Row, markdown, pick, row, seeds, spread
from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, per_weight

TITLE = (
    "one L2 per weight of networks with none, one and two hidden layers, against a hand-tuned grid of one weight decay"
)


class Budget(NamedTuple):
    """Sizes of a run."""

    images: int
    epochs: int


BUDGETS = {"smoke": Budget(150, 6), "full": Budget(50_000, 15)}
NETWORKS: dict[str, tuple[int, ...]] = {"784-10": (), "784-100-10": (100,), "784-100-100-10": (100, 100)}
GRID = tuple(float(f"{10**e:.3g}") for e in np.arange(-6, -2.9, 0.5))
PAPER = {"784-10": 0.039, "784-100-10": 0.013, "784-100-100-10": 0.0105}
TUNED, RETRAINED, FREE, HAND = "hypernetwork's weights", "retrained", "hypernetwork's weights, no prior", "hand-tuned"


def cells(seed: int, budget: str, directory: str | None) -> Iterator[Row]:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    size = BUDGETS[budget]
    X, y, X_test, y_test = mnist.load(directory)
    end = len(X) * 5 // 6
    train = slice(min(size.images, end))
    parts = [(X[train], y[train]), (X[end:], y[end:]), (X_test, y_test)]
    for network, hidden in NETWORKS.items():
        net = TorchClassifier(
            MLP(hidden=hidden),
            criterion="squared_error",
            lr=3e-3,
            batch_size=250,
            max_epochs=size.epochs,
            random_state=seed,
        )
        yield from _grid(net, parts, network)
        yield from _searched(net, parts, network, seed)


def _grid(net: TorchClassifier, parts: list[tuple[np.ndarray, np.ndarray]], network: str) -> Iterator[Row]:
    """Every row of it: which is best is seen on the validation images."""
    seconds = 0.0
    for decay in GRID:
        start = time.perf_counter()
        fitted = clone(net).set_params(weight_decay=decay).fit(*parts[0])
        seconds += time.perf_counter() - start  # the clock
        yield _row(HAND, fitted, parts, network=network, seconds=seconds, decay=decay)


def _searched(
    net: TorchClassifier, parts: list[tuple[np.ndarray, np.ndarray]], network: str, seed: int
) -> Iterator[Row]:
    (X, y), (X_valid, y_valid), _ = parts
    split = PredefinedSplit(np.r_[np.full(len(X), -1), np.zeros(len(X_valid), dtype=int)])
    rows = np.concatenate([X, X_valid]), np.concatenate([y, y_valid])
    for solver, grain_scale in ((FREE, None), (TUNED, 1.0)):
        search = HyperTrainingSearchCV(
            clone(net).set_params(weight_decay=1e-5), {"weight_decay": per_weight(loguniform(1e-8, 1e-1))},
            cv=split, evaluate="hypernetwork", refit=False, random_state=seed, grain_scale=grain_scale,
        )  # fmt: skip
        start = time.perf_counter()
        search.fit(*rows)
        seconds = time.perf_counter() - start  # the clock
        response = search.best_response_
        yield _row(solver, response.estimator_at(), parts, network=network, seconds=seconds)
    start = time.perf_counter()
    fitted = clone(net).set_params(**response.params).fit(X, y)
    seconds += time.perf_counter() - start  # the clock
    yield _row(RETRAINED, fitted, parts, network=network, seconds=seconds)


def _row(solver: str, fitted: TorchClassifier, parts: list[tuple[np.ndarray, np.ndarray]], **more: object) -> Row:
    valid, test = (float(np.square(fitted._outputs(X) - np.eye(10)[y]).mean()) for X, y in parts[1:])
    return row(solver, valid=valid, test=test, **more)  # type: ignore[arg-type]


# --- what is shown -----------------------------------------------------------------------------------------------------------


def _best(rows: list[Row], network: str, solver: str) -> list[Row]:
    """By seed; of the grid the row with the lowest validation loss."""
    own = pick(rows, network=network, solver=solver)
    return [min(pick(own, seed=seed), key=lambda r: r["valid"]) for seed in seeds(rows)]


def plot(rows: list[Row], figure: Figure) -> None:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    figure.set_size_inches(12, 4)
    for axis, network in zip(figure.subplots(1, len(NETWORKS)), NETWORKS, strict=True):
        for seed in seeds(rows):
            grid = pick(rows, network=network, solver=HAND, seed=seed)
            axis.plot([r["decay"] for r in grid], [r["valid"] for r in grid], "o-", color="0.5", ms=3, lw=1, label=HAND)
            for solver, color in ((FREE, "C1"), (TUNED, "C3"), (RETRAINED, "C0")):
                (found,) = pick(rows, network=network, solver=solver, seed=seed)
                axis.axhline(found["valid"], color=color, lw=1, label=solver)
        axis.axhline(PAPER[network], color="k", ls=":", lw=1, label="the paper's")
        axis.set(title=network, xscale="log", xlabel="one weight decay", ylabel="validation loss")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(list(by_label.values()), list(by_label), loc="outside lower center", ncols=len(by_label), fontsize=8)


def table(rows: list[Row]) -> str:
    """See :class:`benchmarks.figures.rows.FigureModule`."""
    lines, words = [], []
    for network in NETWORKS:
        for solver in (HAND, FREE, TUNED, RETRAINED):
            best = _best(rows, network, solver)
            losses = (spread([r[loss] for r in best], 5) for loss in ("valid", "test"))
            seconds = np.median(
                [pick(rows, network=network, solver=solver, seed=r["seed"])[-1]["seconds"] for r in best]
            )
            lines.append([network, solver, *losses, f"{seconds:.0f}"])
        hand, tuned = (np.mean([r["valid"] for r in _best(rows, network, solver)]) for solver in (HAND, FREE))
        relation = "at or below" if tuned <= hand else "above"
        words.append(
            f"- {network}: without a prior the validation loss is {tuned:.5f}, {relation} the hand-tuned {hand:.5f} "
            f"({(tuned / hand - 1):+.1%}); the paper's was {PAPER[network]}."
        )
    return markdown(["network", "solver", "valid", "test", "seconds"], lines) + "\n\n" + "\n".join(words)
