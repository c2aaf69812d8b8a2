"""What a user's function keeps is seen to change."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hypertune.functions import own_copy, state_of


class Keeps:
    """Something, which it changes in a call."""

    def __init__(self, kept: Any, change: Callable[[Any], Any]):
        self.kept, self.change = kept, change

    def __call__(self) -> None:
        changed = self.change(self.kept)
        self.kept = self.kept if changed is None else changed


@dataclass(slots=True)
class Slotted:
    calls: int = 0

    def __call__(self) -> None:
        self.calls += 1


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.bfloat16))

    def forward(self) -> None:
        self.calls += 1


def in_a_closure() -> Callable[[], None]:
    calls = [0]

    def count() -> None:
        calls[0] += 1

    return count


CHANGING: dict[str, Callable[[], Any]] = {
    "number": lambda: Keeps(0, lambda n: n + 1),
    "dict": lambda: Keeps({"deep": [0]}, lambda d: d["deep"].append(1)),
    "array": lambda: Keeps(np.zeros(20_000), lambda a: a.__setitem__(0, a[0] + 1)),
    "tensor": lambda: Keeps(torch.zeros(2), lambda t: t + 1),
    "data of a tensor": lambda: Keeps(torch.zeros(2), lambda t: t.data.add_(1)),
    "iterator": lambda: Keeps(itertools.count(), lambda c: (next(c), c)[1]),
    "slots": Slotted,
    "module": Counting,
    "closure": in_a_closure,
    "partial": lambda: functools.partial(Slotted()),
    "method": lambda: Slotted().__call__,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_change_is_seen_and_its_absence_too(kind: str):
    function = CHANGING[kind]()
    before = state_of(function)
    assert state_of(function) == before
    for _ in range(2):
        function()
    assert state_of(function) != before


def test_what_holds_itself_or_very_much_or_no_numbers_is_no_obstacle():
    function = Keeps([], lambda kept: None)
    function.kept.append(function)
    assert state_of(function) == state_of(function)
    assert state_of({k: k for k in range(100_000)}) == []
    assert state_of([torch.empty(2, device="meta"), len, np, int]) is not None


def test_copies_of_one_object_s_functions_stay_one_object_s():
    both = Keeps(0, lambda n: n + 1)
    call, again = own_copy((both.__call__, both))
    call()
    assert (again.kept, both.kept) == (1, 0)
    stuck = Keeps((n for n in ()), lambda kept: None)  # a generator cannot be copied
    assert own_copy(stuck) is stuck
    assert own_copy((stuck, in_a_closure))[0] is stuck


@pytest.mark.parametrize("make", [random.Random, np.random.default_rng, np.random.RandomState])
def test_generators_keep_where_they_are(make):
    generator = make(0)
    before = state_of([generator])
    assert state_of([generator]) == before
    generator.random()
    assert state_of([generator]) != before


def test_what_does_not_say_what_it_keeps_is_no_error():
    assert state_of([random.SystemRandom(), (i for i in range(3))]) is not None
