"""Where a GridSearchCV goes the search goes, too: what scikit-learn and its users ask of one."""

from __future__ import annotations

import pickle
from collections import Counter

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config
from numpy.testing import assert_allclose, assert_array_equal
from numpydoc.docscrape import ClassDoc
from optuna.distributions import FloatDistribution
from scipy.stats import loguniform
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone, is_classifier
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer
from sklearn.model_selection import GroupKFold, ParameterGrid, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_param_validation,
    parametrize_with_checks,
)
from torch import nn

from hypertune import MLP, BestResponse, HyperTrainingSearchCV, TorchClassifier, TorchRegressor
from hypertune.base import TorchEstimator
from hypertune.batches import Minibatches
from tests.searches import NET, SPACE, search


class GridProposal(HyperTrainingSearchCV):
    """The proposal replaced by a grid, so that scikit-learn's checks may use any estimator."""

    def _propose_candidates(self):
        return list(ParameterGrid(self.param_distributions))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@parametrize_with_checks([GridProposal(LogisticRegression(), {"C": [0.1, 1.0]}, cv=2, error_score="raise")])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


_CHECKED = {"dtype": "float64", "lr": 2e-2, "max_epochs": 20, "random_state": 0}
_SEARCHED = {"cv": 2, "error_score": "raise", "random_state": 0}
_RANGE = FloatDistribution(1e-6, 1e-1, log=True)  # its repr is a name that every process of the tests gives it


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@parametrize_with_checks([
    HyperTrainingSearchCV(TorchClassifier(**_CHECKED), {"weight_decay": _RANGE}, **_SEARCHED),
    HyperTrainingSearchCV(TorchRegressor(**_CHECKED), {"weight_decay": _RANGE}, **_SEARCHED),
    HyperTrainingSearchCV(
        Pipeline([("scale", StandardScaler()), ("net", TorchClassifier(**_CHECKED))]),
        {"net__weight_decay": _RANGE}, **_SEARCHED,
    ),
])  # fmt: skip
def test_scikit_learns_own_checks_with_a_torch_estimator(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("check", [check_param_validation, check_dataframe_column_names_consistency])
@pytest.mark.parametrize(
    "estimator", [TorchClassifier(max_epochs=2), TorchRegressor(max_epochs=2), search(scoring=None, max_epochs=2, cv=2)]
)
def test_scikit_learns_checks_of_parameters_and_column_names(estimator, check):
    """Two that scikit-learn holds its own estimators to, beyond check_estimator."""
    check(type(estimator).__name__, estimator)


def test_what_is_fitted_is_scikit_learns(fitted, iris):
    X, y = iris
    assert is_classifier(fitted)
    assert fitted.n_splits_ == 3
    assert fitted.refit_time_ > 0
    assert fitted.best_index_ == fitted.cv_results_["rank_test_score"].argmin()
    assert fitted.best_score_ == fitted.cv_results_["mean_test_score"].max()
    assert len(pd.DataFrame(fitted.cv_results_)) == 2
    assert_array_equal(fitted.predict(X), fitted.best_estimator_.predict(X))
    for name, value in fitted.best_params_.items():
        assert type(value) is float
        low, high = SPACE[name].support()
        assert low <= value <= high
    again = clone(NET).set_params(**fitted.best_params_).fit(X, y)
    assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))


@pytest.mark.parametrize("evaluate", ["retrain", "hypernetwork"])
def test_nothing_of_the_users_is_changed(iris, evaluate):
    X, y = (a.copy() for a in iris)
    net = clone(NET)
    made = search(estimator=net, evaluate=evaluate)
    before = repr(made)
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    made.fit(X, y)
    assert repr(made) == before
    assert made.estimator is net
    assert not hasattr(net, "module_")
    assert_array_equal(X, iris[0])
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_same_seed_gives_the_same_result(fitted, iris):
    again = search().fit(*iris)
    assert again.best_params_ == fitted.best_params_
    assert_array_equal(again.cv_results_["mean_test_score"], fitted.cv_results_["mean_test_score"])
    assert_array_equal(again.history_["validation_loss"], fitted.history_["validation_loss"])
    other = search(random_state=1).fit(*iris)
    assert other.best_response_.params != fitted.best_response_.params


@pytest.mark.slow
def test_a_large_model_is_trained_one_sampled_setting_at_a_time_with_the_same_noise(fitted, iris, monkeypatch):
    monkeypatch.setattr("hypertune.algorithms._TOGETHER", 0)
    apart = search().fit(*iris)
    for name in SPACE:
        assert_allclose(apart.history_[name], fitted.history_[name], rtol=1e-3)
    assert_allclose(apart.history_["train_loss"], fitted.history_["train_loss"], rtol=1e-3)


