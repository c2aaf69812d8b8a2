"""Hypernetworks: the best response w*(λ), learned as a function w_φ(λ).

Every one of them is a *basis* f, a small map from the displacement λ − c to r features, times a matrix V:

    w_φ(λ) = w₀ + f(λ − c) V,          w₀ (D,),  V (r, D),  c the centre (n,)

with V zero at the start, so that training begins from the plain initial network w₀. K folds are K hypernetworks,
stacked along a leading axis; they share the centre. What is passed to a search is a small description that builds one:

==================  ==================================  ===================  ========================================
description         basis                               r                    parameters for one fold
==================  ==================================  ===================  ========================================
``Linear()``        f(δ) = δ                            n                    D (n + 1)
``LowRank(rank)``   f(δ) = A δ + b                      rank                 n·rank + rank + D (rank + 1)
``ReluMLP(hidden)`` f(δ) = relu(A δ + b)                hidden               n·hidden + hidden + D (hidden + 1)
``Gated(hidden)``   g(δ) = A₂ tanh(A₁ δ + b₁) + b₂,     1 gate per unit      2 D + the gates' small network
                    w = w₀ + g(δ)[unit of w] ∘ V
==================  ==================================  ===================  ========================================

>>> import torch
>>> hypernetwork = LowRank(rank=2).build(torch.zeros(1, 5), torch.zeros(3), units=torch.arange(5))
>>> tuple(hypernetwork(torch.zeros(4, 3)).shape)                     # (K, m, D) for m values of λ
(1, 4, 5)

References
----------
Lorraine & Duvenaud (2018), *Stochastic Hyperparameter Optimization through Hypernetworks*, section 2 and appendix.
MacKay et al. (2019), *Self-Tuning Networks* (the gates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

# --- bases: displacement (m, n) -> features (K, m, r) --------------------------------------------------------------------


class _Identity(nn.Module):
    def __init__(self, K: int, n: int):
        super().__init__()
        self.K, self.r = K, n

    def forward(self, delta: Tensor) -> Tensor:
        return delta.expand(self.K, *delta.shape)


class _Affine(nn.Module):
    """K affine maps n → r, initialised as ``nn.Linear`` is."""

    def __init__(self, K: int, n: int, r: int, like: Tensor):
        super().__init__()
        self.r = r
        bound = 1 / math.sqrt(n)
        self.A = nn.Parameter(torch.empty(K, n, r, dtype=like.dtype, device=like.device).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.empty(K, 1, r, dtype=like.dtype, device=like.device).uniform_(-bound, bound))

    def forward(self, delta: Tensor) -> Tensor:
        return delta @ self.A + self.b


class _Sequence(nn.Sequential):
    """Several maps, one after the other; r is the last one's."""

    @property
    def r(self) -> int:
        return next(int(layer.r) for layer in reversed(self) if hasattr(layer, "r"))  # type: ignore[arg-type]


# --- the hypernetwork --------------------------------------------------------------------------------------------------------


