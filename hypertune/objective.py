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

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypertune.batches import Batch
from hypertune.losses import CustomLoss, Loss
from hypertune.modules import Reach, TensorDropout, Value, is_zero, plain_layers, run_layers, with_tensor_dropout
from hypertune.penalties import half_squares, half_squares_of, of_models
from hypertune.randomness import ONE_AT_A_TIME, rng_state, set_rng_state

# Hyperparameters of the loss itself, with the interval in which each has a meaning.
LOSS_HYPERPARAMETERS: dict[str, tuple[float, float]] = {
    "weight_decay": (0.0, math.inf),
    "l1": (0.0, math.inf),
    "input_noise": (0.0, math.inf),
    "label_smoothing": (0.0, 1.0),
    "mixup": (0.0, 1.0),
    "sample_weight": (0.0, math.inf),
}
_AUGMENT, _NOISE, _MIXUP, _DROPOUT = range(4)  # numbers of streams of random numbers; dropout's are that and all beyond
_CONVOLVED = 1_000_000  # multiplications for a row: larger convolutions are slower together, on a CPU
NO_NOISE = (
    "reaches nothing: all columns of inputs hold whole numbers, which are taken for codes. Scale those that are not."
)


Strength = Value | Mapping[str, Tensor]  # of a penalty


# --- the objective ---------------------------------------------------------------------------------------------------


