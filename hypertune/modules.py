"""The user's module, made tunable without a change to it: where a factory keyword arrives, and dropout by tensor.

A keyword such as ``dropout`` of ``MLP(dropout=...)`` sets numbers inside the module it builds. :func:`find_reach`
builds the module at three values of the keyword and sees which numbers move; during hyper-training those numbers, in
*our* copy of the module, are set to each model's own value before every forward pass.

>>> find_reach(lambda rate: nn.Sequential(nn.Linear(2, 2), nn.Dropout(rate / 2)), 0.0, 0.8)
[Reach(path='1', name='p', a=0.0, b=0.5)]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Value = float | Tensor

_CALLS_APART = 2**20  # seeds of a layer that is called more than once; there are not so many layers


def is_zero(value: Value) -> bool:
    """Whether a hyperparameter is switched off for good: a plain 0, not a tensor that happens to be 0."""
    return not isinstance(value, (Tensor, Mapping)) and value == 0


class TensorDropout(nn.Module):
    """``nn.Dropout`` (or 1d/2d/3d) with a rate that may be a tensor, in place of it in our copy of the module.

    The uniform noise is compared with the rate, so models that share the noise and differ in the rate differ only
    where the rates do: the common random numbers of the antithetic pairs. It comes from ``seed``, the next call's from another.
    """

    p: Value
    channelwise: bool
    seed: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_zero(self.p):
            return x
        # Under vmap this shape is one model's: the noise is drawn once and shared.
        return x * (self._noise(x) >= self.p) / (1 - self.p)

    def of_models(self, x: Tensor) -> Tensor:
        """The same for M models at once, x (M, B, ...), without vmap; ``p`` may be (M,)."""
        if not self.training or is_zero(self.p):
            return x
        p = self.p.view(-1, *(1,) * (x.dim() - 1)) if isinstance(self.p, Tensor) else self.p
        return x * ((self._noise(x[0]) >= p).to(x.dtype) / (1 - p))  # whatever the default dtype

    def _noise(self, x: Tensor) -> Tensor:
        cells = (*x.shape[:2], *(1,) * (x.dim() - 2)) if self.channelwise else x.shape
        generator = torch.Generator(x.device).manual_seed(self.seed)
        self.seed += _CALLS_APART
        return torch.rand(cells, dtype=x.dtype, device=x.device, generator=generator)


_ELEMENTWISE = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Identity,
)  # fmt: skip


def plain_layers(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers of an ``nn.Sequential`` of linear layers, activations and dropout, by name; None for any other module.

    Such a module can be run for M models at once without vmap (:func:`run_layers`), at a fraction of the overhead.
    """
    if type(module) is not nn.Sequential or not _as_declared(module):
        return None
    layers = [(name, layer) for name, layer in module._modules.items() if layer is not None]  # with those that recur
    recur = [layer for i, (_, layer) in enumerate(layers) if any(layer is before for _, before in layers[:i])]
    if any(isinstance(layer, nn.Linear) for layer in recur):
        return None  # its parameters have the first name only
    if len(dict(module.named_parameters())) < len(dict(module.named_parameters(remove_duplicate=False))):
        return None  # and so have those that layers share
    for _, layer in layers:
        flat = type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
        if not (flat or type(layer) in (*_ELEMENTWISE, nn.Linear, TensorDropout)):
            return None
        if not _as_declared(layer) or (getattr(layer, "inplace", False) and type(layer) is not TensorDropout):
            return None
    return layers


def _as_declared(module: nn.Module) -> bool:
    """Whether the module does what its class says: it has no hooks, and no forward of its own."""
    return not any(getattr(module, name) for name in _HOOKS) and "forward" not in vars(module)