def test_the_documented_attributes_are_the_fitted_ones(fitted):
    documented = {parameter.name for parameter in ClassDoc(HyperTrainingSearchCV)["Attributes"]}
    public = {name for name in vars(fitted) if name.endswith("_") and not name.startswith("_")}
    assert documented - {"feature_names_in_"} == public | {"n_features_in_", "classes_"}


@pytest.mark.parametrize("refit", [False, "accuracy", lambda results: 1])
def test_refit_and_several_metrics_are_scikit_learns(iris, refit):
    found = search(scoring=["accuracy", "neg_log_loss"], refit=refit, max_epochs=4).fit(*iris)
    assert {"mean_test_accuracy", "rank_test_neg_log_loss"} <= set(found.cv_results_)
    assert hasattr(found, "best_estimator_") == bool(refit)
    assert hasattr(found, "best_score_") == isinstance(refit, str)
    if callable(refit):
        assert found.best_index_ == 1


def test_a_failing_candidate_gets_the_error_score(iris):
    """A setting that diverges when retrained is scored as told; if every one fails, that is an error."""
    failing = TorchClassifier(MLP(hidden=(8,)), max_epochs=4, random_state=0)
    make = {"estimator": failing, "evaluate": "retrain", "max_epochs": 3}

    def fit(self, X, y, sample_weight=None, own=TorchClassifier.fit):
        if self.label_smoothing == 0:  # the estimator's own setting
            raise RuntimeError("no luck")
        return own(self, X, y, sample_weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEstimator, "fit", fit)
        patch.setattr(
            "hypertune.proposal.out_of_corners", lambda space, current: current + torch.tensor([0.0, 0.0, 2.0])
        )
        with pytest.warns(FitFailedWarning, match="3 fits failed out of a total of 6"):
            found = search(**make, error_score=-99.0, hyper_lr=1e-3).fit(*iris)
        assert found.cv_results_["mean_test_score"][1] == -99.0
        assert found.best_index_ == 0
        with pytest.raises(RuntimeError, match="no luck"):
            search(**make, error_score="raise", hyper_lr=1e-3).fit(*iris)


@pytest.mark.parametrize("verbose", [1, 2, 3])
def test_verbosity_is_grid_searchs(iris, verbose, capsys):
    search(verbose=verbose, max_epochs=2).fit(*iris)
    printed = capsys.readouterr().out
    assert printed.startswith("Fitting 3 folds for each of 2 candidates, totalling 6 fits\n")
    assert ("[CV] END" in printed) == (verbose == 2)
    assert ("[CV 1/3] END" in printed) == (verbose == 3)


def test_groups_reach_the_splits_of_the_hyper_training(iris):
    """The folds of the hyper-training are the groups': the best response of a fold has not seen its validation rows."""
    X, y = iris
    groups = np.arange(len(y)) % 3
    found = search(cv=GroupKFold(3), max_epochs=2).fit(X, y, groups=groups)
    rows = [fold.valid.x.numpy() for fold in found.best_response_.folds]
    for held_out, (_, valid) in zip(rows, GroupKFold(3).split(X, y, groups), strict=True):
        assert_allclose(held_out, X[valid], rtol=1e-6)


def test_routed_weights_reach_training_and_validation(iris, monkeypatch):
    """With scikit-learn's metadata routing, sample_weight goes where the estimator asks for it, and hyper-training weighs by it."""
    X, y = iris
    weight = 1.0 + (y == 0)
    seen: list = []

    class Recording(Minibatches):
        def __init__(self, folds, *args, **kwargs):
            seen.extend(folds)
            super().__init__(folds, *args, **kwargs)

    for room in ("training", "problem"):
        monkeypatch.setattr(f"hypertune.{room}.Minibatches", Recording)
    with config_context(enable_metadata_routing=True):
        net = clone(NET).set_fit_request(sample_weight=True)
        scorer = get_scorer("accuracy").set_score_request(sample_weight=False)
        found = search(estimator=net, max_epochs=2, scoring=scorer, n_inits=2).fit(X, y, sample_weight=weight)
    for rows in seen + [fold.valid for fold in found.best_response_.folds]:
        expected = 1.0 + (rows.y.numpy() == 0)
        assert_allclose(rows.weight.numpy(), expected / expected.mean(), rtol=1e-6)
    assert len(seen) == 2 * 2 * 3  # training and validation rows, two initial weights on each of three folds
    plain = search(max_epochs=2, scoring="accuracy").fit(X, y)
    assert plain.history_["validation_loss"][-1] != found.history_["validation_loss"][-1]


