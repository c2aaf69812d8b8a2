"""Recurrent layers that run for M models at once, and whose dropout may have a tensor as its rate.

``torch.func.vmap`` has no rule for torch's fused kernels. Under it these layers go through the sequence step by step, as the equations in
torch's documentation have it; by themselves they are torch's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.nn.utils.rnn import PackedSequence

from hypertune.dropout import Drops, is_zero

State = tuple[Tensor, ...]  # the hidden state, and of an LSTM its cells


class TensorRecurrent(Drops, nn.RNNBase):
    """What ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` become in our copy of the module."""

    fused: bool = True  # by torch's kernels, where there is one model
    drops: bool = True  # cuDNN gives a gradient in training mode only: in eval mode it is that, without dropout
    dropout: Any

    def forward(self, input: Any, hx: Any = None) -> Any:
        drops = self.training and self.drops and self.num_layers > 1 and not is_zero(self.dropout)
        stacked = not self.fused or _are_stacked(input, hx, self.parameters())
        if isinstance(input, PackedSequence) or input.dim() != 3 or not (drops or stacked):
            with _in_pieces(input), nullcontext() if drops else self._without_dropout():
                return super().forward(input, hx)
        x = input.transpose(0, 1) if self.batch_first else input
        directions, cells = 1 + self.bidirectional, self.mode == "LSTM"
        if hx is None:
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 1 + cells]
            hx = tuple(x.new_zeros(directions * self.num_layers, x.shape[1], size) for size in sizes)
        ends, of_layers = [], (s.split(directions) for s in (hx if isinstance(hx, (tuple, list)) else (hx,)))
        for layer, state in enumerate(zip(*of_layers, strict=True)):
            if layer and drops:
                x = self._dropped(x, self.dropout)
            weights = self.all_weights[layer * directions : (layer + 1) * directions]
            x, end = (self._step_by_step if stacked else self._as_torch)(x, state, weights)
            ends.append(end)
        final = tuple(torch.cat(end) for end in zip(*ends, strict=True))
        return x.transpose(0, 1) if self.batch_first else x, final if cells else final[0]

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        rate, self.dropout = self.dropout, 0.0
        try:
            yield
        finally:
            self.dropout = rate

    def _as_torch(self, x: Tensor, state: State, weights: Sequence[Sequence[Tensor]]) -> tuple[Tensor, State]:
        flat = [w for own in weights for w in own]
        settings = (self.bias, 1, 0.0, self.training, self.bidirectional, False)
        with _in_pieces(x):
            outputs, *end = _FUSED[self.mode](x, state if self.mode == "LSTM" else state[0], flat, *settings)
        return outputs, tuple(end)

    def _step_by_step(self, x: Tensor, state: State, weights: Sequence[Sequence[Tensor]]) -> tuple[Tensor, State]:
        step, both, ends = _STEPS[self.mode], [], []
        for direction, (own, *before) in enumerate(zip(weights, *state, strict=True)):
            into, hidden, *biases = own[:4] if self.bias else own[:2]
            projection = own[-1] if self.proj_size else None
            gates, now, outputs = F.linear(x, into, *biases[:1]), tuple(before), []
            for gate in gates.flip(0) if direction else gates:
                now = step(gate, now, F.linear(now[0], hidden, *biases[1:]), projection)
                outputs.append(now[0])
            both.append(torch.stack(outputs[::-1] if direction else outputs))
            ends.append(now)
        return torch.cat(both, dim=-1), tuple(torch.stack(end) for end in zip(*ends, strict=True))


class TensorRNN(TensorRecurrent, nn.RNN): ...


class TensorLSTM(TensorRecurrent, nn.LSTM): ...


class TensorGRU(TensorRecurrent, nn.GRU): ...


class _Cell(nn.RNNCellBase):
    mode: str

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if not _are_stacked(input, hx, self.parameters()):
            return super().forward(input, hx)
        cells = self.mode == "LSTM"
        if hx is None:
            hx = (input.new_zeros(*input.shape[:-1], self.hidden_size),) * (1 + cells)
        state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        gates = F.linear(input, self.weight_ih, self.bias_ih)
        now = _STEPS[self.mode](gates, state, F.linear(state[0], self.weight_hh, self.bias_hh), None)
        return now if cells else now[0]


class StackedRNNCell(_Cell, nn.RNNCell):
    @property
    def mode(self) -> str:  # type: ignore[override]
        return f"RNN_{self.nonlinearity.upper()}"


class StackedLSTMCell(_Cell, nn.LSTMCell):
    mode = "LSTM"


class StackedGRUCell(_Cell, nn.GRUCell):
    mode = "GRU"


RECURRENT: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: TensorRNN, nn.LSTM: TensorLSTM, nn.GRU: TensorGRU,
    nn.RNNCell: StackedRNNCell, nn.LSTMCell: StackedLSTMCell, nn.GRUCell: StackedGRUCell,
}  # fmt: skip


@contextmanager
def _in_pieces(x: Any) -> Iterator[None]:
    """Without cuDNN's warning that it puts the weights together at every call: ours are parts of a flat vector."""
    if not x.is_cuda:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk of memory")
        yield


def _are_stacked(input: Any, hx: Any, parameters: Iterator[Tensor]) -> bool:
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    return any(is_batchedtensor(t) for t in (input, *states, *parameters) if isinstance(t, Tensor))


# From what the input and the hidden state say of the gates to the next state.


def _lstm(x: Tensor, state: State, h: Tensor, projection: Tensor | None) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    cells = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cells.tanh()
    return hidden if projection is None else F.linear(hidden, projection), cells


def _gru(x: Tensor, state: State, h: Tensor, projection: None) -> State:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = x.chunk(3, -1), h.chunk(3, -1)
    new = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (new + (z_x + z_h).sigmoid() * (state[0] - new),)


_STEPS: dict[str, Callable[..., State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda x, state, h, projection: ((x + h).tanh(),),
    "RNN_RELU": lambda x, state, h, projection: ((x + h).relu(),),
}
_FUSED: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
