"""Who tunes: each solver tries settings, one after the other, for as long as it is asked. The clock is in :func:`run`.

A solver is a generator of trials. Losses are mean cross-validated losses (lower is better) of estimators trained from scratch.
Solvers never see test rows: what a solver chose is trained once more and scored on them here, off the clock, for everybody alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import optuna
import torch
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.metrics import get_scorer
from sklearn.model_selection import HalvingRandomSearchCV, cross_val_score
from sklearn.pipeline import Pipeline

from benchmarks.problems import Problem
from hypertune import HyperTrainingSearchCV
from hypertune.space import Grained, Hyperparameter


@dataclass
class Trial:
    """A setting and its validation loss; infinite if it was given up early.

    ``path`` is the trace of a hyper-training; ``epochs`` after how many a fit is to be stopped, if it is.
    """

    params: dict[str, Any]
    loss: float
    path: dict[str, list[Any]] = field(default_factory=dict)
    epochs: int | None = None


Solver = Callable[[Problem, float], Iterator[Trial]]


@dataclass
class Found:
    """What a solver had chosen when its seconds were over.

    ``curve`` holds (seconds, best validation loss so far); ``matched`` is when that reached the target, or infinite.
    """

    solver: str
    params: dict[str, Any]
    settings: int
    seconds: float
    cv_loss: float
    curve: list[tuple[float, float]]
    path: dict[str, list[Any]]
    matched: float
    test_loss: float
    test_accuracy: float


def run(
    name: str,
    problem: Problem,
    seconds: float = math.inf,
    *,
    trials: int | None = None,
    target: float = -math.inf,
    patience: float = 1.0,
) -> Found:
    """Run a solver on the clock; what it has chosen after ``seconds`` is scored.

    Parameters
    ----------
    name : str
        One of :data:`SOLVERS` and :data:`OF_RATES`.
    seconds : float
        A trial that has begun when they are over is finished and counts.
    trials : int, optional
        Run so many trials instead, however long they take.
    target : float
        A validation loss to match; the solver goes on for ``patience`` times its seconds until it does.
    """
    best, chosen = Trial({}, math.inf), None
    curve: list[tuple[float, float]] = []
    path: dict[str, list[Any]] = {}
    torch.manual_seed(problem.seed)  # which skorch nets draw from
    start = time.perf_counter()
    for trial in (SOLVERS | OF_RATES)[name](problem, seconds):
        now = time.perf_counter() - start  # the clock
        best, path = (trial if trial.loss < best.loss else best), trial.path or path
        curve.append((now, best.loss))
        if chosen is None and (len(curve) >= trials if trials else now >= seconds):
            chosen = (best, len(curve), now)
        if chosen and (now >= seconds * patience or best.loss <= target or trials):
            break
    best, settings, taken = chosen or (best, len(curve), time.perf_counter() - start)
    matched = next((then for then, loss in curve if loss <= target), math.inf)
    rows = slice(problem.refit_rows)
    model = clone(problem.estimator).set_params(**best.params)
    if (last := best.epochs) is not None:
        _watch(model, lambda epoch, _: epoch >= last)
    model.fit(problem.X[rows], problem.y[rows])
    return Found(
        name,
        best.params,
        settings,
        taken,
        best.loss,
        curve,
        path,
        matched,
        test_loss=problem.loss(get_scorer(problem.scoring)(model, problem.X_test, problem.y_test)),
        test_accuracy=model.score(problem.X_test, problem.y_test),
    )


# --- solvers -------------------------------------------------------------------------------------------------------------


def hypertune(problem: Problem, seconds: float) -> Iterator[Trial]:
    """HyperTrainingSearchCV with its defaults: hyper-training, verification and the refit. Takes what it takes."""
    search = HyperTrainingSearchCV(
        problem.estimator,
        {**problem.space, **problem.choices},
        cv=problem.cv,
        scoring=problem.scoring,
        refit=problem.refit_rows is None,
        random_state=problem.seed,
    ).fit(problem.X, problem.y)
    path = {name: np.asarray(values).tolist() for name, values in search.history_.items() if np.ndim(values)}
    for params, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        yield Trial({name: _plain(value) for name, value in params.items()}, problem.loss(score), path)


def defaults(problem: Problem, seconds: float) -> Iterator[Trial]:
    """The estimator as it is."""
    yield Trial({}, _cv_loss(problem, {}))


def random(problem: Problem, seconds: float) -> Iterator[Trial]:
    """The estimator's own setting, then settings drawn from the declared distributions."""
    space, rng = problem.coordinates, np.random.default_rng(problem.seed)
    yield _trial(problem, problem.current)
    while True:
        yield _trial(problem, space.decode(space.sample(1, rng)[0]) | _drawn(problem, rng))


