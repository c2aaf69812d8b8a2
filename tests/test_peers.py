"""The benchmarks of the gradient methods, small: hypergradients, peers and scaling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import hypergradients, oracles, peers, scaling
from benchmarks.libraries import PEERS


@pytest.mark.slow
@pytest.mark.parametrize("make", [oracles.ridge, oracles.logistic])
def test_the_exact_hypergradient_is_that_of_retrained_models(make):
    case = make(steps=1)
    w = oracles.newton(
        case.train_loss, oracles.best_response(case.train_loss, case.w0, case.lam, case.optimizer), case.lam
    )
    assert_close(oracles.by_retraining(case.train_loss, case.valid_loss, w, case.lam), case.exact, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_newton_steps_inside_find_the_exact_hypergradient_of_the_linear_model():
    case = oracles.linear(steps=1)
    assert case.exact.shape == case.lam.shape == case.w0.shape == (650,)
    found = hypergradients.hypergradient(case, *hypergradients.algorithms(case)["implicit, newton inside"])
    assert torch.cosine_similarity(found, case.exact, dim=0) > 0.999
    assert_close(found.norm(), case.exact.norm(), rtol=0.01, atol=0)


def test_algorithms_find_the_hypergradient_of_ridge_regression():
    case = oracles.ridge(steps=120)
    for name in ("implicit, cg", "implicit, nystrom", "unrolled, 20 steps", "implicit, newton inside"):
        found = hypergradients.hypergradient(case, *hypergradients.algorithms(case)[name])
        assert torch.cosine_similarity(found, case.exact, dim=0) > 0.99, name


@pytest.mark.slow
def test_hypergradients_are_tabled(tmp_path: Path, capsys):
    rows = hypergradients.measure_hypergradients(tmp_path, steps=8)
    assert json.loads((tmp_path / "hypergradients.json").read_text()) == rows
    assert {row["problem"] for row in rows} == {"ridge", "logistic", "linear", "mlp"}
    assert all(math.isfinite(row["cosine"]) for row in rows)
    assert "unrolled, converged" in capsys.readouterr().out


def test_retraining_ends_where_the_gradient_is_zero():
    data = peers.Data.make(0)
    l2 = torch.logspace(-4, 0, peers.FEATURES)
    w = data.retrain(l2, torch.zeros(peers.FEATURES)).float().requires_grad_()
    (g,) = torch.autograd.grad(data.train_loss(w, l2), w)
    assert g.norm() < 1e-6


@pytest.mark.parametrize("name", peers.OURS)
def test_ours_move_towards_the_target(name: str):
    data = peers.Data.make(0)
    run = peers.OURS[name](data)
    losses = [float(data.valid_loss(w)) for _, (_, w) in zip(range(20), run, strict=False)]
    assert losses[-1] < 0.5 < math.log(2) - 0.05


def test_what_does_not_run_is_listed_with_its_error(tmp_path: Path, capsys, monkeypatch):
    def absent(data: peers.Data, setting: object):
        raise ImportError("No module named 'absent'")

    monkeypatch.setattr(peers, "PEERS", {"absent": absent})
    monkeypatch.setattr(peers, "OURS", {peers._FASTEST: peers.OURS[peers._FASTEST]})
    rows = peers.measure_peers(tmp_path, repeats=1, limit=0.05)
    assert [row["solver"] for row in rows] == ["ours"]
    assert "absent did not run: ImportError: No module named 'absent'" in capsys.readouterr().out
    assert json.loads((tmp_path / "peers.json").read_text())["errors"].keys() == {"absent"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_descends_if_it_is_installed(name: str):
    pytest.importorskip({"betty-ml": "betty"}.get(name.split(",")[0], name.split(",")[0]))
    data = peers.Data.make(0)
    for setting in (peers.DOCS, peers.tuned(5)):
        losses = [float(data.valid_loss(w)) for _, (_, w) in zip(range(6), PEERS[name](data, setting), strict=False)]
        assert losses[-1] < losses[0] or setting is peers.DOCS  # whose L2 may grow at first


def test_every_size_has_its_number_of_weights():
    for D in scaling.SHAPES:
        assert sum(p.numel() for p in scaling._modules(D).parameters()) == D


def test_scaling_is_tabled(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "SIZES", (1, 10_000))
    rows = scaling.measure_scaling(tmp_path, repeats=1, D=10_000, memory=False)
    assert json.loads((tmp_path / "scaling.json").read_text()) == rows
    assert [(row["algorithm"], row["n"]) for row in rows if row["auto"]] == [
        ("joint, own weights", 1),
        ("implicit", 10_000),
    ]
    assert all(row["ratio"] > 0.5 for row in rows)


@pytest.mark.slow
def test_plain_training_takes_four_copies_of_the_model():
    assert 3.5 < scaling._copies("plain", 1, 1_000_000) < 7
