"""Hyper-training of a torch estimator on K folds, and the best response that it leaves behind.

This room puts the parts together: rows and minibatches, the stacked objective, a hypernetwork, one of the algorithms,
and their optimizers. It owns the loop, the clock and the trace; the mathematics is in :mod:`hypertune.algorithms`.

    response, history = hyper_train(net, space, folds, algorithm="joint", ...)
    response.estimator_at({"weight_decay": 1e-3})          # a fitted estimator at any λ, without training
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.pipeline import Pipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from hypertune.algorithms import (
    PlainOptimizer,
    Problem,
    ResponseOptimizer,
    Step,
    TangentOptimizer,
    descend_response,
    fit_response,
    joint,
    simplified,
)
from hypertune.batches import Batch, Minibatches, Rows
from hypertune.estimator import TorchEstimator
from hypertune.hypernetworks import Builder, Hypernetwork
from hypertune.modules import Reach, find_reach
from hypertune.objective import LOSS_HYPERPARAMETERS, Objective
from hypertune.randomness import isolated
from hypertune.space import Space

_VALID_BATCH = 256
_SCREENED = 512  # settings that "global" ranks before its descent
_GLOBAL_FIT = 0.75  # share of the steps of "global" that fit the response; the rest descends it
_SIMPLIFIED_OFFSET = 2.0  # units of λ between λ̂'s start and the centre in "simplified"


@dataclass(frozen=True)
class Fold:
    """One split, ready for training.

    Parameters
    ----------
    net : TorchEstimator
        Has seen the training rows (classes, widths, target scale) but is not trained.
    preprocess : fitted Pipeline or None
        The steps before the net, fitted on this fold's training rows.
    train, valid : Rows
        Preprocessed rows as tensors.
    """

    net: TorchEstimator
    preprocess: Pipeline | None
    train: Rows
    valid: Rows


@dataclass
class BestResponse:
    """The learned best response w_φ(λ) of every fold: weights at any λ, at the price of a forward pass.

    Parameters
    ----------
    space : Space
        The hyperparameters, under the names that the search was given.
    prefix : str
        What precedes the net's own parameter names: ``"net__"`` in a Pipeline, else empty.
    params : dict from str to float
        The tuned setting λ̂.
    hypernetwork : Hypernetwork
    objective : Objective
    folds : list of K Fold

    Notes
    -----
    A response learned by ``algorithm="joint"`` is accurate near λ̂, where its hyperparameters were sampled. For curves
    over a wide range use ``algorithm="global"``.
    """

    space: Space
    prefix: str
    params: dict[str, float]
    hypernetwork: Hypernetwork
    objective: Objective
    folds: list[Fold]
    _keys: dict[str, int] = field(default_factory=dict, repr=False)

    def weights(self, params: Mapping[str, float] | None = None, *, fold: int = 0) -> dict[str, Tensor]:
        """Weights at a setting, by parameter name of the module.

        Parameters
        ----------
        params : mapping from str to float, optional
            A setting; hyperparameters left out stay at λ̂.
        fold : int, default=0
            Which fold's training data shaped the weights.
        """
        return self.objective.named(self._weights(self._lam([params or {}]))[fold, 0])

    def estimator_at(self, params: Mapping[str, float] | None = None, *, fold: int = 0) -> Any:
        """A fitted estimator at a setting, without training: the net, or the Pipeline around it.

        Parameters
        ----------
        params : mapping from str to float, optional
            A setting; hyperparameters left out stay at λ̂.
        fold : int, default=0
            Which fold's training rows it stands for.
        """
        setting = self._complete(params or {})
        net = copy.deepcopy(self.folds[fold].net).set_params(**self._own(setting))
        net._adopt(self._module(net, self._lam([setting]), fold))
        preprocess = self.folds[fold].preprocess
        if preprocess is None:
            return net
        return Pipeline([*copy.deepcopy(preprocess).steps, (self.prefix.removesuffix("__"), net)])

    def validation_loss(self, params: Mapping[str, float] | None = None) -> float:
        """Validation loss at a setting, mean over rows and then over folds; no penalties, no noise."""
        return float(self._validation_losses(self._lam([params or {}])).mean())

    def validation_curve(self, name: str, values: Sequence[float]) -> np.ndarray:
        """Validation loss along one hyperparameter, the others at λ̂.

        Returns
        -------
        ndarray of shape (len(values), K)
            One column per fold, as scikit-learn's ``validation_curve`` has them.
        """
        return self._validation_losses(self._lam([{name: value} for value in values])).T.double().numpy()

    # --- what the search needs ---------------------------------------------------------------------------------------

    def module_for(self, net: TorchEstimator, rows: Rows) -> nn.Module | None:
        """The module at ``net``'s setting if ``rows`` are the training rows of a fold, else None."""
        if not self._keys:
            self._keys.update({_key(fold.train): k for k, fold in enumerate(self.folds)})
        fold = self._keys.get(_key(rows))
        if fold is None:
            return None
        own = net.get_params()
        setting = {name: own[name.removeprefix(self.prefix)] for name in self.space.names}
        return self._module(net, self._lam([setting]), fold)

    def _module(self, net: TorchEstimator, lam: Tensor, fold: int) -> nn.Module:
        with isolated(0, net.device):
            module = net._build_module()
        return self.objective.load_into(module, self._weights(lam)[fold, 0], fold)

    def _weights(self, lam: Tensor) -> Tensor:
        with torch.no_grad():
            return self.hypernetwork(lam.to(self.hypernetwork.w0))

    def _validation_losses(self, lam: Tensor) -> Tensor:
        """λ (m, n) → (K, m), on all validation rows of each fold."""
        losses = []
        for one in lam.to(self.hypernetwork.w0):  # one λ at a time: K copies of the model in memory, not K × m
            w = self._weights(one[None])
            losses.append(torch.stack([_full_loss(self.objective, w[k], f.valid, k) for k, f in enumerate(self.folds)]))
        return torch.stack(losses, dim=1).cpu()

    def _complete(self, params: Mapping[str, float]) -> dict[str, float]:
        if unknown := sorted(set(params) - set(self.space.names)):
            raise ValueError(f"{unknown[0]!r} was not tuned; this best response knows {list(self.space.names)}.")
        for h in self.space.hyperparameters:
            low, high = h.support
            if h.name in params and not low <= params[h.name] <= high:
                raise ValueError(f"{h.name}={params[h.name]!r} is outside its declared range [{low:g}, {high:g}].")
        return {**self.params, **params}

    def _lam(self, settings: Sequence[Mapping[str, float]]) -> Tensor:
        return torch.stack([self.space.encode(self._complete(setting)) for setting in settings])

    def _own(self, setting: Mapping[str, float]) -> dict[str, float]:
        return {name.removeprefix(self.prefix): value for name, value in setting.items()}


