"""Which settings are verified."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import halfnorm, loguniform, norm, uniform
from sklearn.base import clone
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedKFold, TimeSeriesSplit
from torch import nn

from hypertune import MLP
from hypertune.candidates import _is_short, _noise, distinct, retrain_candidates
from hypertune.retraining import Retrained, retrain
from tests.test_retraining import NET, Keeping

TUNED, START, OWN = torch.tensor([[-8.0], [-7.0], [-13.0]], dtype=torch.float64)


def test_settings_that_share_an_infinite_coordinate_differ_by_the_others():
    """The logarithm of no noise at all, under a distribution that begins at zero."""
    tuned, start, own = torch.tensor([[-torch.inf, 0.0], [-torch.inf, 1.0], [-torch.inf, 3.0]])
    assert [lam.tolist() for lam in distinct(tuned, start, own).values()] == [
        [-torch.inf, x] for x in (0.0, 0.5, 1.0, 3.0)
    ]
    assert len(distinct(tuned, tuned.clone(), own)) == 2


def test_the_line_through_a_better_setting_keeps_an_infinite_coordinate(verified):
    """Of the tuned and the better one: theirs, and no setting is lost."""
    space = {"weight_decay": loguniform(1e-6, 1e1), "input_noise": halfnorm()}
    lams = [torch.tensor([x, -torch.inf], dtype=torch.float64) for x in (-8.0, -7.0, -13.0)]
    candidates, *_ = verified(away(-5.0), space=space, lams=lams)
    assert any(lam[0] > -6.0 and lam[1] == -torch.inf for lam in candidates)


def test_settings_that_hardly_differ_are_verified_once():
    tuned, near, far = torch.zeros(2), torch.tensor([0.0, 0.009]), torch.tensor([0.0, 1.0])
    assert [lam.tolist() for lam in distinct(tuned, near, far).values()] == [[0, 0], [0, 1]]
    assert [lam.tolist() for lam in distinct(tuned, far, far).values()] == [[0, 0], [0, 0.5], [0, 1]]
    assert [*distinct(tuned, None, near).values()] == [tuned, near]  # the estimator's own setting always is
    assert len(distinct(tuned, None, tuned.clone())) == 1


def judge(patch, loss, cautious=None):
    """Settings λ (C, n) have these validation losses, and maybe others if a bit more had been seen."""
    for name, own in (("validation_losses", loss), ("cautious_losses", cautious or loss)):
        patch.setattr(Retrained, name, lambda self, folds, own=own: own(self.lam).double())


@pytest.fixture
def verified(iris, monkeypatch):
    """Candidates and sizes of the stacks of a search whose validation losses are ``loss`` of λ (C, n)."""

    def run(loss, high=10.0, net=NET, space=None, lams=(TUNED, START, OWN), **params):
        space = {"weight_decay": loguniform(1e-6, 1e1)} if space is None else space
        task = Keeping(clone(net).set_params(max_epochs=1), space, cv=3, random_state=0).fit(*iris).task
        narrow = tuple(replace(h, high=min(high, h.high)) for h in task.space.hyperparameters)
        task = task._replace(space=replace(task.space, hyperparameters=narrow))
        with monkeypatch.context() as patch:
            judge(patch, loss)
            candidates, best, retrained, known = retrain_candidates(task, distinct(*lams), **params)
        if known is not None:
            assert_allclose(known[1], loss(known[0]))
        run.best = best
        return torch.stack([*candidates.values()]).squeeze(1).tolist(), [len(r.lam) for r in retrained], known

    return run


FIRST = [-8.0, -7.5, -7.0, -13.0, -6.5]


def away(best):
    return lambda lam: (lam[:, 0] - best).abs()


def test_more_regularisation_is_tried_and_more_of_that_if_it_is_better(verified):
    """λ̂ asks for too little where fits are far from converged."""
    found, stacks, _ = verified(away(-7.8))
    assert (found, stacks) == (FIRST, [5])
    assert verified(lambda lam: 10 + away(-6.51)(lam) / 10)[1] == [5]  # better by less than 2%: not worth another pass
    assert verified(lambda lam: -4 + away(-6.51)(lam) / 10)[1] == [5, 4]  # by more, and negative
    assert verified(lambda lam: -10 + away(-6.51)(lam) / 10)[1] == [5]
    found, stacks, _ = verified(away(-5.0))
    assert (found, stacks) == ([*FIRST, -7.25, -5.75, -5.0, -3.5], [5, 4])


@pytest.mark.parametrize(
    ("best", "line"),
    [(-7.55, [-7.75, -7.25]), (-7.05, [-6.0, -5.0]), (-13.1, [-10.5, -13.8155])],
    ids=["middle", "start", "own"],
)
def test_settings_on_the_line_through_a_better_one_follow(verified, best, line):
    """What is beyond the bounds is clipped to them, and what is known already left out."""
    found, stacks, _ = verified(away(best))
    assert found == pytest.approx([*FIRST, *line], abs=1e-3)
    assert stacks == [5, len(line)]


def test_bounds_are_kept(verified):
    found, *_ = verified(lambda lam: -lam[:, 0], high=-6.8)
    assert found == pytest.approx([-8.0, -7.5, -7.0, -13.0, -6.8, -7.4])


def test_logarithmic_hyperparameters_alone_are_made_stronger_and_a_line_moves_all(verified):
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.5)}
    lams = torch.tensor([-8.0, 1.0]), None, torch.tensor([-13.0, 2.0])
    found, *_ = verified(away(-8.0), space=space, lams=lams)
    assert found == [[-8, 1], [-13, 2], [-6.5, 1]]
    found, *_ = verified(away(-13.0), space=space, lams=lams)
    assert_allclose(found[3:], [[-10.5, 1.5], [-13.8155, 2.5], [-13.8155, 3.0], [-13.8155, 4.0]], atol=1e-3)
    rate = torch.tensor([0.5]), None, torch.tensor([2.0])
    assert verified(lambda lam: lam[:, 0], space={"module__dropout": uniform(0, 0.5)}, lams=rate)[1] == [2]


class Normed(nn.Sequential):
    def __init__(self, n, m):
        super().__init__(nn.Linear(n, 5_000), nn.BatchNorm1d(5_000), nn.ReLU(), nn.Linear(5_000, m))


def test_of_models_that_cost_time_nothing_more_is_retrained(verified):
    large = clone(NET).set_params(module=MLP(hidden=(150, 150)))  # 3 × 23,853 weights
    assert verified(away(-5.0), net=large)[1] == [4]
    assert verified(away(-5.0), net=large.set_params(module=MLP(hidden=(130, 130))))[1] == [5, 4]  # 3 × 18,073


@pytest.mark.slow
@pytest.mark.parametrize(("best", "more"), [(-7.05, -5.5), (2.0, -5.5), (-7.55, -6.0), (-8.1, -6.5), (-13.0, -11.5)])
def test_with_batchnorm_the_best_of_large_models_is_tried_with_stronger_penalties(verified, best, more):
    """Once: it is a fit on every fold."""
    found, stacks, (lam, _) = verified(away(best), net=clone(NET).set_params(module=Normed))
    assert (found, stacks) == ([*FIRST[:4], more], [4, 1])
    assert lam[:, 0].tolist() == FIRST[:4]
    assert verified(away(best), net=clone(NET).set_params(module=Normed), more=False)[1] == [4]


LARGE = clone(NET).set_params(module=MLP(hidden=(150, 150)), batch_size=40)
NOISY = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.5), "input_noise": uniform(0, 2)}
NOISES = torch.tensor([[-8.0, 2.0, 0.0], [-13.0, 0.0, 1.0]], dtype=torch.float64)  # of 4 units each


@pytest.fixture
def noisier(verified, monkeypatch):
    """Candidates beyond the two, where the last epoch's training losses are ``fitted`` of λ (C, n)."""

    def run(loss, fitted, net=LARGE, space=NOISY, lams=(NOISES[0], None, NOISES[1]), **params):
        def known(task, lam, **how):
            one = retrain(task, lam, **how)
            return one and replace(one, curves=fitted(lam).double()[None, :, None].expand(3, -1, 2))

        with monkeypatch.context() as patch:
            patch.setattr("hypertune.candidates.retrain", known)
            return verified(loss, net=net, space=space, lams=lams, **params)[0][2:]

    return run