@pytest.mark.skipif(
    not hasattr(HyperTrainingSearchCV, "set_callbacks"), reason="scikit-learn before 1.9 has no callbacks"
)
def test_callbacks_see_every_epoch_and_every_retraining(iris):
    from sklearn.callback.tests._utils import RecordingCallback

    callback = RecordingCallback()
    search(max_epochs=5).set_callbacks(callback).fit(*iris)
    for hook in ("on_fit_task_begin", "on_fit_task_end"):
        tasks = Counter(record["context"].task_name for record in callback.record if record["name"] == hook)
        assert tasks == {
            "fit": 1, "hyper-training": 1, "epoch": 5, "search": 1, "candidate-split-evaluation": 6,
            "refit-with-best-params": 1,
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(HyperTrainingSearchCV, "set_callbacks"), reason="scikit-learn before 1.9 has no callbacks"
)
def test_progress_bars_reach_the_nets_and_a_callback_may_stop_the_hyper_training(iris, capsys, monkeypatch):
    from sklearn.callback import ProgressBar
    from sklearn.callback.tests._utils import RecordingCallback

    search(max_epochs=2).set_callbacks(ProgressBar()).fit(*iris)  # a warning that it does not arrive would fail
    assert "TorchClassifier" in capsys.readouterr().out

    class StopAfter(RecordingCallback):
        def on_fit_task_end(self, estimator, context, **kwargs):
            return context.task_name == "epoch" and context.task_id == 1

    monkeypatch.setattr(BestResponse, "is_constant", lambda self: True)  # what was stopped is not begun again for that
    found = search(max_epochs=5, start="screened").set_callbacks(StopAfter()).fit(*iris)
    assert found.history_["epoch"][-1] == 2


def test_fit_parameters_of_earlier_steps_reach_them_in_every_fold(iris):
    X, y = iris

    class Marked(TransformerMixin, BaseEstimator):
        seen: list = []  # noqa: RUF012

        def fit(self, X, y=None, mark=None):
            Marked.seen.append(np.array_equal(mark, X[:, -1]))
            return self

        def transform(self, X):
            return X[:, :-1]

    X = np.column_stack([X, np.arange(len(X))])
    net = Pipeline([("marked", Marked()), ("net", NET)])
    space = {"net__weight_decay": loguniform(1e-4, 1)}
    weight = 1.0 + (y == 0)
    found = search(estimator=net, param_distributions=space, max_epochs=2)
    found.fit(X, y, marked__mark=X[:, -1], net__sample_weight=weight)
    assert len(Marked.seen) == 3 + 6 + 1  # hyper-training, verification, refit
    assert all(Marked.seen)
    fold = found.best_response_.folds[0].valid
    expected = 1.0 + (fold.y.numpy() == 0)
    assert_allclose(fold.weight.numpy(), expected / expected.mean(), rtol=1e-6)


def test_routed_weights_go_to_the_steps_that_ask_for_them_and_to_no_other(iris):
    X, y = iris
    weight = 1.0 + (y == 0)
    with config_context(enable_metadata_routing=True):
        scale = StandardScaler().set_fit_request(sample_weight=True)
        net = clone(NET).set_params(max_epochs=2).set_fit_request(sample_weight=False)
        space = {"net__weight_decay": loguniform(1e-4, 1)}
        for step_weight, net_weight in ((True, False), (False, True), (True, True)):
            scale.set_fit_request(sample_weight=step_weight)
            net.set_fit_request(sample_weight=net_weight)
            scorer = get_scorer("accuracy").set_score_request(sample_weight=False)
            pipeline = Pipeline([("scale", scale), ("net", net)])
            found = search(estimator=pipeline, param_distributions=space, scoring=scorer)
            fold = found.fit(X, y, sample_weight=weight).best_response_.folds[0]
            train, _ = next(StratifiedKFold(3).split(X, y))
            mean = np.average(X[train], axis=0, weights=weight[train] if step_weight else None)
            assert_allclose(fold.preprocess[0].mean_, mean)
            assert (fold.valid.weight is not None) == net_weight


def test_it_shows_itself_in_notebooks(fitted):
    assert "TorchClassifier" in fitted._repr_html_()
    assert "HyperTrainingSearchCV" in search()._repr_html_()


def test_splits_may_come_from_a_generator(fitted, iris):
    again = search(cv=StratifiedKFold(3).split(*iris)).fit(*iris)
    assert again.best_params_ == fitted.best_params_


