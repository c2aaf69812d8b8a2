"""Who tunes: each solver gets a problem and some seconds, and returns what it found. The clock is in :func:`run`.

Scores are mean cross-validated log-losses in nats (lower is better) of estimators trained from scratch. Evaluation on
held-out rows is off the clock and done here for everybody alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from sklearn.base import clone
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import cross_val_score

from benchmarks.problems import Problem
from hypertune import HyperTrainingSearchCV
from hypertune.space import Hyperparameter

SCORING = "neg_log_loss"


@dataclass
class Found:
    """What a solver returns, and what is added to it off the clock.

    ``curve`` holds (seconds, best validation loss so far) and ``path`` the trace of a hyper-training.
    """

    params: dict[str, Any]
    settings: int
    cv_loss: float
    curve: list[tuple[float, float]]
    path: dict[str, list[Any]] = field(default_factory=dict)
    solver: str = ""
    seconds: float = 0.0
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")


Solver = Callable[[Problem, float, int | None], Found]


def run(name: str, problem: Problem, seconds: float, trials: int | None = None) -> Found:
    """Run a solver on the clock, then train its choice on the refit rows and look at the test rows off the clock."""
    start = time.perf_counter()
    found = SOLVERS[name](problem, seconds, trials)
    found.seconds = time.perf_counter() - start
    found.solver = name
    rows = slice(problem.refit_rows)
    model = clone(problem.estimator).set_params(**found.params).fit(problem.X[rows], problem.y[rows])
    found.test_loss = log_loss(problem.y_test, model.predict_proba(problem.X_test))
    found.test_accuracy = accuracy_score(problem.y_test, model.predict(problem.X_test))
    return found


def hypertune(problem: Problem, seconds: float, trials: int | None) -> Found:
    """HyperTrainingSearchCV with its defaults: one hyper-training, two candidates verified, and the refit. Takes what it takes."""
    search = HyperTrainingSearchCV(
        problem.estimator,
        problem.space,
        cv=problem.cv,
        scoring=SCORING,
        refit=problem.refit_rows is None,
        random_state=problem.seed,
        verbose=0,
    ).fit(problem.X, problem.y)
    history = search.history_
    curve = list(
        zip(
            history["seconds"].tolist(),
            np.minimum.accumulate(history["validation_loss"]).tolist(),
            strict=True,
        )
    )
    return Found(
        {name: _plain(value) for name, value in search.best_params_.items()},
        len(search.cv_results_["params"]),
        -float(search.cv_results_["mean_test_score"].max()),
        curve,
        {name: values.tolist() for name, values in history.items()},
    )


def tpe(problem: Problem, seconds: float, trials: int | None) -> Found:
    """Optuna's TPE with Optuna 5's defaults, its first trial the estimator's own setting, as ours verifies it too.

    A trial that has begun when the seconds are over is finished and counts.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = time.perf_counter()
    curve: list[tuple[float, float]] = []

    space, own = problem.coordinates, problem.estimator.get_params()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=problem.seed))
    current = space.decode(space.encode({name: own[name] for name in space.names}))
    study.enqueue_trial({
        name if h.shape is None else f"{name}[{j}]": value
        for h, name in zip(space.hyperparameters, space.names, strict=True)
        for j, value in enumerate(h.flatten(current[name]))
    })  # fmt: skip

    def suggest(trial: optuna.Trial, h: Hyperparameter) -> Any:
        names = [h.name] if h.shape is None else [f"{h.name}[{j}]" for j in range(h.size)]
        log = h.coordinate == "log"
        return h.arrange(np.array([trial.suggest_float(name, *h.support, log=log) for name in names]))

    def objective(trial: optuna.Trial) -> float:
        params = {h.name: suggest(trial, h) for h in space.hyperparameters}
        trial.set_user_attr("params", {name: _plain(value) for name, value in params.items()})
        loss = _cv_loss(problem, params)
        curve.append((time.perf_counter() - start, min([loss] + [best for _, best in curve])))
        return loss

    study.optimize(objective, timeout=None if trials else seconds, n_trials=trials)
    return Found(study.best_trial.user_attrs["params"], len(study.trials), float(study.best_value), curve)


def random(problem: Problem, seconds: float, trials: int | None) -> Found:
    """Settings drawn from the declared distributions. One that has begun when the seconds are over is finished and counts."""
    start, space = time.perf_counter(), problem.coordinates
    rng = np.random.default_rng(problem.seed)
    curve: list[tuple[float, float]] = []
    best: tuple[float, dict[str, Any]] = (math.inf, {})
    while not curve or (len(curve) < trials if trials else curve[-1][0] < seconds):
        params = space.decode(space.sample(1, rng)[0])
        best = min(best, (_cv_loss(problem, params), params), key=lambda pair: pair[0])
        curve.append((time.perf_counter() - start, best[0]))
    return Found({name: _plain(value) for name, value in best[1].items()}, len(curve), best[0], curve)


def defaults(problem: Problem, seconds: float, trials: int | None) -> Found:
    """The estimator as it is."""
    loss = _cv_loss(problem, {})
    return Found({}, 1, loss, [(0.0, loss)])


SOLVERS: dict[str, Solver] = {"defaults": defaults, "hypertune": hypertune, "tpe": tpe, "random": random}


def _cv_loss(problem: Problem, params: dict[str, Any]) -> float:
    model = clone(problem.estimator).set_params(**params)
    return -float(cross_val_score(model, problem.X, problem.y, cv=problem.cv, scoring=SCORING).mean())


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts of them, for JSON and for ``set_params``."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return np.asarray(value).tolist()
