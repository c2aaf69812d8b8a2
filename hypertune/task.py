"""What a search trains: every fold in one objective, over one space. Refuses what cannot be trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from hypertune.examination import examine, reads_in_eval_mode, sees_features
from hypertune.folds import Fold
from hypertune.objective import NO_NOISE, Objective
from hypertune.randomness import isolated
from hypertune.space import ELSEWHERE, Space
from hypertune.tunable import arrangements, check_reach, find_reaches

_LOOKED_AT = 16  # rows, to see what a keyword does


class Task(NamedTuple):
    """What a search trains: all folds in one objective.

    ``current`` is the estimator's own λ, (n,), and ``seed`` that of the hyper-training.
    """

    space: Space
    folds: list[Fold]
    objective: Objective
    current: Tensor
    seed: int

    def with_rate(self, lam: Tensor) -> Task:
        """What is left to gradients: the nets have the learning rate of λ (n,), if one is searched for, and the space lacks it."""
        if not (rate := self.space.rate).any():
            return self
        params = self.space.decode(lam)
        own = {h.own: params[h.name] for h in self.space.hyperparameters if h.is_rate}
        folds = [replace(fold, net=copy.copy(fold.net).set_params(**own)) for fold in self.folds]
        return self._replace(space=self.space.without_rate, folds=folds, current=self.current[~rate])

    def insert_rate(self, others: Tensor, rate_of: Tensor) -> Tensor:
        """λ without the learning rate → λ (n,) with that of ``rate_of`` (n,)."""
        lam = rate_of.clone()
        lam[~self.space.rate] = others
        return lam


def stack(space: Space, folds: list[Fold], n_rows: int, seed: int) -> tuple[Space, Objective]:
    """All folds in one objective, which has no weights of its own. Refuses what cannot be trained.

    ``n_rows`` is the length of the whole data, for hyperparameters of single rows.

    Returns
    -------
    space : Space
        With the arrangement of every hyperparameter that has a grain.
    objective : Objective

    Raises
    ------
    ValueError
        If a hyperparameter reaches nothing in the model, is part of the prediction, or has values for units that some fold lacks.
    """
    net = folds[0].net
    with isolated(seed, net.device):
        module = net._build_module()  # if it cannot be built as it is, that is not the hyperparameters' fault
        reaches = find_reaches(net, space)
        objective = net._make_objective(module, reach=reaches, folds=len(folds))
        x = folds[0].train.x[:2]  # of the validation rows there may be one
        net._check_outputs(objective, x)
        if not objective.predict(objective.initial_weights()[None].requires_grad_(), x[None]).requires_grad:
            raise ValueError(
                f"The outputs of {type(module).__name__} have no gradient in eval mode, in which the hyperparameters descend the validation loss: they were "
                "detached, or made without one."
            )
        settings = net.get_params()
        for h in space.hyperparameters:
            if h.own not in reaches:
                continue
            if reads_in_eval_mode(objective, x, h.own, h.prior.ppf([0.01, 0.99])):
                raise ValueError(
                    f"param_distributions[{h.name!r}]: the module reads it in eval mode, too. The gradient is that of a validation loss "
                    f"which depends on it through the weights alone, as on a dropout rate: {ELSEWHERE}"
                )
            check_reach(net, objective, folds[0].train.x[:_LOOKED_AT], h, seed)
        examine(objective, x, {own: settings[own] for own in reaches})
        if any(h.grain == "feature" for h in space.hyperparameters):
            everything = folds[0].train.x
            spread = everything[:: max(1, len(everything) // _LOOKED_AT)]  # the first ones may be of one class
            objective.first_sees_features = sees_features(objective, spread, {own: settings[own] for own in reaches})
        names = {h.name for h in space.hyperparameters if h.own in ("input_noise", "mixup")}
        if names and not objective.feels_noise:
            raise ValueError(f"param_distributions[{min(names)!r}]: it {NO_NOISE}")
    for h in space.hyperparameters:
        for k, fold in enumerate(folds if h.grain in ("unit", "weight") else []):
            if not fold.train.y.is_floating_point() and len(fold.train.y.unique()) < getattr(net, "n_outputs_", 1):
                raise ValueError(
                    f"param_distributions[{h.name!r}]: the training rows of fold {k} lack a class, so that their net has fewer outputs, and there are no "
                    "values for each of its units or weights: use StratifiedKFold, or a value for each layer."
                )
    objective.forget_weights()
    return space.resolve(arrangements(net, objective, space, x, n_rows)), objective
