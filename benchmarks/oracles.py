"""Problems whose hypergradient is known at one λ, in float64 and without minibatches.

>>> case = ridge(steps=100)
>>> tuple(case.exact.shape)
(8,)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from benchmarks import mnist
from hypertune.algorithms import Problem
from hypertune.hypernetworks import Layout

Optimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Case:
    """A problem, a λ, and the hypergradient there.

    Parameters
    ----------
    train_loss : callable ``(w (..., D), lam (..., n)) -> (...)``
    valid_loss : callable ``(w (..., D)) -> (...)``
    w0 : Tensor of shape (D,)
        Initial weights.
    lam, exact : Tensor of shape (n,)
    optimizer : callable ``list of Parameter -> torch.optim.Optimizer``
        Trains the weights.
    steps : int
        Training steps of every algorithm.
    convex : bool, default=True
        Whether L_Train is, in w.
    """

    train_loss: Callable[[Tensor, Tensor], Tensor]
    valid_loss: Callable[[Tensor], Tensor]
    w0: Tensor
    lam: Tensor
    exact: Tensor
    optimizer: Optimizer
    steps: int
    convex: bool = True

    def problem(self) -> Problem:
        """For the algorithms; λ̂ is not to meet a bound."""
        nothing, far = itertools.repeat(None), torch.full_like(self.lam, 100.0)
        return Problem(
            lambda w, lam, _: self.train_loss(w, lam), lambda w, _: self.valid_loss(w), nothing, nothing, -far, far
        )

    def layout(self) -> Layout:
        """Every hyperparameter moves every weight; where there is one for each, also a local response can be had."""
        D = torch.arange(len(self.w0))
        return Layout(units=torch.zeros_like(D), local=[D] if len(self.lam) == len(D) else [])


def _normal(seed: int) -> Callable[..., Tensor]:
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge(steps: int) -> Case:
    """8 weights, 30 rows: ‖Xw − y‖²/2N + Σ e^{λ_d} w_d²/2."""
    normal = _normal(0)
    X, X_valid, true = normal(30, 8), normal(200, 8), 0.5 * normal(8)
    y, y_valid = X @ true + 2 * normal(30), X_valid @ true + 2 * normal(200)
    lam = torch.linspace(-2, 1, 8, dtype=torch.float64)

    def train_loss(w: Tensor, lam: Tensor) -> Tensor:
        return 0.5 * (w @ X.T - y).square().mean(-1) + 0.5 * (lam.exp() * w.square()).sum(-1)

    def valid_loss(w: Tensor) -> Tensor:
        return 0.5 * (w @ X_valid.T - y_valid).square().mean(-1)

    w0, sgd = torch.zeros_like(lam), partial(torch.optim.SGD, lr=0.3)
    exact = by_the_theorem(train_loss, valid_loss, newton(train_loss, w0, lam), lam)
    return Case(train_loss, valid_loss, w0, lam, exact, sgd, steps)


def logistic(steps: int) -> Case:
    """20 features, 500 rows, one L2 for each feature, as three bilevel libraries ship it."""
    normal = _normal(0)
    X, X_valid, true = normal(500, 20), normal(500, 20), normal(20)
    y, y_valid = ((x @ true + 0.1 * normal(500) > 0).double() for x in (X, X_valid))
    lam = torch.linspace(-6, 0, 20, dtype=torch.float64)

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        z = w @ x.T
        return binary_cross_entropy_with_logits(z, y.expand_as(z), reduction="none").mean(-1)

    def train_loss(w: Tensor, lam: Tensor) -> Tensor:
        return loss(w, X, y) + 0.5 * (lam.exp() * w.square()).sum(-1)

    valid_loss = partial(loss, x=X_valid, y=y_valid)
    w0, sgd = torch.zeros_like(lam), partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    exact = by_the_theorem(train_loss, valid_loss, best_response(train_loss, w0, lam, sgd), lam)
    return Case(train_loss, valid_loss, w0, lam, exact, sgd, steps)


def linear(steps: int, directory: str | None = None) -> Case:
    """The paper's 784-10 model on 2,000 + 2,000 images of MNIST in ``directory``, or 64-10 on digits: an L2 for each weight."""
    X, labels = load_digits(return_X_y=True) if directory is None else mnist.load(directory)[:2]
    X, labels = torch.as_tensor(X / X.max(), dtype=torch.float64)[:4_000], torch.as_tensor(labels)[:4_000].long()
    X, Y = torch.cat([X, torch.ones(len(X), 1)], dim=1), one_hot(labels, 10).double()
    half, inputs = len(X) // 2, X.shape[1]
    lam = -4 + _normal(0)(10 * inputs)

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (w.view(*w.shape[:-1], 10, inputs) @ x.T - y.T).square().mean(dim=(-2, -1))

    def train_loss(w: Tensor, lam: Tensor) -> Tensor:
        return loss(w, X[:half], Y[:half]) + (lam.exp() * w.square()).sum(-1) / 10

    def solve(right: Tensor) -> Tensor:
        """(XᵀX/B + diag e^{λ_c})⁻¹ of each class's right side (10, inputs)."""
        gram, decay = X[:half].T @ X[:half] / half, lam.exp().view(10, inputs)
        return torch.stack([torch.linalg.solve(gram + d.diag(), b) for d, b in zip(decay, right, strict=True)])

    w = solve(Y[:half].T @ X[:half] / half).flatten().requires_grad_()
    (G,) = torch.autograd.grad(loss(w, X[half:], Y[half:]), w)
    exact = -solve(G.view(10, inputs)).flatten() * lam.exp() * w.detach()
    w0 = 0.01 * _normal(1)(len(lam))
    lr = 5 / float(X.square().sum(dim=1).mean())  # below 1 over the largest curvature
    sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return Case(train_loss, partial(loss, x=X[half:], y=Y[half:]), w0, lam, exact, sgd, steps)


