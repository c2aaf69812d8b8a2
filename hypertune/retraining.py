"""Candidates retrained from scratch on every fold, all in one stacked pass.

Small models are bound by overhead: ten of them in one pass cost little more than one. This is Algorithm 1 for C settings and
K folds at once, from the initial weights, in the order of rows and by the optimizer that each fit of its own would have;
``fit`` of the estimators that scikit-learn clones then finds its weights here (:meth:`Retrained.fit_known`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.base import clone
from torch import Tensor, nn

from hypertune.batches import Batch, Minibatches, Rows
from hypertune.estimator import TorchEstimator, fingerprint
from hypertune.objective import Objective
from hypertune.randomness import draw_seed, isolated
from hypertune.response import Fold
from hypertune.space import Space
from hypertune.training import make_train_loss

_MOST_WEIGHTS = 2**27  # of all models together


@dataclass
class Retrained:
    """Weights of C settings on K folds.

    Parameters
    ----------
    space : Space
    prefix : str
    lam : Tensor of shape (C, n)
    weights : Tensor of shape (K, C, D)
    curves : Tensor of shape (epochs, K, C)
        Mean training loss of each epoch.
    objective : Objective
    keys : list of K str
        Fingerprints of the folds' training rows.
    """

    space: Space
    prefix: str
    lam: Tensor
    weights: Tensor
    curves: Tensor
    objective: Objective
    keys: list[str]

    def fit_known(self, net: TorchEstimator, rows: Rows) -> bool:
        """Fit the estimator by what is known, if its setting and its rows are; says whether it did."""
        if (key := fingerprint(*rows[:3])) not in self.keys:
            return False
        own = net.get_params()
        lam = self.space.encode({name: own[name.removeprefix(self.prefix)] for name in self.space.names})
        found = torch.isclose(self.lam, lam, rtol=1e-9, atol=1e-9).all(dim=1).nonzero()
        if not len(found):
            return False
        k, c = self.keys.index(key), int(found[0])
        curve = self.curves[:, k, c]
        if not curve.isfinite().all():
            return False  # it fails in its own fit, with its own message
        with isolated(0, net.device):
            module = net._build_module()
        net._adopt(self.objective.load_into(module, self.weights[k, c], k))
        net.loss_curve_ = curve.tolist()
        return True


def retrain(space: Space, prefix: str, folds: list[Fold], objective: Objective, lam: Tensor) -> Retrained | None:
    """Train C settings (C, n) on all folds; None where they cannot be stacked or someone wants to watch each fit."""
    net = folds[0].net
    K, C = len(folds), len(lam)
    if (
        not isinstance(net, TorchEstimator)
        or not objective.stacked
        or net.verbose
        or hasattr(net, "_skl_callbacks")
        or K * C * objective.D > _MOST_WEIGHTS
        or any(h.grain == "row" for h in space.hyperparameters)
    ):
        return None
    seed = draw_seed(clone(net).random_state)
    streams = [Minibatches([fold.train], net.batch_size, seed=seed) for fold in folds]
    if len({(stream.batch_size, stream.steps_per_epoch) for stream in streams}) > 1:
        return None
    per_epoch = streams[0].steps_per_epoch
    with isolated(seed, net.device):
        w0 = []
        for fold in folds:
            torch.manual_seed(seed)  # each fit begins with it
            w0.append(fold.net._make_objective(fold.net._build_module()).initial_weights())
        w = nn.Parameter(torch.stack(w0)[:, None].repeat(1, C, 1))
        train_loss = make_train_loss(space, prefix, objective, net, None)
        settings = lam.to(w)
        optimizer, schedule = net._make_optimizer([w], net.max_epochs * per_epoch)
        curves = torch.zeros(net.max_epochs, K, C, device=w.device, dtype=w.dtype)
        for number in range(net.max_epochs * per_epoch):
            batches = [next(stream) for stream in streams]
            batch = Batch(*(None if None in parts else torch.cat(parts) for parts in zip(*batches, strict=True)))  # type: ignore[arg-type]
            loss = train_loss(w, settings, batch)
            (w.grad,) = torch.autograd.grad(loss.sum(), w)
            optimizer.step()
            schedule.step()
            curves[number // per_epoch] += loss.detach() / per_epoch
    return Retrained(
        space, prefix, lam, w.detach(), curves.cpu(), objective, [fingerprint(*fold.train[:3]) for fold in folds]
    )
