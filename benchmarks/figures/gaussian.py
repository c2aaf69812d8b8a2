"""The Gaussian processes of the figures: the paper's, and one as a practitioner would set it up.

The released code fits ``GaussianProcessRegressor(RBF(), n_restarts_optimizer=1)`` to the losses as they are: mean zero, no noise and one
length scale for all hyperparameters. The fair one has normalised losses, a length scale for each hyperparameter, a Matérn kernel and noise.
"""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

_FEW = 100  # pairs up to which the likelihood has several maxima; beyond, restarts changed no prediction


def paper_gp(lam: np.ndarray, losses: np.ndarray, seed: int) -> GaussianProcessRegressor:
    """The released code's GP, fitted to λ (N, n) and losses (N,)."""
    return _fit(GaussianProcessRegressor(RBF(), n_restarts_optimizer=1, random_state=seed), lam, losses)


def fair_gp(
    lam: np.ndarray, losses: np.ndarray, seed: int, *, width: float, restarts: int = 5
) -> GaussianProcessRegressor:
    """A GP with normalised losses, ARD Matérn 5/2 and noise, fitted to λ (N, n) and losses (N,).

    Parameters
    ----------
    width : float
        Of the range of each hyperparameter; length scales begin there.
    restarts : int, default=5
        Of the likelihood's maximisation, if there are few pairs.
    """
    scales = Matern(np.full(lam.shape[1], width), (width / 6, 20 * width), nu=2.5)
    kernel = ConstantKernel() * scales + WhiteKernel(1e-2, (1e-6, 0.1))
    restarts = restarts if len(lam) <= _FEW else 0
    gp = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=restarts, random_state=seed)
    return _fit(gp, lam, losses)


def _fit(gp: GaussianProcessRegressor, lam: np.ndarray, losses: np.ndarray) -> GaussianProcessRegressor:
    with warnings.catch_warnings():  # a length scale at its bound is a hyperparameter that does not matter
        warnings.simplefilter("ignore", ConvergenceWarning)
        return gp.fit(lam, losses)
