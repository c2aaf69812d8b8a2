"""The torch-backed estimators: Algorithm 1's inner loop, one training run at fixed hyperparameters.

They are what ``refit`` fits, what the baselines tune, and what every search of scikit-learn accepts:

>>> from sklearn.datasets import load_iris
>>> from hypertune import MLP, TorchClassifier
>>> X, y = load_iris(return_X_y=True)
>>> model = TorchClassifier(MLP(hidden=(16,)), max_epochs=30, lr=1e-2, random_state=0).fit(X, y)
>>> model.predict_proba(X[:2]).shape
(2, 3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from hypertune.base import TorchEstimator
from hypertune.losses import CLASSIFICATION_LOSSES, LOGARITHMIC, MULTILABEL_LOSSES, REGRESSION_LOSSES, Loss
from hypertune.objective import LOSS_HYPERPARAMETERS

_MOST_LOG = 300.0  # of a predicted mean: neither zero nor infinite


class TorchClassifier(ClassifierMixin, TorchEstimator):
    """A torch classifier with scikit-learn's interface, trained from scratch by minibatches.

    Targets are one class for each row, or (multilabel) a column of zeros and ones for each label.

    Parameters
    ----------
    module : callable, default=None
        Model factory ``(n_features_in, n_outputs) -> nn.Module`` with one output (logit) per class or label. None means
        :class:`MLP` with its defaults. For input of more than two dimensions, n_features_in is the shape of one row.
    criterion : {"cross_entropy", "squared_error"} or callable, default="cross_entropy"
        Loss, mean over rows. "squared_error" is against one-hot targets, mean over classes. With several labels for each row both are
        means over labels, "cross_entropy" of the binary one. A callable or a loss class such as ``torch.nn.CrossEntropyLoss`` gets logits (B, C) and class
        numbers (B,), or zeros and ones (B, labels).
    weight_decay : float or dict, default=0.0
        Adds ½ · weight_decay · ‖w‖² to the training loss, over weights of two or more dimensions. A dict goes from names of
        the module's parameters to numbers, or to arrays that broadcast to the parameter; those left out are not penalised.
    l1 : float or dict, default=0.0
        Adds l1 · ‖w‖₁, over the same weights.
    input_noise : float or array-like of shape (n_features,), default=0.0
        Standard deviation of Gaussian noise added to the inputs in training.
    label_smoothing : float, default=0.0
        Probability of the target that is spread evenly over the classes (with several labels, over 0 and 1 of each), in [0, 1].
    mixup : float, default=0.0
        Strength of mixup (Zhang et al. 2018), in [0, 1]: in each minibatch, rows and their losses are mixed with those of other
        rows, whose share is uniform between 0 and mixup/2.
    penalty : callable ``(weights, **hyperparameters) -> scalar``, default=None
        Added to the training loss; ``weights`` is a dict from names of the module's parameters to tensors. Keywords with a
        default are parameters, ``penalty__…``.
    augment : callable ``(x, generator, **hyperparameters) -> x``, default=None
        Applied to the rows x (B, ...) of every training minibatch; draws from the ``torch.Generator`` alone, which is on the device
        of x. Keywords with a default are parameters, ``augment__…``.
    inputs : dict from str to list, mask or slice, default=None
        For modules of several inputs: the columns of X for each argument of ``forward``: names, numbers, a mask or a slice. The factory
        then gets a dict of their widths as n_features_in.
    sample_weight : array-like of shape (n_samples,), default=None
        Weight of each row that ``fit`` is given, times the weights passed to ``fit``. This one can be tuned.
    optimizer : {"adam", "sgd"} or callable, default="adam"
        "sgd" has momentum 0.9. A callable gets (params, lr=...) and returns a torch optimizer. It receives all weights as one
        tensor (1, D), and so cannot treat some of them differently (groups of parameters); those of matrices (Muon, Adafactor) are refused.
    lr : float, default=3e-3
        Learning rate at the start.
    lr_schedule : {"cosine", "constant"} or callable ``share -> factor``, default="cosine"
        How the learning rate changes over the run; "cosine" ends at zero. A callable maps the share of the run that is done, from 0
        to 1, to a factor of ``lr``, which is 1 at its largest: a warm-up, one cycle, steps.
    batch_size : int, default=64
        Rows of a minibatch; all rows if there are fewer.
    max_epochs : int, default=100
        Passes through the data.
    device : str or torch.device, default="cpu"
        Torch device that holds data and model.
    dtype : {"float32", "float64"}, default="float32"
        Precision of data and model.
    random_state : int, RandomState instance or None, default=None
        Seeds initial weights, minibatch order and noise. None takes fresh entropy from the operating system. Global
        random states are never touched.
    verbose : int, default=0
        If positive, one line per epoch.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,), or list of ndarray
        Class labels; with several labels for each row one array for each, of 0 and 1.
    module_ : nn.Module
        The trained module, in eval mode.
    loss_curve_ : list of float
        Mean training loss of each epoch, penalties included; not where the weights came from a hypernetwork.
    n_iter_ : int
        Epochs trained.
    n_outputs_ : int
        Width of the module's output: the number of classes, or of labels.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, if X had string column names.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TorchEstimator._parameter_constraints,
        "criterion": [StrOptions(set(CLASSIFICATION_LOSSES)), callable],
        "label_smoothing": [Interval(Real, *LOSS_HYPERPARAMETERS["label_smoothing"], closed="both")],
    }
    _multilabel = False

    def __init__(
        self,
        module: Any = None,
        *,
        criterion: Any = "cross_entropy",
        weight_decay: Any = 0.0,
        l1: Any = 0.0,
        input_noise: Any = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        penalty: Any = None,
        augment: Any = None,
        inputs: Mapping[str, Sequence[Any]] | None = None,
        sample_weight: Any = None,
        optimizer: Any = "adam",
        lr: float = 3e-3,
        lr_schedule: Any = "cosine",
        batch_size: int = 64,
        max_epochs: int = 100,
        device: Any = "cpu",
        dtype: str = "float32",
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.module = module
        self.criterion = criterion
        self.weight_decay = weight_decay
        self.l1 = l1
        self.input_noise = input_noise
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.penalty = penalty
        self.augment = augment
        self.inputs = inputs
        self.sample_weight = sample_weight
        self.optimizer = optimizer
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    @property
    def _losses(self) -> Mapping[str, Loss]:  # type: ignore[override]
        return MULTILABEL_LOSSES if self._multilabel else CLASSIFICATION_LOSSES

    @property
    def _one_output(self) -> str:  # type: ignore[override]
        return "label" if self._multilabel else "class"

    def _checks(self, y: Any) -> dict[str, Any]:
        shape = y.shape if hasattr(y, "shape") else np.asarray(y).shape
        return {"multi_output": len(shape) == 2 and shape[1] > 1}

    def _learn_targets(self, y: np.ndarray, sample_weight: np.ndarray | None, all_y: Any) -> None:
        check_classification_targets(y)
        self._multilabel = y.ndim == 2
        if self._multilabel:
            self._learn_labels(y)
            return
        self.classes_: Any = np.unique(all_y)
        self.n_outputs_ = len(self.classes_)
        if self.n_outputs_ < 2:
            rows = "the data" if sample_weight is None else "what is left of the data where sample_weight is not zero"
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes, but {rows} contains only one class: "
                f"{self.classes_[0]!r}."
            )

    def _learn_labels(self, y: np.ndarray) -> None:
        self.n_outputs_, self._label_dtype = y.shape[1], y.dtype
        self.classes_ = [np.array([0, 1])] * self.n_outputs_

    def _encode_targets(self, y: np.ndarray) -> Tensor:
        if self._multilabel:
            if issparse(y) or not np.isin(y, (0, 1)).all():
                raise ValueError(
                    f"y of shape {y.shape} must hold a column of zeros and ones for each label, as a dense array. For several columns of "
                    f"classes put sklearn.multioutput.MultiOutputClassifier around {type(self).__name__} or around the search."
                )
            return self._tensor(y)
        codes = np.searchsorted(self.classes_, y).clip(0, len(self.classes_) - 1)
        if (unseen := self.classes_[codes] != y).any():
            raise ValueError(f"y holds the classes {np.unique(y[unseen])}, which the training rows do not.")
        return torch.from_numpy(codes.astype(np.int64)).to(self.device)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log of the probabilities of classes or labels, (n_samples, n_classes)."""
        outputs = torch.from_numpy(self._outputs(X))
        if self.criterion == "squared_error":  # the outputs are probabilities already, up to their error
            outputs = outputs.clamp(1e-7, 1.0 if self._multilabel else None).log()
            if self._multilabel:
                return outputs.numpy()
        return (F.logsigmoid(outputs) if self._multilabel else torch.log_softmax(outputs, dim=1)).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, (n_samples, n_classes): the softmax of the module's outputs; of labels, each the sigmoid of its own.

        Under ``criterion="squared_error"`` the outputs themselves, clipped at zero and normalised (of labels, clipped at zero and one).
        """
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """Most probable class of each row, (n_samples,); or zeros and ones, (n_samples, n_labels)."""
        outputs = self._outputs(X)
        if self._multilabel:
            return (outputs > (0.5 if self.criterion == "squared_error" else 0.0)).astype(self._label_dtype)
        return self.classes_[outputs.argmax(axis=1)]


