"""Checks that code leaves global random generators alone: it neither draws from them nor seeds them.

This file knows the generators of torch, numpy and random. It does not know what is tested.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from deepspec_core.testing.conformance import require


@contextmanager
def no_global_draws() -> Iterator[None]:
    """Raise Unmet if a global generator's state changes within this context. All states are restored at the end."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # A state that no constant seed gives, so that seeding anew changes the state and is noticed.
    np.random.random(3)
    random.random()
    torch.rand(3, device="cpu")
    try:
        before = _states()
        yield
        require(_states() == before, "a generator of random numbers of torch, numpy or random has moved")
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _states() -> tuple[object, ...]:
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate()
