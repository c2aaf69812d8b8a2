"""The best response that a search leaves behind: weights, a fitted estimator or a validation curve at any λ.

search.best_response_.estimator_at({"weight_decay": 1e-3})          # without training
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from hypertune.arrays import fingerprint
from hypertune.batches import Rows
from hypertune.folds import Fold
from hypertune.hypernetworks import Hypernetwork
from hypertune.losses import output_scale
from hypertune.net import Net, plain_settings
from hypertune.objective import Objective
from hypertune.randomness import gradients, isolated
from hypertune.space import Space, Value

_LOOKED_AT = 100  # rows
_NOTHING = 0.01  # standard deviation over rows of the outputs: logits, or in standard deviations of the targets


@dataclass(frozen=True, eq=False)
class BestResponse:
    """The learned best response w_φ(λ) of every fold: weights at any λ, at the price of a forward pass.

    Parameters
    ----------
    space : Space
        The hyperparameters, under the names that the search was given.
    params : dict from str to float
        The tuned setting λ̂; for a finer grain dicts or arrays, as the estimator takes them.
    hypernetwork : Hypernetwork
        One for each of the K folds, stacked.
    objective : Objective
        The losses that it was trained on.
    folds : list of Fold
        The K splits: fitted preprocessing and validation rows, without the training rows. A pickled search holds these rows.
    hypergradient : Tensor of shape (n,), optional
        Slope of the validation loss (mean over folds) in λ, averaged over the last part of the path.
    sigma : Tensor of shape (n,), optional
        Standard deviation of the λ that the response was learned from, where it is linear.
    seed : int, default=0
        With which the objective's module was built: what it drew for itself then belongs to the weights.
    verified : tuple of Tensor of shape (C, n) and Tensor of shape (C,), optional
        Settings λ that were retrained, and their validation losses, mean over folds.

    Notes
    -----
    A response learned by ``algorithm="joint"`` is accurate near λ̂, where its hyperparameters were sampled. For curves
    over a wide range use ``algorithm="global"``.
    """

    space: Space
    params: dict[str, Any]
    hypernetwork: Hypernetwork
    objective: Objective
    folds: list[Fold]
    hypergradient: Tensor | None = None
    sigma: Tensor | None = None
    seed: int = 0
    verified: tuple[Tensor, Tensor] | None = None

    def weights(self, params: Mapping[str, Value] | None = None, *, fold: int = 0) -> dict[str, Tensor]:
        """Weights at a setting, by parameter name of the module.

        Parameters
        ----------
        params : mapping from str to float, optional
            A setting; hyperparameters left out stay at λ̂.
        fold : int, default=0
            Which fold's training data shaped the weights.

        Returns
        -------
        dict from str to Tensor
            With the shapes of the parameters.

        Raises
        ------
        ValueError
            For a name that was not tuned, a value out of its range, or a setting other than λ̂ if no response was learned.
        TypeError
            If the setting is no dict.
        """
        self._check_fold(fold)
        return self.objective.named(self._weights(self._lam([{} if params is None else params]))[fold, 0])

    def estimator_at(self, params: Mapping[str, Value] | None = None, *, fold: int = 0) -> Any:
        """A fitted estimator at a setting, without training: the net, or the Pipeline around it.

        Parameters
        ----------
        params : mapping from str to float, optional
            A setting; hyperparameters left out stay at λ̂.
        fold : int, default=0
            Which fold's training rows it stands for.

        Raises
        ------
        ValueError
            As in :meth:`weights`.
        """
        self._check_fold(fold)
        setting = self._complete({} if params is None else params)
        net = copy.deepcopy(self.folds[fold].net).set_params(**self.space.to_net(setting))
        net = net._adopt(self._module(net, self._lam([setting]), fold))
        preprocess = self.folds[fold].preprocess
        if preprocess is None:
            return net
        return Pipeline([*copy.deepcopy(preprocess).steps[:-1], (preprocess.steps[-1][0], net)])

    def validation_loss(self, params: Mapping[str, Value] | None = None) -> float:
        """Validation loss at a setting, mean over rows and then over folds; no penalties, no noise. Errors as in :meth:`weights`."""
        return float(self._validation_losses(self._lam([{} if params is None else params])).mean())

    def validation_curve(self, name: str, values: Sequence[Value]) -> np.ndarray:
        """Validation loss along one hyperparameter, the others at λ̂.

        Returns
        -------
        ndarray of shape (len(values), K)
            One column per fold, as scikit-learn's ``validation_curve`` has them.

        Raises
        ------
        ValueError
            As in :meth:`weights`.
        """
        return self._validation_losses(self._along(name, values)).T.double().numpy()

    @gradients()
    def validation_band(self, name: str, values: Sequence[Value], *, coverage: float = 0.9) -> np.ndarray:
        """Where retraining would put the validation loss, along one hyperparameter, the others at λ̂.

        The hypernetwork's weights are taken for uncertain (:meth:`Hypernetwork.variance`), which reaches the loss to first order. How
        uncertain is one number for all of them, fitted to what the search's retrained candidates missed the response by. It ends
        four units of λ from λ̂ (at ``scale=0.5``): a factor of e⁴ for a log distribution, the whole range of a bounded one.

        Parameters
        ----------
        name : str
        values : sequence
        coverage : float, default=0.9
            Share of retrained models that is to lie inside. How many did is measured in docs/benchmarks.md, *band*.

        Returns
        -------
        ndarray of shape (len(values), 2)
            Lower and upper end, for the mean over folds; infinite further than that, and where nothing was learned of the response.

        Raises
        ------
        ValueError
            As in :meth:`weights`; for a coverage that is not between 0 and 1; and if the response is not that of ``algorithm="joint"``,
            "auto" or "hybrid" with ``hypernetwork="linear"``, or no candidates were retrained together with it.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must be between 0 and 1, got {coverage!r}.")
        lam = self._along(name, values)
        if self.sigma is None:
            raise ValueError('Only a linear response has a band: use algorithm="joint" and hypernetwork="linear".')
        if self.verified is None:
            raise ValueError(
                "No retrained candidates are known to this response, so that nobody knows how far it is off. They are known where the "
                "search may retrain them in one stacked pass: a module that can be stacked (no recurrent layers, nothing drawn at random when it is built; of skorch nets, small ones that are screened), an "
                'optimizer such as Adam or SGD, evaluate="retrain", and with start="estimator" no callback and no verbose estimator.'
            )
        settings, losses = self.verified
        deviations = self._standard_deviations(settings)
        missed = (losses.double() - self._validation_losses(settings).mean(dim=0)) / deviations
        missed = missed[losses.isfinite() & deviations.isfinite()]  # others diverged, or are beyond the band's reach
        if not len(missed):
            raise ValueError(
                "Not one retrained candidate is finite and near enough to say how far this response is off."
            )
        freedom = max(len(missed) - 1, 1)  # one less than their number: they miss in much the same way
        scale = missed.square().mean().sqrt() * float(student_t.ppf((1 + coverage) / 2, freedom))
        middle, half = self._validation_losses(lam).mean(dim=0), scale * self._standard_deviations(lam)
        return torch.stack([middle - half, middle + half], dim=1).double().numpy()

    # --- what the search needs ---------------------------------------------------------------------------------------

    def fit_known(self, net: Net, rows: Rows) -> bool:
        """Fit ``net`` by w_φ at its setting, if ``rows`` are the training rows of a fold; says whether it did."""
        keys, key = [fold.key for fold in self.folds], fingerprint(*rows[:3])
        if key not in keys or net.n_outputs_ != self.folds[0].net.n_outputs_:  # type: ignore[attr-defined]
            return False
        tuned = {h.own for h in self.space.hyperparameters}
        if plain_settings(net, tuned) != plain_settings(self.folds[0].net, tuned):
            return False
        net._adopt(self._module(net, self._lam([self.space.from_net(net.get_params())]), keys.index(key)))
        return True

    def is_constant(self) -> bool:
        """Whether w_φ(λ̂) has the same outputs for all rows of every fold: no slope leads out of a regularisation so strong."""
        w, known = self._weights(self._lam([{}])), False
        for k, fold in enumerate(self.folds):
            x, y, *_ = fold.with_fewer_valid(_LOOKED_AT).valid
            if len(x) > 1:
                scale = output_scale(self.objective.loss, y)
                if self.objective.predict(w[k], x[None], fold=k)[0].std(dim=0).max() >= _NOTHING * scale:
                    return False
                known = True
        return known

    def _module(self, net: Net, lam: Tensor, fold: int) -> nn.Module:
        with isolated(self.seed, net.device):
            module = net._build_module()
        return self.objective.load_into(module, self._weights(lam)[fold, 0], fold)

    def _weights(self, lam: Tensor) -> Tensor:
        with torch.no_grad():
            return self.hypernetwork(lam.to(self.hypernetwork.w0))

    def _validation_losses(self, lam: Tensor) -> Tensor:
        """λ (m, n) → (K, m), on all validation rows of each fold."""
        with isolated(self.seed, self.folds[0].net.device):  # a module or a criterion may draw
            return validation_losses(self.hypernetwork, self.objective, self.folds, lam)

    def _standard_deviations(self, lam: Tensor) -> Tensor:
        """Of the validation loss at λ (m, n), mean over folds, (m,), to first order, if w₀ has a standard deviation of one."""
        assert self.sigma is not None
        found, tuned, center = [], self.space.encode(self.params), self.hypernetwork.center
        for own in lam:
            one = own.to(self.hypernetwork.w0)
            # What is not sampled counts from the tuned setting, which is an average over the path and not its end.
            unmoved = ((self.sigma == 0) & (own == tuned)).to(one.device)
            variance = self.hypernetwork.variance(torch.where(unmoved, center, one)[None], self.sigma.to(one))[:, 0]
            if not variance.isfinite().all():
                found.append(variance.new_tensor(torch.inf))
                continue
            slopes = torch.zeros_like(self.hypernetwork.w0)
            with isolated(self.seed, self.folds[0].net.device):
                for k, (w, fold) in enumerate(zip(self._weights(one[None]), self.folds, strict=True)):
                    slopes[k] = self.objective.full_valid_gradient(w, fold.valid, k)[0]
            found.append((variance * slopes.square()).sum(dim=1).sqrt().mean())
        return torch.stack(found).cpu().double()

    def _check_fold(self, fold: int) -> None:
        if not 0 <= fold < len(self.folds):
            raise ValueError(f"fold={fold}: there are {len(self.folds)}, numbered from 0.")

    def _along(self, name: str, values: Sequence[Value]) -> Tensor:
        given: Any = values
        if isinstance(given, (Mapping, str)) or np.ndim(given) == 0 or not len(given):
            raise ValueError(f"values must be a sequence of at least one value of {name!r}, got {values!r}.")
        return self._lam([{name: value} for value in values])

    def _complete(self, params: Mapping[str, Value]) -> dict[str, Value]:
        if not isinstance(params, Mapping):
            raise TypeError(f"A setting is a dict from name to value, such as {self.params!r}; got {params!r}.")
        if unknown := sorted(set(params) - set(self.space.names)):
            net = self.folds[0].net
            known = net.get_params().get(unknown[0].removeprefix(self.space.hyperparameters[0].prefix))
            rest = "" if known is None else f"; it was learned at {known!r}"
            raise ValueError(
                f"{unknown[0]!r}: this best response is a function of {list(self.space.names)} alone{rest}."
            )
        for h in self.space.hyperparameters:
            low, high = h.support
            if h.name in params and not ((v := h.flatten(params[h.name])) >= low).all() & (v <= high).all():
                raise ValueError(f"{h.name}={params[h.name]!r} is outside its declared range [{low:g}, {high:g}].")
            if h.name in params and not np.isfinite(h.encode(params[h.name])).all():
                raise ValueError(
                    f"{h.name}={params[h.name]!r} is the end of a range without upper bound, whose logarithmic axis has no such point: "
                    f"this best response knows it above {low:g}."
                )
        if (
            params
            and not self.hypernetwork.maps
            and any(
                not np.array_equal(h.flatten(params[h.name]), h.flatten(self.params[h.name]))
                for h in self.space.hyperparameters
                if h.name in params
            )
        ):
            raise ValueError(
                "This search learned no response, only the weights at the tuned setting: its algorithm needs none. For other "
                'settings use algorithm="joint", "global" or "forward".'
            )
        return {**self.params, **params}

    def _lam(self, settings: Sequence[Mapping[str, Value]]) -> Tensor:
        return torch.stack([self.space.encode(self._complete(setting)) for setting in settings])


def validation_losses(hypernetwork: Hypernetwork, objective: Objective, folds: Sequence[Fold], lam: Tensor) -> Tensor:
    """L_Valid of w_φ(λ) at λ (m, n), (K, m), on all validation rows of each fold."""
    losses = []
    for one in lam.to(hypernetwork.w0):  # one λ at a time: K copies of the model in memory, not K × m
        with torch.no_grad():
            w = hypernetwork(one[None])
        losses.append(torch.cat([objective.full_valid_loss(w[k], f.valid, k) for k, f in enumerate(folds)]))
    return torch.stack(losses, dim=1).cpu()