def _key(rows: Rows) -> str:
    return joblib.hash([None if t is None else t.cpu().numpy() for t in rows])


def _full_loss(objective: Objective, w: Tensor, rows: Rows, fold: int) -> Tensor:
    """L_Valid of one fold's weights w (1, D) on all its rows, in pieces; shape ()."""
    x, y, weight = rows
    total, mass = torch.zeros((), dtype=w.dtype, device=w.device), 0.0
    with torch.no_grad():
        for i in range(0, len(x), 4096):
            piece = slice(i, i + 4096)
            s = None if weight is None else weight[None, piece]
            size = float(len(x[piece]) if s is None else s.sum())
            share = None if s is None else s / s.mean()
            total += size * objective.valid_loss(w, Batch(x[None, piece], y[None, piece], share), fold=fold)[0]
            mass += size
    return total / mass


# --- what can be tuned --------------------------------------------------------------------------------------------------


def check_names(space: Space, prefix: str) -> None:
    """Refuse hyperparameters that do not shape the training loss, by name, before anything is computed.

    Raises
    ------
    ValueError
        Naming the hyperparameter, what is possible and what to do instead.
    """
    for h in space.hyperparameters:
        where, own = f"param_distributions[{h.name!r}]", h.name.removeprefix(prefix)
        if own.startswith("module__"):
            continue
        if own not in LOSS_HYPERPARAMETERS:
            raise ValueError(
                f"{where}: {own!r} does not change the loss that training minimises, so there is no gradient to follow "
                "(Lorraine & Duvenaud 2018, section 2.2). Set it on the estimator, or give it to an outer search "
                f"(OptunaSearchCV, GridSearchCV). By gradient: {sorted(LOSS_HYPERPARAMETERS)} and the dropout rates "
                "among module__…."
            )
        low, high = LOSS_HYPERPARAMETERS[own]
        if not (low <= h.support[0] and h.support[1] <= high):
            raise ValueError(f"{where}: the range [{h.support[0]:g}, {h.support[1]:g}] must lie in [{low:g}, {high:g}].")


