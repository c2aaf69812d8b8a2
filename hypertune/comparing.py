"""Values of lists, compared in short trainings on all folds, or as many as is cheap.

chosen, own, tried = compare(choices, own_values(choices, settings), estimator, make_task, progress=False)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sklearn.base import clone
from torch import Tensor
from tqdm.auto import tqdm

from hypertune.choices import Values, alternatives, choose
from hypertune.folds import net_of
from hypertune.starts import Tried, screened_share, try_settings
from hypertune.task import Task


def compare(
    choices: Mapping[str, list[Any]],
    first: Values,
    estimator: Any,
    make_task: Callable[[], Task],
    *,
    progress: bool,
) -> tuple[Values, dict[str, Any], Tried | None]:
    """Give the estimator the best values, one parameter after the other.

    What a value is worth are the losses of the best of a few settings (:func:`hypertune.starts.try_settings`: of ``first`` those that are tried for a learning
    rate, of the others those that are near the best of these), with which it was trained for the same share of a fit as all others, and from the same
    seed. One whose short trainings would not be those of fits is left out with a warning.

    Parameters
    ----------
    choices : mapping from str to list
    first : dict from str to value
        Where it begins; the user's objects are copied, as scikit-learn does.
    estimator : estimator
        A copy of the user's, which gets the values.
    make_task : callable ``() -> Task``
        What is to be trained, as the estimator is.
    progress : bool
        Whether to show how many values are done.

    Returns
    -------
    chosen : dict from str to value
        ``first`` itself if nothing is better.
    own : dict from str to value
        The whole setting of the estimator with ``first``; empty if there was nothing to compare.
    tried : Tried or None
        The trainings with ``first``, if there were any.
    """
    own: dict[str, Any] = {}
    known: Tried | None = None
    share = 0.0
    others = alternatives(choices, first)

    def set_values(values: Values) -> None:
        estimator.set_params(**clone(values, safe=False))

    def losses_at(values: Values) -> Tensor | None:
        nonlocal own, known, share
        bar.update()
        with _noted(values, but=first):
            set_values(values)
            task = make_task()
            if values is first:
                own = values | task.space.decode(task.current)
                share = _share(estimator, first, others, rows=min(len(fold.train.x) for fold in task.folds))
            tried = try_settings(task, share, known and known.seed, near=known)
        if tried is None:
            warnings.warn(
                f"{values} cannot be compared: its short trainings would not be those of fits. A function of yours changes from call to call, weights "
                f"have a hook, or the model is too large. {'Nothing is chosen.' if values is first else 'It is left out.'}",
                UserWarning,
                stacklevel=2,
            )
            return None
        known = known or tried
        return tried.losses

    with tqdm(total=1 + len(others), desc="values", disable=not progress) as bar:
        chosen = choose(choices, first, losses_at)
    set_values(chosen)
    return chosen, own, known


def _share(estimator: Any, first: Values, others: list[tuple[str, Any]], rows: int) -> float:
    """The share of a fit on so many rows that is enough for each value: for the fewest epochs and the largest batches."""
    epochs, per_epoch = [], []
    for values in [first, *(first | {name: value} for name, value in others)]:
        with _noted(values, but=first):
            net = net_of(clone(estimator).set_params(**clone(values, safe=False)))
        epochs.append(net.max_epochs)
        per_epoch.append(math.ceil(rows / min(net.batch_size, rows)))
    return screened_share(min(epochs), min(per_epoch))


@contextmanager
def _noted(values: Values, but: Values) -> Iterator[None]:
    """Errors say with which values of lists they were, unless these are the first."""
    try:
        yield
    except Exception as error:
        if values is not but:
            error.add_note(f"This was with {values}.")
        raise