def tpe(problem: Problem, seconds: float) -> Iterator[Trial]:
    """Optuna's TPE with Optuna 5's defaults; its first trial is the estimator's own setting."""
    return _optuna(problem, optuna.samplers.TPESampler(seed=problem.seed))


def gp(problem: Problem, seconds: float) -> Iterator[Trial]:
    """Optuna's Gaussian process with its defaults; its first trial is the estimator's own setting."""
    return _optuna(problem, optuna.samplers.GPSampler(seed=problem.seed))


def cmaes(problem: Problem, seconds: float) -> Iterator[Trial]:
    """Optuna's CMA-ES with its defaults; its first trial is the estimator's own setting."""
    return _optuna(problem, optuna.samplers.CmaEsSampler(seed=problem.seed, warn_independent_sampling=False))


def median_pruning(problem: Problem, seconds: float) -> Iterator[Trial]:
    """TPE with Optuna's median pruner, on the first fold's validation loss after every epoch."""
    return _optuna(problem, optuna.samplers.TPESampler(seed=problem.seed), optuna.pruners.MedianPruner())


def hyperband(problem: Problem, seconds: float) -> Iterator[Trial]:
    """TPE with Optuna's Hyperband, on the first fold's validation loss after every epoch."""
    pruner = optuna.pruners.HyperbandPruner(max_resource=_net(problem.estimator).max_epochs)
    return _optuna(problem, optuna.samplers.TPESampler(seed=problem.seed), pruner)


