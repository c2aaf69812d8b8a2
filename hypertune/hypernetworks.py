"""Hypernetworks: the best response w*(λ), learned as a function w_φ(λ).

Every one of them is a *basis* f, a small map from the displacement λ − c to r features, and linear maps of the features:

    w_φ(λ) = w₀ + f(λ − c) V,          w₀ (D,),  V (r, D),  c the centre (n,)         all features → all weights
    w_φ(λ) = w₀ + f(λ − c)[i] ∘ V,     V (D,),   i (D,) the feature of each weight    one feature → its own weights

with V zero at the start, so that training begins from the plain initial network w₀. K folds are K hypernetworks,
stacked along a leading axis; they share the centre. What is passed to a search is a small description that builds one:

==================  ==================================  ===================  ========================================
description         basis                               r                    parameters for one fold
==================  ==================================  ===================  ========================================
``Linear()``        f(δ) = δ                            n                    D (n + 1)
  of a finer grain  a penalty acts on its own weights   n                    D more for each such hyperparameter
``LowRank(rank)``   f(δ) = A δ + b                      rank                 n·rank + rank + D (rank + 1)
``ReluMLP(hidden)`` f(δ) = relu(A δ + b)                hidden               n·hidden + hidden + D (hidden + 1)
``Gated(hidden)``   g(δ) = A₂ tanh(A₁ δ + b₁) + b₂,     1 gate per unit      2 D + the gates' small network
                    w = w₀ + g(δ)[unit of w] ∘ V
==================  ==================================  ===================  ========================================

>>> import torch
>>> hypernetwork = LowRank(rank=2).build(torch.zeros(1, 5), torch.zeros(3), Layout(units=torch.arange(5)))
>>> tuple(hypernetwork(torch.zeros(4, 3)).shape)                     # (K, m, D) for m values of λ
(1, 4, 5)

References
----------
Lorraine & Duvenaud (2018), *Stochastic Hyperparameter Optimization through Hypernetworks*, section 2 and appendix.
MacKay et al. (2019), *Self-Tuning Networks* (the gates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_TRUSTED = 4.0  # times 2σ: how far from the centre the variance of the weights was measured against retrained models

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


# --- linear maps: features (K, m, r) -> a displacement of the weights (K, m, D) -------------------------------------------


class Dense(nn.Module):
    """All of some features move all weights: f V with V (K, r, D).

    Parameters
    ----------
    like : Tensor of shape (K, D)
    columns : Tensor of shape (r,)
        Which of the features.
    """

    def __init__(self, like: Tensor, columns: Tensor):
        super().__init__()
        self.columns = columns.to(like.device)
        self.V = nn.Parameter(like.new_zeros(len(like), len(columns), like.shape[1]))

    def _own(self, features: Tensor) -> Tensor:
        return features if len(self.columns) == features.shape[-1] else features[..., self.columns]

    def add_to(self, w: Tensor, features: Tensor) -> Tensor:
        """w (K, m, D) plus the displacement."""
        return torch.baddbmm(w, self._own(features), self.V)

    def gradient(self, features: Tensor, G: Tensor) -> Tensor:
        """∂/∂V of Σ_m ⟨G, w⟩ for G (K, m, D)."""
        return self._own(features).transpose(1, 2) @ G

    def power(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_m of ‖f‖² and of its average over features, as a weight sees it; each (K, 1, 1)."""
        total = self._own(features).square().sum(dim=(1, 2), keepdim=True)
        return total, total / len(self.columns)

    def move(self, features: Tensor, G: Tensor, power: Tensor) -> None:
        """V ← V − Σ_m f ⊗ G / power, in place."""
        self.V.data.baddbmm_(self._own(features).transpose(1, 2) / power, G, alpha=-1.0)

    def pull_back_to(self, gradient: Tensor, G: Tensor) -> None:
        """Add ∂/∂features of Σ_m ⟨G, w⟩ to ``gradient`` (K, m, r), in place."""
        gradient[..., self.columns] += G @ self.V.data.transpose(1, 2)

    def squares(self, features: Tensor) -> Tensor:
        """Σ f² over the features that move a weight, (K, m, 1): the same for all."""
        return self._own(features).square().sum(dim=-1, keepdim=True)


