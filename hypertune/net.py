"""What hyper-training asks of a model (:class:`Net`), and of whoever may know its weights already (:class:`Known`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Number
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hypertune.batches import Rows
from hypertune.objective import Objective
from hypertune.reach import Reach


class Net(Protocol):
    """What hyper-training asks of a model: of ours, and of others through an adapter.

    Attributes
    ----------
    loss_names : mapping from str to str
        Its parameters that are hyperparameters of the loss, and which (:data:`hypertune.objective.LOSS_HYPERPARAMETERS`).
    rate_name : str
        The one that is the learning rate.
    batch_size, max_epochs : int
    device : str
    """

    loss_names: ClassVar[Mapping[str, str]]
    rate_name: ClassVar[str]

    @property
    def batch_size(self) -> int: ...
    @property
    def max_epochs(self) -> int: ...
    @property
    def device(self) -> str: ...

    def get_params(self) -> dict[str, Any]:
        """All parameters that a search may name, with their current values."""
        ...

    def set_params(self, **params: Any) -> Any:
        """Set parameters in place."""
        ...

    def _why_not(self, name: str) -> str | None:
        """Why this parameter of the loss cannot be tuned under the others, or None if it can."""

    def _sees(self, name: str) -> bool:
        """Whether the hyper-training follows this parameter, so that short trainings can tell its values apart."""
        ...

    def _encode(self, X: Any, y: Any, sample_weight: Any = None, *, all_y: Any = None) -> Rows:
        """Check training rows, learn what describes them and return them as tensors; classes are those of ``all_y``."""
        ...

    def _encode_more(self, X: Any, y: Any, sample_weight: Any = None) -> Rows:
        """Further rows (a validation fold) under what ``_encode`` learned."""
        ...

    def _build_module(self) -> nn.Module:
        """A fresh module on the device."""
        ...

    def _make_objective(
        self, module: nn.Module, *, reach: Mapping[str, list[Reach]] | None = None, folds: int = 1
    ) -> Objective:
        """The losses, at the current setting."""
        ...

    def _make_optimizer(
        self, params: list[nn.Parameter], steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimizer and its schedule over a run of so many steps."""
        ...

    def _check_outputs(self, objective: Objective, x: Tensor) -> None:
        """Refuse a module whose outputs do not fit."""

    def _adopt(self, module: nn.Module) -> Any:
        """A fitted estimator around a trained module."""


class Known(Protocol):
    """Where weights may be known that a fit would find: of candidates that were retrained together, or of a best response."""

    def fit_known(self, net: Any, rows: Rows) -> bool:
        """Fit the net by what is known, if its setting and its rows are; says whether it did."""
        ...


def plain_settings(net: Net, but: Collection[str]) -> dict[str, Any]:
    """The net's parameters that are numbers, strings or sequences of them, except ``but``: fits are the same only if these agree."""
    return {name: value for name, value in net.get_params().items() if name not in but and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, Number))
