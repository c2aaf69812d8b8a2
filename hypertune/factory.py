"""Model factories: what ``TorchClassifier(module=...)`` calls to build a fresh ``nn.Module``.

A factory is any callable ``(n_features_in, n_outputs) -> nn.Module``. To be searchable, its keywords must be
scikit-learn parameters (``module__dropout``), which :class:`MLP` has and :func:`model_factory` gives to a function:

>>> from torch import nn
>>> @model_factory
... def small_net(n_features_in, n_outputs, *, width=16, dropout=0.1):
...     return nn.Sequential(nn.Linear(n_features_in, width), nn.ReLU(), nn.Dropout(dropout),
...                          nn.Linear(width, n_outputs))
>>> small_net.get_params()
{'width': 16, 'dropout': 0.1}
>>> small_net(4, 3)[0]
Linear(in_features=4, out_features=16, bias=True)
>>> small_net(width=8)(4, 3)[0]                          # another factory
Linear(in_features=4, out_features=8, bias=True)
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import joblib
from sklearn.base import BaseEstimator, clone
from torch import nn

from hypertune.functions import check_call
from hypertune.modules import refuse_modules
from hypertune.parametrized import picklable

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLP(BaseEstimator):
    """Factory of multilayer perceptrons: Linear, activation and Dropout for each hidden layer, then Linear.

    Parameters
    ----------
    hidden : sequence of int or int, default=(64, 64)
        Units of each hidden layer, or of the only one; empty for a linear model.
    dropout : float, default=0.0
        Dropout rate after every hidden layer. Tunable as ``module__dropout``.
    input_dropout : float, default=0.0
        Dropout rate on the inputs. Tunable as ``module__input_dropout``.
    activation : {"relu", "gelu", "silu", "tanh"}, default="relu"
        Nonlinearity of the hidden layers.
    """

    def __init__(
        self,
        hidden: Sequence[int] | int = (64, 64),
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        activation: str = "relu",
    ):
        self.hidden = hidden
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.activation = activation

    def __call__(self, n_features_in: int, n_outputs: int) -> nn.Module:
        """Build the network; raises ValueError for an unknown activation, or rows that are not flat."""
        if not isinstance(n_features_in, Integral):
            raise ValueError(
                f"MLP takes rows of numbers, and these have the shape {n_features_in}: reshape X to two dimensions, or give a factory "
                "whose module takes them (nn.Flatten, nn.Conv2d, ...)."
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"MLP(activation={self.activation!r}): choose one of {sorted(_ACTIVATIONS)}.")
        layers: list[nn.Module] = [nn.Dropout(self.input_dropout)]
        width, hidden = n_features_in, self.hidden if isinstance(self.hidden, Iterable) else (self.hidden,)
        if isinstance(hidden, str) or not all(isinstance(units, Integral) and units > 0 for units in hidden):
            raise ValueError(
                f"MLP(hidden={self.hidden!r}): give a number of units, or a sequence of them, such as (64, 64)."
            )
        for units in hidden:
            layers += [nn.Linear(width, units), _ACTIVATIONS[self.activation](), nn.Dropout(self.dropout)]
            width = units
        return nn.Sequential(*layers, nn.Linear(width, n_outputs))


class ModelFactory:
    """A function or class ``(n_features_in, n_outputs, *, ...) -> nn.Module`` whose keywords are parameters.

    Made by :func:`model_factory`. Works with scikit-learn's ``get_params``, ``set_params`` and ``clone``.
    """

    def __init__(self, function: Callable[..., nn.Module], /, **params: Any):
        defaults = _keyword_defaults(function)
        if unknown := sorted(set(params) - set(defaults)):
            raise TypeError(f"{_name(function)} has no keyword {unknown}; it has {sorted(defaults)}.")
        self.function = function
        self._params = defaults | params

    def __call__(self, *shape: Any, **params: Any) -> Any:
        """``(n_features_in, n_outputs)``: build the model; ``(width=...)``, without them: a factory with other keywords."""
        if params and not shape and params.keys() <= self._params.keys():
            return clone(self).set_params(**params)
        return self.function(*shape, **(self._params | params))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The function's keywords and their current values."""
        return dict(self._params)

    def set_params(self, **params: Any) -> ModelFactory:
        """Set keywords; raises ValueError for one that the function does not have."""
        if unknown := sorted(set(params) - set(self._params)):
            raise ValueError(
                f"Invalid parameter {unknown[0]!r} for factory {_name(self.function)}. "
                f"Valid parameters are: {sorted(self._params)}."
            )
        self._params |= params
        return self

    def __sklearn_clone__(self) -> ModelFactory:
        return ModelFactory(self.function, **copy.deepcopy(self._params))

    def __repr__(self) -> str:
        keywords = "".join(f", {k}={v!r}" for k, v in self._params.items())
        return f"model_factory({_name(self.function)}{keywords})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A decorated function is found under its own name only as the factory that replaced it.
        if isinstance(_lookup(self.function), ModelFactory):
            module = self.function.__module__
            # Worker processes have a main module of their own: what a script defines goes to them by value.
            by_value = None
            if module == "__main__":
                by_value = joblib.wrap_non_picklable_objects(functools.partial(self.function), keep_wrapper=False)
            return _from_decorated, (module, self.function.__qualname__, self._params, by_value)
        return _from_function, (self.function, self._params)


