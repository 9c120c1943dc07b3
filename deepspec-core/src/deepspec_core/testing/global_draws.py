"""Checks that code leaves global state alone: it neither draws nor seeds random numbers, and sets no mode of torch.

This file knows the generators of torch, numpy and random, and torch's modes. It does not know what is tested.
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


@contextmanager
def no_global_modes() -> Iterator[None]:
    """Raise Unmet if torch's modes change within this context. All modes are restored at the end."""
    before = _modes()
    try:
        yield
        changed = [f"{name} is {now}, and was {before[name]}" for name, now in _modes().items() if now != before[name]]
        require(not changed, f"it leaves torch in another mode: {'; '.join(changed)}")
    finally:
        torch.set_grad_enabled(bool(before["gradients enabled"]))
        torch.set_default_dtype(before["the default dtype"])
        if torch.get_num_threads() != before["the number of threads"]:
            torch.set_num_threads(before["the number of threads"])


def _modes() -> dict[str, Any]:
    return {
        "gradients enabled": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
    }


def _states() -> tuple[object, ...]:
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate()
