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

A hyperparameter of a finer grain (``per_layer(loguniform(...))``) has many coordinates, all under one prior. How many, and
how they are arranged, is known once the model is: :meth:`Space.resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from scipy.stats import loguniform, rv_continuous, uniform
from scipy.stats._distn_infrastructure import rv_continuous_frozen
from torch import Tensor

_UNITS_PER_RANGE = 4.0
_MOST = 3e38  # what float32 can hold
_LOG_UNIFORM = ("loguniform", "reciprocal")
# For what no gradient can tune.
OUTER = "an outer search (GridSearchCV, or OptunaSearchCV of optuna-integration)"
ELSEWHERE = f"set it on the estimator, give a list of values to compare, or give it to {OUTER}."


Grain = Literal["layer", "unit", "weight", "feature", "row"]

# How the coordinates of one hyperparameter are arranged: by name, each of the shape that broadcasts to what it belongs to
# (parameters of the module), or one array.
Shape = Mapping[str, tuple[int, ...]] | tuple[int, ...]

# What a hyperparameter is to the user: a number, an array, or numbers and arrays by name.
Value = float | np.ndarray | Mapping[str, "float | np.ndarray"]


@dataclass(frozen=True)
class Grained:
    """A distribution and the grain at which it holds: what :func:`per_layer` and its kin return."""

    distribution: Any
    grain: Grain

    def __repr__(self) -> str:
        return f"per_{self.grain}({self.distribution!r})"


def per_layer(distribution: Any) -> Grained:
    """Its own value for every layer: for each penalised parameter of the module, a number."""
    return Grained(distribution, "layer")


def per_unit(distribution: Any) -> Grained:
    """Its own value for every output unit or channel: for each penalised parameter, one number per row."""
    return Grained(distribution, "unit")


def per_weight(distribution: Any) -> Grained:
    """Its own value for every weight: for each penalised parameter, an array of its shape."""
    return Grained(distribution, "weight")


def per_feature(distribution: Any) -> Grained:
    """Its own value for every input feature or channel.

    Of ``weight_decay`` and ``l1``: for the first layer, one number per input (automatic relevance determination), and one
    number for each further layer. Of ``input_noise``: an array of shape (n_features,).
    """
    return Grained(distribution, "feature")


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
    grain : {"layer", "unit", "weight", "feature", "row"} or None
        None for a single number.
    shape : mapping from str to tuple, tuple, or None
        How many coordinates there are and how they are arranged; None for a single number, or until it is resolved.
    prefix : str, default=""
        What of the name precedes the net's own: ``"net__"`` in a Pipeline.
    is_rate : bool, default=False
        Whether it is the learning rate, of which some values are tried: no gradient moves it.
    """

    name: str
    prior: Any
    support: tuple[float, float]
    coordinate: Literal["log", "linear"]
    offset: float
    unit: float
    low: float
    high: float
    grain: Grain | None = None
    shape: Shape | None = None
    prefix: str = ""
    is_rate: bool = False

    @property
    def own(self) -> str:
        """The net's own name for it."""
        return self.name.removeprefix(self.prefix)

    @classmethod
    def from_distribution(cls, name: str, distribution: Any) -> Hyperparameter:
        """Read one entry of ``param_distributions``.

        Raises
        ------
        ValueError, TypeError
            If a gradient cannot tune it: a list, a discrete or stepped distribution, an empty or infinite range.
        """
        if isinstance(distribution, Grained):
            if isinstance(distribution.distribution, Grained):
                raise ValueError(f"param_distributions[{name!r}]: {distribution!r} has two grains; choose one.")
            return replace(cls.from_distribution(name, distribution.distribution), grain=distribution.grain)
        prior, log = _as_prior(name, distribution)
        low, high = (float(bound) for bound in prior.support())
        if not low < high:
            raise ValueError(f"param_distributions[{name!r}]: the range [{low}, {high}] is empty; give low < high.")
        if any(math.isfinite(bound) and abs(bound) > _MOST for bound in (low, high)):
            raise ValueError(
                f"param_distributions[{name!r}]: the range [{low:g}, {high:g}] is beyond what float32 can hold."
            )
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

    @property
    def has_log_axis(self) -> bool:
        """Whether one unit of λ is a factor of e in the value itself (and not in its distance to a lower bound)."""
        return self.coordinate == "log" and self.offset == 0.0

    @property
    def size(self) -> int:
        """How many coordinates of λ it has."""
        if self.shape is None:
            if self.grain is not None:
                raise ValueError(f"{self.name}: how many values per_{self.grain} means is known once a model is built.")
            return 1
        shapes = self.shape.values() if isinstance(self.shape, Mapping) else [self.shape]
        return sum(math.prod(shape) for shape in shapes)

    def encode(self, value: Value) -> np.ndarray:
        """Value → λ of shape (size,), clipped to the bounds."""
        return self.to_lam(self.flatten(value))

    def to_lam(self, values: np.ndarray) -> np.ndarray:
        """Values → λ, elementwise, clipped to the bounds; the inverse of :meth:`decode`."""
        if self.coordinate == "linear":
            lam = (values - self.offset) / self.unit
        else:
            with np.errstate(divide="ignore"):
                lam = np.log(np.maximum(values - self.offset, 0.0))
        return lam.clip(self.low, self.high)

    def flatten(self, value: Value) -> np.ndarray:
        """A number, an array, or a dict of them → one value for each coordinate, shape (size,).

        Raises
        ------
        ValueError
            If names or shapes are not those of the model.
        """
        if not isinstance(self.shape, Mapping):
            return _broadcast(value, self.shape or (), self.name).reshape(-1)
        if isinstance(value, Mapping):
            if unknown := sorted(value.keys() - self.shape.keys()):
                raise ValueError(f"{self.name}: got values for {unknown}; the model has {list(self.shape)}.")
            pieces = [_broadcast(value.get(k, 0.0), s, f"{self.name}[{k!r}]") for k, s in self.shape.items()]
        else:
            pieces = [_broadcast(value, shape, self.name) for shape in self.shape.values()]
        return np.concatenate([piece.reshape(-1) for piece in pieces])

    def arrange(self, flat: np.ndarray) -> Any:
        """One value for each coordinate, (size,) → a float, an array, or a dict of them: the inverse of :meth:`flatten`."""
        if self.shape is None:
            return float(flat[0])
        if not isinstance(self.shape, Mapping):
            return flat.reshape(self.shape)
        ends = np.cumsum([math.prod(shape) for shape in self.shape.values()])
        pieces = dict(zip(self.shape, np.split(flat, ends[:-1]), strict=True))
        return {k: float(pieces[k][0]) if shape == () else pieces[k].reshape(shape) for k, shape in self.shape.items()}

    def decode(self, lam: Tensor) -> Tensor:
        """λ → value, elementwise, always inside the declared bounds."""
        value = lam.exp() if self.coordinate == "log" else self.unit * lam
        value = value + self.offset if self.offset else value
        if not value.requires_grad:
            return value.clamp(*self.support)
        inside: Tensor = _Inside.apply(value, *self.support)
        return inside


class _Inside(torch.autograd.Function):
    """Clamped, with the derivative of what was clamped: λ is in its box, and its value outside by rounding at most.

    With the derivative of ``clamp`` a λ at a bound that rounds to the wrong side of it would never leave it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _broadcast(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), shape)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name}: {np.shape(value) or type(value).__name__} does not broadcast to the model's {shape}."
        ) from error


def _as_prior(name: str, distribution: Any) -> tuple[Any, bool]:
    """The entry as a frozen scipy distribution, and whether its natural coordinate is a logarithm."""
    where = f"param_distributions[{name!r}]"
    outer = f"gradients cannot tune it: {ELSEWHERE}"
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
        low, high = distribution.support()
        if np.ndim(low) or np.ndim(high):
            raise ValueError(
                f"{where}: {distribution.dist.name} with arrays of arguments is many distributions; give numbers (per_layer, per_unit, per_weight and "
                "per_feature make many values of one)."
            )
        if math.isnan(low):  # scipy answers nan for shape arguments outside the family
            bound = "a log distribution needs 0 < low < high" if log else "its arguments are outside the family"
            raise ValueError(f"{where}: {distribution.dist.name}{distribution.args} has no support: {bound}.")
        if log and low <= 0:
            raise ValueError(f"{where}: the lower bound of a log distribution must be positive, got {low}.")
        return distribution, log
    if isinstance(distribution, rv_continuous):
        raise ValueError(f"{where}: {distribution!r} is not frozen; call it with its arguments, as in uniform(0, 0.8).")
    if hasattr(distribution, "rvs"):
        raise ValueError(f"{where}: {distribution!r} is not a continuous distribution; {outer}")
    if type(distribution).__module__.startswith("scipy.stats"):  # scipy's newer kind
        raise ValueError(
            f"{where}: got {distribution!r}; of scipy.stats the distributions with rvs and ppf are taken, such as uniform(low, high - low), "
            "loguniform(low, high) or truncnorm(a, b, loc, scale)."
        )
    if isinstance(distribution, (list, tuple, np.ndarray, range)):
        raise ValueError(
            f"{where}: it has a gradient, and no need of a list: give its range, loguniform(low, high) or uniform(low, high - low)."
        )
    raise TypeError(
        f"{where}: got {distribution!r}; expected a frozen continuous scipy.stats distribution, such as "
        "loguniform(1e-6, 1e1) or uniform(0, 0.8), or optuna.distributions.FloatDistribution, or one of them in "
        f"{', '.join(f'per_{grain}' for grain in get_args(Grain)[:-1])}; or for what has no gradient a list of values."
    )


@dataclass(frozen=True)
class Space:
    """The hyperparameters of one search, in order, each with one coordinate of λ or a block of them."""

    hyperparameters: tuple[Hyperparameter, ...]

    @classmethod
    def from_distributions(cls, param_distributions: Mapping[str, Any], prefix: str = "") -> Space:
        """Read ``param_distributions``: a dict from parameter name to distribution; ``prefix`` is what precedes the net's own names.

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
        read = (Hyperparameter.from_distribution(k, v) for k, v in param_distributions.items())
        return cls(tuple(replace(h, prefix=prefix) for h in read))

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of λ."""
        return tuple(h.name for h in self.hyperparameters)

    def to_net(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Values by name → by the net's own names."""
        return {h.own: params[h.name] for h in self.hyperparameters}

    def from_net(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the hyperparameters among the net's parameters, by name."""
        return {h.name: params[h.own] for h in self.hyperparameters}

    def resolve(self, shapes: Mapping[str, Shape]) -> Space:
        """The same space, with the arrangement of every hyperparameter that has a grain, by name."""
        return Space(tuple(replace(h, shape=shapes.get(h.name)) for h in self.hyperparameters))

    @property
    def n(self) -> int:
        """Length of λ."""
        return sum(h.size for h in self.hyperparameters)

    @cached_property
    def blocks(self) -> dict[str, slice]:
        """Which coordinates of λ each hyperparameter has."""
        ends = np.cumsum([h.size for h in self.hyperparameters]).tolist()
        return {h.name: slice(end - h.size, end) for h, end in zip(self.hyperparameters, ends, strict=True)}

    @property
    def low(self) -> Tensor:
        """Lower bounds of λ, shape (n,)."""
        return self._each(lambda h: h.low)

    @property
    def high(self) -> Tensor:
        """Upper bounds of λ, shape (n,)."""
        return self._each(lambda h: h.high)

    @property
    def log(self) -> Tensor:
        """Booleans of shape (n,): the coordinates that are logarithms."""
        return self.mask(lambda h: h.coordinate == "log")

    @property
    def rate(self) -> Tensor:
        """Booleans of shape (n,): the coordinate of the learning rate, if there is one."""
        return self.mask(lambda h: h.is_rate)

    @property
    def without_rate(self) -> Space:
        """What gradients move."""
        return Space(tuple(h for h in self.hyperparameters if not h.is_rate))

    def clip(self, lam: Tensor) -> Tensor:
        """λ (..., n) moved into its box."""
        return torch.minimum(torch.maximum(lam, self.low), self.high)

    def mask(self, holds: Callable[[Hyperparameter], bool]) -> Tensor:
        """Booleans of shape (n,): the coordinates of the hyperparameters for which it holds."""
        return self._each(holds).bool()

    def _each(self, number: Callable[[Hyperparameter], float]) -> Tensor:
        numbers = [np.full(h.size, number(h), dtype=np.float64) for h in self.hyperparameters]
        return torch.from_numpy(np.concatenate(numbers))

    def encode(self, params: Mapping[str, Value]) -> Tensor:
        """Values by name → λ of shape (n,), clipped to the bounds."""
        return torch.from_numpy(np.concatenate([h.encode(params[h.name]) for h in self.hyperparameters]))

    def values(self, lam: Tensor) -> dict[str, Tensor]:
        """λ of shape (..., n) → values by name, each of shape (...), or (..., size) for a grain."""
        blocks = self.blocks
        return {
            h.name: h.decode(lam[..., blocks[h.name].start] if h.shape is None else lam[..., blocks[h.name]])
            for h in self.hyperparameters
        }

    def decode(self, lam: Tensor) -> dict[str, Any]:
        """One λ of shape (n,) → plain Python floats, arrays or dicts of them by name, inside the declared bounds."""
        values = {name: value.numpy().reshape(-1) for name, value in self.values(lam.detach().cpu().double()).items()}
        return {h.name: h.arrange(values[h.name]) for h in self.hyperparameters}

    def quantile(self, q: np.ndarray) -> Tensor:
        """Quantiles (m, n) of the priors → λ of shape (m, n)."""
        blocks = self.blocks
        columns = [h.to_lam(h.prior.ppf(q[:, blocks[h.name]])) for h in self.hyperparameters]
        return torch.from_numpy(np.concatenate(columns, axis=1))

    def sample(self, m: int, rng: np.random.Generator) -> Tensor:
        """Draw m settings from the declared priors; λ of shape (m, n)."""
        return self.quantile(rng.uniform(size=(m, self.n)))
