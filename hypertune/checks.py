"""Is the hypergradient right? Any algorithm's, on the user's own problem, against an oracle.

>>> from scipy.stats import loguniform
>>> from sklearn.datasets import load_wine
>>> from sklearn.preprocessing import scale
>>> from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, per_feature
>>> X, y = load_wine(return_X_y=True)
>>> net = TorchClassifier(MLP(hidden=()), weight_decay=0.1, batch_size=200, lr=0.02, max_epochs=600, random_state=0)
>>> search = HyperTrainingSearchCV(net, {"weight_decay": per_feature(loguniform(1e-4, 1e1))}, algorithm="implicit", cv=2, random_state=0)
>>> check = check_hypergradient(search, scale(X), y)
>>> check.cosine > 0.99
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sklearn.base import clone
from torch import Tensor

from hypertune.base import TorchEstimator
from hypertune.batches import Minibatches
from hypertune.folds import Fold, last_step, prefix_of
from hypertune.implicit import conjugate_gradients
from hypertune.problem import make_train_loss
from hypertune.randomness import isolated
from hypertune.retraining import retrain
from hypertune.search import HyperTrainingSearchCV
from hypertune.stacked import flat_weights
from hypertune.starts import out_of_corners
from hypertune.task import Task

_MOST_DIRECTIONS = 20
_NEWTON_STEPS = 50


@dataclass(frozen=True)
class HypergradientCheck:
    """A hypergradient and the one that it should be.

    Parameters
    ----------
    hypergradient, reference : Tensor of shape (n,), or (directions,)
        Slopes of the validation loss, mean over folds, in λ (per unit: a factor of e for log distributions, a quarter of the
        range for bounded ones); or along random directions, where n is too large for a reference of each.
    """

    hypergradient: Tensor
    reference: Tensor

    @property
    def cosine(self) -> float:
        """Of the angle between the two; 1 is right."""
        return float(torch.cosine_similarity(self.hypergradient, self.reference, dim=0))

    @property
    def ratio(self) -> float:
        """Length of the hypergradient over that of the reference; 1 is right."""
        return float(self.hypergradient.norm() / self.reference.norm())

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}, length {self.ratio:.3f} × the reference's"


def check_hypergradient(
    search: HyperTrainingSearchCV,
    X: Any,
    y: Any,
    *,
    reference: Literal["exact", "retrain"] = "exact",
    step: float = 0.25,
) -> HypergradientCheck:
    """Compare a search's hypergradient at the estimator's own setting with a reference.

    The search is run with λ̂ held still (on a clone, in float64), and its hypergradient averaged over the last part of the
    run, as set by its ``averaging``.

    Parameters
    ----------
    search : HyperTrainingSearchCV
        Not fitted, and not changed.
    X, y : array-like
        As for ``fit``.
    reference : {"exact", "retrain"}
        "exact" is the implicit function theorem at the optimum of the training loss, found by Newton's method on all rows: for
        strongly convex losses without noise (linear models with a weight decay). "retrain" is central differences of models that
        are retrained as the estimator is, for each hyperparameter, or along 20 random directions if there are more.
    step : float, default=0.25
        Of the differences, in units of λ.

    Returns
    -------
    HypergradientCheck
        Both hypergradients, the cosine between them and the ratio of their lengths.

    Raises
    ------
    ValueError
        If the training loss is not convex enough for "exact", or cannot be stacked for "retrain"; and for a skorch net.
    """
    if reference not in ("exact", "retrain"):
        raise ValueError(f'reference={reference!r}: choose "exact" or "retrain".')
    probe = _Probe(**clone(search).get_params(deep=False))
    if not isinstance(net := last_step(probe.estimator), TorchEstimator):
        raise ValueError(f"check_hypergradient needs a TorchClassifier or TorchRegressor, got {net!r}.")
    probe.set_params(
        **{f"estimator__{prefix_of(probe.estimator)}dtype": "float64"},
        evaluate="hypernetwork", refit=False, hyper_lr=1e-12, grain_scale=None, error_score="raise",
    )  # fmt: skip
    probe.oracle = _exact if reference == "exact" else lambda task, own: _retrained(task, own, step)
    probe.fit(X, y)
    return probe.check


class _Probe(HyperTrainingSearchCV):
    """A search that hyper-trains with λ̂ held still, and asks an oracle."""

    oracle: Callable[[Task, Tensor], HypergradientCheck]
    check: HypergradientCheck

    def _propose_candidates(self) -> list[dict[str, Any]]:
        task = self._make_task()
        begin = out_of_corners(task.space, task.current)
        response, _ = self._tuner(begin)(task, grain_scale=None)
        assert response.hypergradient is not None
        at = task.space.encode(response.params)  # where λ̂ was held
        self.check = self.oracle(task._replace(current=at), response.hypergradient.double())
        self._known.append(response)
        return [response.params]


def _exact(task: Task, own: Tensor) -> HypergradientCheck:
    """−∇_w L_Valid H⁻¹ ∂²L_Train/∂w∂λ at the optimum of each fold."""
    slopes = [_exact_of_fold(task, k, fold) for k, fold in enumerate(task.folds)]
    return HypergradientCheck(own, torch.stack(slopes).mean(dim=0))


def _exact_of_fold(task: Task, k: int, fold: Fold) -> Tensor:
    everything = Minibatches([fold.train], len(fold.train.x), seed=0)
    batch = next(everything)
    train_loss = make_train_loss(task.space, task.objective, fold.net, everything)
    with isolated(task.seed, fold.net.device):
        w = flat_weights(fold.net._build_module())[None]
    lam = task.current.to(w)[None].requires_grad_()

    def gradient(w: Tensor) -> Tensor:
        loss = train_loss(w[:, None], lam, batch).sum()
        return torch.autograd.grad(loss, w, create_graph=True)[0]

    def solve(g: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def H(v: Tensor) -> Tensor:
            return torch.autograd.grad(g, w, v, retain_graph=True)[0]

        return conjugate_gradients(H, b, torch.zeros_like(b), torch.ones_like(b), 20 * b.shape[1], 1e-10)

    for _ in range(_NEWTON_STEPS):
        w = w.detach().requires_grad_()
        g = gradient(w)
        size = float(g.detach().norm())
        if size < 1e-9:
            break
        w = w - solve(g, w, g.detach())
    else:
        raise ValueError(
            f"No optimum of the training loss was found: after {_NEWTON_STEPS} Newton steps its gradient is {size:.2g}. "
            'reference="exact" is for strongly convex losses without noise; use reference="retrain".'
        )
    valid = task.objective.valid_loss(w, next(Minibatches([fold.valid], len(fold.valid.x), seed=0)), fold=k).sum()
    (b,) = torch.autograd.grad(valid, w)
    (mixed,) = torch.autograd.grad(g, lam, solve(g, w, b))
    return -mixed[0].detach().cpu().double()


def _retrained(task: Task, own: Tensor, step: float) -> HypergradientCheck:
    """Central differences of retrained models, along each coordinate or some random directions."""
    n, (space, folds, *_) = task.space.n, task
    if n <= _MOST_DIRECTIONS:
        directions = torch.eye(n, dtype=torch.float64, device="cpu")
    else:
        generator = torch.Generator("cpu").manual_seed(0)
        directions = torch.randn(
            _MOST_DIRECTIONS, n, generator=generator, dtype=torch.float64, device="cpu"
        ) / math.sqrt(n)
    ends = space.clip(torch.stack([task.current + sign * step * d for d in directions for sign in (1, -1)]))
    retrained = retrain(task, ends)
    if retrained is None:
        raise ValueError(
            'reference="retrain" needs a TorchClassifier or TorchRegressor whose module can be stacked, and no weights of rows.'
        )
    losses = retrained.validation_losses(folds).double().view(-1, 2)
    lengths = (ends[0::2] - ends[1::2]).norm(dim=1) / directions.norm(dim=1)  # shorter at a bound
    return HypergradientCheck(directions @ own, (losses[:, 0] - losses[:, 1]) / lengths)
