"""A learning rate in the space: tried first, trained with, and verified."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import lognorm, loguniform, norm, uniform
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, check_hypergradient, model_factory, starts
from hypertune.optuna import to_study
from hypertune.retraining import Retrained
from hypertune.starts import screen, screen_rate
from tests.searches import assert_scores_are_those_of_own_fits
from tests.test_retraining import NET, Coupled, Keeping

SPACE = {"weight_decay": loguniform(1e-6, 1e1), "lr": loguniform(1e-4, 1e-1), "module__dropout": uniform(0, 0.5)}


def search(net=NET, space=SPACE, **params) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(net, space, **{"cv": 3, "random_state": 0, "error_score": "raise", **params})


@pytest.fixture
def screened(iris, monkeypatch):
    """The learning rate that is found where validation losses are ``loss`` of (lr, weight_decay), and the stacks that were trained for it."""

    def run(loss, net=NET, space=SPACE, cv=3, seen=None, **params):
        task = Keeping(clone(net).set_params(max_epochs=1, **params), space, cv=cv, random_state=0).fit(*iris).task
        stacks, settings = [], [] if seen is None else seen

        def losses(self, folds):
            values = self.space.values(self.lam)
            stacks.append((len(folds), values["lr"].numpy().round(6).tolist()))
            settings.extend(self.space.decode(lam) | {"seed": self.seed} for lam in self.lam)
            each = loss(values["lr"], values.get("weight_decay", values["lr"])).double()
            return each.expand(len(folds), -1) if each.dim() == 1 else each

        with monkeypatch.context() as patch:
            patch.setattr(Retrained, "fold_losses", losses)
            lam = screen_rate(task)
        assert {fold.net.lr for fold in task.folds} == {task.folds[0].net.lr}
        assert_allclose(lam[~task.space.rate], task.current[~task.space.rate])
        return task.space.decode(lam)["lr"], stacks

    return run


def parabola(best, decay=0.0):
    """Of log lr around ``best``; ``decay`` is what a weight decay adds to the losses."""
    return lambda lr, wd: ((lr / best).log() ** 2 / 10 + decay * (wd > 1e-4)).exp()


QUANTILES = loguniform(1e-4, 1e-1).ppf([0.1, 0.3, 0.5, 0.7, 0.9])


def test_the_estimators_own_and_five_quantiles_are_tried_in_one_stack(screened):
    found, [(folds, rates)] = screened(parabola(0.006), lr=0.1)
    assert found == pytest.approx(0.006)
    assert (folds, len(rates)) == (3, 18)
    assert_allclose(sorted(set(rates)), sorted([*QUANTILES, 0.1]), atol=1e-6)
    for lr in (2e-3, 3e-3, 5e-3):  # in the place of the quantile .00316
        _, [(_, rates)] = screened(parabola(0.006), lr=lr)
        assert_allclose(sorted(set(rates)), sorted([*QUANTILES[[0, 1, 3, 4]], lr]), atol=1e-6)


def test_they_are_tried_with_weak_and_with_strong_regularisation(screened):
    """As they are; logarithmic ones at their medians; the rest at quantile 0.25 too. On as many folds as is cheap; larger models without the second."""
    own = {"weight_decay": 1e-6, "module__dropout": 0.1}
    median, strong = own | {"weight_decay": loguniform(1e-6, 1e1).median()}, {"module__dropout": 0.125}
    for wide, cv, rows, (folds, size) in [
        ({}, 3, [own, median, median | strong], (3, 15)),
        (
            {"module": MLP(hidden=(110, 110), dropout=0.1)},
            4,
            [own, median, median | strong],
            (3, 15),
        ),  # 12,870 x 15 x 3 < 600,000
        ({"module": MLP(hidden=(400, 400), dropout=0.1)}, 3, [own, median | strong], (1, 1)),
    ]:
        seen = []
        _, stacks = screened(parabola(0.006), cv=cv, seen=seen, lr=3e-3, random_state=None, **wide)
        found = [{name: one[name] for name in own} for one in seen]
        assert stacks[0][0] == folds
        assert len(stacks[0][1]) == size
        assert [one for i, one in enumerate(found) if i == 0 or one != found[i - 1]] == [
            pytest.approx(row) for row in rows
        ]
        assert len({one["seed"] for one in seen}) == 1  # all from the same initial weights
    assert (
        len(screened(parabola(0.006), space={name: SPACE[name] for name in ("weight_decay", "lr")})[1][0][1]) == 2 * 5
    )
    assert (
        len(screened(parabola(0.006), space={name: SPACE[name] for name in ("module__dropout", "lr")})[1][0][1])
        == 2 * 5
    )


def test_the_best_of_all_losses_tells(screened):
    """Of those with a weight decay, if they are better with their learning rate than the others with theirs."""

    def loss(lr, wd):
        return torch.where(wd > 1e-4, 0.9 * parabola(0.02)(lr, wd), parabola(5e-4)(lr, wd))

    assert screened(loss)[0] == pytest.approx(0.02)
    assert screened(lambda lr, wd: loss(lr, wd) + (wd > 1e-4))[0] == pytest.approx(5e-4)


def test_a_gain_within_one_standard_error_over_folds_is_no_reason_to_leave_the_own_one(screened):
    """On folds where another is better by 0.3, 0.1 and x in a third of the loss; the standard error of these is that of x."""

    def loss(x):
        return lambda lr, wd: (
            3 - torch.tensor([0.3, 0.1, x])[:, None] * torch.isclose(lr, torch.tensor(QUANTILES[3])).double()
        )

    for x, kept in ((0.1, False), (-0.05, False), (-0.2, True)):  # mean / standard error: 2.5, 1.1 and 0.5
        gains = np.array([0.3, 0.1, x])
        assert (gains.mean() <= gains.std(ddof=1) / np.sqrt(3)) == kept
        found, _ = screened(loss(x), lr=1e-3)
        assert (found == pytest.approx(1e-3)) == kept


def test_at_an_end_and_beside_what_diverged_it_is_the_best_itself(screened):
    assert screened(parabola(1.0))[0] == pytest.approx(QUANTILES[-1])
    assert screened(parabola(1e-6))[0] == pytest.approx(QUANTILES[0])
    assert screened(lambda lr, wd: torch.where(lr > 0.011, torch.inf, parabola(0.02)(lr, wd)), lr=0.01)[
        0
    ] == pytest.approx(0.01)
    negative = screened(lambda lr, wd: (lr / 0.02).log() ** 2 - 5)[0]  # as a criterion may be
    assert negative == pytest.approx(QUANTILES[3])
    for wide in ({}, {"module": MLP(hidden=(400, 400))}):
        with pytest.raises(ValueError, match=r"learning rates from 0.0002 upwards all diverge: give smaller ones"):
            screened(lambda lr, wd: torch.full_like(lr, torch.inf), **wide)


def test_larger_models_climb_from_their_own_on_one_fold(screened):
    """Upwards while it gets better, downwards only if it does not: once as they are, once regularised."""
    wide = {"module": MLP(hidden=(400, 400)), "lr": 1e-3}
    found, stacks = screened(parabola(0.011, decay=1.0), **wide)
    assert found == pytest.approx(0.011)
    climbed = [rates[0] for _, rates in stacks]
    assert_allclose(climbed, 2 * [1e-3, *QUANTILES[2:]], atol=1e-6)
    assert {(folds, len(rates)) for folds, rates in stacks} == {(1, 1)}
    _, stacks = screened(parabola(1e-4), **wide)
    assert_allclose([rates[0] for _, rates in stacks], 2 * [1e-3, QUANTILES[2], QUANTILES[0]], atol=1e-6)
    found, _ = screened(
        lambda lr, wd: torch.where(lr > 2e-4, torch.inf, lr), **wide | {"lr": 0.03}
    )  # and so do others below it
    assert found == pytest.approx(QUANTILES[0])
    found, stacks = screened(lambda lr, wd: torch.where(lr > 2e-4, torch.inf, lr), **wide)  # its own diverges
    assert found == pytest.approx(QUANTILES[0])
    assert_allclose([rates[0] for _, rates in stacks], 2 * [1e-3, QUANTILES[0]], atol=1e-6)


@pytest.mark.parametrize(
    ("max_epochs", "length"), [(300, 100), (60, 38), (5, 5)]
)  # 4 steps each: a third, 150 steps, all
def test_they_are_trained_for_a_third_of_a_fit(iris, monkeypatch, max_epochs, length):
    own, lengths = starts.retrain, []

    def recorded(*args, epochs, **params):
        lengths.append(epochs)
        return own(*args, epochs=1, **params)

    task = Keeping(clone(NET).set_params(max_epochs=1, batch_size=25), SPACE, cv=3, random_state=0).fit(*iris).task
    for fold in task.folds:
        fold.net.set_params(max_epochs=max_epochs)
    monkeypatch.setattr(starts, "retrain", recorded)
    screen_rate(task)
    screen(task.with_rate(task.current))
    assert lengths == [length, length]


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "share"), [(1e-4, 0.5), (0.1, 1.01)])
def test_a_learning_rate_far_off_is_mended(digits, lr, share):
    """Given to the search it is found, from either side; kept, a small one is far behind."""
    X, y = digits[0][:300], digits[1][:300]
    net = TorchClassifier(MLP(hidden=(32,)), max_epochs=20, lr=lr, random_state=0)
    space = {"weight_decay": loguniform(1e-6, 1e1), "lr": loguniform(1e-4, 1e-1)}
    kept, found = (
        search(net, s, scoring="neg_log_loss").fit(X, y) for s in ({"weight_decay": space["weight_decay"]}, space)
    )
    assert -found.best_score_ < share * -kept.best_score_
    assert 1e-3 < found.best_params_["lr"] <= 0.1


def test_a_search_with_a_learning_rate(iris, used):
    X, y = iris
    net = make_pipeline(StandardScaler(), clone(NET).set_params(lr=1e-4))
    space = {f"torchclassifier__{name}": prior for name, prior in SPACE.items()}
    found = search(net, space, scoring="neg_log_loss").fit(X, y)
    rate, results = found.history_["torchclassifier__lr"], found.cv_results_
    assert 1e-3 < rate < 0.1
    settings = dict(zip(results["candidate"], (p["torchclassifier__lr"] for p in results["params"]), strict=True))
    assert settings["own"] == pytest.approx(1e-4)
    for name in {"tuned", "middle", "start", "stronger"} & settings.keys():
        assert settings[name] == pytest.approx(rate)
    assert {"lr / 2", "lr x 2"} <= settings.keys()
    assert used.count(True) == 3 * len(settings)  # all retrained in stacks
    assert_scores_are_those_of_own_fits(found, X, y, rel=1e-3)
    assert (
        clone(net).set_params(**found.best_params_).get_params()["torchclassifier__lr"]
        == found.best_params_["torchclassifier__lr"]
    )
    assert net[-1].lr == 1e-4  # the user's own
    trials = to_study(found).trials
    assert [trial.params["torchclassifier__lr"] for trial in trials] == [*settings.values()]
    assert trials[0].distributions["torchclassifier__lr"].log


def test_a_subclass_without_a_learning_rate_of_its_own_says_what_its_response_knows(iris):
    class Mine(TorchClassifier):
        def __init__(self, weight_decay=0.0, max_epochs=2, random_state=0):
            super().__init__(MLP((4,)), weight_decay=weight_decay, max_epochs=max_epochs, random_state=random_state)

    found = search(Mine(), {"weight_decay": loguniform(1e-6, 1e1)}).fit(*iris)
    with pytest.raises(ValueError, match=r"'lr': this best response is a function of \['weight_decay'\] alone\.$"):
        found.best_response_.validation_loss({"lr": 0.1})


def test_the_response_is_that_of_one_learning_rate(iris):
    found = search().fit(*iris)
    response = found.best_response_
    assert "lr" not in response.params
    assert response.estimator_at().lr == found.history_["lr"]
    with pytest.raises(
        ValueError,
        match=r"'lr': this best response is a function of \['weight_decay', 'module__dropout'\] alone; it was learned at",
    ):
        response.validation_loss({"lr": 0.01})
    lam, losses = response.verified  # of the candidates with this rate alone: not the estimator's own
    given = [name for name in ("tuned", "middle", "start") if name in found.cv_results_["candidate"]]
    assert lam.shape == (len(given), 2)
    assert len(losses) == len(given)
    assert response.validation_band("module__dropout", [0.1]).shape == (1, 2)


def test_where_the_learning_rate_was_right_all_candidates_tell_how_far_the_response_is_off(iris, monkeypatch):
    monkeypatch.setattr("hypertune.proposal.screen_rate", lambda task, tried: task.current)
    found = search().fit(*iris)
    assert len(found.best_response_.verified[1]) == len(
        {"tuned", "middle", "start", "own"} & {*found.cv_results_["candidate"]}
    )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["global", "implicit", "unrolled"])
def test_other_algorithms_train_with_it(iris, algorithm):
    space = {"weight_decay": loguniform(1e-6, 1e1), "lr": loguniform(1e-4, 1e-1)}
    found = search(clone(NET).set_params(lr=1e-4), space, algorithm=algorithm).fit(*iris)
    assert found.history_["lr"] > 1e-3
    assert found.best_response_.estimator_at().lr == found.history_["lr"]


@model_factory
def normed(n_features_in, n_outputs, *, dropout=0.1):
    return nn.Sequential(
        nn.Linear(n_features_in, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, n_outputs)
    )


class Branching(nn.Module):
    """Does not run under vmap: its folds are trained one after the other."""

    def __init__(self, n_features_in, n_outputs, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_features_in, 8), nn.Dropout(dropout), nn.Linear(8, n_outputs))

    def forward(self, x):
        return self.layers(x) if float(x.sum()) > -1e9 else x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize("module", [normed, Branching])
def test_other_modules(iris, module):
    found = search(clone(NET).set_params(module=module, lr=1e-4)).fit(*iris)
    assert found.history_["lr"] > 1e-3
    assert found.best_score_ > 0.85


def test_a_space_on_a_linear_axis(iris):
    found = search(clone(NET).set_params(lr=1e-4), SPACE | {"lr": uniform(0, 0.1)}).fit(*iris)
    assert 1e-3 < found.history_["lr"] <= 0.1
    assert {"lr / 2", "lr x 2"} & {*found.cv_results_["candidate"]}


@pytest.mark.slow
def test_it_stays_where_short_trainings_would_not_be_those_of_fits(iris):
    """A penalty that counts its calls, of all settings."""

    class Counting:
        def __init__(self):
            self.calls = 0

        def __call__(self, weights):
            self.calls += 1
            return 1e-6 * self.calls * sum(w.square().sum() for w in weights.values())

    for lr, kept in ((0.002, 0.002), (0.5, 0.1)):  # inside the range
        with pytest.warns(UserWarning, match=f"learning rate is left at {kept}: .*calls? to call"):
            found = search(clone(NET).set_params(penalty=Counting(), lr=lr)).fit(*iris)
        assert_allclose([params["lr"] for params in found.cv_results_["params"]], kept)
        assert found.history_["lr"] == pytest.approx(kept)


@pytest.mark.slow
def test_it_is_found_for_an_optimizer_that_couples_weights(iris):
    found = search(clone(NET).set_params(optimizer=Coupled, lr=1e-4)).fit(*iris)
    assert found.history_["lr"] > 1e-3


@pytest.mark.slow
def test_larger_models_have_no_candidates_of_other_learning_rates(iris):
    net = clone(NET).set_params(module=MLP(hidden=(200, 200)), max_epochs=2)
    assert {*search(net).fit(*iris).cv_results_["candidate"]} <= {"tuned", "middle", "start", "own"}
    wide = search(clone(net).set_params(module=model_factory(normed_wide))).fit(*iris)
    assert {*wide.cv_results_["candidate"]} <= {"tuned", "middle", "start", "own", "stronger"}


def normed_wide(n_features_in, n_outputs, *, dropout=0.1):
    return nn.Sequential(
        nn.Linear(n_features_in, 200),
        nn.BatchNorm1d(200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.Dropout(dropout),
        nn.Linear(200, n_outputs),
    )


def test_a_study_of_a_search_whose_space_was_changed_since(iris):
    found = search().fit(*iris)
    found.set_params(param_distributions={"l1": loguniform(1e-6, 1)})
    assert {*to_study(found).best_params} == {"weight_decay", "module__dropout"}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("space", "params", "message"),
    [
        (
            {"lr": loguniform(1e-4, 1e-1)},
            {},
            r"\['lr'\].*such as weight_decay, or give the learning rate alone to .*outer search",
        ),
        (
            SPACE | {"lr": lognorm(1)},
            {},
            r"\['lr'\]: the range \[0, inf\] has learning rates that are negative or infinite",
        ),
        (SPACE, {"start": "estimator"}, r"\['lr'\].*needs start='screened'.*got start='estimator'"),
        (
            SPACE,
            {"evaluate": "hypernetwork"},
            r"\['lr'\].*evaluate='retrain'.*got start='screened' and evaluate='hypernetwork'",
        ),
        (SPACE | {"lr": norm(0, 1)}, {}, r"\['lr'\]: the range \[-inf, inf\] has .*loguniform"),
        (SPACE | {"lr": uniform(-1, 2)}, {}, r"\['lr'\]: the range \[-1, 1\] has"),
        (
            {"sample_weight": uniform(0, 2), "lr": loguniform(1e-4, 1e-1)},
            {},
            r"\['lr'\].*not tried beside a weight for each row",
        ),
    ],
)
def test_what_cannot_be_searched_for_is_refused(iris, space, params, message):
    with pytest.raises(ValueError, match=message):
        search(space=space, **params).fit(*iris)


def test_check_hypergradient_says_to_leave_it_out(iris):
    with pytest.raises(ValueError, match=r"\['lr'\].*check_hypergradient sets 'hypernetwork'.*Set it on the estimator"):
        check_hypergradient(search(), *iris)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_learning_rate(iris):
    X, y = iris
    one, other = (search().fit(X, y) for _ in range(2))
    assert one.history_["lr"] == other.history_["lr"]
    assert one.best_params_ == other.best_params_
    several = search(clone(NET).set_params(random_state=None)).fit(
        X, y
    )  # all settings of a screening from one seed of its own
    assert np.isfinite(several.best_score_)
