"""Whether global random numbers are left alone: not drawn from, and not seeded anew.

Knows the generators of torch, numpy and random. Does not know what is tested.
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
    """Unmet where a global generator has another state at the end. They are as before afterwards, whatever happens."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # No state that a constant seed gives: that is how a seed set anew is seen.
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
