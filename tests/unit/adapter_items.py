"""Types of the fixtures of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

MakeBase = Callable[..., Path]
MakeAdapter = Callable[..., Path]
Deltas = dict[str, tuple[torch.Tensor, torch.Tensor]]


def as_items(deltas: Deltas) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """As `save_adapter` takes them."""
    for name, (indices, values) in deltas.items():
        yield name, indices, values
