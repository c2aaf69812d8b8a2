"""Parameters with a list of values, which no gradient can choose from: sizes of layers, batch sizes, optimizers.

>>> import torch
>>> from scipy.stats import uniform
>>> choices, ranges = split({"weight_decay": uniform(0, 1), "batch_size": [32, 64]})
>>> choose(choices, {"batch_size": 32}, lambda values: torch.tensor([1.0, 2.0]) / values["batch_size"])
{'batch_size': 64}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Number
from typing import Any

import joblib
import numpy as np
import torch
from optuna.distributions import CategoricalDistribution
from torch import Tensor

Values = dict[str, Any]
_NOTICEABLE = 0.05  # of a loss: what is less is level, in a short training


def split(
    param_distributions: Mapping[str, Any], tuned: Iterable[str] = ()
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """What a value is chosen for (lists, tuples, arrays, ranges, ``CategoricalDistribution``), and what has a range; both by name.

    ``tuned`` are names that are no choices whatever they have: a gradient tunes them. Raises ValueError for an empty list.
    """
    choices: dict[str, list[Any]] = {}
    for name, values in param_distributions.items():
        if name in tuned:
            continue
        if isinstance(values, CategoricalDistribution):
            values = values.choices
        if isinstance(values, (list, tuple, range)) or (isinstance(values, np.ndarray) and values.ndim):
            choices[name] = values.tolist() if isinstance(values, np.ndarray) else list(values)
            if not choices[name]:
                raise ValueError(f"param_distributions[{name!r}] is empty: there is nothing to choose from.")
    return choices, {name: d for name, d in param_distributions.items() if name not in choices}


def own_values(choices: Mapping[str, list[Any]], settings: Mapping[str, Any]) -> Values:
    """The estimator's own value of each, or the first of the list, if it is not one of them."""
    return {
        name: next((value for value in values if same(value, settings[name])), values[0])
        for name, values in choices.items()
    }


def same(one: Any, other: Any) -> bool:
    """Whether two values of a parameter are the same: equal numbers of one kind, sequences of such, or objects that are pickled alike."""
    if one is other:
        return True
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Number) and isinstance(other, Number):
        kinds = (bool, np.bool_), Integral
        return one == other and all(isinstance(one, kind) == isinstance(other, kind) for kind in kinds)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    try:
        return type(one) is type(other) and joblib.hash(one) == joblib.hash(other)
    except Exception:  # what cannot be pickled is the same as itself alone
        return False


def alternatives(choices: Mapping[str, list[Any]], own: Values) -> list[tuple[str, Any]]:
    """All values but the own ones, each once, with their names."""
    found: list[tuple[str, Any]] = []
    for name, values in choices.items():
        for value in values:
            if not any(same(value, known) for known in [own[name], *(v for k, v in found if k == name)]):
                found.append((name, value))
    return found


def choose(choices: Mapping[str, list[Any]], own: Values, losses_at: Callable[[Values], Tensor | None]) -> Values:
    """The best values, one parameter after the other, the others being the best so far.

    A value is left for another if that is better by more than 5%, and on several folds by more than one standard error of their differences.
    Compared are the folds that both were tried on.

    Parameters
    ----------
    choices : mapping from str to list
    own : dict from str to value
        Where it begins.
    losses_at : callable
        Values by name → losses of some of the folds, the first ones, (some,); None if they cannot be had.

    Returns
    -------
    dict
        What ``losses_at`` was called with; ``own`` itself if nothing is better, or its losses cannot be had.
    """
    others = alternatives(choices, own)
    best, losses = own, losses_at(own) if others else None
    for name, value in others if losses is not None else ():
        new = best | {name: value}
        found = losses_at(new)
        if found is not None and losses is not None and _better(found, losses):
            best, losses = new, found
    return best


def _better(others: Tensor, losses: Tensor) -> bool:
    common = min(len(others), len(losses))
    others, losses = others[:common], losses[:common]
    if not others.isfinite().all() or not losses.isfinite().all():
        return float(others.mean()) < float(losses.mean())
    gain = losses - others
    error = float(gain.std()) / math.sqrt(common) if common > 1 else 0.0
    return float(gain.mean()) > max(error, _NOTICEABLE * abs(float(losses.mean())))
