"""What a user's function takes, and what it keeps.

>>> keywords_of(lambda weights, strength=1.0: 0.0)
{'strength': 1.0}
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from numbers import Number
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_SMALL = 10_000  # numbers in an array: larger ones are data


def keywords_of(function: Any) -> dict[str, Any]:
    """The keywords of a plain function (or ``functools.partial`` of one) that have a value, and their values."""
    if function is None or hasattr(function, "get_params"):
        return {}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def with_keywords(name: str, function: Any, keywords: dict[str, Any]) -> Any:
    """The function with other values of its keywords; raises ValueError for one that it does not have."""
    if unknown := sorted(keywords.keys() - (known := keywords_of(function)).keys()):
        raise ValueError(
            f"Invalid parameter {unknown[0]!r} for {name}={function!r}. Valid parameters are: {sorted(known)}."
        )
    return functools.partial(function, **keywords)


def state_of(value: Any, seen: set[int] | None = None) -> Any:
    """What a user's function, or the object that it belongs to, keeps and may change when it is called, to be compared: a count, say.

    Numbers and strings, tensors (by identity and version) and small arrays, in containers, attributes and closures.
    """
    seen = set() if seen is None else seen
    if value is None or isinstance(value, (str, Number)):
        return repr(value)
    if id(value) in seen or isinstance(value, (type, ModuleType)):
        return None
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes() if value.size <= _SMALL else None
    return [state_of(one, seen) for one in _kept_by(value)]


def _kept_by(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, deque)):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [*cells, value.__defaults__, value.__kwdefaults__, vars(value)]
    return [getattr(value, "__dict__", {})]


def own_copy(function: Any) -> Any:
    """A copy of an object that is called like a function; the function itself, and what cannot be copied."""
    try:
        return copy.deepcopy(function)
    except Exception:
        return function


def check_call(who: str, how: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise TypeError, saying how it is called, if a user's function does not take these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{who} is called with {how}, which it does not take: {error}.") from error
    except ValueError:  # it has no signature to look at
        pass
