"""What a figure is, and what it yields: rows of plain numbers, from which it can be drawn again without a rerun.

>>> row("grid", seconds=1.23456789, valid=0.1, lam=-7.0)
{'solver': 'grid', 'seconds': 1.23457, 'step': None, 'valid': 0.1, 'test': None, 'lam': -7.0}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

Row = dict[str, Any]

_DIGITS = 6  # significant ones, in a committed file


class FigureModule(Protocol):
    """The interface of a file of this package.

    Attributes
    ----------
    TITLE : str
        One line for ``python -m benchmarks list``.
    BUDGETS : dict from str to NamedTuple
        Steps and sizes of "smoke" and of "full".
    """

    TITLE: str
    BUDGETS: dict[str, Any]

    def cells(self, seed: int, budget: str, directory: str | None) -> Iterator[Row]:
        """Run every solver with one seed. Test rows are looked at off the clock, and no solver sees them."""
        ...

    def plot(self, rows: list[Row], figure: Figure) -> None:
        """Draw the rows of all seeds into an empty figure."""
        ...

    def table(self, rows: list[Row]) -> str:
        """Markdown: the figure's numbers over seeds, and what they say in words."""
        ...


def row(
    solver: str,
    *,
    seconds: float | None = None,
    step: int | None = None,
    valid: float | Tensor | None = None,
    test: float | Tensor | None = None,
    **more: Any,
) -> Row:
    """One point of one solver's curve, or its one result.

    Parameters
    ----------
    solver : str
    seconds : float, optional
        On the solver's clock.
    step : int, optional
    valid, test : float or Tensor of shape (), optional
        Losses, mean over rows.
    **more
        Numbers, strings, lists, arrays or tensors of the figure's own.
    """
    named = {"solver": solver, "seconds": seconds, "step": step, "valid": valid, "test": test, **more}
    return {name: _plain(value) for name, value in named.items()}


def _plain(value: Any) -> Any:
    """Python numbers of six significant digits, and lists of them."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    array = np.asarray(value)
    return _plain(list(array)) if array.ndim else float(f"{float(array):.{_DIGITS}g}")


def pick(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows that have these values: ``pick(rows, solver="grid", seed=0)``."""
    return [r for r in rows if all(r.get(name) == value for name, value in fields.items())]


def seeds(rows: Iterable[Row]) -> list[int]:
    """The seeds there are, ascending."""
    return sorted({r["seed"] for r in rows})


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard error over seeds; a dash if one of them has no finite value."""
    if not np.isfinite(values).all():
        return "–"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as GitHub reads it."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
