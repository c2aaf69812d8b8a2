"""Candidates retrained from scratch on every fold, all in one stacked pass.

Small models are bound by overhead: ten of them in one pass cost little more than one. This is Algorithm 1 for C settings and
K folds at once, from the initial weights, in the order of rows and by the optimizer that each fit of its own would have;
``fit`` of the estimators that scikit-learn clones then finds its weights here (:meth:`Retrained.fit_known`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor, nn

from hypertune.arrays import fingerprint
from hypertune.base import TorchEstimator
from hypertune.batches import Batch, Minibatches, Rows
from hypertune.choices import same
from hypertune.folds import Fold
from hypertune.functions import state_of
from hypertune.losses import binary_cross_entropy, cross_entropy
from hypertune.memory import Memory
from hypertune.net import Net, plain_settings
from hypertune.objective import Objective
from hypertune.problem import make_values
from hypertune.randomness import draw_seed, isolated, rng_state, seed_torch, set_rng_state
from hypertune.space import Space
from hypertune.task import Task

_UNSEEN = 0.2  # rows
_MOST_WEIGHTS = 2**27  # of all models together
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
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
    lam : Tensor of shape (C, n)
    weights : ndarray of shape (K, C, D)
        Worker processes map one copy into their memory.
    curves : Tensor of shape (K, C, epochs)
        Mean training loss of each epoch.
    objective : Objective
        With running statistics and memories of all of them, if there are any.
    keys : list of K str
        Fingerprints of the folds' training rows; empty for padded folds, whose separate fits see other columns, and for nets that are not ours.
    settings : dict from str to value
        The net's other parameters, at which they were trained.
    n_outputs : int
        A fold that lacks a class is fitted alone, with fewer outputs.
    seed : int
        Of initial weights, minibatches and noise.
    chosen : mapping from str to value
        What the net's parameters with lists of values had, by their own names.
    """

    space: Space
    lam: Tensor
    weights: np.ndarray
    curves: Tensor
    objective: Objective
    keys: list[str]
    settings: dict[str, Any]
    n_outputs: int
    seed: int
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def validation_losses(self, folds: list[Fold]) -> Tensor:
        """Mean over folds of :meth:`fold_losses`, (C,)."""
        return self.fold_losses(folds).mean(dim=0)

    def cautious_losses(self, folds: list[Fold]) -> Tensor:
        """A log-loss (C,) as if a fifth of a row more had been seen, whose label is anyone's guess; any other loss as it is.

        A model that was right in every row so far may be wrong in the next, by far if it is that sure (Lidstone's law of succession).
        """
        if self.objective.loss not in (cross_entropy, binary_cross_entropy):
            return self.validation_losses(folds)
        seen = sum(len(fold.valid.x) for fold in folds)
        most = max(len(fold.train.x) + len(fold.valid.x) for fold in folds)  # where folds are repeated
        return self.fold_losses(folds, smoothing=_UNSEEN / min(seen, most)).mean(dim=0)

    def fold_losses(self, folds: list[Fold], smoothing: float = 0.0) -> Tensor:
        """L_Valid of each setting on all validation rows of each fold, (K, C), of smoothed labels if so; infinite where a model is not finite."""
        with isolated(self.seed, folds[0].net.device):  # a module may draw in eval mode, too
            losses = torch.stack(
                [
                    self.objective.full_valid_loss(
                        torch.from_numpy(w).to(fold.valid.x.device), fold.valid, k, smoothing
                    )
                    for k, (w, fold) in enumerate(zip(self.weights, folds, strict=True))
                ]
            )
        return losses.nan_to_num(nan=math.inf, posinf=math.inf).cpu()

    def fit_known(self, net: TorchEstimator, rows: Rows) -> bool:
        """Fit the estimator by what is known, if its setting and its rows are; says whether it did."""
        if (key := fingerprint(*rows[:3])) not in self.keys or net.n_outputs_ != self.n_outputs:
            return False
        if plain_settings(net, {h.own for h in self.space.hyperparameters}) != self.settings:
            return False
        params = net.get_params()
        if not all(same(params[name], value) for name, value in self.chosen.items()):
            return False
        lam = self.space.encode(self.space.from_net(params))
        found = torch.isclose(self.lam, lam, rtol=1e-9, atol=1e-9).all(dim=1).nonzero()
        if not len(found):
            return False
        k, c = self.keys.index(key), int(found[0])
        curve = self.curves[k, c]
        if not curve.isfinite().all():
            return False  # it fails in its own fit, with its own message
        with isolated(self.seed, net.device):  # what a module draws for itself belongs to its weights
            module = net._build_module()
        net._adopt(
            self.objective.load_into(module, torch.tensor(self.weights[k, c], device="cpu"), k * len(self.lam) + c)
        )
        net.loss_curve_ = curve.tolist()
        return True