def run_layers(layers: list[tuple[str, nn.Module]], named: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """M models at once: parameters by name, each (M, *shape), and rows x (M, B, ...) → outputs (M, B, outputs)."""
    for name, layer in layers:
        if type(layer) is nn.Linear:
            weight, rows = named[f"{name}.weight"].transpose(1, 2), x.flatten(1, -2)
            y = torch.baddbmm(named[f"{name}.bias"][:, None], rows, weight) if layer.bias is not None else rows @ weight
            x = y if x.dim() == 3 else y.unflatten(1, x.shape[1:-1])
        elif type(layer) is TensorDropout:
            x = layer.of_models(x)
        elif type(layer) is nn.Flatten:
            x = x.flatten(2)
        else:
            x = layer(x)
    return x


_CHANNELWISE: dict[type[nn.Module], bool] = {
    nn.Dropout: False,
    nn.Dropout1d: True,
    nn.Dropout2d: True,
    nn.Dropout3d: True,
}


class _PaddedEmbedding(nn.Embedding):
    """``nn.Embedding`` whose padding row has no gradient: vmap forgets ``padding_idx``."""

    def forward(self, codes: Tensor) -> Tensor:
        padding = torch.arange(self.num_embeddings, device=codes.device)[:, None].eq(self.padding_idx)  # type: ignore[arg-type]
        weight = torch.where(padding, self.weight.detach(), self.weight)
        return F.embedding(codes, weight, scale_grad_by_freq=self.scale_grad_by_freq)


def with_own_layers(module: nn.Module) -> nn.Module:
    """A copy of the module in which every stock dropout accepts a tensor as its rate. The two share their parameters.

    The layers of the copy become ours in place, so that a list of the module's own that holds them, too, has the same ones.
    """
    module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for sub in module.modules():
        if (channelwise := _CHANNELWISE.get(type(sub))) is not None:
            sub.__class__ = TensorDropout
            vars(sub).update(channelwise=channelwise, seed=0)
        elif type(sub) is nn.Embedding and sub.padding_idx is not None:
            sub.__class__ = _PaddedEmbedding
    return module


class _NoDropout:
    """Of a recurrent layer in training mode: with it that is eval mode."""

    dropout = property(lambda self: 0.0, lambda self, rate: None)


class _RNN(_NoDropout, nn.RNN): ...


class _LSTM(_NoDropout, nn.LSTM): ...


class _GRU(_NoDropout, nn.GRU): ...


_FEW = 8  # rows, times places in an image


class _StatisticsThatRespond(_BatchNorm):
    """Of BatchNorm in eval mode: the outputs are those by its running statistics, and the first derivative is that by the rows' own.

    Running statistics are what training at the weights has left. As constants they would say that smaller weights in front of them
    make smaller outputs, and what merely shrinks these would look like regularisation. A few rows have no statistics worth the name.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        few = x.numel() < _FEW * x.shape[1]
        if few or self.running_mean is None or self.running_var is None or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.no_grad():
            rows = x.to(self.running_var.dtype)  # half precision has no room for squares
            var, mean = torch.var_mean(rows, [0, *range(2, x.dim())], correction=0)
            scale = (self.running_var + self.eps).rsqrt()
            shift, scale = (mean - self.running_mean) * scale, (var + self.eps).sqrt() * scale
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight
        if self.bias is not None:
            shift = shift + self.bias
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=self.eps)


class _BatchNorm1d(_StatisticsThatRespond, nn.BatchNorm1d): ...


class _BatchNorm2d(_StatisticsThatRespond, nn.BatchNorm2d): ...


class _BatchNorm3d(_StatisticsThatRespond, nn.BatchNorm3d): ...


_RECURRENT: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: _RNN, nn.LSTM: _LSTM, nn.GRU: _GRU}
_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _BatchNorm1d, nn.BatchNorm2d: _BatchNorm2d, nn.BatchNorm3d: _BatchNorm3d,
}  # fmt: skip


def differentiable_in_eval_mode(module: nn.Module) -> nn.Module:
    """The module, in eval mode, with layers that have the right gradient there.

    cuDNN gives that of recurrent layers in training mode only, and BatchNorm's statistics respond to the weights, unless they are frozen.
    """
    trained = [sub for sub in module.train().modules() if sub.training]
    module.eval()
    for sub in trained:
        if (own := _RECURRENT.get(type(sub))) is not None:
            sub.__class__ = own
            sub.training = True
        elif (own := _NORMS.get(type(sub))) is not None and sub.momentum != 0:
            sub.__class__ = own
    return module


def refuse_modules(module: nn.Module) -> None:
    """Raise ValueError, with the submodule's name, for what cannot be trained as a function of its weights."""
    inside = set(module.modules())
    for path, sub in module.named_modules():
        where = f"{path or 'the module'} ({type(sub).__name__})"
        if any(nn.parameter.is_lazy(p) for p in sub.parameters(recurse=False)):
            raise ValueError(
                f"{where} has no shape before it has seen data, and the weights are counted before that: the factory gets "
                "n_features_in, so use the eager layer (nn.Linear for nn.LazyLinear)."
            )
        if type(sub).__name__ == "OptimizedModule":
            raise ValueError(
                f"{where} comes from torch.compile(module), and its copies would not be compiled: leave that out."
            )
        for name, value in vars(sub).items():
            if (name not in OF_EVERY_MODULE or name in _HOOKS) and any(own in inside for own in _held_by(value)):
                what = f"a hook (in {name})" if name in _HOOKS else f"a function, {name!r},"
                raise ValueError(
                    f"{where} keeps {what} that holds on to a module by name: in a copy of it, and copies are what is "
                    "trained, the function would go on calling the first one. Make it a method."
                )
        if any(t.is_complex() for t in (*sub.parameters(recurse=False), *sub.buffers(recurse=False))):
            raise ValueError(f"{where} has complex weights or buffers: keep real ones, and use torch.view_as_complex.")
        if isinstance(sub, (nn.Embedding, nn.EmbeddingBag)) and sub.max_norm is not None:
            raise ValueError(
                f"{where} changes its own weights as it runs (max_norm): max_norm=None, and a weight_decay."
            )
        if getattr(sub, "sparse", False) is True:
            raise ValueError(
                f"{where} gives sparse gradients (sparse=True), which have no place in one vector of weights: sparse=False."
            )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}


