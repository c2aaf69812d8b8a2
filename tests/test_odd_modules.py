"""Modules, optimizers and penalties that do odd things: what a search verifies is a fit of its own, and the user's is left alone."""

from __future__ import annotations

import functools
import math
import pickle
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, cross_val_score
from torch import nn

from hypertune import MLP, per_feature, per_unit
from hypertune.stacked import StackedModule
from tests.odd_modules import (
    CODES,
    NET,
    ODD,
    ONE_SPLIT,
    BecomesATensor,
    BeginsWithNothing,
    Cold,
    Cools,
    Counts,
    CountsAlone,
    CountsEverything,
    CountsWithNorm,
    DrawnByNumpy,
    Modal,
    MovingMean,
    Padded,
    Ramp,
    RandomFeatures,
    Remembers,
    RemembersAMean,
    Shared,
    Shuffled,
    Ticks,
    WritesIntoItsRows,
    X,
    search,
    y,
)


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize(("seed", "cv"), [(0, KFold(3)), (7, KFold(3)), (0, ONE_SPLIT)])  # 7 is the estimator's
@pytest.mark.parametrize("odd", ODD)
def test_what_is_verified_is_a_fit_of_its_own(odd: str, seed: int, cv: Any):
    params, space = ODD[odd]
    rows = X.copy()
    if odd == "codes in one fold":
        rows[5, 3] = 0.5
    before = torch.get_rng_state()
    found = search(space, **params).set_params(random_state=seed, cv=cv).fit(rows, y)
    assert torch.equal(torch.get_rng_state(), before)
    for setting, score in zip(found.cv_results_["params"], found.cv_results_["mean_test_score"], strict=True):
        alone = clone(NET).set_params(**params, **setting)
        own = cross_val_score(alone, rows, y, cv=cv, scoring="neg_log_loss").mean()
        assert_allclose(score, own, rtol=1e-7)


@pytest.mark.parametrize(
    "odd", ["deferred weights", "deferred weights, a buffer", "ramp in a list", "ramp in a tensor"]
)
def test_what_a_function_counts_is_counted_anew_in_every_fit(odd: str):
    net = clone(NET).set_params(**ODD[odd][0])
    first, second = (net.fit(X, y).loss_curve_ for _ in range(2))
    assert first == second
    mine = net.criterion if callable(net.criterion) else net.penalty
    assert not (mine.calls + float(mine.seen) if hasattr(mine, "calls") else mine.state[0])


def test_a_criterion_and_a_penalty_of_one_object_stay_those_of_one():
    class Both:
        def __init__(self):
            self.seen = []

        def criterion(self, outputs, targets):
            self.seen.append(len(targets))
            return nn.functional.cross_entropy(outputs, targets)

        def penalty(self, weights):
            assert self.seen  # of the minibatch before it
            return 0.0 * weights["1.weight"].sum()

    both = Both()
    clone(NET).set_params(module=MLP((8,)), criterion=both.criterion, penalty=both.penalty).fit(X, y)
    assert not both.seen


def test_each_hyper_training_begins_with_the_penalty_as_it_was_given():
    begun = []

    class Noted(Ramp):
        def __call__(self, weights, strength=0.1):
            if self.state[0] == 0:
                begun.append(1)
            return super().__call__(weights, strength)

    space = {"weight_decay": per_unit(loguniform(1e-4, 1e1))}
    found = search(space, module=MLP((8,)), penalty=Noted([0])).set_params(
        grain_scale="auto", evaluate="hypernetwork", refit=False
    )
    found.fit(X, y)
    assert len(begun) >= 5  # four scales, and the last


def test_the_padding_row_stays_and_the_others_learn():
    module = search(module=Padded, inputs=CODES).fit(X, y).best_response_.weights(fold=1)["embed.weight"]
    start = clone(NET).set_params(module=Padded, inputs=CODES).fit(X, y).module_.embed.weight
    assert not module[0].any()
    assert not start[0].any()
    assert module[1:].all()


