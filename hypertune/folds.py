"""The splits of a search, preprocessed and encoded as scikit-learn would give them to the estimator; and the net in a Pipeline.

folds = make_folds(estimator, X, y, cv.split(X, y), {"sample_weight": weight}, weighs_rows=False, pads=True, by_column=False)
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import get_config
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.metadata_routing import process_routing
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params, _num_samples

from hypertune.arrays import fingerprint
from hypertune.base import TorchEstimator
from hypertune.batches import Rows
from hypertune.net import Net


@dataclass(frozen=True)
class Fold:
    """One split, ready for training.

    Parameters
    ----------
    net : Net
        Has seen the training rows (classes, widths, target scale) but is not trained.
    preprocess : fitted Pipeline or None
        The steps before the net, fitted on this fold's training rows, and an identity at the end.
    train, valid : Rows
        Preprocessed rows as tensors.
    key : str, default=""
        Fingerprint of the training rows, set once these have been dropped.
    padded : bool, default=False
        Whether columns of zeros make some folds as wide as the others, so that separate fits of them would differ.
    """

    net: Net
    preprocess: Pipeline | None
    train: Rows
    valid: Rows
    key: str = ""
    padded: bool = False

    def with_fewer_valid(self, most: int) -> Fold:
        """The same fold with at most so many of its validation rows, a draw that is the same every time."""
        if len(self.valid.x) <= most:
            return self
        drawn = torch.randperm(len(self.valid.x), generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:most]
        return replace(self, valid=self.valid.take(drawn))

    def without_training_rows(self) -> Fold:
        """What a trained response needs of the fold. (Under K-fold the validation rows of all folds are all rows.)"""
        nothing = Rows(self.train.x[:0].clone(), self.train.y[:0].clone())  # an empty view would keep all rows
        return replace(self, train=nothing, key=fingerprint(*self.train[:3]))


def net_of(estimator: Any) -> Net:
    """The torch estimator itself, or the last step of a Pipeline; a skorch net by its adapter."""
    last = last_step(estimator)
    if isinstance(last, TorchEstimator):
        return last
    if any(cls.__module__.startswith("skorch.") for cls in type(last).__mro__):
        from hypertune.skorch import SkorchNet  # an optional dependency, there if the user has such a net

        return SkorchNet(last)
    if isinstance(last, TransformedTargetRegressor):
        raise TypeError(
            "TransformedTargetRegressor hides the net from HyperTrainingSearchCV: put it around the search instead, "
            "TransformedTargetRegressor(HyperTrainingSearchCV(...), ...)."
        )
    if isinstance(last, Pipeline):
        raise TypeError("A Pipeline in a Pipeline hides the net from HyperTrainingSearchCV: put all steps into one.")
    if isinstance(inner := getattr(last, "estimator", None), (TorchEstimator, Pipeline)):
        raise TypeError(
            f"{type(last).__name__} hides its {type(inner).__name__} from HyperTrainingSearchCV: put it around the search instead, "
            f"{type(last).__name__}(HyperTrainingSearchCV(...), ...)."
        )
    raise TypeError(
        f"HyperTrainingSearchCV tunes a TorchClassifier, a TorchRegressor, a skorch net, or a Pipeline that ends in one; got "
        f"{type(last).__name__}{' as the last step' if isinstance(estimator, Pipeline) else ''}. Other models have no weights that a gradient could follow: use RandomizedSearchCV."
    )


def last_step(estimator: Any) -> Any:
    """The last step of a Pipeline, or the estimator."""
    return estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator


def prefix_of(estimator: Any) -> str:
    """What precedes the net's own parameter names: ``"net__"`` in a Pipeline, else empty."""
    return f"{estimator.steps[-1][0]}__" if isinstance(estimator, Pipeline) else ""


