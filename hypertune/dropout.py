"""Dropout whose rate may be a tensor, with noise that models share: by itself, and of attention.

Uniform noise is compared with the rate, so models that share the noise and differ in the rate differ only where the rates do: the
common random numbers of the antithetic pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    """What each number is multiplied by: 0 with probability ``rate``, else 1/(1 − rate); 0 everywhere at a rate of 1."""
    return (noise >= rate).to(noise.dtype) / _share(rate)  # whatever the default dtype


def _share(rate: Value) -> Value:
    return (1 - rate).clamp(min=_LEAST) if isinstance(rate, Tensor) else max(1 - rate, _LEAST)


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
        p = self.p.view(-1, *(1,) * (x.dim() - 1)) if isinstance(self.p, Tensor) else x.new_tensor(self.p)
        noise = self._noise(self._cells(x[0]), x)
        kept = torch.ge(
            noise, p.detach(), out=noise.new_empty(0)
        )  # numbers at once, instead of booleans: vmap has no `out`
        return x * kept.div_(_share(p))

    def _cells(self, x: Tensor) -> Sequence[int]:
        return (*x.shape[:2], *(1,) * (x.dim() - 2)) if self.channelwise else x.shape


class TensorAttention(Drops, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose dropout, of the attention weights, may have a tensor as its rate.

    Without dropout it is torch's own. A query whose keys are all masked attends to nothing.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not self.training or is_zero(self.dropout) or query.dim() != 3 or (is_causal and attn_mask is None):
            return super().forward(query, key, value, *masks)
        rows = (query, key, value) if self.batch_first else (x.transpose(0, 1) for x in (query, key, value))
        matrices = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(rows, matrices, biases, strict=True))  # (B, T or S, E)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(len(x), -1, -1)], dim=1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)  # (B, heads, T, S)
        if attn_mask is not None:
            own = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            scores = scores + _added(own, scores)
        if key_padding_mask is not None:
            scores = scores + _added(key_padding_mask[:, None, None], scores)
        dead = (scores == -math.inf).all(dim=3, keepdim=True)
        weights = scores.masked_fill(dead, 0.0).softmax(dim=3).masked_fill(dead, 0.0)
        weights = self._dropped(weights, self.dropout)
        outputs = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        outputs = outputs if self.batch_first else outputs.transpose(0, 1)
        if not need_weights:
            return outputs, None
        return outputs, weights.mean(dim=1) if average_attn_weights else weights


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask (..., S) as what is added to scores: minus infinity where it is True; none for keys that the layer adds itself."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf)
    return F.pad(mask.to(scores.dtype), (0, scores.shape[3] - mask.shape[-1]))
