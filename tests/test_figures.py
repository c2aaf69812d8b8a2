"""Every figure at smoke size on synthetic images, and the redrawing of what was committed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks.figures import FIGURES, linear
from benchmarks.figures.rows import markdown, row, spread
from benchmarks.figures.runner import read, redraw, run


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """MNIST's four files with 360 and 100 images: a blurred digit-like pattern for each class, and noise."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    patterns = rng.random((10, 28, 28)) ** 4
    for part, rows in (("train", 360), ("t10k", 100)):
        labels = np.arange(rows, dtype=np.uint8) % 10
        images = (200 * patterns[labels] + 55 * rng.random((rows, 28, 28))).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


# --- every figure --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_writes_its_rows_picture_and_table(name: str, directory: Path, tmp_path: Path, capsys):
    rows = run(name, "smoke", 2, str(directory), tmp_path)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["rows"] == rows
    assert result["budget"] == "smoke"
    for r in read(tmp_path / f"{name}.json"):
        assert r.keys() >= {"problem", "solver", "seed", "seconds", "step", "valid", "test", "versions", "threads"}
        losses = [r[loss] for loss in ("valid", "test") if r[loss] is not None]
        assert np.isfinite(losses).all()
    assert {r["seed"] for r in rows} == {0, 1}
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert FIGURES[name].TITLE in shown
    assert FIGURES[name].table(rows) in shown
    assert "| --- |" in shown


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_where_its_constants_are_from_and_how_to_run_it(name: str):
    assert FIGURES[name].BUDGETS.keys() == {"smoke", "full"}
    text = str(FIGURES[name].__doc__)
    missing = [word for word in ("paper", "ours", "Deviations", f"python -m benchmarks {name}") if word not in text]
    assert not missing


def test_redrawing_replaces_the_marked_part_of_the_page(tmp_path: Path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    rows = run("fig3", "smoke", 1, None, results)
    page = "# Benchmarks\n\nBefore.\n<!-- fig3 -->\nold\n<!-- end fig3 -->\nAfter.\n"
    (docs / "benchmarks.md").write_text(page)
    assert redraw(results, docs) == ["fig3"]
    written = (docs / "benchmarks.md").read_text()
    assert written == page.replace("old", f"\n{FIGURES['fig3'].table(rows)}\n")
    assert (docs / "fig3.png").exists()
    redraw(results, docs)
    assert (docs / "benchmarks.md").read_text() == written  # a second time changes nothing
    (docs / "benchmarks.md").write_text("# Benchmarks\n")
    with pytest.raises(ValueError, match="<!-- end fig3 -->"):
        redraw(results, docs)


# --- their parts ---------------------------------------------------------------------------------------------------------


def test_rows_are_plain_numbers_of_six_digits():
    made = row("grid", seconds=1.23456789, lam=torch.tensor([-7.0, 1 / 3]), name="a", step=3)
    assert made == {
        "solver": "grid", "seconds": 1.23457, "step": 3, "valid": None, "test": None, "lam": [-7.0, 0.333333], "name": "a",
    }  # fmt: skip
    assert spread([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert spread([1.0, np.inf]) == "–"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_split_is_the_paper_s(directory: Path):
    data = linear.load(str(directory), (None, 50, 20))
    assert [tuple(part.x.shape) for part in data] == [(300, 785), (50, 785), (20, 785)]
    assert all((part.x[:, -1] == 1).all() and (part.y.sum(dim=1) == 1).all() for part in data)
    drawn = [linear.load(str(directory), (10, 1, 1), seed=seed).train.x for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("n", [1, 10, linear.D])
def test_the_ridge_solution_has_no_gradient(n: int, directory: Path):
    rows = linear.load(str(directory), (40, 1, 1), dtype=torch.float64).train
    lam = torch.linspace(-4.0, 1.0, n, dtype=torch.float64)
    w = linear.ridge(rows, lam).requires_grad_()
    (gradient,) = torch.autograd.grad(linear.mse(w, *rows) + linear.l2(w, lam), w)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_the_losses_of_stacked_models_are_torch_s(directory: Path):
    rows = linear.load(str(directory), (30, 1, 1)).train
    w = torch.randn(2, 3, linear.D, generator=torch.Generator().manual_seed(0))
    y = rows.x @ w[1, 2].view(10, 785).T
    assert_close(linear.mse(w, *rows)[1, 2], torch.nn.functional.mse_loss(y, rows.y))
    expected = torch.nn.functional.cross_entropy(y, rows.y.argmax(dim=1))
    assert_close(linear.cross_entropy(w, *rows)[1, 2], expected)
    lam = torch.tensor([0.5])
    assert_close(linear.l2(w, lam), linear.l2(w, lam.expand(10)))
    assert_close(linear.l2(w, lam), linear.l2(w, lam.expand(linear.D)))


def test_training_from_scratch_ends_at_the_ridge_solution(directory: Path):
    rows = linear.load(str(directory), (20, 1, 1)).train
    lam = torch.tensor([[0.0], [2.0]])
    w = linear.from_scratch(linear.minibatches(rows, None, 0), lam, 600, seed=0, lr=1e-3, decay=True)
    assert_close(w, linear.ridge_path(rows, lam), rtol=0, atol=2e-4)


def test_minibatches_go_through_all_rows(directory: Path):
    rows = linear.load(str(directory), (30, 1, 1)).train
    batches = linear.minibatches(rows, 10, 0)
    seen = torch.cat([next(batches).x for _ in range(3)])
    assert_close(seen.sum(dim=0), rows.x.sum(dim=0))
