"""Where a factory keyword arrives in the module.

A keyword such as ``dropout`` of ``MLP(dropout=...)`` sets numbers inside the module it builds. :func:`find_reach`
builds the module at three values of the keyword and sees which numbers move; during hyper-training those numbers, in
*our* copy of the module, are set to each model's own value before every forward pass.

>>> find_reach(lambda rate: nn.Sequential(nn.Linear(2, 2), nn.Dropout(rate / 2)), 0.0, 0.8)
[Reach(path='1', name='p', a=0.0, b=0.5)]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Reach(NamedTuple):
    """A number in the module that a factory keyword sets: attribute ``name`` of submodule ``path``, at ``a + b·value``."""

    path: str
    name: str
    a: float
    b: float


def find_reach(build: Callable[[float], nn.Module], low: float, high: float) -> list[Reach]:
    """Find every number in the module that depends on a keyword, by building it at three values.

    Parameters
    ----------
    build : callable
        Keyword value → freshly built module.
    low, high : float
        Two values that the keyword may take.

    Raises
    ------
    ValueError
        If the keyword reaches nothing, changes the architecture, or a number depends on it in a way that is not affine.
    """
    probes = (low, (low + high) / 2, high)
    modules = []
    for value in probes:
        try:
            modules.append(build(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the factory does not take {value:g} for it ({str(error).rstrip('.')})") from error
    shapes = [[(k, tuple(p.shape)) for k, p in m.named_parameters()] for m in modules]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ValueError("it changes the architecture, not a rate, so there is no gradient to follow")
    numbers = [_numbers(m) for m in modules]
    reach = []
    for path, name in numbers[0]:
        y0, y1, y2 = (float(n.get((path, name), math.nan)) for n in numbers)
        if y0 == y1 == y2 or math.isnan(y0 + y1 + y2):
            continue
        if not math.isclose(y1, (y0 + y2) / 2, rel_tol=1e-6, abs_tol=1e-12):
            raise ValueError(f"it sets {path}.{name} to a function of it that is not affine")
        b = (y2 - y0) / (high - low)
        reach.append(Reach(path, name, y0 - b * low, b))
    if not reach:
        raise ValueError(
            "it reaches nothing in the model that can be set: no number that a module keeps as an attribute with a public name "
            "(self.rate = rate; not in a list, a dict or a closure) depends on it"
        )
    return reach


def _numbers(module: nn.Module) -> dict[tuple[str, str], float]:
    return {
        (path, name): value
        for path, sub in module.named_modules()
        for name, value in vars(sub).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("_")
    }
