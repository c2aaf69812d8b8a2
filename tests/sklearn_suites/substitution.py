"""scikit-learn's own tests, from its installed wheel, with our search in the place of theirs.

The proposal is put behind a grid or a sample, so that the tests may tune any estimator: everything else (splitting, scoring,
errors, metadata, refit, delegation) is what a user of ``HyperTrainingSearchCV`` gets.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import sklearn.model_selection
from sklearn.model_selection import ParameterGrid, ParameterSampler

from hypertune import HyperTrainingSearchCV


class GridSearchCV(HyperTrainingSearchCV):
    """Ours, proposing a grid, under the signature of theirs."""

    _parameter_constraints = {  # noqa: RUF012
        **HyperTrainingSearchCV._parameter_constraints,
        "param_grid": [dict, list],
    }

    def __init__(
        self,
        estimator,
        param_grid,
        *,
        scoring=None,
        n_jobs=None,
        refit=True,
        cv=None,
        verbose=0,
        pre_dispatch="2*n_jobs",
        error_score=np.nan,
        return_train_score=False,
    ):
        self.param_grid = param_grid
        super().__init__(
            estimator,
            param_grid,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            error_score=error_score,
            return_train_score=return_train_score,
        )

    def _propose_candidates(self):
        return list(ParameterGrid(self.param_grid))


class RandomizedSearchCV(HyperTrainingSearchCV):
    """Ours, proposing a random sample, under the signature of theirs."""

    _parameter_constraints = {  # noqa: RUF012
        **HyperTrainingSearchCV._parameter_constraints,
        **sklearn.model_selection.RandomizedSearchCV._parameter_constraints,
    }

    def __init__(
        self,
        estimator,
        param_distributions,
        *,
        n_iter=10,
        scoring=None,
        n_jobs=None,
        refit=True,
        cv=None,
        verbose=0,
        pre_dispatch="2*n_jobs",
        random_state=None,
        error_score=np.nan,
        return_train_score=False,
    ):
        self.n_iter = n_iter
        super().__init__(
            estimator,
            param_distributions,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            random_state=random_state,
            error_score=error_score,
            return_train_score=return_train_score,
        )

    def _propose_candidates(self):
        return list(ParameterSampler(self.param_distributions, self.n_iter, random_state=self.random_state))


OURS: dict[str, Any] = {"GridSearchCV": GridSearchCV, "RandomizedSearchCV": RandomizedSearchCV}


def suite(name: str, *, in_marks: bool = True) -> dict[str, Any]:
    """Everything that pytest collects from the wheel's test module ``name``, with our classes in it.

    The module is executed afresh. With ``in_marks``, ``sklearn.model_selection`` holds our classes meanwhile, so that what the
    module builds while it is imported (``parametrize`` marks, tables) has them too; they are put into its globals anyhow.
    """
    theirs = {key: getattr(sklearn.model_selection, key) for key in OURS}
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    alias = f"{__package__}.{name.replace('.', '_')}"
    module: ModuleType = importlib.util.module_from_spec(spec)
    module.__name__ = alias
    sys.modules[alias] = module  # what its tests define is found by name
    for key in OURS if in_marks else ():
        setattr(sklearn.model_selection, key, OURS[key])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
    finally:
        for key, value in theirs.items():
            setattr(sklearn.model_selection, key, value)
    assert "GridSearchCV" in vars(module)
    vars(module).update({key: value for key, value in OURS.items() if key in vars(module)})
    return {
        key: value
        for key, value in vars(module).items()
        if key.startswith(("test_", "Test")) or type(value).__name__ == "FixtureFunctionDefinition"
    }