@pytest.mark.filterwarnings(
    "ignore:The folds are trained one after the other", "ignore:The hyperparameters did not move"
)
@pytest.mark.parametrize("algorithm", ["joint", "global", "implicit", "hybrid", "unrolled"])
@pytest.mark.parametrize("module", [Counts, CountsAlone, CountsWithNorm])
def test_a_counter_counts_training_steps_whatever_else_is_run(module, algorithm):
    found = search(module=module).set_params(algorithm=algorithm).fit(X, y)
    steps = NET.max_epochs * math.ceil(60 / NET.batch_size)
    assert [found.best_response_.estimator_at(fold=k).module_.t for k in range(3)] == [steps] * 3


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize(
    "module",
    [
        RandomFeatures,
        Shuffled,
        DrawnByNumpy,
        Counts,
        CountsAlone,
        CountsWithNorm,
        CountsEverything,
        Cools,
        RemembersAMean,
        BeginsWithNothing,
        BecomesATensor,
        Modal,
        Ticks,
        Cold,
    ],
)
def test_an_estimator_of_the_response_has_what_the_module_was_drawn_with(module):
    found = search(module=module).set_params(random_state=5).fit(X, y).best_response_
    for k, (_, valid) in enumerate(KFold(3).split(X)):
        loss = log_loss(y[valid], found.estimator_at(fold=k).predict_proba(X[valid]), labels=[0, 1])
        assert loss == pytest.approx(found.validation_curve("weight_decay", [found.params["weight_decay"]])[0, k])


TOGETHER = (
    "class weights",
    "padding",
    "scaled start",
    "in a list",
    "writes",
    "temperature",
    "counts",
    "counts late",
    "remembers",
    "cools",
    "caches",
)


@pytest.mark.parametrize("odd", TOGETHER)
def test_these_are_odd_and_yet_retrained_together(used, odd: str):
    params, space = ODD[odd]
    candidates = search(space, **params).fit(X, y).cv_results_["params"]
    assert len(candidates) > 1
    assert sum(used) == 3 * len(candidates)  # each fit found its weights, and the refit did not


def test_a_module_that_draws_in_eval_mode_too_is_retrained_as_it_would_be_by_itself(used):
    class Trembles(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.randn(len(x), 1, dtype=x.dtype)

    found = search(module=Trembles).fit(X, y)
    assert all(used[:-1])
    rows = [(np.arange(90), np.arange(90))]
    again = search(module=Trembles).set_params(cv=rows).fit(X, y).best_estimator_
    alone = clone(again).fit(X, y)
    assert_allclose(again.loss_curve_, alone.loss_curve_, rtol=1e-9)
    assert np.isfinite(found.best_score_)


def test_a_hook_on_the_weights_would_see_those_of_all_candidates(used):
    def hooked(params, lr):
        for p in params:
            p.register_hook(lambda g: g)
        return torch.optim.SGD(params, lr=lr)

    search(module=MLP((8,)), optimizer=hooked).fit(X, y)
    assert not any(used)


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_backbone_that_the_factory_shares_is_left_alone(recurrent: bool):
    """Of its own net the user tunes a copy, from the weights that it has."""
    torch.manual_seed(0)
    backbone = nn.GRU(5, 8) if recurrent else nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}

    class Tuned(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.backbone, self.out = backbone, nn.Linear(8, m)

        def forward(self, x):
            hidden = self.backbone(x[None])[0][0] if recurrent else self.backbone(x)
            return self.out(torch.relu(hidden))

    net = {"module": Tuned, "dtype": "float32", "lr": 1e-6, "max_epochs": 1}
    found = search(**net).fit(X, y)
    for own in (backbone, found.best_estimator_.module_.backbone):
        for k, v in own.state_dict().items():
            if "running" not in k and "tracked" not in k:
                torch.testing.assert_close(v, before[k], rtol=0, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_rows_that_a_module_writes_into_are_the_same_in_the_next_epoch():
    class Shifts(nn.Linear):
        def forward(self, x):
            return super().forward(x - 1.0)

    own, other = (clone(NET).set_params(module=module).fit(X, y) for module in (WritesIntoItsRows, Shifts))
    assert_array_equal(own.predict_proba(X), other.predict_proba(X))


def test_a_forward_of_its_own_is_what_is_trained():
    class Tripled(nn.Sequential):
        def forward(self, x):
            return 3 * super().forward(x)

    def patched(n, m):
        module = nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, m))
        module.forward = types.MethodType(lambda self, x: 3 * nn.Sequential.forward(self, x), module)
        return module

    declared = functools.partial(lambda n, m: Tripled(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, m)))
    own, other = (clone(NET).set_params(module=module).fit(X, y) for module in (patched, declared))
    assert_allclose(own.predict_proba(X), other.predict_proba(X), rtol=1e-9)


