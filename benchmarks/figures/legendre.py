"""A hypernetwork of the figures' own: for each class a cubic in its own hyperparameter.

    w_c(λ) = w₀_c + Σ_k P_k(λ_c) V_kc,          k = 1, 2, 3

with P_k the Legendre polynomials, orthonormal over the range of λ. It is the package's ``Linear`` with its local layout (a class's weight
decay moves that class's weights alone) and two more degrees, because a straight line does not fit a response over a broad p(λ).
It shows that a search takes any object with a ``build`` method: a basis of features and maps from features to weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypertune.hypernetworks import Hypernetwork, Layout, Local


class _Polynomials(nn.Module):
    """Displacement (m, n) → features (1, m, degree · n)."""

    def __init__(self, n: int, degree: int, radius: float):
        super().__init__()
        self.r, self.degree, self.radius = n * degree, degree, radius

    def forward(self, delta: Tensor) -> Tensor:
        x = delta / self.radius
        P = [torch.ones_like(x), x]
        for k in range(1, self.degree):
            P.append(((2 * k + 1) * x * P[k] - k * P[k - 1]) / (k + 1))
        return torch.cat([math.sqrt(2 * k + 1) * P[k] for k in range(1, self.degree + 1)], dim=-1)[None]


@dataclass(frozen=True)
class Legendre:
    """Each unit's weights are a polynomial in its own hyperparameter, for one fold.

    Parameters
    ----------
    radius : float
        Half the range of λ, around the centre.
    degree : int, default=3
    """

    radius: float
    degree: int = 3

    def build(self, w0: Tensor, center: Tensor, layout: Layout) -> Hypernetwork:
        """See :class:`hypertune.hypernetworks.Builder`."""
        n = len(center)
        maps = [Local(w0, layout.units + k * n) for k in range(self.degree)]
        return Hypernetwork(_Polynomials(n, self.degree, self.radius), maps, w0, center)