def test_another_proposal_can_be_put_in_its_place(iris):
    found = GridProposal(LogisticRegression(), {"C": [0.01, 1.0]}, cv=3).fit(*iris)
    assert list(found.cv_results_["param_C"]) == [0.01, 1.0]


def test_it_goes_where_a_grid_search_goes(iris):
    """In a pipeline, over a pipeline, inside cross_val_score, with several metrics, pickled."""
    X, y = iris
    assert cross_val_score(make_pipeline(StandardScaler(), search(scoring=None)), X, y, cv=2).min() > 0.8
    over = search(
        estimator=Pipeline([("identity", StandardScaler()), ("net", NET)]),
        param_distributions={f"net__{k}": v for k, v in SPACE.items()},
        scoring=["neg_log_loss", "accuracy"], refit="accuracy", return_train_score=True,
    ).fit(X, y)  # fmt: skip
    assert set(over.best_params_) == {f"net__{k}" for k in SPACE}
    assert over.best_score_ > 0.9
    assert "mean_train_accuracy" in over.cv_results_
    travelled = pickle.loads(pickle.dumps(over))
    assert_array_equal(travelled.predict_proba(X), over.predict_proba(X))
    assert travelled.best_response_.validation_loss() == over.best_response_.validation_loss()


@pytest.mark.slow
def test_a_lambda_factory_reaches_worker_processes_and_travels_by_cloudpickle(iris):
    X, y = iris
    net = TorchClassifier(lambda n, m: nn.Linear(n, m), max_epochs=2, random_state=0)
    found = search(estimator=net, param_distributions={"weight_decay": loguniform(1e-6, 1)}, n_jobs=2).fit(X, y)
    travelled = cloudpickle.loads(cloudpickle.dumps(found))
    assert_array_equal(travelled.predict_proba(X), found.predict_proba(X))
    assert travelled.best_response_.validation_loss() == found.best_response_.validation_loss()
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(found)


class Recorder(TransformerMixin, BaseEstimator):
    seen: list = []  # noqa: RUF012

    def fit(self, X, y=None):
        Recorder.seen.append(X[:, -1].copy())
        return self

    def transform(self, X):
        return X[:, :-1]


def test_preprocessing_is_fitted_inside_each_fold_and_no_outer_row_leaks(iris):
    X, y = iris
    X = np.column_stack([X, np.arange(len(X))])
    Recorder.seen = []
    outer = list(StratifiedKFold(2).split(X, y))
    inner = search(
        estimator=Pipeline([("record", Recorder()), ("net", NET)]),
        param_distributions={"net__weight_decay": loguniform(1e-4, 1)}, scoring=None,
    )  # fmt: skip
    cross_val_score(inner, X, y, cv=outer)
    per_outer = len(Recorder.seen) // 2
    for k, (train, test) in enumerate(outer):
        fits = Recorder.seen[k * per_outer : (k + 1) * per_outer]
        assert not any(set(rows) & set(test) for rows in fits)
        assert any(set(rows) == set(train) for rows in fits)  # the refit
        assert sum(len(rows) < len(train) for rows in fits) == per_outer - 1


def test_it_runs_whatever_mode_and_default_dtype_the_caller_has(iris):
    params = {"estimator": clone(NET).set_params(max_epochs=4), "cv": 2}
    expected = search(**params).fit(*iris)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = search(**params).fit(*iris)
            band = found.best_response_.validation_band("weight_decay", [1e-3])
        assert found.best_params_ == expected.best_params_
        assert_allclose(band, expected.best_response_.validation_band("weight_decay", [1e-3]))
    torch.set_default_dtype(torch.float64)
    try:
        found = search(**params).fit(*iris)
        clone(NET).set_params(max_epochs=1, module__dropout=0.3).fit(*iris)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.best_params_ == pytest.approx(expected.best_params_, rel=1e-4)


