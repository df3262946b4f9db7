"""A hash that tells base models of one architecture apart, without reading them whole.

It covers a piece of every target matrix, cast as training casts it: a checkpoint in fp32 and its copy in bf16 have the
same hash for a training in bf16, a fine-tuned model has another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.stored_nf4 import find_stored_nf4

PIECE_ELEMENTS = 1024
"""From the middle of every tensor."""


def weights_hash(checkpoint: BaseCheckpoint, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> str | None:
    """The hash of a stored base model; None where a tensor is missing or stored in NF4.

    Reads 2 or 4 KiB of each tensor.

    Args:
        checkpoint: the base model.
        shapes: tensor name -> shape, of the targets; a vector of D as [D, 1].
        dtype: of the training.
    """
    if any(name not in checkpoint or find_stored_nf4(checkpoint, name) is not None for name in shapes):
        return None
    return hash_pieces(shapes, dtype, checkpoint.read_range)


def hash_pieces(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read_range: Callable[[str, int, int], Tensor]
) -> str:
    """sha256 over names, shapes and a piece of each tensor.

    Args:
        shapes: tensor name -> shape.
        dtype: what the pieces are cast to.
        read_range: (name, start, stop) -> elements [start, stop) of the flat tensor, in any floating dtype.
    """
    digest = hashlib.sha256()
    for name in sorted(shapes):
        num_elements = torch.Size(shapes[name]).numel()
        start = max(num_elements - PIECE_ELEMENTS, 0) // 2
        piece = read_range(name, start, min(start + PIECE_ELEMENTS, num_elements)).to("cpu", dtype)
        digest.update(f"{name}\0{list(shapes[name])}\0".encode() + piece.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
