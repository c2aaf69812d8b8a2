"""The optimizer of the weights and the schedule of its learning rate: by name, or a user's own.

>>> from torch import nn
>>> optimizer, schedule = make_optimizer("adam", "cosine", [nn.Parameter(torch.zeros(2))], lr=0.1, steps=4)
>>> for _ in range(2):
...     optimizer.step()
...     schedule.step()
>>> round(optimizer.param_groups[0]["lr"], 4)                                   # half way
0.05
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hypertune.functions import check_call

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr, fused=True),
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True),
}
# What they do to a matrix of weights they would do to all weights in a row.
_OF_MATRICES = {"Adafactor", "Muon", "Shampoo", "SOAP"}
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


def make_optimizer(
    optimizer: Any, lr_schedule: Any, params: list[nn.Parameter], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """An estimator's optimizer and its schedule over a run of so many steps.

    Parameters
    ----------
    optimizer : {"adam", "sgd"} or callable ``(params, lr=...) -> Optimizer``
    lr_schedule : {"cosine", "constant"} or callable ``share of the run -> factor``
    params : list of nn.Parameter
    lr : float
    steps : int

    Raises
    ------
    TypeError, ValueError
        For a function that makes no optimizer, one that needs a closure or one of matrices, and for a schedule whose largest factor is
        far from 1.
    """
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    check_call(f"optimizer {optimizer!r}", "(params, lr=...)", make, params, lr=lr)
    made = make(params, lr=lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer {optimizer!r} returned {made!r}, and not a torch optimizer.")
    refuse_optimizer(made)
    check_call(f"The step of optimizer {optimizer!r}", "no closure", type(made).step, made)
    schedule = LR_SCHEDULES[lr_schedule] if isinstance(lr_schedule, str) else lr_schedule
    check_call(f"lr_schedule {lr_schedule!r}", "(share)", schedule, 0.0)
    peak = max(_as_factor(schedule(i / 20), lr_schedule) for i in range(21))
    if not 0.5 <= peak <= 2:
        raise ValueError(
            f"lr_schedule={lr_schedule!r} multiplies lr={lr:g} by at most {peak:g}. Let its largest factor be 1, and lr the largest rate."
        )
    return made, scheduled(made, schedule, steps)


def _as_factor(factor: Any, lr_schedule: Any) -> float:
    try:
        return float(factor)
    except (TypeError, ValueError) as error:
        raise TypeError(f"lr_schedule {lr_schedule!r} returned {factor!r}, and not a factor of lr.") from error


def refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for one that treats matrices of weights as such: it gets all weights as one tensor (1, D)."""
    if names := _OF_MATRICES & {own.__name__ for own in type(optimizer).__mro__}:
        raise ValueError(
            f"optimizer {names.pop()} works on the matrices of a module, and gets all weights as one vector here. Use one that moves each "
            "number by itself, such as Adam or SGD."
        )


def scheduled(
    optimizer: torch.optim.Optimizer, schedule: Callable[[float], float], steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Multiply the learning rate by ``schedule(progress)``, progress from 0 to 1 over so many steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(min(step / steps, 1.0)))