class TorchRegressor(RegressorMixin, TorchEstimator):
    """A torch regressor with scikit-learn's interface, trained from scratch by minibatches.

    Targets are standardised (weighted mean 0, standard deviation 1 per output) for training and mapped back in
    ``predict``: squared errors, and the hyperparameters that trade against them, are in units of the target's variance (absolute
    errors of its standard deviation). For "poisson" and
    "gamma" they are divided by their mean instead, and the module's outputs are logarithms: ``predict`` returns positive numbers.

    Parameters
    ----------
    module : callable, default=None
        Model factory ``(n_features_in, n_outputs) -> nn.Module``. None means :class:`MLP` with its defaults. For input
        of more than two dimensions, n_features_in is the shape of one row.
    criterion : {"squared_error", "absolute_error", "poisson", "gamma"} or callable, default="squared_error"
        Loss, mean over outputs and rows: "poisson" (counts, zeros among them) and "gamma" (positive, skewed) are half the deviances,
        with a logarithmic link. A callable or a loss class such as ``torch.nn.HuberLoss`` gets outputs and standardised
        targets, both (B, n_outputs).
    weight_decay, l1, input_noise, mixup : default=0.0
    penalty, augment, inputs, sample_weight : default=None
        As in :class:`TorchClassifier`.
    optimizer : {"adam", "sgd"} or callable, default="adam"
        "sgd" has momentum 0.9. A callable gets (params, lr=...) and returns a torch optimizer. It receives all weights as one
        tensor (1, D), and so cannot treat some of them differently (groups of parameters); those of matrices (Muon, Adafactor) are refused.
    lr : float, default=3e-3
        Learning rate at the start.
    lr_schedule : {"cosine", "constant"} or callable ``share -> factor``, default="cosine"
        How the learning rate changes over the run; "cosine" ends at zero. A callable maps the share of the run that is done, from 0
        to 1, to a factor of ``lr``, which is 1 at its largest: a warm-up, one cycle, steps.
    batch_size : int, default=64
        Rows of a minibatch; all rows if there are fewer.
    max_epochs : int, default=100
        Passes through the data.
    device : str or torch.device, default="cpu"
        Torch device that holds data and model.
    dtype : {"float32", "float64"}, default="float32"
        Precision of data and model.
    random_state : int, RandomState instance or None, default=None
        Seeds initial weights, minibatch order and noise. None takes fresh entropy from the operating system. Global
        random states are never touched.
    verbose : int, default=0
        If positive, one line per epoch.

    Attributes
    ----------
    module_ : nn.Module
        The trained module, in eval mode; its outputs are standardised targets, or logarithms of targets over their mean.
    loss_curve_ : list of float
        Mean training loss of each epoch, penalties included; not where the weights came from a hypernetwork.
    n_iter_ : int
        Epochs trained.
    n_outputs_ : int
        Number of targets.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, if X had string column names.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TorchEstimator._parameter_constraints,
        "criterion": [StrOptions(set(REGRESSION_LOSSES)), callable],
    }
    _losses = REGRESSION_LOSSES
    loss_names: ClassVar[Mapping[str, str]] = {name: name for name in LOSS_HYPERPARAMETERS if name != "label_smoothing"}

    def __init__(
        self,
        module: Any = None,
        *,
        criterion: Any = "squared_error",
        weight_decay: Any = 0.0,
        l1: Any = 0.0,
        input_noise: Any = 0.0,
        mixup: float = 0.0,
        penalty: Any = None,
        augment: Any = None,
        inputs: Mapping[str, Sequence[Any]] | None = None,
        sample_weight: Any = None,
        optimizer: Any = "adam",
        lr: float = 3e-3,
        lr_schedule: Any = "cosine",
        batch_size: int = 64,
        max_epochs: int = 100,
        device: Any = "cpu",
        dtype: str = "float32",
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.module = module
        self.criterion = criterion
        self.weight_decay = weight_decay
        self.l1 = l1
        self.input_noise = input_noise
        self.mixup = mixup
        self.penalty = penalty
        self.augment = augment
        self.inputs = inputs
        self.sample_weight = sample_weight
        self.optimizer = optimizer
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.single_output = True
        tags.target_tags.multi_output = True
        return tags

    def _checks(self, y: Any) -> dict[str, Any]:
        return {"multi_output": True, "y_numeric": True}

    def _learn_targets(self, y: np.ndarray, sample_weight: np.ndarray | None, all_y: Any) -> None:
        y = np.asarray(y, dtype=np.float64)
        columns = y.reshape(len(y), -1)
        self._target_shape = y.shape[1:]
        self.n_outputs_ = columns.shape[1]
        self._target_mean = np.average(columns, axis=0, weights=sample_weight)
        self._logarithmic = isinstance(self.criterion, str) and self.criterion in LOGARITHMIC
        if self._logarithmic:
            return
        scale = np.sqrt(np.average((columns - self._target_mean) ** 2, axis=0, weights=sample_weight))
        self._target_scale = np.where(scale > 10 * np.finfo(np.float64).eps * np.abs(self._target_mean), scale, 1.0)

    def _encode_targets(self, y: np.ndarray) -> Tensor:
        columns = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
        if self._logarithmic:
            self._refuse_targets(columns)
            return self._tensor(columns / self._target_mean)
        return self._tensor((columns - self._target_mean) / self._target_scale)

    def _refuse_targets(self, columns: np.ndarray) -> None:
        """Those that a criterion with a logarithmic link has no likelihood for."""
        zeros = LOGARITHMIC[self.criterion]
        if (columns < 0).any() or (not zeros and (columns == 0).any()) or not (self._target_mean > 0).all():
            raise ValueError(
                f"criterion={self.criterion!r} is for targets that are {'zero or positive, and not all zero' if zeros else 'positive'}; "
                f"y goes from {columns.min():g} to {columns.max():g}."
            )

    def predict(self, X: Any) -> np.ndarray:
        """Predicted targets, (n_samples,) or (n_samples, n_outputs) as in fit."""
        outputs = self._outputs(X)
        if self._logarithmic:
            outputs = np.exp(outputs.clip(-_MOST_LOG, _MOST_LOG)) * self._target_mean
        else:
            outputs = outputs * self._target_scale + self._target_mean
        return outputs.reshape(len(outputs), *self._target_shape)