def retrain(
    task: Task,
    lam: Tensor,
    *,
    epochs: int | None = None,
    seed: int | None = None,
    unstacked: bool = False,
) -> Retrained | None:
    """Train C settings (C, n) on all folds, for ``epochs`` and from the ``seed`` or as the net would; None where they cannot be stacked.

    With ``unstacked`` such models are trained too, as an objective runs them: one after the other, and all in memory.
    """
    space, folds, objective, *_ = task
    net, K, C = folds[0].net, len(folds), len(lam)
    if (
        not (objective.stacked or unstacked)
        or K * C * objective.D > _MOST_WEIGHTS
        or any(h.grain == "row" for h in space.hyperparameters)
        or not _feel_the_same_noise(folds)
    ):
        return None
    ours = isinstance(net, TorchEstimator)
    if seed is None:
        seed = draw_seed(clone(net).random_state) if ours else task.seed
    epochs = net.max_epochs if epochs is None else epochs
    # Folds of other sizes have other minibatches and schedules: those that are alike are trained together.
    alike: dict[tuple[int, int], list[int]] = {}
    for k, fold in enumerate(folds):
        stream = Minibatches([fold.train], net.batch_size, seed=seed)
        alike.setdefault((stream.batch_size, stream.steps_per_epoch), []).append(k)
    parts = []
    for group in alike.values():
        trained = _train(task._replace(folds=[folds[k] for k in group]), lam, epochs, seed)
        if trained is None:
            return None
        parts.append(trained)
    order = torch.tensor([k for group in alike.values() for k in group], device="cpu").argsort()

    def of_folds(pieces: list[Tensor]) -> Tensor:
        """Of the groups one after the other, (some folds, C, ...), → (K, C, ...)."""
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)[order.to(pieces[0].device)]

    weights = of_folds([part.weights for part in parts])
    curves = of_folds([part.curves for part in parts])
    kept = {k: of_folds([part.statistics[k] for part in parts]).flatten(0, 1) for k in parts[0].statistics}
    memories = [part.memories[i : i + C] for part in parts for i in range(0, len(part.memories), C)]
    objective = objective.with_statistics_of(
        K, C, kept, [one for k in order for one in memories[k]] if memories else None
    )
    keys = [fingerprint(*fold.train[:3]) for fold in folds] if ours and not folds[0].padded else []
    settings = plain_settings(net, {h.own for h in space.hyperparameters})
    outputs = getattr(net, "n_outputs_", 1)
    return Retrained(space, lam, weights.cpu().numpy(), curves.cpu(), objective, keys, settings, outputs, seed)


class _Trained(NamedTuple):
    """Weights (K, C, D), curves (K, C, epochs), running statistics (K, C, ...) and memories, of K × C models."""

    weights: Tensor
    curves: Tensor
    statistics: dict[str, Tensor]
    memories: list[Memory]


