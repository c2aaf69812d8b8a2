"""What a user's function takes, and what it keeps.

>>> keywords_of(lambda weights, strength=1.0: 0.0)
{'strength': 1.0}
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


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


def numbers_in(function: Any) -> dict[str, float]:
    """What an object that is called like a function keeps as numbers: a count of its calls, say."""
    if isinstance(function, functools.partial):
        return numbers_in(function.func)
    holder = getattr(function, "__self__", function)  # of a method
    return {k: v for k, v in getattr(holder, "__dict__", {}).items() if isinstance(v, (int, float))}


def check_call(who: str, how: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise TypeError, saying how it is called, if a user's function does not take these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{who} is called with {how}, which it does not take: {error}.") from error
    except ValueError:  # it has no signature to look at
        pass
