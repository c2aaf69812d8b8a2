"""The paper's model, 784-10 and linear, on MNIST: D = 7,850 weights, the bias being the weight of a 785th input that is 1.

    L_Train(w, λ) = loss(w) + Σ_d e^{λ_d} w_d² / 10                 L_Valid(w) = loss(w)

The squared error is the mean over the 10 outputs (so the penalty is, too), and L_Train then is 10 ridge regressions, one for
each output c, whose solution is exact: (XᵀX/B + diag e^{λ_c}) w_c = XᵀY_c/B.

Weights are flat, and any number of models is one matrix product: w (..., D) is w (..., 10, 785), unit by unit, as in
``nn.Linear``. λ (..., n) is one for all weights (n = 1), one for each class (10) or one for each weight (7,850).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import mnist
from benchmarks.figures.rows import Row, row
from hypertune.algorithms import Problem
from hypertune.hypernetworks import Layout

CLASSES = 10
INPUTS = 785
D = CLASSES * INPUTS

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """Some images: x (B, 785), with a column of ones, and one-hot y (B, 10)."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    """The paper's split: the first 50,000 training images train, the last 10,000 validate, 10,000 test."""

    train: Rows
    valid: Rows
    test: Rows


def load(
    directory: str | None,
    rows: tuple[int | None, int | None, int | None] = (None, None, None),
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Data:
    """Read MNIST in the paper's split.

    Parameters
    ----------
    directory : str or None
        See :func:`benchmarks.mnist.load`.
    rows : tuple of three int or None
        At most so many of the training, the validation and the test images; None is all.
    seed : int, optional
        Draws the training images at random; without it they are the first ones.
    dtype : torch.dtype, default=torch.float32
    """
    X, y, X_test, y_test = (torch.from_numpy(a) for a in mnist.load(directory))
    end = len(X) * 5 // 6  # 50,000
    order = torch.arange(end) if seed is None else torch.randperm(end, generator=torch.Generator().manual_seed(seed))
    train = order[: rows[0]]
    parts = [(X[train], y[train]), (X[end:][: rows[1]], y[end:][: rows[1]]), (X_test[: rows[2]], y_test[: rows[2]])]
    return Data(*(_rows(x, labels, dtype) for x, labels in parts))


def _rows(x: Tensor, labels: Tensor, dtype: torch.dtype) -> Rows:
    ones = torch.ones(len(x), 1, dtype=dtype)
    return Rows(torch.cat([x.to(dtype), ones], dim=1), torch.nn.functional.one_hot(labels, CLASSES).to(dtype))


def minibatches(rows: Rows, size: int | None, seed: int) -> Iterator[Rows]:
    """Endless minibatches, shuffled in each epoch; all rows every time if ``size`` is None or not below their number."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size is None or size >= len(rows.x):
            yield rows
            continue
        order = torch.randperm(len(rows.x), generator=generator)
        for some in order.split(size)[: len(order) // size]:
            yield Rows(rows.x[some], rows.y[some])


# --- losses of stacked models: w (..., D), x (B, 785), y (B, 10) -> (...) ------------------------------------------------


def outputs(w: Tensor, x: Tensor) -> Tensor:
    """w (..., D), x (B, 785) → (..., 10, B)."""
    return (w.reshape(-1, INPUTS) @ x.T).view(*w.shape[:-1], CLASSES, len(x))


def mse(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Squared error to the one-hot target, mean over rows and outputs."""
    return (outputs(w, x) - y.T).square().mean(dim=(-2, -1))


def cross_entropy(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Log-loss in nats, mean over rows."""
    return -(torch.log_softmax(outputs(w, x), dim=-2) * y.T).sum(dim=-2).mean(dim=-1)


def l2(w: Tensor, lam: Tensor) -> Tensor:
    """Σ_d e^{λ_d} w_d² / 10 for w (..., D) and λ (..., 1), (..., 10) or (..., D) → (...)."""
    per_class = lam.shape[-1] == CLASSES
    squares = w.square().view(*w.shape[:-1], CLASSES, INPUTS).sum(dim=-1) if per_class else w.square()
    return (lam.exp() * squares).sum(dim=-1) / CLASSES


def ridge(rows: Rows, lam: Tensor) -> Tensor:
    """argmin_w mse + l2, exactly, for one λ of shape (1,), (10,) or (D,).

    Returns
    -------
    Tensor of shape (D,)
        In λ's dtype. It is solved in float64.
    """
    if len(lam) == 1:
        return ridge_path(rows, lam[None])[0]
    gram, moments = moments_of(rows)
    decay = lam.double().exp().view(CLASSES, -1).expand(-1, INPUTS)
    # One after the other: a stack of such systems fails in some versions of MKL.
    solved = [torch.linalg.solve(gram + d.diag(), moment) for d, moment in zip(decay, moments.T, strict=True)]
    return torch.stack(solved).reshape(-1).to(lam.dtype)


def ridge_path(rows: Rows, lam: Tensor) -> Tensor:
    """The same for M values of one λ (M, 1), by one eigendecomposition: weights (M, D)."""
    gram, moments = moments_of(rows)
    values, vectors = torch.linalg.eigh(gram)
    solved = [
        vectors @ ((vectors.T @ moments) / (values.clamp(min=0) + decay)[:, None]) for decay in lam.double().exp()
    ]
    return torch.stack([w.T.reshape(-1) for w in solved]).to(lam.dtype)


def best_of_each_class(w: Tensor, rows: Rows) -> Tensor:
    """Which of M models is the best on some rows for each class, (10,): a class's error depends on its own weights alone."""
    errors = torch.stack([(outputs(some, rows.x) - rows.y.T).square().mean(dim=-1) for some in w])
    return errors.argmin(dim=0)


def joined(w: Tensor, which: Tensor) -> Tensor:
    """The weights (D,) that take each class from one of M models (M, D), by its number in ``which`` (10,)."""
    return w.view(-1, CLASSES, INPUTS)[which, torch.arange(CLASSES)].reshape(-1)


def moments_of(rows: Rows) -> tuple[Tensor, Tensor]:
    """XᵀX/B (785, 785) and XᵀY/B (785, 10) in float64."""
    x, y = rows.x.double(), rows.y.double()
    return x.T @ x / len(x), x.T @ y / len(x)


def from_scratch(
    train: Iterator[Rows],
    lam: Tensor,
    steps: int,
    *,
    seed: int,
    lr: float = 1e-4,
    decay: bool = False,
    loss: Loss = mse,
) -> Tensor:
    """Algorithm 1's inner loop for M values of λ (M, n) at once: Adam, the same initial weights and the same minibatches.

    Parameters
    ----------
    train : iterator of Rows
    lam : Tensor of shape (M, n)
    steps : int
    seed : int
        Of the initial weights.
    lr : float, default=1e-4
    decay : bool, default=False
        Whether the step size falls linearly to zero.
    loss : callable

    Returns
    -------
    Tensor of shape (M, D)
    """
    w = initial_weights(seed, lam.dtype).repeat(len(lam), 1).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0 if decay else 1.0, steps)
    for batch in itertools.islice(train, steps):
        (w.grad,) = torch.autograd.grad((loss(w, *batch) + l2(w, lam)).sum(), w)
        optimizer.step()
        schedule.step()
    return w.detach()


def initial_weights(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """0.01 · N(0, 1), as in the released code; shape (1, D)."""
    return 0.01 * torch.randn(1, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def curve(solver: str, lam: Tensor, w: Tensor, data: Data, **more: Any) -> Iterator[Row]:
    """A row for each λ (M, 1) and its weights (M, D): its losses, ``train`` being L_Train with its penalty."""
    with torch.no_grad():
        train = mse(w, *data.train) + l2(w, lam)
        valid, test = mse(w, *data.valid), mse(w, *data.test)
    for i in range(len(lam)):
        yield row(solver, lam=lam[i, 0], train=train[i], valid=valid[i], test=test[i], **more)


# --- for hypertune.algorithms ----------------------------------------------------------------------------------------------


def problem(
    train: Iterator[Rows],
    valid: Iterator[Rows],
    n: int,
    *,
    loss: Loss = mse,
    low: float,
    high: float,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """One fold (K = 1), n hyperparameters between ``low`` and ``high``."""
    return Problem(
        train_loss=lambda w, lam, batch: loss(w, *batch) + l2(w, lam),
        valid_loss=lambda w, batch: loss(w, *batch),
        train_batches=train,
        valid_batches=valid,
        low=torch.full((n,), low, dtype=dtype),
        high=torch.full((n,), high, dtype=dtype),
    )


def layout() -> Layout:
    """Weights by their class; every weight responds to every hyperparameter."""
    return Layout(units=torch.arange(CLASSES).repeat_interleave(INPUTS))
