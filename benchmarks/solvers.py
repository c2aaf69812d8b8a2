"""Who tunes: each solver gets a problem and some seconds, and returns what it found. The clock is in :func:`run`.

Scores are mean cross-validated log-losses in nats (lower is better) of estimators trained from scratch. Evaluation on
held-out rows is off the clock and done here for everybody alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import ParameterSampler, RandomizedSearchCV, cross_val_score

from benchmarks.problems import Problem
from hypertune import HyperTrainingSearchCV
from hypertune.space import Space

SCORING = "neg_log_loss"


@dataclass
class Found:
    """What a solver returns, and what is added to it off the clock.

    ``curve`` holds (seconds, best validation loss so far) and ``path`` the trace of a hyper-training.
    """

    params: dict[str, float]
    settings: int
    cv_loss: float
    curve: list[tuple[float, float]]
    path: dict[str, list[float]] = field(default_factory=dict)
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
        search.best_params_,
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

    def objective(trial: optuna.Trial) -> float:
        params = {}
        for name, prior in problem.space.items():
            low, high = prior.support()
            params[name] = trial.suggest_float(name, low, high, log=_is_log(prior))
        loss = _cv_loss(problem, params)
        curve.append((time.perf_counter() - start, min([loss] + [best for _, best in curve])))
        return loss

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=problem.seed))
    space, own = Space.from_distributions(problem.space), problem.estimator.get_params()
    study.enqueue_trial(space.decode(space.encode({name: own[name] for name in space.names})))
    study.optimize(objective, timeout=None if trials else seconds, n_trials=trials)
    return Found(dict(study.best_params), len(study.trials), float(study.best_value), curve)


def random(problem: Problem, seconds: float, trials: int | None) -> Found:
    """RandomizedSearchCV with as many settings as fit the seconds, counted from one random setting timed off the clock, rounded up."""
    if trials is None:
        start = time.perf_counter()
        _cv_loss(problem, next(iter(ParameterSampler(problem.space, 1, random_state=problem.seed))))
        trials = max(1, int(np.ceil(seconds / (time.perf_counter() - start))))
    search = RandomizedSearchCV(
        problem.estimator,
        problem.space,
        n_iter=trials,
        cv=problem.cv,
        scoring=SCORING,
        refit=False,
        random_state=problem.seed,
    ).fit(problem.X, problem.y)
    results = search.cv_results_
    each = (results["mean_fit_time"] + results["mean_score_time"]) * search.n_splits_
    best = np.minimum.accumulate(-results["mean_test_score"])
    return Found(
        dict(search.best_params_),
        len(best),
        -float(search.best_score_),
        list(zip(np.cumsum(each).tolist(), best.tolist(), strict=True)),
    )


def defaults(problem: Problem, seconds: float, trials: int | None) -> Found:
    """The estimator as it is."""
    loss = _cv_loss(problem, {})
    return Found({}, 1, loss, [(0.0, loss)])


SOLVERS: dict[str, Solver] = {"defaults": defaults, "hypertune": hypertune, "tpe": tpe, "random": random}


def _cv_loss(problem: Problem, params: dict[str, float]) -> float:
    model = clone(problem.estimator).set_params(**params)
    return -float(cross_val_score(model, problem.X, problem.y, cv=problem.cv, scoring=SCORING).mean())


def _is_log(prior: Any) -> bool:
    return prior.dist.name == loguniform(1, 2).dist.name