def test_where_a_short_fit_overfits_more_noise_is_tried_as_long_as_it_helps(noisier):
    """A fifth of the way up to the bounds, from the best; penalties stay."""
    first, second, third = [-8.0, 2.4, 0.8], [-8.0, 2.72, 1.44], [-8.0, 2.976, 1.952]
    noise = lambda lam: lam[:, 1] + lam[:, 2]  # noqa: E731
    falls, below, above = lambda lam: 100 - noise(lam), lambda lam: 0 * lam[:, 0], lambda lam: 200 + 0 * lam[:, 0]
    assert_allclose(noisier(falls, below), [first, second, third])
    assert noisier(falls, above) == []  # it does not overfit
    no_longer = lambda lam: torch.where(noise(lam) > 3, 200.0, 0.0)  # noqa: E731
    assert_allclose(noisier(falls, no_longer), [first])
    worse = lambda lam: 100 + noise(lam) + 10 * (lam[:, 0] < -10)  # noqa: E731
    assert_allclose(noisier(worse, below), [first])
    assert_allclose(noisier(lambda lam: 100 - noise(lam) - 50 * (lam[:, 0] < -10), below)[0], [-13.0, 0.8, 1.6])
    assert noisier(lambda lam: torch.full_like(lam[:, 0], torch.inf), below) == []
    assert noisier(falls, below, more=False) == []


