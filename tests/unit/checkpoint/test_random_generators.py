"""The generators go on as if nothing had happened."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sparse_ds.checkpoint.random_generators import read_generators, write_generators

CPU = torch.device("cpu")


def draw() -> list[object]:
    """An odd number of gaussian numbers: each generator keeps the second of a pair."""
    return [
        random.random(),
        random.gauss(),
        random.getrandbits(70),
        *np.random.normal(size=3).tolist(),
        int(np.random.randint(10**9)),
        *torch.randn(3).tolist(),
        int(torch.randint(10**9, ())),
    ]


@pytest.mark.parametrize("num_before", [0, 1, 2, 700])
def test_they_go_on(num_before: int) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for _ in range(num_before):
        draw()
    states = {name: state.clone() for name, state in read_generators(CPU).items()}
    assert all(state.dtype == torch.uint8 and state.dim() == 1 for state in states.values())
    expected = [draw() for _ in range(700)]
    # An object that a new process would have.
    random.seed(None)
    np.random.seed(9)
    torch.manual_seed(9)
    assert draw() != expected[0]
    write_generators(states, CPU)
    assert [draw() for _ in range(700)] == expected


def test_the_size_is_always_the_same() -> None:
    sizes = []
    for _ in range(3):
        sizes.append({name: state.numel() for name, state in read_generators(CPU).items()})
        draw()
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("name", ["python_generator", "numpy_generator", "torch_generator"])
def test_something_else_is_refused(name: str) -> None:
    states = read_generators(CPU)
    for wrong in (states[name][:-1], torch.zeros(0, dtype=torch.uint8), torch.full_like(states[name], 255)):
        with pytest.raises((ValueError, RuntimeError)):
            write_generators({**states, name: wrong}, CPU)
    write_generators(states, CPU)