def make_folds(
    estimator: Any,
    X: Any,
    y: Any,
    splits: Iterable[tuple[np.ndarray, np.ndarray]],
    fit_params: Mapping[str, Any],
    *,
    weighs_rows: bool,
    pads: bool,
    by_column: bool,
) -> list[Fold]:
    """One fold for each pair of (numbers of training rows, numbers of validation rows).

    Raises ValueError if there is none, or if the steps before the net give rows of other shapes in other folds, and not just fewer columns;
    warns, with ``by_column``, if they choose other columns in other folds.

    Parameters
    ----------
    fit_params : mapping from str to object
        What the estimator's ``fit`` is given, for all rows.
    weighs_rows : bool
        Whether a weight for each row is among the hyperparameters.
    pads : bool
        Whether rows that are narrower than those of other folds may get columns of zeros.
    by_column : bool
        Whether the search finds a value for each column: all folds must have the same ones then, and so must the whole data.
    """
    if any(hasattr(step, "fit_resample") for _, step in getattr(estimator, "steps", ())):
        raise TypeError(
            f"{type(estimator).__name__} resamples its rows, and HyperTrainingSearchCV could not tell which ones were trained on. Weight them instead: "
            'fit(..., sample_weight=compute_sample_weight("balanced", y)) of the net.'
        )
    net = last_step(estimator)
    if isinstance(net, TorchEstimator) and type(net).fit is not TorchEstimator.fit:
        warnings.warn(
            f"{type(net).__name__} has a fit of its own, which is called to retrain candidates, but not in the hyper-training: what it does to rows "
            "belongs into a step before it, in a Pipeline.",
            UserWarning,
            stacklevel=2,
        )
    folds = [_fold(estimator, X, y, train, valid, fit_params, weighs_rows) for train, valid in splits]
    if not folds:
        raise ValueError("No fits were performed. Was the CV iterator empty? Were there no candidates?")
    fitted = folds
    if by_column and folds[0].preprocess is not None:
        everything = np.arange(_num_samples(X))
        weight = _params_of(estimator, X, fit_params, everything)[0].get("sample_weight")
        some = everything[:1] if weight is None else np.flatnonzero(weight)[:1]
        fitted = [*folds, _fold(estimator, X, y, everything, some, fit_params, weighs_rows)]
    shapes = [tuple(fold.train.x.shape[1:]) for fold in fitted]
    if len(set(shapes)) == 1:
        if fitted is not folds and len({_columns_of(fold) for fold in fitted}) > 1:
            warnings.warn(
                "The steps before the net make different columns in different folds, so a value for each column would mean a different column "
                "in each: choose the columns before the search, or take one value for all.",
                UserWarning,
                stacklevel=2,
            )
        return folds
    ours = isinstance(folds[0].net, TorchEstimator) and folds[0].net.inputs is None
    if not (pads and ours and all(len(shape) == 1 for shape in shapes)):
        raise ValueError(
            f"The steps before the net give rows of other shapes in other folds{', and in the whole data' * (fitted is not folds)}: {shapes}. Folds are trained together, so their nets "
            "must be of one size. Zeros fill up missing columns, but not of a skorch net or one of several inputs, with a hyperparameter for "
            "each unit, weight or feature, or with evaluate='hypernetwork' (check_hypergradient sets that): fix what the steps make of the columns (categories=... of an "
            "encoder, a number of features of a selection), or encode X before the search."
        )
    return [_widened(fold, min(shapes)[0], max(shapes)[0]) for fold in folds]


def _columns_of(fold: Fold) -> tuple[str, ...]:
    """The names of the columns that the steps before the net make, where these can say."""
    try:
        return tuple(fold.preprocess[:-1].get_feature_names_out())  # type: ignore[index]
    except Exception:  # whatever steps of the user's say instead
        return ()


def _widened(fold: Fold, least: int, width: int) -> Fold:
    """The same fold with columns of zeros up to a width, and no noise on columns that some fold lacks."""
    assert isinstance(fold.net, TorchEstimator)
    fold.net._widen(width, least)

    def wide(rows: Rows) -> Rows:
        return rows._replace(x=F.pad(rows.x, (0, width - rows.x.shape[1])))

    return replace(fold, train=wide(fold.train), valid=wide(fold.valid), padded=True)