def test_what_training_made_of_the_modules_own_numbers_is_part_of_the_prediction():
    cooled = clone(NET).set_params(module=Cools).fit(X, y).module_
    assert cooled.temperature == pytest.approx(5.0 * 0.98 ** (4 * 6))
    assert cooled.p == 4 * 6
    assert clone(NET).set_params(module=MovingMean).fit(X, y).module_.mean.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize(
    "module", [Remembers, RemembersAMean, BeginsWithNothing, Cools, Cold, Ticks, Shared, MLP((8,))]
)
def test_a_search_can_be_pickled_and_its_response_predicts_as_before(module):
    found = search(module=module, max_epochs=2).fit(X, y)
    again = pickle.loads(pickle.dumps(found))
    for one, other in (
        (found, again),
        (found.best_response_.estimator_at(fold=1), again.best_response_.estimator_at(fold=1)),
    ):
        assert_array_equal(one.predict_proba(X), other.predict_proba(X))


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize("module", [Counts, RemembersAMean])
def test_in_folds_of_other_sizes_each_candidate_has_the_memory_of_its_fold(module):
    """Those of one size are retrained together, and so in another order."""
    order = np.random.default_rng(0).permutation(90)
    cv = [
        (order[:70], order[70:]),
        (order[:30], order[70:]),
        (order[20:], order[:20]),
        (order[:40], order[70:]),
    ]  # the first and the third
    found = search(module=module).set_params(cv=cv).fit(X, y)
    for setting, score in zip(found.cv_results_["params"], found.cv_results_["mean_test_score"], strict=True):
        alone = clone(NET).set_params(module=module, **setting)
        assert_allclose(score, cross_val_score(alone, X, y, cv=cv, scoring="neg_log_loss").mean(), rtol=1e-7)


def test_what_is_written_into_is_counted_once():
    """And is what the layer sees that has it, too."""
    module = search(module=Ticks).fit(X, y).best_response_.estimator_at(fold=1).module_
    assert module.step == module.gate.step == NET.max_epochs * math.ceil(60 / NET.batch_size)


def test_threads_do_not_get_the_memory_of_another_fold():
    stacked = StackedModule(RemembersAMean(5, 2), folds=3)
    stacked.stacked = False
    stacked.keep_memories()
    named = stacked.named(stacked.initial_weights()[None].double().repeat(3, 1))
    rows = torch.randn(3, 8, 5, dtype=torch.float64) + torch.arange(3.0, dtype=torch.float64)[:, None, None]
    stacked.outputs(named, rows, {}, training=True)
    one = {k: w[:1] for k, w in named.items()}

    def of(fold: int) -> torch.Tensor:
        return stacked.outputs(one, rows[:1], {}, training=False, fold=fold)

    expected = [of(fold) for fold in range(3)]
    assert not torch.equal(expected[0], expected[2])
    with ThreadPoolExecutor(3) as threads:
        for fold, found in enumerate(threads.map(lambda i: [of(i) for _ in range(100)], range(3))):
            assert all(torch.equal(one, expected[fold]) for one in found)


def test_a_module_that_predicts_without_a_gradient_is_fitted_and_not_searched():
    class Careful(nn.Linear):
        def forward(self, x):
            with torch.set_grad_enabled(self.training):
                return super().forward(x)

    assert clone(NET).set_params(module=Careful).fit(X, y).loss_curve_
    with pytest.raises(ValueError, match="no gradient in eval mode"):
        search(module=Careful).fit(X, y)


def test_a_pass_leaves_the_weights_of_a_layer_under_two_names_where_they_are():
    stacked = StackedModule(Shared(5, 2))
    w = stacked.initial_weights()
    stacked.outputs(stacked.named(w.repeat(3, 1)), torch.zeros(3, 4, 5), {}, training=True)
    assert torch.equal(stacked.initial_weights(), w)


def test_each_hyper_training_of_a_search_begins_with_the_module_as_it_was_built():
    """grain_scale="auto" has five of them."""
    space = {"weight_decay": per_feature(loguniform(1e-4, 1e1))}
    steps = [
        search(space, module=Counts, max_epochs=2).set_params(grain_scale=scale, evaluate="hypernetwork").fit(X, y)
        .best_response_.objective.remembers()
        for scale in (1.0, "auto")
    ]  # fmt: skip
    assert steps[0]
    assert steps[0] == steps[1]
