"""X and y in every form that people have them in, through the estimator and through the search, unchanged afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, TorchRegressor
from tests.searches import assert_scores_are_those_of_own_fits

SPACE = {"weight_decay": loguniform(1e-6, 1e0)}
NET = TorchClassifier(MLP(hidden=(8,)), max_epochs=2, random_state=0)


def tune(estimator: Any, X: Any, y: Any) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(estimator, SPACE, cv=2, random_state=0, error_score="raise").fit(X, y)


def _read_only(X: np.ndarray) -> np.ndarray:
    X = X.copy()
    X.setflags(write=False)
    return X


def _memmap(X: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "X.npy", X)
    return np.load(folder / "X.npy", mmap_mode="r")


FORMS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "list": lambda X, folder: X.tolist(),
    "pandas": lambda X, folder: pd.DataFrame(X, columns=list("abcd")),
    "polars": lambda X, folder: pl.DataFrame(X, schema=list("abcd")),
    "torch": lambda X, folder: torch.from_numpy(X.copy()),
    "memmap": _memmap,
    "fortran": lambda X, folder: np.asfortranarray(X),
    "read-only": lambda X, folder: _read_only(X),
    "negative strides": lambda X, folder: X[::-1].copy()[::-1],
    "big-endian": lambda X, folder: X.astype(">f8"),
    "float32": lambda X, folder: X.astype(np.float32),
    "object": lambda X, folder: X.astype(object),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_X_gives_the_same_search(iris, form: str, tmp_path: Path):
    X, y = iris
    given = FORMS[form](X, tmp_path)
    reference = tune(NET, X, y)
    found = tune(NET, given, y)
    assert_allclose(np.asarray(given, dtype=float), X, rtol=1e-6)
    assert_allclose(found.predict_proba(given), reference.predict_proba(X), rtol=1e-3, atol=1e-4)
    assert found.best_params_ == pytest.approx(reference.best_params_, rel=1e-2)
    if form in ("pandas", "polars"):
        assert_array_equal(found.feature_names_in_, list("abcd"))


@pytest.mark.parametrize("dtype", [np.float16, np.int32, bool])
def test_narrow_types_of_X_train(iris, dtype):
    X, y = iris
    assert tune(NET, X.astype(dtype), y).predict(X.astype(dtype)).shape == y.shape


LABELS: dict[str, Callable[[np.ndarray], Any]] = {
    "strings": lambda y: np.array(["no", "yes"])[y],
    "objects": lambda y: np.array(["no", "yes"], dtype=object)[y],
    "booleans": lambda y: y == 1,
    "signed": lambda y: 2 * y - 1,
    "pandas categorical": lambda y: pd.Series(pd.Categorical(np.array(["no", "yes"])[y], categories=["yes", "no"])),
    "pandas strings": lambda y: pd.Series(np.array(["no", "yes"])[y]),
    "list": lambda y: y.tolist(),
    "torch": lambda y: torch.from_numpy(y),
}


@pytest.mark.parametrize("kind", LABELS)
def test_every_kind_of_label_is_predicted_as_itself(breast_cancer, kind: str):
    X, y = breast_cancer[0][:200], breast_cancer[1][:200]
    labels = LABELS[kind](y)
    found = tune(TorchClassifier(MLP(hidden=()), max_epochs=40, lr=1e-2, random_state=0), X, labels)
    assert_array_equal(found.classes_, np.unique(np.asarray(labels)))
    assert (found.predict(X) == np.asarray(labels)).mean() > 0.9


def test_images_go_through_the_search():
    def conv(shape: tuple[int, int, int], n_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, n_outputs))

    X = np.random.default_rng(0).normal(size=(40, 2, 6, 6))
    found = tune(TorchClassifier(conv, max_epochs=2, random_state=0), X, np.arange(40) % 2)
    assert found.predict_proba(X).shape == (40, 2)


def test_several_targets_go_through_the_search():
    X = np.random.default_rng(0).normal(size=(60, 4))
    Y = X @ np.random.default_rng(1).normal(size=(4, 3))
    found = tune(TorchRegressor(MLP(hidden=()), lr=0.05, random_state=0), X, pd.DataFrame(Y))
    assert found.predict(X).shape == (60, 3)
    assert found.best_score_ > 0.9


def test_sparse_X_is_made_dense_unless_that_is_too_large(iris, monkeypatch):
    X, y = iris
    X = np.where(np.abs(X) < 0.5, 0.0, X)
    found, reference = tune(NET, sparse.csr_matrix(X), y), tune(NET, X, y)
    assert found.best_params_ == reference.best_params_
    assert_allclose(found.predict_proba(sparse.coo_array(X)), reference.predict_proba(X))
    monkeypatch.setattr("hypertune.arrays._MOST_DENSE", X.size // 2 - 1)
    with pytest.raises(ValueError, match=r"dense it would have 75 × 4 values.*TruncatedSVD"):
        NET.__sklearn_clone__().fit(sparse.csr_matrix(X[:75]), y[:75])


class Echo(nn.Module):
    """Outputs the code and the first of the numbers."""

    def __init__(self, sizes: dict[str, int], outputs: int):
        super().__init__()
        self.weight = nn.Linear(sizes["numbers"], outputs)

    def forward(self, numbers: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return torch.cat([code[:, :1], numbers[:, :1]], dim=1) + 0 * self.weight(numbers)


def test_neither_noise_nor_mixup_touches_codes(iris):
    seen = []

    def criterion(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(outputs.detach().clone())
        return outputs.sum(dim=1)

    X = np.c_[iris[0][:100, :2], np.arange(100) % 3]
    net = TorchClassifier(
        Echo, inputs={"numbers": [0, 1], "code": [2]}, criterion=criterion, max_epochs=1, random_state=0
    )
    for noise in ({"input_noise": 5.0}, {"mixup": 1.0}):
        seen.clear()
        net.__sklearn_clone__().set_params(**noise).fit(X, iris[1][:100])
        code, number = torch.cat(seen).T
        assert (code == code.round()).all()
        given = torch.from_numpy(X[:, 0]).float()
        assert not torch.isin(number, given).all()  # which it does touch


def test_noise_that_touches_nothing_is_refused(iris):
    X = np.round(iris[0] * 10)
    net = TorchClassifier(Echo, inputs={"numbers": [0, 1], "code": [2]}, max_epochs=1)
    for name in ("input_noise", "mixup"):
        with pytest.raises(ValueError, match=f"{name} reaches nothing: all columns of inputs hold whole numbers"):
            net.__sklearn_clone__().set_params(**{name: 0.1}).fit(X[:, :3], iris[1])
    search = HyperTrainingSearchCV(net, {"mixup": uniform(0, 1)}, cv=2)
    with pytest.raises(ValueError, match=r"\['mixup'\]: it reaches nothing"):
        search.fit(X[:100, :3], iris[1][:100])


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_frames_with_columns_of_several_kinds_through_a_column_transformer(frame):
    rng = np.random.default_rng(0)
    number, colour = rng.normal(size=(2, 120)), rng.choice(["red", "green", "blue"], size=120)
    X = frame({"a": number[0], "colour": colour, "b": number[1]})
    y = np.where(number[0] + (colour == "red") > 0.5, "yes", "no")
    columns = ColumnTransformer([("numbers", StandardScaler(), ["a", "b"]), ("colour", OneHotEncoder(), ["colour"])])
    model = make_pipeline(columns, NET.__sklearn_clone__().set_params(max_epochs=30, lr=1e-2))
    space = {"torchclassifier__weight_decay": loguniform(1e-6, 1e0)}
    kept = X.copy() if frame is pd.DataFrame else X.clone()
    found = HyperTrainingSearchCV(model, space, cv=3, random_state=0, error_score="raise").fit(X, y)
    assert found.score(X, y) > 0.9
    assert_array_equal(found.feature_names_in_, ["a", "colour", "b"])
    assert found.predict(X[:3]).tolist() == found.best_estimator_.predict(X[:3]).tolist()
    assert X.equals(kept)
    if frame is pd.DataFrame:
        with pytest.raises(ValueError, match="columns are missing"):
            found.predict(X.drop(columns="colour"))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_folds_of_other_widths_are_filled_up_and_verified_as_they_are(noise: float):
    """A category that one fold's training rows lack: zeros in the hyper-training, and none in the fits that are scored."""
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=60), "b": rng.choice(["x", "y"], 60)})
    X.loc[3, "b"], X.loc[30, "b"] = "rare", "rarer"
    y = (X.a + (X.b == "x") > 0.5).to_numpy()
    encode = ColumnTransformer([("b", OneHotEncoder(handle_unknown="ignore"), ["b"])], remainder="passthrough")
    net = clone(NET).set_params(dtype="float64", input_noise=noise)
    estimator, cv = make_pipeline(encode, net), KFold(3)
    space = {f"torchclassifier__{name}": prior for name, prior in SPACE.items()}
    search = HyperTrainingSearchCV(estimator, space, cv=cv, random_state=0, scoring="neg_log_loss", error_score="raise")
    search.fit(X, y)
    assert_scores_are_those_of_own_fits(search, X, y, rel=1e-12)
    assert search.best_estimator_[-1].n_features_in_ == 5
    assert search.best_response_.folds[0].net._noisy.tolist() == [1, 1, 1, 1, 0]  # no noise on what some have not got
    for k, (_, valid) in enumerate(cv.split(X)):
        fitted = search.best_response_.estimator_at(fold=k)
        assert fitted[-1].n_features_in_ == len(fitted[0].get_feature_names_out()) == 4 + (k == 2)
        loss = log_loss(y[valid], fitted.predict_proba(X.iloc[valid]), labels=[False, True])
        name = "torchclassifier__weight_decay"
        assert loss == pytest.approx(
            search.best_response_.validation_curve(name, [search.best_response_.params[name]])[0, k]
        )


