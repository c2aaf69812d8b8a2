"""What a user's function takes, and what it keeps.

>>> keywords_of(lambda weights, strength=1.0: 0.0)
{'strength': 1.0}
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from numbers import Number
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_MOST = 10_000  # things looked at, and entries of a container: more are data


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


def state_of(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """What a user's function, or the object that it belongs to, keeps and may change when it is called, to be compared: a count, say.

    Numbers, strings and arrays (of any size), in containers, attributes and closures, up to 10,000 of them. What is no number and no
    container is followed into its attributes; global variables are not.
    """
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (str, Number)):
        return repr(value)
    if id(value) in seen or len(seen) > _MOST or isinstance(value, (type, ModuleType)):
        return None
    seen[id(value)] = value  # kept alive, so that no other object gets its id
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.is_quantized:
            return None
        value = value.detach().to_dense().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return hash(value.tobytes())
    kept = _kept_by(value)
    return _opaque(value) if kept is None else [state_of(one, seen) for one in kept]


def _opaque(value: Any) -> Any:
    """The state of an object that does not say what it holds, as generators and iterators do not; what cannot be pickled may be any."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of iterators, from Python 3.12 on
            return pickle.dumps(value)
    except Exception:
        return repr(value)[:_MOST]


def _kept_by(value: Any) -> Any:
    """What an object holds; None of one that does not say."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()] if len(value) <= _MOST else []
    if isinstance(value, (list, tuple, set, deque)):
        return list(value) if len(value) <= _MOST else []
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return [value.getstate()]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [*cells, value.__defaults__, value.__kwdefaults__, vars(value)]
    slots = [name for cls in type(value).__mro__ for name in np.atleast_1d(getattr(cls, "__slots__", []))]
    if slots or hasattr(value, "__dict__"):
        return [getattr(value, "__dict__", {}), *(getattr(value, name, None) for name in slots)]
    return None


def own_copy(function: Any) -> Any:
    """A copy of an object that is called like a function, or of a tuple of them; a plain function itself, and what cannot be copied."""
    try:
        return copy.deepcopy(function)
    except Exception:
        return tuple(map(own_copy, function)) if isinstance(function, tuple) else function


def check_call(who: str, how: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise TypeError, saying how it is called, if a user's function does not take these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{who} is called with {how}, which it does not take: {error}.") from error
    except ValueError:  # it has no signature to look at
        pass
