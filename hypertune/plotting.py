"""What a search learned, as scikit-learn draws things: displays made by ``from_search``, which draw into Matplotlib axes.

Needs Matplotlib: ``pip install "hypertune[plot]"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from hypertune.response import BestResponse
from hypertune.search import HyperTrainingSearchCV

_POINTS = 41
_LINES = 100
_WITH_BAND, _WITHOUT = 4.0, 1.0  # units of λ either side of the tuned setting


class ResponseDisplay:
    """The validation loss along one hyperparameter, the others as tuned: what the hypernetwork learned, with nothing retrained.

    Make it with :meth:`from_search`.

    Parameters
    ----------
    name : str
        The hyperparameter.
    values : ndarray of shape (P,)
        Where the loss was looked at.
    losses : ndarray of shape (P, K)
        Validation loss, a column for each fold.
    band : ndarray of shape (P, 2) or None
        Where retraining would put their mean.
    tuned : float
        The tuned value.
    log : bool
        Whether the axis is logarithmic.

    Attributes
    ----------
    ax_, figure_
        Matplotlib's, once it is drawn.
    """

    def __init__(
        self, *, name: str, values: np.ndarray, losses: np.ndarray, band: np.ndarray | None, tuned: float, log: bool
    ):
        self.name, self.values, self.losses, self.band, self.tuned, self.log = name, values, losses, band, tuned, log

    @classmethod
    def from_search(
        cls,
        search: HyperTrainingSearchCV,
        name: str,
        *,
        values: Sequence[float] | None = None,
        coverage: float = 0.9,
        ax: Any = None,
    ) -> Self:
        """Look along ``name``, and draw.

        Parameters
        ----------
        search : HyperTrainingSearchCV
            Fitted.
        name : str
            A hyperparameter of one number.
        values : sequence of float, optional
            Where. None means four units of λ either side where there is a band, and one where there is none.
        coverage : float, default=0.9
            Of the band.
        ax : matplotlib.axes.Axes, optional
            Where to draw; None means a new figure.

        Raises
        ------
        ValueError
            For a name that was not tuned or has many values, and as :meth:`BestResponse.validation_curve`.
        """
        check_is_fitted(search, "best_response_")
        response = search.best_response_
        known = {h.name: h for h in response.space.hyperparameters}
        if name not in known or known[name].size > 1:
            single = [h.name for h in known.values() if h.size == 1]
            raise ValueError(
                f"{name!r} is not a hyperparameter of one number that the response was learned for; those are {single}."
            )
        h, tuned = known[name], float(np.ravel(known[name].flatten(response.params[name]))[0])
        has_band = response.sigma is not None and response.verified is not None
        if values is None:
            reach = _WITH_BAND if has_band else _WITHOUT
            lam = torch.from_numpy(h.encode(tuned) + np.linspace(-reach, reach, _POINTS))
            values = [h.arrange(value) for value in np.unique(h.decode(lam).numpy())[:, None]]  # those at a bound once
        losses = response.validation_curve(name, values)
        band = response.validation_band(name, values, coverage=coverage) if has_band else None
        found = cls(
            name=name,
            values=np.asarray([np.ravel(h.flatten(value))[0] for value in values]),
            losses=losses,
            band=band,
            tuned=tuned,
            log=h.has_log_axis,
        )
        return found.plot(ax=ax)

    def plot(self, *, ax: Any = None) -> Self:
        """Draw into ``ax``, or into a new figure, as :meth:`from_search` does."""
        ax = _axes(1)[0] if ax is None else ax
        for losses in self.losses.T if self.losses.shape[1] > 1 else ():
            ax.plot(self.values, losses, color="C0", linewidth=0.7, alpha=0.4)
        ax.plot(self.values, self.losses.mean(axis=1), color="C0", label="response, mean over folds")
        if self.band is not None:
            ax.fill_between(self.values, *self.band.T, color="C0", alpha=0.15, label="where retraining puts it")
        ax.axvline(self.tuned, color="C1", linestyle="--", label="tuned")
        ax.set(xlabel=self.name, ylabel="validation loss", xscale="log" if self.log else "linear")
        ax.legend()
        self.ax_, self.figure_ = ax, ax.figure
        return self


class PathDisplay:
    """How a search went: its losses, and the path of each hyperparameter, against epochs.

    Make it with :meth:`from_search`.

    Parameters
    ----------
    history : dict
        ``history_`` of a search.
    log : dict from str to bool
        The hyperparameters, and whether the axis of each is logarithmic.

    Attributes
    ----------
    axes_ : list
        The losses' first, then one for each hyperparameter.
    figure_
        Matplotlib's, once it is drawn.
    """

    def __init__(self, *, history: dict[str, Any], log: dict[str, bool]):
        self.history, self.log = history, log

    @classmethod
    def from_search(cls, search: HyperTrainingSearchCV, *, axes: Any = None) -> Self:
        """Draw a fitted search.

        Parameters
        ----------
        search : HyperTrainingSearchCV
            Fitted.
        axes : array of matplotlib.axes.Axes, optional
            One more than there are hyperparameters; None means a new figure. Of a hyperparameter with many values a hundred are
            drawn.

        Raises
        ------
        ValueError
            For another number of axes.
        """
        check_is_fitted(search, "history_")
        response: BestResponse = search.best_response_
        log = {h.name: h.has_log_axis for h in response.space.hyperparameters}
        return cls(history=search.history_, log=log).plot(axes=axes)

    def plot(self, *, axes: Any = None) -> Self:
        """Draw into ``axes``, or into a new figure, as :meth:`from_search` does."""
        axes = _axes(1 + len(self.log)) if axes is None else list(np.ravel(axes))
        if len(axes) != 1 + len(self.log):
            raise ValueError(f"axes must be {1 + len(self.log)}: for the losses and {list(self.log)}; got {len(axes)}.")
        epoch = self.history["epoch"]
        for name in ("train_loss", "validation_loss"):
            axes[0].plot(epoch, self.history[name], label=name.replace("_", " "))
        axes[0].set(xlabel="epoch", ylabel="loss")
        axes[0].legend()
        for ax, (name, log) in zip(axes[1:], self.log.items(), strict=True):
            path = self.history[name].reshape(len(epoch), -1)
            path = path[:, :: math.ceil(path.shape[1] / _LINES)]
            many = path.shape[1] > 1
            ax.plot(epoch, path, color="C0", linewidth=0.7 if many else 1.5, alpha=0.5 if many else 1.0)
            ax.set(xlabel="epoch", ylabel=name, yscale="log" if log else "linear")
            if log:  # at least a factor of e: what moved by less did not move
                low, high = ax.get_ylim()
                wider = max(1 - float(np.log(high / low)), 0.0) / 2
                ax.set_ylim(low * np.exp(-wider), high * np.exp(wider))
        self.axes_, self.figure_ = axes, axes[0].figure
        return self


def _axes(number: int) -> list[Any]:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('Displays need Matplotlib: pip install "hypertune[plot]".') from error
    _, axes = plt.subplots(1, number, figsize=(4 * number, 3.2), layout="constrained", squeeze=False)
    return list(axes[0])
