"""scikit-learn's callbacks (from 1.9 on): a run of training as a tree of tasks, one for every epoch.

Before 1.9 there are none, and what stands here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn before 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """scikit-learn before 1.9 has no callbacks."""

    def with_callbacks(method: Callable[..., Any]) -> Callable[..., Any]:
        """scikit-learn before 1.9 has no callbacks."""
        return method


__all__ = ["CallbackSupportMixin", "epochs", "fit_task", "with_callbacks"]


@contextmanager
def fit_task(estimator: Any, n_epochs: int, **data: Any) -> Iterator[Callable[..., bool]]:
    """The whole fit of an estimator as a task with one child per epoch; yields what ends an epoch.

    ``data`` (X, y, metadata) is shown to the callbacks.
    """
    if not hasattr(estimator, "_init_callback_context"):
        yield lambda **_: False
        return
    context = estimator._init_callback_context(max_subtasks=n_epochs)
    context.call_on_fit_task_begin(estimator=estimator, **data)
    with epochs(estimator, context, n_epochs, **data) as end_epoch:
        yield end_epoch
    context.call_on_fit_task_end(estimator=estimator, **data)


@contextmanager
def epochs(estimator: Any, context: Any, n_epochs: int, **data: Any) -> Iterator[Callable[..., bool]]:
    """Epochs as children of a task; yields a function that ends one and says whether a callback wants to stop there."""
    if context is None:
        yield lambda **_: False
        return

    def begin() -> Any:
        return context.subcontext(task_name="epoch").call_on_fit_task_begin(estimator=estimator, **data)

    current, number = begin(), 1

    def end_epoch(**more: Any) -> bool:
        nonlocal current, number
        stop = bool(current.call_on_fit_task_end(estimator=estimator, **data, **more))
        if number < n_epochs and not stop:
            current, number = begin(), number + 1
        return stop

    yield end_epoch
