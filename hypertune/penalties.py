"""Sums of squares of M models' parameters, without the copies of them that autograd would keep.

>>> half_squares_of(torch.ones(2, 3), 2 * torch.ones(2, 1))
tensor([3.5000, 3.5000])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def half_squares_of(*parameters: Tensor) -> Tensor:
    """½ Σ w² of each model, (M,), over several parameters (M, ...)."""
    found: Tensor = _HalfSquares.apply(*parameters)
    return found


def half_squares(s: Tensor, w: Tensor) -> Tensor:
    """½ Σ s w² of each model, (M,), over one parameter w (M, ...) with strengths s that broadcast to it."""
    found: Tensor = _WeightedHalfSquares.apply(s, w)
    return found


class _HalfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return 0.5 * sum(torch.linalg.vector_norm(p.flatten(1), dim=1).square() for p in parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(of_models(grad, p) * p for p in ctx.saved_tensors)


class _WeightedHalfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(s, w)
        return 0.5 * torch.linalg.vecdot((s * w).flatten(1), w.flatten(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (s, w), (of_s, of_w) = ctx.saved_tensors, ctx.needs_input_grad
        grad = of_models(grad, w)
        return (grad * (0.5 * w * w)).sum_to_size(s.shape) if of_s else None, s * w * grad if of_w else None


def of_models(numbers: Tensor, like: Tensor) -> Tensor:
    """One number per model (M,), so that it broadcasts with ``like`` (M, ...)."""
    return numbers.view(-1, *(1,) * (like.dim() - 1))
