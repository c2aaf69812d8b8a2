"""A torch module trained at fixed hyperparameters: Algorithm 1's inner loop with scikit-learn's manners.

:mod:`hypertune.estimator` has the two estimators that are public.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from hypertune.arrays import (
    check_codes,
    check_device,
    check_noise,
    check_strengths,
    contiguous,
    dense,
    find_codes,
    find_columns,
    find_noisy,
    fingerprint,
    with_weight,
)
from hypertune.batches import Minibatches, Rows
from hypertune.callbacks import CallbackSupportMixin, fit_task, with_callbacks
from hypertune.factory import MLP, build
from hypertune.functions import check_call, keywords_of, own_copy, with_keywords
from hypertune.losses import Loss, as_loss
from hypertune.net import Known
from hypertune.objective import LOSS_HYPERPARAMETERS, NO_NOISE, Objective
from hypertune.optimizers import LR_SCHEDULES, OPTIMIZERS, make_optimizer
from hypertune.randomness import draw_seed, gradients, isolated, rng_state, set_rng_state
from hypertune.reach import Reach
from hypertune.stacked import arguments, explained

_OWNERS = ("module", "penalty", "augment")  # parameters whose own keywords are parameters
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_PREDICT_ROWS = 4096


class TorchEstimator(CallbackSupportMixin, BaseEstimator):
    """What the two estimators share. The parameters are described there."""

    module: Any
    criterion: Any
    input_noise: Any
    penalty: Any
    augment: Any
    inputs: Any
    sample_weight: Any
    optimizer: Any
    lr: float
    lr_schedule: Any
    batch_size: int
    max_epochs: int
    device: Any
    dtype: str
    random_state: Any
    verbose: int
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "module": [None, callable],
        "weight_decay": [Interval(Real, 0, None, closed="left"), Mapping],
        "l1": [Interval(Real, 0, None, closed="left"), Mapping],
        "input_noise": [Interval(Real, 0, None, closed="left"), "array-like"],
        "mixup": [Interval(Real, 0, 1, closed="both")],
        "penalty": [None, callable],
        "augment": [None, callable],
        "inputs": [None, Mapping],
        "sample_weight": [None, "array-like"],
        "optimizer": [StrOptions(set(OPTIMIZERS)), callable],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "lr_schedule": [StrOptions(set(LR_SCHEDULES)), callable],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "device": [str, torch.device],
        "dtype": [StrOptions(set(_DTYPES))],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }
    _losses: Mapping[str, Loss]
    _one_output = "output"  # what a column of outputs stands for
    _row_shape: tuple[int, ...]
    loss_names: ClassVar[Mapping[str, str]] = {name: name for name in LOSS_HYPERPARAMETERS}
    rate_name: ClassVar[str] = "lr"
    # What a search puts on the estimator that it clones: where weights for its folds' rows may be known already (candidates
    # that were retrained together, or a best response), and the row numbers of its folds by fingerprint of their rows.
    _known: Sequence[Known] = ()
    _row_numbers: dict[str, np.ndarray] | None = None

    @gradients()
    @with_callbacks
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train from scratch.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, ...)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like of shape (n_samples,), optional
            Weight of each row in the training loss, relative to their mean. Rows of weight zero are left out.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For unusable data or parameters, before any training; and if the training loss is no longer finite.
        TypeError
            If the factory makes no module.
        """
        rows = self._encode(X, y, sample_weight)
        if any(known.fit_known(self, rows) for known in self._known):
            return self
        seed = draw_seed(self.random_state)
        metadata = None if sample_weight is None else {"sample_weight": sample_weight}
        with isolated(seed, self.device), fit_task(self, self.max_epochs, X=X, y=y, metadata=metadata) as end_epoch:
            module = self._build_module()
            objective = self._make_objective(module)
            self._check_outputs(objective, rows.x[:2])
            w = nn.Parameter(objective.initial_weights()[None])

            def trained() -> nn.Module:
                return objective.load_into(copy.deepcopy(module), w[0]).eval()

            stream = Minibatches([rows], self.batch_size, seed=seed)
            self.loss_curve_ = self._train(
                objective, w, stream, lambda: end_epoch(reconstruction_attributes=lambda: {"module_": trained()})
            )
        self._adopt(trained())
        self.n_iter_ = len(self.loss_curve_)
        return self

    def _train(
        self, objective: Objective, w: nn.Parameter, stream: Minibatches, end_epoch: Callable[[], bool]
    ) -> list[float]:
        """Algorithm 1, inner loop: w (1, D) descends L_Train(w, λ, x) in place; the mean loss of each epoch."""
        optimizer, schedule = self._make_optimizer([w], self.max_epochs * stream.steps_per_epoch)
        curve = []
        for epoch in range(1, self.max_epochs + 1):
            total = torch.zeros((), dtype=w.dtype, device=w.device)
            for _ in range(stream.steps_per_epoch):
                loss = objective.train_loss(w, {}, next(stream))
                if not loss.requires_grad:
                    raise ValueError(
                        f"The outputs of {self.module!r} have no gradient: they were detached, or made without one."
                    )
                (w.grad,) = torch.autograd.grad(loss.sum(), w)
                optimizer.step()
                w.grad = None
                schedule.step()
                total += loss.detach()[0]
            curve.append(float(total) / stream.steps_per_epoch)
            if not math.isfinite(curve[-1]):
                raise ValueError(
                    f"{type(self).__name__}: the training loss became {curve[-1]} in epoch {epoch} (lr={self.lr}, "
                    f"{self._loss_values()}). Lower lr, or scale X and y."
                )
            if self.verbose:
                print(f"[{type(self).__name__}] epoch {epoch}/{self.max_epochs}, training loss {curve[-1]:.4f}")
            if end_epoch():
                break
        return curve

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name; if ``deep``, also the keywords of ``module``, ``penalty`` and ``augment``.

        A plain function's keywords are parameters too: ``penalty__strength`` for ``penalty=f`` and ``def f(w, strength=1.0)``.
        """
        params: dict[str, Any] = super().get_params(deep)
        for owner in _OWNERS if deep else ():
            params |= {f"{owner}__{k}": v for k, v in keywords_of(getattr(self, owner)).items()}
        return params

    def set_params(self, **params: Any) -> Self:
        """Set parameters; of a factory or a function whose keywords are set this estimator gets a copy, and the user's stays what it is."""
        whole = {
            name: value for name, value in params.items() if name.partition("__")[0] not in _OWNERS or name in _OWNERS
        }
        super().set_params(**whole)
        rest = {name: value for name, value in params.items() if name not in whole}
        for owner in _OWNERS:
            keywords = {k.removeprefix(f"{owner}__"): v for k, v in rest.items() if k.startswith(f"{owner}__")}
            if not keywords:
                continue
            function = getattr(self, owner)
            if hasattr(function, "set_params"):
                own = clone(function).set_params(**keywords)
            else:
                own = with_keywords(owner, function, keywords)
            setattr(self, owner, own)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def __sklearn_clone__(self) -> Self:
        copy = super().__sklearn_clone__()
        vars(copy).update({name: value for name, value in vars(self).items() if name in ("_known", "_row_numbers")})
        return copy

    # --- parts, shared with hyper-training -------------------------------------------------------------------------

    def _encode(self, X: Any, y: Any, sample_weight: Any = None, *, all_y: Any = None) -> Rows:
        """Check the data, learn what describes them (classes, scales, widths) and return them as tensors.

        The classes are those of ``all_y`` where given: folds that are trained together need the same outputs.
        """
        self._validate_params()
        check_device(self.device)
        X, y = self._validated(X, y)
        self._row_shape = X.shape[1:]
        self._columns = find_columns(self.inputs, self._row_shape, getattr(self, "feature_names_in_", ()), self.device)
        self._codes = find_codes(X, self._columns)
        noisy = find_noisy(X, self._codes)
        for name in ("input_noise", "mixup") if not noisy.any() else ():
            if np.any(getattr(self, name)):
                raise ValueError(f"{name} {NO_NOISE}")
        self._noisy = None if noisy.all() else self._tensor(noisy)
        for name in ("weight_decay", "l1"):
            check_strengths(name, getattr(self, name))
        check_noise(self.input_noise, self._row_shape)
        weight = None
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        if self.sample_weight is not None:
            own = self._own_sample_weight(X, y)
            sample_weight = own if sample_weight is None else own * sample_weight
        if sample_weight is not None:
            X, y, sample_weight = with_weight(X, y, sample_weight)
            weight = self._tensor(sample_weight)
        self._learn_targets(y, sample_weight, y if all_y is None else all_y)
        return Rows(self._rows(X), self._encode_targets(y), weight)

    def _encode_more(self, X: Any, y: Any, sample_weight: Any = None) -> Rows:
        """Further rows (a validation fold) under what :meth:`_encode` learned."""
        X, y = self._validated(X, y, reset=False)
        weight = None
        if sample_weight is not None:
            X, y, sample_weight = with_weight(X, y, _check_sample_weight(sample_weight, X, ensure_non_negative=True))
            weight = self._tensor(sample_weight)
        return Rows(self._rows(X), self._encode_targets(y), weight)

    def _widen(self, width: int, noisy: int) -> None:
        """Rows have so many columns from here on, of which the first ``noisy`` feel noise: a fold that lacks some columns has zeros for them."""
        self._row_shape = (width,)
        self._noisy = self._tensor(np.arange(width) < noisy)

    def _note_rows(self, X: Any, y: Any, number: np.ndarray) -> None:
        """Remember, for this estimator and its clones, which rows of the whole data these are."""
        if self._row_numbers is None:
            return
        known, weight = self._row_numbers.setdefault(fingerprint(*self._validated(X, y)), number), self.sample_weight
        if not np.array_equal(known, number) and (
            weight is None or not np.array_equal(np.asarray(weight)[known], np.asarray(weight)[number])
        ):
            raise ValueError(
                "Two folds train on equal rows, whose values of the parameter sample_weight are not equal or are to be tuned, and a fit of one "
                "fold cannot tell which are its own. Leave out repeated rows, or pass sample_weight to fit: it is split with the rows."
            )

    def _validated(self, X: Any, y: Any, reset: bool = True) -> tuple[np.ndarray, np.ndarray]:
        with config_context(array_api_dispatch=False):  # or tensors stay tensors
            X, y = validate_data(self, X, y, accept_sparse="csr", allow_nd=True, reset=reset, **self._checks(y))
        return dense(X), y

    def _own_sample_weight(self, X: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The parameter ``sample_weight`` for these rows: all of them, or those of a fold that a search knows."""
        weight = np.asarray(self.sample_weight)
        number = self._row_numbers.get(fingerprint(X, y)) if self._row_numbers is not None else None
        if number is not None:
            weight = weight[number]
        if weight.shape != (len(X),):
            raise ValueError(
                f"The parameter sample_weight has shape {weight.shape}, and there are {len(X)} rows. It holds one weight for each "
                "row of fit; in cross-validation pass sample_weight to fit instead, which is split with the rows."
            )
        return _check_sample_weight(weight, X, ensure_non_negative=True)

    def _build_module(self) -> nn.Module:
        """A fresh module from the factory, on the device; raises TypeError if the factory makes no module."""
        n_features_in: Any = self._row_shape[0] if len(self._row_shape) == 1 else self._row_shape
        if self._columns is not None:
            n_features_in = {name: len(columns) for name, columns in self._columns.items()}
        module = build(MLP() if self.module is None else self.module, n_features_in, self.n_outputs_)
        return module.to(device=self.device, dtype=_DTYPES[self.dtype])

    def _make_objective(
        self, module: nn.Module, *, reach: Mapping[str, list[Reach]] | None = None, folds: int = 1
    ) -> Objective:
        # Copies, so that what they count or keep is that of one fit; one object's criterion and penalty stay one object's.
        criterion, penalty, augment = own_copy((self.criterion, self.penalty, self.augment))
        loss = as_loss(criterion, self._losses, torch.empty(0, dtype=_DTYPES[self.dtype], device=self.device))
        if self.penalty is not None:
            check_call(f"penalty {self.penalty!r}", "(weights)", self.penalty, {})
        if self.augment is not None:
            check_call(f"augment {self.augment!r}", "(x, generator)", self.augment, None, None)
        return Objective(
            module,
            loss,
            fixed=self._loss_values(),
            reach=reach,
            penalty=penalty,
            augment=augment,
            inputs=self._columns,
            noisy=self._noisy,
            folds=folds,
        )

    def _make_optimizer(
        self, params: list[nn.Parameter], steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The estimator's optimizer and its schedule over a run of so many steps."""
        return make_optimizer(self.optimizer, self.lr_schedule, params, self.lr, steps)

    def _check_outputs(self, objective: Objective, x: Tensor) -> None:
        noise = rng_state(x.device)
        try:
            outputs = objective.predict(objective.initial_weights()[None], x[None])[0]
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"The module of {self.module!r} does not run on rows of shape {tuple(x.shape[1:])}: {error}"
            ) from error
        if outputs.shape != (len(x), self.n_outputs_):
            raise ValueError(
                f"The module of {self.module!r} maps {len(x)} rows to shape {tuple(outputs.shape)}; expected "
                f"({len(x)}, {self.n_outputs_}): one column per {self._one_output}."
            )
        set_rng_state(noise, x.device)
        ones = outputs.new_ones(len(x))
        if self.criterion == "cross_entropy" and (outputs > 0).all() and torch.allclose(outputs.sum(dim=1), ones):
            warnings.warn(
                f"The outputs of {self.module!r} are positive and sum to one. cross_entropy takes logits: leave out the softmax.",
                UserWarning,
                stacklevel=2,
            )

    def _adopt(self, module: nn.Module) -> Self:
        """Become a fitted estimator around a trained module."""
        self.module_ = module.eval()
        self.n_iter_ = self.max_epochs
        return self

    def _sees(self, name: str) -> bool:
        return True

    def _why_not(self, name: str) -> str | None:
        if name == "label_smoothing" and not isinstance(self.criterion, str):
            return (
                f"needs criterion='cross_entropy' or 'squared_error' on the estimator, got {self.criterion!r}: a "
                "callable's targets cannot be smoothed"
            )
        if name == "weight_decay":
            self._validate_params()
            optimizer, _ = self._make_optimizer([nn.Parameter(torch.zeros(1, device="cpu"))], 1)
            if own := [group["weight_decay"] for group in optimizer.param_groups if group.get("weight_decay")]:
                return (
                    f"the optimizer has a weight decay of its own, {own[0]:g}, besides the one to tune. Leave it to the search: "
                    f"optimizer=functools.partial({type(optimizer).__name__}, weight_decay=0.0)"
                )
        return None

    def _loss_values(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in self.loss_names if name != "sample_weight"
        }  # the rows bring theirs

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A private copy as a tensor of the estimator's dtype on its device."""
        return torch.from_numpy(contiguous(array, self.dtype)).to(self.device)

    def _rows(self, X: np.ndarray) -> Tensor:
        check_codes(X, self._codes, self.dtype)
        return self._tensor(X)

    def _outputs(self, X: Any) -> np.ndarray:
        """Raw outputs of the fitted module, (n_samples, n_outputs)."""
        check_is_fitted(self, "module_")
        with config_context(array_api_dispatch=False):
            X = validate_data(self, X, dtype="numeric", accept_sparse="csr", allow_nd=True, reset=False)
        with torch.no_grad():
            parts = []
            for i in range(0, X.shape[0], _PREDICT_ROWS):
                x = self._rows(dense(X[i : i + _PREDICT_ROWS]))
                if x.dim() == 2:  # a net of a search's fold may be wider than its rows
                    x = F.pad(x, (0, self._row_shape[0] - x.shape[1]))
                args, kwargs = arguments(x, self._columns)
                with explained(self.module_):
                    parts.append(self.module_(*args, **kwargs))
        return torch.cat(parts).cpu().double().numpy()

    def _checks(self, y: Any) -> dict[str, Any]:
        """What scikit-learn's validation is told of these targets."""
        raise NotImplementedError

    def _learn_targets(self, y: np.ndarray, sample_weight: np.ndarray | None, all_y: Any) -> None:
        raise NotImplementedError

    def _encode_targets(self, y: np.ndarray) -> Tensor:
        raise NotImplementedError
