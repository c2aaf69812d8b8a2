"""What a module's forward calls, found out by watching it once: if these are plain layers, one after the other, they may be run without it.

>>> class Net(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
...
...     def forward(self, x):
...         return self.out(torch.relu(self.hidden(x)))
>>> net = Net()
>>> layers_called(net, lambda: net(torch.zeros(5, 3)))
['hidden', ReLU(), 'out']
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from hypertune.functions import state_of
from hypertune.layers import as_declared, is_plain
from hypertune.memory import plain_attributes

Step = str | nn.Module  # a layer of the module, by its path, or what stands for a function

_LAYERS: dict[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU, F.relu: nn.ReLU, Tensor.relu: nn.ReLU,
    torch.tanh: nn.Tanh, Tensor.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid, Tensor.sigmoid: nn.Sigmoid,
    F.hardtanh: nn.Hardtanh, F.gelu: nn.GELU, F.silu: nn.SiLU, F.elu: nn.ELU, F.selu: nn.SELU, F.leaky_relu: nn.LeakyReLU, F.softplus: nn.Softplus,
}  # fmt: skip
_FLATTEN, _RESHAPE = (torch.flatten, Tensor.flatten), (Tensor.view, Tensor.reshape, torch.reshape)


def layers_called(module: nn.Module, run: Callable[[], Tensor]) -> list[Step] | None:
    """The plain layers that ``run``, which calls the module once, calls in turn, each with what the one before gave; None if it does anything else.

    Not if it changes anything that it keeps, or draws random numbers. Whether the steps give the same, with their gradients, is left to be compared.
    """
    names = (len(dict(module.named_parameters(remove_duplicate=once))) for once in (True, False))
    if len({*names}) > 1 or _has_any_global_hook():  # shared parameters have the first name only
        return None
    if not all(as_declared(sub) for sub in module.modules()):
        return None
    watch, hooks, before = _Watch(), [], _state(module)
    for path, sub in module.named_modules():
        if path and is_plain(sub):
            hooks += [sub.register_forward_pre_hook(watch.enter), sub.register_forward_hook(watch.leaver(path))]
    hooks += [module.register_forward_pre_hook(watch.begin), module.register_forward_hook(watch.end)]
    try:
        with watch:
            outputs = run()
    finally:
        for hook in hooks:
            hook.remove()
    follows = watch.follows and watch.ended and _state(module) == before and not _has_own_gradient(outputs)
    return watch.steps if follows else None


def _has_own_gradient(outputs: Tensor) -> bool:
    """Whether a function of the user's own, with a backward of its own, is among what gave them."""
    seen, ahead = set(), [outputs.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [other for other, _ in node.next_functions]
    return any(isinstance(node, BackwardCFunction) for node in seen)


def _state(module: nn.Module) -> Any:
    """What the module keeps beside its weights, and where the generators of random numbers are that are not torch's."""
    _, keys, position, *_ = np.random.get_state(legacy=True)  # noqa: NPY002
    return state_of(plain_attributes(module)), random.getstate(), np.asarray(keys).tobytes(), position


class _Watch(TorchFunctionMode):
    """Follows one tensor through the calls of a module's forward: hooks see its layers, and the mode all functions of torch beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.follows, self.ended = True, False
        self._now: Any = None  # the tensor that is followed
        self._watches = False

    def begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._watches, self.follows = True, self.follows and len(args) == 1 and not self.ended
        self._now = args[0] if args else None

    def end(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._watches, self.ended = False, True
        self.follows = self.follows and output is self._now

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._watches, self.follows = False, self.follows and len(args) == 1 and args[0] is self._now

    def leaver(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._watches, self._now = True, output
            self.steps.append(path)

        return leave

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._watches:
            step = _layer_of(func, args, kwargs) if args and args[0] is self._now else None
            self.follows = self.follows and step is not None
            self.steps.append(step or nn.Identity())
            self._now = output
        return output


def _layer_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """The layer that does what the function does to its first argument, rows."""
    if func in _FLATTEN:
        return nn.Flatten() if (args[1:], kwargs) in (((1,), {}), ((), {"start_dim": 1})) else None
    if func in _RESHAPE:  # x.view(-1, 784)
        shape = tuple(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        return nn.Flatten() if not kwargs and shape == (-1, args[0].numel() // len(args[0])) else None
    if func not in _LAYERS or len(args) != 1 or kwargs.get("inplace"):
        return None
    return _LAYERS[func](**kwargs)
