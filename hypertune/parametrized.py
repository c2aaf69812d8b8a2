"""Layers under ``torch.nn.utils.parametrize`` (weight_norm, spectral_norm, masks) that can be pickled, as other layers can.

torch gives each of them a class of its own, which no other process has, and lets it be copied but not pickled.

>>> import pickle, torch
>>> layer = picklable(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
>>> again = pickle.loads(pickle.dumps(layer))
>>> torch.equal(again.weight, layer.weight)
True
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


def picklable(module: nn.Module) -> nn.Module:
    """The same module. It and its copies can be pickled from here on, with the parametrized layers inside."""
    for sub in module.modules():
        if parametrize.is_parametrized(sub):
            type(sub).__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]  # a class of this layer's own
    return module


def _reduce(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    kind = type(layer).__bases__[0]
    state = dict(kind.__getstate__(layer))  # type: ignore[call-arg, call-overload]
    state["_modules"] = {k: v for k, v in layer._modules.items() if k != "parametrizations"}
    # weight_norm's is a local function, for checkpoints of older versions.
    hooks = state["_load_state_dict_pre_hooks"].items()
    own = OrderedDict((k, v) for k, v in hooks if "_weight_norm_compat_hook" not in repr(v.hook))
    lists = dict(layer.parametrizations.items())  # type: ignore[operator, union-attr]
    return _restore, (kind, {**state, "_load_state_dict_pre_hooks": own}, lists)


def _restore(kind: type[nn.Module], state: dict[str, Any], lists: dict[str, Any]) -> nn.Module:
    """A layer of a class that anyone has, put under its parametrizations again, which then get back what they had been."""
    layer = kind.__new__(kind)
    layer.__setstate__(state)
    for name, parametrizations in lists.items():
        training = parametrizations.training
        with torch.no_grad():
            value = parametrizations.eval()()
        parametrizations.train(training)
        layer.register_parameter(name, nn.Parameter(value))
        for one in parametrizations:
            parametrize.register_parametrization(layer, name, copy.deepcopy(one), unsafe=True)
    for name, parametrizations in lists.items():
        layer.parametrizations[name] = parametrizations  # type: ignore[operator, index]
    return picklable(layer)
