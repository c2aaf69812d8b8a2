"""Candidates retrained from scratch on every fold, all in one stacked pass.

Small models are bound by overhead: ten of them in one pass cost little more than one. This is Algorithm 1 for C settings and
K folds at once, from the initial weights, in the order of rows and by the optimizer that each fit of its own would have;
``fit`` of the estimators that scikit-learn clones then finds its weights here (:meth:`Retrained.fit_known`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor, nn

from hypertune.batches import Minibatches, Rows
from hypertune.net import TorchEstimator, fingerprint
from hypertune.objective import Objective
from hypertune.randomness import draw_seed, isolated, seed_torch
from hypertune.response import Fold, full_losses
from hypertune.space import Space
from hypertune.stacked import flat_weights
from hypertune.training import make_values

_MOST_WEIGHTS = 2**27  # of all models together
# Optimizers that move each number by itself, so that many models are trained by one of them as each would be by its own.
_ELEMENTWISE = tuple(
    getattr(torch.optim, name) for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam")
)


@dataclass
class Retrained:
    """Weights of C settings on K folds.

    Parameters
    ----------
    space : Space
    prefix : str
    lam : Tensor of shape (C, n)
    weights : ndarray of shape (K, C, D)
        Worker processes map one copy into their memory.
    curves : Tensor of shape (K, C, epochs)
        Mean training loss of each epoch.
    objective : Objective
        With running statistics of all of them, if there are any.
    keys : list of K str
        Fingerprints of the folds' training rows.
    n_outputs : int
        A fold that lacks a class is fitted alone, with fewer outputs.
    seed : int
        Of initial weights, minibatches and noise.
    """

    space: Space
    prefix: str
    lam: Tensor
    weights: np.ndarray
    curves: Tensor
    objective: Objective
    keys: list[str]
    n_outputs: int
    seed: int

    def validation_losses(self, folds: list[Fold]) -> Tensor:
        """Mean over folds of L_Valid of each setting on all validation rows, (C,); infinite where a model is not finite."""
        losses = torch.stack(
            [
                full_losses(self.objective, torch.from_numpy(w).to(fold.valid.x), fold.valid, k)
                for k, (w, fold) in enumerate(zip(self.weights, folds, strict=True))
            ]
        )
        return losses.mean(dim=0).nan_to_num(nan=math.inf, posinf=math.inf).cpu()

    def fit_known(self, net: TorchEstimator, rows: Rows) -> bool:
        """Fit the estimator by what is known, if its setting and its rows are; says whether it did."""
        if (key := fingerprint(*rows[:3])) not in self.keys or net.n_outputs_ != self.n_outputs:
            return False
        own = net.get_params()
        lam = self.space.encode({name: own[name.removeprefix(self.prefix)] for name in self.space.names})
        found = torch.isclose(self.lam, lam, rtol=1e-9, atol=1e-9).all(dim=1).nonzero()
        if not len(found):
            return False
        k, c = self.keys.index(key), int(found[0])
        curve = self.curves[k, c]
        if not curve.isfinite().all():
            return False  # it fails in its own fit, with its own message
        with isolated(0, net.device):
            module = net._build_module()
        net._adopt(self.objective.load_into(module, torch.tensor(self.weights[k, c]), k * len(self.lam) + c))
        net.loss_curve_ = curve.tolist()
        return True


def retrain(
    space: Space,
    prefix: str,
    folds: list[Fold],
    objective: Objective,
    lam: Tensor,
    *,
    epochs: int | None = None,
    seed: int | None = None,
) -> Retrained | None:
    """Train C settings (C, n) on all folds, for ``epochs`` and from the ``seed`` or as the net would; None where they cannot be stacked."""
    net = folds[0].net
    K, C = len(folds), len(lam)
    if (
        not isinstance(net, TorchEstimator)
        or not objective.stacked
        or K * C * objective.D > _MOST_WEIGHTS
        or any(h.grain == "row" for h in space.hyperparameters)
    ):
        return None
    seed = draw_seed(clone(net).random_state) if seed is None else seed
    epochs = net.max_epochs if epochs is None else epochs
    # Folds of other sizes have other minibatches and schedules: those that are alike are trained together.
    alike: dict[tuple[int, int], list[int]] = {}
    for k, fold in enumerate(folds):
        stream = Minibatches([fold.train], net.batch_size, seed=seed)
        alike.setdefault((stream.batch_size, stream.steps_per_epoch), []).append(k)
    parts = []
    for group in alike.values():
        trained = _train(space, prefix, [folds[k] for k in group], objective, lam, epochs, seed)
        if trained is None:
            return None
        parts.append(trained)
    order = torch.tensor([k for group in alike.values() for k in group]).argsort()

    def of_folds(pieces: list[Tensor]) -> Tensor:
        """Of the groups one after the other, (some folds, C, ...), → (K, C, ...)."""
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)[order.to(pieces[0].device)]

    weights, curves = of_folds([part[0] for part in parts]), of_folds([part[1] for part in parts])
    kept = {k: of_folds([part[2][k] for part in parts]).flatten(0, 1) for k in parts[0][2]}
    objective = objective.with_statistics_of(K, C, kept)
    keys = [fingerprint(*fold.train[:3]) for fold in folds]
    return Retrained(space, prefix, lam, weights.cpu().numpy(), curves.cpu(), objective, keys, net.n_outputs_, seed)


def _train(
    space: Space, prefix: str, folds: list[Fold], objective: Objective, lam: Tensor, epochs: int, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
    """Weights (K, C, D), curves (K, C, epochs) and running statistics (K, C, ...) on folds with as many minibatches.

    None under an optimizer that sees all weights, and where a fit would have frozen weights or buffers of its own, drawn at random.
    """
    net, K, C = folds[0].net, len(folds), len(lam)
    objective = objective.with_statistics_of(K, C)
    stream = Minibatches([fold.train for fold in folds], net.batch_size, seed=seed)
    per_epoch = stream.steps_per_epoch
    with isolated(seed, net.device):
        w0 = []
        for fold in folds:
            seed_torch(seed, net.device)  # each fit begins with it
            module = fold.net._build_module()
            if not objective.has_constants_of(module):
                return None
            w0.append(flat_weights(module))
        w = nn.Parameter(torch.stack(w0)[:, None].repeat(1, C, 1))
        values = make_values(space, prefix, objective, net)(lam.to(w), K)
        optimizer, schedule = net._make_optimizer([w], epochs * per_epoch)
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if type(optimizer) not in _ELEMENTWISE or hooks:
            return None
        curves = torch.zeros(K, C, epochs, device=w.device, dtype=w.dtype)
        for number in range(epochs * per_epoch):
            loss = objective.train_loss(w.flatten(0, 1), values, next(stream).repeat(C)).view(K, C)
            (w.grad,) = torch.autograd.grad(loss.sum(), w)
            optimizer.step()
            schedule.step()
            curves[..., number // per_epoch] += loss.detach() / per_epoch
    kept = objective.statistics if objective.has_statistics else {}
    return w.detach(), curves, {k: b.unflatten(0, (K, C)) for k, b in kept.items()}
