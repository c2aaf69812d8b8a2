"""Layers of ours in the place of torch's, in our copies of the user's module: the same numbers, and what hyper-training needs of them.

And how plain stacks of layers run for many models at once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hypertune.dropout import TensorAttention, TensorDropout
from hypertune.modules import HOOKS
from hypertune.recurrent import RECURRENT, TensorRecurrent

_ELEMENTWISE = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Identity,
)  # fmt: skip
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


_FEW = 8  # rows, times places in an image


class _StatisticsThatRespond(_BatchNorm):
    """BatchNorm in eval mode, with another derivative: outputs by its running statistics, gradients as if those were the rows' own.

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


_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _BatchNorm1d, nn.BatchNorm2d: _BatchNorm2d, nn.BatchNorm3d: _BatchNorm3d,
}  # fmt: skip


def with_own_layers(module: nn.Module) -> nn.Module:
    """A copy of the module whose stock layers run for M models at once, and drop at a rate that may be a tensor. The two share their parameters.

    The layers of the copy become ours in place, so that a list of the module's own that holds them, too, has the same ones.
    """
    module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for sub in module.modules():
        if (channelwise := _CHANNELWISE.get(type(sub))) is not None:
            sub.__class__ = TensorDropout
            sub.channelwise = channelwise  # type: ignore[assignment]
        elif type(sub) is nn.Embedding and sub.padding_idx is not None:
            sub.__class__ = _PaddedEmbedding
        elif (other := RECURRENT.get(type(sub))) is not None:
            sub.__class__ = other
        elif type(sub) is nn.MultiheadAttention:
            sub.__class__ = TensorAttention
    return module


def differentiable_in_eval_mode(module: nn.Module) -> nn.Module:
    """The module, in eval mode, with layers that have the right gradient there.

    cuDNN gives that of recurrent layers in training mode only, and BatchNorm's statistics respond to the weights, unless they are frozen.
    """
    trained = [sub for sub in module.train().modules() if sub.training]
    module.eval()
    for sub in trained:
        if isinstance(sub, TensorRecurrent):
            sub.training, sub.drops = True, False
        elif (own := _NORMS.get(type(sub))) is not None and sub.momentum != 0:
            sub.__class__ = own
    return module


# --- plain stacks of layers -------------------------------------------------------------------------------------------------


def plain_layers(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers of an ``nn.Sequential`` of linear layers, activations and dropout, by name; None for any other module.

    Such a module can be run for M models at once without vmap (:func:`run_layers`), at a fraction of the overhead.
    """
    if type(module) is not nn.Sequential or not as_declared(module):
        return None
    layers = [(name, layer) for name, layer in module._modules.items() if layer is not None]  # with those that recur
    recur = [layer for i, (_, layer) in enumerate(layers) if any(layer is before for _, before in layers[:i])]
    if any(isinstance(layer, nn.Linear) for layer in recur):
        return None  # its parameters have the first name only
    if len(dict(module.named_parameters())) < len(dict(module.named_parameters(remove_duplicate=False))):
        return None  # and so have those that layers share
    return layers if all(as_declared(layer) and is_plain(layer) for _, layer in layers) else None


def is_plain(layer: nn.Module) -> bool:
    """Whether :func:`run_layers` runs such a layer: it is linear, an activation, dropout, or flattens."""
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    inplace = getattr(layer, "inplace", False) and type(layer) is not TensorDropout
    return type(layer) in (*_ELEMENTWISE, nn.Linear, TensorDropout) and not inplace


def as_declared(module: nn.Module) -> bool:
    """Whether the module does what its class says: it has no hooks, and neither a forward nor a call of its own."""
    own = "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__
    return not own and not any(getattr(module, name) for name in HOOKS)


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
