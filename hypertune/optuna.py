"""A fitted search as an Optuna study: for Optuna's pictures, its dashboard and storages, and to go on with its samplers.

An outer study, in which each trial is a whole search, is in docs/choosing.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sklearn.utils.validation import check_is_fitted

from hypertune.choices import split
from hypertune.search import HyperTrainingSearchCV
from hypertune.space import Hyperparameter, Space

_MOST = 1_000  # parameters of a trial
_TAIL = 1e-4  # quantile at which an unbounded distribution ends in a study


def to_study(search: HyperTrainingSearchCV, study: optuna.Study | None = None) -> optuna.Study:
    """The candidates of a fitted search as trials: their parameters, and the mean test score that is maximised.

    Each number is a parameter of the name it has in ``best_params_``, of a finer grain ``name[parameter][index]``. A candidate that
    failed is a failed trial. A value out of a list is a category, of tuples and objects their repr. Split scores, their standard deviation and the fit times are user attributes, under their names in ``cv_results_``.

    Parameters
    ----------
    search : HyperTrainingSearchCV
        Fitted.
    study : optuna.Study, optional
        Where the trials are added; of the direction "maximize". None means a new one in memory.

    Returns
    -------
    optuna.Study

    Raises
    ------
    ValueError
        For a study of another direction, several metrics of which none is refitted, or more than 1,000 numbers in a setting.
    sklearn.exceptions.NotFittedError
        For a search that was not fitted.

    Examples
    --------
    >>> from scipy.stats import loguniform
    >>> from sklearn.datasets import load_iris
    >>> from hypertune import HyperTrainingSearchCV, TorchClassifier
    >>> net = TorchClassifier(max_epochs=5, random_state=0)
    >>> search = HyperTrainingSearchCV(net, {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0)
    >>> study = to_study(search.fit(*load_iris(return_X_y=True)))
    >>> study.best_params == search.best_params_
    True
    """
    check_is_fitted(search, "cv_results_")
    space, results = search.best_response_.space, search.cv_results_
    beside = [name for name in results["params"][0] if name not in space.names]  # what the response lacks
    choices, ranges = split({name: d for name, d in search.param_distributions.items() if name in beside})
    if rate := {name: d for name, d in ranges.items() if name in search.history_}:
        space = Space(space.hyperparameters + Space.from_distributions(rate).hyperparameters)
    metric = "score" if not search.multimetric_ else search.refit
    if f"mean_test_{metric}" not in results:
        raise ValueError(
            f"The search has several metrics, and refit={search.refit!r} names none of them: which one is a trial's value? Set refit "
            "to one of the names in scoring."
        )
    if space.n > _MOST:
        raise ValueError(
            f"A setting of this search has {space.n} numbers, and a trial holds {_MOST} at most: see best_params_."
        )
    if study is None:
        study = optuna.create_study(direction="maximize")
    elif [d.name for d in study.directions] != ["MAXIMIZE"]:
        raise ValueError(
            f"Scores are maximised, and the study's directions are {[d.name.lower() for d in study.directions]}: "
            'create it with direction="maximize".'
        )
    study.add_trials([_trial(space, choices, results, metric, row) for row in range(len(results["params"]))])
    return study


def _trial(
    space: Space, choices: Mapping[str, list[Any]], results: dict[str, Any], metric: Any, row: int
) -> FrozenTrial:
    params: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for h in space.hyperparameters:
        for name, value in _numbers(h, results["params"][row][h.name]):
            params[name], distributions[name] = value, _distribution(h, value)
    for name, values in choices.items():
        params[name] = _category(results["params"][row][name])
        distributions[name] = CategoricalDistribution(list(dict.fromkeys([*map(_category, values), params[name]])))
    score = float(results[f"mean_test_{metric}"][row])
    attributes = {
        name: float(values[row])
        for name, values in results.items()
        if name.endswith((f"_test_{metric}", "_time")) and not name.startswith("rank_")
    }
    return create_trial(
        state=TrialState.COMPLETE if math.isfinite(score) else TrialState.FAIL,
        value=score if math.isfinite(score) else None,
        params=params,
        distributions=distributions,
        user_attrs=attributes,
    )


def _category(value: Any) -> Any:
    """A value of a list, as Optuna stores it."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _numbers(h: Hyperparameter, value: Any) -> Iterator[tuple[str, float]]:
    """A value's numbers, each under a name of its own."""
    if h.shape is None:
        yield h.name, float(value)
        return
    for key, part in value.items() if isinstance(value, dict) else [(None, value)]:
        where = h.name if key is None else f"{h.name}[{key}]"
        for index, number in np.ndenumerate(part):
            yield where + (f"[{','.join(map(str, index))}]" if index else ""), float(number)


def _distribution(h: Hyperparameter, value: float) -> FloatDistribution:
    """The declared range; of an unbounded one nearly all, and the value."""
    low, high = h.support
    if not (math.isfinite(low) and math.isfinite(high)):
        ends = h.prior.ppf([_TAIL, 1 - _TAIL])
        low = low if math.isfinite(low) else min(float(ends[0]), value)
        high = high if math.isfinite(high) else max(float(ends[1]), value)
    return FloatDistribution(low, high, log=h.has_log_axis and low > 0)
