"""Torch's global state. Every fit is reproducible from its ``random_state``, and nobody else's random numbers change.

Layers draw their initial weights and dropout masks from torch's one global generator. :func:`isolated` lends it to us:
seeded at the start, put back as it was at the end. Threads take turns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

ONE_AT_A_TIME = threading.RLock()
if hasattr(os, "register_at_fork"):  # a thread that has it is not there in a child, and would never give it back
    os.register_at_fork(after_in_child=ONE_AT_A_TIME._at_fork_reinit)  # type: ignore[attr-defined]


def draw_seed(random_state: Any) -> int:
    """An integer seed from scikit-learn's ``random_state``; ``None`` means fresh entropy from the operating system."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    if isinstance(random_state, (int, np.integer)):
        check_random_state(random_state)  # refuses what scikit-learn refuses
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def rng_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state of torch's global generators that a forward pass on this device draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_rng_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    """Put the generators back into a state of :func:`rng_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def seed_torch(seed: int, device: str = "cpu") -> None:
    """Seed torch's global generators of the CPU and of this device, and of no other."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        torch.manual_seed(seed)  # whatever else there is
        return
    torch.default_generator.manual_seed(seed)
    if kind == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def isolated(seed: int, device: str = "cpu") -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after it, whatever happens."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=devices):
        seed_torch(seed, device)
        yield


@contextmanager
def gradients() -> Iterator[None]:
    """Record gradients inside, or in what this decorates, whatever mode the caller is in: ``torch.no_grad``, ``inference_mode``, ``autocast``."""
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as full:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                full.enter_context(torch.autocast(kind, enabled=False))
        yield
