"""Losses of single rows, which take a label smoothing that may be a tensor: (outputs, targets, smoothing) → one number per row.

>>> import torch
>>> cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1])).shape
torch.Size([2])
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypertune.dropout import Value, is_zero
from hypertune.functions import check_call

Loss = Callable[[Tensor, Tensor, Value], Tensor]


def cross_entropy(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Cross-entropy in nats; outputs (..., B, C), class numbers y (..., B) → (..., B)."""
    # Classes before rows: over a short last dimension the kernel of a CPU takes up to twenty times as long.
    log_p = F.log_softmax(outputs.transpose(-1, -2), dim=-2)
    nll = -log_p.gather(-2, y[..., None, :])[..., 0, :]
    if is_zero(smoothing):
        return nll
    return (1 - smoothing) * nll - smoothing * log_p.mean(dim=-2)


def one_hot_squared_error(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Squared error against one-hot targets, mean over the C outputs; (..., B, C), (..., B) → (..., B)."""
    classes = outputs.shape[-1]
    return squared_error(outputs, _smoothed(F.one_hot(y, classes).to(outputs.dtype), smoothing, classes))


def binary_cross_entropy(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Cross-entropy of labels that are there or not, in nats, mean over them; logits (..., B, labels), zeros and ones y → (..., B)."""
    return F.binary_cross_entropy_with_logits(outputs, _smoothed(y, smoothing, 2), reduction="none").mean(dim=-1)


def labels_squared_error(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Squared error against labels, zeros and ones, mean over them; (..., B, labels) twice → (..., B)."""
    return squared_error(outputs, _smoothed(y, smoothing, 2))


def _smoothed(target: Tensor, smoothing: Value, classes: int) -> Tensor:
    """Targets of which a part is spread evenly over the classes; smoothing a number, or (..., 1) for targets (..., B, outputs)."""
    if is_zero(smoothing):
        return target
    smoothing = smoothing[..., None] if isinstance(smoothing, Tensor) else smoothing
    return (1 - smoothing) * target + smoothing / classes


def squared_error(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Squared error, mean over outputs; (..., B, outputs) twice → (..., B)."""
    return (outputs - y).square().mean(dim=-1)


def absolute_error(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Absolute error, mean over outputs; (..., B, outputs) twice → (..., B)."""
    return (outputs - y).abs().mean(dim=-1)


def poisson_deviance(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Half the Poisson deviance of the rates exp(outputs), mean over outputs; (..., B, outputs) twice → (..., B)."""
    return (outputs.exp() - y - y * outputs + torch.xlogy(y, y)).mean(dim=-1)


def gamma_deviance(outputs: Tensor, y: Tensor, smoothing: Value = 0.0) -> Tensor:
    """Half the gamma deviance of the means exp(outputs), mean over outputs; (..., B, outputs) twice → (..., B)."""
    return (y * (-outputs).exp() - 1 - y.log() + outputs).mean(dim=-1)


CLASSIFICATION_LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "squared_error": one_hot_squared_error,
}
MULTILABEL_LOSSES: dict[str, Loss] = {
    "cross_entropy": binary_cross_entropy,
    "squared_error": labels_squared_error,
}
REGRESSION_LOSSES: dict[str, Loss] = {
    "squared_error": squared_error,
    "absolute_error": absolute_error,
    "poisson": poisson_deviance,
    "gamma": gamma_deviance,
}
# Criteria whose outputs are logarithms of means, and whether a target may be zero.
LOGARITHMIC = {"poisson": True, "gamma": False}


def output_scale(loss: Loss, y: Tensor) -> float:
    """The natural scale of a module's outputs: 1 for logits and logarithms of means, else the standard deviation of the targets y."""
    logarithms = [binary_cross_entropy, *(REGRESSION_LOSSES[name] for name in LOGARITHMIC)]
    return 1.0 if not y.is_floating_point() or loss in logarithms else float(y.std())


def nats_per_unit(loss: Loss, value: Tensor, outputs: int) -> Tensor:
    """What one unit of a mean loss near ``value`` is worth in nats for each row, so that slopes mean the same for all losses.

    Squared errors are those of Gaussian noise, absolute ones of Laplace noise, each of its most likely scale (d/2 · log of the
    mean square, d · log of the mean absolute value; their slopes), and deviances are quasi-likelihoods of their most likely dispersion;
    a mean over labels is in nats for each of them, and any other loss is taken to be in nats.
    """
    value = value.clamp(min=torch.finfo(value.dtype).eps)  # a perfect prediction, or a deviance below zero by rounding
    if loss in (squared_error, one_hot_squared_error, labels_squared_error, poisson_deviance, gamma_deviance):
        return outputs / (2 * value)
    if loss is binary_cross_entropy:
        return torch.full_like(value, outputs)
    return outputs / value if loss is absolute_error else torch.ones_like(value)


@dataclass(frozen=True)
class CustomLoss:
    """A user's ``criterion(outputs, targets)`` as a per-row loss.

    A criterion that returns one number per row is used as it is (one of torch's with ``reduction="none"`` is averaged over a row's
    outputs); one that returns the batch mean is repeated over the rows, which is the same training loss as long as rows carry no
    weights. ``weighted`` says that they do.
    """

    criterion: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, outputs: Tensor, y: Tensor, smoothing: Value = 0.0, *, weighted: bool = False) -> Tensor:
        if not is_zero(smoothing):
            raise ValueError("label_smoothing needs criterion='cross_entropy' or 'squared_error', not a callable.")
        rows = y.shape[0]
        try:
            loss = self.criterion(outputs, y)
        except (ValueError, RuntimeError) as error:
            if outputs.shape == y.shape or isinstance(error, torch.OutOfMemoryError):
                raise
            hint = (
                ""
                if y.is_floating_point()
                else " A classifier has one output (logit) for each class; its targets number them."
            )
            raise ValueError(
                f"criterion {self.criterion!r} does not take outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{tuple(y.shape)}: {error}.{hint}"
            ) from error
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"criterion {self.criterion!r} returned {type(loss).__name__}, which has no gradient; return a tensor of one number per row, shape ({rows},), "
                "or of their mean."
            )
        if getattr(self.criterion, "reduction", None) == "none" and loss.dim() > 1:
            loss = loss.flatten(1).mean(dim=1)
        if weighted and loss.dim() == 0:
            raise ValueError(
                f"criterion {self.criterion!r} returned the mean of {rows} rows, in which sample_weight has no part; return one "
                f"number per row, shape ({rows},) (of torch's losses give the class, or reduction='none')."
            )
        if loss.shape not in ((), (rows,)):
            raise ValueError(
                f"criterion {self.criterion!r} returned shape {tuple(loss.shape)} for {rows} rows; "
                f"return one number per row, shape ({rows},), or their mean."
            )
        return loss.expand(rows)


