"""The random generators of one rank: python's, numpy's, torch's and the GPU's, as tensors of bytes."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

CUDA_GENERATOR = "cuda_generator"
_PYTHON_WORDS, _NUMPY_WORDS = 625, 624
_TAIL = "<qd"
"""What follows the words: numpy's position in them, and the second of a pair of gaussian numbers (NaN: none)."""


def read_generators(device: torch.device) -> dict[str, Tensor]:
    """Name -> uint8 state, always of the same length; `device` is that of the rank."""
    version, words, gauss = random.getstate()
    assert version == 3 and len(words) == _PYTHON_WORDS
    state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = state
    assert name == "MT19937" and len(keys) == _NUMPY_WORDS
    nan = float("nan")
    states = {
        "python_generator": _pack(np.array(words, dtype="<u4"), 0, nan if gauss is None else gauss),
        "numpy_generator": _pack(np.asarray(keys).astype("<u4"), position, cached if has_gauss else nan),
        "torch_generator": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states[CUDA_GENERATOR] = torch.cuda.get_rng_state(device)
    return states


def write_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Take over what `read_generators` returned.

    Raises:
        ValueError, RuntimeError: it is no state of a generator.
    """
    words, _, gauss = _unpack(states["python_generator"], _PYTHON_WORDS)
    random.setstate((3, tuple(int(word) for word in words), None if np.isnan(gauss) else gauss))
    keys, position, cached = _unpack(states["numpy_generator"], _NUMPY_WORDS)
    if not 0 <= position <= _NUMPY_WORDS:
        raise ValueError(f"numpy's generator stands at {position}, expected 0 to {_NUMPY_WORDS}")
    has_gauss = not np.isnan(cached)
    np.random.set_state(("MT19937", keys, position, int(has_gauss), cached if has_gauss else 0.0))
    torch.set_rng_state(states["torch_generator"])
    if device.type == "cuda" and CUDA_GENERATOR in states:
        torch.cuda.set_rng_state(states[CUDA_GENERATOR], device)


def _pack(words: np.ndarray, position: int, gauss: float) -> Tensor:
    content = words.tobytes() + struct.pack(_TAIL, position, gauss)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _unpack(state: Tensor, num_words: int) -> tuple[np.ndarray, int, float]:
    content = state.numpy().tobytes()
    if len(content) != 4 * num_words + struct.calcsize(_TAIL):
        raise ValueError(f"the state of a generator has {len(content)} bytes")
    words = np.frombuffer(content[: 4 * num_words], dtype="<u4")
    position, gauss = struct.unpack(_TAIL, content[4 * num_words :])
    return words, position, gauss