def find_reaches(net: TorchEstimator, space: Space, prefix: str) -> dict[str, list[Reach]]:
    """For every tuned factory keyword, the numbers in the module that it sets.

    Raises
    ------
    ValueError
        If a keyword reaches nothing, changes the architecture, or takes a dropout rate out of [0, 1).
    """
    reaches: dict[str, list[Reach]] = {}
    for h in space.hyperparameters:
        own = h.name.removeprefix(prefix)
        if not own.startswith("module__"):
            continue
        where = f"param_distributions[{h.name!r}]"

        def build(value: float, own: str = own) -> nn.Module:
            with isolated(0, net.device):
                return copy.deepcopy(net).set_params(**{own: value})._build_module()

        low, high = (float(q) for q in h.prior.ppf([0.01, 0.99]))
        try:
            reaches[own] = find_reach(build, low, high)
        except ValueError as error:
            raise ValueError(
                f"{where}: {error}. Set it on the estimator, or give it to an outer search (OptunaSearchCV, GridSearchCV)."
            ) from error
        module = build(low)
        for path, name, a, b in reaches[own]:
            rates = sorted(a + b * bound for bound in h.support)
            if isinstance(module.get_submodule(path), nn.modules.dropout._DropoutNd) and not (
                rates[0] >= 0 and rates[1] < 1
            ):
                raise ValueError(
                    f"{where}: the range takes {path}.{name} from {rates[0]:g} to {rates[1]:g}; a dropout rate must lie in [0, 1)."
                )
        taken = {(r.path, r.name) for key, found in reaches.items() if key != own for r in found}
        if both := [f"{r.path}.{r.name}" for r in reaches[own] if (r.path, r.name) in taken]:
            raise ValueError(f"{where}: {both[0]} is set by another tuned keyword too; tune one of them.")
    return reaches


# --- hyper-training -----------------------------------------------------------------------------------------------------


