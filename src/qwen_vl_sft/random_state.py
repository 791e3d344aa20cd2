"""Save and restore the random state of this process, so that side work does not change a run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> tuple[Any, ...]:
    """Return the states of Python's, NumPy's and PyTorch's generators, also the GPU's."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def set_random_state(state: tuple[Any, ...]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state(state[3])


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the random state at the end, as if nothing inside had drawn random numbers."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