def mlp(steps: int) -> Case:
    """13-8-8-3 with tanh on wine's 178 rows, an L2 for each of the three layers, biases included."""
    X, labels = load_wine(return_X_y=True)
    X, labels = torch.from_numpy(StandardScaler().fit_transform(X)), torch.from_numpy(labels)
    shapes = [(13, 8), (8, 8), (8, 3)]
    sizes = [(a + 1) * b for a, b in shapes]
    lam = torch.tensor([-3.0, -4.0, -5.0], dtype=torch.float64)

    def loss(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        for number, (layer, (a, b)) in enumerate(zip(w.split(sizes, dim=-1), shapes, strict=True)):
            W = layer.view(*w.shape[:-1], a + 1, b)
            x = (torch.tanh(x) if number else x) @ W[..., :a, :] + W[..., a:, :]
        return -(torch.log_softmax(x, dim=-1) * one_hot(labels)).sum(-1).mean(-1)

    def train_loss(w: Tensor, lam: Tensor) -> Tensor:
        squares = torch.stack([layer.square().sum(-1) for layer in w.split(sizes, dim=-1)], dim=-1)
        return loss(w, X[::2], labels[::2]) + 0.5 * (lam.exp() * squares).sum(-1)

    valid_loss = partial(loss, x=X[1::2], labels=labels[1::2])
    w0, sgd = 0.3 * _normal(1)(sum(sizes)), partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    exact = by_retraining(train_loss, valid_loss, best_response(train_loss, w0, lam, sgd, 5_000), lam)
    return Case(train_loss, valid_loss, w0, lam, exact, sgd, steps, convex=False)


# --- exact answers ------------------------------------------------------------------------------------------------------------


def best_response(
    train_loss: Callable[[Tensor, Tensor], Tensor], w: Tensor, lam: Tensor, optimizer: Optimizer, steps: int = 1_000
) -> Tensor:
    """The minimum (D,) that training finds from w, and Newton's method after it."""
    w = torch.nn.Parameter(w.clone())
    weights = optimizer([w])
    for _ in range(steps):
        (w.grad,) = torch.autograd.grad(train_loss(w, lam), w)
        weights.step()
    return newton(train_loss, w.detach(), lam)


def newton(train_loss: Callable[[Tensor, Tensor], Tensor], w: Tensor, lam: Tensor) -> Tensor:
    """The minimum (D,) next to w: what is left of the gradient is rounding."""

    def at(w: Tensor) -> Tensor:
        return train_loss(w, lam)

    for _ in range(5):
        w = w - torch.linalg.solve(hessian(at, w), gradient(at, w).detach())
    return w


def gradient(loss: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """Differentiable once more."""
    w = w if w.requires_grad else w.detach().requires_grad_()
    return torch.autograd.grad(loss(w), w, create_graph=True)[0]


def by_the_theorem(train_loss: Callable, valid_loss: Callable, w: Tensor, lam: Tensor) -> Tensor:
    """−∇_w L_Valid H⁻¹ ∂²L_Train/∂w∂λ (n,) at the minimum w, with dense matrices."""
    H, G = hessian(lambda w: train_loss(w, lam), w), gradient(valid_loss, w).detach()
    mixed = jacobian(lambda lam: gradient(lambda w: train_loss(w, lam), w), lam)
    return -torch.linalg.solve(H, G) @ mixed


def by_retraining(train_loss: Callable, valid_loss: Callable, w: Tensor, lam: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences (n,) of L_Valid at the minima near w."""
    units = step * torch.eye(len(lam), dtype=lam.dtype)
    up, down = (torch.stack([valid_loss(newton(train_loss, w, lam + s * e)) for e in units]) for s in (1, -1))
    return (up - down) / (2 * step)
