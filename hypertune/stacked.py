"""M copies of a module in one pass, each with weights, dropout rates and running statistics of its own.

Weights are a matrix (M, D), rows a tensor (M, B, ...), and a tuned keyword of the module's factory a tensor (M,). Plain stacks of layers
run by batched matrix products, other modules under ``torch.func.vmap``, and those that can do neither one after the other.

>>> module = StackedModule(nn.Linear(3, 2))
>>> w = module.initial_weights().repeat(4, 1)
>>> tuple(w.shape), tuple(module.outputs(module.named(w), torch.zeros(4, 5, 3), {}, training=False).shape)
((4, 8), (4, 5, 2))
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypertune.calls import Step
from hypertune.dropout import Drops, Value
from hypertune.layers import differentiable_in_eval_mode, plain_layers, run_layers, with_own_layers
from hypertune.memory import NOTHING, Attributes, Memory, plain_attributes, put
from hypertune.randomness import ONE_AT_A_TIME, rng_state, set_rng_state
from hypertune.reach import Reach

_DROPOUT = 3  # the first of its streams of random numbers; those before are for whoever uses the module


class StackedModule:
    """M copies of a module.

    Parameters
    ----------
    module : nn.Module
        Never changed. Copied, with the same parameters. Parameters with ``requires_grad=False`` stay as they are and are not part of w.
    reach : mapping from str to list of Reach, optional
        For every tuned factory keyword, the numbers in the module that it sets.
    inputs : mapping from str to Tensor, optional
        For each argument of the module's forward the numbers of its columns of x. Without it x is the one argument.
    folds : int, default=1
        K: the M models of a pass are K folds times M/K weights each. Buffers (running statistics) are kept per fold.

    Attributes
    ----------
    D : int
        Number of trained weights.
    cost : int
        Multiplications by weights for one row: D, unless :func:`hypertune.examination.examine` counts more (a convolution has).
    stacked : bool
        Whether M models share one pass. Set to False by the examination for modules that cannot, or had better not.
    in_turn : bool
        Whether the models of a pass are nevertheless computed one after the other, which is faster for some: the examination knows.
    first : str
        Name of the first layer with weights that the examination saw called; empty if that is the module itself, and before that.
    first_sees_features : bool
        What :func:`hypertune.examination.sees_features` said, if it was asked.
    calls : dict from bool to list of str and modules, or None
        The layers that the module was seen to call in training and in eval mode, if it is no stack of layers but runs like one.
    fresh : nn.Module
        The copy that is never run: what a module counts or remembers begins here.
    modules, layers : dict from bool to nn.Module, to list or None
        The copies that are run, in training (True) and in eval mode (False), and their layers if they are plain stacks.
    memories : list of dict
        What training has changed in plain attributes, of each model (or each of a fold); empty where it changes nothing there, as the examination
        found out, or before that.
    statistics : dict from str to Tensor of shape (models, ...)
        Buffers that training writes into (BatchNorm's running statistics), for each fold or each model of a fold.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        reach: Mapping[str, list[Reach]] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        folds: int = 1,
    ):
        self.reach, self.inputs = dict(reach or {}), inputs
        self.stacked, self.in_turn, self.first, self.first_sees_features = True, False, "", True
        self.calls: dict[bool, list[Step]] | None = None
        self._written = [k for k, b in module.named_buffers() if b.layout == torch.strided]
        self.fresh = with_own_layers(module)
        self.memories: list[Memory] = []
        self._begin_anew()
        self._seed = 0
        parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self._shapes = {k: p.shape for k, p in parameters.items()}
        self._sizes = [p.numel() for p in parameters.values()]
        self._constants = {k: p.detach() for k, p in module.named_parameters() if not p.requires_grad}
        self.keep_statistics_of(folds)
        self.D = self.cost = sum(self._sizes)
        self._like = next(iter(parameters.values()), torch.zeros(0, device="cpu")).detach().new_empty(0)

    def _begin_anew(self) -> None:
        """Copies of the module for training and for eval mode, in the state in which it was built. All share their parameters."""
        shared = {id(p): p for p in self.fresh.parameters()}
        training, evaluation = (copy.deepcopy(self.fresh, dict(shared)) for _ in range(2))
        self.modules = {True: training.train(), False: differentiable_in_eval_mode(evaluation)}
        self.layers = {mode: self._layers(mode) for mode in self.modules}
        self._dropouts = [sub for sub in training.modules() if isinstance(sub, Drops)]
        self._built = {mode: Attributes(own) for mode, own in self.modules.items()}
        self._touched: set[tuple[str, str]] = {of for memory in self.memories for of in memory}

    def _layers(self, training: bool) -> list[tuple[str, nn.Module]] | None:
        own = self.modules[training]
        if self.calls is None:
            return plain_layers(own)
        steps = self.calls[training]
        return [(step, own.get_submodule(step)) if isinstance(step, str) else ("", step) for step in steps]

    def run_as(self, calls: dict[bool, list[Step]] | None) -> None:
        """From here on by these layers, or, if it is None, as the module is."""
        self.calls = calls
        self.layers = {mode: self._layers(mode) for mode in self.modules}

    def __getstate__(self) -> dict[str, Any]:
        # What a module remembers of a stacked pass cannot be pickled.
        return {
            k: v for k, v in vars(self).items() if k not in ("modules", "layers", "_dropouts", "_built", "_touched")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin_anew()

    # flat w ⇄ named parameters

    def initial_weights(self) -> Tensor:
        """The module's own parameters as one vector, shape (D,)."""
        return flat_weights(self.fresh)

    def forget_weights(self) -> None:
        """Replace the module's parameters by zeros that take no memory: for a caller that holds its own weights."""
        for p in self.fresh.parameters():
            if p.requires_grad:
                p.data = p.new_zeros(()).expand(p.shape)

    def named(self, w: Tensor) -> dict[str, Tensor]:
        """Weights (..., D) → views by parameter name, each (..., *shape)."""
        lead = w.shape[:-1]
        pieces = w.split(self._sizes, dim=-1)
        return {k: piece.view((*lead, *s)) for (k, s), piece in zip(self._shapes.items(), pieces, strict=True)}

    def units(self) -> Tensor:
        """For each weight the number of the output unit (row of its parameter) it belongs to, shape (D,)."""
        rows, start = [], 0
        for shape, size in zip(self._shapes.values(), self._sizes, strict=True):
            n_rows = shape[0] if shape else 1
            rows.append(start + torch.arange(n_rows, device="cpu").repeat_interleave(size // max(n_rows, 1)))
            start += n_rows
        return torch.cat(rows)

    def load_into(self, module: nn.Module, w: Tensor, model: int = 0) -> nn.Module:
        """Copy the weights w (D,) of a model and its buffers, by its number, into a module of the same architecture.

        With them go tensors that the module keeps as plain attributes, which may have been drawn at random when it was built, and numbers
        that it has changed in training.
        """
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
        put(module, self.remembers(model))
        for sub in module.modules():
            if isinstance(sub, nn.RNNBase):
                sub.flatten_parameters()  # cuDNN wants them in one piece, and a deep copy has them apart
        return module

    # what the module remembers: plain attributes

    def keep_memories(self) -> None:
        """From here on each model remembers for itself what training changes in plain attributes."""
        self.memories = [{} for _ in range(self._models)]

    def changes(self) -> Memory:
        """What training passes have changed in plain attributes since the module was built, where models have no memories of their own."""
        return self._built[True].changes()

    def final_memories(self) -> list[Memory]:
        """Of each model; where the examination saw no change and there was one later, the same of all."""
        return self.memories or ([changed] * self._models if (changed := self.changes()) else [])

    def remembers(self, model: int = 0) -> Memory:
        """Of a model: tensors that are plain attributes, which may have been drawn at random, and what training changed."""
        tensors = {of: v for of, v in plain_attributes(self.fresh).items() if isinstance(v, Tensor)}
        return tensors | (self.memories[model] if self.memories else self.changes())

    @contextmanager
    def _remembering(self, training: bool, models: list[int], keep: bool) -> Iterator[None]:
        """A pass of some models, by number, in the state in which training has left the first of them; with ``keep`` it goes on from there.

        More than one share a pass only where they remember the same: what is another thing for each is a batched tensor, and these are refused.
        """
        if not models:
            yield
            return
        with ONE_AT_A_TIME:  # the module is there once
            built, own = self._built[training], self.memories[models[0]]
            # What only another model has changed is as it was built: tensors as in the copy that is never run, which nobody has written into.
            state = {of: v for of, v in built.values.items() if not isinstance(v, Tensor)}
            state |= {of: v for of, v in plain_attributes(self.fresh).items() if isinstance(v, Tensor)}
            put(built.module, {of: own.get(of, state.get(of, NOTHING)) for of in self._touched | own.keys()})
            yield
            if training:
                changed = built.changes()
                self._touched |= changed.keys()
                for model in models if keep else ():
                    self.memories[model] = changed

    # buffers

    def keep_statistics_of(self, models: int) -> None:
        """Begin with the module's own buffers for so many models, each of which keeps its own from here on."""
        own = {k: b.detach() for k, b in self.fresh.named_buffers()}
        self.statistics = {k: own[k].repeat(models, *(1,) * own[k].dim()) for k in self._written}
        self._constant_buffers = {k: b for k, b in own.items() if k not in self._written}
        self._models, self._each = models, 1
        if self.memories:
            self.keep_memories()

    def keep_statistics_of_those(self, names: list[str]) -> None:
        """Keep only those buffers that training writes into, by name; the others are constants."""
        self._written = names
        self.keep_statistics_of(self._models)

    def forget_statistics_but_of(self, folds: int) -> None:
        """Let go of the buffers and memories of all but the first so many models."""
        self.statistics = {k: b[:folds].clone() for k, b in self.statistics.items()}
        self.memories = self.memories[:folds]
        self._models = folds

    def with_statistics_of(
        self,
        folds: int,
        each: int,
        statistics: Mapping[str, Tensor] | None = None,
        memories: list[Memory] | None = None,
    ) -> Self:
        """The same, for so many models of each of so many folds: with their buffers (folds × each, ...) and memories, or the module's own."""
        other = copy.copy(self)  # which begins anew: __setstate__
        other.keep_statistics_of(folds * each)
        other._each = each
        other.statistics.update(statistics or {})
        other.memories = memories or other.memories
        return other

    @property
    def has_statistics(self) -> bool:
        """Whether training writes into buffers (BatchNorm's running statistics), as the examination found out."""
        return bool(self._written)

    def _own(self, fold: int | None) -> slice:
        """Which of the models that keep something are those of a fold; all of them, if it is None."""
        return slice(0, self._models) if fold is None else slice(fold * self._each, (fold + 1) * self._each)

    def _kept(self, models: int, fold: int | None) -> list[int]:
        """Of M models in a pass the numbers of those that keep something."""
        own = range(self._models)[self._own(fold)]
        return [own[i // max(models // len(own), 1)] for i in range(models)]

    def _statistics_of(self, models: int, fold: int | None, keep: bool) -> dict[str, Tensor]:
        """Buffers of M models, (M, ...): with ``keep`` the stored ones, if there are that many; else copies."""
        own, found = self._own(fold), {}
        for k, kept in self.statistics.items():
            b = kept[own]
            if models > len(b):
                found[k] = b.repeat_interleave(models // len(b), dim=0)
            else:
                found[k] = b[:models] if keep else b[:models].clone()
        return found

    # the pass

    def draw_streams(self) -> None:
        """A new pass, with random numbers of its own: each use has a stream, so that whether one is switched off changes no other's."""
        self._seed = int(torch.randint(2**31, (), device="cpu"))

    def stream(self, number: int, device: torch.device) -> torch.Generator:
        """A generator of this pass, always from its beginning."""
        return torch.Generator(device).manual_seed(self._seed + number)

    def outputs(
        self,
        named: Mapping[str, Tensor],
        x: Tensor,
        values: Mapping[str, Value],
        *,
        training: bool,
        keep: bool = True,
        fold: int | None = None,
    ) -> Tensor:
        """Outputs (M, B, ...) of M models.

        Parameters
        ----------
        named : mapping from str to Tensor of shape (M, ...)
            Weights, as :meth:`named` gives them.
        x : Tensor of shape (M, B, ...)
        values : mapping from str to Tensor of shape (M,) or float
            Those of tuned factory keywords are set in the module; other names are ignored.
        training : bool
            The module's mode.
        keep : bool, default=True
            Whether running statistics and memories that are kept for as many models as M are written.
        fold : int, optional
            Whose buffers, if all M models belong to one fold: one set for all of them, or one for each.
        """
        rates = {name: values[name] for name in self.reach if name in values}
        if (layers := self.layers[training]) is not None and self.inputs is None and self.stacked:
            with self._set(training, rates):
                constants = {k: c.expand(len(x), *c.shape) for k, c in self._constants.items()}
                return run_layers(layers, {**named, **constants}, x)
        kept = self._kept(len(x), fold) if self.memories else []
        keep_memory = keep and len({*kept}) == len(kept)
        if len(x) > 1 and self.stacked and not self.in_turn:
            like = self._like
            tensors = {
                k: torch.as_tensor(v, dtype=like.dtype, device=like.device).expand(len(x)) for k, v in rates.items()
            }
            forward = partial(self.forward, training=training)
            x, buffers = x.clone(), self._statistics_of(len(x), fold, keep)  # the module may write into its rows
            # Of the kernels of attention the one that is batched over models. The choice is that of the process.
            with ONE_AT_A_TIME, sdpa_kernel(SDPBackend.MATH), self._remembering(training, kept, keep_memory):
                return vmap(forward, randomness="same")(named, tensors, x, buffers)
        outputs, noise, buffers = [], rng_state(x.device), self._statistics_of(len(x), fold, keep)
        x = x.clone()
        for i in range(len(x)):
            set_rng_state(noise, x.device)  # the same noise for every model, as in the stacked pass
            own = {k: p[i] for k, p in named.items()}
            numbers = {k: float(v[i] if isinstance(v, Tensor) and v.dim() else v) for k, v in rates.items()}
            state = {k: b[i] for k, b in buffers.items()}
            with self._remembering(training, kept[i : i + 1], keep_memory):
                outputs.append(self.forward(own, numbers, x[i], state, training=training))
        return torch.stack(outputs)

    def forward(
        self,
        named: dict[str, Tensor],
        rates: Mapping[str, Value],
        x: Tensor,
        buffers: dict[str, Tensor],
        *,
        training: bool,
    ) -> Tensor:
        """Outputs (B, ...) of one model, by the module's own forward: weights by name, rows x (B, ...), buffers that are written into."""
        with self._set(training, rates), _no_fast_path():
            args, kwargs = arguments(x, self.inputs)
            state = {**named, **self._constants, **self._constant_buffers, **buffers}
            with explained(self.modules[training]):
                outputs = functional_call(self.modules[training], state, args, kwargs, strict=True)
            if not isinstance(outputs, Tensor):
                raise TypeError(f"the module's forward returns {type(outputs).__name__}, and not one tensor")
            for k, b in buffers.items():
                if training and state[k] is not b:  # replaced, and not written into
                    b.copy_(state[k].detach())
            return outputs

    @contextmanager
    def _set(self, training: bool, rates: Mapping[str, Value]) -> Iterator[None]:
        """Put the values of factory keywords where they arrive in the module, and leave none of them behind."""
        module, changed = self.modules[training], []
        try:
            for keyword, rate in rates.items():
                for path, name, a, b in self.reach[keyword]:
                    sub = module.get_submodule(path)
                    changed.append((sub, name, getattr(sub, name)))
                    setattr(sub, name, a + b * rate)
            for number, dropout in enumerate(self._dropouts if training else (), start=_DROPOUT):
                dropout.seed = self._seed + number
            yield
        finally:
            for sub, name, value in reversed(changed):
                setattr(sub, name, value)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without attention's fast path of eval mode: it has no derivative, and vmap hides from torch that one is needed."""
    mha = torch.backends.mha
    with ONE_AT_A_TIME:  # the choice is that of the process
        enabled = mha.get_fastpath_enabled()
        try:
            mha.set_fastpath_enabled(False)
            yield
        finally:
            mha.set_fastpath_enabled(enabled)


def flat_weights(module: nn.Module) -> Tensor:
    """The trained parameters of a module as one vector, shape (D,)."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])


@contextmanager
def explained(module: nn.Module) -> Iterator[None]:
    """A call of the module, whose IndexError says what it is about, if it has an embedding."""
    try:
        yield
    except IndexError as error:
        if not any(isinstance(sub, nn.Embedding) for sub in module.modules()):
            raise
        raise IndexError(
            f"{error} (an embedding's codes go from 0 to num_embeddings - 1; name their columns in the estimator's `inputs`, so that "
            "input_noise and mixup leave them alone)"
        ) from error


def arguments(x: Tensor, inputs: Mapping[str, Tensor] | None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the module's forward is called with for rows x (B, ...)."""
    if inputs is None:
        return (x,), {}
    return (), {name: x[:, columns] for name, columns in inputs.items()}
