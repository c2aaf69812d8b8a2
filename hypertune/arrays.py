"""Arrays that a user passes to an estimator: checked, and made dense, contiguous and finite.

>>> fingerprint(np.arange(3)) == fingerprint(torch.arange(3))
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import joblib
import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

_MOST_DENSE = 2**28  # values of a sparse X


def dense(X: Any) -> np.ndarray:
    """A sparse matrix as an array, if it is not too large for that."""
    if not issparse(X):
        return X
    if math.prod(X.shape) > _MOST_DENSE:
        raise ValueError(
            f"X is sparse, and dense it would have {X.shape[0]:,} × {X.shape[1]:,} values; a torch module needs them all. Make fewer "
            "features of it first: TruncatedSVD, SelectKBest, max_features=... of a vectorizer."
        )
    return X.toarray()


def contiguous(array: np.ndarray, dtype: str) -> np.ndarray:
    """A private copy, C-ordered; ``dtype`` is "float32" or "float64". Refuses values that are too large for it."""
    with np.errstate(over="ignore"):
        copied = np.array(array, dtype=np.dtype(dtype), order="C")
    if array.dtype != copied.dtype and not np.isfinite(copied).all():
        raise ValueError(f"The data contain a value too large for {dtype}. Scale them, or set dtype='float64'.")
    return copied


def with_weight(X: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of non-zero weight, and the weights divided by their mean: their scale means nothing, and may overflow float32."""
    kept = weight > 0
    if not kept.any():
        raise ValueError("sample_weight is zero for every row.")
    weight = weight[kept].astype(float)
    return X[kept], y[kept], weight / weight.mean()


def fingerprint(*arrays: Any) -> str:
    """The same for the same arrays or tensors, in any process."""
    return joblib.hash([a.cpu().numpy() if isinstance(a, Tensor) else a for a in arrays])


def find_columns(
    inputs: Mapping[str, Any] | None, row_shape: tuple[int, ...], names: Sequence[str], device: Any
) -> dict[str, Tensor] | None:
    """``inputs`` of an estimator as numbers of columns; ``names`` are those of the columns of X, if it has any.

    A group of columns is a list of names or numbers, a mask of all columns, or a slice.
    """
    if inputs is None:
        return None
    if len(row_shape) != 1 or not inputs:
        raise ValueError(f"inputs={inputs!r} needs X with columns, and a name for at least one group of them.")
    names, found = list(names), {}
    for argument, columns in inputs.items():
        if isinstance(columns, (str, Integral)):
            raise ValueError(f"inputs[{argument!r}] must be a list of columns, got {columns!r}; write [{columns!r}].")
        if isinstance(columns, slice):
            columns = range(row_shape[0])[columns]
        elif (mask := np.asarray(columns)).dtype == bool:
            if mask.shape != row_shape:
                raise ValueError(
                    f"inputs[{argument!r}]: a mask of shape {mask.shape}, and X has {row_shape[0]} columns."
                )
            columns = mask.nonzero()[0]
        numbers = [names.index(column) if column in names else column for column in columns]
        for column in numbers:
            if not isinstance(column, (int, np.integer)) or not 0 <= column < row_shape[0]:
                known = names or f"numbers from 0 to {row_shape[0] - 1}"
                raise ValueError(f"inputs[{argument!r}]: X has no column {column!r}; it has {known}.")
        found[argument] = torch.tensor(numbers, dtype=torch.long, device=device)
    return found


def find_noisy(X: np.ndarray, codes: Mapping[str, Tensor]) -> np.ndarray:
    """Which columns noise and mixup may touch, as ones and zeros: not those of codes, which :func:`find_codes` gives."""
    noisy = np.ones(X.shape[1:])
    for group in codes.values():
        noisy[group.cpu().numpy()] = 0.0
    return noisy


def find_codes(X: np.ndarray, columns: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The inputs that hold whole numbers only."""
    return {name: group for name, group in (columns or {}).items() if _are_whole(X[:, group.cpu().numpy()])}


def check_codes(X: np.ndarray, codes: Mapping[str, Tensor], dtype: str) -> None:
    """Refuse codes that the dtype cannot represent exactly."""
    most = 2 ** (np.finfo(dtype).nmant + 1)
    for name, group in codes.items():
        own = X[:, group.cpu().numpy()]
        if own.size and np.abs(own).max() > most:
            raise ValueError(
                f"inputs[{name!r}] holds whole numbers up to {np.abs(own).max():.0f}, which are taken for codes, and {dtype} cannot tell those "
                f"beyond {most} apart. Number them from 0 (sklearn's OrdinalEncoder), scale them if they are amounts, or set dtype='float64'."
            )


def _are_whole(numbers: np.ndarray) -> bool:
    own = numbers.astype(float)
    return bool((own == np.round(own)).all())


def check_strengths(name: str, value: Any) -> None:
    """Refuse negative strengths of a penalty in a dict by parameter."""
    for key, strength in value.items() if isinstance(value, Mapping) else ():
        if not np.all(np.asarray(strength, dtype=float) >= 0):
            raise ValueError(f"{name}[{key!r}] must be zero or positive, got {strength!r}.")


def check_noise(value: Any, row_shape: tuple[int, ...]) -> None:
    """Refuse input noise that is not one number for each feature."""
    if not np.ndim(value):
        return
    noise = np.asarray(value, dtype=float)
    if noise.shape != row_shape or not (noise >= 0).all():
        raise ValueError(
            f"input_noise must be a number or one number for each feature, shape {row_shape}, zero or positive; got {value!r}."
        )


def check_device(device: Any) -> None:
    """Refuse a device that is not available here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        here = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise ValueError(
            f"device={str(device)!r} is not available ({str(error).splitlines()[0]}). Here there is {here}."
        ) from error