def _train(task: Task, lam: Tensor, epochs: int, seed: int) -> _Trained | None:
    """On folds with as many minibatches.

    None if the optimizer couples weights and there are several models, and where some separate fit would not begin as the stack does: with frozen weights
    drawn at random, with a module or a penalty that draws random numbers for every model, ...
    """
    space, folds, objective, *_ = task
    net, K, C = folds[0].net, len(folds), len(lam)
    objective = objective.with_statistics_of(K, C)
    stream = Minibatches([fold.train for fold in folds], net.batch_size, seed=seed)
    per_epoch, batch = stream.steps_per_epoch, next(stream)
    settings = [space.to_net(space.decode(one)) for one in lam]
    with isolated(seed, net.device):
        # Every setting on the first fold, and the first setting on every other.
        some = [(0, c) for c in range(C)] + [(k, 0) for k in range(1, K)]
        own = [_first_step(folds[k], settings[c], batch.of(k), seed) for k, c in some]
        if any(one.counts for one in own):
            return None
        w, alone = nn.Parameter(torch.stack([one.w for one in own[:C]]).repeat(K, 1, 1)), [one.sketch for one in own]
        if any(not torch.equal(one.noise[0], own[0].noise[0]) for one in own):
            return None
        set_rng_state(own[0].noise, w.device)
        del own  # as many models
        values = make_values(space.without_rate, objective, net)(lam[:, ~space.rate].to(w), K)
        optimizers = _Optimizers(net, w, [setting.get(net.rate_name) for setting in settings], epochs * per_epoch)
        if optimizers.hooked or (optimizers.coupled and K * C > 1):
            return None
        curves = torch.zeros(K, C, epochs, device=w.device, dtype=w.dtype)
        for number in range(epochs * per_epoch):
            loss = objective.train_loss(w.flatten(0, 1), values, batch.repeat(C)).view(K, C)
            (w.grad,) = torch.autograd.grad(loss.sum(), w)
            if number == 0:
                begun = torch.stack([_sketch(loss[k, c], w.grad[k, c]) for k, c in some])
                if not _agree(begun, torch.stack(alone), _ROUNDING[w.dtype]):
                    return None
            optimizers.step()
            curves[..., number // per_epoch] += loss.detach() / per_epoch
            batch = next(stream)
    kept = objective.statistics if objective.has_statistics else {}
    return _Trained(
        w.detach(), curves, {k: b.unflatten(0, (K, C)) for k, b in kept.items()}, objective.final_memories()
    )


class _Optimizers:
    """What moves the weights w (K, C, D) of a stack: the net's optimizer, one for each learning rate among its settings.

    Parameters
    ----------
    net : Net
    w : nn.Parameter
    rates : list of C float or None
        None is the net's own.
    steps : int
    """

    def __init__(self, net: Net, w: nn.Parameter, rates: list[float | None], steps: int):
        self._w, self._parts = w, []
        self.hooked = self.coupled = False
        for rate in dict.fromkeys(rates):
            which = [c for c, other in enumerate(rates) if other == rate]
            own = net if rate is None else copy.copy(net).set_params(**{net.rate_name: rate})
            part = w if len(which) == len(rates) else nn.Parameter(w.data[:, which])
            optimizer, schedule = own._make_optimizer([part], steps)
            one, _ = own._make_optimizer([nn.Parameter(part.data[0, :1])], steps)
            self.hooked |= bool(part._backward_hooks)
            self.coupled |= not _moves_each_by_itself(optimizer) or _settings_of(optimizer) != _settings_of(one)
            self._parts.append((part, which, optimizer, schedule))

    def step(self) -> None:
        """By the gradient that w has."""
        w = self._w
        assert w.grad is not None
        for part, which, optimizer, schedule in self._parts:
            if part is not w:
                part.grad = w.grad[:, which]
            optimizer.step()
            schedule.step()
            if part is not w:
                w.data[:, which] = part.data


def _moves_each_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step moves each number by itself, without looking at the others: no hook and no step of the instance's own may do so."""
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    step = vars(optimizer).get("step")  # if a scheduler has put it there, around what was there before
    own = step is not None and getattr(step, "__wrapped__", step) is not type(optimizer).step
    return type(optimizer) in _ELEMENTWISE and not any(hooks) and not own


def _settings_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """The settings of each group of parameters, which a user's function may make depend on the number of weights."""
    return [repr({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def _feel_the_same_noise(folds: list[Fold]) -> bool:
    """Whether the same columns hold codes in the training rows of all folds."""
    noisy = [getattr(fold.net, "_noisy", None) for fold in folds]
    return all(
        one is noisy[0] or (one is not None and noisy[0] is not None and torch.equal(one, noisy[0])) for one in noisy
    )


class _FirstStep(NamedTuple):
    """Of a separate fit.

    Initial weights (D,), torch's random state after them, the sketch of the first step, and whether functions of the user's count their
    calls, or change otherwise: in a stack there are more calls, of all settings.
    """

    w: Tensor
    noise: tuple[Tensor, Tensor | None]
    sketch: Tensor
    counts: bool


def _first_step(fold: Fold, setting: dict[str, Any], batch: Batch, seed: int) -> _FirstStep:
    """What a setting's own fit on the fold begins with: a stack that begins otherwise is not of such fits."""
    net = copy.copy(fold.net).set_params(**setting)
    seed_torch(seed, net.device)
    module = net._build_module()
    noise = rng_state(batch.x.device)
    objective = net._make_objective(module)
    net._check_outputs(objective, batch.x[0, :2])
    w = objective.initial_weights()[None].requires_grad_()
    users = objective.loss, objective.augment, objective.penalty
    before = state_of(users)
    loss = objective.train_loss(w, {}, batch)
    (gradient,) = torch.autograd.grad(loss.sum(), w)
    counts = (after := state_of(users)) != before
    if counts:  # or has put something by, in its first call alone, that is the same for other weights
        objective.train_loss(1.1 * w + 0.1, {}, batch)
        counts = state_of(users) != after
    return _FirstStep(w.detach()[0], noise, _sketch(loss[0], gradient[0]), counts)


def _sketch(loss: Tensor, gradient: Tensor) -> Tensor:
    """A loss () and its gradient (D,) in three numbers: the loss, the gradient's length, and a component of it."""
    signs = (
        torch.randint(0, 2, gradient.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(gradient)
        * 2
        - 1
    )
    return torch.stack([loss.detach(), torch.linalg.vector_norm(gradient), gradient @ signs])


def _agree(one: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether sketches (..., 3) are the same up to rounding; what is infinite says nothing."""
    scale = torch.stack([other[..., 0].abs(), other[..., 1], other[..., 1]], dim=-1)
    close = (one - other).abs() <= rounding * (scale + 1e-3)
    return bool((close | ~(one.isfinite() | other.isfinite())).all())