def test_more_noise_is_for_large_models_without_batchnorm_in_short_fits_alone(noisier, monkeypatch):
    falls, below = lambda lam: 100 - lam[:, 1] - lam[:, 2], lambda lam: 0 * lam[:, 0]
    normed = {"weight_decay": loguniform(1e-6, 1e1), "input_noise": uniform(0, 2), "mixup": uniform(0, 1)}
    assert [lam[0] for lam in noisier(falls, below, space=normed, net=clone(LARGE).set_params(module=Normed))] == [-6.5]
    assert noisier(falls, below, net=clone(LARGE).set_params(module=MLP(hidden=(8,))))[0][0] == -6.5  # small
    monkeypatch.setattr("hypertune.candidates._SHORT", 10)
    assert len(noisier(falls, below)) == 3  # 3 folds of 100 rows, one epoch: 9 steps
    monkeypatch.setattr("hypertune.candidates._SHORT", 9)
    assert noisier(falls, below) == []


def test_what_counts_as_noise_and_as_short(iris):
    """What has bounds, on an axis that is not logarithmic."""

    def jitter(x, generator, *, size=0.1):
        return x + size * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    space = {
        "weight_decay": uniform(0, 1), "label_smoothing": uniform(0, 0.5), "input_noise": uniform(0, 2), "mixup": uniform(0, 1),
        "module__dropout": uniform(0, 0.5), "augment__size": uniform(0, 1), "module__input_dropout": loguniform(1e-3, 0.5),
    }  # fmt: skip
    net = clone(NET).set_params(augment=jitter, max_epochs=2)
    task = Keeping(net, space, cv=3, random_state=0).fit(*iris).task
    assert [h.name for h, is_noise in zip(task.space.hyperparameters, _noise(task), strict=True) if is_noise] == [
        "input_noise", "mixup", "module__dropout", "augment__size",
    ]  # fmt: skip
    for other in (norm(), uniform(-1, 2)):
        unbounded = Keeping(net, {"input_noise": halfnorm(), "augment__size": other}, cv=3, random_state=0)
        assert not _noise(unbounded.fit(*iris).task).any()
    steps = sum(2 * -(-len(fold.train.x) // NET.batch_size) for fold in task.folds)
    with pytest.MonkeyPatch.context() as patch:
        for most, short in ((steps, False), (steps + 1, True)):
            patch.setattr("hypertune.candidates._SHORT", most)
            assert _is_short(task) == short


def test_with_batchnorm_nothing_follows_where_all_diverged(verified):
    found, stacks, _ = verified(
        lambda lam: torch.full_like(lam[:, 0], torch.inf), net=clone(NET).set_params(module=Normed)
    )
    assert (found, stacks) == (FIRST[:4], [4])


def test_what_cannot_be_stacked_is_not_retrained_here(verified):
    unknown = clone(NET).set_params(optimizer=torch.optim.Rprop)  # to move each number by itself
    assert verified(away(-5.0), net=unknown) == (FIRST[:4], [], None)


@pytest.mark.parametrize(
    ("best", "of_all", "of_the_given"), [(-5.0, -5.0, -7.0), (-7.55, -7.5, -7.5), (-13.0, -13.0, -13.0)]
)
def test_the_best_of_all_is_told_whoever_watches(verified, best, of_all, of_the_given):
    for watched in (False, True):
        verified(away(best), watched=watched)
        assert verified.best.tolist() == [of_all]
    verified(away(best), watched=True, more=False)
    assert verified.best.tolist() == [-8.0]  # nobody asked
    verified(away(best), watched=True, more=False, ranked=True)
    assert verified.best.tolist() == [of_the_given]
    unknown = clone(NET).set_params(optimizer=torch.optim.Rprop)
    verified(away(best), net=unknown)
    assert verified.best.tolist() == [-8.0]


def test_asked_for_no_more_there_is_none(verified):
    assert verified(away(0.0), more=False)[1] == [4]


def test_what_was_added_and_diverged_is_no_candidate(verified):
    """What was given is: that it fails is for its own fit to say."""
    found, stacks, (lam, _) = verified(lambda lam: torch.where(lam[:, 0] > -7.0, torch.inf, lam[:, 0].neg()))
    assert (found, stacks) == ([-8.0, -7.5, -7.0, -13.0], [5, 2])
    assert lam[:, 0].tolist() == FIRST[:4]
    found, stacks, _ = verified(lambda lam: torch.full_like(lam[:, 0], torch.inf))
    assert (found, stacks) == (FIRST[:4], [5])


def test_a_tuned_setting_that_is_the_own_is_tried_stronger_too(verified):
    assert verified(away(-13.0), lams=(OWN, None, OWN.clone()))[:2] == ([-13.0, -11.5], [2])


def test_who_watches_gets_the_same_candidates_and_fits_them_all(verified):
    quiet, loud = (verified(away(-5.0), watched=watched) for watched in (False, True))
    assert quiet[0] == loud[0]
    assert loud[1] == []
    assert loud[2] is not None
    assert verified(away(-5.0), watched=True, more=False)[1:] == ([], None)  # nothing would be asked of them


def test_both_passes_begin_with_the_same_weights_and_minibatches(iris, monkeypatch):
    """Under an estimator without a seed, too."""
    net = clone(NET).set_params(max_epochs=1, random_state=None)
    task = Keeping(net, {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0).fit(*iris).task
    one, other = (retrain(task, OWN[None]) for _ in range(2))
    assert not np.array_equal(one.weights, other.weights)
    assert np.array_equal(one.weights, retrain(task, OWN[None], seed=one.seed).weights)
    judge(monkeypatch, away(-5.0))
    candidates, _, (first, second), _ = retrain_candidates(task, distinct(TUNED, START, OWN))
    assert first.seed == second.seed
    line = [f"tuned x {times}" for times in ("0.5", "1.5", "2", "3")]
    assert list(candidates) == ["tuned", "middle", "start", "own", "stronger", *line]


def test_the_stronger_candidate_of_a_large_model_is_called_so(iris, monkeypatch):
    net = clone(NET).set_params(max_epochs=1, module=Normed)
    task = Keeping(net, {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0).fit(*iris).task
    judge(monkeypatch, away(-5.0))
    assert list(retrain_candidates(task, distinct(TUNED, None, OWN))[0]) == ["tuned", "own", "stronger"]


def test_half_and_twice_the_best_learning_rate_are_tried(iris, monkeypatch):
    """Of the best setting, whatever it is; the tuned setting's stronger penalties and the line leave the learning rate alone."""
    space = {"weight_decay": loguniform(1e-6, 1e1), "lr": loguniform(1e-4, 1e-1)}
    task = Keeping(clone(NET).set_params(max_epochs=1), space, cv=3, random_state=0).fit(*iris).task

    def run(best, lr):
        judge(monkeypatch, lambda lam: (lam - torch.tensor([best, np.log(lr)])).abs().sum(dim=1))
        tuned, own = ([decay, np.log(rate)] for decay, rate in [(-8.0, 0.01), (-13.0, 0.003)])
        candidates, _, retrained, _ = retrain_candidates(
            task, distinct(torch.tensor(tuned, dtype=torch.float64), None, torch.tensor(own, dtype=torch.float64))
        )
        assert [len(r.lam) for r in retrained] == [3, len(candidates) - 3]
        return {name: (round(float(lam[0]), 2), round(float(lam[1].exp()), 5)) for name, lam in candidates.items()}

    first = {"tuned": (-8.0, 0.01), "own": (-13.0, 0.003), "stronger": (-6.5, 0.01)}
    assert run(-8.0, 0.01) == {**first, "lr / 2": (-8.0, 0.005), "lr x 2": (-8.0, 0.02)}
    line = {"tuned x 0.5": (-10.5, 0.003), "tuned x 1.5": (-13.82, 0.003)}
    assert run(-14.0, 0.001) == {**first, **line, "lr / 2": (-13.0, 0.0015), "lr x 2": (-13.0, 0.006)}
    beyond = {
        "tuned x 0.5": (-7.25, 0.01),
        "tuned x 1.5": (-5.75, 0.01),
        "tuned x 2": (-5.0, 0.01),
        "tuned x 3": (-3.5, 0.01),
    }
    assert run(-5.0, 0.01) == {**first, **beyond, "lr / 2": (-6.5, 0.005), "lr x 2": (-6.5, 0.02)}


def test_what_only_luck_makes_the_best_is_left_out(iris, monkeypatch):
    """The start and the own setting have the lower validation losses, but would not if a bit more had been seen."""
    task = (
        Keeping(clone(NET).set_params(max_epochs=1), {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0)
        .fit(*iris)
        .task
    )
    judge(monkeypatch, lambda lam: (lam[:, 0] + 14.0).abs(), cautious=lambda lam: (lam[:, 0] + 8.0).abs())
    found = retrain_candidates(task, distinct(torch.tensor([-8.0]), torch.tensor([-9.0]), torch.tensor([-13.0])))
    assert [*found.candidates] == ["tuned", "own", "stronger"]
    assert found.best == -8.0
    assert_allclose(found.verified[0].flatten(), [-8.0, -8.5, -9.0, -13.0])


@pytest.mark.parametrize(
    ("cv", "rows"),
    [(StratifiedKFold(3), 150), (RepeatedStratifiedKFold(n_splits=3, n_repeats=2), 150), (TimeSeriesSplit(5), 125)],
)
def test_a_row_counts_once(iris, cv, rows):
    order = np.random.default_rng(0).permutation(150)
    X, y = iris[0][order], iris[1][order]
    net = clone(NET).set_params(max_epochs=1)
    task = (
        Keeping(net, {"weight_decay": loguniform(1e-6, 1e1)}, cv=cv, random_state=0, start="estimator").fit(X, y).task
    )
    found = retrain(task, torch.stack([TUNED, OWN]))
    assert_allclose(found.cautious_losses(task.folds), found.fold_losses(task.folds, 0.2 / rows).mean(dim=0))


def test_a_fifth_of_a_row_whose_label_is_not_known(iris):
    task = (
        Keeping(clone(NET).set_params(max_epochs=30), {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0)
        .fit(*iris)
        .task
    )
    found = retrain(task, torch.stack([TUNED, OWN]))
    seen = []
    for k, fold in enumerate(task.folds):
        outputs = found.objective.predict(torch.from_numpy(found.weights[k]), fold.valid.x.expand(2, -1, -1), fold=k)
        log_p = outputs.log_softmax(dim=-1)
        known = -log_p.gather(-1, fold.valid.y.expand(2, -1)[..., None])[..., 0].sum(dim=1)
        seen.append((known, -log_p.mean(dim=-1).sum(dim=1)))
    known, anyones = (sum(column) / 150 for column in zip(*seen, strict=True))
    share = 0.2 / 150
    assert_allclose(found.cautious_losses(task.folds), (1 - share) * known + share * anyones, rtol=1e-5)
    assert_allclose(found.validation_losses(task.folds), known, rtol=1e-5)


def test_where_models_rule_out_labels_luck_is_not_known(iris, monkeypatch):
    task = (
        Keeping(clone(NET).set_params(max_epochs=1), {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0)
        .fit(*iris)
        .task
    )
    judge(monkeypatch, away(-9.0), cautious=lambda lam: torch.full((len(lam),), torch.inf))
    found = retrain_candidates(task, distinct(torch.tensor([-8.0]), torch.tensor([-9.0]), torch.tensor([-13.0])))
    assert {"middle", "start"} <= found.candidates.keys()
    assert found.best == -9.0


@pytest.mark.parametrize("watched", [True, False])
def test_of_large_models_the_same_are_left_out_whoever_watches(iris, monkeypatch, watched):
    net = clone(NET).set_params(max_epochs=1, module=MLP(hidden=(300, 300)))
    task = (
        Keeping(net, {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0, start="estimator").fit(*iris).task
    )
    judge(monkeypatch, lambda lam: (lam[:, 0] + 14.0).abs(), cautious=lambda lam: (lam[:, 0] + 8.0).abs())
    found = retrain_candidates(task, distinct(torch.tensor([-8.0]), torch.tensor([-9.0]), OWN), watched=watched)
    assert [*found.candidates] == ["tuned", "middle", "start", "own"]


def test_the_line_goes_to_what_is_better_if_more_had_been_seen(iris, monkeypatch):
    task = (
        Keeping(clone(NET).set_params(max_epochs=1), {"weight_decay": loguniform(1e-6, 1e1)}, cv=3, random_state=0)
        .fit(*iris)
        .task
    )
    judge(monkeypatch, away(-8.0), cautious=away(-5.0))
    assert "tuned x 2" in retrain_candidates(task, distinct(TUNED, START, OWN)).candidates
    judge(monkeypatch, away(-5.0), cautious=away(-8.0))
    assert not any("x" in name for name in retrain_candidates(task, distinct(TUNED, START, OWN)).candidates)


def test_of_nets_that_are_not_ours_the_best_is_fitted_beside_the_tuned_and_the_own_setting(iris, monkeypatch):
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8)}

    def task_of(module):
        return (
            Keeping(clone(NET).set_params(max_epochs=1, module=module), space, cv=3, random_state=0, start="estimator")
            .fit(*iris)
            .task
        )

    tuned, start, own = (torch.tensor([decay, 0.4]) for decay in (-8.0, -7.0, -13.0))
    judge(monkeypatch, away(-6.5))
    found = retrain_candidates(task_of(MLP(hidden=(8,))), distinct(tuned, start, own), ours=False)
    assert [*found.candidates] == ["tuned", "own", "stronger"]
    judge(monkeypatch, away(-8.0))
    assert [*retrain_candidates(task_of(MLP(hidden=(8,))), distinct(tuned, start, own), ours=False).candidates] == [
        "tuned",
        "own",
    ]
    for module in (MLP(hidden=(300, 300)), Normed300):
        task = task_of(module)
        found = retrain_candidates(task, distinct(tuned, start, own), ours=False)
        assert ([*found.candidates], found.retrained) == (["tuned", "middle", "start", "own"], [])
        judge(monkeypatch, away(-7.0))
        found = retrain_candidates(task, distinct(tuned, start, own), ours=False, ranked=True)
        assert torch.equal(found.best, start)
        assert [*found.candidates] == ["tuned", "start", "own"]
        judge(monkeypatch, away(-8.0))


class Normed300(nn.Sequential):
    def __init__(self, n, m, *, dropout=0.1):
        super().__init__(
            nn.Linear(n, 300),
            nn.BatchNorm1d(300),
            nn.Dropout(dropout),
            nn.Linear(300, 300),
            nn.ReLU(),
            nn.Linear(300, m),
        )
