"""The user's module, made tunable without a change to it: where a factory keyword arrives, how plain layers run together, what is refused.

A keyword such as ``dropout`` of ``MLP(dropout=...)`` sets numbers inside the module it builds. :func:`find_reach`
builds the module at three values of the keyword and sees which numbers move; during hyper-training those numbers, in
*our* copy of the module, are set to each model's own value before every forward pass.

>>> find_reach(lambda rate: nn.Sequential(nn.Linear(2, 2), nn.Dropout(rate / 2)), 0.0, 0.8)
[Reach(path='1', name='p', a=0.0, b=0.5)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hypertune.dropout import TensorDropout

_ELEMENTWISE = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Identity,
)  # fmt: skip


def plain_layers(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers of an ``nn.Sequential`` of linear layers, activations and dropout, by name; None for any other module.

    Such a module can be run for M models at once without vmap (:func:`run_layers`), at a fraction of the overhead.
    """
    if type(module) is not nn.Sequential or not _as_declared(module):
        return None
    layers = [(name, layer) for name, layer in module._modules.items() if layer is not None]  # with those that recur
    recur = [layer for i, (_, layer) in enumerate(layers) if any(layer is before for _, before in layers[:i])]
    if any(isinstance(layer, nn.Linear) for layer in recur):
        return None  # its parameters have the first name only
    if len(dict(module.named_parameters())) < len(dict(module.named_parameters(remove_duplicate=False))):
        return None  # and so have those that layers share
    for _, layer in layers:
        flat = type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
        if not (flat or type(layer) in (*_ELEMENTWISE, nn.Linear, TensorDropout)):
            return None
        if not _as_declared(layer) or (getattr(layer, "inplace", False) and type(layer) is not TensorDropout):
            return None
    return layers


def _as_declared(module: nn.Module) -> bool:
    """Whether the module does what its class says: it has no hooks, and no forward of its own."""
    return not any(getattr(module, name) for name in _HOOKS) and "forward" not in vars(module)


def run_layers(layers: list[tuple[str, nn.Module]], named: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """M models at once: parameters by name, each (M, *shape), and rows x (M, B, ...) → outputs (M, B, outputs)."""
    for name, layer in layers:
        if type(layer) is nn.Linear:
            weight, rows = named[f"{name}.weight"].transpose(1, 2), x.flatten(1, -2)
            y = torch.baddbmm(named[f"{name}.bias"][:, None], rows, weight) if layer.bias is not None else rows @ weight
            x = y if x.dim() == 3 else y.unflatten(1, x.shape[1:-1])
        elif type(layer) is TensorDropout:
            x = layer.of_models(x)
        elif type(layer) is nn.Flatten:
            x = x.flatten(2)
        else:
            x = layer(x)
    return x


def refuse_modules(module: nn.Module) -> None:
    """Raise ValueError, with the submodule's name, for what cannot be trained as a function of its weights."""
    inside = set(module.modules())
    for path, sub in module.named_modules():
        where = f"{path or 'the module'} ({type(sub).__name__})"
        if any(nn.parameter.is_lazy(p) for p in sub.parameters(recurse=False)):
            raise ValueError(
                f"{where} has no shape before it has seen data, and the weights are counted before that: the factory gets "
                "n_features_in, so use the eager layer (nn.Linear for nn.LazyLinear)."
            )
        if isinstance(sub, torch.jit.ScriptModule) and any(True for _ in sub.parameters()):
            raise ValueError(
                f"{where} is scripted, and runs with the weights that it has: give the module as it was before."
            )
        if type(sub).__name__ == "OptimizedModule":
            raise ValueError(
                f"{where} comes from torch.compile(module), and its copies would not be compiled: leave that out."
            )
        for name, value in vars(sub).items():
            if (name not in OF_EVERY_MODULE or name in _HOOKS) and any(own in inside for own in _held_by(value)):
                what = f"a hook (in {name})" if name in _HOOKS else f"a function, {name!r},"
                raise ValueError(
                    f"{where} keeps {what} that holds on to a module by name: in a copy of it, and copies are what is "
                    "trained, the function would go on calling the first one. Make it a method."
                )
        for name, p in sub.named_parameters(recurse=False):
            if p.requires_grad and (p._backward_hooks or p._post_accumulate_grad_hooks):
                raise ValueError(
                    f"{where} has a hook on the gradient of {name!r}, which would never be called: all weights are trained as one vector. "
                    "Multiply the weight by a mask (torch.nn.utils.parametrize), or freeze the parameter (requires_grad=False)."
                )
        if any(t.is_complex() for t in (*sub.parameters(recurse=False), *sub.buffers(recurse=False))):
            raise ValueError(f"{where} has complex weights or buffers: keep real ones, and use torch.view_as_complex.")
        if isinstance(sub, (nn.Embedding, nn.EmbeddingBag)) and sub.max_norm is not None:
            raise ValueError(
                f"{where} changes its own weights as it runs (max_norm): max_norm=None, and a weight_decay."
            )
        if getattr(sub, "sparse", False) is True:
            raise ValueError(
                f"{where} gives sparse gradients (sparse=True), which have no place in one vector of weights: sparse=False."
            )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}


def _held_by(value: Any) -> Iterator[Any]:
    """The modules that a function, or one in a list or dict, has in its closure or its defaults, also by their methods."""
    if isinstance(value, Mapping):
        value = list(value.values())
    for function in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(function, FunctionType):
            cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
            for own in (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                holder = getattr(own, "__self__", own)
                if isinstance(holder, nn.Module):
                    yield holder
                elif own is not function:
                    yield from _held_by(own if isinstance(own, FunctionType) else None)


# --- where a factory keyword arrives in the module ---------------------------------------------------------------------


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
