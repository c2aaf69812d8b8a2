"""What of a user's module is refused: what cannot be trained as a function of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}


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
            if (name not in OF_EVERY_MODULE or name in HOOKS) and any(own in inside for own in _held_by(value)):
                what = f"a hook (in {name})" if name in HOOKS else f"a function, {name!r},"
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
