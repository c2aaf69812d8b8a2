"""A fitted search as an Optuna study."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from scipy.stats import expon, lognorm, loguniform, norm, uniform
from sklearn.exceptions import NotFittedError
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, per_feature, per_layer, per_unit
from hypertune.optuna import to_study

SPACE = {
    "weight_decay": per_layer(loguniform(1e-6, 1e1)),
    "module__dropout": uniform(0, 0.5),
    "input_noise": per_feature(uniform(0, 1)),
}


def search(space=SPACE, **params) -> HyperTrainingSearchCV:
    net = TorchClassifier(MLP(hidden=(4,)), max_epochs=2, random_state=0)
    return HyperTrainingSearchCV(net, space, cv=3, random_state=0, **params)


class Shifted(nn.Linear):
    def __init__(self, n_features_in, n_outputs, *, shift=0.0):
        super().__init__(n_features_in, n_outputs)
        self.shift = shift

    def forward(self, x):
        return super().forward(x) * (1 + self.shift if self.training else 1.0)


@pytest.fixture(scope="module")
def fitted(iris):
    return search().fit(*iris)


def test_each_candidate_is_a_trial_with_its_score(fitted):
    study = to_study(fitted)
    results = fitted.cv_results_
    assert [trial.value for trial in study.trials] == results["mean_test_score"].tolist()
    assert study.best_value == fitted.best_score_
    assert study.best_trial.number == fitted.best_index_
    for row, trial in enumerate(study.trials):
        assert trial.user_attrs["split2_test_score"] == results["split2_test_score"][row]
        assert trial.user_attrs["mean_fit_time"] == results["mean_fit_time"][row]
        assert "rank_test_score" not in trial.user_attrs


def test_each_number_of_a_setting_is_a_parameter_in_its_declared_range(fitted):
    trial, best = to_study(fitted).best_trial, fitted.best_params_
    names = [f"weight_decay[{layer}]" for layer in best["weight_decay"]]
    assert list(trial.params) == [*names, "module__dropout", *(f"input_noise[{i}]" for i in range(4))]
    assert trial.params[names[0]] == next(iter(best["weight_decay"].values()))
    assert trial.params["input_noise[3]"] == best["input_noise"][3]
    assert all(type(value) is float for value in trial.params.values())
    assert trial.distributions[names[0]] == optuna.distributions.FloatDistribution(1e-6, 1e1, log=True)
    assert trial.distributions["module__dropout"] == optuna.distributions.FloatDistribution(0, 0.5)


def test_optuna_goes_on_from_there(fitted):
    study = to_study(fitted, optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0)))
    before = len(study.trials)
    study.optimize(lambda trial: trial.suggest_float("module__dropout", 0, 0.5), n_trials=1)
    assert len(study.trials) == before + 1


def test_unbounded_ranges_end_in_their_tails(iris):
    trial = to_study(
        search({"module__shift": norm(0, 1)}, refit=False).set_params(estimator__module=Shifted).fit(*iris)
    ).trials[-1]
    distribution = trial.distributions["module__shift"]
    assert distribution.low < -3 < 3 < distribution.high
    assert not distribution.log
    for own in (-10.0, 10.0):  # beyond the tails, with the estimator's own value
        found = search({"module__shift": norm(0, 1)}).set_params(
            estimator__module=Shifted, estimator__module__shift=own
        )
        trials = [t for t in to_study(found.fit(*iris)).trials if t.params["module__shift"] == pytest.approx(own)]
        reach = trials[0].distributions["module__shift"]
        assert own == pytest.approx(reach.low if own < 0 else reach.high)


@pytest.mark.parametrize(("prior", "log"), [(lognorm(1), False), (expon(loc=0.5), False), (loguniform(0.5, 2), True)])
def test_an_axis_is_logarithmic_where_a_factor_in_the_value_is_a_step(iris, prior, log):
    """Not where it is one in the distance to a lower bound."""
    fitted = search({"weight_decay": prior}).fit(*iris)
    distribution = to_study(fitted).trials[0].distributions["weight_decay"]
    assert distribution.log == log
    assert distribution.low == prior.support()[0]
    assert fitted.best_response_.space.hyperparameters[0].has_log_axis == (prior.support()[0] == 0 or log)


def test_a_failed_candidate_is_a_failed_trial(fitted, monkeypatch):
    scores = fitted.cv_results_["mean_test_score"].copy()
    scores[0] = np.nan
    monkeypatch.setitem(fitted.cv_results_, "mean_test_score", scores)
    assert to_study(fitted).trials[0].state == optuna.trial.TrialState.FAIL


def test_of_several_metrics_it_is_the_refitted_one(iris):
    scoring = ["accuracy", "neg_log_loss"]
    one = search({"weight_decay": loguniform(1e-6, 1e1)}, scoring=scoring, refit="neg_log_loss").fit(*iris)
    assert to_study(one).best_value == one.best_score_
    assert "mean_test_accuracy" not in to_study(one).best_trial.user_attrs
    with pytest.raises(ValueError, match="several metrics"):
        to_study(search({"weight_decay": loguniform(1e-6, 1e1)}, scoring=scoring, refit=False).fit(*iris))


def test_what_cannot_be_a_study_is_refused(fitted, iris):
    with pytest.raises(NotFittedError):
        to_study(search())
    with pytest.raises(ValueError, match=r"directions are \['minimize'\]"):
        to_study(fitted, optuna.create_study())
    wide = search({"weight_decay": per_unit(loguniform(1e-6, 1e1))}).set_params(
        estimator__module=MLP(hidden=(1_100,)), estimator__max_epochs=4
    )
    with pytest.raises(ValueError, match="1103 numbers"):
        to_study(wide.fit(*iris))
