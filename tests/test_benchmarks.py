from __future__ import annotations

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from benchmarks import mnist
from benchmarks.__main__ import NAMES, main
from benchmarks.comparison import compare
from benchmarks.problems import SKORCH, digits
from benchmarks.solvers import run
from hypertune import TorchClassifier


def _write_idx(path: Path, array: np.ndarray, zipped: bool) -> None:
    raw = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    (path.with_suffix(".gz") if zipped else path).write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, (part, rows) in enumerate((("train", 7), ("t10k", 3))):
        _write_idx(tmp_path / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (rows, 28, 28), np.uint8), number == 0)
        _write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(rows, dtype=np.uint8), number == 1)
    return tmp_path


def test_mnist_reads_idx_files_plain_or_zipped(directory: Path, monkeypatch):
    X, y, X_test, y_test = mnist.load(directory)
    assert (X.shape, X_test.shape, X.dtype) == ((7, 784), (3, 784), np.float32)
    assert y.tolist() == list(range(7))
    assert 0 <= X.min() < X.max() <= 1
    monkeypatch.setenv(mnist.VARIABLE, str(directory))
    assert_allclose(mnist.load()[2], X_test)
    assert y_test.tolist() == [0, 1, 2]


def test_missing_mnist_says_both_ways(directory: Path, monkeypatch):
    (directory / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte nor .*\.gz is in"):
        mnist.load(directory)
    monkeypatch.delenv(mnist.VARIABLE, raising=False)

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(mnist, "fetch_openml", unreachable)
    with pytest.raises(FileNotFoundError, match=r"Give --mnist DIR or set HYPERTUNE_MNIST_DIR"):
        mnist.load()
    (directory / "train-images-idx3-ubyte").write_bytes(b"not an idx file")
    with pytest.raises(ValueError, match="not an IDX file"):
        mnist.load(directory)


@pytest.mark.slow
def test_a_comparison_writes_its_table_picture_and_rows(tmp_path: Path, capsys):
    def small(seed: int):
        problem = digits(seed)
        net = problem.estimator.set_params(torchclassifier__max_epochs=4)
        return replace(problem, estimator=net, X=problem.X[:200], y=problem.y[:200])

    compare(small, 2, tmp_path, tpe_trials=2)
    shown = capsys.readouterr().out
    assert "TPE's 2 trials took" in shown
    rows = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert [row["solver"] for row in rows] == ["defaults", "hypertune", "tpe", "random", "tpe-2"] * 2
    assert all(np.isfinite(row["test_loss"]) and 0 < row["test_accuracy"] <= 1 for row in rows)
    by_solver = {row["solver"]: row for row in rows if row["seed"] == 0}
    assert by_solver["tpe"]["seconds"] >= by_solver["hypertune"]["seconds"]  # never less time than ours
    for row in rows:
        assert row["curve"][-1][1] <= row["curve"][0][1] + 1e-12
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert set(by_solver) <= {line.split()[0] for line in shown.splitlines() if line}


@pytest.mark.slow
def test_the_arena_runs_every_solver_resumes_and_sums_up(tmp_path: Path, capsys, monkeypatch):
    from benchmarks import arena, problems, solvers

    def small(seed: int, directory: str | None):
        problem = problems.table("small", seed, "iris", "layers")
        return replace(problem, estimator=problem.estimator.set_params(torchclassifier__max_epochs=9))

    monkeypatch.setitem(problems.ARENA, "small", small)
    pruning = (
        ("median", "hyperband", "early-stop", "one-wd-stop") if not hasattr(TorchClassifier, "set_callbacks") else ()
    )  # scikit-learn before 1.9
    names = [name for name in solvers.SOLVERS if name not in pruning]
    rows = arena.fight(["small"], names, 2, tmp_path)
    assert [row["solver"] for row in rows] == ["defaults", "hypertune", *names[2:]] * 2
    assert all(np.isfinite(row["test_loss"]) and row["n"] == 11 for row in rows)
    for seed in (0, 1):
        one_setting = ("defaults", "early-stop")
        ours, *others = (row for row in rows if row["seed"] == seed and row["solver"] not in one_setting)
        for other in others:
            assert other["seconds"] >= ours["seconds"]
            end, target = other["curve"][-1][1], round(ours["cv_loss"], 5)  # the curve is rounded
            assert end <= target if other["matched"] < np.inf else end >= target
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    by_accuracy = arena.fight(["small"], ["random", "halving"], 1, tmp_path, scoring="accuracy")
    for row in by_accuracy:
        assert row["test_loss"] == pytest.approx(1 - row["test_accuracy"])
        assert 0 <= row["cv_loss"] < 0.5
    monkeypatch.setattr(solvers, "run", None)  # nothing is run again
    assert len(arena.fight(["small"], names, 2, tmp_path)) == len(rows)


def test_the_summary_counts_ranks_wins_and_matches():
    from benchmarks.arena import summary

    def row(problem, seed, solver, test, matched=float("inf")):
        return {
            "problem": problem, "seed": seed, "solver": solver, "test_loss": test, "cv_loss": test + 0.01, "seconds": 2.0,
            "matched": matched, "n": 3,
        }  # fmt: skip

    rows = [row("a", s, "hypertune", 0.1 + 0.001 * s) for s in range(3)]
    rows += [row("a", s, "tpe", 0.2 + 0.001 * s, matched=20.0) for s in range(3)]
    rows += [row("b", s, "hypertune", 0.5) for s in range(3)] + [
        row("b", s, "tpe", 0.5 + 0.01 * (-1) ** s) for s in range(3)
    ]
    lines = {line.split()[0]: line for line in summary(rows).splitlines() if line}
    assert "1/1/0" in lines["tpe"]
    assert "100%" in lines["tpe"]
    assert "(50% did)" in lines["tpe"]
    assert "1.17" in lines["hypertune"]  # first in five cells of six, second in one
    assert "0.1010 ± 0.0006*" in lines["a"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(TorchClassifier, "set_callbacks"), reason="scikit-learn before 1.9")
def test_early_stopping_is_chosen_on_validation_rows_and_the_last_fit_is_stopped_there():
    from benchmarks import problems, solvers

    problem = problems.table("small", 0, "breast_cancer", "decay")
    problem = replace(problem, estimator=problem.estimator.set_params(torchclassifier__max_epochs=30))
    (trial,) = solvers.early_stopping(problem, 1.0)
    assert 1 < trial.epochs < 30
    curves = []
    for train, valid in problem.cv.split(problem.X, problem.y):
        model, own = clone(problem.estimator), (problem.X[valid], problem.y[valid])
        curves.append([])
        solvers._watch(model, lambda _, net, own=own, scale=model[0]: curves[-1].append(
            log_loss(own[1], net.predict_proba(scale.transform(own[0])))
        ))  # fmt: skip
        model.fit(problem.X[train], problem.y[train])
    assert np.argmin(np.mean(curves, axis=0)) == trial.epochs - 1
    whole, stopped = solvers.run("defaults", problem), solvers.run("early-stop", problem)
    assert stopped.cv_loss == trial.loss < whole.cv_loss
    X, X_test = (StandardScaler().fit(problem.X).transform(Z) for Z in (problem.X, problem.X_test))
    net = clone(problem.estimator.steps[-1][1])
    losses = []
    solvers._watch(net, lambda _, model: losses.append(log_loss(problem.y_test, model.predict_proba(X_test))))
    net.fit(X, problem.y)
    assert stopped.test_loss == pytest.approx(losses[trial.epochs - 1], rel=1e-5)
    assert whole.test_loss == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.slow
def test_bad_seeds_share_their_data_and_differ_in_their_networks(capsys):
    from benchmarks.robustness import measure_robustness

    losses = measure_robustness(2, problems=["iris-3"])["iris-3"]
    assert losses.shape == (2, 2)
    assert len(set(losses[:, 0])) == 2
    assert f"worst {losses[:, 0].max():.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_from_a_setting_that_kills_the_model_ten_random_ones_find_no_more_than_we_do(capsys):
    from benchmarks.stress import measure_stress

    ours, own, random = measure_stress(1, cases=["the same, unequal folds"])[0, 0]
    assert ours < 0.75 * own
    assert ours < 1.1 * random
    assert f"{ours / random:.2f}" in capsys.readouterr().out


def test_every_benchmark_explains_itself(capsys):
    main(["list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:skorch")
def test_skorch_problems_begin_with_the_nets_own_setting_and_are_searched():
    for build in SKORCH.values():
        problem = build(0, None)
        net = problem.estimator[-1]
        assert problem.current["neuralnetclassifier__lr"] == pytest.approx(net.lr)
        assert problem.coordinates.n == 5
    problem = replace(problem, estimator=problem.estimator.set_params(neuralnetclassifier__max_epochs=1))
    found = [run(solver, problem, trials=2) for solver in ("hypertune", "tpe")]
    assert all(one.params.keys() == problem.space.keys() for one in found)
    assert all(np.isfinite(one.test_loss) for one in found)