def model_factory(function: Callable[..., nn.Module], /, **params: Any) -> ModelFactory:
    """Turn a function or class into a model factory whose keywords are ``module__…`` parameters.

    Parameters
    ----------
    function : callable ``(n_features_in, n_outputs, *, ...) -> nn.Module``
        A function, or an ``nn.Module`` subclass whose constructor has this signature. Every keyword needs a default.
    **params
        Values other than the defaults.

    Returns
    -------
    ModelFactory
        Also usable as a decorator.

    Raises
    ------
    TypeError
        If ``function`` is an ``nn.Module`` instance, takes no two positional arguments, or has a keyword without default.
    """
    return ModelFactory(function, **params)


def _keyword_defaults(function: Callable[..., nn.Module]) -> dict[str, Any]:
    if isinstance(function, nn.Module) or not callable(function):
        raise TypeError(
            f"model_factory expects a function or class (n_features_in, n_outputs, *, ...) -> nn.Module, got {function!r}. "
            "A built module cannot be trained afresh for every fold: wrap what builds it."
        )
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        raise TypeError(f"{_name(function)} must take (n_features_in, n_outputs) as its first two arguments.")
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY] + positional[2:]
    if missing := [p.name for p in keywords if p.default is p.empty]:
        raise TypeError(f"{_name(function)}: the keywords {missing} need a default value.")
    return {p.name: p.default for p in keywords}


def build(factory: Any, n_features_in: Any, n_outputs: int) -> nn.Module:
    """A fresh module of a factory's, and a copy: what the factory returns may be the user's, and the same every time.

    Raises
    ------
    TypeError, ValueError
        If it is no factory, or makes no module that can be trained and copied.
    """
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"module={factory!r}: expected a factory (n_features_in, n_outputs) -> nn.Module, such as MLP() or model_factory(function); "
            "a built module cannot be trained afresh for every fold."
        )
    who, called = f"The factory {factory!r}", f"(n_features_in, n_outputs), here ({n_features_in}, {n_outputs})"
    check_call(who, called, factory, n_features_in, n_outputs)
    module = factory(n_features_in, n_outputs)
    if not isinstance(module, nn.Module):
        hint = f" Give a factory, {factory.__name__}()." if inspect.isclass(factory) and callable(module) else ""
        raise TypeError(f"{who} returned {type(module).__name__}, not a torch.nn.Module.{hint}")
    refuse_modules(module)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"{who} returned a module without trainable parameters.")
    try:
        return picklable(copy.deepcopy(module))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{who} returned a module that cannot be copied ({error}). Of torch's weight_norm and spectral_norm those in "
            "torch.nn.utils.parametrizations can, and a pruned module after torch.nn.utils.prune.remove."
        ) from error


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


def _lookup(function: Callable[..., Any]) -> Any:
    module = sys.modules.get(function.__module__ or "")
    return getattr(module, getattr(function, "__qualname__", ""), None)


def _from_decorated(module: str, qualname: str, params: dict[str, Any], by_value: Any) -> ModelFactory:
    here = importlib.import_module(module)
    if by_value is not None and not isinstance(getattr(here, qualname, None), ModelFactory):
        return _from_function(by_value.func, params)
    decorated: ModelFactory = getattr(here, qualname)
    return _from_function(decorated.function, params)


def _from_function(function: Callable[..., nn.Module], params: dict[str, Any]) -> ModelFactory:
    return ModelFactory(function, **params)