def test_a_seed_is_kept_by_threads(iris):
    """Two searches in threads at once give what each gives alone."""
    from joblib import Parallel, delayed

    X, y = iris
    alone = [search(random_state=s, max_epochs=4).fit(X, y).best_response_.params for s in (0, 1)]
    threads = Parallel(n_jobs=2, backend="threading")(
        delayed(search(random_state=s, max_epochs=4).fit)(X, y) for s in (0, 1)
    )
    assert [t.best_response_.params for t in threads] == alone


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "threading"])
@pytest.mark.parametrize("n_jobs", [1, 2, -1])
@pytest.mark.parametrize("threads", [1, 2])
def test_workers_backends_and_threads_change_nothing(fitted, iris, n_jobs, backend, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with parallel_config(backend=backend):
            again = search(n_jobs=n_jobs, pre_dispatch="all").fit(*iris)
    finally:
        torch.set_num_threads(before)
    for name, value in fitted.best_params_.items():
        assert_allclose(again.best_params_[name], value, rtol=1e-4)
    assert_allclose(again.cv_results_["mean_test_score"], fitted.cv_results_["mean_test_score"], rtol=1e-4)
    assert_allclose(again.predict_proba(iris[0]), fitted.predict_proba(iris[0]), rtol=1e-3, atol=1e-6)


def test_n_jobs_changes_nothing(fitted, iris):
    again = search(n_jobs=2).fit(*iris)
    assert again.best_params_ == fitted.best_params_
    assert_allclose(again.cv_results_["mean_test_score"], fitted.cv_results_["mean_test_score"], rtol=1e-6)


def test_a_scorer_that_fits_clones_at_other_settings_gets_fits_of_its_own(iris):
    """What is known of the candidates is not what another length, seed or step size gives."""
    X, y = iris

    def short(estimator, X, y):
        return clone(estimator).set_params(max_epochs=1, random_state=5).fit(X, y).score(X, y)

    for evaluate in ("retrain", "hypernetwork"):
        own = search(scoring=short, return_train_score=True, evaluate=evaluate).fit(X, y)
        params = own.cv_results_["params"][0]
        train, _ = next(StratifiedKFold(3).split(X, y))
        expected = short(clone(NET).set_params(**params), X[train], y[train])
        assert own.cv_results_["split0_train_score"][0] == pytest.approx(expected)


def test_a_fit_that_is_interrupted_leaves_the_results_of_the_one_before_or_none(iris, monkeypatch):
    X, y = iris
    found, never = search(max_epochs=2).fit(X, y), search(max_epochs=2)
    before = {name: value for name, value in vars(found).items() if name.endswith("_")}

    def interrupted(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TorchClassifier, "_train", interrupted)  # the refit: candidates are retrained together
        for own in (found, never):
            with pytest.raises(KeyboardInterrupt):
                own.fit(X, (y == 1).astype(int))
    assert {name for name in vars(found) if name.endswith("_")} == set(before)
    assert all(vars(found)[name] is value for name, value in before.items())
    assert found.predict(X).max() == 2
    assert not [name for name in vars(never) if name.endswith("_")]


def test_autocast_around_a_search_changes_nothing(iris):
    X, y = iris
    expected = search(max_epochs=2).fit(X, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = search(max_epochs=2).fit(X, y)
        assert torch.is_autocast_enabled("cpu")
    assert found.best_params_ == expected.best_params_


def test_what_a_subclass_sets_before_it_fits_is_there_afterwards(iris):
    class Noting(HyperTrainingSearchCV):
        def fit(self, X, y=None, **params):
            self.note_ = "mine"
            return super().fit(X, y, **params)

    noting = Noting(NET, SPACE, cv=3, max_epochs=1, evaluate="hypernetwork", random_state=0)
    assert noting.fit(*iris).note_ == "mine"
    with pytest.raises(ValueError, match="NaN"):
        noting.fit(np.full_like(iris[0], np.nan), iris[1])
    assert noting.note_ == "mine"
    assert noting.predict(iris[0]).shape == (150,)


def test_candidates_have_names(iris):
    found = search(start="screened", max_epochs=20).fit(*iris)
    names, settings = list(found.cv_results_["candidate"]), found.cv_results_["params"]
    assert names[0] == "tuned"
    assert settings[0] == found.best_response_.params
    own = settings[names.index("own")]
    assert own["module__dropout"] == NET.get_params()["module__dropout"]
    assert len(set(names)) == len(names) > 2
    assert list(search(evaluate="hypernetwork", max_epochs=1).fit(*iris).cv_results_["candidate"]) == ["tuned"]


def test_the_module_can_be_trained_on(iris):
    """As a backbone, say; and what was frozen stays so."""

    def half_frozen(n: int, m: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n, 4).requires_grad_(False), nn.Linear(4, m))

    net = TorchClassifier(half_frozen, max_epochs=1, random_state=0)
    found = search(estimator=net, param_distributions={"weight_decay": SPACE["weight_decay"]}).fit(*iris)
    for fitted in (net.fit(*iris), found.best_estimator_, found.best_response_.estimator_at()):
        assert [p.requires_grad for p in fitted.module_.parameters()] == [False, False, True, True]
        assert not fitted.module_.training