def halving(problem: Problem, seconds: float) -> Iterator[Trial]:
    """HalvingRandomSearchCV over epochs (a ninth, a third, all), with as many candidates as one timed setting says will fit."""
    space, rng = problem.coordinates, np.random.default_rng(problem.seed)
    begin = time.perf_counter()
    yield _trial(problem, problem.current)
    each = time.perf_counter() - begin
    candidates = max(3, int(3 * (seconds - each) / each))  # three rungs, each a ninth of what all candidates would cost
    drawn = [
        problem.current,
        *(space.decode(lam) | _drawn(problem, rng) for lam in space.sample(candidates, rng)),
    ]
    most = _net(problem.estimator).max_epochs
    search = HalvingRandomSearchCV(
        problem.estimator,
        [{name: [value] for name, value in params.items()} for params in drawn],
        n_candidates=len(drawn),
        resource=f"{problem.prefix}max_epochs",
        min_resources=max(1, most // 9),
        max_resources=most,
        scoring=problem.scoring,
        cv=problem.cv,
        refit=False,
        random_state=problem.seed,
    ).fit(problem.X, problem.y)
    results = search.cv_results_
    full = [i for i, n in enumerate(results["n_resources"]) if n == results["n_resources"].max()]
    best = max(full, key=lambda i: results["mean_test_score"][i])
    params = {k: v for k, v in results["params"][best].items() if k in problem.current}
    # Its last rung may have fewer epochs than the estimator: what is reported is the setting, trained in full.
    yield _trial(problem, params)


def early_stopping(problem: Problem, seconds: float) -> Iterator[Trial]:
    """The estimator as it is, stopped after the epoch at which its mean validation loss is lowest."""
    yield _stopped_trial(problem, {})


def one_weight_decay(problem: Problem, seconds: float) -> Iterator[Trial]:
    """A grid over one weight decay for all weights, refined for as long as there is time; the rest as it is."""
    return (_trial(problem, params) for params in _one_decay(problem))


def one_decay_stopped(problem: Problem, seconds: float) -> Iterator[Trial]:
    """The same grid, each setting with early stopping."""
    return (_stopped_trial(problem, params) for params in _one_decay(problem))


def _one_decay(problem: Problem) -> Iterator[dict[str, Any]]:
    yield {}
    for number in range(1, 10**6):
        share, base, digits = 0.0, 0.5, number
        while digits:  # the van der Corput sequence: ever finer grids
            share, base, digits = share + base * (digits % 2), base / 2, digits // 2
        yield {f"{problem.prefix}weight_decay": float(10 ** (-6 + 7 * share))}


def kept_rate(problem: Problem, seconds: float) -> Iterator[Trial]:
    """Ours, with the estimator's own learning rate: the others of the space. Takes what it takes."""
    space = {name: prior for name, prior in problem.space.items() if name != f"{problem.prefix}lr"}
    return hypertune(replace(problem, space=space), seconds)


def kept_sizes(problem: Problem, seconds: float) -> Iterator[Trial]:
    """Ours, with the estimator's own layers and batch size: the others of the space. Takes what it takes."""
    return hypertune(replace(problem, choices={}), seconds)


def rate_and_decay(problem: Problem, seconds: float) -> Iterator[Trial]:
    """TPE over the learning rate and one weight decay alone; the rest as it is."""
    names = [f"{problem.prefix}{name}" for name in ("lr", "weight_decay")]
    space = {name: prior.distribution if isinstance(prior := problem.space[name], Grained) else prior for name in names}
    return tpe(replace(problem, space=space), seconds)


SOLVERS: dict[str, Solver] = {
    "defaults": defaults,
    "hypertune": hypertune,
    "random": random,
    "tpe": tpe,
    "gp": gp,
    "cmaes": cmaes,
    "median": median_pruning,
    "hyperband": hyperband,
    "halving": halving,
    "one-wd": one_weight_decay,
    "early-stop": early_stopping,
    "one-wd-stop": one_decay_stopped,
}
OF_RATES: dict[str, Solver] = {"kept-lr": kept_rate, "lr-wd": rate_and_decay, "kept-net": kept_sizes}


def _drawn(problem: Problem, rng: np.random.Generator) -> dict[str, Any]:
    return {name: values[rng.integers(len(values))] for name, values in problem.choices.items()}


def _optuna(
    problem: Problem, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner | None = None
) -> Iterator[Trial]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, current = problem.coordinates, problem.current
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    names = {
        h.name: [h.name] if h.shape is None else [f"{h.name}[{j}]" for j in range(h.size)]
        for h in space.hyperparameters
    }
    study.enqueue_trial(
        {
            name: float(v)
            for h in space.hyperparameters
            for name, v in zip(names[h.name], h.flatten(current[h.name]), strict=True)
        }
        | {name: values.index(current[name]) for name, values in problem.choices.items()}
    )

    def suggest(trial: optuna.Trial, h: Hyperparameter) -> Any:
        log = h.coordinate == "log"
        return h.arrange(np.array([trial.suggest_float(name, *h.support, log=log) for name in names[h.name]]))

    while True:
        trial = study.ask()
        params = {h.name: suggest(trial, h) for h in space.hyperparameters} | {
            name: values[trial.suggest_categorical(name, range(len(values)))]
            for name, values in problem.choices.items()
        }
        try:
            loss = _cv_loss(problem, params) if pruner is None else _cv_loss_by_epoch(problem, params, trial)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            yield Trial(params, math.inf)
            continue
        study.tell(trial, loss)
        yield Trial({name: _plain(value) for name, value in params.items()}, loss)


# --- evaluation ------------------------------------------------------------------------------------------------------------


def _trial(problem: Problem, params: dict[str, Any]) -> Trial:
    return Trial({name: _plain(value) for name, value in params.items()}, _cv_loss(problem, params))


def _cv_loss(problem: Problem, params: dict[str, Any]) -> float:
    model = clone(problem.estimator).set_params(**params)
    return problem.loss(cross_val_score(model, problem.X, problem.y, cv=problem.cv, scoring=problem.scoring).mean())


def _stopped_trial(problem: Problem, params: dict[str, Any]) -> Trial:
    """A setting, stopped after the epoch at which its validation loss, mean over folds, is lowest."""
    curves: list[list[float]] = []
    for net, train, score in _fits(problem, params):
        curve: list[float] = []
        _watch(net, _recorder(score, curve))
        net.fit(*train)
        curves.append(curve)
    mean = np.mean(curves, axis=0)
    return Trial(params, problem.loss(mean.max()), epochs=int(mean.argmax()) + 1)


def _recorder(score: Callable[[Any], float], curve: list[float]) -> Callable[[int, Any], None]:
    return lambda epoch, net: curve.append(score(net))


def _cv_loss_by_epoch(problem: Problem, params: dict[str, Any], trial: optuna.Trial) -> float:
    """The cross-validated loss; the first fold reports its validation loss after every epoch and may be pruned there."""
    scores: list[float] = []
    for net, train, score in _fits(problem, params):
        if not scores:

            def report(epoch: int, model: Any, score: Callable[[Any], float] = score) -> None:
                trial.report(problem.loss(score(model)), epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned

            _watch(net, report)
        scores.append(score(net.fit(*train)))
    return problem.loss(np.mean(scores))


def _fits(
    problem: Problem, params: dict[str, Any]
) -> Iterator[tuple[Any, tuple[np.ndarray, np.ndarray], Callable[[Any], float]]]:
    """Of each fold a net to fit, its training rows, and the validation score of a fitted net."""
    for train, valid in problem.cv.split(problem.X, problem.y):
        model = clone(problem.estimator).set_params(**params)
        net, X_train, X_valid, y_train = _net(model), problem.X[train], problem.X[valid], problem.y[train]
        if isinstance(model, Pipeline):
            X_train = model[:-1].fit_transform(X_train, y_train)
            X_valid = model[:-1].transform(X_valid)
        yield net, (X_train, y_train), partial(_score, problem.scoring, X_valid, problem.y[valid])


def _score(scoring: str, X: np.ndarray, y: np.ndarray, model: Any) -> float:
    return float(get_scorer(scoring)(model, X, y))


def _watch(model: Any, see: Callable[[int, Any], bool | None]) -> None:
    """Have ``see(epoch, net)`` called after each epoch of a fit, from 1; it stops the fit by answering True."""
    net = _net(model)
    if not hasattr(net, "set_callbacks"):
        raise RuntimeError(
            "What looks at every epoch goes through scikit-learn's callbacks: it needs scikit-learn 1.9."
        )
    net.set_callbacks(_Watch(see))


class _Watch:
    """A callback of scikit-learn's around a function."""

    def __init__(self, see: Callable[[int, Any], bool | None]):
        self.see = see

    def setup(self, estimator: Any, context: Any) -> None:
        """Nothing to prepare."""

    def teardown(self, estimator: Any, context: Any) -> None:
        """Nothing to clear away."""

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        """Nothing is known yet."""

    def on_fit_task_end(self, estimator: Any, context: Any, *, fitted_estimator: Any = None) -> bool:
        """Show the net after an epoch."""
        return context.task_name == "epoch" and bool(self.see(context.task_id + 1, fitted_estimator))


def _net(model: Any) -> Any:
    return model.steps[-1][1] if isinstance(model, Pipeline) else model


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts of them, for JSON and for ``set_params``."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return np.asarray(value).tolist()
