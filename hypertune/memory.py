"""What a module remembers: numbers and tensors that it keeps as plain attributes, and training changes (a step, a temperature, a moving mean).

>>> module = nn.Linear(2, 2)
>>> module.step = 0
>>> built = Attributes(module)
>>> module.step += 1
>>> built.changes()
{('', 'step'): 1}
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from hypertune.dropout import Drops
from hypertune.modules import OF_EVERY_MODULE

Memory = dict[tuple[str, str], Any]  # by submodule and name
NOTHING = object()


class Attributes:
    """The plain attributes of a module as it was built.

    Parameters
    ----------
    module : nn.Module

    Attributes
    ----------
    values : dict from (submodule, name) to object
        Not copied: a tensor may have been written into since.
    """

    def __init__(self, module: nn.Module):
        self.module, self.values = module, plain_attributes(module)
        tensors = {of: v for of, v in self.values.items() if isinstance(v, Tensor) and not v.is_inference()}
        self._versions = {of: v._version for of, v in tensors.items()}  # how often they have been written into

    def changes(self) -> Memory:
        """Copies of the numbers and tensors that are others now, or have been written into; and of numbers that have come since.

        Not of tensors that have come since, which are what the module saw last, nor of one that is another for each of many models.
        """
        changed: Memory = {}
        for of, value in plain_attributes(self.module).items():
            before = self.values.get(of, NOTHING)
            if isinstance(value, Tensor):
                left_out = before is NOTHING or is_batchedtensor(value) or value.is_inference()
                if not left_out and (value is not before or value._version != self._versions[of]):
                    changed[of] = value
            elif isinstance(value, (int, float, type(None))) and (type(value) is not type(before) or value != before):
                changed[of] = value
        return _copied(changed)


def plain_attributes(module: nn.Module) -> Memory:
    """As they are."""
    return {
        (path, name): value
        for path, sub in module.named_modules()
        for name, value in vars(sub).items()
        if name not in OF_EVERY_MODULE and not (name == "seed" and isinstance(sub, Drops))
    }


def put(module: nn.Module, memory: Memory) -> None:
    """Set plain attributes, to copies of the tensors; what is NOTHING is not to be there."""
    for (path, name), value in _copied(memory).items():
        own = vars(module.get_submodule(path))
        if value is NOTHING:
            own.pop(name, None)
        else:
            own[name] = value


def _copied(memory: Memory) -> Memory:
    """Copies of the tensors; one that stands in several places still does."""
    copies: dict[int, Tensor] = {}
    for value in memory.values():
        if isinstance(value, Tensor) and id(value) not in copies:
            copies[id(value)] = value.detach().clone()
    return {of: copies[id(value)] if isinstance(value, Tensor) else value for of, value in memory.items()}
