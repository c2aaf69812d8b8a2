"""Where λ̂ starts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.model_selection import ShuffleSplit
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchRegressor
from hypertune.folds import Fold
from hypertune.retraining import Retrained, retrain
from hypertune.space import Space
from hypertune.starts import out_of_corners, restarts, screen
from hypertune.task import Task, stack
from hypertune.training import hyper_train
from tests.test_retraining import NET, search


@pytest.mark.slow
def test_a_handful_of_settings_is_screened_and_the_best_is_start_and_candidate(breast_cancer, used):
    X, y = breast_cancer
    net = clone(NET).set_params(max_epochs=40, lr=1e-2, input_noise=0.0)
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8)}
    found = search(net, space, start="screened", scoring="neg_log_loss", hyper_lr=5e-4).fit(X, y)
    tuned, middle, best, current, *_ = found.cv_results_["params"]
    assert current == {"weight_decay": pytest.approx(1e-6), "module__dropout": 0.1}
    low, high = loguniform(1e-6, 1e1).ppf([0.4, 0.7])
    assert low <= best["weight_decay"] <= high
    assert best["module__dropout"] == pytest.approx(0.1) or best["module__dropout"] == pytest.approx(0.2)
    for name in space:  # λ̂ starts at the best of them, and hardly moves at this step size
        assert tuned[name] == pytest.approx(best[name], rel=5e-2)
        assert middle[name] == pytest.approx(best[name], rel=5e-2)
    scores = found.cv_results_["mean_test_score"]
    assert scores[2] > scores[3]
    assert used.count(True) == 3 * len(scores)


def test_the_start_is_between_the_screened_settings_where_a_parabola_through_their_losses_is_lowest(iris, monkeypatch):
    """Losses that are a parabola in the position on the line: its minimum, exactly."""
    X, y = iris
    net, space = clone(NET), Space.from_distributions({"weight_decay": loguniform(1e-6, 1e1)})
    rows = net._encode(X, y)
    folds = [Fold(net, None, rows, rows)]
    space, objective = stack(space, folds, len(X), 0)
    current = space.encode({"weight_decay": 1e-6})

    def losses(self, folds):
        return (0.3 * (self.lam[:, 0] - np.log(5e-3)) ** 2).exp()

    monkeypatch.setattr(Retrained, "validation_losses", losses)
    start = screen(Task(space, folds, objective, current, 0))
    assert space.decode(start)["weight_decay"] == pytest.approx(5e-3, rel=1e-4)

    def diverged(self, folds):
        found = losses(self, folds)
        return torch.where(found == found.topk(2, largest=False).values[1], torch.inf, found)

    monkeypatch.setattr(
        Retrained, "validation_losses", diverged
    )  # the better of its neighbours: then it is the best itself
    on_the_line = loguniform(1e-6, 1e1).ppf([0.4, 0.5, 0.6, 0.7])
    found = space.decode(screen(Task(space, folds, objective, current, 0)))["weight_decay"]
    assert np.isclose(found, on_the_line, rtol=1e-6).any()


@pytest.mark.parametrize(("losses", "chosen"), [
    ([1.01, 1.03, 1.2, 2.0, 1.0, 3.0, 3.0], 1),  # the strongest of the line that is nearly as good as the current one
    ([1.06, 1.07, 1.2, 2.0, 1.0, 3.0, 3.0], 4),  # the current one, where none is
    ([1.01, 1.0, 1.04, 2.0, 1.02, 3.0, 0.9], 6),
])  # fmt: skip
def test_what_overfits_late_is_not_started_from_because_it_looks_good_early(iris, monkeypatch, losses, chosen):
    X, y = iris
    net, space = (
        clone(NET),
        Space.from_distributions({"weight_decay": loguniform(1e-6, 1e1), "input_noise": uniform(0, 1)}),
    )
    rows = net._encode(X, y)
    folds = [Fold(net, None, rows, rows)]
    space, objective = stack(space, folds, len(X), 0)
    monkeypatch.setattr(Retrained, "validation_losses", lambda self, folds: torch.tensor(losses))
    screened = []
    monkeypatch.setattr(
        "hypertune.starts.retrain", lambda *args, **kwargs: screened.append(args[1]) or retrain(*args, **kwargs)
    )
    start = screen(Task(space, folds, objective, space.encode({"weight_decay": 1e-6, "input_noise": 0.1}), 0))
    assert torch.equal(start, screened[0][chosen])


def test_a_start_at_either_bound_of_a_logarithmic_range_is_moved_a_third_of_the_way_up():
    space = Space.from_distributions({"weight_decay": loguniform(1e-6, 1e0), "module__dropout": uniform(0, 0.8)})
    for value, rate in ((1e-6, 0.0), (1e0, 0.8)):
        moved = space.decode(out_of_corners(space, space.encode({"weight_decay": value, "module__dropout": rate})))
        assert moved == pytest.approx({"weight_decay": 1e-4, "module__dropout": rate})
    inside = space.encode({"weight_decay": 1e-3, "module__dropout": 0.1})
    assert torch.equal(out_of_corners(space, inside), inside)


def test_large_models_are_not_screened(iris):
    net = clone(NET).set_params(module=MLP(hidden=(512, 512)), max_epochs=1)
    found = search(net, {"weight_decay": loguniform(1e-6, 1e1)}, start="screened").fit(*iris)
    assert len(found.cv_results_["params"]) == 2


def test_mid_sized_ones_are_screened_on_as_many_folds_as_are_cheap(iris, monkeypatch):
    seen = []
    own = Retrained.validation_losses
    monkeypatch.setattr(Retrained, "validation_losses", lambda self, folds: seen.append(len(folds)) or own(self, folds))
    net = clone(NET).set_params(module=MLP(hidden=(128, 128)), max_epochs=1)  # 18,000 weights
    search(net, {"weight_decay": loguniform(1e-6, 1e1)}, start="screened", cv=7).fit(*iris)
    assert seen == [4, 7]  # the screening, the candidates


class Normed(nn.Sequential):
    def __init__(self, n, m, dropout=0.1):
        hidden = nn.Linear(n, 60_000)
        super().__init__(hidden, nn.BatchNorm1d(60_000), nn.ReLU(), nn.Dropout(dropout), nn.Linear(60_000, m))


class Branching(nn.Module):
    """Cannot be stacked, and has BatchNorm."""

    def __init__(self, n, m):
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(n, 4), nn.BatchNorm1d(4), nn.Linear(4, m)

    def forward(self, x):
        return self.out(self.norm(self.hidden(x).relu())) if x.isfinite().all() else x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize(("module", "n"), [(Normed, 2), (Branching, 1)])
def test_with_batchnorm_a_line_is_screened_on_one_fold_at_any_size(iris, monkeypatch, module, n):
    screened = []
    monkeypatch.setattr(
        "hypertune.starts.retrain",
        lambda *args, **more: screened.append((args[0].folds, args[1], more["seed"])) or retrain(*args, **more),
    )
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8)}
    net = clone(NET).set_params(module=module, max_epochs=1)
    search(net, dict(list(space.items())[:n]), start="screened").fit(*iris)
    assert [len(folds) for folds, *_ in screened] == [1] * (1 if module is Normed else 5)
    assert [seed for *_, seed in screened] == [None] + [screened[-1][2]] * (len(screened) - 1)  # what the first drew
    assert screened[-1][2] is not None or module is Normed
    lam = torch.cat([lam for _, lam, _ in screened])
    line = np.log(loguniform(1e-6, 1e1).ppf([0.4, 0.5, 0.6, 0.7]))
    assert_allclose(lam[:, 0], [*line, np.log(1e-6)])
    assert_allclose(lam[:, 1:], 0.5 if n == 2 else np.empty((5, 0)))  # units of a quarter of the range
    screened.clear()
    search(net, {"input_noise": uniform(0, 1)}, start="screened").fit(*iris)
    assert not screened  # nothing logarithmic


@pytest.mark.parametrize("watch", ["verbose", "net", "search"])
def test_a_watched_search_is_screened_and_verified_like_another(iris, used, capsys, watch):
    if watch != "verbose" and not hasattr(TorchRegressor, "set_callbacks"):
        pytest.skip("scikit-learn before 1.9 has no callbacks")
    net, space = clone(NET).set_params(max_epochs=3), {"weight_decay": loguniform(1e-6, 1e1)}
    quiet = search(net, space, start="screened").fit(*iris)
    assert used.count(True) == 3 * len(quiet.cv_results_["params"])
    assert len(quiet.cv_results_["params"]) > 4
    used.clear()
    if watch == "verbose":
        net.set_params(verbose=1)
    loud = search(net, space, start="screened")
    if watch != "verbose":
        from sklearn.callback.tests._utils import RecordingCallback

        (net if watch == "net" else loud).set_callbacks(RecordingCallback())
    loud.fit(*iris)
    assert quiet.best_params_ == loud.best_params_
    assert quiet.cv_results_["params"] == loud.cv_results_["params"]
    assert not any(used)  # each fit is seen to happen


@pytest.mark.slow
def test_from_a_start_where_the_model_is_dead_the_search_begins_again(iris, monkeypatch):
    """Where nothing is screened, with a penalty that leaves nothing of the outputs: no slope leads out of there."""
    net = clone(NET).set_params(module=MLP(hidden=(32, 32)), weight_decay=3.0, max_epochs=40, lr=0.02)
    monkeypatch.setattr("hypertune.starts._SCREENED", 0)
    assert net.fit(*iris).predict_proba(iris[0]).std(axis=0).max() < 1e-3
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.5)}
    found = search(net, space, scoring="neg_log_loss", start="screened").fit(*iris)
    assert found.best_params_["weight_decay"] < 0.1
    assert found.best_score_ > -0.3
    for asked_for in ({"start": "estimator"}, {"start": "screened", "evaluate": "hypernetwork"}):
        assert search(net, space, **asked_for).fit(*iris).best_response_.params["weight_decay"] > 1.0


def test_one_validation_row_or_small_targets_are_no_constant_prediction(iris, monkeypatch):
    runs = []
    own = hyper_train
    monkeypatch.setattr("hypertune.search.hyper_train", lambda *args, **kwargs: runs.append(1) or own(*args, **kwargs))
    X, y = iris[0], iris[0][:, 2] * 1e-3
    space = {"weight_decay": loguniform(1e-6, 1e1)}
    search(clone(NET).set_params(max_epochs=1), space, cv=ShuffleSplit(2, test_size=1), start="screened").fit(*iris)
    net = TorchRegressor(MLP(hidden=()), lr=0.05, max_epochs=10, random_state=0)
    search(net, space, start="screened").fit(X, y)
    assert len(runs) == 2


def test_restarts_are_half_way_to_a_third_of_the_logarithmic_ranges_and_leave_the_others():
    space = Space.from_distributions({"weight_decay": loguniform(1e-6, 1e3), "module__dropout": uniform(0, 0.8)})
    dead = space.encode({"weight_decay": 1e1, "module__dropout": 0.6})
    found = [space.decode(lam) for lam in restarts(space, dead)]
    assert [at["weight_decay"] for at in found] == pytest.approx([1e-1, 1e-2])
    assert [at["module__dropout"] for at in found] == pytest.approx([0.6, 0.6])
    assert not list(restarts(Space.from_distributions({"module__dropout": uniform(0, 0.8)}), dead[1:]))


def test_a_logarithm_of_a_rate_is_constant_on_its_own_scale():
    """Rare counts vary much, in units of their mean, and their rate need not."""
    X = np.linspace(-1.5, 1.5, 200)[:, None]
    y = np.where(np.arange(200) % 50 == 0, 1, 0)
    net = TorchRegressor(MLP(hidden=()), criterion="poisson", max_epochs=2, random_state=0)
    space = {"weight_decay": loguniform(1e-6, 1e1)}
    cv = [(np.arange(200), np.arange(200))]
    response = HyperTrainingSearchCV(net, space, cv=cv, start="estimator", random_state=0).fit(X, y).best_response_
    for slope, constant in ((0.05, False), (1e-4, True)):
        response.hypernetwork.w0.data = torch.tensor([[slope, 0.0]])
        response.hypernetwork.maps[0].V.data.zero_()
        assert response.is_constant() == constant


def test_restarts_are_never_stronger_than_what_died():
    space = Space.from_distributions({"weight_decay": loguniform(1e-6, 1e3)})
    for dead in (1e2, 1e-3, 1e-4, 1e-5, 2e-6):
        lam = space.encode({"weight_decay": dead})
        path = [dead, *(space.decode(one)["weight_decay"] for one in restarts(space, lam))]
        assert all(weaker <= 1.000001 * stronger for stronger, weaker in itertools.pairwise(path))
        assert path[1] < dead or dead <= 1e-5


def test_a_restart_is_from_where_the_run_began_and_not_from_a_bound(iris, monkeypatch):
    begun = []
    monkeypatch.setattr("hypertune.proposal.restarts", lambda space, lam: begun.append(space.decode(lam)) or [])
    net = clone(NET).set_params(weight_decay=10.0, max_epochs=1)
    monkeypatch.setattr("hypertune.starts._SCREENED", 0)
    search(net, {"weight_decay": loguniform(1e-5, 1e1)}, start="screened").fit(*iris)
    assert begun == [{"weight_decay": pytest.approx(1e-3)}]
