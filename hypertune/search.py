"""The search: scikit-learn's contract around hyper-training. No mathematics.

``HyperTrainingSearchCV`` is a ``BaseSearchCV`` that overrides where its candidates come from. It splits as
``GridSearchCV`` does, hyper-trains all folds together, and hands a short list of candidates (the tuned setting, the screened one
that it started from, the middle between them, the estimator's own, and what may be better beyond these) to scikit-learn's
``evaluate_candidates``, which retrains and scores them. ``cv_results_``, ranks, ``error_score``, multimetric scoring and ``refit`` are scikit-learn's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Self, get_args

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.model_selection import check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.utils import get_tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import _num_samples, indexable
from torch import Tensor

from hypertune.base import TorchEstimator
from hypertune.callbacks import epochs
from hypertune.choices import own_values, split
from hypertune.comparing import compare
from hypertune.folds import DrawnOnce, Fold, last_step, make_folds, net_of, prefix_of
from hypertune.hypergradients import Description
from hypertune.hypernetworks import HYPERNETWORKS, Builder
from hypertune.net import Known
from hypertune.proposal import Chosen, propose
from hypertune.randomness import draw_seed, gradients
from hypertune.recipes import NAMES
from hypertune.response import BestResponse
from hypertune.space import Space
from hypertune.task import Task, stack
from hypertune.training import hyper_train
from hypertune.tunable import check_choices, check_names, check_settings, of_net


class HyperTrainingSearchCV(BaseSearchCV):
    """Hyperparameter search by gradients through a hypernetwork, with cross-validation.

    All folds are trained together, once, while the weights are learned *as a function of the hyperparameters*, which descend
    the validation loss through that function [1]_. For small models a few settings are screened first, to say where to
    start. The tuned setting, that start, the middle between them and the estimator's own setting (and a few more for small
    models, those with BatchNorm and those that overfit in short fits) are then retrained from scratch and scored on every fold, and the best one is refitted
    on all the data.

    Parameters
    ----------
    estimator : TorchClassifier, TorchRegressor, skorch net, or a Pipeline that ends in one
        Earlier steps of a Pipeline are fitted inside each fold.
    param_distributions : dict from str to distribution or list
        Parameter names, as in ``RandomizedSearchCV``, with continuous distributions, frozen ones of ``scipy.stats``
        (``loguniform``, ``uniform``, ...) or ``optuna.distributions.FloatDistribution``, or with lists of values. What has a gradient:
        ``weight_decay``, ``l1``, ``input_noise``, ``label_smoothing``, ``mixup``, ``sample_weight``, the keywords of a ``penalty``
        and an ``augment`` function, and every ``module__…`` keyword that sets a dropout rate or another number which only training
        reads. Beside one of these ``lr``, of which some values are tried before, and any other parameter of the estimator or of a Pipeline's steps
        with a list of values (or a ``CategoricalDistribution``), of which the best is chosen before. The penalties may have a value for each layer, unit, weight or feature, with
        :func:`per_layer`, :func:`per_unit`, :func:`per_weight`, :func:`per_feature` around the distribution. Of a skorch net ``optimizer__weight_decay``, ``criterion__label_smoothing`` and ``module__…`` have a gradient, and lists may be given for ``module``, ``optimizer``, their keywords, ``batch_size`` and ``max_epochs``.
    algorithm : {"auto", "joint", "global", "simplified", "implicit", "t1t2", "unrolled", "forward", "hybrid"} or instance, \
            default="auto"
        "joint", "global" and "simplified" are Algorithms 3, 2 and 4 of the paper: hypernetwork and hyperparameters together,
        with hyperparameters sampled around the current ones; first the hypernetwork over the whole space, then the
        hyperparameters; together, without sampling. "implicit", "t1t2", "unrolled" and "forward" have no hypernetwork, and need a
        training loss that is differentiable in the hyperparameters; "hybrid" is "joint" through a few training steps more.
        An instance, such as ``Implicit(solver="cg")``, is one with other settings: see :mod:`hypertune.hypergradients`.
        "auto" is "joint", with the implicit gradient for hyperparameters of more than 1,000 values and ``sample_weight``.
    hypernetwork : {"linear", "low_rank", "mlp", "gated"} or instance, default="linear"
        The family of best responses; see :mod:`hypertune.hypernetworks`. An instance is a description with other
        sizes, such as ``LowRank(rank=20)``.
    start : {"screened", "estimator"}, default="screened"
        Where the hyperparameters start: at the best of a few settings that are trained first, or at the estimator's own (a
        logarithmic one that is at the bound of its range, such as a ``weight_decay`` of 0, at quantile 1/3 of its distribution).
        Screened are small models that can be stacked; and, if a logarithmic hyperparameter is tuned, those with BatchNorm that are
        larger or cannot be stacked, on one fold. Not with ``evaluate="hypernetwork"``, ``algorithm="global"`` or ``sample_weight``. "screened" also
        begins again, with less regularisation, where nothing but a constant prediction was left at the end. "estimator" verifies the tuned
        setting and the estimator's own only. An ``lr`` or a list in the space needs "screened".
    evaluate : {"retrain", "hypernetwork"}, default="retrain"
        How the candidates are scored: by retraining each from scratch on every fold, or (the paper's return value, for
        the tuned setting only) by the weights that the hypernetwork gives, which retrains nothing.
    max_epochs : int, default=None
        Length of the hyper-training; None means the estimator's own ``max_epochs``.
    scale : float, default=None
        Standard deviation σ of the sampled hyperparameters around the current ones, in units of λ (a factor of e
        for log distributions, a quarter of the range for bounded ones). None means 0.5 for "joint", and sampling from
        ``param_distributions`` themselves for "global".
    grain_scale : float or "auto", default=1.0
        Standard deviation, in units of λ, of a prior that holds the values of one hyperparameter (for each layer, unit, ...) around
        their mean, so that many of them do not overfit few validation rows. "auto" chooses it by four more hyper-trainings on half
        of the validation rows, compared on the other half. None means no prior; ``sample_weight`` has none.
    n_samples : int, default=None
        Hyperparameter settings m sampled per minibatch; an even number is drawn in antithetic pairs. None means 2 for
        "joint" and 8 for "global".
    n_inits : int, default=None
        Networks for each fold, with initial weights of their own, that share λ: the mean of their hypergradients is less noisy.
        None means up to 3 for small models, for which they cost about a third of the hyper-training's time.
    hyper_lr : float, default=0.05
        Step size β of the hyperparameters' Adam for each training step, in units of λ. In runs of more than 1,200 steps it
        shrinks as 1,200 / steps: the weights need longer to respond.
    hyper_lr_schedule : {"linear", "constant"}, default="linear"
        "linear" lets the step size fall to zero at the end.
    hyper_eps : float, default=0.01
        Epsilon of that Adam, in nats for each unit of λ: where the slope of the validation loss is well below it, steps are small.
    warmup : float, default=1/3
        Share of the run before the hyperparameters may move; "global" has a first loop of its own, three quarters of the run.
    averaging : float, default=0.25
        Share of the run, at its end, over which the path is averaged into the tuned setting.
    response_optimizer : {"tangent", "plain"}, default="tangent"
        "tangent" gives the response the preconditioner of the weights; "plain" is one optimizer for everything, as in
        the paper.
    scoring : str, callable, list, tuple or dict, default=None
        How retrained candidates are scored, as in ``GridSearchCV``; None means the estimator's ``score``. The
        hyper-training itself descends the estimator's criterion on the validation rows.
    n_jobs : int, default=None
        Fits of candidates × folds in parallel, where these cannot be retrained in one stacked pass; otherwise only scoring is
        parallel. The hyper-training is one process.
    refit : bool, str or callable, default=True
        Refit the estimator on all the data with the best setting, as in ``GridSearchCV``.
    cv : int, cross-validation generator or iterable, default=None
        The splits, as in ``GridSearchCV``. One λ is shared by all of them.
    verbose : int, default=0
        As in ``GridSearchCV``; if positive, also progress bars of the values of lists and of the hyper-training.
    pre_dispatch : int or str, default='2*n_jobs'
        As in ``GridSearchCV``.
    random_state : int, RandomState instance or None, default=None
        Seeds the hyper-training. The estimator has its own.
    error_score : 'raise' or numeric, default=np.nan
        Score of a candidate whose fit fails, as in ``GridSearchCV``.
    return_train_score : bool, default=False
        Whether ``cv_results_`` includes training scores.

    Attributes
    ----------
    cv_results_ : dict of arrays
        As in ``GridSearchCV``; one row per candidate, with its name under "candidate": "tuned", "middle", "start", "own",
        "stronger"; "tuned x 1.5" where it is half as far again from the tuned setting as the best of these; "lr / 2" and "lr x 2", which
        are the best of these with other learning rates; "noisier", "noisier x 2" and "noisier x 3"; and "own values", the best of
        these by validation loss (or "tuned", where they cannot be retrained together) with the estimator's own values of what has a list. Of small skorch nets
        "tuned", the best of these and "own" alone. What only luck with few validation rows would make the best is left out, but for "tuned" and "own". ``mean_fit_time`` does not include the stacked passes in which candidates are retrained together.
    best_estimator_ : estimator
        Refitted on all the data with ``best_params_``; only if ``refit``.
    best_score_ : float
        Mean cross-validated score of ``best_estimator_``. Optimistic, as ``GridSearchCV``'s is: the hyperparameters
        were fitted to these folds. The honest figure is ``cross_val_score`` of the whole search.
    best_params_ : dict
        The best setting, inside the declared bounds: a value of the list, or a float for each name, or where it has several values what the estimator takes: a
        dict from parameter name of the module to floats or arrays, or an array.
    best_index_ : int
        Its row in ``cv_results_``.
    scorer_ : callable or dict
        The scorer(s).
    n_splits_ : int
        Number of folds.
    refit_time_ : float
        Seconds of the refit.
    multimetric_ : bool
        Whether several metrics were computed.
    best_response_ : BestResponse
        The learned best response, at one learning rate and one value of each list: weights, a fitted estimator or a validation curve at any setting, without training.
    history_ : dict of arrays
        The hyper-training: "algorithm" (a string: which one ran, and why), "grain_scale", and the learning rate that it had (a number, under
        its name), if that is in the space; and for each record "step", "seconds", "epoch",
        "train_loss" and "validation_loss" (means over folds, the latter on at most 1,000 validation rows of each, of costly models
        256), and the value of each hyperparameter under its name.
    n_features_in_ : int
        Number of features seen during fit; only if ``refit``.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, if X had string column names and the estimator keeps them.
    classes_ : ndarray of shape (n_classes,)
        Class labels of a classifier; only if ``refit``.

    See Also
    --------
    sklearn.model_selection.GridSearchCV : Exhaustive search, one training run per setting and fold.
    sklearn.model_selection.RandomizedSearchCV : Random search over the same distributions.

    References
    ----------
    .. [1] Lorraine & Duvenaud (2018), *Stochastic Hyperparameter Optimization through Hypernetworks*, arXiv:1802.09419.

    Examples
    --------
    >>> from scipy.stats import loguniform, uniform
    >>> from sklearn.datasets import load_wine
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from hypertune import HyperTrainingSearchCV, MLP, TorchClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> search = HyperTrainingSearchCV(
    ...     make_pipeline(StandardScaler(), TorchClassifier(MLP(hidden=(16,)), max_epochs=20, random_state=0)),
    ...     {"torchclassifier__weight_decay": loguniform(1e-6, 1e1),
    ...      "torchclassifier__module__dropout": uniform(0, 0.8)},
    ...     cv=3, random_state=0).fit(X, y)
    >>> sorted(search.best_params_)
    ['torchclassifier__module__dropout', 'torchclassifier__weight_decay']
    """

    estimator: Any
    cv: Any

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseSearchCV._parameter_constraints,
        "param_distributions": [Mapping],
        "algorithm": [StrOptions(set(NAMES)), *get_args(Description)],
        "hypernetwork": [StrOptions(set(HYPERNETWORKS)), HasMethods("build")],
        "start": [StrOptions({"screened", "estimator"})],
        "evaluate": [StrOptions({"retrain", "hypernetwork"})],
        "max_epochs": [None, Interval(Integral, 1, None, closed="left")],
        "scale": [None, Interval(Real, 0, None, closed="neither")],
        "grain_scale": [None, StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "n_samples": [None, Interval(Integral, 1, None, closed="left")],
        "n_inits": [None, Interval(Integral, 1, None, closed="left")],
        "hyper_lr": [Interval(Real, 0, None, closed="neither")],
        "hyper_lr_schedule": [StrOptions({"linear", "constant"})],
        "hyper_eps": [Interval(Real, 0, None, closed="neither")],
        "warmup": [Interval(Real, 0, 1, closed="left")],
        "averaging": [Interval(Real, 0, 1, closed="left")],
        "response_optimizer": [StrOptions({"tangent", "plain"})],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        estimator: Any,
        param_distributions: Mapping[str, Any],
        *,
        algorithm: str | Description = "auto",
        hypernetwork: str | Builder = "linear",
        start: str = "screened",
        evaluate: str = "retrain",
        max_epochs: int | None = None,
        scale: float | None = None,
        grain_scale: float | str | None = 1.0,
        n_samples: int | None = None,
        n_inits: int | None = None,
        hyper_lr: float = 0.05,
        hyper_lr_schedule: str = "linear",
        hyper_eps: float = 1e-2,
        warmup: float = 1 / 3,
        averaging: float = 0.25,
        response_optimizer: str = "tangent",
        scoring: Any = None,
        n_jobs: int | None = None,
        refit: Any = True,
        cv: Any = None,
        verbose: int = 0,
        pre_dispatch: Any = "2*n_jobs",
        random_state: Any = None,
        error_score: Any = np.nan,
        return_train_score: bool = False,
    ):
        self.param_distributions = param_distributions
        self.algorithm = algorithm
        self.hypernetwork = hypernetwork
        self.start = start
        self.evaluate = evaluate
        self.max_epochs = max_epochs
        self.scale = scale
        self.grain_scale = grain_scale
        self.n_samples = n_samples
        self.n_inits = n_inits
        self.hyper_lr = hyper_lr
        self.hyper_lr_schedule = hyper_lr_schedule
        self.hyper_eps = hyper_eps
        self.warmup = warmup
        self.averaging = averaging
        self.response_optimizer = response_optimizer
        self.random_state = random_state
        super().__init__(
            estimator=estimator,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            error_score=error_score,
            return_train_score=return_train_score,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags = copy.deepcopy(get_tags(self.estimator).target_tags)
        return tags

    # --- scikit-learn's extension points ------------------------------------------------------------------------------

    @gradients()
    def fit(self, X: Any, y: Any = None, **params: Any) -> Self:
        """Tune, verify and refit.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, ...)
            Training data.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Target.
        **params : dict
            Passed to the ``fit`` of the estimator, the scorer and the splitter, as in ``GridSearchCV``.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            Before any training, for a space, data or a model that cannot be tuned; during it, if the loss diverges.
        """
        own = {"estimator": self.estimator, "cv": self.cv}
        earlier = {name: vars(self)[name] for name in self._fitted()}
        for name in ("history_", "best_response_"):
            self.__dict__.pop(name, None)
        net = last_step(self.estimator)
        self._known: list[Known] = []
        self._given = self.estimator
        try:
            if isinstance(net, TorchEstimator):
                # The clones of this one look here for weights that are known already, and for the numbers of their rows.
                self.estimator = clone(self.estimator)
                last_step(self.estimator)._known = self._known
                if net.sample_weight is not None or self._weighs_rows():
                    last_step(self.estimator)._row_numbers = {}
            elif self.evaluate == "hypernetwork":
                raise ValueError("evaluate='hypernetwork' needs a TorchClassifier or TorchRegressor; use 'retrain'.")
            self._inputs = indexable(X, y)
            super().fit(X, y, **params)
        except BaseException:
            for name in set(self._fitted()) - set(earlier):
                del self.__dict__[name]
            self.__dict__.update(earlier)  # the results are those of the last whole fit, if there was one
            raise
        finally:
            self._known.clear()  # the nets of best_response_ know the same list
            self.__dict__.update(own)
            for name in ("_inputs", "_given", "_routed", "_known", "_callback_ctx"):
                self.__dict__.pop(name, None)
        if hasattr(self, "best_estimator_") and isinstance(net := last_step(self.best_estimator_), TorchEstimator):
            for name in ("_known", "_row_numbers"):
                net.__dict__.pop(name, None)
        return self

    def _fitted(self) -> list[str]:
        own = self._get_param_names()
        return [name for name in vars(self) if name.endswith("_") and not name.startswith("_") and name not in own]

    def _weighs_rows(self) -> bool:
        """Whether a weight for each row is among the hyperparameters."""
        space = self.param_distributions  # not validated yet
        return isinstance(space, Mapping) and f"{prefix_of(self.estimator)}sample_weight" in space

    def _get_routed_params_for_fit(self, params: Any) -> Any:
        if self._inputs[1] is None and get_tags(self).target_tags.required:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: the validation loss needs it."
            )
        routed = super()._get_routed_params_for_fit(params)
        self._routed = routed
        self.cv = DrawnOnce(check_cv(self.cv, self._inputs[1], classifier=is_classifier(self.estimator)))
        return routed

    def _init_callback_context(
        self, task_name: str = "fit", task_id: int = 0, max_subtasks: int = 0, sequential_subtasks: bool = True
    ) -> Any:
        # scikit-learn counts the search and the refit; the hyper-training is one task more.
        return super()._init_callback_context(task_name, task_id, max_subtasks + 1, sequential_subtasks)

    def _run_search(self, evaluate_candidates: Any, *, callback_ctx: Any = None) -> None:
        self._callback_ctx = callback_ctx
        proposed, names = self._propose_candidates(), {}
        if isinstance(proposed, Mapping):
            names = {"more_results": {"candidate": [*proposed]}}
        candidates = [*proposed.values()] if isinstance(proposed, Mapping) else proposed
        if callback_ctx is None:
            evaluate_candidates(candidates, **names)
            return
        search_ctx = callback_ctx.subcontext(
            task_name="search", max_subtasks=len(candidates) * self.n_splits_, sequential_subtasks=False
        ).call_on_fit_task_begin(estimator=self)
        evaluate_candidates(candidates, callback_ctx=search_ctx, **names)
        search_ctx.call_on_fit_task_end(estimator=self)

    # --- the proposal -------------------------------------------------------------------------------------------------

    def _propose_candidates(self) -> Mapping[str, dict[str, Any]] | list[dict[str, Any]]:
        """Hyper-train, and return the settings to verify, by name. A subclass may put any other proposal in its place, without names too."""
        chosen = self._choose()
        retrains, n_epochs = self.evaluate == "retrain", self._epochs()  # which may have been chosen
        found = propose(
            chosen,
            self._tuner,
            partial(self._hyper_training_task, n_epochs),
            epochs=n_epochs,
            screened=self.start == "screened" and retrains,
            learned_everywhere=self.algorithm == "global",
            retrains=retrains,
            grain_scale=self.grain_scale,
            watched=self._is_watched(),
            ours=isinstance(net_of(self.estimator), TorchEstimator),
            prefix=prefix_of(self.estimator),
        )
        self.history_, self.best_response_ = found.history, found.response
        self._known += found.known
        return found.settings

    def _choose(self) -> Chosen:
        """Give our copy of the estimator the best values of what has a list of them."""
        choices, ranges = self._split()
        if not choices:
            return Chosen(self._make_task(), {}, None, None)
        net, prefix, settings = net_of(self._given), prefix_of(self._given), self._settings(self._given)
        check_choices(type(self.estimator).__name__, settings, choices, ranges, net, prefix)
        self._check_tried([*choices])
        if self.estimator is self._given:
            self.estimator = clone(self.estimator)
        first = own_values(choices, settings)
        values, own, tried = compare(choices, first, self.estimator, self._make_task, progress=self.verbose > 0)
        return Chosen(self._make_task(), values, None if values is first else own, tried)

    def _split(self) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """What has a list of values and no gradient, and the rest of the space."""
        net, prefix = net_of(self.estimator), prefix_of(self.estimator)
        return split(self.param_distributions, {prefix + name for name in (*net.loss_names, net.rate_name)})

    def _make_task(self) -> Task:
        """What is to be trained; refuses what cannot be."""
        net, prefix = net_of(self.estimator), prefix_of(self.estimator)
        choices, ranges = self._split()
        space = of_net(net, Space.from_distributions(ranges, prefix))
        settings = self._settings(self.estimator)
        check_settings(type(self.estimator).__name__, settings, space, prefix)
        check_names(net, space)
        self._check_tried([h.name for h in space.hyperparameters if h.is_rate] + [*choices])
        grains = {h.grain for h in space.hyperparameters}
        seed, folds = draw_seed(self.random_state), self._folds(grains)
        space, objective = stack(space, folds, _num_samples(self._inputs[0]), seed)
        current = space.encode({name: settings[name] for name in space.names})  # moved into the declared bounds
        return Task(space, folds, objective, current, seed)

    def _check_tried(self, names: list[str]) -> None:
        if names and (self.start != "screened" or self.evaluate != "retrain"):
            raise ValueError(
                f"param_distributions[{names[0]!r}]: it is found by trying some values first, and by retraining: that needs start='screened' and "
                f"evaluate='retrain' (check_hypergradient sets 'hypernetwork'), got start={self.start!r} and evaluate={self.evaluate!r}. Set it on the estimator."
            )

    def _epochs(self) -> int:
        return int(net_of(self.estimator).max_epochs if self.max_epochs is None else self.max_epochs)

    def _tuner(self, start: Tensor) -> Callable[..., tuple[BestResponse, dict[str, Any]]]:
        """A hyper-training of a task, with the search's own parameters."""
        return partial(
            hyper_train,
            start=start,
            algorithm=self.algorithm,
            hypernetwork=HYPERNETWORKS[self.hypernetwork] if isinstance(self.hypernetwork, str) else self.hypernetwork,
            response_optimizer=self.response_optimizer,
            max_epochs=self._epochs(),
            scale=self.scale,
            n_samples=self.n_samples,
            n_inits=self.n_inits,
            hyper_lr=self.hyper_lr,
            hyper_lr_schedule=self.hyper_lr_schedule,
            hyper_eps=self.hyper_eps,
            warmup=self.warmup,
            averaging=self.averaging,
            progress=self.verbose > 0,
        )

    def _is_watched(self) -> bool:
        """Whether someone wants to see every fit."""
        net = net_of(self.estimator)
        return hasattr(self, "_skl_callbacks") or hasattr(net, "_skl_callbacks") or bool(getattr(net, "verbose", False))

    @contextmanager
    def _hyper_training_task(self, n_epochs: int) -> Iterator[Callable[..., bool]]:
        context = self._callback_ctx
        if context is not None:
            context = context.subcontext(task_name="hyper-training", max_subtasks=n_epochs)
            context.call_on_fit_task_begin(estimator=self)
        with epochs(self, context, n_epochs) as end_epoch:
            yield end_epoch
        if context is not None:
            context.call_on_fit_task_end(estimator=self)

    def _settings(self, estimator: Any) -> dict[str, Any]:
        """All parameters of the estimator with their current values, also those that were never set on it."""
        prefix = prefix_of(estimator)
        own = {prefix + name: value for name, value in net_of(estimator).get_params().items()}
        settings = own | estimator.get_params()
        if settings.get(name := f"{prefix}sample_weight", 1.0) is None:
            settings[name] = 1.0  # what no weight means
        return settings

    def _folds(self, grains: set[Any]) -> list[Fold]:
        """The splits of ``cv``, as scikit-learn would give them to the estimator; ``grains`` are those of the hyperparameters."""
        X, y = self._inputs
        return make_folds(
            self.estimator,
            X,
            y,
            self.cv.split(X, y, **self._routed.splitter.split),
            self._routed.estimator.fit,
            weighs_rows=self._weighs_rows(),
            pads=self.evaluate == "retrain" and not grains & {"unit", "feature", "weight"},
            by_column=bool(grains & {"feature", "weight"}),
        )