def _fold(
    estimator: Any,
    X: Any,
    y: Any,
    train: np.ndarray,
    valid: np.ndarray,
    fit_params: Mapping[str, Any],
    weighs_rows: bool,
) -> Fold:
    X_train, y_train = _safe_split(estimator, X, y, train)
    X_valid, y_valid = _safe_split(estimator, X, y, valid, train)
    own, earlier = _params_of(estimator, X, fit_params, train)
    preprocess = None
    if isinstance(estimator, Pipeline) and len(estimator.steps) > 1:
        # The identity in the net's place counts as fitted, whatever the user's last transformer says of itself.
        *steps, (last, _) = estimator.steps
        preprocess = clone(Pipeline([*steps, (last, FunctionTransformer())], transform_input=estimator.transform_input))
        X_train = preprocess.fit_transform(X_train, y_train, **earlier)
        X_valid = preprocess.transform(X_valid)
    net, weight = clone(net_of(estimator)), own.get("sample_weight")
    _check_fit_params(last_step(estimator), own)
    number = np.arange(_num_samples(X))[train]
    if isinstance(net, TorchEstimator):
        net._note_rows(X_train, y_train, number)
        if weighs_rows:
            net.sample_weight = None  # it is λ
    encoded = net._encode(X_train, y_train, weight, all_y=y)
    if weight is not None:
        number = number[np.asarray(weight) > 0]  # the others are left out
    if weighs_rows and len(number) == len(encoded.x):
        encoded = encoded._replace(number=torch.from_numpy(number).to(encoded.x.device))
    valid_weight = _params_of(estimator, X, fit_params, valid)[0].get("sample_weight")
    if valid_weight is not None and not np.asarray(valid_weight).any():
        raise ValueError(
            f"sample_weight is zero for all {len(X_valid)} validation rows of a fold, and the hyperparameters descend the validation loss, weighted "
            "so, of every fold: choose folds (cv) with some weight in each, or leave these rows out of X."
        )
    return Fold(net, preprocess, encoded, net._encode_more(X_valid, y_valid, valid_weight))


def _check_fit_params(net: Any, own: Mapping[str, Any]) -> None:
    """Raise TypeError for what the net's ``fit`` does not take, before anything is trained."""
    takes = inspect.signature(net.fit).parameters
    unknown = [] if any(p.kind is p.VAR_KEYWORD for p in takes.values()) else sorted(own.keys() - takes.keys())
    if unknown:
        raise TypeError(
            f"{type(net).__name__}.fit() got an unexpected argument {unknown[0]!r}; it takes {sorted(takes.keys() - {'X', 'y'})}."
        )


def _params_of(
    estimator: Any, X: Any, fit_params: Mapping[str, Any], indices: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fit parameters for some rows: the net's own, and those of the earlier steps as their pipeline takes them."""
    params = _check_method_params(X, fit_params, indices=indices)
    if not isinstance(estimator, Pipeline):
        return params, {}
    if not get_config()["enable_metadata_routing"]:  # step__name
        prefix = prefix_of(estimator)
        own = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        return own, {name: value for name, value in params.items() if not name.startswith(prefix)}
    if not params:
        return {}, {}
    routed = process_routing(estimator, "fit", **params)
    *others, (last, _) = estimator.steps
    wanted = {key for name, _ in others if name in routed for method in routed[name].values() for key in method}
    return routed[last].fit, {key: value for key, value in params.items() if key in wanted}


class DrawnOnce:
    """A splitter whose splits are drawn once: the hyper-training and the verification see the same, whatever its ``random_state``."""

    def __init__(self, cv: Any):
        self.cv = cv

    def get_n_splits(self, *args: Any, **kwargs: Any) -> Any:
        return self.cv.get_n_splits(*args, **kwargs)

    def split(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "splits"):
            self.splits = [tuple(map(_numbers, split)) for split in self.cv.split(*args, **kwargs)]
        return iter(self.splits)


def _numbers(rows: Any) -> np.ndarray:
    """Numbers of rows, or a mask, as an array: what a user gives may be a range, a tuple or a tensor."""
    numbers = np.asarray(rows)
    return numbers if numbers.size else numbers.astype(int)