def hyper_train(
    space: Space,
    prefix: str,
    folds: list[Fold],
    start: Mapping[str, float],
    *,
    algorithm: str,
    hypernetwork: Builder,
    response_optimizer: str,
    max_epochs: int,
    scale: float | None,
    n_samples: int | None,
    hyper_lr: float,
    hyper_lr_schedule: str,
    hyper_eps: float,
    warmup: float,
    averaging: float,
    seed: int,
    progress: bool,
) -> tuple[BestResponse, dict[str, np.ndarray]]:
    """Run one of the three algorithms; the parameters are those of ``HyperTrainingSearchCV``.

    Returns
    -------
    response : BestResponse
        ``response.params`` is the tuned setting.
    history : dict from str to ndarray
        One entry per record: step, seconds, epoch, train_loss, validation_loss and each hyperparameter.

    Raises
    ------
    ValueError
        If a hyperparameter reaches nothing, or the loss is no longer finite (naming step and λ̂).
    """
    begin = time.perf_counter()
    net = folds[0].net
    K = len(folds)
    reaches = find_reaches(net, space, prefix)
    with isolated(seed, net.device):
        modules = [fold.net._build_module() for fold in folds]
        objective = net._make_objective(modules[0], reach=reaches, folds=K)
        net._check_outputs(objective, folds[0].valid.x[:2])
        own_start = {name.removeprefix(prefix): start[name] for name in space.names}
        objective.try_stacking(folds[0].valid.x[:2], {k: v for k, v in own_start.items() if k in reaches})
        w0 = torch.stack([net._make_objective(module).initial_weights() for module in modules])

        lam_hat = space.encode(start).to(w0)
        problem = _problem(space, prefix, objective, folds, net, seed, w0)
        center = lam_hat if algorithm == "joint" else lam_hat.clone()
        if algorithm == "simplified":  # with V = 0 at a distance from λ̂, larger λ begins by meaning: closer to w₀
            center = torch.minimum(center + _SIMPLIFIED_OFFSET, problem.high)
        phi = hypernetwork.build(w0, center, objective.units())

        per_epoch = problem.train_batches.steps_per_epoch  # type: ignore[attr-defined]
        steps = max_epochs * per_epoch
        phi_steps = math.ceil(_GLOBAL_FIT * steps) if algorithm == "global" else steps
        first = phi_steps if algorithm == "global" else int(warmup * steps)
        phi_optimizer, weight_schedule = _phi_optimizer(net, phi, response_optimizer, phi_steps)
        lam_optimizer = torch.optim.Adam([lam_hat], lr=hyper_lr, betas=(0.9, 0.99), eps=hyper_eps)
        lam_schedule = torch.optim.lr_scheduler.LambdaLR(
            lam_optimizer,
            lambda t: max(0.0, 1 - t / max(steps - first, 1)) if hyper_lr_schedule == "linear" else 1.0,
        )
        run = _run(
            algorithm, problem, phi, lam_hat, phi_optimizer, lam_optimizer, space,
            scale=scale, m=n_samples, warmup=first, phi_steps=phi_steps, seed=seed,
        )  # fmt: skip
        response = BestResponse(space, prefix, {}, phi, objective, folds)
        trace = _Trace(response, lam_hat, begin, per_epoch)
        total, averaged = torch.zeros_like(lam_hat), 0
        every = max(1, min(per_epoch, steps // 50))
        with tqdm(total=steps, desc="hyper-training", unit="step", disable=not progress, leave=False) as bar:
            for number, step in enumerate(run, start=1):
                if step.train_loss is not None:
                    weight_schedule.step()
                if step.valid_loss is not None:
                    lam_schedule.step()
                if number > first and number > (1 - averaging) * steps or number == steps:
                    total, averaged = total + lam_hat.detach(), averaged + 1
                trace.see(step)
                if number % every == 0 or number == steps:
                    trace.record(number)
                    bar.update(number - bar.n)
                    bar.set_postfix(validation_loss=f"{trace.rows[-1]['validation_loss']:.4g}")
                if number == steps:
                    break
    response.params = space.decode((total / averaged).clamp(problem.low, problem.high))
    phi.center = phi.center.detach().clone()
    phi.requires_grad_(False)
    return response, trace.arrays()


def _problem(
    space: Space, prefix: str, objective: Objective, folds: list[Fold], net: TorchEstimator, seed: int, like: Tensor
) -> Problem:
    def train_loss(w: Tensor, lam: Tensor, batch: Batch) -> Tensor:
        K, m, _ = w.shape
        values = {name.removeprefix(prefix): v.repeat(K) for name, v in space.values(lam).items()}
        return objective.train_loss(w.flatten(0, 1), values, batch.repeat(m)).view(K, m)

    def valid_loss(w: Tensor, batch: Batch) -> Tensor:
        return objective.valid_loss(w[:, 0], batch)[:, None]

    return Problem(
        train_loss,
        valid_loss,
        Minibatches([fold.train for fold in folds], net.batch_size, seed=seed),
        Minibatches([fold.valid for fold in folds], max(net.batch_size, _VALID_BATCH), seed=seed + 1),
        space.low.to(like),
        space.high.to(like),
    )


def _phi_optimizer(
    net: TorchEstimator, phi: Hypernetwork, kind: str, steps: int
) -> tuple[ResponseOptimizer, torch.optim.lr_scheduler.LRScheduler]:
    if kind == "plain":
        optimizer, schedule = net._make_optimizer(list(phi.parameters()), steps)
        return PlainOptimizer(phi, optimizer), schedule
    weights, schedule = net._make_optimizer([phi.w0], steps)
    basis = list(phi.basis.parameters())
    return TangentOptimizer(phi, weights, torch.optim.Adam(basis, lr=net.lr) if basis else None), schedule


def _run(
    algorithm: str,
    problem: Problem,
    phi: Hypernetwork,
    lam_hat: Tensor,
    phi_optimizer: ResponseOptimizer,
    lam_optimizer: torch.optim.Optimizer,
    space: Space,
    *,
    scale: float | None,
    m: int | None,
    warmup: int,
    phi_steps: int,
    seed: int,
) -> Iterator[Step]:
    generator = torch.Generator().manual_seed(seed)
    if algorithm == "joint":
        sigma = 0.5 if scale is None else scale
        yield from joint(
            problem, phi, lam_hat, phi_optimizer, lam_optimizer,
            sigma=sigma, m=m or 2, warmup=warmup, generator=generator,
        )  # fmt: skip
    elif algorithm == "simplified":
        yield from simplified(problem, phi, lam_hat, phi_optimizer, lam_optimizer, warmup=warmup)
    else:
        sample = _prior(space, lam_hat, scale, seed)
        for step in fit_response(problem, phi, phi_optimizer, sample, m=m or 8):
            yield step
            if step.number == phi_steps:
                break
        with torch.no_grad():  # start the descent where the learned response promises most
            screened = sample(_SCREENED)
            batch = next(problem.valid_batches)
            predicted = torch.cat([problem.valid_loss(phi(lam[None]), batch).mean(dim=0) for lam in screened])
            lam_hat.copy_(screened[predicted.argmin()])
        yield from descend_response(problem, phi, lam_hat, lam_optimizer)


def _prior(space: Space, lam_hat: Tensor, scale: float | None, seed: int) -> Callable[[int], Tensor]:
    """p(λ) of Algorithm 2: the declared distributions, or N(start, scale² I) as in the paper."""
    rng = np.random.default_rng(seed)
    start = lam_hat.detach().clone()
    if scale is None:
        return lambda m: space.sample(m, rng).to(start)
    return lambda m: start + scale * torch.from_numpy(rng.standard_normal((m, space.n))).to(start)


class _Trace:
    """Collects ``history_``: one row per record, with the minibatch training losses averaged since the last one."""

    def __init__(self, response: BestResponse, lam_hat: Tensor, begin: float, per_epoch: int):
        self.response, self.lam_hat, self.begin, self.per_epoch = response, lam_hat, begin, per_epoch
        self.rows: list[dict[str, float]] = []
        self._losses: list[Tensor] = []

    def see(self, step: Step) -> None:
        if step.train_loss is not None:
            self._losses.append(step.train_loss)

    def record(self, number: int) -> None:
        train_loss = float(torch.stack(self._losses).mean()) if self._losses else self.rows[-1]["train_loss"]
        self._losses.clear()
        lam = self.lam_hat.detach().cpu().double()
        params = self.response.space.decode(lam)
        valid_loss = float(self.response._validation_losses(lam[None]).mean())
        if not (math.isfinite(train_loss) and math.isfinite(valid_loss) and bool(lam.isfinite().all())):
            raise ValueError(
                f"Hyper-training diverged before step {number}: training loss {train_loss}, validation loss {valid_loss}, "
                f"λ̂ = {params}. Lower the estimator's lr or the search's hyper_lr, or scale X."
            )
        self.rows.append(
            {
                "step": number,
                "seconds": time.perf_counter() - self.begin,
                "epoch": number / self.per_epoch,
                "train_loss": train_loss,
                "validation_loss": valid_loss,
                **params,
            }
        )

    def arrays(self) -> dict[str, np.ndarray]:
        return {key: np.array([row[key] for row in self.rows]) for key in self.rows[0]}