class Hypernetwork(nn.Module):
    """w_φ(λ) = w₀ + f(λ − c) V for K folds at once, with the gradient of its two factors written out.

    Parameters
    ----------
    basis : nn.Module
        Displacement (m, n) → features (K, m, r), with the attribute ``r``.
    w0 : Tensor of shape (K, D)
        Weights at the centre; copied.
    center : Tensor of shape (n,)
        Kept by reference: if the caller moves λ̂ in place, the centre moves with it.
    units : Tensor of shape (D,), optional
        If given, the hypernetwork is gated: weight d has the single feature number ``units[d]``, and V is (K, 1, D).
    """

    center: Tensor

    def __init__(self, basis: nn.Module, w0: Tensor, center: Tensor, units: Tensor | None = None):
        super().__init__()
        K, D = w0.shape
        self.basis = basis
        self.w0 = nn.Parameter(w0.detach().clone())
        self.V = nn.Parameter(w0.new_zeros(K, int(basis.r) if units is None else 1, D))  # type: ignore[arg-type]
        self.center = center
        self.units = units

    def features(self, lam: Tensor) -> Tensor:
        """λ of shape (m, n) → features (K, m, r)."""
        return self.basis(lam - self.center)

    def weights(self, features: Tensor) -> Tensor:
        """Features (K, m, r) → weights (K, m, D)."""
        if self.units is not None:
            return torch.addcmul(self.w0[:, None], features[..., self.units], self.V)
        return torch.baddbmm(self.w0[:, None].expand(-1, features.shape[1], -1), features, self.V)

    def forward(self, lam: Tensor) -> Tensor:
        """λ of shape (m, n) → weights (K, m, D)."""
        return self.weights(self.features(lam))

    def V_gradient(self, features: Tensor, G: Tensor) -> Tensor:
        """∂/∂V of Σ_m ⟨G, w⟩: features (K, m, r) and G (K, m, D) → the shape of V."""
        if self.units is not None:
            return (features[..., self.units] * G).sum(dim=1, keepdim=True)
        return features.transpose(1, 2) @ G

    def move_V(self, features: Tensor, G: Tensor, power: Tensor) -> None:
        """V ← V − Σ_m f ⊗ G / power, in place; ``power`` is the (K, 1, 1) scale of Σ_m ‖f‖² (of f² if gated)."""
        with torch.no_grad():
            if self.units is None:
                self.V.baddbmm_(features.transpose(1, 2) / power, G, alpha=-1.0)
            else:
                self.V.sub_(self.V_gradient(features, G) / power)

    def pull_back(self, features: Tensor, G: Tensor) -> Tensor:
        """∂/∂features of Σ_m ⟨G, w⟩, shape (K, m, r)."""
        with torch.no_grad():
            if self.units is None:
                return G @ self.V.transpose(1, 2)
            zeros = torch.zeros_like(features)
            return zeros.index_add_(2, self.units, G * self.V)


# --- descriptions --------------------------------------------------------------------------------------------------------------


class Builder(Protocol):
    """What ``hypernetwork=`` may be: anything with this method."""

    def build(self, w0: Tensor, center: Tensor, units: Tensor) -> Hypernetwork:
        """Build the hypernetworks of K folds.

        Parameters
        ----------
        w0 : Tensor of shape (K, D)
            Initial weights.
        center : Tensor of shape (n,)
            Where the displacement is zero; kept by reference.
        units : Tensor of shape (D,)
            For each weight the number of the output unit that it belongs to.
        """
        ...


@dataclass(frozen=True)
class Linear:
    """w = w₀ + (λ − c) V: the tangent of the best response. The default."""

    def build(self, w0: Tensor, center: Tensor, units: Tensor) -> Hypernetwork:
        """See :class:`Builder`."""
        return Hypernetwork(_Identity(len(w0), len(center)), w0, center)


@dataclass(frozen=True)
class LowRank:
    """The paper's factorised linear hypernetwork, for many hyperparameters: n → rank → D, with both biases."""

    rank: int = 10

    def build(self, w0: Tensor, center: Tensor, units: Tensor) -> Hypernetwork:
        """See :class:`Builder`."""
        return Hypernetwork(_Affine(len(w0), len(center), self.rank, w0), w0, center)


@dataclass(frozen=True)
class ReluMLP:
    """The paper's nonlinear hypernetwork: n → hidden ReLU units → D."""

    hidden: int = 50

    def build(self, w0: Tensor, center: Tensor, units: Tensor) -> Hypernetwork:
        """See :class:`Builder`."""
        basis = _Sequence(_Affine(len(w0), len(center), self.hidden, w0), nn.ReLU())
        return Hypernetwork(basis, w0, center)


@dataclass(frozen=True)
class Gated:
    """Each weight ``W + g(λ)[unit] ∘ V``: two copies of the weights at any n, nonlinear in λ, works for any module."""

    hidden: int = 16

    def build(self, w0: Tensor, center: Tensor, units: Tensor) -> Hypernetwork:
        """See :class:`Builder`."""
        K, n_units = len(w0), int(units.max()) + 1
        basis = _Sequence(_Affine(K, len(center), self.hidden, w0), nn.Tanh(), _Affine(K, self.hidden, n_units, w0))
        return Hypernetwork(basis, w0, center, units.to(w0.device))


HYPERNETWORKS: dict[str, Builder] = {
    "linear": Linear(),
    "low_rank": LowRank(),
    "mlp": ReluMLP(),
    "gated": Gated(),
}