def _held_by(value: Any) -> Iterator[Any]:
    """The modules that a function, or one in a list or dict, has in its closure or its defaults, also by their methods."""
    if isinstance(value, Mapping):
        value = list(value.values())
    for function in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(function, FunctionType):
            cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
            for own in (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                holder = getattr(own, "__self__", own)
                if isinstance(holder, nn.Module):
                    yield holder
                elif own is not function:
                    yield from _held_by(own if isinstance(own, FunctionType) else None)


# --- where a factory keyword arrives in the module ---------------------------------------------------------------------


class Reach(NamedTuple):
    """A number in the module that a factory keyword sets: attribute ``name`` of submodule ``path``, at ``a + b·value``."""

    path: str
    name: str
    a: float
    b: float


def find_reach(build: Callable[[float], nn.Module], low: float, high: float) -> list[Reach]:
    """Find every number in the module that depends on a keyword, by building it at three values.

    Parameters
    ----------
    build : callable
        Keyword value → freshly built module.
    low, high : float
        Two values that the keyword may take.

    Raises
    ------
    ValueError
        If the keyword reaches nothing, changes the architecture, or a number depends on it in a way that is not affine.
    """
    probes = (low, (low + high) / 2, high)
    modules = []
    for value in probes:
        try:
            modules.append(build(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the factory does not take {value:g} for it ({str(error).rstrip('.')})") from error
    shapes = [[(k, tuple(p.shape)) for k, p in m.named_parameters()] for m in modules]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ValueError("it changes the architecture, not a rate, so there is no gradient to follow")
    numbers = [_numbers(m) for m in modules]
    reach = []
    for path, name in numbers[0]:
        y0, y1, y2 = (float(n.get((path, name), math.nan)) for n in numbers)
        if y0 == y1 == y2 or math.isnan(y0 + y1 + y2):
            continue
        if not math.isclose(y1, (y0 + y2) / 2, rel_tol=1e-6, abs_tol=1e-12):
            raise ValueError(f"it sets {path}.{name} to a function of it that is not affine")
        b = (y2 - y0) / (high - low)
        reach.append(Reach(path, name, y0 - b * low, b))
    if not reach:
        raise ValueError(
            "it reaches nothing in the model that can be set: no number that a module keeps as an attribute with a public name "
            "(self.rate = rate; not in a list, a dict or a closure) depends on it"
        )
    return reach


def _numbers(module: nn.Module) -> dict[tuple[str, str], float]:
    return {
        (path, name): value
        for path, sub in module.named_modules()
        for name, value in vars(sub).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("_")
    }