class Objective:
    """Training and validation loss of M stacked copies of a module.

    Parameters
    ----------
    module : nn.Module
        Never changed. Copied, with the same parameters. Parameters with ``requires_grad=False`` stay as they are and are not part of w.
    loss : callable ``(outputs, targets, smoothing) -> per-row loss``
        See :mod:`hypertune.losses`.
    fixed : mapping from str to value, optional
        Values of the hyperparameters of the loss that are not tuned; zero if absent. Those of the penalties may be dicts from
        parameter name to a number or an array that broadcasts to the parameter.
    reach : mapping from str to list of Reach, optional
        For every tuned factory keyword, the numbers in the module that it sets.
    penalty : callable ``(weights, **hyperparameters) -> scalar``, optional
        Added to the training loss. ``weights`` is a dict from parameter name to tensor; the hyperparameters that are tuned
        arrive as tensors of no dimension.
    augment : callable ``(x, generator, **hyperparameters) -> x``, optional
        Applied to the rows of a training minibatch, (B, ...) → (B, ...). Draws from ``generator`` alone, so that models which
        differ in their hyperparameters share the noise; these arrive as floats.
    inputs : mapping from str to Tensor, optional
        For each argument of the module's forward the numbers of its columns of x. Without it x is the one argument.
    noisy : Tensor of shape (features,), optional
        Ones, and zeros where input noise and mixup leave x as it is.
    folds : int, default=1
        K: the M models of a pass are K folds times M/K weights each. Buffers (running statistics) are kept per fold.

    penalise_biases : bool, default=False
        Whether the penalties include parameters of fewer than two dimensions.

    Attributes
    ----------
    D : int
        Number of trained weights.
    cost : int
        Multiplications by weights for one row, as :meth:`try_stacking` counted them, but not less than D: a convolution has more.
    stacked : bool
        Whether M models share one vmapped pass. Set to False by :meth:`try_stacking` for modules that cannot.
    statistics : dict from str to Tensor of shape (models, ...)
        Buffers that training writes into (BatchNorm's running statistics), for each fold or each model of a fold.
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
        self.loss = loss
        self.penalty, self.augment, self.inputs = penalty, augment, inputs
        self._noisy: Tensor | float = 1.0 if noisy is None else noisy
        self.reach = dict(reach or {})
        self.stacked = True
        self._written = [k for k, b in module.named_buffers() if b.layout == torch.strided]
        self._modules = {training: with_tensor_dropout(module).train(training) for training in (True, False)}
        self._layers = {training: plain_layers(own) for training, own in self._modules.items()}
        self._dropouts = [sub for sub in self._modules[True].modules() if isinstance(sub, TensorDropout)]
        self._seed = 0
        parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self._shapes = {k: p.shape for k, p in parameters.items()}
        self._sizes = [p.numel() for p in parameters.values()]
        self._constants = {k: p.detach() for k, p in module.named_parameters() if not p.requires_grad}
        self.keep_statistics_of(folds)
        self.D = self.cost = sum(self._sizes)
        self._like = next(iter(parameters.values()), torch.zeros(0)).detach().new_empty(0)
        self._penalised = [k for k, p in parameters.items() if p.dim() > 1 or penalise_biases]
        self.fixed: dict[str, Any] = {name: self._as_fixed(name, value) for name, value in (fixed or {}).items()}

    # flat w ⇄ named parameters

    def initial_weights(self) -> Tensor:
        """The module's own parameters as one vector, shape (D,)."""
        return flat_weights(self._modules[True])

    def keep_statistics_of(self, models: int) -> None:
        """Begin with the module's own buffers for so many models, each of which keeps its own from here on."""
        own = {k: b.detach() for k, b in self._modules[True].named_buffers()}
        self.statistics = {k: own[k].repeat(models, *(1,) * own[k].dim()) for k in self._written}
        self._constant_buffers = {k: b for k, b in own.items() if k not in self._written}
        self._models, self._each = models, 1

    def forget_statistics_but_of(self, folds: int) -> None:
        """Let go of the buffers of all but the first so many models."""
        self.statistics = {k: b[:folds].clone() for k, b in self.statistics.items()}

    def with_statistics_of(self, folds: int, each: int, statistics: Mapping[str, Tensor] | None = None) -> Objective:
        """The same, for so many models of each of so many folds: with their buffers (folds × each, ...), or the module's own."""
        other = copy.copy(self)
        other.keep_statistics_of(folds * each)
        other._each = each
        other.statistics.update(statistics or {})
        return other

    def forget_weights(self) -> None:
        """Make the module's own parameters zeros that take no memory: for a caller who has weights of its own."""
        for p in self._modules[True].parameters():
            if p.requires_grad:
                p.data = p.new_zeros(()).expand(p.shape)

    @property
    def has_statistics(self) -> bool:
        """Whether training writes into buffers (BatchNorm's running statistics), as :meth:`try_stacking` found out."""
        return bool(self._written)

    @property
    def feels_noise(self) -> bool:
        """Whether there is a column that input noise and mixup may touch."""
        return bool(torch.as_tensor(self._noisy).any())

    def named(self, w: Tensor) -> dict[str, Tensor]:
        """Weights (..., D) → views by parameter name, each (..., *shape)."""
        lead = w.shape[:-1]
        pieces = w.split(self._sizes, dim=-1)
        return {k: piece.view(*lead, *s) for (k, s), piece in zip(self._shapes.items(), pieces, strict=True)}

    def units(self) -> Tensor:
        """For each weight the number of the output unit (row of its parameter) it belongs to, shape (D,)."""
        rows, start = [], 0
        for shape, size in zip(self._shapes.values(), self._sizes, strict=True):
            n_rows = shape[0] if shape else 1
            rows.append(start + torch.arange(n_rows).repeat_interleave(size // max(n_rows, 1)))
            start += n_rows
        return torch.cat(rows)

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
            first, shape = next(iter(shapes.items()))
            if len(shape) < 2 or shape[1] != n_features:
                raise ValueError(
                    f"the first layer's weight {first!r} has shape {tuple(shape)}, and not one column for each of the "
                    f"{n_features} features"
                )
            arrangement[first] = (1, n_features, *(1,) * (len(shape) - 2))
        return arrangement

    def index(self, arrangement: Mapping[str, tuple[int, ...]]) -> Tensor:
        """For each weight the number of its value in an arrangement of values, flattened; −1 for none. Shape (D,)."""
        pieces, start = [], 0
        for k, shape in self._shapes.items():
            if k not in arrangement:
                pieces.append(torch.full((shape.numel(),), -1))
                continue
            numbers = start + torch.arange(math.prod(arrangement[k])).view(arrangement[k])
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

    def has_constants_of(self, module: nn.Module) -> bool:
        """Whether a module of the same architecture has the same frozen weights, and begins with the same buffers."""
        ours = {**self._constants, **dict(self._modules[True].named_buffers())}
        theirs = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return all(_same(b.to_dense(), theirs[k].to_dense()) for k, b in ours.items())

    def load_into(self, module: nn.Module, w: Tensor, model: int = 0) -> nn.Module:
        """Copy the weights w (D,) of a model and its buffers, by its number, into a module of the same architecture."""
        buffers = {k: b[model] for k, b in self.statistics.items()}
        state = {**buffers, **self._constant_buffers, **self._constants, **self.named(w.detach())}
        if (names := {name for name, _ in module.named_parameters()}) != self._shapes.keys() | self._constants.keys():
            raise ValueError(
                f"The factory built a module with other parameters than before: {sorted(names)} and not {sorted(self._shapes)}."
            )
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if name in state:
                    tensor.copy_(state[name])
        return module

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
        # Each use of random numbers has a stream of its own: whether one of them is switched off changes no other's.
        self._seed = int(torch.randint(2**31, ()))
        like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        if self.augment is not None:
            x = self._augmented(x, _keywords("augment__", values))
        noise = values.get("input_noise", 0.0)
        if not is_zero(noise):
            # One draw for all models: common random numbers.
            drawn = torch.randn(x.shape[1:], generator=self._stream(_NOISE, x.device), **like)
            x = x + _rowwise(noise, x) * self._noisy * drawn
        named = self.named(w)
        forward = partial(self._outputs, named, values=values, training=True, keep=keep_statistics)
        if is_zero(mixup):
            loss = self._mean_loss(forward(x), batch, smoothing)
        else:  # Zhang et al. (2018), with a uniform share instead of a Beta: 0 is none, and neighbours share the draw
            stream = self._stream(_MIXUP, x.device)
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

    def _stream(self, number: int, device: torch.device) -> torch.Generator:
        """A generator of this pass."""
        return torch.Generator(device).manual_seed(self._seed + number)

    def _own_penalty(self, named: Mapping[str, Tensor], keywords: Mapping[str, Value], models: int) -> Tensor:
        penalties = []
        for i in range(models):
            own = self.penalty({k: p[i] for k, p in named.items()}, **_ith(keywords, i))  # type: ignore[misc]
            if not isinstance(own, Tensor) or own.dim() != 0:
                got = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
                raise ValueError(f"penalty {self.penalty!r} returned {got}; return one number, a tensor of shape ().")
            penalties.append(own)
        return torch.stack(penalties)

    def _augmented(self, x: Tensor, keywords: Mapping[str, Value]) -> Tensor:
        augmented = []
        for i, rows in enumerate(x):
            stream = self._stream(_AUGMENT, x.device)  # the same draws for every model
            own = self.augment(rows, stream, **{k: float(v) for k, v in _ith(keywords, i).items()})  # type: ignore[misc]
            if not isinstance(own, Tensor) or own.shape[:1] != rows.shape[:1]:
                got = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
                raise ValueError(
                    f"augment {self.augment!r} returned {got} for rows of shape {tuple(rows.shape)}; return as many rows."
                )
            augmented.append(own)
        return torch.stack(augmented).to(x.dtype)

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

    def valid_loss(self, w: Tensor, batch: Batch, *, fold: int | None = None) -> Tensor:
        """Validation loss of each model, (M, D) → (M,): mean over rows, no noise, no penalty, module in eval mode.

        ``fold`` says whose buffers to use if all M models belong to one fold: one set for all of them, or one for each.
        """
        return self._mean_loss(self._outputs(self.named(w), batch.x, {}, training=False, fold=fold), batch, 0.0)

    def predict(self, w: Tensor, x: Tensor, *, fold: int | None = None) -> Tensor:
        """Outputs in eval mode: w (M, D), x (M, B, ...) → (M, B, outputs); ``fold`` whose running statistics are used, as in valid_loss."""
        return self._outputs(self.named(w), x, {}, training=False, fold=fold)

    def try_stacking(self, x: Tensor, values: Mapping[str, float]) -> None:
        """Find out whether the module works under vmap; otherwise fall back to a loop over models, with a warning.

        Parameters
        ----------
        x : Tensor of shape (B, ...)
            A few rows.
        values : mapping from str to float
            A setting of the tuned hyperparameters.
        """
        w = self.initial_weights().expand(2, -1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._outputs(self.named(w[:1]), x[None], values, training=False, fold=0)
        self.cost = max(self.D, counter.get_total_flops() // (2 * len(x)))
        tensors = {k: w.new_tensor([v, v]) for k, v in values.items()}
        one, two, noise = self.with_statistics_of(1, 1), self.with_statistics_of(1, 2), rng_state(x.device)
        if self.statistics:
            before = {k: b.clone() for k, b in one.statistics.items()}
            with torch.no_grad():
                one._outputs(one.named(w[:1]), x[None], values, training=True)
            self._written = [k for k, b in one.statistics.items() if not _same(before[k], b)]
            self.keep_statistics_of(self._models)
            two = self.with_statistics_of(1, 2)
        if self._layers[True] is None and x.device.type == "cpu" and self.cost > max(_CONVOLVED, 4 * self.D):
            self.stacked = False
            return
        try:
            for training in (True, False):
                set_rng_state(noise, x.device)
                two._outputs(two.named(w), x.expand(2, *x.shape), tensors, training=training)
                for k, b in two.statistics.items():
                    alone = one.statistics[k].expand_as(b)
                    torch.testing.assert_close(b, alone, rtol=1e-3, atol=1e-5, equal_nan=True)
        except Exception as error:
            self.stacked = False
            why = (str(error).partition(" We don't support")[0].splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"The folds are trained one after the other: {type(self._modules[True]).__name__} does not work under "
                f"torch.func.vmap ({why}). What does not: recurrent layers, branches that depend on values, F.dropout with a tuned "
                "rate (nn.Dropout does).",
                UserWarning,
                stacklevel=2,
            )

    def reads_in_eval_mode(self, x: Tensor, keyword: str, values: Sequence[float]) -> bool:
        """Whether the outputs for rows x (B, ...) in eval mode depend on a factory keyword's value."""
        w, noise = self.initial_weights()[None], rng_state(x.device)
        named, found = self.named(w + 0.1 * torch.randn_like(w)), []  # a layer may begin with zeros
        for value in values:
            set_rng_state(noise, x.device)
            found.append(self._outputs(named, x[None], {keyword: float(value)}, training=False, fold=0))
        return any(not _same(found[0], other) for other in found[1:])

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

    def _outputs(
        self,
        named: Mapping[str, Tensor],
        x: Tensor,
        values: Mapping[str, Value],
        *,
        training: bool,
        keep: bool = True,
        fold: int | None = None,
    ) -> Tensor:
        rates = {name: values[name] for name in self.reach if name in values}
        if (layers := self._layers[training]) is not None and self.inputs is None and self.stacked:
            with self._set(training, rates):
                constants = {k: c.expand(len(x), *c.shape) for k, c in self._constants.items()}
                return run_layers(layers, {**named, **constants}, x)
        if len(x) > 1 and self.stacked:
            like = self._like
            tensors = {
                k: torch.as_tensor(v, dtype=like.dtype, device=like.device).expand(len(x)) for k, v in rates.items()
            }
            forward = partial(self._forward, training=training)
            buffers = self._statistics_of(len(x), fold, keep)
            # Of the kernels of attention the one that is batched over models. The choice is that of the process.
            with ONE_AT_A_TIME, sdpa_kernel(SDPBackend.MATH):
                return vmap(forward, randomness="same")(named, tensors, x, buffers)
        outputs, noise, buffers = [], rng_state(x.device), self._statistics_of(len(x), fold, keep)
        for i in range(len(x)):
            set_rng_state(noise, x.device)  # the same noise for every model, as in the stacked pass
            own = {k: p[i] for k, p in named.items()}
            numbers = {k: float(v[i] if isinstance(v, Tensor) and v.dim() else v) for k, v in rates.items()}
            outputs.append(self._forward(own, numbers, x[i], {k: b[i] for k, b in buffers.items()}, training=training))
        return torch.stack(outputs)

    def _statistics_of(self, models: int, fold: int | None, keep: bool) -> dict[str, Tensor]:
        """Buffers of M models, (M, ...): those that are kept, where there are as many and they are to be; else copies."""
        own = slice(None) if fold is None else slice(fold * self._each, (fold + 1) * self._each)
        found = {}
        for k, kept in self.statistics.items():
            b = kept[own]
            if models > len(b):
                found[k] = b.repeat_interleave(models // len(b), dim=0)
            else:
                found[k] = b[:models] if keep else b[:models].clone()
        return found

    def _forward(
        self,
        named: dict[str, Tensor],
        rates: Mapping[str, Value],
        x: Tensor,
        buffers: dict[str, Tensor],
        *,
        training: bool,
    ) -> Tensor:
        with self._set(training, rates), _no_fast_path():
            args, kwargs = arguments(x, self.inputs)
            state = {**named, **self._constants, **self._constant_buffers, **buffers}
            outputs = functional_call(self._modules[training], state, args, kwargs, strict=True)
            for k, b in buffers.items():
                if training and state[k] is not b:  # replaced, and not written into
                    b.copy_(state[k].detach())
            return outputs

    @contextmanager
    def _set(self, training: bool, rates: Mapping[str, Value]) -> Iterator[None]:
        """Put the values of factory keywords where they arrive in the module, and leave none of them behind."""
        module, changed = self._modules[training], []
        try:
            for keyword, rate in rates.items():
                for path, name, a, b in self.reach[keyword]:
                    sub = module.get_submodule(path)
                    changed.append((sub, name, getattr(sub, name)))
                    setattr(sub, name, a + b * rate)
            for number, dropout in enumerate(self._dropouts if training else (), start=_DROPOUT):
                if not is_zero(dropout.p):
                    dropout.seed = self._seed + number
            yield
        finally:
            for sub, name, value in reversed(changed):
                setattr(sub, name, value)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """In eval mode attention has kernels without a derivative, which vmap hides from torch that one is asked for."""
    mha = torch.backends.mha
    with ONE_AT_A_TIME:  # the choice is that of the process
        enabled = mha.get_fastpath_enabled()
        try:
            mha.set_fastpath_enabled(False)
            yield
        finally:
            mha.set_fastpath_enabled(enabled)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def flat_weights(module: nn.Module) -> Tensor:
    """The trained parameters of a module as one vector, shape (D,)."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])


def arguments(x: Tensor, inputs: Mapping[str, Tensor] | None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the module's forward is called with for rows x (B, ...)."""
    if inputs is None:
        return (x,), {}
    return (), {name: x[:, columns] for name, columns in inputs.items()}


def _keywords(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _ith(values: Mapping[str, Value], i: int) -> dict[str, Value]:
    return {name: value[i] if isinstance(value, Tensor) else value for name, value in values.items()}


def _rowwise(value: Value, x: Tensor) -> Value:
    """A number, one per model (M,), or one per model and feature (M, features), so that it broadcasts with x (M, B, ...)."""
    if not isinstance(value, Tensor):
        return value
    return value[:, None] if value.dim() == 2 else of_models(value, x)