def test_codes_that_the_dtype_cannot_tell_apart_are_refused_and_amounts_are_not():
    """Beyond 2²⁴ two whole numbers are one float32."""

    class Hashed(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.code, self.out = nn.Embedding(8, 3), nn.Linear(3, m)

        def forward(self, code):
            return self.out(self.code(code[:, 0].long() % 8))

    codes = np.random.default_rng(0).integers(0, 2**26, (80, 1))
    y, small = codes[:, 0] % 2, codes % 2**20
    net = TorchClassifier(Hashed, inputs={"code": [0]}, max_epochs=30, lr=0.1, random_state=0)
    with pytest.raises(ValueError, match=r"inputs\['code'\] holds whole numbers up to \d+, .* beyond 16777216"):
        tune(net, codes, y)
    fitted = clone(net).fit(small, y)
    with pytest.raises(ValueError, match="holds whole numbers"):
        fitted.predict(codes)
    assert tune(clone(net).set_params(dtype="float64"), codes, y).score(codes, y) == 1.0
    amounts = np.column_stack([1e9 + 0.5 * np.arange(80.0), y])
    TorchClassifier(MLP((8,)), max_epochs=1).fit(amounts, y)


def test_noise_of_its_own_for_each_place_of_a_row():
    X = np.random.default_rng(0).normal(size=(40, 8, 4))
    noise = np.zeros((8, 4))
    noise[2, 1] = 3.0
    rows: list[torch.Tensor] = []

    class Seeing(nn.Sequential):
        def forward(self, x):
            rows.append(x.detach())
            return super().forward(x)

    module = lambda shape, m: Seeing(nn.Flatten(), nn.Linear(32, m))  # noqa: E731
    TorchClassifier(module, input_noise=noise, batch_size=40, max_epochs=1).fit(X, X[:, 0, 0] > 0)
    seen = torch.sort(rows[-1], dim=0)[0]
    differs = (seen - torch.sort(torch.from_numpy(X).float(), dim=0)[0]).abs().amax(dim=0) > 1e-6
    assert differs.nonzero().tolist() == [[2, 1]]


def test_what_are_codes_is_learned_from_the_rows_of_fit(iris):
    """A few rows of amounts may happen to hold whole numbers only."""

    class Both(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.out = nn.Linear(1, m)

        def forward(self, a, b):
            return self.out(a)

    X, y = np.column_stack([iris[0][:, 0], 1e7 + 1e5 * iris[0][:, 1] ** 2]), iris[1]
    X[0, 1] = 3e7
    fitted = TorchClassifier(Both, inputs={"a": [0], "b": [1]}, max_epochs=1, random_state=0).fit(X, y)
    assert fitted.predict(X[:1]).shape == (1,)


@pytest.mark.parametrize(
    "numbers", [[True, True, False], np.array([True, True, False]), slice(0, 2), range(2)], ids=["list", "mask", "slice", "range"]
)  # fmt: skip
def test_a_group_of_columns_may_be_a_mask_or_a_slice(iris, numbers):
    X, y = np.c_[iris[0][:100, 1::-1], np.arange(100) % 3], iris[1][:100]
    net = TorchClassifier(Echo, inputs={"numbers": [0, 1], "code": [2]}, max_epochs=1, random_state=0)
    other = net.__sklearn_clone__().set_params(inputs={"numbers": numbers, "code": [False, False, True]})
    assert_allclose(other.fit(X, y).predict_proba(X), net.fit(X, y).predict_proba(X))


def test_a_mask_is_of_all_columns(iris):
    net = TorchClassifier(Echo, inputs={"numbers": [True, False], "code": [2]})
    with pytest.raises(ValueError, match=r"a mask of shape \(2,\), and X has 4 columns"):
        net.fit(*iris)


def test_an_unseen_code_is_explained_in_predict_too(iris):
    class Embeds(nn.Module):
        def __init__(self, widths, m):
            super().__init__()
            self.embed = nn.Embedding(3, m)

        def forward(self, code):
            return self.embed(code[:, 0].long())

    X = (np.arange(150) % 3)[:, None]
    net = TorchClassifier(Embeds, inputs={"code": [0]}, max_epochs=1, random_state=0).fit(X, iris[1])
    with pytest.raises(IndexError, match="an embedding's codes go from 0 to num_embeddings - 1"):
        net.predict(X + 1)