class Local(nn.Module):
    """Each weight is moved by one feature, its own: f[index] ∘ V with V (K, 1, D).

    Parameters
    ----------
    like : Tensor of shape (K, D)
    index : Tensor of shape (D,)
        The feature of each weight; −1 where there is none.
    """

    def __init__(self, like: Tensor, index: Tensor):
        super().__init__()
        index = index.to(like.device)
        self.index, self.present = index.clamp(min=0), (index >= 0).to(like.dtype)
        self.features = index[index >= 0].unique()
        self.V = nn.Parameter(like.new_zeros(len(like), 1, like.shape[1]))

    def add_to(self, w: Tensor, features: Tensor) -> Tensor:
        """w (K, m, D) plus the displacement."""
        return torch.addcmul(w, features[..., self.index], self.V)

    def gradient(self, features: Tensor, G: Tensor) -> Tensor:
        """∂/∂V of Σ_m ⟨G, w⟩ for G (K, m, D)."""
        return (features[..., self.index] * G).sum(dim=1, keepdim=True) * self.present

    def power(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_m of f², the average over features standing for each weight's own; twice, each (K, 1, 1)."""
        total = features[..., self.features].square().sum(dim=1).mean(dim=1).view(-1, 1, 1)
        return total, total

    def move(self, features: Tensor, G: Tensor, power: Tensor) -> None:
        """V ← V − Σ_m f ∘ G / power, in place."""
        self.V.data.sub_(self.gradient(features, G) / power)

    def pull_back_to(self, gradient: Tensor, G: Tensor) -> None:
        """Add ∂/∂features of Σ_m ⟨G, w⟩ to ``gradient`` (K, m, r), in place."""
        gradient.index_add_(2, self.index, G * self.V.data)

    def squares(self, features: Tensor) -> Tensor:
        """f² of the feature that moves a weight, (K, m, D)."""
        return features[..., self.index].square() * self.present


# --- the hypernetwork --------------------------------------------------------------------------------------------------------


class Hypernetwork(nn.Module):
    """w_φ(λ) = w₀ + the displacements of some linear maps of f(λ − c), for K folds at once.

    Parameters
    ----------
    basis : nn.Module
        Displacement (m, n) → features (K, m, r), with the attribute ``r``.
    maps : list of Dense and Local
    w0 : Tensor of shape (K, D)
        Weights at the centre; copied.
    center : Tensor of shape (n,)
        Kept by reference: if the caller moves λ̂ in place, the centre moves with it.
    unseen : Tensor of shape (n,), optional
        Coordinates of λ (booleans) of whose displacement the basis is told that it is zero.
    """

    center: Tensor
    maps: Any  # an nn.ModuleList of Dense and Local

    def __init__(
        self,
        basis: nn.Module,
        maps: Sequence[Dense | Local],
        w0: Tensor,
        center: Tensor,
        unseen: Tensor | None = None,
    ):
        super().__init__()
        self.seen = None if unseen is None else (~unseen).to(center)
        self.basis = basis
        self.w0 = nn.Parameter(w0.detach().clone())
        self.maps = nn.ModuleList(maps)
        self.center = center

    def features(self, lam: Tensor) -> Tensor:
        """λ of shape (m, n) → features (K, m, r); none of them (r = 0) if no map would see them."""
        if not self.maps:
            return self.w0.new_zeros(len(self.w0), len(lam), 0)
        delta = lam - self.center
        return self.basis(delta if self.seen is None else delta * self.seen)

    def weights(self, features: Tensor) -> Tensor:
        """Features (K, m, r) → weights (K, m, D)."""
        w = self.w0[:, None].expand(-1, features.shape[1], -1)
        for linear in self.maps:
            w = linear.add_to(w, features)
        return w

    def forward(self, lam: Tensor) -> Tensor:
        """λ of shape (m, n) → weights (K, m, D)."""
        return self.weights(self.features(lam))

    @property
    def linear(self) -> bool:
        """Whether the features are the displacement itself."""
        return isinstance(self.basis, _Identity) and len(self.maps) > 0

    def is_w0_at(self, lam_hat: Tensor) -> bool:
        """Whether w_φ(λ̂) is w₀: for a linear family that is centred at this very tensor."""
        return self.center is lam_hat and isinstance(self.basis, _Identity)

    def variance(self, lam: Tensor, sigma: Tensor) -> Tensor:
        """Variance of the weights at λ (m, n) relative to that of w₀, (K, m, 1 or D), where φ is linear and uncertain.

        Mean-field variational inference: the ELBO of a Gaussian q(φ) of independent numbers on N rows with λ ~ N(c, σ²I) and a loss
        of curvature h in every weight is greatest at the precisions N h of w₀ and N h σ_j² of V_j: a variance of 1 + d², with
        d² = Σ_j (λ − c)_j²/σ_j² over the coordinates j that move a weight. Best responses are not linear, though: with the second-order
        term that the family leaves out as uncertain as the others it is (1 + d²)², for d in 2σ. That was measured
        (docs/benchmarks.md, *band*) up to d = 4: infinite beyond it, and where σ_j = 0.
        """
        delta = lam - self.center
        distance = delta / (2 * sigma)  # 0/0, which is nan and counts as 0, where nothing was sampled and nothing moved
        squares = torch.where(distance.isinf().any(dim=-1), torch.inf, 0.0)[None, :, None]
        features = self.basis(distance.nan_to_num(0.0, 0.0, 0.0))
        for linear in self.maps:
            squares = squares + linear.squares(features)
        return torch.where(squares > _TRUSTED**2, torch.inf, (1 + squares).square())

    def keep(self, K: int) -> None:
        """Let go of all but the first K of the stacked hypernetworks."""
        if len(self.w0) == K:
            return
        for parameter in self.parameters():
            parameter.data = parameter.data[:K].clone()
        for module in self.modules():
            if isinstance(module, _Identity):
                module.K = K

    def pull_back(self, features: Tensor, G: Tensor) -> Tensor:
        """∂/∂features of Σ_m ⟨G, w⟩, shape (K, m, r)."""
        gradient = torch.zeros_like(features)
        for linear in self.maps:
            linear.pull_back_to(gradient, G)
        return gradient


# --- descriptions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What belongs together among the weights.

    Parameters
    ----------
    units : Tensor of shape (D,)
        For each weight the number of the output unit that it belongs to.
    local : sequence of Tensor of shape (D,)
        For each hyperparameter of a fine grain: which coordinate of λ acts on each weight, −1 for none.
    unseen : Tensor of shape (n,), optional
        Coordinates of λ (booleans) that no weight responds to here.
    """

    units: Tensor
    local: Sequence[Tensor] = ()
    unseen: Tensor | None = None


class Builder(Protocol):
    """What ``hypernetwork=`` may be: anything with this method."""

    def build(self, w0: Tensor, center: Tensor, layout: Layout) -> Hypernetwork:
        """Build the hypernetworks of K folds.

        Parameters
        ----------
        w0 : Tensor of shape (K, D)
            Initial weights.
        center : Tensor of shape (n,)
            Where the displacement is zero; kept by reference.
        layout : Layout
        """
        ...


@dataclass(frozen=True)
class Linear:
    """w = w₀ + (λ − c) V: the tangent of the best response. The default.

    A coordinate that acts on some weights only (the weight decay of one unit) moves those weights alone: one copy of the
    weights for a hyperparameter of any number of coordinates.

    Parameters
    ----------
    local : bool
        Whether it does; otherwise every coordinate moves all weights.
    """

    local: bool = True

    def build(self, w0: Tensor, center: Tensor, layout: Layout) -> Hypernetwork:
        """See :class:`Builder`."""
        coordinates = torch.arange(len(center), device="cpu")
        local = layout.local if self.local else ()
        elsewhere = torch.cat([torch.full((0,), -1, device="cpu"), *(index.cpu() for index in local)]).unique()
        dense = coordinates[~torch.isin(coordinates, elsewhere)]
        if layout.unseen is not None:
            dense = dense[~layout.unseen[dense]]
        maps: list[Dense | Local] = [Local(w0, index) for index in local]
        if len(dense):
            maps.insert(0, Dense(w0, dense))
        return Hypernetwork(_Identity(len(w0), len(center)), maps, w0, center, layout.unseen)


@dataclass(frozen=True)
class LowRank:
    """The paper's factorised linear hypernetwork, for many hyperparameters: n → rank → D, with both biases.

    Parameters
    ----------
    rank : int
        Units in the middle.
    """

    rank: int = 10

    def build(self, w0: Tensor, center: Tensor, layout: Layout) -> Hypernetwork:
        """See :class:`Builder`."""
        basis = _Affine(len(w0), len(center), self.rank, w0)
        return Hypernetwork(basis, [Dense(w0, torch.arange(self.rank, device="cpu"))], w0, center, layout.unseen)


@dataclass(frozen=True)
class ReluMLP:
    """The paper's nonlinear hypernetwork: n → ReLU units → D.

    Parameters
    ----------
    hidden : int
        Units.
    """

    hidden: int = 50

    def build(self, w0: Tensor, center: Tensor, layout: Layout) -> Hypernetwork:
        """See :class:`Builder`."""
        basis = _Sequence(_Affine(len(w0), len(center), self.hidden, w0), nn.ReLU())
        return Hypernetwork(basis, [Dense(w0, torch.arange(self.hidden, device="cpu"))], w0, center, layout.unseen)


@dataclass(frozen=True)
class Gated:
    """Each weight ``W + g(λ)[unit] ∘ V``: two copies of the weights at any n, nonlinear in λ, works for any module.

    Parameters
    ----------
    hidden : int
        Tanh units of the gates' small network.
    """

    hidden: int = 16

    def build(self, w0: Tensor, center: Tensor, layout: Layout) -> Hypernetwork:
        """See :class:`Builder`."""
        K, n_units = len(w0), int(layout.units.max()) + 1
        basis = _Sequence(_Affine(K, len(center), self.hidden, w0), nn.Tanh(), _Affine(K, self.hidden, n_units, w0))
        return Hypernetwork(basis, [Local(w0, layout.units)], w0, center, layout.unseen)


@dataclass(frozen=True)
class Constant:
    """w = w₀: no response, for algorithms that need none."""

    def build(self, w0: Tensor, center: Tensor, layout: Layout) -> Hypernetwork:
        """See :class:`Builder`."""
        return Hypernetwork(_Identity(len(w0), len(center)), [], w0, center)


HYPERNETWORKS: dict[str, Builder] = {
    "linear": Linear(),
    "low_rank": LowRank(),
    "mlp": ReluMLP(),
    "gated": Gated(),
}
