"""Named, bounded hyperparameters ⇄ one vector λ ∈ Rⁿ.

This is the only room that knows logarithms and bounds. Outside it a hyperparameter is a plain Python float under
its scikit-learn name; inside, all of them are one vector whose every coordinate has a comparable unit:

>>> from scipy.stats import loguniform, uniform
>>> space = Space.from_distributions({"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8)})
>>> lam = space.encode({"weight_decay": 1e-3, "module__dropout": 0.2})
>>> {name: round(value, 4) for name, value in space.decode(lam).items()}
{'weight_decay': 0.001, 'module__dropout': 0.2}

=============================  =============================  ===================================
distribution                   coordinate                     one unit of λ is
=============================  =============================  ===================================
log, 0 < low ≤ value ≤ high    log value                      a factor of e
low ≤ value ≤ high             4 (value − low)/(high − low)   a quarter of the range
low < value, no upper bound    log(value − low)               a factor of e in the distance to low
unbounded                      (value − median)/spread        one standard deviation
=============================  =============================  ===================================

Bounds are walls: λ is clipped to its box, so a bound itself (no dropout at all) can be the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from scipy.stats import loguniform, uniform
from scipy.stats._distn_infrastructure import rv_continuous_frozen
from torch import Tensor

_UNITS_PER_RANGE = 4.0
_LOG_UNIFORM = ("loguniform", "reciprocal")


@dataclass(frozen=True)
class Hyperparameter:
    """One continuous hyperparameter: its name, its prior and its coordinate λ.

    Parameters
    ----------
    name : str
        The scikit-learn parameter name, such as ``"weight_decay"`` or ``"module__dropout"``.
    prior : scipy.stats frozen continuous distribution
        What the user declared.
    support : tuple of two float
        The declared bounds of the value.
    coordinate : {"log", "linear"}
        Which of the two maps of the module's table λ is. Both are affine after an optional logarithm.
    offset, unit : float
        ``value = offset + exp(λ)`` for "log" and ``value = offset + unit · λ`` for "linear".
    low, high : float
        Bounds of λ (not of the value); infinite where the distribution has none.
    """

    name: str
    prior: Any
    support: tuple[float, float]
    coordinate: Literal["log", "linear"]
    offset: float
    unit: float
    low: float
    high: float

    @classmethod
    def from_distribution(cls, name: str, distribution: Any) -> Hyperparameter:
        """Read one entry of ``param_distributions``.

        Raises
        ------
        ValueError, TypeError
            If a gradient cannot tune it: a list, a discrete or stepped distribution, an empty or infinite range.
        """
        prior, log = _as_prior(name, distribution)
        low, high = (float(bound) for bound in prior.support())
        if not low < high:
            raise ValueError(f"param_distributions[{name!r}]: the range [{low}, {high}] is empty; give low < high.")
        if log:
            return cls(name, prior, (low, high), "log", 0.0, 1.0, math.log(low), math.log(high))
        if math.isfinite(low) and math.isfinite(high):
            return cls(
                name,
                prior,
                (low, high),
                "linear",
                low,
                (high - low) / _UNITS_PER_RANGE,
                0.0,
                _UNITS_PER_RANGE,
            )
        if math.isfinite(low):
            return cls(name, prior, (low, high), "log", low, 1.0, -math.inf, math.inf)
        if math.isinf(high):
            spread = float(np.diff(prior.ppf([0.16, 0.84]))[0]) / 2
            return cls(name, prior, (low, high), "linear", float(prior.median()), spread, -math.inf, math.inf)
        raise ValueError(
            f"param_distributions[{name!r}]: a range (-inf, {high}] without lower bound is not supported; "
            "bound it on both sides, on neither side, or from below."
        )

    def encode(self, value: float) -> float:
        """Value → λ, clipped to the bounds."""
        distance = float(value) - self.offset
        if self.coordinate == "linear":
            lam = distance / self.unit
        else:
            lam = math.log(distance) if distance > 0 else -math.inf
        return min(max(lam, self.low), self.high)

    def decode(self, lam: Tensor) -> Tensor:
        """λ → value, elementwise, always inside the declared bounds."""
        value = self.offset + (lam.exp() if self.coordinate == "log" else self.unit * lam)
        return value.clamp(*self.support)


def _as_prior(name: str, distribution: Any) -> tuple[Any, bool]:
    """The entry as a frozen scipy distribution, and whether its natural coordinate is a logarithm."""
    where = f"param_distributions[{name!r}]"
    outer = "gradients cannot tune it: set it on the estimator, or give it to an outer search (OptunaSearchCV, GridSearchCV)."
    if isinstance(distribution, FloatDistribution):
        if distribution.step is not None:
            raise ValueError(f"{where}: {distribution!r} moves in steps; {outer} Or leave `step` out.")
        low, high = distribution.low, distribution.high
        if not low < high:
            raise ValueError(f"{where}: the range [{low}, {high}] is empty; give low < high.")
        return (loguniform(low, high), True) if distribution.log else (uniform(low, high - low), False)
    if isinstance(distribution, BaseDistribution):
        raise ValueError(f"{where}: {distribution!r} is discrete; {outer}")
    if isinstance(distribution, rv_continuous_frozen):
        log = distribution.dist.name in _LOG_UNIFORM
        low, _ = distribution.support()
        if math.isnan(low):  # scipy answers nan for shape arguments outside the family
            bound = "a log distribution needs 0 < low < high" if log else "its arguments are outside the family"
            raise ValueError(f"{where}: {distribution.dist.name}{distribution.args} has no support: {bound}.")
        if log and low <= 0:
            raise ValueError(f"{where}: the lower bound of a log distribution must be positive, got {low}.")
        return distribution, log
    if hasattr(distribution, "rvs"):
        raise ValueError(f"{where}: {distribution!r} is not a continuous distribution; {outer}")
    if isinstance(distribution, (list, tuple, np.ndarray, range)):
        raise ValueError(f"{where}: a list of choices has no gradient; {outer}")
    raise TypeError(
        f"{where}: got {distribution!r}; expected a frozen continuous scipy.stats distribution, such as "
        "loguniform(1e-6, 1e1) or uniform(0, 0.8), or optuna.distributions.FloatDistribution."
    )


@dataclass(frozen=True)
class Space:
    """The hyperparameters of one search, in order: coordinate j of λ belongs to ``hyperparameters[j]``."""

    hyperparameters: tuple[Hyperparameter, ...]

    @classmethod
    def from_distributions(cls, param_distributions: Mapping[str, Any]) -> Space:
        """Read ``param_distributions``: a dict from parameter name to distribution.

        Raises
        ------
        TypeError, ValueError
            If it is no dict, is empty, or an entry cannot be tuned by gradient.
        """
        if not isinstance(param_distributions, Mapping):
            raise TypeError(
                f"param_distributions must be one dict from parameter name to distribution, got {param_distributions!r}."
            )
        if not param_distributions:
            raise ValueError("param_distributions is empty: there is nothing to tune.")
        return cls(tuple(Hyperparameter.from_distribution(k, v) for k, v in param_distributions.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of λ."""
        return tuple(h.name for h in self.hyperparameters)

    @property
    def n(self) -> int:
        """Length of λ."""
        return len(self.hyperparameters)

    @property
    def low(self) -> Tensor:
        """Lower bounds of λ, shape (n,)."""
        return torch.tensor([h.low for h in self.hyperparameters], dtype=torch.float64)

    @property
    def high(self) -> Tensor:
        """Upper bounds of λ, shape (n,)."""
        return torch.tensor([h.high for h in self.hyperparameters], dtype=torch.float64)

    def encode(self, params: Mapping[str, float]) -> Tensor:
        """Values by name → λ of shape (n,), clipped to the bounds."""
        return torch.tensor([h.encode(params[h.name]) for h in self.hyperparameters], dtype=torch.float64)

    def values(self, lam: Tensor) -> dict[str, Tensor]:
        """λ of shape (..., n) → values by name, each of shape (...)."""
        return {h.name: h.decode(lam[..., j]) for j, h in enumerate(self.hyperparameters)}

    def decode(self, lam: Tensor) -> dict[str, float]:
        """One λ of shape (n,) → plain Python floats by name, inside the declared bounds."""
        return {name: float(value) for name, value in self.values(lam.detach().double()).items()}

    def quantile(self, q: np.ndarray) -> Tensor:
        """Quantiles (m, n) of the priors → λ of shape (m, n)."""
        columns = [
            [h.encode(value) for value in np.atleast_1d(h.prior.ppf(q[:, j]))]
            for j, h in enumerate(self.hyperparameters)
        ]
        return torch.tensor(columns, dtype=torch.float64).T

    def sample(self, m: int, rng: np.random.Generator) -> Tensor:
        """Draw m settings from the declared priors; λ of shape (m, n)."""
        return self.quantile(rng.uniform(size=(m, self.n)))