def as_loss(criterion: Any, losses: Mapping[str, Loss], like: Tensor) -> Loss:
    """The per-row loss for ``criterion=``: a name out of ``losses``, a callable, or a class such as ``nn.HuberLoss``.

    Of one of torch's modules it is a copy, whose tensors (weights of classes) have the dtype and the device of ``like``.
    """
    if isinstance(criterion, str):
        return losses[criterion]
    made = criterion
    if inspect.isclass(criterion):
        by_row: dict[str, Any] = {"reduction": "none"} if "reduction" in inspect.signature(criterion).parameters else {}
        made = criterion(**by_row)
    if isinstance(made, nn.PoissonNLLLoss):
        raise ValueError(
            f"criterion={criterion!r} is for counts, and targets are standardised for it: criterion='poisson' is the same loss."
        )
    if isinstance(made, nn.modules.loss._Loss) and made.reduction == "sum":
        raise ValueError(
            f"criterion={criterion!r} adds up rows (reduction='sum'), so that penalties, slopes and the validation loss would depend on how many "
            "there are: leave reduction at 'mean'."
        )
    if type(made).__module__.startswith("torch.nn."):
        made = copy.deepcopy(made).to(device=like.device, dtype=like.dtype)
    check_call(f"criterion {criterion!r}", "(outputs, targets)", getattr(made, "forward", made), None, None)
    return CustomLoss(made)
