"""Ridge regression, where everything is known exactly: the oracle of the algorithms' tests.

    L_Train(w, λ) = ‖Xw − y‖²/2N + Σ_d e^{λ_d} w_d²/2        L_Valid(w) = ‖X'w − y'‖²/2N'

with n = 1 (one λ for all weights) or n = D (one each).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertune.algorithms import Problem
from hypertune.hypernetworks import Layout, Linear


@dataclass(frozen=True)
class Ridge:
    X: Tensor
    y: Tensor
    X_valid: Tensor
    y_valid: Tensor

    @classmethod
    def make(cls, seed: int = 0, N: int = 30, D: int = 8, noise: float = 2.0) -> Ridge:
        g = torch.Generator().manual_seed(seed)
        X, X_valid = (torch.randn(rows, D, generator=g, dtype=torch.float64) for rows in (N, 200))
        w = 0.5 * torch.randn(D, generator=g, dtype=torch.float64)
        y, y_valid = (Z @ w + noise * torch.randn(len(Z), generator=g, dtype=torch.float64) for Z in (X, X_valid))
        return cls(X, y, X_valid, y_valid)

    @property
    def D(self) -> int:
        return self.X.shape[1]

    def train_loss(self, w: Tensor, lam: Tensor, x: object = None) -> Tensor:
        """w (..., D), lam (..., n) → (...)."""
        return 0.5 * (w @ self.X.T - self.y).square().mean(-1) + 0.5 * (lam.exp() * w.square()).sum(-1)

    def valid_loss(self, w: Tensor, x: object = None) -> Tensor:
        return 0.5 * (w @ self.X_valid.T - self.y_valid).square().mean(-1)

    def best_response(self, lam: Tensor) -> Tensor:
        """w*(λ), shape (D,), for one λ of shape (n,)."""
        hessian = self.X.T @ self.X / len(self.X) + torch.diag(lam.exp().expand(self.D))
        return torch.linalg.solve(hessian, self.X.T @ self.y / len(self.X))

    def tangent(self, lam: Tensor) -> Tensor:
        """dw*/dλ, shape (D, n), by the implicit function theorem: −H⁻¹ ∂²L/∂w∂λ."""
        hessian = self.X.T @ self.X / len(self.X) + torch.diag(lam.exp().expand(self.D))
        w = self.best_response(lam)
        mixed = torch.diag(lam.exp() * w) if len(lam) == self.D else (lam.exp() * w)[:, None]
        return -torch.linalg.solve(hessian, mixed)

    def best_lam(self) -> float:
        """λ* for n = 1, to 0.005."""
        grid = torch.arange(-8, 6, 0.005, dtype=torch.float64)
        return float(grid[torch.stack([self.valid_loss(self.best_response(lam[None])) for lam in grid]).argmin()])

    def problem(self, n: int = 1, low: float = -8.0, high: float = 6.0) -> Problem:
        bounds = (torch.full((n,), bound, dtype=torch.float64) for bound in (low, high))
        return Problem(self.train_loss, self.valid_loss, itertools.repeat(None), itertools.repeat(None), *bounds)


class Exact:
    """Ridge regression at its optimum, one λ for each weight: everything that a hypergradient is made of."""

    def __init__(self) -> None:
        self.ridge = Ridge.make()
        self.lam = torch.linspace(-2.0, 1.0, self.ridge.D, dtype=torch.float64)
        self.best, self.tangent = self.ridge.best_response(self.lam), self.ridge.tangent(self.lam)
        self.w = self.best[None, None].clone().requires_grad_()
        (self.G,) = torch.autograd.grad(self.ridge.valid_loss(self.w).sum(), self.w)
        self.problem = self.ridge.problem(self.ridge.D)
        self.everything = torch.ones(self.ridge.D, dtype=torch.bool)
        self.hypernetwork = Linear().build(self.best[None], self.lam, Layout(torch.arange(self.ridge.D)))

    @property
    def hypergradient(self) -> torch.Tensor:
        return self.tangent.T @ self.G[0, 0]
