"""Modules, each with a dropout rate: that of skorch nets, and others that are no MLP, for benchmarks on generated data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Two hidden layers, with dropout before and after them: the module of a skorch net."""

    def __init__(
        self,
        features: int = 2,
        outputs: int = 2,
        hidden: tuple[int, int] = (64, 64),
        input_dropout: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        sizes = (features, *hidden)
        self.input_drop, self.drop, self.out = (
            nn.Dropout(input_dropout),
            nn.Dropout(dropout),
            nn.Linear(hidden[-1], outputs),
        )
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, X: Tensor) -> Tensor:
        """Rows (B, features); skorch calls them X."""
        h = self.input_drop(X)
        for layer in self.layers:
            h = self.drop(torch.relu(layer(h)))
        return self.out(h)


class Normed(nn.Sequential):
    """Two hidden layers with BatchNorm."""

    def __init__(self, n_features_in: int, n_outputs: int, *, dropout: float = 0.1):
        layers: list[nn.Module] = []
        for width in (n_features_in, 48):
            layers += [nn.Linear(width, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(48, n_outputs))


class Residual(nn.Module):
    """Two residual blocks with LayerNorm."""

    def __init__(self, n_features_in: int, n_outputs: int, *, dropout: float = 0.1):
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(n_features_in, 32), nn.LayerNorm(32), nn.Linear(32, n_outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 32))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, features)."""
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(self.norm(h))


class Convolutions(nn.Module):
    """Two convolutions along the series, with BatchNorm."""

    def __init__(self, shape: tuple[int, int], n_outputs: int, *, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(shape[1], 12, 5, padding=2), nn.BatchNorm1d(12), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(12, 12, 5, padding=2), nn.BatchNorm1d(12), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(12 * (shape[0] // 2), n_outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Series (B, T, channels)."""
        return self.layers(x.transpose(1, 2))


class Recurrent(nn.Module):
    """A GRU, and dropout before the output."""

    def __init__(self, shape: tuple[int, int], n_outputs: int, *, dropout: float = 0.1):
        super().__init__()
        self.rnn = nn.GRU(shape[1], 12, batch_first=True)
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(12, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Series (B, T, channels)."""
        return self.out(self.dropout(self.rnn(x)[0][:, -1]))


class Transformer(nn.Module):
    """One encoder layer with learned positions, and dropout before the output."""

    def __init__(self, shape: tuple[int, int], n_outputs: int, *, dropout: float = 0.1):
        super().__init__()
        self.embed, self.positions = nn.Linear(shape[1], 16), nn.Parameter(0.1 * torch.randn(shape[0], 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(16, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Series (B, T, channels)."""
        return self.out(self.dropout(self.layer(self.embed(x) + self.positions).mean(dim=1)))
