"""The parts of figures 6 and 7: what is exact about them, and who sees what."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.testing import assert_close

from benchmarks.figures import fig6, fig7_bayes, linear, race, stacked
from benchmarks.figures.gaussian import fair_gp, paper_gp
from benchmarks.figures.legendre import Legendre
from benchmarks.figures.rows import row


def _images(number: int, dtype: torch.dtype = torch.float32) -> linear.Rows:
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(number, 785, generator=generator, dtype=dtype) ** 4
    x[:, -1] = 1
    return linear.Rows(x, torch.nn.functional.one_hot(torch.arange(number) % 10, 10).to(dtype))


def _lam(m: int) -> torch.Tensor:
    return fig6._uniform(m, torch.Generator().manual_seed(0))


# --- figure 6: the trainings ---------------------------------------------------------------------------------------------


def test_models_trained_in_stacks_are_those_trained_alone(monkeypatch):
    monkeypatch.setattr(stacked, "_STACK", 3)
    rows, lam = _images(60), _lam(5)
    together = stacked.train(rows, lam, steps=8, batch_size=20, seed=3)
    for i in range(5):
        alone = linear.from_scratch(linear.minibatches(rows, 20, 3), lam[[i]], 8, seed=3, lr=1e-3, decay=True)
        assert_close(together[i], alone[0], rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_second_moments_stand_for_the_images():
    rows, other = _images(50, torch.float64), _images(40, torch.float64)
    moments = stacked.SecondMoments.of(rows)
    w = torch.randn(3, linear.D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(moments.mse(w), linear.mse(w, *rows))
    lam = _lam(2).double()
    assert_close(moments.ridge(lam), torch.stack([linear.ridge(rows, one) for one in lam]))
    assert not torch.allclose(moments.mse(w), linear.mse(w, *other))


# --- figure 6: the models ------------------------------------------------------------------------------------------------


def test_legendre_features_are_orthonormal_under_the_distribution_of_lam():
    hypernetwork = Legendre(3.0).build(torch.zeros(1, linear.D), torch.zeros(10), linear.layout())
    line = (torch.arange(3_000) + 0.5) / 500 - 3
    features = hypernetwork.features(line[:, None].expand(-1, 10))[0, :, ::10]  # class 0, degrees 1 to 3
    ones = torch.ones(len(line), 1)
    basis = torch.cat([ones, features], dim=1)
    assert_close(basis.T @ basis / len(line), torch.eye(4), rtol=0, atol=1e-4)


def test_a_class_moves_with_its_own_weight_decay_only():
    hypernetwork = Legendre(3.0).build(torch.zeros(1, linear.D), torch.zeros(10), linear.layout())
    for linear_map in hypernetwork.maps:
        torch.nn.init.normal_(linear_map.V)
    lam = torch.zeros(2, 10)
    lam[1, 4] = 1.0
    w = hypernetwork(lam)[0].detach().view(2, 10, 785)
    moved = (w[1] - w[0]).abs().amax(dim=1) > 0
    assert moved.tolist() == [c == 4 for c in range(10)]


def test_the_gps_are_what_they_are_called():
    rng = np.random.default_rng(0)
    lam = rng.uniform(-3, 3, (30, 10))
    losses = 5.0 + 0.01 * lam.sum(axis=1)
    far = np.full((1, 10), 1e4)
    assert_allclose(paper_gp(lam, losses, 0).predict(far), 0, atol=1e-6)  # mean zero
    assert_allclose(fair_gp(lam, losses, 0, width=6.0).predict(far), losses.mean())
    assert_allclose(paper_gp(lam, losses, 0).predict(lam), losses, rtol=1e-5)  # no noise
    assert len(np.atleast_1d(fair_gp(lam, losses, 0, width=6.0).kernel_.k1.k2.length_scale)) == 10


@pytest.fixture
def pairs() -> fig6.Pairs:
    lam = _lam(60)
    losses = 0.05 + 0.001 * lam.sum(dim=1)
    return fig6.Pairs(lam, losses, losses + 1, seconds=1e-9)


@pytest.mark.parametrize("model", [fig6.GP, fig6.FAIR])
def test_a_gp_sees_the_losses_of_its_pairs_only(model: str, pairs: fig6.Pairs):
    hidden = pairs._replace(valid=torch.where(torch.arange(60) < 20, pairs.valid, torch.nan))
    predicted = fig6._predict_by_gp(model, hidden, 20, seed=0)
    assert_close(predicted, fig6._predict_by_gp(model, pairs, 20, seed=0))
    assert predicted.shape == (40,)


@pytest.mark.parametrize("model", [fig6.FIXED, fig6.ALGORITHM_2])
def test_a_fixed_hypernetwork_sees_the_lam_of_its_pairs_only(model: str, pairs: fig6.Pairs, monkeypatch):
    drawn, fit_response = [], fig6.fit_response

    def watched(problem, hypernetwork, optimizer, sample, center, *, m):
        def draw(m):
            drawn.append(sample(m))
            return drawn[-1]

        return fit_response(problem, hypernetwork, optimizer, draw, center, m=m)

    monkeypatch.setattr(fig6, "fit_response", watched)
    _, steps, seconds = fig6._fit(model, pairs._replace(seconds=0.002), 20, _images(100), seed=0)
    known = [bool((pairs.lam[:20] == one).all(dim=1).any()) for one in torch.cat(drawn)]
    assert set(known) == {model == fig6.FIXED}
    assert len(drawn) == steps
    assert seconds >= 20 * 0.002


def test_predictions_are_judged_on_what_was_held_out(pairs: fig6.Pairs):
    true = pairs.valid[25:]
    judged = fig6._judge("GP", pairs, 25, true + 0.5 * true.std(), seconds=1.0, step=None)
    assert (judged["error"], judged["absolute_error"]) == pytest.approx((0.5, 0.5), rel=1e-4)
    assert (judged["rank_correlation"], judged["regret"]) == (1.0, 0.0)
    assert judged["test"] == pytest.approx(judged["valid"] + 1, rel=1e-5)
    assert np.sum(judged["histogram"]) == pytest.approx(1)
    judged = fig6._judge("GP", pairs, 25, -true, seconds=1.0, step=None)
    assert judged["rank_correlation"] == -1.0
    assert judged["regret"] == pytest.approx(float((true.max() - true.min()) / true.std()), rel=1e-4)


# --- figure 7 ------------------------------------------------------------------------------------------------------------


def _data() -> linear.Data:
    return linear.Data(_images(300), _images(100), _images(90))


def test_looking_at_a_solver_is_off_its_clock(monkeypatch):
    clock = iter([0.0, 1.0, 100.0, 102.0, 200.0, 203.0, 300.0])
    monkeypatch.setattr(race.time, "process_time", lambda: next(clock))
    states = (race.State(i, torch.zeros(linear.D)) for i in range(9))
    found = list(race.timed("solver", states, _data(), every=1, limit=5.0))
    assert [r["seconds"] for r in found] == [1.0, 3.0, 6.0]  # it took 1, 2 and 3 seconds
    assert [r["step"] for r in found] == [0, 1, 2]


@pytest.mark.parametrize("search", fig7_bayes.SEARCHES.values(), ids=fig7_bayes.SEARCHES)
def test_searches_begin_in_the_middle_and_keep_the_best(search, monkeypatch):
    trainer, tried = race.Trainer(_data(), 2, 0), []
    loss = race.Trainer.loss

    def watched(self, lam):
        tried.append((lam.tolist(), loss(self, lam)))
        return tried[-1][1]

    monkeypatch.setattr(race.Trainer, "loss", watched)
    states = search(trainer)
    found = [next(states) for _ in range(12)]
    assert tried[0][0] == [race.START] * 10
    assert all(race.LOW <= v <= race.HIGH for lam, _ in tried for v in lam)
    least = np.minimum.accumulate([one for _, one in tried])
    assert [float(linear.mse(state.w, *_data().valid)) for state in found] == pytest.approx(list(least), rel=1e-5)
    assert [b.step - a.step for a, b in pairwise(found)] == [2] * 11


def test_our_curve_is_compared_at_every_time_after_the_first_tenth():
    curves = {
        race.OURS: [(0.5, 9.0), (5.0, 2.0), (10.0, 1.0)],
        race.RANDOM: [(0.8, 4.0), (6.0, 3.0)],
        race.PAPER: [(4.0, 3.5), (9.0, 0.5)],
        race.ONE: [(1.0, 0.8)],
    }
    rows = [row(solver, seconds=s, valid=v, test=2 * v, seed=0) for solver, curve in curves.items() for s, v in curve]
    assert race.value_at(rows[:3], 0.1) == np.inf
    assert race.value_at(rows[:3], 6.0) == 2.0
    assert race._least_margin(rows, race.RANDOM, 0) == 1.0  # at 6 seconds: 3 − 2
    said = race.words(rows, [race.RANDOM])
    assert (
        "below that of random search in 1 of 1 seeds (smallest margin 1); hyper-training, the paper's in 0 of 1" in said
    )
    assert "ends +25.0% from the best single λ on validation and +25.0% on test" in said
    assert "ends below random search in 1 of 1 seeds" in said
