"""Dropout whose rate may be a tensor, with noise that models share: by itself, and of attention.

Uniform noise is compared with the rate, so models that share the noise and differ in the rate differ only where the rates do: the
common random numbers of the antithetic pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Value = float | Tensor

_LEAST = 1e-9
_CALLS_APART = 2**20  # seeds of a layer that is called more than once; there are not so many layers


def is_zero(value: Value) -> bool:
    """Whether a hyperparameter is switched off for good: a plain 0, not a tensor that happens to be 0."""
    return not isinstance(value, (Tensor, Mapping)) and value == 0


def _kept(noise: Tensor, rate: Value) -> Tensor:
    """What is left of a number: nothing, or that over the share which is kept. At a rate of one nothing is."""
    share = (1 - rate).clamp(min=_LEAST) if isinstance(rate, Tensor) else max(1 - rate, _LEAST)
    return (noise >= rate).to(noise.dtype) / share  # whatever the default dtype


class Drops:
    """A layer that drops numbers in training. The noise comes from ``seed``, the next call's from another."""

    seed: int = 0

    def _dropped(self, x: Tensor, rate: Value) -> Tensor:
        return x * _kept(self._noise(x.shape, x), rate)

    def _noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uniform numbers. Under vmap the shape is one model's: they are drawn once and shared."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        self.seed += _CALLS_APART
        return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)


class TensorDropout(Drops, nn.Module):
    """``nn.Dropout`` (or 1d/2d/3d) with a rate that may be a tensor, in place of it in our copy of the module."""

    p: Value
    channelwise: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_zero(self.p):
            return x
        return x * _kept(self._noise(self._cells(x), x), self.p)

    def of_models(self, x: Tensor) -> Tensor:
        """The same for M models at once, x (M, B, ...), without vmap; ``p`` may be (M,)."""
        if not self.training or is_zero(self.p):
            return x
        p = self.p.view(-1, *(1,) * (x.dim() - 1)) if isinstance(self.p, Tensor) else self.p
        return x * _kept(self._noise(self._cells(x[0]), x), p)

    def _cells(self, x: Tensor) -> Sequence[int]:
        return (*x.shape[:2], *(1,) * (x.dim() - 2)) if self.channelwise else x.shape


class DropsInside(Drops):
    """A layer of torch's whose own dropout, ``dropout``, is inside what it computes."""

    dropout: Any

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        rate, self.dropout = self.dropout, 0.0
        try:
            yield
        finally:
            self.dropout = rate


class TensorAttention(DropsInside, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose dropout, of the attention weights, may have a tensor as its rate.

    torch's own says what the weights are without it, whatever the masks; they are dropped and applied here.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        asked: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        if not self.training or is_zero(self.dropout) or query.dim() != 3:
            return super().forward(query, key, value, **asked)
        as_needed, average = asked.get("need_weights", True), asked.get("average_attn_weights", True)
        with self._without_dropout():
            asked |= {"need_weights": True, "average_attn_weights": False}
            _, weights = super().forward(query, key, value, **asked)
        weights = self._dropped(weights, self.dropout)  # type: ignore[arg-type]  # (B, heads, T, S)
        rows = value if self.batch_first else value.transpose(0, 1)
        matrix = self.v_proj_weight if self.in_proj_weight is None else self.in_proj_weight.chunk(3)[2]
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[2]
        values = F.linear(rows, matrix, bias)  # (B, S, E)
        if self.bias_v is not None:
            values = torch.cat([values, self.bias_v.expand(len(values), -1, -1)], dim=1)
        if self.add_zero_attn:
            values = F.pad(values, (0, 0, 0, 1))
        heads = values.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        outputs = self.out_proj((weights @ heads).transpose(1, 2).flatten(2))
        outputs = outputs if self.batch_first else outputs.transpose(0, 1)
        if not as_needed:
            return outputs, None
        return outputs, weights.mean(dim=1) if average else weights
