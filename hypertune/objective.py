"""The two losses of the bilevel problem: L_Train(w, λ, x) and L_Valid(w, x), as functions of flat weights w.

``M`` models share one module and one pass: weights are a matrix (M, D), and hyperparameters are tensors (M,), so
that every model has its own weights *and* its own weight decay, dropout rate, ... The training loss of one model is

    mean over rows of  s · ℓ(f_w(x̃), smoothed y)  +  ½ · weight_decay · ‖w‖²  +  l1 · ‖w‖₁  +  the user's penalty(w)
    x̃ = augment(x) + input_noise · ε,  mixed with another row of the minibatch: (1 − share) x̃ + share x̃′, share ≤ mixup/2

where ‖·‖ runs over the weights of two or more dimensions (biases are free), as it does in
``torch.optim.SGD(weight_decay=...)`` with the biases left out. Each of those weights may have its own weight decay and l1,
and each feature its own noise. The validation loss is the first term alone, without
noise, dropout or smoothing.

>>> import torch
>>> from torch import nn
>>> from hypertune.losses import cross_entropy
>>> objective = Objective(nn.Linear(3, 2), cross_entropy)
>>> w = objective.initial_weights()
>>> batch = Batch(torch.zeros(1, 5, 3), torch.zeros(1, 5, dtype=torch.long))
>>> tuple(w.shape), tuple(objective.valid_loss(w[None], batch).shape)
((8,), (1,))
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from hypertune.batches import Batch, Rows
from hypertune.dropout import Value, is_zero
from hypertune.functions import own_copy
from hypertune.losses import CustomLoss, Loss
from hypertune.memory import Memory
from hypertune.penalties import half_squares, half_squares_of, of_models
from hypertune.reach import Reach
from hypertune.stacked import StackedModule

# Hyperparameters of the loss itself, with the interval in which each has a meaning.
LOSS_HYPERPARAMETERS: dict[str, tuple[float, float]] = {
    "weight_decay": (0.0, math.inf),
    "l1": (0.0, math.inf),
    "input_noise": (0.0, math.inf),
    "label_smoothing": (0.0, 1.0),
    "mixup": (0.0, 1.0),
    "sample_weight": (0.0, math.inf),
}
_PIECE = 4096  # rows in one pass
_AUGMENT, _NOISE, _MIXUP = range(3)  # streams of random numbers
NO_NOISE = (
    "reaches nothing: all columns of inputs hold whole numbers, which are taken for codes. Scale those that are not."
)


Strength = Value | Mapping[str, Tensor]  # of a penalty


class Objective(StackedModule):
    """Training and validation loss of M stacked copies of a module.

    Parameters
    ----------
    module, reach, inputs, folds
        See :class:`hypertune.stacked.StackedModule`.
    loss : callable ``(outputs, targets, smoothing) -> per-row loss``
        See :mod:`hypertune.losses`.
    fixed : mapping from str to value, optional
        Values of the hyperparameters of the loss that are not tuned; zero if absent. Those of the penalties may be dicts from
        parameter name to a number or an array that broadcasts to the parameter.
    penalty : callable ``(weights, **hyperparameters) -> scalar``, optional
        Added to the training loss. ``weights`` is a dict from parameter name to tensor; the hyperparameters that are tuned
        arrive as tensors of no dimension.
    augment : callable ``(x, generator, **hyperparameters) -> x``, optional
        Applied to the rows of a training minibatch, (B, ...) → (B, ...). Draws from ``generator`` alone, so that models which
        differ in their hyperparameters share the noise; these arrive as floats.
    noisy : Tensor of shape (features,), optional
        Ones, and zeros where input noise and mixup leave x as it is.
    penalise_biases : bool, default=False
        Whether the penalties include parameters of fewer than two dimensions.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        *,
        fixed: Mapping[str, Any] | None = None,
        reach: Mapping[str, list[Reach]] | None = None,
        penalty: Callable[..., Tensor] | None = None,
        augment: Callable[..., Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        noisy: Tensor | None = None,
        folds: int = 1,
        penalise_biases: bool = False,
    ):
        super().__init__(module, reach=reach, inputs=inputs, folds=folds)
        self.loss, self.penalty, self.augment = loss, penalty, augment
        self._noisy: Tensor | float = 1.0 if noisy is None else noisy
        self._penalised = [k for k, shape in self._shapes.items() if len(shape) > 1 or penalise_biases]
        self.fixed: dict[str, Any] = {name: self._as_fixed(name, value) for name, value in (fixed or {}).items()}

    @property
    def feels_noise(self) -> bool:
        """Whether there is a column that input noise and mixup may touch."""
        return bool(np.any(self._noisy) if isinstance(self._noisy, float) else self._noisy.any())

    # penalties of a finer grain

    def arrangement(self, grain: str, n_features: int) -> dict[str, tuple[int, ...]]:
        """For each penalised parameter the shape of its values at a grain, broadcasting to the parameter.

        Parameters
        ----------
        grain : {"layer", "unit", "weight", "feature"}
        n_features : int
            Inputs (or channels) of the first layer, for "feature".

        Raises
        ------
        ValueError
            If no parameter is penalised, or for "feature" if the first one does not have one column for each input.
        """
        shapes = {k: self._shapes[k] for k in self._penalised}
        if not shapes:
            raise ValueError("the model has no weights of two or more dimensions")
        if grain == "weight":
            return {k: tuple(shape) for k, shape in shapes.items()}
        if grain == "unit":
            return {k: (shape[0], *(1,) * (len(shape) - 1)) for k, shape in shapes.items()}
        arrangement: dict[str, tuple[int, ...]] = dict.fromkeys(shapes, ())
        if grain == "feature":
            its = [k for k in shapes if not self.first or k.startswith(f"{self.first}.")]
            if not its:
                raise ValueError(f"the layer that sees the features, {self.first!r}, has no weights that are trained")
            first = next((k for k in its if shapes[k][1:2] == (n_features,)), its[0])
            shape, layer = shapes[first], self.modules[False].get_submodule(first.rpartition(".")[0])
            if shape[1:2] != (n_features,) or isinstance(layer, nn.Embedding) or not self.first_sees_features:
                raise ValueError(
                    f"the first layer's weight {first!r} has shape {tuple(shape)}, and not one column for each of the "
                    f"{n_features} features"
                    + ("" if self.first_sees_features else ": what enters that layer is not the features, one for one")
                )
            arrangement[first] = (1, n_features, *(1,) * (len(shape) - 2))
        return arrangement

    def index(self, arrangement: Mapping[str, tuple[int, ...]]) -> Tensor:
        """For each weight the number of its value in an arrangement of values, flattened; −1 for none. Shape (D,)."""
        pieces, start = [], 0
        for k, shape in self._shapes.items():
            if k not in arrangement:
                pieces.append(torch.full((shape.numel(),), -1, device="cpu"))
                continue
            numbers = start + torch.arange(math.prod(arrangement[k]), device="cpu").view(arrangement[k])
            pieces.append(numbers.expand(shape).reshape(-1))
            start += math.prod(arrangement[k])
        return torch.cat(pieces).to(self._like.device)

    def by_parameter(self, arrangement: Mapping[str, tuple[int, ...]], values: Tensor) -> dict[str, Tensor]:
        """Values (M, size) of an arrangement → views by parameter name that broadcast to M parameters, as penalties take them."""
        pieces = values.split([math.prod(shape) for shape in arrangement.values()], dim=1)
        padded = {k: (*(1,) * (len(self._shapes[k]) - len(shape)), *shape) for k, shape in arrangement.items()}
        return {k: piece.view(-1, *s) for (k, s), piece in zip(padded.items(), pieces, strict=True)}

    def _as_fixed(self, name: str, value: Any) -> Strength:
        """A dict by parameter name → one tensor for each, (1, *shape); an array by feature → (1, features)."""
        like = self._like
        if isinstance(value, Mapping):
            if unknown := sorted(value.keys() - set(self._penalised)):
                raise ValueError(
                    f"{name}: {unknown} are no penalised parameters of the model; it has {self._penalised}."
                )
            tensors = {}
            for k, own in value.items():
                one, shape = torch.as_tensor(np.asarray(own), dtype=like.dtype, device=like.device), self._shapes[k]
                try:
                    tensors[k] = one.expand(shape)[None]
                except RuntimeError as error:
                    raise ValueError(
                        f"{name}[{k!r}] of shape {tuple(one.shape)} does not broadcast to the parameter's {tuple(shape)}."
                    ) from error
            return tensors
        if np.ndim(value) == 0:
            return float(value)
        return torch.as_tensor(np.asarray(value), dtype=like.dtype, device=like.device)[None]

    # the two losses

    def train_loss(
        self, w: Tensor, values: Mapping[str, Value], batch: Batch, *, keep_statistics: bool = True
    ) -> Tensor:
        """Training loss of each model.

        Parameters
        ----------
        w : Tensor of shape (M, D)
        values : mapping from str to Tensor of shape (M,) or float
            Hyperparameters by name; those missing are taken from ``fixed``. Penalties may also be dicts from
            parameter name to a tensor that broadcasts to it (M, ...), and the input noise (M, features).
        batch : Batch of M × B rows
        keep_statistics : bool, default=True
            Whether the running statistics of normalisation layers, if there are any, are updated by this pass: where they are kept
            for as many models as M.

        Returns
        -------
        Tensor of shape (M,)
            Mean over the B rows, plus the penalties.
        """
        values = {**self.fixed, **values}
        x, smoothing, mixup = batch.x, values.get("label_smoothing", 0.0), values.get("mixup", 0.0)
        self.draw_streams()
        like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        if self.augment is not None:
            x = self._augmented(x, _keywords("augment__", values))
        noise = values.get("input_noise", 0.0)
        if not is_zero(noise):
            # One draw for all models: common random numbers.
            drawn = torch.randn(x.shape[1:], generator=self.stream(_NOISE, x.device), **like)
            x = x + _rowwise(noise, x) * self._noisy * drawn
        named = self.named(w)
        forward = partial(self.outputs, named, values=values, training=True, keep=keep_statistics)
        if is_zero(mixup):
            loss = self._mean_loss(forward(x), batch, smoothing)
        else:  # Zhang et al. (2018), with a uniform share instead of a Beta: 0 is none, and neighbours share the draw
            stream = self.stream(_MIXUP, x.device)
            other = torch.randperm(x.shape[1], generator=stream, device=x.device)
            share = 0.5 * mixup * torch.rand((), generator=stream, **like)
            x = torch.lerp(x, x[:, other], _rowwise(share, x) * self._noisy)
            outputs = forward(x)
            weight = None if batch.weight is None else batch.weight[:, other]
            mixed_in = self._mean_loss(outputs, batch._replace(y=batch.y[:, other], weight=weight), smoothing)
            loss = (1 - share) * self._mean_loss(outputs, batch, smoothing) + share * mixed_in
        weight_decay, l1 = values.get("weight_decay", 0.0), values.get("l1", 0.0)
        if not is_zero(weight_decay):
            loss = loss + self._half_squares(weight_decay, named)
        if not is_zero(l1):
            loss = loss + self._absolute(l1, named)
        if self.penalty is not None:
            loss = loss + self._own_penalty(named, _keywords("penalty__", values), len(w))
        return loss

    def valid_loss(self, w: Tensor, batch: Batch, *, fold: int | None = None) -> Tensor:
        """Validation loss of each model, (M, D) → (M,): mean over rows, no noise, no penalty, module in eval mode.

        ``fold`` says whose buffers to use if all M models belong to one fold: one set for all of them, or one for each.
        """
        return self._mean_loss(self.predict(w, batch.x, fold=fold), batch, 0.0)

    def full_valid_loss(self, w: Tensor, rows: Rows, fold: int, smoothing: float = 0.0) -> Tensor:
        """L_Valid of M models w (M, D) of one fold on all its rows, (M,); rows are seen in pieces. Of smoothed labels if ``smoothing``, where there are any."""
        with torch.no_grad():
            outputs, M = (self.predict(w, x, fold=fold) for x in _pieces(rows, len(w))), len(w)
            if isinstance(self.loss, CustomLoss):  # need not be a sum over rows
                return self._mean_loss(torch.cat(list(outputs), dim=1), _targets(rows, M), 0.0)
            whole, total = _targets(rows, M), torch.zeros(M, dtype=w.dtype, device=w.device)
            for start, some in zip(range(0, len(rows.x), _PIECE), outputs, strict=True):
                piece = slice(start, start + _PIECE)
                weight = None if whole.weight is None else whole.weight[:, piece]
                of_piece = self._mean_loss(some, whole._replace(y=whole.y[:, piece], weight=weight), smoothing)
                total += of_piece * (some.shape[1] / len(rows.x))
            return total

    def full_valid_gradient(self, w: Tensor, rows: Rows, fold: int) -> Tensor:
        """Of the same for one model, (1, D)."""
        with torch.no_grad():
            outputs = [self.predict(w, x, fold=fold) for x in _pieces(rows, 1)]
        whole = torch.cat(outputs, dim=1).requires_grad_()
        (of_outputs,) = torch.autograd.grad(self._mean_loss(whole, _targets(rows, 1), 0.0).sum(), whole)
        w, slope = w.detach().requires_grad_(), torch.zeros_like(w)
        for x, of_piece in zip(_pieces(rows, 1), of_outputs.split(_PIECE, dim=1), strict=True):
            slope += torch.autograd.grad(self.predict(w, x, fold=fold), w, of_piece)[0]
        return slope

    def predict(self, w: Tensor, x: Tensor, *, fold: int | None = None) -> Tensor:
        """Outputs in eval mode: w (M, D), x (M, B, ...) → (M, B, outputs); ``fold`` whose running statistics are used, as in valid_loss."""
        return self.outputs(self.named(w), x, {}, training=False, fold=fold)

    def _mean_loss(self, outputs: Tensor, batch: Batch, smoothing: Value) -> Tensor:
        if isinstance(self.loss, CustomLoss):  # may return a mean: one model at a time
            own = partial(self.loss, smoothing=smoothing, weighted=batch.weight is not None)
            per_row = torch.stack([own(o, y) for o, y in zip(outputs, batch.y, strict=True)])
        else:
            if isinstance(smoothing, Tensor):
                smoothing = smoothing[:, None]
            per_row = self.loss(outputs, batch.y, smoothing)
        if batch.weight is not None:
            per_row = per_row * batch.weight
        return per_row.mean(dim=1)

    def _augmented(self, x: Tensor, keywords: Mapping[str, Value]) -> Tensor:
        augmented = []
        for i, rows in enumerate(x):
            stream = self.stream(_AUGMENT, x.device)  # the same draws for every model
            own = self.augment(rows, stream, **{k: float(v) for k, v in _ith(keywords, i).items()})  # type: ignore[misc]
            if not isinstance(own, Tensor) or own.shape[:1] != rows.shape[:1]:
                got = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
                raise ValueError(
                    f"augment {self.augment!r} returned {got} for rows of shape {tuple(rows.shape)}; return as many rows."
                )
            augmented.append(own)
        return torch.stack(augmented).to(x.dtype)

    def _own_penalty(self, named: Mapping[str, Tensor], keywords: Mapping[str, Value], models: int) -> Tensor:
        penalties = []
        for i in range(models):
            weights = {k: p[i] for k, p in named.items()}
            try:
                own = self.penalty(weights, **_ith(keywords, i))  # type: ignore[misc]
            except KeyError as error:
                if error.args[0] in weights:
                    raise
                raise ValueError(
                    f"penalty {self.penalty!r} asked for the weights {error}; the module has {list(weights)}."
                ) from error
            if not isinstance(own, Tensor) or own.dim() != 0:
                got = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
                raise ValueError(f"penalty {self.penalty!r} returned {got}; return one number, a tensor of shape ().")
            penalties.append(own)
        return torch.stack(penalties)

    def with_statistics_of(
        self,
        folds: int,
        each: int,
        statistics: Mapping[str, Tensor] | None = None,
        memories: list[Memory] | None = None,
    ) -> Self:
        """See :meth:`StackedModule.with_statistics_of`. The user's functions begin anew, too."""
        other = super().with_statistics_of(folds, each, statistics, memories)
        other.loss, other.penalty, other.augment = own_copy((self.loss, self.penalty, self.augment))
        return other

    def penalty_follows(self, keyword: str) -> bool:
        """Whether the user's penalty has a derivative in one of its hyperparameters: not if it makes a plain number of it."""
        weights, value = self.named(torch.randn_like(self.initial_weights())[None]), self._like.new_tensor([0.5])
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it does
            try:
                fresh = self.with_statistics_of(1, 1)
                return fresh._own_penalty(weights, {keyword: value.requires_grad_()}, 1).requires_grad
            except Exception:  # it takes no such weights or value: training will tell
                return True

    def _half_squares(self, strength: Strength, named: Mapping[str, Tensor]) -> Value:
        """Σ over penalised weights of strength · ½w², (M,); a strength is one per model, or a dict of them by parameter."""
        if isinstance(strength, Mapping):
            return sum(half_squares(s, named[k]) for k, s in strength.items())
        return strength * half_squares_of(*(named[k] for k in self._penalised)) if self._penalised else 0.0

    def _absolute(self, strength: Strength, named: Mapping[str, Tensor]) -> Value:
        """The same of strength · |w|."""
        if isinstance(strength, Mapping):
            return sum((s * named[k].abs()).flatten(1).sum(1) for k, s in strength.items())
        return sum(strength * named[k].abs().flatten(1).sum(1) for k in self._penalised)


def _pieces(rows: Rows, models: int) -> Iterator[Tensor]:
    """Some rows x after others, for so many models: (models, up to _PIECE, ...)."""
    for x in rows.x.split(_PIECE):
        yield x.expand(models, *x.shape)


def _targets(rows: Rows, models: int) -> Batch:
    """All targets and relative weights, for so many models, without the rows themselves."""
    y, weight = rows.y.expand(models, *rows.y.shape), rows.weight
    return Batch(rows.x[:0], y, None if weight is None else (weight / weight.mean()).expand(models, -1))


def _keywords(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _ith(values: Mapping[str, Value], i: int) -> dict[str, Value]:
    return {name: value[i] if isinstance(value, Tensor) else value for name, value in values.items()}


def _rowwise(value: Value, x: Tensor) -> Value:
    """A number, one per model (M,), or one per model and feature (M, *features), so that it broadcasts with x (M, B, ...)."""
    if not isinstance(value, Tensor):
        return value
    return value[:, None] if value.dim() > 1 else of_models(value, x)
